"""Work that takes long is done apart, on a thread, so that nobody else's answer waits for it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response

LONG = 16_384
"""From how much on: bytes of a body, characters of a text, numbers in an answer. It is some milliseconds' work."""

T = TypeVar("T")


async def apart(size: int, work: Callable[[], T]) -> T:
    """What the work gives; done here where it is short, since a thread costs more than that."""
    return work() if size < LONG else await asyncio.to_thread(work)


async def json_answer(size: int, make: Callable[[], Any]) -> Response:
    """What is made, as the answer to a request. size: how many numbers are in it, about."""
    return await apart(size, lambda: _LargeJSON(make()) if size >= LONG else JSONResponse(make()))


class _LargeJSON(JSONResponse):
    def render(self, content: Any) -> bytes:
        """Piece by piece: json's fast way holds Python's lock from the first byte to the last."""
        encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return "".join(encoder.iterencode(content)).encode()
