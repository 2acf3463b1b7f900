"""What is wrong with a request is said in OpenAI's shape, by name, and never by a 500."""

from __future__ import annotations

import json
import logging
import random
from typing import Any

import pytest

from tests.server.fakes import FakeEngine, chat, client, events

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f"}}


def error(answer: Any) -> dict[str, Any]:
    """The error in an answer, which has OpenAI's shape and nothing else."""
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize(
    ("path", "request_", "param", "code"),
    [
        (CHAT, {}, "messages", "missing_required_parameter"),
        (CHAT, {"messages": []}, "messages", "invalid_value"),
        (CHAT, chat(temprature=1), "temprature", "unknown_parameter"),
        (CHAT, chat(temperature="1"), "temperature", "invalid_value"),
        (CHAT, chat(temperature=-1), "temperature", "invalid_value"),
        (CHAT, chat(top_p=0), "top_p", "invalid_value"),
        (CHAT, chat(repetition_penalty=1e-300), "repetition_penalty", "invalid_value"),
        (CHAT, chat(stop=["a" * 1001]), "stop[0]", "invalid_value"),
        (CHAT, chat(stop="a" * 1001), "stop", "invalid_value"),
        (
            CHAT,
            chat(chat_template_kwargs={"thinkng": True}),
            "chat_template_kwargs.thinkng",
            "unknown_parameter",
        ),
        (CHAT, {"messages": [USER] * 4097}, "messages", "invalid_value"),
        (CHAT, chat(**{f"x{i}": 1 for i in range(100)}), "x0", "unknown_parameter"),
        (
            "/v1/completions",
            {"prompt": [5, 6], "add_special_tokens": True},
            "add_special_tokens",
            "invalid_value",
        ),
        ("/v1/completions", {"prompt": [[5], "a"]}, "prompt[1]", "invalid_value"),
        ("/v1/completions", {"prompt": [[5], []]}, "prompt[1]", "invalid_value"),
        ("/v1/completions", {"prompt": [True]}, "prompt[0]", "invalid_value"),
        ("/v1/completions", {"prompt": ["a"] * 1025}, "prompt", "invalid_value"),
        (
            "/v1/completions",
            {"prompt": [[5] * 100] * 16, "n": 8, "logprobs": 100, "max_tokens": 100},
            "logprobs",
            "invalid_value",
        ),
        (CHAT, chat(n=50, prompt_logprobs=100, logprobs=True, top_logprobs=20), "logprobs", "invalid_value"),
        ("/v1/embeddings", {"input": ["a", ""]}, "input[1]", "invalid_value"),
        (
            "/tokenize",
            {"messages": [USER], "add_special_tokens": True},
            "add_special_tokens",
            "invalid_value",
        ),
        ("/tokenize", {"prompt": "a", "tools": [TOOL]}, "tools", "invalid_value"),
        (
            "/tokenize",
            {"prompt": "a", "chat_template_kwargs": {"a": 1}},
            "chat_template_kwargs",
            "invalid_value",
        ),
        (
            "/tokenize",
            {"prompt": "a", "add_generation_prompt": False},
            "add_generation_prompt",
            "invalid_value",
        ),
        (CHAT, chat(n=0), "n", "invalid_value"),
        (CHAT, chat(n=True), "n", "invalid_value"),
        (CHAT, chat(stop=[""]), "stop", None),
        (CHAT, chat(store=True), "store", "unsupported_parameter"),
        (CHAT, chat(audio={"voice": "x"}), "audio", "unsupported_parameter"),
        (CHAT, chat(functions=[]), "functions", "unsupported_parameter"),
        (CHAT, chat(function_call="auto"), "function_call", "unsupported_parameter"),
        (CHAT, chat(reasoning_effort="high"), "reasoning_effort", "unsupported_parameter"),
        (CHAT, chat(service_tier="flex"), "service_tier", "unsupported_parameter"),
        (CHAT, chat(top_logprobs=2), "top_logprobs", "invalid_value"),
        (CHAT, chat(stream_options={"include_usage": True}), "stream_options", "invalid_value"),
        (CHAT, chat(tool_choice="required"), "tool_choice", "invalid_value"),
        (CHAT, chat(logit_bias={"x": 1}), "logit_bias.x", "invalid_value"),
        (CHAT, chat(logit_bias={"1": 101}), "logit_bias.1", "invalid_value"),
        (CHAT, chat(min_tokens=5, max_tokens=2), "min_tokens", None),
        (CHAT, chat(max_tokens=1, max_completion_tokens=2), "max_tokens", "invalid_value"),
        (CHAT, chat(response_format={"type": "json_schema"}), "response_format.json_schema", "invalid_value"),
        (CHAT, chat(guided_regex="a", guided_choice=["b"]), "guided_json", None),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
        (CHAT, {"messages": [USER, {"role": "robot", "content": ""}]}, "messages[1].role", "invalid_value"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "unsupported_parameter",
        ),
        (
            CHAT,
            chat(chat_template_kwargs={"messages": []}),
            "chat_template_kwargs.messages",
            "unknown_parameter",
        ),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix", "unsupported_parameter"),
        ("/v1/completions", {"prompt": "a", "best_of": 2}, "best_of", "invalid_value"),
        ("/v1/completions", {"prompt": [[1], [-1]]}, "prompt[1][0]", "invalid_value"),
        ("/v1/completions", {"prompt": [1, "a"]}, "prompt[1]", "invalid_value"),
        ("/v1/completions", {"prompt": ["a"] * 100, "n": 100}, "n", "invalid_value"),
        ("/v1/embeddings", {"input": ""}, "input", "invalid_value"),
        ("/v1/embeddings", {"input": "a", "dimensions": 7}, "dimensions", "unsupported_parameter"),
        ("/tokenize", {}, "prompt", "invalid_value"),
        ("/detokenize", {"tokens": [5, 10**6]}, "tokens[1]", "invalid_value"),
        ("/detokenize", {"tokens": [10**6]}, "tokens[0]", "invalid_value"),
    ],
)
def test_a_wrong_parameter_is_named(
    path: str, request_: dict[str, Any], param: str, code: str | None
) -> None:
    engine = FakeEngine()
    with client(engine) as http:
        answer = http.post(path, json=request_)
    assert answer.status_code == 400, answer.text
    found = error(answer)
    assert (found["param"], found["code"]) == (param, code)
    assert found["type"] == "invalid_request_error"
    assert "\n" not in found["message"]
    assert engine.calls == []


