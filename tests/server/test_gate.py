"""The gate: hosts, keys, limits, headers, the access log and the metrics."""

from __future__ import annotations

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsv3.errors import UserError
from dsv3.server.errors import ApiError
from dsv3.server.keys import add_key, remove_key
from dsv3.server.limits import Limits
from dsv3.server.settings import Settings
from tests.server.fakes import FakeEngine, chat, client, tokenizer
from tests.server.live import live, wait

CHAT = "/v1/chat/completions"


# Hosts and origins


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("LOCALHOST", 200),
        ("evil.example.org", 400),
        ("localhost.evil.example.org", 400),
        ("127.0.0.1.evil.example.org:8000", 400),
        ("", 400),
    ],
)
def test_a_local_server_answers_to_this_machines_names_alone(host: str, status: int) -> None:
    with client() as http:
        answer = http.get("/v1/models", headers={"host": host})
    assert answer.status_code == status
    if status == 400:
        assert answer.json()["error"]["code"] == "invalid_host"


def test_a_name_may_be_allowed_and_a_public_server_takes_any() -> None:
    with client(allowed_hosts=("chat.example.org",)) as http:
        assert http.get("/health", headers={"host": "chat.example.org"}).status_code == 200
    with client(host="0.0.0.0") as http:
        assert http.get("/health", headers={"host": "anything.example.org"}).status_code == 200
    with client(host="0.0.0.0", allowed_hosts=("Chat.Example.org", "FE80::1")) as http:
        for host, status in (("chat.example.org:80", 200), ("[fe80::1]:80", 200), ("evil.example.org", 400)):
            assert http.get("/health", headers={"host": host}).status_code == status, host


@pytest.mark.parametrize("name", ["chat.example.org:8000", "https://chat.example.org", "[::1]:80", "", "a b"])
def test_an_allowed_host_is_a_name_alone(name: str) -> None:
    with pytest.raises(UserError, match="allowed_hosts has"):
        Settings(allowed_hosts=(name,))


