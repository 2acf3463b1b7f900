"""A server on a real socket, for what only a connection shows: hanging up, draining, bodies that trickle in."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dsv3.server.app import create_app
from dsv3.server.run import Server, open_socket
from dsv3.server.settings import Settings


@dataclass
class Live:
    port: int
    server: Server
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def signal(self) -> None:
        """What SIGTERM does to the process."""
        self.server.handle_exit(signal.SIGTERM, None)

    def send(
        self,
        path: str,
        request: dict[str, Any] | None = None,
        body: bytes | None = None,
        length: int | None = None,
    ) -> socket.socket:
        """A connection on which a request was sent, and nothing is read yet. length: what is said of the body."""
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.settimeout(20)
        content = json.dumps(request).encode() if body is None else body
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        announced = len(content) if length is None else length
        connection.sendall(head.encode() + b"content-length: %d\r\n\r\n" % announced + content)
        return connection


@contextmanager
def live(engine: Any, **settings: Any) -> Iterator[Live]:
    chosen = Settings(port=0, **settings)
    app = create_app(engine, chosen)
    taken = open_socket(chosen)
    server = Server(app, chosen)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
    thread.start()
    try:
        wait(lambda: app.state.service.state == "ready" or app.state.service.failure is not None)
        yield Live(taken.getsockname()[1], server, thread)
    finally:
        server.should_exit = True
        thread.join(15)
        taken.close()
        assert not thread.is_alive(), "the server did not stop"


def wait(until: Callable[[], object], seconds: float = 20.0) -> None:
    """Until something holds; fails if it does not in time."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def read_until(connection: socket.socket, what: bytes) -> bytes:
    """All that comes up to `what`, or to the end of the connection."""
    found = b""
    while what not in found and (piece := connection.recv(65536)):
        found += piece
    return found