DEEP = b'{"messages":' + b"[" * 5000 + b"]" * 5000 + b"}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"nonsense",
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "Hi"}], "seed": ' + b"9" * 6000 + b"}",
        b'{"messages": [{"role": "user", "content": "Hi"}], "seed": 99999999999999999999}',
        b'{"messages": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": {"a": 1e999}}',
        DEEP,
    ],
)
def test_a_broken_body_is_the_clients_mistake(body: bytes) -> None:
    with client() as http:
        answer = http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error(answer)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "unknown_path"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/gpt-4", 404, "model_not_found"),
        ("POST", "/v1/chat/completions/", 404, "unknown_path"),
    ],
)
def test_wrong_paths_and_methods(method: str, path: str, status: int, code: str) -> None:
    with client() as http:
        answer = http.request(method, path)
    assert answer.status_code == status
    assert error(answer)["code"] == code


def test_a_model_that_is_not_served() -> None:
    with client(served_model_names=("fox", "hare")) as http:
        answer = http.post(CHAT, json=chat(model="gpt-4"))
        assert answer.status_code == 404
        assert error(answer)["code"] == "model_not_found" and error(answer)["param"] == "model"
        assert http.post(CHAT, json=chat(model="hare")).json()["model"] == "hare"


def test_other_content_types_are_not_read() -> None:
    with client() as http:
        answer = http.post(CHAT, content=json.dumps(chat()), headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    assert error(answer)["code"] == "unsupported_content_type"


def test_a_body_that_is_too_long() -> None:
    with client(max_body=2048) as http:
        answer = http.post(CHAT, json=chat("x" * 4096))
    assert answer.status_code == 413
    assert error(answer)["code"] == "body_too_large"


@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/completions", "/v1/embeddings"])
def test_a_prompt_that_is_too_long(path: str) -> None:
    text = "fox " * 2000
    request = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {}
    request |= {"/v1/responses": {"input": text}, "/v1/completions": {"prompt": text}}.get(path, {})
    request |= {"input": text} if path == "/v1/embeddings" else {}
    with client() as http:
        answer = http.post(path, json=request)
    assert answer.status_code == 400
    assert error(answer)["code"] == "context_length_exceeded"


def test_a_full_engine_is_503_and_says_when_to_come_back() -> None:
    with client(FakeEngine(busy=True)) as http:
        for stream in (False, True):
            answer = http.post(CHAT, json=chat(stream=stream))
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert error(answer)["code"] == "server_busy"


def test_an_engine_that_fails_is_500_and_others_are_served() -> None:
    engine = FakeEngine(fails_at=2)
    with client(engine) as http:
        answer = http.post(CHAT, json=chat())
        assert answer.status_code == 500
        assert error(answer)["code"] == "engine_error"
        assert error(answer)["message"].count("the engine failed") == 1
        *_, last = events(http.post(CHAT, json=chat(stream=True)).text)
        assert json.loads(last)["error"]["code"] == "engine_error"
        engine.fails_at = None
        assert http.post(CHAT, json=chat()).status_code == 200
    assert engine.open == 0


def test_a_defect_is_500_with_the_requests_id_and_a_traceback_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    secret = "the inside of the server"
    engine = FakeEngine(fails_at=1, error=RuntimeError(secret))
    with client(engine) as http, caplog.at_level(logging.ERROR, "dsv3.server"):
        answer = http.post(CHAT, json=chat(), headers={"x-request-id": "find-me"})
        stream = http.post(CHAT, json=chat(stream=True), headers={"x-request-id": "me-too"}).text
    assert answer.status_code == 500
    assert "find-me" in error(answer)["message"] and secret not in answer.text
    failed = json.loads(events(stream)[-1])["error"]
    assert "me-too" in failed["message"] and failed["code"] == "internal_error" and secret not in stream
    for name in ("find-me", "me-too"):
        assert any(name in r.getMessage() and r.exc_info for r in caplog.records), caplog.text


def test_the_deadline_is_504_and_in_a_stream_an_event() -> None:
    with client(FakeEngine(finish="deadline"), request_timeout=5) as http:
        answer = http.post(CHAT, json=chat())
        assert answer.status_code == 504
        assert error(answer)["code"] == "timeout"
        *_, last = events(http.post(CHAT, json=chat(stream=True)).text)
        assert json.loads(last)["error"]["code"] == "timeout"


@pytest.mark.slow
def test_ten_thousand_mangled_bodies_leave_the_server_serving() -> None:
    """Valid requests with bytes changed, cut and doubled: whatever comes of it, it is no 5xx."""
    generator = random.Random(0)
    whole = [
        ("/v1/chat/completions", chat("Hi", stream=True, stop=["a"], logprobs=True, top_logprobs=2, n=2)),
        ("/v1/completions", {"prompt": ["a", "b"], "echo": True, "logprobs": 2, "max_tokens": 3}),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": "x"}], "text": {"format": {"type": "text"}}},
        ),
        ("/v1/embeddings", {"input": [[1, 2], [3]], "encoding_format": "base64"}),
        ("/tokenize", {"messages": [USER], "return_token_strs": True}),
        ("/detokenize", {"tokens": [1, 2, 3]}),
    ]
    with client() as http:
        for _ in range(10_000):
            path, request = generator.choice(whole)
            body = bytearray(json.dumps(request).encode())
            for _ in range(generator.randint(1, 4)):
                place = generator.randrange(len(body))
                match generator.randrange(3):
                    case 0:
                        body[place] = generator.randrange(256)
                    case 1:
                        del body[place : place + generator.randint(1, 8)]
                    case _:
                        body[place:place] = body[place : place + 8] * generator.randint(1, 3)
                body = body or bytearray(b"{")
            answer = http.post(path, content=bytes(body), headers={"content-type": "application/json"})
            assert answer.status_code < 500, (path, bytes(body), answer.text)
        assert http.post(CHAT, json=chat()).status_code == 200
