"""Who runs in the next step, and on which blocks.

Every running sequence that is decoding gets its one token (and those that the MTP module guessed); what is left of
the token budget goes to prompts, first come, first served, but nobody's prompt takes more than half of it while
others wait. So a prompt of any length holds up neither those who are already reading, for longer than one step,
nor for long those who ask something short.

Blocks are handed out as sequences grow. When there are none left, the youngest running sequence gives up its own and
waits again, in front of the others: its latents are computed anew later (most of them are still in the cache if there
was little else to do), which costs time and changes nothing. The oldest always has room, for the cache holds at least
one sequence at its longest.

A sequence whose beginning another one is reading just now waits for it, to share what comes of it.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from dsv3.engine.cache import BlockManager
from dsv3.engine.sequence import Sequence
from dsv3.kernels.inference import BLOCK
from dsv3.model import Piece


class Work(NamedTuple):
    """One sequence's share of a step."""

    sequence: Sequence
    new: int
    """How many tokens the model takes, drafts included."""
    drafts: int
    """How many of them are guesses."""
    start: int
    """How many were in the cache before."""
    completes: bool
    """Whether all tokens there are have been through the model after this, so that the next can be chosen."""

    @classmethod
    def of(cls, sequence: Sequence, new: int, drafts: int = 0) -> Work:
        return cls(sequence, new + drafts, drafts, sequence.computed, new == sequence.pending)

    @property
    def piece(self) -> Piece:
        return Piece(self.sequence.blocks, self.start, self.new)

    @property
    def token_ids(self) -> list[int]:
        known = self.sequence.tokens[self.start : self.start + self.new - self.drafts]
        return known + self.sequence.drafts[: self.drafts]


@dataclass
class Counts:
    """What has been going on since the start."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of prompts that were found in the cache."""
    preemptions: int = 0


