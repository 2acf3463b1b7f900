"""The server on a real socket: clients that hang up, an end that loses nothing, the port, TLS."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from dsv3.errors import UserError
from dsv3.server.run import check_tls, open_socket
from dsv3.server.settings import Settings
from tests.server.fakes import FakeEngine, chat
from tests.server.live import live, read_until, wait

CHAT = "/v1/chat/completions"
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "request_"),
    [
        (CHAT, chat("Once upon a time " * 4)),
        ("/v1/completions", {"prompt": ["Once upon a time " * 4] * 3, "max_tokens": 100}),
        ("/v1/responses", {"input": "Once upon a time " * 4}),
    ],
)
def test_who_hangs_up_frees_his_place_at_once(path: str, request_: dict, stream: bool) -> None:
    engine = FakeEngine(delay=0.05)
    with live(engine) as server:
        connection = server.send(path, {**request_, "stream": stream})
        if stream:
            read_until(connection, b"data: ")
        wait(lambda: engine.open == len(engine.calls) >= 1)
        connection.close()
        wait(lambda: engine.open == 0, 2.0)
        assert httpx.get(f"{server.url}/metrics").text.count('status="499"') == 1


def test_a_body_far_beyond_the_limit_is_refused_without_being_read() -> None:
    with live(FakeEngine(), max_body=2048) as server:
        connection = server.send(CHAT, body=b"{", length=10**9)
        assert b"413 " in read_until(connection, b"body_too_large")
        chunked = socket.create_connection(("127.0.0.1", server.port))
        chunked.sendall(
            f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            "transfer-encoding: chunked\r\n\r\n".encode()
        )
        for _ in range(3):
            chunked.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
        assert b"413 " in read_until(chunked, b"body_too_large")


def test_a_body_that_trickles_in_is_given_up() -> None:
    with live(FakeEngine(), body_timeout=0.2) as server:
        connection = server.send(CHAT, body=b"{", length=100)
        assert b"408 " in read_until(connection, b"body_too_slow")


def test_what_is_under_way_finishes_and_nothing_new_begins() -> None:
    engine = FakeEngine(delay=0.05)
    with live(engine, drain=20.0) as server, httpx.Client(base_url=server.url) as http:
        assert http.get("/ready").status_code == 200
        stream = server.send(CHAT, chat(stream=True))
        whole = server.send(CHAT, chat())
        wait(lambda: engine.open == 2)
        server.signal()
        answer = http.get("/ready")
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "draining"
        assert http.get("/health").status_code == 200
        refused = http.post(CHAT, json=chat())
        assert refused.status_code == 503 and "retry-after" in refused.headers
        assert b"[DONE]" in read_until(stream, b"[DONE]")
        assert b'"finish_reason"' in read_until(whole, b'"usage"')
        server.thread.join(5)
        assert not server.thread.is_alive()
    assert len(engine.calls) == 2


def test_what_takes_longer_than_the_drain_is_told_and_cut_off() -> None:
    engine = FakeEngine(delay=0.2)
    with live(engine, drain=0.3) as server:
        stream = server.send(CHAT, chat("Once upon a time " * 5, stream=True))
        whole = server.send(CHAT, chat("Once upon a time " * 5))
        wait(lambda: engine.open == 2)
        server.signal()
        assert b'"code":"draining"' in read_until(stream, b'"code":"draining"')
        assert b"503 " in read_until(whole, b"draining")
        server.thread.join(5)
        assert not server.thread.is_alive()
    assert engine.open == 0


def test_a_second_signal_ends_it_there_and_then(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(delay=0.5)
    with live(engine, drain=60.0) as server:
        kept = server.send(CHAT, chat("Once upon a time " * 5))
        wait(lambda: engine.open == 1)
        server.signal()
        server.signal()
        server.thread.join(8)
        assert not server.thread.is_alive()
        kept.close()
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


def test_before_the_model_is_loaded_the_server_lives_and_is_not_ready() -> None:
    release = threading.Event()

    def load() -> FakeEngine:
        release.wait(20)
        return FakeEngine()

    settings = Settings(port=0)
    from dsv3.server.app import create_app
    from dsv3.server.run import Server

    app, taken = create_app(load, settings), open_socket(settings)
    said: list[str] = []
    server = Server(app, settings, lambda: said.append("ready"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
    thread.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{taken.getsockname()[1]}") as http:
        assert http.get("/health").status_code == 200
        assert http.get("/ready").json()["error"]["code"] == "loading"
        assert http.post(CHAT, json=chat()).status_code == 503
        assert http.get("/metrics").status_code == 200
        assert not said
        release.set()
        wait(lambda: http.get("/ready").status_code == 200)
        wait(lambda: said == ["ready"])
        assert http.post(CHAT, json=chat()).status_code == 200
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def test_a_port_in_use_is_one_line() -> None:
    with open_socket(Settings(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 cannot be had .*--port"):
            open_socket(Settings(port=port))
    with pytest.raises(UserError, match="host is 'no such host'"):
        open_socket(Settings(host="no such host"))


def test_tls_files_are_looked_at_first(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("nothing")
    with pytest.raises(UserError, match="missing"):
        check_tls(Settings(tls_cert=tmp_path / "no.pem", tls_key=broken))
    with pytest.raises(UserError, match="no certificate and its key"):
        check_tls(Settings(tls_cert=broken, tls_key=broken))
    with pytest.raises(UserError, match="tls_key is missing"):
        Settings(tls_cert=broken)


LOADING = """
import sys, threading, time
from dsv3.server.app import create_app
from dsv3.server.run import open_socket, serve
from dsv3.server.settings import Settings

def load():
    print("loading", file=sys.stderr, flush=True)
    time.sleep(60)

settings = Settings(port=0)
serve(create_app(load, settings), settings, open_socket(settings), lambda: None)
"""


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT], [signal.SIGINT, signal.SIGINT]])
def test_a_signal_while_the_model_is_read_ends_the_process(signals: list[signal.Signals]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", LOADING], stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stderr is not None and process.stderr.readline() == "loading\n"
        for number in signals:
            process.send_signal(number)
            time.sleep(0.05)
        _, err = process.communicate(timeout=20)
        assert (process.returncode, err) == (0, "")
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_process_and_its_exit_status_is_0(number: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "dsv3.cli.main", "serve", "nano", "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"dsv3: serving nano at (http://127.0.0.1:\d+)/v1", line)
        assert found is not None, line
        request = chat("Tell me a story", stream=True, max_tokens=60, ignore_eos=True)
        with httpx.stream("POST", f"{found[1]}{CHAT}", json=request, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(number)
            assert "data: [DONE]" in list(lines)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0, err
        assert "Traceback" not in err
        assert '"route": "/v1/chat/completions", "status": 200' in out
    finally:
        process.kill()


@pytest.mark.slow
def test_killed_while_it_answers_it_starts_again_at_the_same_port() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dsv3", "serve", "nano", "--port", str(port), "--no-page"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    url = f"http://127.0.0.1:{port}"
    endless = {"prompt": "Once", "max_tokens": 1500, "stream": True, "ignore_eos": True}

    def is_ready() -> bool:
        try:
            return httpx.get(f"{url}/ready").status_code == 200
        except httpx.TransportError:
            return False

    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
        try:
            wait(is_ready, 60)
            with httpx.stream("POST", f"{url}/v1/completions", json=endless) as stream:
                lines = stream.iter_lines()
                assert next(lines).startswith("data: ")
                process.kill()
                with pytest.raises(httpx.TransportError):
                    list(lines)
        finally:
            process.kill()
            process.wait(10)
