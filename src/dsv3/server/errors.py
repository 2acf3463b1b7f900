"""What clients are told when something is wrong: OpenAI's shape, whatever the cause.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "temperature", "code": null}}

`message` is for a person, `code` for a program, `param` names the part of the request that is meant. Everything
that goes wrong on the way of a request becomes an `ApiError`; only what nobody foresaw becomes a 500, whose cause
is in our log and not in the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from dsv3.engine.async_engine import EngineBusy, EngineError
from dsv3.errors import UserError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

# Messages of UserErrors begin with what is meant: "temperature is 5: ...", "tools[0].function.parameters: at $, ...".
_NAMED = re.compile(r"(?=tools\[|\S+ (?:is|has|names|must) )([a-z_][a-z_.\[\]\d]*)")


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        return _TYPES.get(self.status) or ("server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


class ClientGone(Exception):
    """Whoever asked has hung up."""


def deadline_passed(seconds: float) -> ApiError:
    return ApiError(504, f"the answer was not complete after {seconds:g} seconds", code="timeout")


def context_exceeded(tokens: int, most: int, param: str) -> ApiError:
    return ApiError(
        400,
        f"the prompt has {tokens:,} tokens: this model's context is {most:,} tokens, and the answer needs room "
        "for at least one",
        param=param,
        code="context_length_exceeded",
    )


def as_api_error(error: Exception) -> ApiError | None:
    """The answer to what went wrong on purpose; None for a defect."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineBusy):
        return ApiError(503, str(error), code="server_busy", headers={"retry-after": "1"})
    if isinstance(error, EngineError):
        return ApiError(500, str(error), code="engine_error")
    if isinstance(error, UserError):
        named = _NAMED.match(str(error))
        return ApiError(400, str(error), param=named[1] if named else None)
    return None


def unforeseen(request_id: str) -> ApiError:
    return ApiError(
        500,
        f"something went wrong here, and our log says what under request {request_id}",
        code="internal_error",
    )
