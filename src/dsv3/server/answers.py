"""From a request that was read to the answers that the engine makes, with the books kept.

A request may have several prompts, and each several answers: the engine runs them all together, and what comes is
told apart by one number, prompt * n + answer. The common case, one prompt, costs nothing for this.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any, Self

from dsv3.engine.async_engine import Update
from dsv3.engine.sampling import SamplingParams, TokenLogprobs
from dsv3.engine.sequence import TextDecoder
from dsv3.server.errors import ApiError, context_exceeded, deadline_passed
from dsv3.server.service import Exchange, Service

MOST_LOGPROBS = 500_000
"""Log-probabilities in one answer: some 20 MB of JSON."""


@dataclass
class Answer:
    """One answer, whole."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, update: Update) -> None:
        self.text += update.text
        self.token_ids += update.token_ids
        self.logprobs += update.logprobs or ()
        self.finish_reason, self.stop_reason = update.finish_reason, update.stop_reason
        if update.prompt_logprobs is not None:
            self.prompt_logprobs = update.prompt_logprobs


class Answers:
    """The answers to one request while they are made."""

    def __init__(
        self, service: Service, exchange: Exchange, prompts: list[list[int]], params: SamplingParams
    ) -> None:
        self.service, self.exchange = service, exchange
        self.prompts, self.params = prompts, params
        self._generators: list[AsyncGenerator[Update, None]] = []
        self._last: dict[int, float] = {}
        """When each answer had its last token."""
        self._cached = [0] * len(prompts)

    @classmethod
    async def begin(
        cls,
        service: Service,
        exchange: Exchange,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        salt: str | None = None,
        decoder: Callable[[], TextDecoder] | None = None,
        param: str = "prompt",
    ) -> Self:
        """Give the prompts to the engine.

        salt: the client's own, beside its key's; param: what a prompt that is too long is called in the request. Raises
        ApiError and UserError; then none of the prompts runs."""
        answers = cls(service, exchange, prompts, params)
        room = service.max_model_len - (params.max_tokens != 0)
        for prompt in prompts:
            if len(prompt) > room:
                raise context_exceeded(len(prompt), service.max_model_len, param)
        answers._check_logprobs()
        service.reserve(exchange, len(prompts) * params.n)
        form = params.structured
        grammar = None if form is None else await service.compile(form, exchange)
        exchange.prompt_tokens = sum(map(len, prompts))
        left = service.seconds_left(exchange)
        cache_salt = exchange.who + (salt or "")
        try:
            for prompt in prompts:
                answers._generators.append(
                    service.engine.generate(
                        prompt,
                        params,
                        decoder=decoder,
                        deadline=left,
                        cache_salt=cache_salt,
                        grammar=grammar,
                    )
                )
        except Exception:
            for generator in answers._generators:
                await generator.aclose()
            raise
        return answers

    def _check_logprobs(self) -> None:
        """Refuse what could become an answer of hundreds of megabytes."""
        params, n = self.params, self.params.n
        asked = 0
        for prompt in self.prompts:
            room = self.service.max_model_len - len(prompt)
            new = room if params.max_tokens is None else min(params.max_tokens, room)
            asked += n * self._numbers(new, params.logprobs)
            asked += n * self._numbers(len(prompt), params.prompt_logprobs)
        if asked > MOST_LOGPROBS:
            raise ApiError(
                400,
                f"this request asks for up to {asked:,} log-probabilities: {MOST_LOGPROBS:,} is the most; ask for "
                "fewer of each token, or for fewer tokens",
                param="logprobs" if params.logprobs is not None else "prompt_logprobs",
                code="invalid_value",
            )

    @staticmethod
    def _numbers(tokens: int, likeliest: int | None) -> int:
        return 0 if likeliest is None else tokens * (likeliest + 1)

    def size(self, update: Update | None = None) -> int:
        """Numbers to be written about an update, or about all that came; see `apart`."""
        if update is None:
            new, old = self.exchange.generated_tokens, self.exchange.prompt_tokens * self.params.n
        else:
            new, old = len(update.token_ids), len(update.prompt_logprobs or ())
        return (
            new + self._numbers(new, self.params.logprobs) + self._numbers(old, self.params.prompt_logprobs)
        )

    async def updates(self) -> AsyncGenerator[Update, None]:
        """All that comes, `index` telling the answers of all prompts apart. Raises ApiError 504 at the deadline."""
        generators, n = self._generators, self.params.n
        source = generators[0] if len(generators) == 1 else _together(generators, n)
        async with aclosing(source):
            async for update in source:
                self._book(update, n)
                yield update

    async def collect(self) -> list[Answer]:
        """All answers, whole."""
        answers = [Answer() for _ in range(len(self.prompts) * self.params.n)]
        async with aclosing(self.updates()) as updates:
            async for update in updates:
                answers[update.index].add(update)
        return answers

    def _book(self, update: Update, n: int) -> None:
        now, index, tokens = monotonic(), update.index, len(update.token_ids)
        exchange = self.exchange
        last = self._last.get(index)
        if last is not None:
            if tokens:
                self.service.metrics.time_between_tokens.observe((now - last) / tokens, tokens)
                self._last[index] = now
        else:
            self._last[index] = now
            self._cached[index // n] = max(self._cached[index // n], update.cached_tokens)
            if exchange.first_token is None:
                exchange.first_token = now
                self.service.metrics.time_to_first_token.observe(now - exchange.started)
        exchange.generated_tokens += tokens
        if update.finish_reason is not None:
            exchange.finish_reason = update.finish_reason
            exchange.cached_tokens = sum(self._cached)
            if update.finish_reason == "deadline":
                raise deadline_passed(self.service.settings.request_timeout)

    def usage(self) -> dict[str, Any]:
        exchange = self.exchange
        return {
            "prompt_tokens": exchange.prompt_tokens,
            "completion_tokens": exchange.generated_tokens,
            "total_tokens": exchange.prompt_tokens + exchange.generated_tokens,
            "prompt_tokens_details": {"cached_tokens": exchange.cached_tokens},
        }


async def _together(generators: list[AsyncGenerator[Update, None]], n: int) -> AsyncGenerator[Update, None]:
    """What several generators give, as it comes; the first that fails ends all."""
    arrived: asyncio.Queue[Update | Exception | None] = asyncio.Queue(maxsize=1)

    async def pump(prompt: int, generator: AsyncGenerator[Update, None]) -> None:
        try:
            async with aclosing(generator):
                async for update in generator:
                    await arrived.put(replace(update, index=prompt * n + update.index))
            await arrived.put(None)
        except Exception as error:
            await arrived.put(error)

    pumps = [asyncio.create_task(pump(i, generator)) for i, generator in enumerate(generators)]
    try:
        running = len(pumps)
        while running:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
