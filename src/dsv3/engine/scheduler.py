"""Who runs in the next step.

Every running sequence that is decoding gets its one token; what is left of the token budget goes to prompts,
first come, first served. A long prompt is cut into chunks, so that it never holds up those who are already
reading for longer than one step of `max_batched_tokens`.

A sequence's place among the running is its row in the cache. Those that decode come first, so that the model
reads their rows as one view; half-done prompts follow (in order, so there is at most one, unless a step
failed). When a sequence leaves, the last decoding row moves into the gap and the last row into that one's.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import takewhile

from dsv3.engine.cache import LatentCache
from dsv3.engine.sampling import Sampled
from dsv3.engine.sequence import Sequence


@dataclass(frozen=True)
class Schedule:
    """The work of one step, in the order of the cache's rows."""

    decoding: list[Sequence]
    """One token each."""
    prefill: list[tuple[Sequence, int]]
    """Sequences in the middle of their prompts, and how many tokens of each to take."""

    @property
    def longest(self) -> int:
        """Tokens that the longest of them has in the cache once the step is done."""
        after = [len(sequence.tokens) for sequence in self.decoding]
        after += [sequence.computed + new for sequence, new in self.prefill]
        return max(after, default=0)


class Scheduler:
    """Waiting and running sequences.

    A sequence starts only when the cache would hold all running ones at their longest, so that none ever has
    to be thrown out again; alone, it always starts.
    """

    def __init__(self, cache: LatentCache, max_batched_tokens: int, max_cached_tokens: int) -> None:
        """max_cached_tokens: what fits in memory, in rows times tokens per row."""
        self.cache = cache
        self.max_batched_tokens = max(max_batched_tokens, cache.max_rows)
        self.max_cached_tokens = max_cached_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def unfinished(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> Schedule:
        """Choose the next step's work and make room for it in the cache."""
        decoding = list(takewhile(_is_decoding, self.running))
        budget = self.max_batched_tokens - len(decoding)
        prefill: list[tuple[Sequence, int]] = []
        for sequence in self.running[len(decoding) :]:
            prefill.append((sequence, min(budget, sequence.pending)))
            budget -= prefill[-1][1]
        while budget > 0 and self.waiting and self._has_room_for(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            prefill.append((sequence, min(budget, sequence.pending)))
            budget -= prefill[-1][1]
        schedule = Schedule(decoding, [(sequence, new) for sequence, new in prefill if new])
        self.cache.reserve(len(self.running), schedule.longest)
        return schedule

    def postprocess(self, schedule: Schedule, ready: list[Sequence], sampled: list[Sampled]) -> None:
        """Book what a step has done: what is in the cache now, the new tokens, and who has finished."""
        for sequence in schedule.decoding:
            sequence.computed += 1
        for sequence, new in schedule.prefill:
            sequence.computed += new
        for sequence, token in zip(ready, sampled, strict=True):
            sequence.append(token)
        for sequence in ready:
            if sequence.finished:
                self.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; if it is unknown, do nothing."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence not in self.running:
            return
        running, gap = self.running, self.running.index(sequence)
        last_decoding = sum(1 for _ in takewhile(_is_decoding, running)) - 1
        for row in (last_decoding, len(running) - 1):
            if gap < row:
                self.cache.move(row, gap, running[row].computed)
                running[gap], gap = running[row], row
        running.pop()

    def _has_room_for(self, sequence: Sequence) -> bool:
        rows = len(self.running) + 1
        if rows > self.cache.max_rows:
            return False
        longest = max([sequence.limit, *(running.limit for running in self.running)])
        return rows == 1 or rows * longest <= self.max_cached_tokens


def _is_decoding(sequence: Sequence) -> bool:
    return sequence.pending == 1
