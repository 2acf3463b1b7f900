"""The gate: what every request passes on its way in, and every answer on its way out.

One plain ASGI middleware. In: a name for the request, whose Host it is for, whose key it bears, whether it is
within its limits, whether we serve at all. Out: headers, and when all is said a line in the access log and a count
in the metrics. It touches the first message of an answer and hands the others on, because those are tokens.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
from collections.abc import Collection
from contextlib import suppress
from datetime import UTC, datetime
from time import monotonic
from typing import Any

from starlette._utils import get_route_path
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv3.server.errors import ApiError, ClientGone, as_api_error, unforeseen
from dsv3.server.service import Exchange, Service
from dsv3.server.settings import LOOPBACK

log = logging.getLogger("dsv3.server")
access_log = logging.getLogger("dsv3.server.access")

CLIENT_GONE = 499
"""Logged as the status of an answer that nobody waited for."""

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PORT = re.compile(r":\d*$")
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
_NO_CONTENT = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
_NO_STORE = (b"cache-control", b"no-store")


class Gate:
    def __init__(
        self, app: ASGIApp, service: Service, routes: Collection[str], public: Collection[str]
    ) -> None:
        """routes: those we have, by which requests are counted; public: those that need no key."""
        self.app, self.service = app, service
        self.routes, self.public = frozenset(routes), frozenset(public)
        settings = service.settings
        guarded = settings.local or settings.allowed_hosts
        self.hosts = {*LOOPBACK, "[::1]", *settings.allowed_hosts} if guarded else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        scope["root_path"] = root = self.service.settings.root_path
        path = get_route_path(scope)
        exchange = Exchange(_request_id(headers), self._route(path), scope["method"])
        scope["dsv3"] = exchange
        extra = [(b"x-request-id", exchange.id.encode()), *_HEADERS]
        started = False

        async def pass_on(message: Message) -> None:
            nonlocal started
            if not started:
                started = True
                exchange.status = message["status"]
                own = message["headers"]
                names = {name for name, _ in own}
                defaults = [header for header in (_NO_CONTENT, _NO_STORE) if header[0] not in names]
                message["headers"] = [*own, *extra, *defaults]
            await send(message)

        try:
            self._check_host(headers)
            if not path:  # the prefix itself, without a slash: the page's own paths begin behind one
                await RedirectResponse(f"{root}/")(scope, receive, pass_on)
            elif path in self.public:
                await self.app(scope, receive, pass_on)
            else:
                await self._let_in(exchange, headers, extra, scope, receive, pass_on)
        except ClientGone:
            exchange.status = CLIENT_GONE
        except Exception as error:
            answer = as_api_error(error)
            if answer is None:
                answer = unforeseen(exchange.id)
                log.exception("request %s failed", exchange.id)
            if not started:
                await answer.response()(scope, receive, pass_on)
        finally:
            self._book(exchange)

    async def _let_in(
        self,
        exchange: Exchange,
        headers: dict[bytes, bytes],
        extra: list[tuple[bytes, bytes]],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """A request of the API: who asks, may they, and are we there?"""
        service = self.service
        if service.keys is not None:
            exchange.key = service.keys.find(_bearer(headers))
            if exchange.key is None:
                raise ApiError(
                    401,
                    "no valid API key came with this request: send the header Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
        if service.state != "ready":
            raise service.unavailable()
        who = exchange.who
        left = service.limits.enter(who)
        extra += [(name.encode(), value.encode()) for name, value in left.items()]
        task = asyncio.current_task()
        assert task is not None
        service.tasks.add(task)
        service.metrics.active += 1
        try:
            await self.app(scope, receive, send)
        finally:
            service.metrics.active -= 1
            service.tasks.discard(task)
            service.limits.leave(who, exchange.places)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        """A page of elsewhere can point its own name at 127.0.0.1 and so reach us from the browser of whoever
        reads it; what it cannot do is to write another name into Host."""
        if self.hosts is None:
            return
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host if host.endswith("]") else _PORT.sub("", host)
        if name not in self.hosts:
            raise ApiError(
                400,
                f"this server answers to localhost, not to {host!r}: a name that a proxy gives it must be allowed "
                "with --allowed-host",
                code="invalid_host",
            )

    def _route(self, path: str) -> str:
        """The path as a label: few of them, whatever is asked for."""
        if path in self.routes:
            return path
        return "/v1/models/{model}" if path.startswith("/v1/models/") else "other"

    def _book(self, exchange: Exchange) -> None:
        seconds = monotonic() - exchange.started
        metrics = self.service.metrics
        metrics.requests[exchange.route, exchange.status] += 1
        if exchange.first_token is not None:
            metrics.request_duration.observe(seconds)
        if self.service.settings.access_log:
            with suppress(Exception):  # an answer that was given is not taken back for its line in the log
                access_log.info(json.dumps(_line(exchange, seconds), ensure_ascii=False))


def _line(exchange: Exchange, seconds: float) -> dict[str, Any]:
    """What the access log says of a request."""
    first = exchange.first_token
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "id": exchange.id,
        "key": None if exchange.key is None else exchange.key.name,
        "method": exchange.method,
        "route": exchange.route,
        "status": exchange.status,
        "ms": round(seconds * 1000, 1),
        "ttft_ms": None if first is None else round((first - exchange.started) * 1000, 1),
        "prompt_tokens": exchange.prompt_tokens,
        "cached_tokens": exchange.cached_tokens,
        "generated_tokens": exchange.generated_tokens,
        "finish_reason": exchange.finish_reason,
    }
    return line if exchange.prompt is None else {**line, "prompt": exchange.prompt}


def _request_id(headers: dict[bytes, bytes]) -> str:
    """The client's own where it sends a fitting one, so that both sides' logs can be laid together."""
    own = headers.get(b"x-request-id", b"").decode("latin-1")
    return own if _ID.fullmatch(own) else secrets.token_hex(16)


def _bearer(headers: dict[bytes, bytes]) -> str:
    scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
