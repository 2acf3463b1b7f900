"""One connection: uvicorn's, with the bounds that it lacks.

Neither uvicorn nor its parser ask how long a request's head is or how long it takes, so a handful of clients that send
headers without end could fill the memory, and any number that send nothing could hold all connections.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEAD = 64 * 1024
"""Bytes that a request's path and headers may have."""
HEAD_TIMEOUT = 30.0
"""Seconds that they may take to arrive."""


class Connection(HttpToolsProtocol):
    _unread = 0
    """Bytes since the parser last made something of them."""
    _head = 0
    """Bytes of the headers, and of those that may come behind a body."""
    _timer: asyncio.TimerHandle | None = None
    """Runs while a head is expected."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._expect_head()
        self._unread += len(data)
        super().data_received(data)
        if self._unread > MAX_HEAD and not self.transport.is_closing():
            self.send_400_response("")

    def on_message_begin(self) -> None:
        self._unread = self._head = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(name, value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._unread = 0
        self._stop_timer()
        self.scope["dsv3.abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """What uvicorn says of a request that it cannot read; of one too long it is told by its length."""
        if max(self._head, self._unread) <= MAX_HEAD:
            super().send_400_response(msg)
            return
        self.transport.write(STATUS_LINE[431] + b"content-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()

    def _count(self, *parts: bytes) -> None:
        self._head += sum(map(len, parts)) + 4
        if self._head > MAX_HEAD:
            raise ValueError("the head is too long")  # which ends the parser's work

    def _expect_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_TIMEOUT, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