def test_pages_of_elsewhere_may_not_read_unless_they_are_named() -> None:
    asked = {"origin": "https://chat.example.org", "access-control-request-method": "POST"}
    with client() as http:
        assert "access-control-allow-origin" not in http.get("/v1/models", headers=asked).headers
        assert http.options(CHAT, headers=asked).status_code == 405
    with client(cors_origins=("https://chat.example.org",)) as http:
        assert http.options(CHAT, headers=asked).headers["access-control-allow-origin"] == asked["origin"]
        assert http.get("/nowhere", headers=asked).headers["access-control-allow-origin"] == asked["origin"]
        openai = {
            **asked,
            "access-control-request-headers": "authorization,x-stainless-os,x-stainless-retry-count",
        }
        answer = http.options(CHAT, headers=openai)
        assert answer.status_code == 200
        assert "x-stainless-os" in answer.headers["access-control-allow-headers"]
        shown = http.get("/v1/models", headers=asked).headers["access-control-expose-headers"]
        assert {"x-ratelimit-limit-requests", "x-ratelimit-reset-requests"} <= set(shown.split(", "))
        other = http.get("/v1/models", headers={"origin": "https://evil.example.org"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("origin", ["*", "example.org", "https://example.org/", "https://example.org/path"])
def test_an_origin_is_named_whole(origin: str) -> None:
    with pytest.raises(UserError, match="cors_origins has"):
        Settings(cors_origins=(origin,))


def test_every_answer_has_the_headers_that_keep_browsers_careful() -> None:
    with client() as http:
        answers = [http.get("/v1/models"), http.get("/nowhere"), http.post(CHAT, json=chat(stream=True))]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert len(answer.headers["x-request-id"]) == 32


def test_a_request_id_that_does_not_fit_is_replaced() -> None:
    with client() as http:
        answer = http.get("/health", headers={"x-request-id": "a" * 65})
    assert answer.headers["x-request-id"] != "a" * 65


# Keys


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_keys_open_what_is_not_public(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3.server.keys._LOOK_EVERY", 0.0)
    file = tmp_path / "keys.json"
    ada = add_key(file, "ada")
    with client(api_keys=file) as http:
        for path in ("/health", "/ready", "/metrics", "/version", "/openapi.json"):
            assert http.get(path).status_code == 200, path
        for path in ("/v1/models", "/nowhere", "/tokenizer_info"):
            assert http.get(path).status_code == 401, path
        assert http.get("/v1/models", headers=bearer(ada)).status_code == 200
        for wrong in ({}, bearer("sk-dsv3-wrong"), {"authorization": f"Basic {ada}"}, bearer("")):
            answer = http.post(CHAT, json=chat(), headers=wrong)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"
        bob = add_key(file, "bob")
        assert http.get("/v1/models", headers=bearer(bob)).status_code == 200, "not read again"
        remove_key(file, "ada")
        assert http.get("/v1/models", headers=bearer(ada)).status_code == 401
        whole = file.read_text()
        file.write_text("broken")
        assert http.get("/v1/models", headers=bearer(bob)).status_code == 200, "a broken file shut bob out"
        file.write_text(whole)
        remove_key(file, "bob")
        assert http.get("/v1/models", headers=bearer(bob)).status_code == 401, "a mended file is not read"
        bob = add_key(file, "bob")
        assert http.get("/v1/models", headers=bearer(bob)).status_code == 200
        file.unlink()
        assert http.get("/v1/models", headers=bearer(bob)).status_code == 401, "a key outlives its file"
    add_key(tmp_path / "new.json", "eve")
    with client(api_keys=tmp_path / "new.json", protect_metrics=True) as http:
        assert http.get("/metrics").status_code == 401


def test_each_key_has_a_cache_of_its_own(tmp_path: Path) -> None:
    engine, file = FakeEngine(), tmp_path / "keys.json"
    keys = [add_key(file, name) for name in ("ada", "bob")]
    with client(engine, api_keys=file) as http:
        for key in (*keys, keys[0]):
            assert http.post(CHAT, json=chat(), headers=bearer(key)).status_code == 200
        assert http.post(CHAT, json=chat(cache_salt="x"), headers=bearer(keys[0])).status_code == 200
    salts = [call.cache_salt for call in engine.calls]
    assert salts[0] == salts[2] and len(set(salts)) == 3 and all(salts)


# Limits


def test_a_key_has_so_many_requests_a_minute() -> None:
    with client(rate_limit=2) as http:
        first, second, third = (http.post(CHAT, json=chat()) for _ in range(3))
    assert (first.status_code, second.status_code, third.status_code) == (200, 200, 429)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert [a.headers["x-ratelimit-remaining-requests"] for a in (first, second, third)] == ["1", "0", "0"]
    assert 1 <= int(third.headers["retry-after"]) <= 30
    assert third.json()["error"]["code"] == "rate_limit_exceeded"


def test_the_bucket_fills_evenly() -> None:
    now = 0.0
    limits = Limits(60, None, lambda: now)
    for _ in range(60):
        limits.enter("ada")
    with pytest.raises(ApiError) as refused:
        limits.enter("ada")
    assert refused.value.headers["retry-after"] == "1"
    limits.enter("bob")
    now = 1.5
    limits.enter("ada")
    with pytest.raises(ApiError):
        limits.enter("ada")
    now = 1e6
    assert limits.enter("ada")["x-ratelimit-remaining-requests"] == "59", "it holds a minute's worth at most"


def test_a_key_has_so_many_requests_at_once() -> None:
    engine = FakeEngine(delay=0.05)
    with live(engine, max_concurrent=1) as server:
        import httpx

        held = server.send(CHAT, chat(stream=True))
        wait(lambda: engine.open == 1)
        answer = httpx.post(server.url + CHAT, json=chat())
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "concurrency_limit_exceeded"
        held.close()
        wait(lambda: engine.open == 0)
        assert httpx.post(server.url + CHAT, json=chat(), timeout=30).status_code == 200


def test_every_answer_counts_against_what_a_key_may_have_at_once() -> None:
    with client(max_concurrent=3) as http:
        answer = http.post(CHAT, json=chat(n=4))
        assert answer.status_code == 400 and "no more than 3" in answer.json()["error"]["message"]
        for _ in range(2):  # the places are given back
            assert http.post(CHAT, json=chat(n=3)).status_code == 200
    with live(FakeEngine(delay=0.05), max_concurrent=3) as server:
        import httpx

        held = server.send("/v1/completions", {"prompt": ["Once upon a time " * 3] * 2, "max_tokens": 100})
        wait(lambda: server.server._service.metrics.active == 1 and server.server._service.tasks)
        wait(lambda: server.server._service.limits._uses[""].running == 2)
        assert httpx.post(server.url + CHAT, json=chat(n=2), timeout=30).status_code == 429
        assert httpx.post(server.url + CHAT, json=chat(), timeout=30).status_code == 200
        held.close()
        wait(lambda: server.server._service.limits._uses[""].running == 0)


def test_one_request_does_not_fill_the_queue_by_itself() -> None:
    engine = FakeEngine(max_waiting=4, max_num_seqs=8)  # whose stats say that 1 waits and 2 run
    with client(engine) as http:
        for n, status in ((9, 200), (10, 503), (13, 400)):
            answer = http.post("/v1/completions", json={"prompt": ["a"] * n, "max_tokens": 1})
            assert answer.status_code == status, answer.text


# Forms


def test_a_form_that_is_there_does_not_wait_behind_others() -> None:
    engine = FakeEngine()
    grammars = engine.llm.engine.grammars
    release, known = threading.Event(), object()
    grammars.compile = lambda form: release.wait(20)
    grammars.cached = lambda form: known if form.regex == "known" else None
    with live(engine, request_timeout=0.5) as server:
        import httpx

        with ThreadPoolExecutor(12) as pool:
            requests = [chat(guided_regex=f"hard{i}") for i in range(12)]
            found = pool.map(
                lambda r: httpx.post(server.url + CHAT, json=r, timeout=30).status_code, requests
            )
            wait(lambda: server.server._service._forms[""] == 8)
            assert httpx.post(server.url + CHAT, json=chat(guided_regex="known")).status_code == 200
            assert sorted(found) == [429] * 4 + [504] * 8
        release.set()
        wait(lambda: server.server._service._forms[""] == 0)
    assert [call.grammar for call in engine.calls] == [known]


# Log and metrics


def logged(caplog: pytest.LogCaptureFixture) -> list[dict]:
    return [json.loads(r.getMessage()) for r in caplog.records if r.name == "dsv3.server.access"]


def test_each_request_is_a_line_without_its_prompt(caplog: pytest.LogCaptureFixture) -> None:
    with client(FakeEngine(says="Hello")) as http, caplog.at_level(logging.INFO, "dsv3.server.access"):
        http.post(CHAT, json=chat("the secret of the fox"), headers={"x-request-id": "one"})
        http.get("/v1/models/gpt-4")
        http.get("/wp-admin.php")
    first, second, third = logged(caplog)
    assert (
        first.items()
        >= {
            "id": "one",
            "key": None,
            "route": CHAT,
            "status": 200,
            "cached_tokens": 2,
            "generated_tokens": len(tokenizer().encode("Hello")),
            "finish_reason": "length",
        }.items()
    )
    assert first["prompt_tokens"] > 2 and first["ms"] >= first["ttft_ms"] > 0
    assert "secret" not in caplog.text
    assert (second["route"], second["status"]) == ("/v1/models/{model}", 404)
    assert (third["route"], third["status"], third["ttft_ms"]) == ("other", 404, None)


def test_prompts_are_logged_where_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with client(log_prompts=True) as http, caplog.at_level(logging.INFO, "dsv3.server.access"):
        http.post(CHAT, json=chat("the secret of the fox"))
        http.post("/v1/completions", json={"prompt": [5, 6]})
    assert [line["prompt"] for line in logged(caplog)] == [
        [{"role": "user", "content": "the secret of the fox"}],
        [5, 6],
    ]


def test_a_request_that_fails_in_its_stream_is_logged_as_such(caplog: pytest.LogCaptureFixture) -> None:
    with client(FakeEngine(fails_at=1)) as http, caplog.at_level(logging.INFO, "dsv3.server.access"):
        http.post(CHAT, json=chat(stream=True))
    assert logged(caplog)[0]["finish_reason"] == "error: engine_error"


def test_metrics_count_requests_times_and_tokens() -> None:
    engine = FakeEngine(says="Hello there fox", delay=0.002)
    with client(engine) as http:
        for _ in range(2):
            http.post(CHAT, json=chat())
        http.post(CHAT, json={})
        engine.busy = True
        http.post(CHAT, json=chat())
        page = http.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert values[f'dsv3_http_requests_total{{endpoint="{CHAT}",status="200"}}'] == "2.0"
    assert values[f'dsv3_http_requests_total{{endpoint="{CHAT}",status="400"}}'] == "1.0"
    assert values["dsv3_time_to_first_token_seconds_count"] == "2.0"
    tokens = 3
    assert float(values["dsv3_time_between_tokens_seconds_count"]) >= 2 * (tokens - 1)
    assert float(values["dsv3_time_between_tokens_seconds_sum"]) >= 0.002 * 2 * (tokens - 1)
    assert values["dsv3_request_duration_seconds_count"] == "2.0"
    assert values["dsv3_requests_waiting"] == "1.0" and values["dsv3_requests_running"] == "2.0"
    assert values["dsv3_cache_usage_ratio"] == "0.5"
    assert values["dsv3_prefix_cache_hit_ratio"] == "0.25"
    assert values["dsv3_speculation_acceptance_ratio"] == "0.75"
    assert values["dsv3_preemptions_total"] == "3.0"
    assert values['dsv3_answers_finished_total{reason="abort"}'] == "1.0"
    buckets = [float(v) for k, v in values.items() if k.startswith("dsv3_time_to_first_token_seconds_bucket")]
    assert buckets == sorted(buckets) and buckets[-1] == 2.0
