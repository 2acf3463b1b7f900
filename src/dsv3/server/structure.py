"""The form that an answer must have, from the several ways in which clients ask for one."""

from __future__ import annotations

import json
from typing import Any

from dsv3.engine.grammar import StructuredOutput
from dsv3.server.errors import ApiError
from dsv3.server.protocol import ResponseFormat, TextFormat


def structured_output(
    extras: dict[str, Any] | None, format: ResponseFormat | TextFormat | None
) -> StructuredOutput | None:
    """extras: keywords of StructuredOutput from vLLM's parameters; format: OpenAI's. Raises ApiError for both."""
    asked: dict[str, Any] | None = None
    if format is not None and format.type == "json_object":
        asked = {"json_object": True}
    elif isinstance(format, ResponseFormat) and format.json_schema is not None:
        asked = {"json_schema": json.dumps(format.json_schema.schema_)}
    elif isinstance(format, TextFormat) and format.schema_ is not None:
        asked = {"json_schema": json.dumps(format.schema_)}
    if asked and extras:
        raise ApiError(
            400,
            f"response_format and {next(iter(extras))} both say which form the answer has: give one",
            param="response_format",
            code="invalid_value",
        )
    asked = asked or extras
    return None if asked is None else StructuredOutput(**asked)
