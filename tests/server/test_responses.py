"""/v1/responses: items, the events that tell of them, and what is refused for want of a memory."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dsv3.text.tools import ToolCall, write_calls
from tests.server.fakes import FakeEngine, client, events, tokenizer
from tests.text.toy import EOS

PATH = "/v1/responses"
CALLS = write_calls([ToolCall("f", '{"see": "Let me"}')])


def ask(engine: FakeEngine | None = None, **request: Any) -> dict[str, Any]:
    with client(engine) as http:
        answer = http.post(PATH, json=request)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_response_is_a_list_of_items() -> None:
    answer = ask(FakeEngine(says="Hello there"), input="Hi", metadata={"a": "b"})
    assert (answer["object"], answer["status"], answer["store"]) == ("response", "incomplete", False)
    (item,) = answer["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "incomplete")
    assert item["content"] == [
        {"type": "output_text", "text": "Hello there", "annotations": [], "logprobs": []}
    ]
    assert answer["metadata"] == {"a": "b"}
    assert answer["usage"]["input_tokens_details"] == {"cached_tokens": 2}
    assert answer["usage"]["output_tokens"] == len(tokenizer().encode("Hello there"))


def test_an_answer_that_ends_by_itself_is_complete() -> None:
    answer = ask(FakeEngine(says="Hello", finish="stop"), input="Hi")
    assert (answer["status"], answer["incomplete_details"]) == ("completed", None)


def test_a_stream_tells_of_every_step() -> None:
    with client(FakeEngine(says="Hello there fox", finish="stop")) as http:
        text = http.post(PATH, json={"input": "Hi", "stream": True}).text
    found = [json.loads(event) for event in events(text)]
    kinds = [event["type"] for event in found]
    deltas = kinds.count("response.output_text.delta")
    assert deltas > 2
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert "".join(e["delta"] for e in found if e["type"].endswith("text.delta")) == "Hello there fox"
    assert len({e["item_id"] for e in found if "item_id" in e}) == 1
    whole = found[-1]["response"]
    assert whole["output"][0]["content"][0]["text"] == "Hello there fox"
    assert whole["usage"]["total_tokens"] > 0
    for line in text.splitlines():
        assert not line or line.startswith(("event: ", "data: "))


def test_a_conversation_comes_as_items() -> None:
    engine = FakeEngine()
    items = [
        {"role": "user", "content": "One"},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "Two", "annotations": []}]},
        {"role": "user", "content": [{"type": "input_text", "text": "Three"}]},
    ]  # fmt: skip
    ask(engine, input=items, instructions="Be kind.")
    text = tokenizer().decode(engine.calls[0].prompt_ids, skip_special_tokens=False)
    assert text == (
        "<｜begin▁of▁sentence｜>Be kind.<｜User｜>One<｜Assistant｜>Two<｜end▁of▁sentence｜>"
        "<｜User｜>Three<｜Assistant｜>"
    )


def test_what_the_model_thought_comes_back_with_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    thought = {
        "type": "reasoning",
        "id": "rs_1",
        "status": "completed",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "Hm."}],
    }
    items = [
        {"role": "user", "content": "One"},
        thought,
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        thought,
        {"role": "assistant", "content": "Two"},
        thought,
        {"role": "user", "content": "Three"},
    ]
    from dsv3.server.protocol import ResponsesRequest
    from dsv3.server.responses import _messages

    messages = _messages(ResponsesRequest.model_validate({"input": items}))
    assert [(m["role"], m.get("reasoning_content")) for m in messages] == [
        ("user", None), ("assistant", "Hm."), ("tool", None), ("assistant", "Hm."), ("user", None)
    ]  # fmt: skip
    ask(FakeEngine(), input=items)


LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}


@pytest.mark.parametrize(
    ("says", "content"),
    [
        ("Hello there, 林🦊 <fox>.", "Hello there, 林🦊 <fox>."),
        ("<｜tool▁calls", "<｜tool▁calls"),
        ("Let me <see>.\n" + CALLS, "Let me <see>.\n"),
        (CALLS, None),
        ("", ""),
    ],
)
@pytest.mark.parametrize("finish", ["stop", "length"])
def test_logprobs_are_those_of_the_text(says: str, content: str | None, finish: str) -> None:
    """The text's own tokens: no marker, no call, not the one that ended it."""
    ended = says + EOS * (finish == "stop")
    request = {"input": "Hi", "tools": [{"type": "function", "name": "f"}], **LOGPROBS}
    whole = ask(FakeEngine(says=ended, finish=finish), **request)
    with client(FakeEngine(says=ended, finish=finish)) as http:
        found = [json.loads(e) for e in events(http.post(PATH, json={**request, "stream": True}).text)]
    assert whole["top_logprobs"] == 2
    parts = [item["content"][0] for item in whole["output"] if item["type"] == "message"]
    assert [part["text"] for part in parts] == ([] if content is None else [content])
    for part in parts:
        assert b"".join(bytes(token["bytes"]) for token in part["logprobs"]).decode() == content
        assert all(
            token["logprob"] == -0.75 and len(token["top_logprobs"]) == 2 for token in part["logprobs"]
        )
        streamed = [e for e in found if e["type"] == "response.output_text.delta"]
        assert [token for e in streamed for token in e["logprobs"]] == part["logprobs"]
        (done,) = [e for e in found if e["type"] == "response.output_text.done"]
        assert done["logprobs"] == part["logprobs"]
    assert [item.get("content") for item in found[-1]["response"]["output"]] == [
        item.get("content") for item in whole["output"]
    ]
    ask(input=[{"role": "user", "content": "Hi"}, *whole["output"], {"role": "user", "content": "And?"}])


def test_reasoning_has_no_logprobs() -> None:
    engine = FakeEngine(says="<think>It t</think>\n\nt, yes.", finish="length")
    template = "{# <think> #}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    own = tokenizer()
    engine.llm.tokenizer = type(own)(own.backend, own.special_tokens, chat_template=template)
    thought, said = ask(engine, input="Hi", **LOGPROBS)["output"]
    assert (thought["content"], said["content"][0]["text"]) == (
        [{"type": "reasoning_text", "text": "It t"}],
        "t, yes.",
    )
    assert b"".join(bytes(t["bytes"]) for t in said["content"][0]["logprobs"]) == b"t, yes."


def test_without_being_asked_for_logprobs_are_empty() -> None:
    engine = FakeEngine(says="Hello")
    (item,) = ask(engine, input="Hi", include=[], top_logprobs=0)["output"]
    assert item["content"][0]["logprobs"] == [] and engine.calls[0].params.logprobs is None


@pytest.mark.parametrize(
    ("refused", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 21}, "top_logprobs"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ],
)
def test_what_needs_a_memory_or_openais_tools_is_refused(refused: dict[str, Any], param: str) -> None:
    with client() as http:
        answer = http.post(PATH, json={"input": "Hi", **refused})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_failure_on_the_way_is_an_event() -> None:
    with client(FakeEngine(fails_at=2)) as http:
        text = http.post(PATH, json={"input": "Once upon a time", "stream": True}).text
    last = json.loads(events(text)[-1])
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "engine_error"
