"""The server around the real engine and a tiny model: what the fake cannot show."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import httpx
import pytest
import torch
from starlette.testclient import TestClient

from dsv3.config import PRESETS
from dsv3.engine.async_engine import AsyncEngine
from dsv3.engine.llm import LLM
from dsv3.model import Transformer
from tests.engine.small import model as small_model
from tests.server.fakes import chat, client, events, tokenizer
from tests.server.live import live, read_until, wait

CHAT = "/v1/chat/completions"


@cache
def model() -> Transformer:
    config = PRESETS["tiny"].replace(
        vocab_size=tokenizer().vocab_size, eos_token_id=None, max_position_embeddings=4096
    )
    return small_model.__wrapped__(config)  # a config is not to be hashed; ours is the only call


def engine(**more: Any) -> AsyncEngine:
    llm = LLM(model(), tokenizer=tokenizer(), **{"max_model_len": 128, **more})
    return AsyncEngine(llm, max_waiting=64)


@pytest.fixture(scope="module")
def http() -> Iterator[TestClient]:
    with client(engine()) as found:
        yield found


def expected(ids: list[int], new: int) -> list[int]:
    """The argmax loop over the plain model."""
    out = list(ids)
    for _ in range(new):
        with torch.no_grad():
            out.append(int(model()(torch.tensor([out])).logits[0, -1].argmax()))
    return out[len(ids) :]


GREEDY = {"temperature": 0, "max_tokens": 8, "return_token_ids": True, "ignore_eos": True}


def test_greedy_answers_are_the_plain_models(http: TestClient) -> None:
    answer = http.post(CHAT, json=chat(**GREEDY)).json()
    ids = answer["prompt_token_ids"]
    assert ids == tokenizer().encode_chat(chat()["messages"])
    assert answer["choices"][0]["token_ids"] == expected(ids, 8)
    found = [json.loads(e) for e in events(http.post(CHAT, json=chat(stream=True, **GREEDY)).text)[:-1]]
    streamed = [i for chunk in found for i in chunk["choices"][0].get("token_ids", ())]
    assert streamed == answer["choices"][0]["token_ids"]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in found)
    assert text == answer["choices"][0]["message"]["content"]


def test_a_batch_of_prompts_is_answered_as_each_alone(http: TestClient) -> None:
    prompts = [[5, 6, 7], [9, 8], [30, 31, 32, 33]]
    answer = http.post("/v1/completions", json={"prompt": prompts, **GREEDY}).json()
    assert [choice["token_ids"] for choice in answer["choices"]] == [expected(ids, 8) for ids in prompts]


def test_scores_are_the_plain_models(http: TestClient) -> None:
    ids = tokenizer().encode("Once upon a time", add_bos=True)
    request = {"prompt": ids, "echo": True, "logprobs": 2, "max_tokens": 0}
    found = http.post("/v1/completions", json=request).json()["choices"][0]["logprobs"]
    with torch.no_grad():
        table = model()(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    for place, token_id in enumerate(ids[1:]):
        assert found["token_logprobs"][place + 1] == pytest.approx(float(table[place, token_id]), abs=1e-3)
        likeliest = max(found["top_logprobs"][place + 1].values())
        assert likeliest == pytest.approx(float(table[place].max()), abs=1e-3)


def test_embeddings_are_the_mean_of_the_final_states(http: TestClient) -> None:
    found = http.post("/v1/embeddings", json={"input": [[5, 6, 7], [9, 8]]}).json()
    with torch.no_grad():
        states = model().features(torch.tensor([[5, 6, 7]]))
    hidden = states[0] if isinstance(states, tuple) else states
    mean = torch.as_tensor(hidden).reshape(-1, model().config.hidden_size).mean(0)
    assert found["data"][0]["embedding"] == pytest.approx(mean.tolist(), abs=1e-3)


def test_a_second_turn_finds_the_first_in_the_cache() -> None:
    with client(engine(max_model_len=512)) as http:
        text = "The fox said: good morning, how are you? " * 6
        first = http.post(CHAT, json=chat(text, **GREEDY)).json()["usage"]
        second = http.post(CHAT, json=chat(text, **GREEDY)).json()["usage"]
        salted = http.post(CHAT, json=chat(text, cache_salt="x", **GREEDY)).json()["usage"]
        page = http.get("/metrics").text
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] >= 64
    assert salted["prompt_tokens_details"]["cached_tokens"] == 0
    assert "dsv3_cached_prompt_tokens_total 0.0" not in page


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_the_blocks(stream: bool) -> None:
    running = engine(max_model_len=4096)
    with live(running) as server:
        request = chat(stream=stream, ignore_eos=True, n=2)
        connection = server.send(CHAT, request)
        if stream:
            read_until(connection, b'"content":"')
        wait(lambda: running.stats().blocks_used > 0)
        connection.close()
        wait(lambda: running.stats().blocks_used == 0)
        assert running.stats().finished["abort"] == 2


def test_what_the_engine_refuses_is_the_clients_mistake(http: TestClient) -> None:
    for wrong in ({"logit_bias": {"999999": 1}}, {"allowed_token_ids": [999999]}):
        answer = http.post(CHAT, json=chat(**wrong))
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == next(iter(wrong))
    answer = http.post("/v1/completions", json={"prompt": [999999]})
    assert answer.status_code == 400


def test_a_bad_request_beside_others_is_its_own_trouble(http: TestClient) -> None:
    """Two people in one batch, and a third whose requests are refused where the engine looks at them."""
    good = [{"prompt": [5, 6, 7], **GREEDY}, {"prompt": [9, 8], **GREEDY}]
    bad = [{"prompt": [5, 6, 999999]}, {"prompt": [5], "logit_bias": {"999999": 1}}, {"prompt": [5] * 500}]
    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(lambda r: http.post("/v1/completions", json=r), [*good, *bad, *good, *bad]))
    assert [answer.status_code for answer in found] == [200, 200, 400, 400, 400] * 2
    for answer, request in zip((found[0], found[1], found[5], found[6]), good * 2, strict=True):
        (choice,) = answer.json()["choices"]
        assert choice["token_ids"] == expected(request["prompt"], 8)


def test_a_full_queue_is_503() -> None:
    llm = LLM(model(), tokenizer=tokenizer(), max_model_len=512, max_num_seqs=1)
    full = AsyncEngine(llm, max_waiting=1)
    with live(full) as server:
        request = {"prompt": [5, 6], "max_tokens": 500, "ignore_eos": True}
        held = [server.send("/v1/completions", request)]
        wait(lambda: full.stats().running == 1)
        held.append(server.send("/v1/completions", request))
        wait(lambda: full.stats().waiting == 1)
        answer = httpx.post(f"{server.url}/v1/completions", json=request)
        assert answer.status_code == 503, answer.text
        assert answer.json()["error"]["code"] == "server_busy"
        for connection in held:
            connection.close()


def test_a_deadline_that_passes() -> None:
    with client(engine(max_model_len=512), request_timeout=0.1) as http:
        answer = http.post("/v1/completions", json={"prompt": [5], "max_tokens": 500, "ignore_eos": True})
        assert answer.status_code == 504, answer.text


# Forms: the tiny model writes noise, so whatever has one has it from its grammar.

SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}


def test_an_answer_has_the_form_that_is_asked_for(http: TestClient) -> None:
    pytest.importorskip("xgrammar")
    answer = http.post(CHAT, json=chat(response_format=FORMAT, seed=1)).json()
    assert json.loads(answer["choices"][0]["message"]["content"])["a"] in ("x", "y")
    answer = http.post("/v1/completions", json={"prompt": "a", "guided_choice": ["yes", "no"]}).json()
    assert answer["choices"][0]["text"] in ("yes", "no")
    format = {"type": "json_schema", "name": "a", "schema": SCHEMA}
    answer = http.post("/v1/responses", json={"input": "Hi", "text": {"format": format}}).json()
    assert json.loads(answer["output"][0]["content"][0]["text"])["a"] in ("x", "y")


def test_a_form_that_cannot_be_is_the_clients_mistake(http: TestClient) -> None:
    pytest.importorskip("xgrammar")
    for wrong in ({"guided_regex": "("}, {"guided_json": {"not": {}}}, {"guided_grammar": "nonsense"}):
        answer = http.post(CHAT, json=chat(**wrong))
        assert answer.status_code == 400, answer.text


def test_calls_that_are_required_are_made(http: TestClient) -> None:
    pytest.importorskip("xgrammar")
    parameters = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    with client(engine(max_model_len=2048)) as roomy:
        request = chat("Hi", tools=tools, tool_choice="required", parallel_tool_calls=False)
        answer = roomy.post(CHAT, json=request)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "f"
    assert json.loads(call["function"]["arguments"])["a"] in ("x", "y")
    assert choice["finish_reason"] == "tool_calls"
