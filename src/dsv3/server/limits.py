"""How much one key may ask: requests a minute, and answers at once.

Requests a minute are a token bucket: it holds a minute's worth, each request takes one out, and it fills evenly. So
somebody who was silent may ask a burst, and in the long run nobody exceeds the rate. Where no keys are asked for,
everybody shares one bucket.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from dsv3.server.errors import ApiError

RATE_HEADERS = tuple(f"x-ratelimit-{what}-requests" for what in ("limit", "remaining", "reset"))


@dataclass
class _Use:
    """What one key has used."""

    tokens: float
    at: float
    """When `tokens` was true."""
    running: int = 0


class Limits:
    def __init__(
        self, per_minute: int | None, at_once: int | None, clock: Callable[[], float] = monotonic
    ) -> None:
        """clock: seconds that only grow."""
        self._per_minute, self._at_once, self._clock = per_minute, at_once, clock
        self._uses: dict[str, _Use] = {}

    def enter(self, who: str) -> dict[str, str]:
        """Let a request in, until `leave`. Returns headers that say what is left; raises ApiError 429."""
        if self._per_minute is None and self._at_once is None:
            return {}
        use = self._uses.get(who)
        if use is None:
            use = self._uses[who] = _Use(float(self._per_minute or 0), self._clock())
        headers = {}
        if self._at_once is not None and use.running >= self._at_once:
            raise self._full(use)
        if self._per_minute is not None:
            headers = self._take(use, self._per_minute)
        use.running += 1
        return headers

    def more(self, who: str, places: int) -> None:
        """A request that was let in makes several answers: places for those beyond the first. Raises ApiError."""
        if self._at_once is None or not places:
            return
        if places + 1 > self._at_once:
            raise ApiError(
                400,
                f"this request asks for {places + 1} answers, and no more than {self._at_once} may be under way for a key",
                code="invalid_value",
            )
        use = self._uses[who]
        if use.running + places > self._at_once:
            raise self._full(use)
        use.running += places

    def leave(self, who: str, places: int = 1) -> None:
        if use := self._uses.get(who):
            use.running = max(0, use.running - places)

    def _full(self, use: _Use) -> ApiError:
        return ApiError(
            429,
            f"{use.running} answers for this key are under way, and no more than {self._at_once} may be: "
            "wait for one to finish",
            code="concurrency_limit_exceeded",
            headers={"retry-after": "1"},
        )

    def _take(self, use: _Use, per_minute: int) -> dict[str, str]:
        now, per_second = self._clock(), per_minute / 60
        use.tokens, use.at = min(per_minute, use.tokens + (now - use.at) * per_second), now
        allowed = use.tokens >= 1
        use.tokens -= allowed
        full = f"{(per_minute - use.tokens) / per_second:.3f}s"
        headers = dict(zip(RATE_HEADERS, (str(per_minute), str(int(use.tokens)), full), strict=True))
        if not allowed:
            seconds = math.ceil((1 - use.tokens) / per_second)
            raise ApiError(
                429,
                f"this key has used its {per_minute:,} requests a minute: ask again in {seconds} s",
                code="rate_limit_exceeded",
                headers={**headers, "retry-after": str(seconds)},
            )
        return headers
