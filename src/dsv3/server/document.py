"""The OpenAPI document: what each path takes and answers, errors included.

Requests are described by the models that read them, so the document cannot say something else than the code does.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from dsv3.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    ResponsesRequest,
    TokenizeRequest,
)
from dsv3.server.settings import Settings

_REQUESTS = (
    ChatRequest,
    CompletionRequest,
    ResponsesRequest,
    EmbeddingRequest,
    TokenizeRequest,
    DetokenizeRequest,
)

_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

_WHY = {
    400: "The request is malformed, asks for something that is not supported, or is too long for the context.",
    401: "No valid API key came with it.",
    404: "The model is not served here.",
    405: "The path knows another method.",
    408: "The body did not arrive in time.",
    413: "The body is too long.",
    415: "The body is not application/json.",
    429: "The key has used its requests a minute, or has too many under way.",
    500: "Something failed here.",
    503: "The model is loading, the server is stopping, or too many answers are waited for.",
    504: "The answer was not complete at the deadline.",
}


def _answers(content: dict[str, Any], *errors: int) -> dict[int | str, dict[str, Any]]:
    answers: dict[int | str, dict[str, Any]] = {200: {"description": "The answer.", "content": content}}
    for status in (400, *errors):
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        answers[status] = {"description": _WHY[status], "content": content}
    return answers


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _list(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


_TEXT, _WHOLE = {"type": "string"}, {"type": "integer"}
_STREAM: dict[str, Any] = {"text/event-stream": {}}
_MODEL = _object(id=_TEXT, object={"const": "model"}, created=_WHOLE, owned_by=_TEXT, max_model_len=_WHOLE)
_USAGE = _object(prompt_tokens=_WHOLE, total_tokens=_WHOLE)
_GENERATED = _object(
    id=_TEXT, object=_TEXT, created=_WHOLE, model=_TEXT, choices=_list({"type": "object"}), usage=_USAGE
)
_GUARDED = (401, 429, 503)
_READ = (*_GUARDED, 404, 408, 413, 415, 500)


def _post(model: type, content: dict[str, Any], summary: str, *errors: int) -> dict[str, Any]:
    body = {"required": True, "content": _json({"$ref": f"#/components/schemas/{model.__name__}"})}
    return {
        "summary": summary,
        "responses": _answers(content, *_READ, *errors),
        "openapi_extra": {"requestBody": body},
    }


def _get(content: dict[str, Any], summary: str, *errors: int) -> dict[str, Any]:
    return {"summary": summary, "responses": _answers(content, *errors)}


DOCUMENTED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _post(
        ChatRequest, {**_json(_GENERATED), **_STREAM}, "The next turn of a conversation.", 504
    ),
    "/v1/completions": _post(CompletionRequest, {**_json(_GENERATED), **_STREAM}, "A text continued.", 504),
    "/v1/responses": _post(
        ResponsesRequest,
        {**_json(_object(id=_TEXT, object=_TEXT, status=_TEXT, output=_list({"type": "object"}))), **_STREAM},
        "A conversation by OpenAI's newer API; nothing is stored.",
        504,
    ),
    "/v1/embeddings": _post(
        EmbeddingRequest,
        _json(_object(object={"const": "list"}, data=_list({"type": "object"}), model=_TEXT, usage=_USAGE)),
        "The mean of the final hidden states of a text.",
        504,
    ),
    "/v1/models": _get(
        _json(_object(object={"const": "list"}, data=_list(_MODEL))), "What is served.", *_GUARDED
    ),
    "/v1/models/{model:path}": {
        **_get(_json(_MODEL), "One model that is served.", *_GUARDED, 404),
        "openapi_extra": {
            "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
        },
    },
    "/tokenize": _post(
        TokenizeRequest,
        _json(_object(count=_WHOLE, max_model_len=_WHOLE, tokens=_list(_WHOLE))),
        "The token ids of a text, or of a conversation.",
    ),
    "/detokenize": _post(DetokenizeRequest, _json(_object(prompt=_TEXT)), "The text of token ids."),
    "/tokenizer_info": _get(
        _json({"type": "object"}), "The tokenizer's special tokens and chat template.", *_GUARDED
    ),
    "/health": _get(_json(_object(status={"const": "ok"})), "Whether the process lives."),
    "/ready": _get(_json(_object(status={"const": "ready"})), "Whether requests are taken.", 503),
    "/version": _get(_json(_object(version=_TEXT)), "Which dsv3 this is."),
    "/metrics": _get({"text/plain": {"schema": _TEXT}}, "What Prometheus reads."),
}


def document(app: FastAPI, settings: Settings, public: Collection[str]) -> dict[str, Any]:
    """The document of an app. public: paths that ask for no key."""
    found: dict[str, Any] = get_openapi(
        title=app.title, version=_version(), summary=app.summary, routes=app.routes
    )
    _, definitions = models_json_schema(
        [(model, "validation") for model in _REQUESTS], ref_template="#/components/schemas/{model}"
    )
    schemas = definitions["$defs"]
    components = {"schemas": {**schemas, "Error": _ERROR}}
    if settings.root_path:
        found["servers"] = [{"url": settings.root_path}]
    if settings.api_keys is not None:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in found["paths"].items():
            if path not in public and (path != "/metrics" or settings.protect_metrics):
                for operation in methods.values():
                    operation["security"] = [{"key": []}]
    found["components"] = components
    return found


def _version() -> str:
    from dsv3 import __version__

    return str(__version__)
