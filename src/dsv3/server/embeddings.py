"""/v1/embeddings: the mean over a text's tokens of the model's final, normed hidden states.

That is what a language model gives without being trained for it: good for finding near duplicates and for a first
look, behind a model that was trained to embed. The vectors are not normalised to length 1.
"""

from __future__ import annotations

import asyncio
import base64
from time import monotonic

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from dsv3.engine.async_engine import EngineError
from dsv3.server.apart import json_answer
from dsv3.server.errors import ApiError, context_exceeded, deadline_passed
from dsv3.server.protocol import EmbeddingRequest, prompts_of, read
from dsv3.server.service import exchange_of, service_of
from dsv3.server.sse import while_connected

AT_ONCE = 32
"""Texts of one request that the engine has at the same time: others want their turn too."""


async def embeddings(request: Request) -> Response:
    service, exchange = service_of(request), exchange_of(request)
    asked = await read(EmbeddingRequest, request, service.settings)
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
    inputs = await service.encode(prompts_of(asked.input))
    for ids in inputs:
        if len(ids) > service.max_model_len:
            raise context_exceeded(len(ids), service.max_model_len, "input")
    exchange.prompt_tokens = sum(map(len, inputs))
    places = asyncio.Semaphore(min(AT_ONCE, service.settings.max_concurrent or AT_ONCE))

    async def embed(ids: list[int]) -> list[float]:
        async with places:
            return await engine.embed(ids, deadline=service.seconds_left(exchange))

    tasks = [asyncio.ensure_future(embed(ids)) for ids in inputs]
    try:
        async with (
            while_connected(request.receive, service),
            asyncio.timeout(service.seconds_left(exchange)),
        ):
            vectors = await asyncio.gather(*tasks)
    except EngineError:
        service.seconds_left(exchange)  # the engine may be the first to notice that none is left
        raise
    except TimeoutError:
        raise deadline_passed(service.settings.request_timeout) from None
    finally:
        for task in tasks:
            task.cancel()
    exchange.first_token = monotonic()
    return await json_answer(
        len(vectors) * hidden,
        lambda: {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": _shown(vector, asked.encoding_format)}
                for i, vector in enumerate(vectors)
            ],
            "model": model,
            "usage": {"prompt_tokens": exchange.prompt_tokens, "total_tokens": exchange.prompt_tokens},
        },
    )


def _shown(vector: list[float], form: str | None) -> list[float] | str:
    """base64 is of float32, little-endian: what the openai package asks for, being a quarter of the size."""
    if form != "base64":
        return vector
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
