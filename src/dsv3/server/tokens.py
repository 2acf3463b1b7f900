"""/tokenize, /detokenize, /tokenizer_info: the checkpoint's own tokenizer for those who count, in vLLM's shapes."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dsv3.server.apart import apart, json_answer
from dsv3.server.errors import ApiError
from dsv3.server.protocol import DetokenizeRequest, TokenizeRequest, read
from dsv3.server.service import exchange_of, service_of


async def tokenize(request: Request) -> Response:
    service = service_of(request)
    asked = await read(TokenizeRequest, request, service.settings)
    service.served(asked.model)
    if asked.prompt is not None:
        (ids,) = await service.encode([asked.prompt], asked.add_special_tokens is not False)
    else:
        ids = await service.encode_chat(
            exchange_of(request),
            [message.plain() for message in asked.messages or ()],
            [tool.model_dump(exclude_none=True) for tool in asked.tools or ()],
            asked.chat_template_kwargs,
            asked.add_generation_prompt is not False,
            bool(asked.continue_final_message),
        )
    vocabulary, most = service.vocabulary, service.max_model_len

    def answer() -> dict[str, Any]:
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": most, "tokens": ids}
        if asked.return_token_strs:
            answer["token_strs"] = [vocabulary.name(token_id) for token_id in ids]
        return answer

    return await json_answer(len(ids), answer)


async def detokenize(request: Request) -> Response:
    service = service_of(request)
    asked = await read(DetokenizeRequest, request, service.settings)
    service.served(asked.model)
    size = service.vocabulary.size
    if max(asked.tokens, default=0) >= size:
        wrong = next(i for i, token_id in enumerate(asked.tokens) if token_id >= size)
        raise ApiError(
            400,
            f"tokens[{wrong}] is {asked.tokens[wrong]}: the vocabulary ends at {size - 1}",
            param=f"tokens[{wrong}]",
            code="invalid_value",
        )
    tokenizer = service.engine.llm.tokenizer
    text = await apart(len(asked.tokens), lambda: tokenizer.decode(asked.tokens, skip_special_tokens=False))
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
