"""An engine for many people at once: it runs on a thread of its own, and asyncio tasks talk to it.

The thread takes whatever requests and cancellations have come in, makes one step, and hands all that is new to the event
loop in one call; there it is laid into each request's `_Mailbox`. A reader that is slower than the model finds
several tokens in one update and holds nobody up. A request is cancelled by closing its generator, which is what
happens when the task that reads it is cancelled; its blocks are free before the next step.

Most of a step is spent in kernels that leave Python's lock, so that the loop writes what the last step gave while the
next one runs. It is one process: who has several GPUs runs several servers.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from dsv3.engine.grammar import CompiledGrammar
from dsv3.engine.llm import LLM
from dsv3.engine.offload import Reads
from dsv3.engine.sampling import SamplingParams, TokenLogprobs
from dsv3.engine.sequence import FinishReason, Sequence, TextDecoder
from dsv3.errors import UserError

SWITCH_INTERVAL = 0.0005
"""Seconds after which a thread that wants Python's lock gets it. The engine gives it up and takes it back hundreds of
times a step; with Python's own 5 ms each time could cost as long as the step."""

_SHUT_DOWN = "the engine was shut down"

logger = logging.getLogger(__name__)


class EngineBusy(UserError):
    """Too many requests are waiting already: try again later."""


class EngineError(UserError):
    """The engine failed while it worked on this request."""


@dataclass(frozen=True)
class Update:
    """What is new of one answer since the last update."""

    index: int
    """Which of the request's n answers."""
    text: str
    """Whole characters."""
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    """One for each of token_ids, where asked for."""
    finish_reason: FinishReason | None
    """Not None in the last update of an answer."""
    stop_reason: int | str | None
    """The request's own stop token or text that ended it."""
    prompt_logprobs: list[TokenLogprobs | None] | None
    """In an answer's first update, where asked for; nothing is known of the first token."""
    cached_tokens: int
    """How many tokens of the prompt were found in the cache."""


@dataclass(frozen=True)
class EngineStats:
    """How things stand, and what was done since the start."""

    waiting: int
    running: int
    blocks_total: int
    blocks_used: int
    """By running sequences; what is only remembered is not counted."""
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    """Tokens of prompts that did not have to be read."""
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int
    steps: int
    speculating: bool
    finished: dict[str, int]
    """Answers by what ended them, "abort" included."""
    experts: Reads | None = None
    """What was read of experts that are on disk; None where all are in memory."""


@dataclass(eq=False)
class _Mailbox:
    """Between the engine's thread and one reader. All but `sequences` is touched in the event loop alone."""

    sequences: list[Sequence]
    updates: dict[int, Update] = field(default_factory=dict)
    """By the answer they are of: who reads slowly finds one of each."""
    error: EngineError | None = None
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, update: Update) -> None:
        earlier = self.updates.get(update.index)
        self.updates[update.index] = update if earlier is None else _merged(earlier, update)
        self.arrived.set()

    def fail(self, error: EngineError) -> None:
        self.error = error
        self.arrived.set()


def _merged(first: Update, second: Update) -> Update:
    return replace(
        second,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=None if second.logprobs is None else (first.logprobs or []) + second.logprobs,
        prompt_logprobs=first.prompt_logprobs,
    )


@dataclass
class _Shown:
    """How much of a sequence has been handed out."""

    mailbox: _Mailbox
    index: int
    characters: int = 0
    tokens: int = 0


