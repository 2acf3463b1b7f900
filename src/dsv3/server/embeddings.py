"""/v1/embeddings: the mean over a text's tokens of the model's final, normed hidden states.

That is what a language model gives without being trained for it: good for finding near duplicates and for a first
look, behind a model that was trained to embed. The vectors are not normalised to length 1.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dsv3.server.errors import ApiError, context_exceeded, deadline_passed
from dsv3.server.protocol import EmbeddingRequest, parse, read_body
from dsv3.server.service import exchange_of, service_of
from dsv3.server.sse import while_connected

AT_ONCE = 32
"""Texts of one request that the engine has at the same time: others want their turn too."""


async def embeddings(request: Request) -> Response:
    service, exchange = service_of(request), exchange_of(request)
    body = await read_body(request, service.settings)
    asked = parse(EmbeddingRequest, request.headers.get("content-type", ""), body)
    model = service.served(asked.model)
    engine = service.engine
    hidden = engine.llm.model.config.hidden_size
    if asked.dimensions not in (None, hidden):
        raise ApiError(
            400,
            f"dimensions is {asked.dimensions}: this model's embeddings have {hidden}, and cannot be shortened",
            param="dimensions",
            code="unsupported_parameter",
        )
    if service.settings.log_prompts:
        exchange.prompt = asked.input
    given: Any = asked.input
    several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    inputs = [await service.encode(text) if isinstance(text, str) else text for text in several]
    for ids in inputs:
        if len(ids) > service.max_model_len:
            raise context_exceeded(len(ids), service.max_model_len, "input")
    exchange.prompt_tokens = sum(map(len, inputs))
    places = asyncio.Semaphore(AT_ONCE)

    async def embed(ids: list[int]) -> list[float]:
        async with places:
            return await engine.embed(ids)

    tasks = [asyncio.ensure_future(embed(ids)) for ids in inputs]
    try:
        async with (
            while_connected(request.receive, service),
            asyncio.timeout(service.settings.request_timeout),
        ):
            vectors = await asyncio.gather(*tasks)
    except TimeoutError:
        raise deadline_passed(service.settings.request_timeout) from None
    finally:
        for task in tasks:
            task.cancel()
    return JSONResponse(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": _shown(vector, asked.encoding_format)}
                for i, vector in enumerate(vectors)
            ],
            "model": model,
            "usage": {"prompt_tokens": exchange.prompt_tokens, "total_tokens": exchange.prompt_tokens},
        }
    )


def _shown(vector: list[float], form: str | None) -> list[float] | str:
    """base64 is of float32, little-endian: what the openai package asks for, being a quarter of the size."""
    if form != "base64":
        return vector
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
