"""Multi-token prediction as speculative decoding (report, sections 2.2 and 5.4.3).

The MTP module guesses the token after next from what the main model has at hand anyway. In the next step the main model
takes guess and token together: where the guess was right, one step gave two tokens. More guesses come from
feeding the module its own output.

The guess is the module's likeliest token, and it counts as right when it equals what the request would have drawn at
that place: same logits, same random number. That is rejection sampling with all of the proposal on one token: the
guess x is kept with probability p(x), and what comes instead is distributed as p without x. So answers are
not only distributed as without speculation but the same, token for token, for the same seed.

Whether it pays depends on the machine and the load: the second token of a sequence costs next to nothing where weights
are what is read, and as much as the first where products are what takes the time. `Pace` finds out by the clock, for
each size of batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TRIAL = 8
"""Steps of each kind before a choice is made; the first quarter warms up and is not counted."""
AGAIN = 512
"""Steps after which the way not taken is tried once more."""


@dataclass
class _Timing:
    """Steps of one kind at one size of batch."""

    steps: int = 0
    seconds: float = 0.0
    tokens: float = 0.0

    def add(self, seconds: float, tokens: float) -> None:
        self.steps += 1
        if self.steps <= TRIAL // 4:
            return
        keep = 0.9 if self.seconds else 0.0
        self.seconds = keep * self.seconds + seconds
        self.tokens = keep * self.tokens + tokens

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class _Size:
    plain: _Timing = field(default_factory=_Timing)
    drafted: _Timing = field(default_factory=_Timing)
    since: int = 0
    """Steps since both were tried."""


class Pace:
    """Whether to speculate, for each size of batch (in powers of two), by what was measured.

    Where it does not pay the module is not run at all. A sequence that has once run without it cannot guess any more, for
    the module lacks its past; the next ones can.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}

    def speculates(self, batch: int) -> bool:
        """Whether the next step of so many decoding sequences should use guesses."""
        size = self._size(batch)
        if size.drafted.steps < TRIAL:
            return True
        if size.plain.steps < TRIAL:
            return False
        return size.drafted.rate > size.plain.rate

    def settled_against(self, batch: int) -> bool:
        """Whether guesses were tried at this size and did not pay, so that it is not worth making any."""
        size = self._size(batch)
        return min(size.drafted.steps, size.plain.steps) >= TRIAL and not self.speculates(batch)

    def record(self, batch: int, drafted: bool, seconds: float, tokens: int) -> None:
        """A step of decoding alone: how long it took and how many tokens it gave. With guesses, their making counts."""
        size = self._size(batch)
        (size.drafted if drafted else size.plain).add(seconds, tokens)
        size.since += 1
        if size.since >= AGAIN:
            size.since = 0
            other = size.plain if self.speculates(batch) else size.drafted
            other.steps = TRIAL // 4  # tried anew, its old rate fading

    def _size(self, batch: int) -> _Size:
        return self._sizes.setdefault(batch.bit_length(), _Size())