class AsyncEngine:
    """Runs an `LLM`'s engine on a thread of its own and hands what it makes to asyncio."""

    def __init__(self, llm: LLM, *, max_waiting: int | None = None) -> None:
        """max_waiting: answers that may wait for a place before further requests are refused; None: any number."""
        self.llm = llm
        self.max_waiting = max_waiting
        self._engine = llm.engine
        self._orders: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._closing = self._ended = False
        self._shown: dict[Sequence, _Shown] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    # Asyncio's side -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread. Call it where the event loop runs that will read."""
        self._loop = asyncio.get_running_loop()
        sys.setswitchinterval(SWITCH_INTERVAL)
        self._thread = threading.Thread(target=self._run, name="dsv3-engine", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Abort everything and end the thread."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def generate(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        decoder: Callable[[], TextDecoder] | None = None,
        deadline: float | None = None,
        cache_salt: str = "",
        grammar: CompiledGrammar | None = None,
    ) -> AsyncGenerator[Update, None]:
        """Answer a prompt; updates come as the answer (or each of n) grows, until all have a finish_reason.

        decoder: makes what turns ids into text, the tokenizer's by default; deadline: seconds from now; cache_salt: only
        requests with the same one share what the cache holds; grammar: params.structured, compiled (else it is compiled
        here, which may take seconds). What is wrong with the request is raised here: UserError,
        or EngineBusy; EngineError comes while reading. Closing the generator frees the request's blocks within a step.
        """
        return self._follow(
            self._accept(
                prompt_ids, params, decoder=decoder, deadline=deadline, salt=cache_salt, grammar=grammar
            )
        )

    async def embed(self, prompt_ids: list[int], *, deadline: float | None = None) -> list[float]:
        """The mean over the prompt's tokens of the final, normed hidden states, [hidden]."""
        mailbox = self._accept(prompt_ids, SamplingParams(max_tokens=0), deadline=deadline, pools=True)
        async for update in self._follow(mailbox):
            if update.finish_reason == "deadline":
                raise EngineError("the deadline passed before the prompt was read")
        pooled = mailbox.sequences[0].pooled
        assert pooled is not None
        mean: list[float] = (pooled / len(prompt_ids)).tolist()
        return mean

    def stats(self) -> EngineStats:
        """How things stand; cheap, and good from any thread."""
        engine, scheduler = self._engine, self._engine.scheduler
        running = len(scheduler.running)
        return EngineStats(
            waiting=len(scheduler.waiting) + len(self._orders),
            running=running,
            blocks_total=engine.manager.total,
            blocks_used=engine.manager.used,
            prompt_tokens=scheduler.counts.prompt_tokens,
            generated_tokens=engine.generated_tokens,
            cached_tokens=scheduler.counts.cached_tokens,
            preemptions=scheduler.counts.preemptions,
            drafted_tokens=engine.drafted_tokens,
            accepted_tokens=engine.accepted_tokens,
            steps=engine.steps,
            speculating=engine.drafts > 0
            and (engine.pace is None or engine.pace.speculates(max(running, 1))),
            finished=dict(engine.finished),
            experts=None if self.llm.experts is None else replace(self.llm.experts.reads),
        )

    def _accept(self, prompt_ids: list[int], params: SamplingParams, **kwargs: Any) -> _Mailbox:
        if self._thread is None or self._closing:
            raise EngineBusy("the engine is not running")
        if self.max_waiting is not None and self.stats().waiting >= self.max_waiting:
            raise EngineBusy(f"{self.max_waiting} answers are waited for already: try again later")
        return _Mailbox(self._engine.sequences(prompt_ids, params, **kwargs))

    async def _follow(self, mailbox: _Mailbox) -> AsyncGenerator[Update, None]:
        left = len(mailbox.sequences)
        self._order(lambda: self._add(mailbox))  # here, so that a generator which nobody starts costs nothing
        if self._ended:
            raise EngineError(_SHUT_DOWN)
        try:
            while left:
                await mailbox.arrived.wait()
                mailbox.arrived.clear()
                while mailbox.updates:
                    update = mailbox.updates.pop(next(iter(mailbox.updates)))
                    left -= update.finish_reason is not None
                    yield update
                if mailbox.error is not None:
                    raise mailbox.error
        finally:
            if left:
                self._order(lambda: self._drop(mailbox))

    def _order(self, order: Callable[[], None]) -> None:
        self._orders.append(order)
        self._wake.set()

    # The thread's side ----------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            try:
                while self._orders:
                    self._orders.popleft()()
                if self._engine.unfinished:
                    self._hand_out(self._engine.step())
                else:
                    self._wake.wait()
                    self._wake.clear()
            except Exception as error:  # whatever it is: those who wait hear of it, and the thread stays up
                logger.exception("a step of the engine failed; %d requests end with it", len(self._shown))
                self._fail(f"the engine failed: {error or type(error).__name__}")
        self._ended = True  # from here on nobody gives orders
        while self._orders:
            self._orders.popleft()()
        self._fail(_SHUT_DOWN)

    def _add(self, mailbox: _Mailbox) -> None:
        for index, sequence in enumerate(mailbox.sequences):
            self._shown[sequence] = _Shown(mailbox, index)
            self._engine.add(sequence)

    def _drop(self, mailbox: _Mailbox) -> None:
        for sequence in mailbox.sequences:
            if self._shown.pop(sequence, None) is not None:
                self._engine.abort(sequence)

    def _hand_out(self, sequences: list[Sequence]) -> None:
        news: list[tuple[_Mailbox, Update]] = []
        for sequence in sequences:
            shown = self._shown.get(sequence)
            if shown is None:
                continue
            text, tokens, params = sequence.output.text, sequence.tokens, sequence.params
            first, start = shown.tokens == 0, len(sequence.prompt_ids) + shown.tokens
            update = Update(
                index=shown.index,
                text=text[shown.characters :],
                token_ids=tokens[start:],
                logprobs=None if params.logprobs is None else sequence.logprobs[shown.tokens :],
                finish_reason=sequence.finish_reason,
                stop_reason=sequence.stop_reason,
                prompt_logprobs=list(sequence.prompt_logprobs)
                if first and params.prompt_logprobs is not None
                else None,
                cached_tokens=sequence.cached_tokens,
            )
            shown.characters, shown.tokens = len(text), len(tokens) - len(sequence.prompt_ids)
            if sequence.finished:
                del self._shown[sequence]
            news.append((shown.mailbox, update))

        def deliver() -> None:
            for mailbox, update in news:
                mailbox.put(update)

        if news:
            self._tell(deliver)

    def _fail(self, message: str) -> None:
        mailboxes = {id(shown.mailbox): shown.mailbox for shown in self._shown.values()}
        for sequence in self._shown:
            self._engine.abort(sequence)
        self._shown.clear()

        def deliver() -> None:
            for mailbox in mailboxes.values():
                mailbox.fail(EngineError(message))

        self._tell(deliver)

    def _tell(self, news: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(news)
        except RuntimeError:  # the loop is closed, and nobody reads any more
            self._closing = True
