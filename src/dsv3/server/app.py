"""The application: which paths there are, and what stands before them.

FastAPI routes the requests and carries the OpenAPI document. It does not read them: bodies are read by
`protocol.read_body` up to the limit, and what is wrong with one is said in OpenAI's shape.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dsv3.engine.async_engine import AsyncEngine
from dsv3.errors import UserError
from dsv3.server import page
from dsv3.server.chat import chat_completions
from dsv3.server.completions import completions
from dsv3.server.document import DOCUMENTED, document
from dsv3.server.embeddings import embeddings
from dsv3.server.errors import ApiError, as_api_error
from dsv3.server.gate import Gate
from dsv3.server.limits import RATE_HEADERS
from dsv3.server.metrics import CONTENT_TYPE
from dsv3.server.responses import responses
from dsv3.server.service import Service, service_of
from dsv3.server.settings import Settings
from dsv3.server.tokens import detokenize, tokenize, tokenizer_info

PUBLIC = ("/health", "/ready", "/version", "/openapi.json")
"""What needs no key: it says nothing of anybody's work."""


def create_app(engine: AsyncEngine | Callable[[], AsyncEngine], settings: Settings) -> FastAPI:
    """The server as an ASGI application.

    engine: one that has not been started, or what makes one: then we answer at once, and /ready when it is loaded. Its
    life is that of the application. Raises UserError for settings that do not work here.
    """
    service = Service(engine, settings)
    files = page.load() if settings.page else {}

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(service.load())
        if not callable(engine):
            await loading
            if service.failure is not None:
                raise service.failure
        try:
            with suppress(asyncio.CancelledError):  # a forced end, which is no error
                yield
        finally:
            service.draining = True
            loading.cancel()
            with suppress(asyncio.CancelledError):
                await loading
            await service.close()

    app = FastAPI(
        title="dsv3",
        summary="DeepSeek-V3 by OpenAI's API",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    for path, (method, handler) in _HANDLERS.items():
        app.add_api_route(path, handler, methods=[method], response_model=None, **DOCUMENTED[path])
        if method == "GET":
            app.add_api_route(path, handler, methods=["HEAD"], response_model=None, include_in_schema=False)
    schema: dict[str, Any] = {}

    async def openapi(request: Request) -> JSONResponse:
        if not schema:
            schema.update(document(app, settings, PUBLIC))
        return JSONResponse(schema)

    app.add_api_route("/openapi.json", openapi, methods=["GET", "HEAD"], include_in_schema=False)
    for path, file in files.items():
        app.add_api_route(path, _page_route(file), methods=["GET", "HEAD"], include_in_schema=False)

    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _wrong_parameter)
    for kind in (ApiError, UserError):
        app.add_exception_handler(kind, _expected_error)
    public = {*PUBLIC, *files} | (set() if settings.protect_metrics else {"/metrics"})
    app.add_middleware(
        Gate, service=service, routes={*_HANDLERS, "/openapi.json", *files} - {_MODEL}, public=public
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client for browsers sends a dozen of its own
            expose_headers=["retry-after", "x-request-id", *RATE_HEADERS],
        )
    return app


# The small endpoints -----------------------------------------------------------------------------------


async def health(request: Request) -> JSONResponse:
    """The process lives and answers."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> JSONResponse:
    """Whether requests are taken: 503 while the model is loading, and once the server is to stop."""
    service = service_of(request)
    if service.state != "ready":
        raise service.unavailable()
    return JSONResponse({"status": "ready"})


async def version(request: Request) -> JSONResponse:
    from dsv3 import __version__

    return JSONResponse({"version": __version__})


async def metrics(request: Request) -> Response:
    return Response(service_of(request).metrics.page(), headers={"content-type": CONTENT_TYPE})


async def models(request: Request) -> JSONResponse:
    service = service_of(request)
    return JSONResponse(
        {"object": "list", "data": [_model(service, name) for name in service.settings.served_model_names]}
    )


async def model(request: Request) -> JSONResponse:
    service = service_of(request)
    return JSONResponse(_model(service, service.served(request.path_params["model"])))


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "dsv3",
        "max_model_len": service.max_model_len,
    }


def _page_route(file: page.File) -> Callable[[Request], Any]:
    async def send_file(request: Request) -> Response:
        return page.answer(file, request)

    return send_file


_MODEL = "/v1/models/{model:path}"
_HANDLERS: dict[str, tuple[str, Callable[[Request], Any]]] = {
    "/v1/chat/completions": ("POST", chat_completions),
    "/v1/completions": ("POST", completions),
    "/v1/responses": ("POST", responses),
    "/v1/embeddings": ("POST", embeddings),
    "/v1/models": ("GET", models),
    _MODEL: ("GET", model),
    "/tokenize": ("POST", tokenize),
    "/detokenize": ("POST", detokenize),
    "/tokenizer_info": ("GET", tokenizer_info),
    "/health": ("GET", health),
    "/ready": ("GET", ready),
    "/version": ("GET", version),
    "/metrics": ("GET", metrics),
}


# Errors ------------------------------------------------------------------------------------------------


async def _expected_error(request: Request, error: Exception) -> Response:
    answer = as_api_error(error)
    assert answer is not None
    return answer.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router says: there is no such path, or it knows another method."""
    assert isinstance(error, HTTPException)
    place = f"{request.method} {request.url.path}"
    message = {404: f"{place}: there is no such path", 405: f"{place}: this path knows another method"}
    code = {404: "unknown_path", 405: "method_not_allowed"}.get(error.status_code)
    text = message.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, text, code=code, headers=error.headers).response()


async def _wrong_parameter(request: Request, error: Exception) -> Response:
    return ApiError(400, "the path or query of this request is malformed", code="invalid_value").response()
