"""What all handlers share, and what is remembered of one request while it is under way."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from time import monotonic
from typing import Any, cast

from starlette.requests import Request

from dsv3.engine.async_engine import AsyncEngine, EngineBusy, EngineStats
from dsv3.engine.grammar import WAITING, CompiledGrammar, StructuredOutput
from dsv3.server.apart import apart
from dsv3.server.errors import ApiError, deadline_passed
from dsv3.server.keys import Key, KeyRing
from dsv3.server.limits import Limits
from dsv3.server.metrics import Metrics
from dsv3.server.settings import Settings
from dsv3.server.vocabulary import Vocabulary
from dsv3.text import Message
from dsv3.text.chat import DEEPSEEK_TEMPLATE, variables_of

log = logging.getLogger("dsv3.server")

FORMS_OF_KEY = 8
"""Forms of answers that are prepared for one key at a time."""


@dataclass(slots=True)
class Exchange:
    """One request: what the access log will say about it."""

    id: str
    route: str
    method: str
    started: float = field(default_factory=monotonic)
    key: Key | None = None
    status: int = 0
    first_token: float | None = None
    """When there was something to show: the first token, or embeddings."""
    length: int = 0
    """Bytes of the body."""
    places: int = 1
    """Answers that count against what the key may have at once."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finish_reason: str | None = None
    prompt: Any = None
    """What was asked; None unless the settings want it logged."""

    @property
    def who(self) -> str:
        """The key, as a mark that is no secret; one for everybody where none is asked for.

        It parts limits and prefix caches: how fast an answer came tells nobody what others have asked. It is made of
        the key itself, so that a name given away anew does not inherit."""
        return "" if self.key is None else self.key.sha256


