"""More model than memory: routed experts stay on disk, and those that are used most are kept in memory.

Of DeepSeek-V3's 671 billion weights 653 billion are routed experts, and a token goes through 3% of them. Everything
else every token needs, so it stays in memory; what remains of a budget (`dsv3.engine.budget`) is cut into *slots*, each
of which holds one expert as it lies in the file. An expert that has no slot is read when a layer has chosen it, or a little earlier: while
a layer computes, the next one's gate is asked what it is going to want (`dsv3.model.stored`), and that is read meanwhile.

Which expert has to make room? The least used one, a use counting half as much with every HALF_LIFE steps. To take the one
unused for longest would be wrong: layers come in turn, so what was used longest ago is wanted next, and a cache that
is smaller than what one token touches would never have anything that is asked for. (In nano with slots for half of that,
15% of what was asked for was there this way, and nothing the other way; with slots for half of all experts 58% and 55%.)

Experts that fit no slot at once (those of a long prompt) come in waves, the next one being read while one computes.
Results are the same bits as with everything in memory, where the kernels are native.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

from dsv3.checkpoint.experts import ExpertFiles, Key
from dsv3.checkpoint.shards import ALIGNED
from dsv3.errors import size
from dsv3.model.stored import Expert

HALF_LIFE = 64
"""Steps. Between 16 and 128 it makes no difference to nano."""
READERS = 4
"""Reads under way at once. A drive with queues is quicker with several; the system copies, which takes cores."""
WAVE = 32
"""Experts to a wave, where there are slots for twice as many: enough work for all cores."""


@dataclass
class Reads:
    """What has become of the experts that layers asked for, one count for each expert, layer and step."""

    cached: int = 0
    """In a slot from before."""
    foretold: int = 0
    """Read, or being read, because the layer before said so."""
    missed: int = 0
    """Read when the layer asked."""
    wasted: int = 0
    """Read ahead, and then not asked for."""
    nbytes: int = 0
    """Read from files."""
    waited: float = 0.0
    """Seconds in which nothing was done but wait for reads."""

    @property
    def wanted(self) -> int:
        return self.cached + self.foretold + self.missed

    @property
    def hit_rate(self) -> float:
        """The part of the experts that nobody had to wait for from the beginning."""
        return (self.cached + self.foretold) / self.wanted if self.wanted else 0.0

    def __str__(self) -> str:
        if not self.wanted:
            return "no experts asked for"
        cached, foretold, missed = (n / self.wanted for n in (self.cached, self.foretold, self.missed))
        return (
            f"experts: {cached:.0%} in memory, {foretold:.0%} read ahead, {missed:.0%} missing; {size(self.nbytes)} read, "
            f"{self.waited:.1f} s waited"
        )


class ExpertCache:
    """Slots, who is in them, and who comes next: a `Store` (`dsv3.model.stored`).

    All but the reading itself happens on the thread that asks. An expert's slot is its own while it is being read and
    while a layer computes with it.
    """

    def __init__(self, files: ExpertFiles, slots: int) -> None:
        self.device = torch.device("cpu")
        self.slots = min(slots, len(files))
        self.reads = Reads()
        self._files = files
        # The system gives memory page by page as it is written to; numpy asks it for large pages.
        memory = torch.from_numpy(np.empty(self.slots * files.slot_bytes + ALIGNED, dtype=np.uint8))
        start = -memory.data_ptr() % ALIGNED
        self._memory = memory[start : start + self.slots * files.slot_bytes].view(self.slots, -1)
        self._free = list(range(self.slots))
        self._slot: dict[Key, int] = {}
        self._laid: dict[tuple[int, int], Expert] = {}
        """Experts by their layer's form and the slot, made once."""
        self._under_way: dict[Key, Future[int]] = {}
        self._foretold: set[Key] = set()
        """Foretold, and their layer has not asked yet."""
        self._in_use: set[Key] = set()
        self._heat: dict[Key, float] = {}
        """The logarithm of how often an expert was used, old uses counting less; what is not here was never used."""
        self._visits = 0
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="dsv3-experts")

    def like(self, layer: int) -> Expert:
        return self._expert((layer, 0), slot=0)

    def waves(self, layer: int, experts: Sequence[int]) -> Generator[dict[int, Expert], None, None]:
        """As `Store` has it. Raises CheckpointError or OSError if one cannot be read."""
        keys = [(layer, e) for e in experts]
        self._forget_guesses(layer, keys)
        self._count(keys)
        fit = len(keys) <= min(self.slots, WAVE)
        step = len(keys) if fit else max(1, min(WAVE, self.slots // 2))
        waves = [keys[i : i + step] for i in range(0, len(keys), step or 1)] or [[]]
        try:
            self._ask(waves[0])
            for wave, after in zip(waves, [*waves[1:], []], strict=True):
                self._ask(wave)
                if self.slots > 1:
                    self._ask(after)
                began = perf_counter()
                for key in wave:
                    self._arrive(key)
                self.reads.waited += perf_counter() - began
                yield {key[1]: self._expert(key) for key in wave}
                self._in_use.difference_update(wave)
        finally:
            self._in_use.clear()

    def foretell(self, layer: int, experts: Sequence[int]) -> None:
        for key in [(layer, e) for e in experts[:WAVE]]:
            if key not in self._slot:
                if not self._make_room(for_guess=True):
                    return
                self._foretold.add(key)
                self._read(key)

    # Slots ----------------------------------------------------------------------------------------------

    def _expert(self, key: Key, slot: int | None = None) -> Expert:
        where = self._files.form[key[0]], self._slot[key] if slot is None else slot
        if where not in self._laid:
            self._laid[where] = self._files.lay(key[0], self._memory[where[1]])
        return self._laid[where]

    def _ask(self, wave: list[Key]) -> None:
        """See to it that all of a wave are in slots, or on their way there, and stay."""
        self._in_use.update(wave)
        for key in wave:
            if key not in self._slot:
                while not self._make_room():  # what is not in use is being read: one will be through
                    guesses = [future for k, future in self._under_way.items() if k not in self._in_use]
                    wait(guesses, return_when=FIRST_COMPLETED)
                self._read(key)

    def _make_room(self, for_guess: bool = False) -> bool:
        """Whether there is a free slot now; the coldest of the experts that nobody needs now makes room."""
        self._land()
        if self._free:
            return True
        busy = self._in_use | self._under_way.keys()
        idle = [key for key in self._slot if key not in busy and key not in self._foretold]
        if not idle and not for_guess:
            idle = [key for key in self._slot if key not in busy]
        if not idle:
            return False
        self._leave(min(idle, key=lambda key: self._heat.get(key, -math.inf)))
        return True

    def _leave(self, key: Key) -> None:
        self._free.append(self._slot.pop(key))
        self._foretold.discard(key)

    def _read(self, key: Key) -> None:
        self._slot[key] = self._free.pop()
        self._under_way[key] = self._pool.submit(self._files.read, key, self._expert(key))

    def _arrive(self, key: Key) -> None:
        """Wait until a read is through, and raise what went wrong with it."""
        future = self._under_way.get(key)
        if future is None:
            return
        error = future.exception()  # an interruption leaves all as it is: the read goes on
        del self._under_way[key]
        if error is not None:
            self._leave(key)
            raise error
        self.reads.nbytes += future.result()

    def _land(self) -> None:
        """Take note of reads that are through. What a guess failed at is told to who asks for it."""
        for key in [
            key for key, future in self._under_way.items() if future.done() and key not in self._in_use
        ]:
            future = self._under_way.pop(key)
            if future.exception() is None:
                self.reads.nbytes += future.result()
            else:
                self._leave(key)

    # Guesses and heat -----------------------------------------------------------------------------------

    def _forget_guesses(self, layer: int, wanted: list[Key]) -> None:
        """Its layer's turn has come: what was foretold in vain is not read if there is still time."""
        for key in self._foretold.difference(wanted):
            if key[0] != layer:
                continue
            self._foretold.discard(key)
            future = self._under_way.get(key)
            if future is not None and future.cancel():
                del self._under_way[key]
                self._leave(key)
            else:
                self.reads.wasted += 1

    def _count(self, keys: list[Key]) -> None:
        self._land()
        self._visits += 1
        now = self._visits / (HALF_LIFE * self._files.layers)
        for key in keys:
            if key in self._foretold:
                self._foretold.discard(key)
                self.reads.foretold += 1
            elif key in self._slot:
                self.reads.cached += 1
            else:
                self.reads.missed += 1
            before = self._heat.get(key, -math.inf)
            low, high = sorted((before, now))
            self._heat[key] = high + math.log2(1 + 2 ** (low - high))
