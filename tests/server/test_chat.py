"""/v1/chat/completions: what goes to the engine, and what comes back whole and in pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dsv3.engine.grammar import StructuredOutput
from tests.server.fakes import FakeEngine, chat, client, events, tokenizer

PATH = "/v1/chat/completions"


def ask(engine: FakeEngine | None = None, **more: Any) -> dict[str, Any]:
    with client(engine) as http:
        answer = http.post(PATH, json=chat(**more))
    assert answer.status_code == 200, answer.text
    return answer.json()


def chunks(engine: FakeEngine | None = None, **more: Any) -> list[dict[str, Any]]:
    with client(engine) as http:
        answer = http.post(PATH, json=chat(stream=True, **more))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *found, done = events(answer.text)
    assert done == "[DONE]"
    return [json.loads(event) for event in found]


def test_an_answer_has_openais_shape() -> None:
    answer = ask(FakeEngine(says="Hello there"), model="dsv3")
    assert answer["id"].startswith("chatcmpl-") and answer["object"] == "chat.completion"
    assert answer["model"] == "dsv3" and answer["system_fingerprint"].startswith("dsv3-")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello there", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    usage = answer["usage"]
    assert usage["completion_tokens"] == len(tokenizer().encode("Hello there"))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}


def test_the_pieces_of_a_stream_are_the_whole() -> None:
    text = 'Once "upon" a\ntime 从前有一只小狐狸 🙂'
    found = chunks(FakeEngine(says=text))
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in found) == text
    assert [c["choices"][0]["finish_reason"] for c in found] == [None] * (len(found) - 1) + ["length"]
    assert {c["object"] for c in found} == {"chat.completion.chunk"}
    assert len({c["id"] for c in found}) == 1
    assert "usage" not in found[-1]


def test_usage_comes_last_where_it_is_asked_for() -> None:
    found = chunks(FakeEngine(says="Hi"), stream_options={"include_usage": True})
    assert found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] == 2
    assert all(chunk["usage"] is None for chunk in found[:-1])


def test_several_answers_are_told_apart() -> None:
    engine = FakeEngine(says="Hello there")
    answer = ask(engine, n=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in answer["choices"]} == {"Hello there"}
    assert engine.calls[0].params.n == 3
    found = chunks(FakeEngine(says="Hello there"), n=2)
    for index in (0, 1):
        own = [c["choices"][0] for c in found if c["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in own) == "Hello there"
        assert own[-1]["finish_reason"] == "length"


def test_parameters_reach_the_engine_over_the_checkpoints_own() -> None:
    engine = FakeEngine()
    given = {
        "temperature": 0.25,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 11,
        "stop": ["\n", "END"],
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.2,
        "min_tokens": 2,
        "max_completion_tokens": 9,
        "ignore_eos": True,
        "stop_token_ids": [5],
        "allowed_token_ids": [5, 6, 7],
    }
    ask(engine, **given, logit_bias={"12": -100, "13": 2.5})
    params = engine.calls[0].params
    assert params.top_p == 0.9, "the checkpoint's default is lost"
    assert params.logit_bias == {12: -100, 13: 2.5}
    assert params.max_tokens == 9
    for name in given.keys() - {"max_completion_tokens"}:
        expected = tuple(given[name]) if isinstance(given[name], list) else given[name]
        assert getattr(params, name) == expected, name


def test_without_a_limit_an_answer_goes_on_to_the_end_of_the_context() -> None:
    engine = FakeEngine()
    ask(engine)
    assert engine.calls[0].params.max_tokens is None
    assert 590 < (engine.calls[0].deadline or 0) <= 600


def test_the_prompt_is_the_chat_templates_text() -> None:
    engine = FakeEngine()
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "Three", "refusal": None},
        {"role": "user", "content": "Say <｜Assistant｜>"},
    ]
    with client(engine) as http:
        assert http.post(PATH, json={"messages": messages}).status_code == 200
    prompt = engine.calls[0].prompt_ids
    text = tokenizer().decode(prompt, skip_special_tokens=False)
    assert text == (
        "<｜begin▁of▁sentence｜>Be kind.<｜User｜>One\ntwo<｜Assistant｜>Three<｜end▁of▁sentence｜>"
        "<｜User｜>Say <｜Assistant｜><｜Assistant｜>"
    )
    assistant = tokenizer().encode("<｜Assistant｜>")[0]
    assert prompt.count(assistant) == 2, "what a user spells out became a control token"


def test_logprobs_name_tokens_and_bytes() -> None:
    (choice,) = ask(FakeEngine(says="fox 狐"), logprobs=True, top_logprobs=3)["choices"]
    content = choice["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == "fox 狐"
    assert content[0]["logprob"] == -0.75
    assert [entry["logprob"] for entry in content[0]["top_logprobs"]] == [-0.5, -0.75, -9999.0]
    found = chunks(FakeEngine(says="fox 狐"), logprobs=True)
    streamed = [
        token for chunk in found if (lp := chunk["choices"][0]["logprobs"]) for token in lp["content"]
    ]
    assert [token["bytes"] for token in streamed] == [token["bytes"] for token in content]
    assert streamed[0]["top_logprobs"] == []


def test_token_ids_and_prompt_logprobs_where_asked_for() -> None:
    engine = FakeEngine(says="Hello")
    answer = ask(engine, return_token_ids=True, prompt_logprobs=1)
    assert answer["prompt_token_ids"] == engine.calls[0].prompt_ids
    assert answer["choices"][0]["token_ids"] == tokenizer().encode("Hello")
    first, second, *_ = answer["prompt_logprobs"]
    assert first is None
    assert second[str(engine.calls[0].prompt_ids[1])]["logprob"] == -0.75
    found = chunks(FakeEngine(says="Hello"), return_token_ids=True, prompt_logprobs=1)
    assert [i for c in found for i in c["choices"][0].get("token_ids", ())] == tokenizer().encode("Hello")
    assert found[1]["prompt_token_ids"] == answer["prompt_token_ids"]
    assert found[1]["prompt_logprobs"] == answer["prompt_logprobs"]


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, StructuredOutput(json_object=True)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
            StructuredOutput(json_schema=json.dumps(SCHEMA)),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, StructuredOutput(json_schema=json.dumps(SCHEMA))),
        ({"structured_outputs": {"regex": "a+"}}, StructuredOutput(regex="a+")),
        ({"guided_choice": ["yes", "no"]}, StructuredOutput(choice=("yes", "no"))),
        ({"guided_grammar": 'root ::= "a"'}, StructuredOutput(grammar='root ::= "a"')),
        ({"response_format": {"type": "text"}}, None),
    ],
)
def test_the_form_of_an_answer(asked: dict[str, Any], expected: StructuredOutput | None) -> None:
    engine = FakeEngine()
    ask(engine, **asked)
    assert engine.calls[0].params.structured == expected
    assert engine.compiled == ([] if expected is None else [expected])


@pytest.mark.parametrize(
    "harmless",
    [
        {"store": False},
        {"user": "x", "metadata": {"a": "b"}, "service_tier": "auto"},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "top_p": 1},
        {"parallel_tool_calls": True, "tools": [], "tool_choice": "none"},
        {"modalities": ["text"], "audio": None, "reasoning_effort": None},
        {"logprobs": False, "logit_bias": {}, "stop": None, "n": 1},
        {"stream": False, "max_tokens": 5, "max_completion_tokens": 5},
    ],
)
def test_what_asks_for_nothing_is_accepted(harmless: dict[str, Any]) -> None:
    ask(**harmless)


def test_the_id_is_the_requests() -> None:
    with client() as http:
        answer = http.post(PATH, json=chat(), headers={"x-request-id": "mine-1"})
    assert answer.json()["id"] == "chatcmpl-mine-1"
    assert answer.headers["x-request-id"] == "mine-1"


def test_an_event_is_one_line_however_lines_are_told() -> None:
    """httpx and others part lines at these too."""
    text = "a\u2028b\u2029c\x85d"
    with client(FakeEngine(says=text)) as http:
        for more in ({}, {"return_token_ids": True}):
            answer = http.post("/v1/chat/completions", json=chat(stream=True, **more)).text
            found = [json.loads(line[6:]) for line in answer.splitlines() if line not in ("", "data: [DONE]")]
            deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in found]
            assert "".join(deltas) == text


# The last turn continued


GO_ON: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}


@pytest.mark.parametrize(
    "said", ["Once upon a", "A line.\n\n  ", "", "Say <｜User｜> and <｜end▁of▁sentence｜>", "Once <"]
)
def test_the_last_message_is_continued(said: str) -> None:
    """The prompt ends with what was said of the answer, to the letter."""
    engine = FakeEngine()
    messages = [{"role": "user", "content": "Once upon a"}, {"role": "assistant", "content": said}]
    request = {"messages": messages, **GO_ON}
    with client(engine) as http:
        answer = http.post(PATH, json={**request, "max_tokens": 4})
        tokens = http.post("/tokenize", json=request).json()["tokens"]
    assert answer.status_code == 200, answer.text
    own = tokenizer()
    expected = [*own.encode_chat(messages[:1]), *own.encode(said, allow_special=False)]  # type: ignore[arg-type]
    assert engine.calls[0].prompt_ids == expected == tokens
    assert len(answer.json()["choices"][0]["message"]["content"]) > 0, "what is new, and no more"


def test_a_conversation_goes_on_within_the_reasoning() -> None:
    engine = FakeEngine(says="it rains.</think>Yes.", finish="stop")
    own = tokenizer()
    template = (
        "{% for message in messages %}{{ message['content'] | trim }}{{ eos_token }}{% endfor %}{# <think> #}"
    )
    engine.llm.tokenizer = type(own)(own.backend, own.special_tokens, chat_template=template)
    for said, reasoning in (("<think>I see that ", "it rains."), ("<think>a</think>b", None)):
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]
        with client(engine) as http:
            message = http.post(PATH, json={"messages": messages, **GO_ON}).json()["choices"][0]["message"]
        assert message.get("reasoning_content") == reasoning
        assert own.decode(engine.calls[-1].prompt_ids, skip_special_tokens=False).endswith(said)


TURN = {"role": "assistant", "content": "Once"}


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"messages": [TURN], "continue_final_message": True}, "continue_final_message"),
        (
            {"messages": [TURN], "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        ({"messages": [TURN], "add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": [TURN, {"role": "user", "content": "Hi"}], **GO_ON}, "messages[1]"),
        (
            {
                "messages": [
                    {**TURN, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}
                ],
                **GO_ON,
            },
            "messages[0]",
        ),
    ],
)
def test_what_cannot_be_continued_is_refused(request_: dict[str, Any], param: str) -> None:
    with client() as http:
        answer = http.post(PATH, json=request_)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_template_that_hides_the_last_message_is_named() -> None:
    engine = FakeEngine()
    own = tokenizer()
    engine.llm.tokenizer = type(own)(
        own.backend, own.special_tokens, chat_template="{{ messages[0]['role'] }}"
    )
    with client(engine) as http:
        answer = http.post(PATH, json={"messages": [TURN], **GO_ON})
    assert answer.status_code == 400 and "cannot be continued" in answer.json()["error"]["message"]