class Service:
    """One server: its settings, its engine once that is loaded, and the state it is in."""

    def __init__(self, engine: AsyncEngine | Callable[[], AsyncEngine], settings: Settings) -> None:
        """engine: one that has not been started, or what makes one, which may take minutes."""
        self.settings = settings
        self.keys = None if settings.api_keys is None else KeyRing(settings.api_keys)
        self.limits = Limits(settings.rate_limit, settings.max_concurrent)
        self.metrics = Metrics(self._stats)
        self.created = int(time.time())
        self.draining = False
        """No new requests are taken."""
        self.aborting = False
        """Requests under way are cut off."""
        self.failure: Exception | None = None
        """Why the engine could not be loaded."""
        self.tasks: set[asyncio.Task[Any]] = set()
        """Those that answer requests of the API."""
        self._compilers = ThreadPoolExecutor(WAITING, "dsv3-forms")
        """Threads that do nothing but wait for grammars, apart from those that work."""
        self._forms: Counter[str] = Counter()
        """Forms under way, by key."""
        self._source = engine
        self._engine: AsyncEngine | None = None

    # The engine's life -------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Make the engine, if that is still to be done, and start it."""
        try:
            source = self._source
            engine = await _on_thread(source) if callable(source) else source
            engine.start()
            self._engine = engine
        except Exception as error:
            self.failure = error

    async def close(self) -> None:
        self._compilers.shutdown(wait=False, cancel_futures=True)
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.close()

    def abort(self) -> None:
        """Cut off whatever is under way: its clients are told that we are shutting down."""
        self.aborting = True
        for task in self.tasks:
            task.cancel()

    @property
    def state(self) -> str:
        if self.draining:
            return "draining"
        return "loading" if self._engine is None else "ready"

    @property
    def engine(self) -> AsyncEngine:
        """Raises ApiError 503 while there is none, or no more."""
        if self._engine is None or self.draining:
            raise self.unavailable()
        return self._engine

    def unavailable(self) -> ApiError:
        what = "the server is shutting down" if self.draining else "the model is still loading"
        return ApiError(503, what, code=self.state, headers={"retry-after": "5"})

    def _stats(self) -> EngineStats | None:
        return None if self._engine is None else self._engine.stats()

    # The model ---------------------------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        return int(self.engine.llm.max_model_len)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        llm = self.engine.llm
        return Vocabulary(llm.tokenizer, llm.model.config.vocab_size)

    @cached_property
    def fingerprint(self) -> str:
        """Answers with the same seed may differ where this differs."""
        from dsv3 import __version__

        config = json.dumps(vars(self.engine.llm.model.config), sort_keys=True, default=str)
        return "dsv3-" + hashlib.sha256(f"{__version__} {config}".encode()).hexdigest()[:12]

    def served(self, model: str | None) -> str:
        """The name that an answer bears; raises ApiError 404 for a model that is not served."""
        names = self.settings.served_model_names
        if model is None:
            return names[0]
        if model not in names:
            raise ApiError(
                404,
                f"the model {model!r} is not served here: ask for {' or '.join(names)}",
                param="model",
                code="model_not_found",
            )
        return model

    def reserve(self, exchange: Exchange, answers: int) -> None:
        """Places for all answers to a request. Raises ApiError, or EngineBusy where they would have to wait behind too
        many."""
        engine = self.engine
        if engine.max_waiting is not None:
            most = engine.max_waiting + engine.llm.engine.scheduler.max_num_seqs
            stats = engine.stats()
            if answers > most:
                raise ApiError(
                    400,
                    f"this request asks for {answers:,} answers: {most:,} is the most",
                    code="invalid_value",
                )
            if stats.waiting + stats.running + answers > most:
                raise EngineBusy(f"{stats.waiting} answers are waited for already: try again later")
        self.limits.more(exchange.who, answers - 1)
        exchange.places = answers

    def seconds_left(self, exchange: Exchange) -> float:
        """Until a request's deadline; raises ApiError 504 where that has passed."""
        left = self.settings.request_timeout - (monotonic() - exchange.started)
        if left <= 0:
            raise deadline_passed(self.settings.request_timeout)
        return left

    async def compile(self, form: StructuredOutput, exchange: Exchange) -> CompiledGrammar:
        """The grammar of a form, made on a thread since that may take seconds. Raises UserError for a form that cannot
        be, ApiError where the key has too many under way or the request's deadline passes."""
        grammars = self.engine.llm.engine.grammars
        if (made := grammars.cached(form)) is not None:
            return made
        who = exchange.who
        if self._forms[who] >= FORMS_OF_KEY:
            raise ApiError(
                429,
                f"{FORMS_OF_KEY} forms of answers are being prepared for this key: wait for one",
                code="concurrency_limit_exceeded",
                headers={"retry-after": "1"},
            )
        left = self.seconds_left(exchange)
        work = asyncio.get_running_loop().run_in_executor(self._compilers, grammars.compile, form)
        self._forms[who] += 1

        def done(work: asyncio.Future[CompiledGrammar]) -> None:
            self._forms[who] -= 1
            if not work.cancelled():
                work.exception()  # nobody may be left to hear it

        work.add_done_callback(done)
        try:
            # What is under way counts for as long as it takes, whether or not somebody waits.
            return await asyncio.wait_for(asyncio.shield(work), left)
        except TimeoutError:
            raise deadline_passed(self.settings.request_timeout) from None

    async def encode(self, given: Sequence[str | list[int]], special: bool = True) -> list[list[int]]:
        """The ids of plain texts; what are ids already stays. special: whether BOS begins a text where the checkpoint
        wants one."""
        tokenizer = self.engine.llm.tokenizer
        add_bos = special and tokenizer.add_bos_token

        def work() -> list[list[int]]:
            return [tokenizer.encode(i, add_bos=add_bos) if isinstance(i, str) else i for i in given]

        return await apart(sum(len(item) for item in given if isinstance(item, str)), work)

    async def encode_chat(
        self,
        exchange: Exchange,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The ids of a conversation in the checkpoint's own form. Raises UserError where that has no place for it."""
        tokenizer = self.engine.llm.tokenizer
        known = variables_of(tokenizer.chat_template or DEEPSEEK_TEMPLATE) - _OURS
        if unknown := (variables or {}).keys() - known:
            name = min(unknown)
            raise ApiError(
                400,
                f"chat_template_kwargs.{name}: the chat template knows no such variable, but "
                f"{', '.join(sorted(known)) or 'none'}: leave it out",
                param=f"chat_template_kwargs.{name}",
                code="unknown_parameter",
            )
        encode = partial(
            tokenizer.encode_chat,
            cast(list[Message], messages),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **{"tools": tools or None, **(variables or {})},
        )
        return await apart(exchange.length, encode)


_OURS = {"add_generation_prompt", "messages", "tools", "bos_token", "eos_token", "pad_token", "unk_token"}
"""Variables of a template that requests do not set, or not so."""


async def _on_thread(work: Callable[[], AsyncEngine]) -> AsyncEngine:
    """What `asyncio.to_thread` does, on a thread that ends with the process: who stops a server that is still
    reading its model does not wait for that."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[AsyncEngine] = loop.create_future()

    def settle(error: Exception | None, engine: AsyncEngine | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        elif engine is not None:
            done.set_result(engine)

    def run() -> None:
        error, engine = None, None
        try:
            engine = work()
        except Exception as failure:
            error = failure
        with suppress(RuntimeError):  # the loop has been closed meanwhile
            loop.call_soon_threadsafe(settle, error, engine)

    threading.Thread(target=run, name="dsv3-load", daemon=True).start()
    return await done


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def exchange_of(request: Request) -> Exchange:
    exchange: Exchange = request.scope["dsv3"]
    return exchange
