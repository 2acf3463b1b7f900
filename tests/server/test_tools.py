"""Calls of tools and reasoning, in chats and responses, whole and as streams."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from dsv3.text.tools import ToolCall, write_calls
from tests.server.fakes import FakeEngine, chat, client, events, tokenizer

CHAT = "/v1/chat/completions"
WEATHER = {
    "name": "weather",
    "description": "How the weather is.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOLS = [{"type": "function", "function": WEATHER}]
CALLS = [ToolCall("weather", '{"city": "Oslo"}'), ToolCall("weather", '{"city": "Rome"}')]
SAYS = "Let me see. " + write_calls(CALLS)


def test_calls_are_read_out_of_the_answer() -> None:
    with client(FakeEngine(says=SAYS, finish="stop")) as http:
        (choice,) = http.post(CHAT, json=chat(tools=TOOLS)).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"].strip() == "Let me see."
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": call.name, "arguments": call.arguments} for call in CALLS
    ]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert {call["type"] for call in message["tool_calls"]} == {"function"}


def test_an_answer_of_calls_alone_has_no_content() -> None:
    with client(FakeEngine(says=write_calls(CALLS[:1]), finish="stop")) as http:
        (choice,) = http.post(CHAT, json=chat(tools=TOOLS)).json()["choices"]
    assert choice["message"]["content"] is None


def test_calls_come_in_pieces_that_add_up() -> None:
    with client(FakeEngine(says=SAYS, finish="stop")) as http:
        text = http.post(CHAT, json=chat(tools=TOOLS, stream=True)).text
    found = [json.loads(event)["choices"][0] for event in events(text)[:-1]]
    assert found[-1]["finish_reason"] == "tool_calls"
    calls: dict[int, dict[str, Any]] = {}
    for delta in (choice["delta"] for choice in found):
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                assert part["index"] not in calls and part["type"] == "function"
                calls[part["index"]] = {"name": part["function"]["name"], "arguments": ""}
            calls[part["index"]]["arguments"] += part["function"]["arguments"]
    assert list(calls.values()) == [{"name": c.name, "arguments": c.arguments} for c in CALLS]
    content = "".join(choice["delta"].get("content", "") for choice in found)
    assert content.strip() == "Let me see."
    assert sum("tool_calls" in choice["delta"] for choice in found) > 4, "arguments came in one piece"


def test_without_tools_markers_are_text() -> None:
    for request in (chat(), chat(tools=TOOLS, tool_choice="none")):
        with client(FakeEngine(says=SAYS, finish="stop")) as http:
            (choice,) = http.post(CHAT, json=request).json()["choices"]
        assert choice["finish_reason"] == "stop" and "tool_calls" not in choice["message"]
        assert choice["message"]["content"] == SAYS


def test_the_model_is_told_of_its_tools_and_of_what_they_gave() -> None:
    engine = FakeEngine()
    call = {"id": "call_1", "type": "function"}
    call |= {"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": "Is it raining?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "It rains."},
    ]
    with client(engine) as http:
        answer = http.post(CHAT, json={"messages": messages, "tools": TOOLS, "max_tokens": 1})
    assert answer.status_code == 200, answer.text
    text = tokenizer().decode(engine.calls[0].prompt_ids, skip_special_tokens=False)
    for part in ("How the weather is.", '"city"', '{"city": "Oslo"}', "It rains."):
        assert part in text


@pytest.mark.parametrize(
    ("choice", "several"),
    [("required", True), ({"type": "function", "function": {"name": "weather"}}, False)],
)
def test_calls_may_be_required(choice: Any, several: bool) -> None:
    engine = FakeEngine(says=write_calls(CALLS[:1]), finish="stop")
    with client(engine) as http:
        answer = http.post(CHAT, json=chat("Hi", tools=TOOLS, tool_choice=choice))
    assert answer.status_code == 200, answer.text
    structured = engine.calls[0].params.structured
    assert structured is not None and structured.tool_calls is not None
    assert [function.name for function in structured.tool_calls.functions] == ["weather"]
    assert structured.tool_calls.several is several


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"tools": [*TOOLS, *TOOLS]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "code_interpreter"}]}, "tools[0].type"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    ],
)
def test_wrong_tools_are_named(request_: dict[str, Any], param: str) -> None:
    with client() as http:
        answer = http.post(CHAT, json=chat(**request_))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


JSON: dict[str, Any] = {"type": "json_object"}
STRICT = [{"type": "function", "function": {**WEATHER, "strict": True}}]


@pytest.mark.parametrize(
    ("more", "form"),
    [
        ({"tools": TOOLS}, None),
        ({"tools": STRICT}, (False, True, False)),
        ({"tools": STRICT, "tool_choice": "auto", "parallel_tool_calls": False}, (False, False, False)),
        ({"tools": TOOLS, "parallel_tool_calls": False}, (False, False, False)),
        ({"tools": TOOLS, "response_format": JSON}, (False, True, True)),
        ({"tools": STRICT, "response_format": JSON, "tool_choice": "required"}, (True, True, False)),
        ({"tools": STRICT, "tool_choice": "none"}, None),
    ],
)
def test_what_an_answer_is_held_to(more: dict[str, Any], form: tuple[bool, ...] | None) -> None:
    """The form: whether calls are required, whether there may be several, whether the text has a form."""
    engine = FakeEngine(finish="stop")
    with client(engine) as http:
        assert http.post(CHAT, json=chat(**more)).status_code == 200
        flat = [{"type": "function", **tool["function"]} for tool in more["tools"]]
        asked = {**more, "input": "Hi", "tools": flat}
        if "response_format" in asked:
            asked["text"] = {"format": asked.pop("response_format")}
        assert http.post("/v1/responses", json=asked).status_code == 200
    for call in engine.calls:
        structured = call.params.structured
        if structured is None or form is None:
            assert structured is form
            continue
        calls = structured.tool_calls
        assert calls is not None
        assert (calls.required, calls.several, structured.json_object) == form
        assert [function.strict for function in calls.functions] == [more["tools"] is STRICT]


def test_beside_a_form_what_does_not_begin_with_a_call_is_text() -> None:
    asked = {"tools": TOOLS, "response_format": JSON}
    text = json.dumps({"a": write_calls(CALLS)}, ensure_ascii=False)
    for says, calls in ((text, 0), (write_calls(CALLS), 2)):
        with client(FakeEngine(says=says, finish="stop")) as http:
            (choice,) = http.post(CHAT, json=chat(**asked)).json()["choices"]
            stream = http.post(CHAT, json=chat(**asked, stream=True)).text
        assert len(choice["message"].get("tool_calls", ())) == calls
        assert choice["message"]["content"] == (None if calls else text)
        deltas = [json.loads(event)["choices"][0]["delta"] for event in events(stream)[:-1]]
        assert "".join(delta.get("content") or "" for delta in deltas) == ("" if calls else text)


THINKING = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if thinking %}<think>{% endif %}"
)


@pytest.fixture
def reasoner() -> FakeEngine:
    """A model whose template knows reasoning."""
    engine = FakeEngine(says="It rains a lot.</think>Yes.", finish="stop")
    copy = type(tokenizer())(tokenizer().backend, tokenizer().special_tokens, chat_template=THINKING)
    engine.llm.tokenizer = copy
    return engine


def test_reasoning_is_apart_from_the_answer(reasoner: FakeEngine) -> None:
    request = chat("Hi", chat_template_kwargs={"thinking": True})
    with client(reasoner) as http:
        message = http.post(CHAT, json=request).json()["choices"][0]["message"]
        text = http.post(CHAT, json={**request, "stream": True}).text
        response = http.post(
            "/v1/responses", json={"input": "Hi", "chat_template_kwargs": {"thinking": True}}
        ).json()
    assert (message["reasoning_content"], message["content"]) == ("It rains a lot.", "Yes.")
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events(text)[:-1]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "It rains a lot."
    assert "".join(delta.get("content") or "" for delta in deltas) == "Yes."
    reasoned = response["usage"]["output_tokens_details"]["reasoning_tokens"]
    assert reasoned == len(tokenizer().encode("It rains a lot."))
    thought, said = response["output"]
    assert (thought["type"], thought["content"][0]["text"]) == ("reasoning", "It rains a lot.")
    assert (said["type"], said["content"][0]["text"]) == ("message", "Yes.")


def test_an_answer_without_reasoning_has_none(reasoner: FakeEngine) -> None:
    engine = dataclasses.replace(reasoner, says="Yes.")
    engine.llm.tokenizer = reasoner.llm.tokenizer
    with client(engine) as http:
        message = http.post(CHAT, json=chat("Hi")).json()["choices"][0]["message"]
    assert message["content"] == "Yes." and "reasoning_content" not in message


# Responses


TOOL = [{"type": "function", **WEATHER}]


def test_calls_are_items_of_a_response() -> None:
    with client(FakeEngine(says=SAYS, finish="stop")) as http:
        answer = http.post("/v1/responses", json={"input": "Hi", "tools": TOOL}).json()
    kinds = [item["type"] for item in answer["output"]]
    assert kinds == ["message", "function_call", "function_call"]
    assert [(c["name"], c["arguments"]) for c in answer["output"][1:]] == [
        (c.name, c.arguments) for c in CALLS
    ]
    assert {item["status"] for item in answer["output"]} == {"completed"}
    assert len({item["id"] for item in answer["output"]}) == 3
    assert answer["tools"][0]["name"] == "weather"


def test_a_stream_of_calls_tells_where_each_begins_and_ends() -> None:
    with client(FakeEngine(says=SAYS, finish="stop")) as http:
        text = http.post("/v1/responses", json={"input": "Hi", "tools": TOOL, "stream": True}).text
    found = [json.loads(event) for event in events(text)]
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    for index in (1, 2):
        own = [event for event in found if event.get("output_index") == index]
        kinds = [event["type"] for event in own]
        assert kinds[0] == "response.output_item.added" and kinds[-1] == "response.output_item.done"
        pieces = [e["delta"] for e in own if e["type"] == "response.function_call_arguments.delta"]
        done = next(e for e in own if e["type"] == "response.function_call_arguments.done")
        assert "".join(pieces) == done["arguments"] == CALLS[index - 1].arguments
    assert found[-1]["type"] == "response.completed"


def test_calls_and_what_they_gave_come_back_as_items() -> None:
    engine = FakeEngine()
    items = [
        {"role": "user", "content": "Rain?"},
        {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city": "Oslo"}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "It rains."},
    ]
    with client(engine) as http:
        answer = http.post("/v1/responses", json={"input": items})
    assert answer.status_code == 200, answer.text
    text = tokenizer().decode(engine.calls[0].prompt_ids, skip_special_tokens=False)
    assert '{"city": "Oslo"}' in text and "It rains." in text
