"""An engine without a model: it says the prompt again, as slowly and as badly as a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

from starlette.testclient import TestClient

from dsv3.config import PRESETS
from dsv3.engine.async_engine import EngineBusy, EngineError, EngineStats, Update
from dsv3.engine.sampling import SamplingParams, TokenLogprobs
from dsv3.server.app import create_app
from dsv3.server.settings import Settings
from dsv3.text import Tokenizer
from tests.text.toy import BOS, EOS, PAD, train

MAX_MODEL_LEN = 1024


@cache
def tokenizer() -> Tokenizer:
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    return Tokenizer(train(), special, add_bos_token=True)


@dataclass
class Call:
    """A request as the engine got it."""

    prompt_ids: list[int]
    params: SamplingParams
    deadline: float | None
    cache_salt: str
    grammar: Any = None
    open: bool = True


@dataclass
class FakeEngine:
    delay: float = 0.0
    """Seconds before each token."""
    says: str | None = None
    """What it answers instead of the prompt."""
    busy: bool = False
    fails_at: int | None = None
    """The token at which it breaks."""
    error: Exception = field(default_factory=lambda: EngineError("the engine failed: it is a fake"))
    finish: str | None = None
    """How it ends whatever was asked."""
    calls: list[Call] = field(default_factory=list)
    started: bool = False
    max_waiting: int | None = None
    max_num_seqs: int = 64

    def __post_init__(self) -> None:
        config = PRESETS["tiny"].replace(vocab_size=tokenizer().vocab_size)
        self.compiled: list[Any] = []
        grammars = SimpleNamespace(compile=self.compiled.append, cached=lambda form: None)
        scheduler = SimpleNamespace(max_num_seqs=self.max_num_seqs)
        self.llm = SimpleNamespace(
            tokenizer=tokenizer(),
            default_params=SamplingParams(temperature=0.6, top_p=0.9),
            max_model_len=MAX_MODEL_LEN,
            model=SimpleNamespace(config=config),
            engine=SimpleNamespace(grammars=grammars, scheduler=scheduler),
        )

    @property
    def open(self) -> int:
        return sum(call.open for call in self.calls)

    def start(self) -> None:
        self.started = True

    async def close(self) -> None:
        self.started = False

    def generate(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        decoder: Callable[[], Any] | None = None,
        deadline: float | None = None,
        cache_salt: str = "",
        grammar: Any = None,
    ) -> AsyncGenerator[Update, None]:
        if self.busy:
            raise EngineBusy("7 requests are waiting already: try again later")
        call = Call(prompt_ids, params, deadline, cache_salt, grammar)
        self.calls.append(call)
        return self._answer(call, decoder or tokenizer().stream)

    async def _answer(self, call: Call, decoder: Callable[[], Any]) -> AsyncGenerator[Update, None]:
        params, ids = call.params, call.prompt_ids
        said = ids[1:] if self.says is None else tokenizer().encode(self.says)
        most = len(said) if params.max_tokens is None else params.max_tokens
        tokens, reason = said[:most], "stop" if len(said) < most else "length"
        decoders = [decoder() for _ in range(params.n)]
        try:
            if not tokens:
                for index in range(params.n):
                    yield self._update(call, index, "", [], "length", first=True)
            for place, token_id in enumerate(tokens):
                await asyncio.sleep(self.delay)
                if place == self.fails_at:
                    raise self.error
                end = place == len(tokens) - 1
                for index in range(params.n):
                    text = decoders[index].push(token_id) + (decoders[index].flush() if end else "")
                    finish = (self.finish or reason) if end else None
                    yield self._update(call, index, text, [token_id], finish, first=place == 0)
        finally:
            call.open = False

    def _update(
        self, call: Call, index: int, text: str, ids: list[int], finish: Any, *, first: bool
    ) -> Update:
        params = call.params
        known = None if params.logprobs is None else [_logprobs(i, params.logprobs) for i in ids]
        prompt = None
        if params.prompt_logprobs is not None and first:
            prompt = [None, *(_logprobs(i, params.prompt_logprobs) for i in call.prompt_ids[1:])]
        return Update(index, text, ids, known, finish, None, prompt, min(2, len(call.prompt_ids)))

    async def embed(self, prompt_ids: list[int], *, deadline: float | None = None) -> list[float]:
        self.embed_deadline = deadline
        await asyncio.sleep(self.delay)
        return [float(len(prompt_ids)), 0.5]

    def stats(self) -> EngineStats:
        return EngineStats(1, 2, 10, 5, 100, 50, 25, 3, 8, 6, 40, True, {"stop": 4, "abort": 1})


def _logprobs(token_id: int, top: int) -> TokenLogprobs:
    """The token has the probability 1/2 and is the second of three."""
    table = {token_id + 1: -0.5, token_id: -0.75, token_id + 2: -float("inf")}
    return TokenLogprobs(token_id, -0.75, dict(list(table.items())[:top]))


@contextmanager
def client(engine: Any = None, **settings: Any) -> Iterator[TestClient]:
    """A client of a server around the engine, by default a fake that echoes."""
    app = create_app(FakeEngine() if engine is None else engine, Settings(**settings))
    with TestClient(app, base_url="http://localhost") as http:
        yield http


def chat(text: str = "Once upon a time", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **more}


def events(text: str) -> list[str]:
    """The data of each event of a stream."""
    found = []
    for event in text.split("\n\n")[:-1]:
        line = event.split("\n")[-1]
        assert line.startswith("data: "), event
        found.append(line.removeprefix("data: "))
    return found
