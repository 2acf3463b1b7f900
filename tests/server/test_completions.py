"""/v1/completions: prompts of every kind, and log-probabilities of a text as evaluation harnesses ask for them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from lm_eval.models.openai_completions import LocalCompletionsAPI

from tests.server.fakes import MAX_MODEL_LEN, FakeEngine, client, events, tokenizer
from tests.text.toy import BOS

PATH = "/v1/completions"


def ask(engine: FakeEngine | None = None, **request: Any) -> dict[str, Any]:
    with client(engine) as http:
        answer = http.post(PATH, json=request)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_text_is_continued() -> None:
    engine = FakeEngine(says=" upon a time")
    answer = ask(engine, prompt="Once", max_tokens=2)
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert answer["choices"][0]["text"] == tokenizer().decode(tokenizer().encode(" upon a time")[:2])
    assert answer["choices"][0]["finish_reason"] == "length"
    assert engine.calls[0].prompt_ids == tokenizer().encode("Once", add_bos=True)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Once", [tokenizer().encode("Once", add_bos=True)]),
        (
            ["Once", "fox"],
            [tokenizer().encode("Once", add_bos=True), tokenizer().encode("fox", add_bos=True)],
        ),
        ([9, 10], [[9, 10]]),
        ([[9, 10], [11]], [[9, 10], [11]]),
    ],
)
def test_a_prompt_is_text_or_ids_or_several(prompt: Any, expected: list[list[int]]) -> None:
    engine = FakeEngine(says="Hello")
    answer = ask(engine, prompt=prompt, n=2)
    assert [call.prompt_ids for call in engine.calls] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(expected)))
    assert {choice["text"] for choice in answer["choices"]} == {"Hello"}
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_by_default_there_are_sixteen_tokens() -> None:
    engine = FakeEngine()
    ask(engine, prompt="Once")
    assert engine.calls[0].params.max_tokens == 16


def test_streams_of_several_prompts_are_each_whole() -> None:
    prompts = ["Once upon a time", "The fox said"]
    with client(FakeEngine(delay=0.001)) as http:
        text = http.post(PATH, json={"prompt": prompts, "stream": True, "echo": True}).text
    *found, done = events(text)
    assert done == "[DONE]"
    parts = [json.loads(event)["choices"][0] for event in found]
    for index, prompt in enumerate(prompts):
        own = [part for part in parts if part["index"] == index]
        assert "".join(part["text"] for part in own) == prompt * 2
        assert own[-1]["finish_reason"] is not None


def test_logprobs_have_the_old_shape() -> None:
    (choice,) = ask(FakeEngine(says="fox 狐"), prompt="Once", logprobs=1)["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"] == [-0.75] * len(logprobs["tokens"])
    assert all(len(table) == 2 for table in logprobs["top_logprobs"]), "the chosen token is always there"
    assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]
    assert any(token.startswith("bytes:\\x") for token in logprobs["tokens"]), "part of 狐 is no text"


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_prompt_may_be_scored(max_tokens: int) -> None:
    engine = FakeEngine(says="!")
    answer = ask(engine, prompt="Once upon a time", echo=True, logprobs=1, max_tokens=max_tokens)
    logprobs = answer["choices"][0]["logprobs"]
    ids = tokenizer().encode("Once upon a time", add_bos=True)
    assert len(logprobs["tokens"]) == len(ids) + max_tokens
    assert logprobs["tokens"][0] == BOS and logprobs["token_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == [-0.75] * (len(ids) - 1 + max_tokens)
    assert answer["choices"][0]["text"] == "Once upon a time" + "!" * max_tokens
    assert engine.calls[0].params.prompt_logprobs == 1


def test_lm_eval_reads_what_we_write() -> None:
    """Its own code makes the request and reads the answer: two contexts with their continuations in one batch."""
    batch = [tokenizer().encode("Once upon a time"), tokenizer().encode("The fox said")]
    payload = LocalCompletionsAPI._create_payload(_Harness(), batch)
    answer = ask(FakeEngine(says="!"), **payload)
    scores = LocalCompletionsAPI.parse_logprobs(answer, tokens=batch, ctxlens=[1, 2])
    expected = [(-0.75 * (len(batch[0]) - 1), False), (-0.75 * (len(batch[1]) - 2), False)]
    assert scores == expected
    generating = LocalCompletionsAPI._create_payload(
        _Harness(), ["Once"], generate=True, gen_kwargs={"until": ["\n"], "max_gen_toks": 4}, eos="<eos>"
    )
    answer = ask(FakeEngine(says="Hi"), **generating)
    assert LocalCompletionsAPI.parse_generations(answer) == ["Hi"]


class _Harness:
    model, _max_gen_toks = "dsv3", 256


def test_one_prompt_that_is_too_long_stops_all() -> None:
    engine = FakeEngine()
    with client(engine) as http:
        answer = http.post(PATH, json={"prompt": [[5], [5] * MAX_MODEL_LEN]})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert engine.calls == []


def test_prompts_may_fill_the_context_where_nothing_follows() -> None:
    ask(prompt=[5] * MAX_MODEL_LEN, max_tokens=0)
