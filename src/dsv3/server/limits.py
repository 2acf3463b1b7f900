"""How much one key may ask: requests a minute, and requests at once.

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
            raise ApiError(
                429,
                f"{use.running} requests of this key are under way, and no more than {self._at_once} may be: "
                "wait for one to finish",
                code="concurrency_limit_exceeded",
                headers={"retry-after": "1"},
            )
        if self._per_minute is not None:
            headers = self._take(use, self._per_minute)
        use.running += 1
        return headers

    def leave(self, who: str) -> None:
        if use := self._uses.get(who):
            use.running = max(0, use.running - 1)

    def _take(self, use: _Use, per_minute: int) -> dict[str, str]:
        now, per_second = self._clock(), per_minute / 60
        use.tokens, use.at = min(per_minute, use.tokens + (now - use.at) * per_second), now
        allowed = use.tokens >= 1
        use.tokens -= allowed
        headers = {
            "x-ratelimit-limit-requests": str(per_minute),
            "x-ratelimit-remaining-requests": str(int(use.tokens)),
            "x-ratelimit-reset-requests": f"{(per_minute - use.tokens) / per_second:.3f}s",
        }
        if not allowed:
            seconds = math.ceil((1 - use.tokens) / per_second)
            raise ApiError(
                429,
                f"this key has used its {per_minute:,} requests a minute: ask again in {seconds} s",
                code="rate_limit_exceeded",
                headers={**headers, "retry-after": str(seconds)},
            )
        return headers
