"""/tokenize, /detokenize, /tokenizer_info: the checkpoint's own tokenizer for those who count, in vLLM's shapes."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dsv3.server.errors import ApiError
from dsv3.server.protocol import DetokenizeRequest, TokenizeRequest, parse, read_body
from dsv3.server.service import service_of


async def tokenize(request: Request) -> Response:
    service = service_of(request)
    body = await read_body(request, service.settings)
    asked = parse(TokenizeRequest, request.headers.get("content-type", ""), body)
    service.served(asked.model)
    if asked.prompt is not None:
        ids = await service.encode(asked.prompt, asked.add_special_tokens is not False)
    else:
        ids = await service.encode_chat(
            [message.plain() for message in asked.messages or ()],
            [tool.model_dump(exclude_none=True) for tool in asked.tools or ()],
            asked.chat_template_kwargs,
            asked.add_generation_prompt is not False,
        )
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids}
    if asked.return_token_strs:
        answer["token_strs"] = [service.vocabulary.name(token_id) for token_id in ids]
    return JSONResponse(answer)


async def detokenize(request: Request) -> Response:
    service = service_of(request)
    body = await read_body(request, service.settings)
    asked = parse(DetokenizeRequest, request.headers.get("content-type", ""), body)
    service.served(asked.model)
    size = service.vocabulary.size
    if wrong := next((i for i, token_id in enumerate(asked.tokens) if token_id >= size), -1) + 1:
        raise ApiError(
            400,
            f"tokens[{wrong - 1}] is {asked.tokens[wrong - 1]}: the vocabulary ends at {size - 1}",
            param=f"tokens[{wrong - 1}]",
            code="invalid_value",
        )
    tokenizer = service.engine.llm.tokenizer
    text = await asyncio.to_thread(tokenizer.decode, asked.tokens, skip_special_tokens=False)
    return JSONResponse({"prompt": text})


async def tokenizer_info(request: Request) -> Response:
    """What lm-eval asks for to work with the server's tokenizer."""
    service = service_of(request)
    tokenizer = service.engine.llm.tokenizer
    special = {name: tokenizer.special_tokens.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    return JSONResponse(
        {
            **special,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": service.max_model_len,
            "add_bos_token": tokenizer.add_bos_token,
            "chat_template": tokenizer.chat_template,
        }
    )
