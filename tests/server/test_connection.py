"""What a connection may cost: heads without end, readers that do not read, megabytes that are to be looked at."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from openai import OpenAI

from dsv3.server.errors import ClientGone
from dsv3.server.run import _most_connections
from dsv3.server.settings import Settings
from dsv3.server.sse import EventStream
from tests.server.fakes import FakeEngine, chat, tokenizer
from tests.server.live import Live, live, read_until

CHAT = "/v1/chat/completions"
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"


def connection(server: Live) -> socket.socket:
    found = socket.create_connection(("127.0.0.1", server.port))
    found.settimeout(10)
    return found


def send(to: socket.socket, data: bytes) -> None:
    """As much as the other side takes."""
    with suppress(OSError):
        to.sendall(data)


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"".join(b"x-%d: %s\r\n" % (i, b"y" * 100) for i in range(1000)) + b"\r\n",
        HEAD + b"x: " + b"y" * 200_000,
        b"GET /" + b"y" * 200_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx: " + b"y" * 200_000,
    ],
    ids=["many", "one without end", "path", "behind the body"],
)
@pytest.mark.parametrize("piece", [1000, 10**6])
def test_a_head_that_is_too_long_is_refused(data: bytes, piece: int) -> None:
    with live(FakeEngine()) as server, connection(server) as to:
        for start in range(0, len(data), piece):
            send(to, data[start : start + piece])
        with suppress(ConnectionResetError):  # what we were still sending was not read any more
            assert b"431 " in read_until(to, b"nothing")
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_long_bodies_in_small_chunks_are_no_heads() -> None:
    text = b" " * 200_000
    with live(FakeEngine()) as server, connection(server) as to:
        send(to, HEAD + b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
        send(to, b"".join(b"64\r\n%s\r\n" % text[i : i + 100] for i in range(0, len(text), 100)))
        body = json.dumps(chat()).encode()
        send(to, b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
        assert b"200 OK" in read_until(to, b"usage")


def test_a_head_that_does_not_come_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3.server.connection.HEAD_TIMEOUT", 0.3)
    with live(FakeEngine(delay=0.05)) as server:
        with connection(server) as silent, connection(server) as slow, connection(server) as later:
            slow.sendall(HEAD)
            later.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            read_until(later, b"}")
            later.sendall(b"\r\nGET /")  # the next request on the same connection
            for held in (silent, slow, later):
                assert held.recv(100) == b""
        assert httpx.post(server.url + CHAT, json=chat("Once upon a time " * 4)).status_code == 200


def test_connections_stay_below_the_files_that_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    for files, most in ((1024, 960), (10**6, 10_000), (10, 1)):
        monkeypatch.setattr("resource.getrlimit", lambda kind, files=files: (files, files))
        assert _most_connections() == most


@pytest.mark.parametrize("fails", [True, False])
def test_who_does_not_read_does_not_keep_his_place(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """A send waits until the one before has gone out: here none ever does."""
    monkeypatch.setattr("dsv3.server.sse._LAST_SEND", 0.05)
    monkeypatch.setattr("dsv3.server.sse._SLACK", 0.0)
    closed: list[str] = []

    async def events() -> Any:
        try:
            while True:
                yield b"data: 1\n\n"
                if fails:
                    raise RuntimeError("a defect")
        finally:
            closed.append("events")

    async def send(message: Any) -> None:
        if (message["type"] == "http.response.body" and message["body"] != b"data: 1\n\n") or not fails:
            await asyncio.sleep(60)

    async def receive() -> Any:
        await asyncio.sleep(60)

    service: Any = SimpleNamespace(settings=Settings(request_timeout=0.1), aborting=False)
    exchange: Any = SimpleNamespace(id="x", finish_reason=None)
    stream = EventStream(events(), service, exchange)

    async def run() -> None:
        scope = {"dsv3.abort": lambda: closed.append("connection")}
        async with asyncio.timeout(5):
            await stream(scope, receive, send)

    with pytest.raises(ClientGone):
        asyncio.run(run())
    assert closed[-1] == "connection"


@pytest.mark.parametrize(
    ("path", "request_"),
    [(CHAT, chat("Hi")), ("/v1/completions", {"prompt": "Hi"}), ("/v1/responses", {"input": "Hi"})],
)
def test_a_stream_that_has_nothing_to_say_is_kept_alive(path: str, request_: dict[str, Any]) -> None:
    """Proxies close connections that are silent; clients skip what begins with a colon."""
    engine = FakeEngine(says="Hello there", finish="stop", delay=0.3)
    with live(engine, keep_alive=0.05) as server:
        found = read_until(server.send(path, {**request_, "stream": True}), b"\r\n0\r\n\r\n")
    _, *chunks = re.sub(rb"\r\n[0-9a-f]+\r\n", b"\0", found.partition(b"\r\n\r\n")[2]).split(b"\0")
    comments = [chunk for chunk in chunks if b"keep-alive" in chunk]
    assert len(comments) > len(tokenizer().encode("Hello there"))
    assert {comment.strip(b"\r\n") for comment in comments} == {b": keep-alive"}, "alone, not within an event"


def test_openais_client_does_not_mind_comments() -> None:
    engine = FakeEngine(says="Hello there", finish="stop", delay=0.2)
    asked: Any = {"model": "dsv3", "stream": True}
    with (
        live(engine, keep_alive=0.02) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        chunks = client.chat.completions.create(**asked, messages=chat("Hi")["messages"])
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        events = client.responses.create(**asked, input="Hi")
        answered = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert said == answered == "Hello there"


@pytest.mark.parametrize(("delay", "seconds"), [(0.2, 0.0), (0.01, 5.0)])
def test_a_stream_is_not_kept_alive_needlessly(delay: float, seconds: float) -> None:
    with live(FakeEngine(says="Hello", delay=delay), keep_alive=seconds) as server:
        found = read_until(server.send("/v1/completions", {"prompt": "Hi", "stream": True}), b"[DONE]")
    assert b"keep-alive\n" not in found and found.count(b"data: ") > 2


# Megabytes


@contextmanager
def heartbeat(server: Live) -> Iterator[list[float]]:
    """How long small requests took meanwhile, in seconds."""
    took: list[float] = []
    end = threading.Event()

    def beat() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            while not end.is_set():
                before = time.monotonic()
                assert http.get("/health").status_code == 200
                took.append(time.monotonic() - before)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield took
    finally:
        end.set()
        thread.join()


MEGABYTES = 3 * 2**20
TEXT = "the fox said hello " * (MEGABYTES // 20)
TOOL = {"type": "function", "function": {"name": "f", "description": TEXT}}
LARGE = {
    "text": ("/v1/completions", json.dumps({"prompt": TEXT}).encode()),
    "many texts": ("/v1/completions", json.dumps({"prompt": [TEXT[:4000]] * 700}).encode()),
    "tools": (CHAT, json.dumps(chat(tools=[TOOL])).encode()),
    "wrong texts": ("/v1/completions", b'{"prompt":[%s1]}' % (b'"",' * (MEGABYTES // 3))),
    "wrong ids": ("/v1/embeddings", b'{"input":[%s"a"]}' % (b"1," * (MEGABYTES // 2))),
    "wrong messages": (CHAT, b'{"messages":[%s1]}' % (b"1," * (MEGABYTES // 2))),
    "wrong parts": (
        CHAT,
        b'{"messages":[{"role":"user","content":[%s1]}]}' % (b"{}," * (MEGABYTES // 3)),
    ),
    "unknown names": (CHAT, b"{%s}" % b",".join(b'"%d":1' % i for i in range(MEGABYTES // 10))),
    "metadata": (
        "/v1/responses",
        b'{"input":"a","metadata":{%s}}' % b",".join(b'"%d":1' % i for i in range(MEGABYTES // 10)),
    ),
    "items": ("/v1/responses", b'{"input":[%s1]}' % (b'{"role":"user","content":""},' * (MEGABYTES // 30))),
}


@pytest.mark.parametrize("name", list(LARGE))
def test_megabytes_hold_nobody_up(name: str) -> None:
    path, body = LARGE[name]
    with live(FakeEngine()) as server, heartbeat(server) as took:
        before = time.monotonic()
        answer = httpx.post(
            server.url + path, content=body, headers={"content-type": "application/json"}, timeout=60
        )
        whole = time.monotonic() - before
    assert answer.status_code == 400, answer.text[:200]
    assert len(answer.text) < 1000
    # A loop that is held up answers nothing for as long as the request takes, which used to be 3 to 30 seconds.
    assert max(took) < max(1.0, whole / 2), (max(took), whole)


def test_four_thousand_items_are_a_conversation() -> None:
    items = [{"role": "user", "content": "a"}] + [
        {"type": "function_call", "call_id": str(i), "name": "f", "arguments": "{}"} for i in range(4000)
    ]
    from dsv3.server.protocol import ResponsesRequest
    from dsv3.server.responses import _messages

    asked = ResponsesRequest.model_validate({"input": items})
    before = time.monotonic()
    first, second = _messages(asked)
    assert time.monotonic() - before < 1.0
    assert first["role"] == "user" and len(second["tool_calls"]) == 4000
