"""Running the application: a socket, uvicorn, and an end that loses no answer.

The socket is opened first, so that a port in use is said at once and not after a model of 600 GB was read. On SIGTERM
or Ctrl-C nothing new is taken, what is under way may finish for as long as the settings say, and the rest is told that
we are going; a second signal ends it there and then. uvicorn's own way closes its sockets first, so that a load
balancer could not even ask whether we are ready.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from types import FrameType

import uvicorn
from fastapi import FastAPI

from dsv3.errors import UserError
from dsv3.server.connection import Connection
from dsv3.server.service import Service
from dsv3.server.settings import Settings

log = logging.getLogger("dsv3.server")

_LAST_WORDS = 2
"""Seconds to tell those who are cut off."""

MAX_CONNECTIONS = 10_000
"""Connections at once, as far as the process may have files open; one more is answered 503."""
_OTHER_FILES = 64


def open_socket(settings: Settings) -> socket.socket:
    """Take the port. Raises UserError if that cannot be."""
    place = f"port {settings.port} of {settings.host}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        taken = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"host is {settings.host!r}: {error.strerror or error}") from None
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        taken.listen(2048)
    except OSError as error:
        taken.close()
        raise UserError(f"{place} cannot be had ({error.strerror}): choose another with --port") from None
    return taken


def check_tls(settings: Settings) -> None:
    """Raises UserError for a certificate or key that is missing, broken, or not the other's."""
    if settings.tls_cert is None or settings.tls_key is None:
        return
    for path in (settings.tls_cert, settings.tls_key):
        if not path.is_file():
            raise UserError(f"{path} is missing: TLS needs a certificate and its key, in PEM form")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            settings.tls_cert, settings.tls_key, lambda: ""
        )
    except (OSError, ValueError) as error:  # SSLError is an OSError
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{settings.tls_cert} and {settings.tls_key} are no certificate and its key: {reason}"
        ) from None


class Server(uvicorn.Server):
    """uvicorn's server with our end."""

    def __init__(self, app: FastAPI, settings: Settings, on_ready: Callable[[], None] = lambda: None) -> None:
        """on_ready: called once, when the model is loaded."""
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=_most_connections(),
                timeout_keep_alive=75,  # longer than load balancers keep theirs, so that they close first
                timeout_graceful_shutdown=_LAST_WORDS,
                ssl_certfile=settings.tls_cert,
                ssl_keyfile=settings.tls_key,
            )
        )
        logging.getLogger("uvicorn.error").addFilter(_is_defect)
        self._service: Service = app.state.service
        self._settings = settings
        self._on_ready: Callable[[], None] | None = on_ready
        self._drained_by = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        service = self._service
        if service.draining:
            self.should_exit = self.force_exit = True
        elif service.state == "loading":  # nothing is under way
            self.should_exit = True
        service.draining = True
        self._drained_by = monotonic() + self._settings.drain
        log.info(
            "stopping: %d requests under way have %g s to finish", len(service.tasks), self._settings.drain
        )

    async def on_tick(self, counter: int) -> bool:
        service = self._service
        if service.failure is not None:
            return True
        if self._on_ready is not None and service.state == "ready":
            self._on_ready()
            self._on_ready = None
        if service.draining and (not service.tasks or monotonic() > self._drained_by):
            if service.tasks:
                log.warning("%d requests were not finished and are cut off", len(service.tasks))
                service.abort()
            self.should_exit = True
        return await super().on_tick(counter)


def _most_connections() -> int:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, files - _OTHER_FILES))


def _is_defect(record: logging.LogRecord) -> bool:
    """What is cut off at a forced end is cancelled, and no error."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def serve(app: FastAPI, settings: Settings, taken: socket.socket, on_ready: Callable[[], None]) -> None:
    """Serve until told to stop. Raises what kept the engine from loading.

    Where the model is still being read, or a grammar being made, the process ends here, with status 0: a thread that does
    that cannot be stopped, and Python's own end would pull the ground from under it."""
    server = Server(app, settings, on_ready)
    try:
        with suppress(KeyboardInterrupt):
            server.run(sockets=[taken])
    finally:
        taken.close()
    service: Service = app.state.service
    if service.failure is not None:
        raise service.failure
    if any(thread.name in ("dsv3-load", "dsv3-grammar") for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
