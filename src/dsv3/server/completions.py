"""/v1/completions: text continued as it stands, without turns.

Old, and what evaluation harnesses use: only here can one ask for the log-probabilities of a text that is given
(`echo` with `logprobs`, and `max_tokens` 0).
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from dsv3.engine.sampling import TokenLogprobs
from dsv3.server.answers import Answer, Answers
from dsv3.server.apart import apart, json_answer
from dsv3.server.errors import ApiError
from dsv3.server.protocol import MAX_PROMPTS, CompletionRequest, prompts_of, read
from dsv3.server.service import Exchange, Service, exchange_of, service_of
from dsv3.server.sse import DONE, EventStream, compact, data, quote, while_connected
from dsv3.server.structure import structured_output


async def completions(request: Request) -> Response:
    service, exchange = service_of(request), exchange_of(request)
    asked = await read(CompletionRequest, request, service.settings)
    completion = await Completion.begin(service, exchange, asked)
    if asked.stream:
        return EventStream(completion.events(), service, exchange)
    async with while_connected(request.receive, service):
        answers = await completion.answers.collect()
    return await json_answer(completion.answers.size(), lambda: completion.whole(answers))


class Completion:
    """One request of this endpoint."""

    def __init__(
        self, asked: CompletionRequest, texts: list[str | None], answers: Answers, model: str
    ) -> None:
        self.asked, self.texts, self.answers = asked, texts, answers
        service = answers.service
        self.vocabulary = service.vocabulary
        self.tokenizer = service.engine.llm.tokenizer
        self.head = {
            "id": f"cmpl-{answers.exchange.id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": service.fingerprint,
        }

    @classmethod
    async def begin(cls, service: Service, exchange: Exchange, asked: CompletionRequest) -> Completion:
        model = service.served(asked.model)
        if service.settings.log_prompts:
            exchange.prompt = asked.prompt
        structured = structured_output(asked.structure(), asked.response_format)
        wants_prompt = asked.prompt_logprobs
        if asked.echo and asked.logprobs is not None:
            wants_prompt = max(asked.logprobs, wants_prompt or 0)
        params = asked.sampling(
            service.engine.llm.default_params,
            max_tokens=asked.max_tokens,
            logprobs=asked.logprobs,
            prompt_logprobs=wants_prompt,
            logit_bias=asked.biases,
            structured=structured,
        )
        several = prompts_of(asked.prompt)
        if len(several) * params.n > MAX_PROMPTS:
            raise ApiError(
                400,
                f"{len(several)} prompts with {params.n} answers each are too many: at most {MAX_PROMPTS} in all",
                param="n",
                code="invalid_value",
            )
        special = asked.add_special_tokens is not False
        texts = [prompt if isinstance(prompt, str) else None for prompt in several]
        prompts = await service.encode(several, special)
        if not all(prompts):
            raise ApiError(
                400, "the prompt is empty: give it at least one token", param="prompt", code="invalid_value"
            )
        answers = await Answers.begin(service, exchange, prompts, params, salt=asked.cache_salt)
        return cls(asked, texts, answers, model)

    def _prompt_text(self, prompt: int) -> str:
        text = self.texts[prompt]
        return self.tokenizer.decode(self.answers.prompts[prompt]) if text is None else text

    # Whole ---------------------------------------------------------------------------------------------

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        choices = [self._choice(i, answer) for i, answer in enumerate(answers)]
        return {**self.head, "choices": choices, "usage": self.answers.usage()}

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        prompt = index // self.answers.params.n
        echo = self._prompt_text(prompt) if self.asked.echo else ""
        choice: dict[str, Any] = {
            "index": index,
            "text": echo + answer.text,
            "logprobs": None,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        if self.asked.logprobs is not None:
            tokens: list[TokenLogprobs | int] = list(answer.logprobs)
            if self.asked.echo:
                tokens = self._echoed(prompt, answer.prompt_logprobs) + tokens
            choice["logprobs"], _ = self.vocabulary.completion_logprobs(tokens, 0)
        if self.asked.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self.vocabulary.prompt_logprobs(answer.prompt_logprobs or [])
        if self.asked.return_token_ids:
            choice["token_ids"] = answer.token_ids
            choice["prompt_token_ids"] = self.answers.prompts[prompt]
        return choice

    def _echoed(self, prompt: int, logprobs: list[TokenLogprobs | None] | None) -> list[TokenLogprobs | int]:
        """The prompt's tokens as if they had been generated; of the first nothing is known."""
        ids = self.answers.prompts[prompt]
        known = logprobs or [None] * len(ids)
        return [token_id if token is None else token for token_id, token in zip(ids, known, strict=True)]

    # Streamed ------------------------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[bytes, None]:
        asked = self.asked
        head = compact(self.head)[:-1]
        usage = ',"usage":null' if asked.wants_usage else ""
        before = [f'data: {head},"choices":[{{"index":{i},"text":' for i in self._indexes]
        after = f',"logprobs":null,"finish_reason":null}}]{usage}}}\n\n'
        detailed = asked.logprobs is not None or asked.prompt_logprobs is not None or asked.return_token_ids
        offsets = [0] * len(before)
        started: set[int] = set()
        async with aclosing(self.answers.updates()) as updates:
            async for update in updates:
                index = update.index
                if not detailed and not asked.echo and update.finish_reason is None:
                    if update.text:
                        yield (before[index] + quote(update.text) + after).encode()
                    continue
                part = Answer()
                part.add(update)
                first = index not in started
                started.add(index)
                write = partial(self._chunk, index, part, first, offsets)
                yield await apart(self.answers.size(update), write)
        if asked.wants_usage:
            yield data({**self.head, "choices": [], "usage": self.answers.usage()}) + DONE
        else:
            yield DONE

    @property
    def _indexes(self) -> range:
        return range(len(self.answers.prompts) * self.answers.params.n)

    def _chunk(self, index: int, part: Answer, first: bool, offsets: list[int]) -> bytes:
        """One chunk with all that may be in it."""
        asked, prompt = self.asked, index // self.answers.params.n
        text, tokens = part.text, list[TokenLogprobs | int](part.logprobs)
        if first and asked.echo:
            text = self._prompt_text(prompt) + text
            if asked.logprobs is not None:
                tokens = self._echoed(prompt, part.prompt_logprobs) + tokens
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None}
        if asked.logprobs is not None:
            choice["logprobs"], offsets[index] = self.vocabulary.completion_logprobs(tokens, offsets[index])
        choice |= {"finish_reason": part.finish_reason, "stop_reason": part.stop_reason}
        if first and asked.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self.vocabulary.prompt_logprobs(part.prompt_logprobs or [])
        if asked.return_token_ids:
            choice["token_ids"] = part.token_ids
            if first:
                choice["prompt_token_ids"] = self.answers.prompts[prompt]
        chunk = {**self.head, "choices": [choice]}
        return data({**chunk, "usage": None} if asked.wants_usage else chunk)