class Scheduler:
    """Waiting and running sequences, and the blocks they hold."""

    def __init__(
        self,
        manager: BlockManager,
        max_num_seqs: int,
        max_batched_tokens: int,
        *,
        lookahead: int = 0,
        prefix_caching: bool = True,
        fixed_pieces: bool = False,
    ) -> None:
        """lookahead: how many tokens beyond its own a sequence may write latents for, when drafts are made;
        fixed_pieces: cut what is read in a way that depends on the sequence alone, and remember only prompts, so that
        latents of a token always come from the same computation."""
        self.manager = manager
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max(max_batched_tokens, max_num_seqs)
        self.lookahead = lookahead
        self.prefix_caching = prefix_caching
        self.fixed_pieces = fixed_pieces
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In the order of arrival."""
        self.wants_drafts = False
        """Whether a beginning that the MTP module has not been through is better read again."""
        self.counts = Counts()
        self._arrived = 0

    @property
    def unfinished(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        self._arrived += 1
        sequence.number = self._arrived
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> bool:
        """Forget a sequence, wherever it is, and free its blocks. Returns whether it was here."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            return False
        self._release(sequence)
        return True

    def expired(self) -> list[Sequence]:
        """Those whose deadline has passed."""
        now = time.monotonic()
        everyone = (*self.running, *self.waiting)
        return [s for s in everyone if s.deadline is not None and s.deadline <= now]

    def schedule(self) -> list[Work]:
        """The next step's work, with blocks for all of it."""
        work: dict[int, Work] = {}
        budget = self.max_batched_tokens
        decoding = [sequence for sequence in self.running if sequence.pending == 1]
        reading = [sequence for sequence in self.running if sequence.pending > 1]
        places = self.max_num_seqs - len(self.running)
        hungry = len(reading) + min(places, sum(s.waits_for is None for s in self.waiting))
        spare = budget - len(decoding)
        if hungry:  # guesses must not take what prompts need
            spare //= 2
        for sequence in decoding:
            drafts = max(0, min(len(sequence.drafts), spare, sequence.limit - len(sequence.tokens) - 1))
            if sequence.blocks and self._make_room(sequence, 1 + drafts, work):
                work[sequence.number] = Work.of(sequence, 1, drafts)
                spare -= drafts
                budget -= 1 + drafts
        for sequence in reading:
            new = self._share(sequence, budget, hungry)
            if new and sequence.blocks and self._make_room(sequence, new, work):
                work[sequence.number] = Work.of(sequence, new)
                budget -= min(new, budget)
            hungry -= 1
        coming = self._coming()
        for sequence in list(self.waiting):
            if not budget or len(self.running) >= self.max_num_seqs:
                break
            if sequence.waits_for in coming:
                continue
            found = self._find_prefix(sequence)
            sequence.waits_for = self._next_name(sequence, len(found))
            if sequence.waits_for in coming:
                continue
            sequence.waits_for = None
            if not self._has_room(sequence, found):
                break
            self._start(sequence, found)
            new = self._share(sequence, budget, hungry)
            made = self._make_room(sequence, new, work)
            assert made, "a sequence starts only where it has room"
            work[sequence.number] = Work.of(sequence, new)
            budget -= min(new, budget)
            hungry -= 1
            coming |= self._names_to_come(sequence)
        return list(work.values())

    def book(self, sequence: Sequence, computed: int) -> None:
        """So many of its tokens have their latents in the cache now. Full blocks get their names."""
        full, sequence.computed = sequence.computed // BLOCK, computed
        for i in range(full, computed // BLOCK):
            self.manager.drafted[sequence.blocks[i]] = sequence.drafting
            of_prompt = (i + 1) * BLOCK <= len(sequence.prompt_ids)
            if self.prefix_caching and (of_prompt or not self.fixed_pieces):
                self.manager.name(sequence.blocks[i], sequence.name(i))

    # Blocks ---------------------------------------------------------------------------------------------

    def _make_room(self, sequence: Sequence, new: int, work: dict[int, Work]) -> bool:
        """Blocks for so many more tokens; whether there are enough, when all younger ones have given theirs."""
        longest = min(sequence.computed + new + self.lookahead, sequence.limit + self.lookahead)
        missing = -(-longest // BLOCK) - len(sequence.blocks)
        while missing > self.manager.free:
            youngest = self.running[-1]
            work.pop(youngest.number, None)
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.blocks += [self.manager.take() for _ in range(missing)]
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.pooled = None
        self.waiting.appendleft(sequence)
        self.counts.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.manager.release(sequence.blocks)
        sequence.blocks, sequence.computed, sequence.drafts = [], 0, []

    def _has_room(self, sequence: Sequence, found: list[int]) -> bool:
        """Whether it may start: alone always, else if its prompt fits and everybody could take another block."""
        if not self.running:
            return True
        missing = self._blocks_to_read(sequence) - len(found)
        unused = sum(self.manager.is_free(block) for block in found)
        owed = sum(max(1, self._blocks_to_read(s) - len(s.blocks)) for s in self.running)
        return missing + unused + owed <= self.manager.free

    def _blocks_to_read(self, sequence: Sequence) -> int:
        """All that it takes until its next token."""
        return -(-(len(sequence.tokens) + self.lookahead) // BLOCK)

    def _start(self, sequence: Sequence, found: list[int]) -> None:
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=lambda s: s.number)
        for block in found:
            self.manager.share(block)
        sequence.blocks = list(found)
        sequence.computed = len(found) * BLOCK
        sequence.drafting = all(self.manager.drafted[block] for block in found)
        if not sequence.counted:  # else it was thrown out, and comes back
            sequence.counted = True
            sequence.cached_tokens = sequence.computed
            self.counts.prompt_tokens += len(sequence.prompt_ids)
            self.counts.cached_tokens += sequence.computed

    # Prefixes -------------------------------------------------------------------------------------------

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks that hold its beginning, all but the last token at most, which the model must see."""
        found: list[int] = []
        if not self.prefix_caching or sequence.needs_all:
            return found
        most = len(sequence.tokens) - 1
        if self.fixed_pieces:  # what it said itself was computed token by token, not as a prompt of somebody
            most = min(most, len(sequence.prompt_ids))
        for i in range(most // BLOCK):
            block = self.manager.find(sequence.name(i))
            if block is None or (self.wants_drafts and not self.manager.drafted[block]):
                break
            found.append(block)
        return found

    def _next_name(self, sequence: Sequence, found: int) -> bytes | None:
        """The name of the first block of its beginning that is not in the cache."""
        shareable = self.prefix_caching and not sequence.needs_all
        return sequence.name(found) if shareable and (found + 1) * BLOCK < len(sequence.tokens) else None

    def _coming(self) -> set[bytes]:
        """Names of the blocks that running sequences are about to fill with their prompts."""
        if not self.waiting or not self.prefix_caching:
            return set()
        return set().union(*(self._names_to_come(s) for s in self.running if s.pending > 1))

    def _names_to_come(self, sequence: Sequence) -> set[bytes]:
        blocks = range(sequence.computed // BLOCK, len(sequence.tokens) // BLOCK)
        return {sequence.name(i) for i in blocks}

    def _share(self, sequence: Sequence, budget: int, hungry: int) -> int:
        """Tokens of a prompt in this step, where `hungry` sequences, it included, have something to read."""
        if self.fixed_pieces and budget:
            unread = len(sequence.prompt_ids) - sequence.computed
            return min(unread, BLOCK) if unread > 0 else 1
        return min(sequence.pending, budget if hungry <= 1 else -(-budget // 2))
