"""An exponential moving average of the weights, kept on the host (report, section 3.2.3).

    average = decay * average + (1 - decay) * weights        after each step

Averaged weights wander less than the weights of one step, and so tell early what lowering the rate would
bring. They are needed once in a while, so they live in CPU memory. On a GPU an update only queues the copies
of the float32 masters, into pinned memory, behind the step that wrote them; a thread waits for them and
averages while the GPU works on. The report gives no decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class Ema:
    """The average of an optimiser's masters, which it reads at each `update` and never changes."""

    def __init__(self, masters: Mapping[str, Tensor], decay: float) -> None:
        self.masters = dict(masters)
        self.decay = decay
        self.averages = {name: m.detach().to("cpu", copy=True) for name, m in self.masters.items()}
        self._cuda = any(m.is_cuda for m in self.masters.values())
        if self._cuda:
            self._arrived = [torch.empty_like(a, pin_memory=True) for a in self.averages.values()]
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="ema")
            self._pending: Future[None] | None = None

    @torch.no_grad()
    def update(self) -> None:
        """Take the masters in as they are now. To be called once after each step."""
        masters = list(self.masters.values())
        if not self._cuda:
            self._average(masters)
            return
        self._settle()
        torch._foreach_copy_(self._arrived, masters, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(masters[0].device))
        self._pending = self._thread.submit(self._receive, copied)

    def state(self) -> dict[str, Tensor]:
        """The averages by name, to be written, or read into."""
        self._settle()
        return {f"ema.{name}": average for name, average in self.averages.items()}

    @torch.no_grad()
    def begin(self) -> None:
        """Begin anew from the masters as they are."""
        self._settle()
        for name, average in self.averages.items():
            average.copy_(self.masters[name])

    def _average(self, masters: list[Tensor]) -> None:
        torch._foreach_lerp_(list(self.averages.values()), masters, 1 - self.decay)

    @torch.no_grad()
    def _receive(self, copied: torch.cuda.Event) -> None:
        copied.synchronize()
        self._average(self._arrived)

    def _settle(self) -> None:
        """Wait until the last update is averaged in."""
        if self._cuda and self._pending is not None:
            self._pending.result()
            self._pending = None
