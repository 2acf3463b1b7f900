"""Server-sent events, and noticing that nobody listens any more.

A stream is one chunk of a few dozen bytes for each token of each listener: at 200 listeners and 20 tokens a second
4,000 a second, from a thread that the model needs too. So the parts of a chunk that stay the same are made once for a
stream, the text of each token is encoded and put between them, and all that one update brings is one write.
Starlette's StreamingResponse would run a task group for each; here the task of the request writes by itself, a second
one does nothing but wait for the client to hang up, and a third sleeps until nothing has been written for so long that
a proxy might take the connection for dead: then it writes a comment, which clients skip.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from json.encoder import encode_basestring
from time import monotonic
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dsv3.server.errors import ApiError, ClientGone, as_api_error, deadline_passed, unforeseen
from dsv3.server.service import Exchange, Service

log = logging.getLogger("dsv3.server")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_SLACK = 30.0
"""Seconds past its deadline that an answer may take to be read."""

_LAST_SEND = 5.0
"""Seconds that the end of a stream may take to go out, after it was cut off."""

_BREAKS = re.compile("[\x85\u2028\u2029]")


def _one_line(text: str) -> str:
    """JSON with those line breaks escaped that it may hold as they are: some clients (httpx) part lines at them."""
    return text if text.isascii() else _BREAKS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def quote(text: str) -> str:
    """A text as a JSON string of one line."""
    return _one_line(encode_basestring(text))  # in C where Python was built with it


def compact(value: Any) -> str:
    return _one_line(json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False))


def data(value: Any) -> bytes:
    """One event that is a JSON value."""
    return f"data: {compact(value)}\n\n".encode()


@asynccontextmanager
async def while_connected(receive: Receive, service: Service) -> AsyncIterator[None]:
    """Do something for a client only as long as it is there.

    Raises ClientGone inside out when the client hangs up, and ApiError 503 when the server stops. The body of the
    request must have been read.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone:
            task.uncancel()
            raise ClientGone from None
        if service.aborting:
            task.uncancel()
            raise service.unavailable() from None
        raise
    finally:
        watcher.cancel()


class EventStream(Response):
    """An answer that is written as it is made."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        service: Service,
        exchange: Exchange,
        failure: Callable[[ApiError], bytes] = lambda error: data(error.body()),
    ) -> None:
        """events: each of them one write, of one event or several; closed whatever happens.

        failure: the event that tells of an error on the way."""
        self.status_code = 200
        self.background = None
        self.init_headers(
            {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-store",
                "x-accel-buffering": "no",
            }
        )
        self._events, self._service, self._exchange, self._failure = events, service, exchange, failure
        self._sent = monotonic()
        """When something was last written."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        last = b""
        async with aclosing(self._events):
            try:
                limit = self._service.settings.request_timeout
                async with asyncio.timeout(limit + _SLACK), while_connected(receive, self._service):
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    async with self._kept_alive(send):
                        async for event in self._events:
                            await send({"type": "http.response.body", "body": event, "more_body": True})
                            self._sent = monotonic()
            except ClientGone:
                raise
            except TimeoutError:
                last = self._failed(deadline_passed(limit))
            except Exception as error:
                answer = as_api_error(error)
                if answer is None:
                    answer = unforeseen(self._exchange.id)
                    log.exception("request %s failed in its stream", self._exchange.id)
                last = self._failed(answer)
        try:
            async with asyncio.timeout(_LAST_SEND):
                await send({"type": "http.response.body", "body": last, "more_body": False})
        except TimeoutError:  # whoever asked reads nothing: its place is not kept
            scope.get("dsv3.abort", lambda: None)()
            raise ClientGone from None

    @asynccontextmanager
    async def _kept_alive(self, send: Send) -> AsyncIterator[None]:
        """Write comments while there is nothing else to write, as the settings say."""
        seconds = self._service.settings.keep_alive

        async def comment() -> None:
            while True:
                if (left := self._sent + seconds - monotonic()) > 0:
                    await asyncio.sleep(left)
                else:
                    await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
                    self._sent = monotonic()

        task = asyncio.create_task(comment()) if seconds else None
        try:
            yield
        finally:
            if task is not None:
                task.cancel()

    def _failed(self, error: ApiError) -> bytes:
        self._exchange.finish_reason = f"error: {error.code or error.type}"
        return self._failure(error)
