"""Rows that travel between processes and come back as sums: the all-to-all of expert parallelism, and its gradients.

A `Route` says which of a process's rows go to which members of a group. One row may go to several, and each may send
any number of rows to any other, none too. Over it there are two ways:

    scatter   each row goes to all that want it
    gather    what they made of it comes back, and is added up by the row that it belongs to

Each is the other's gradient: gradients of what was scattered are gathered, and the other way round. What rows are sent
as is chosen for both directions by itself: as they are, or in FP8, a byte for each number and one for each tile of 128
with the exponent of its scale, which is a power of two (`dsv3.quant.quantize_tiles`). Rows are put into this form once,
however many copies of them are sent, and a row that was sent in it before loses nothing the second time.

All members take part in each exchange, with or without rows, or the others would wait for ever. In the backward pass
autograd decides what is run, so here it is given no choice: while gradients are recorded, what has travelled always
requires one, whatever required it before and however many rows there are; and all that travels at a time is one node
of the graph, so that no two exchanges can change places.

Each exchange is started, then `dsv3.parallel.overlap.pause` lets another pass go on, then it is waited for. (Written
for NCCL as well as gloo; not yet run on the former. On CUDA the order in which rows are added up is not fixed.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from dsv3.parallel.overlap import pause
from dsv3.quant import dequantize_tiles, quantize_tiles

Wire = Literal["plain", "fp8"]
"""What rows are sent as."""

Arrival = Callable[[], list[Tensor]]
"""Waits for an exchange, and gives what has come."""


@dataclass(frozen=True)
class Route:
    """Which rows of this process go to whom in a group, and how many come."""

    group: ProcessGroup
    count: int
    """Rows of this process."""
    rows: Tensor
    """[sum of sent] int64: which row each one sent is, ordered by who gets it."""
    sent: list[int]
    """How many each member gets from here."""
    come: list[int]
    """How many come from each member."""
    choices: int
    """How many choices come with them."""

    @classmethod
    def of(cls, wanted: Tensor, group: ProcessGroup) -> Route:
        """wanted: [rows, members] int64, how many of a row's choices each member has; it gets the rows with any.

        All members call this. The host waits here for the device, once, to know how much will come.
        """
        goes = (wanted > 0).T
        counts = torch.stack((goes.sum(1), wanted.sum(0)), dim=1)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=group)
        both: list[list[list[int]]] = torch.stack((counts, theirs)).tolist()
        sent, (come, choices) = [n for n, _ in both[0]], zip(*both[1], strict=True)
        rows = goes.nonzero_static(size=sum(sent))[:, 1]
        return cls(group, len(wanted), rows, sent, list(come), sum(choices))

    @property
    def reached(self) -> Tensor:
        """[count] int64: how many members each row goes to."""
        return torch.bincount(self.rows, minlength=self.count)

    def send(self, *messages: Tensor) -> Arrival:
        """Start to send rows, each [count, ...], to whom they are for."""
        return self._start([m.index_select(0, self.rows) for m in messages], self.sent, self.come)

    def send_back(self, *messages: Tensor) -> Arrival:
        """Start to send rows, each [sum of come, ...], back to whom they came from."""
        return self._start([m.contiguous() for m in messages], self.come, self.sent)

    def _start(self, messages: list[Tensor], sent: list[int], come: list[int]) -> Arrival:
        arrived = [m.new_empty(sum(come), *m.shape[1:]) for m in messages]
        works = [
            dist.all_to_all_single(a, m, come, sent, group=self.group, async_op=True)
            for a, m in zip(arrived, messages, strict=True)
        ]

        def arrive() -> list[Tensor]:
            pause()
            for work in works:
                work.wait()
            return arrived

        return arrive

    def add(self, back: Tensor) -> Tensor:
        """What has come back, [sum of sent, ...], added up by row: [count, ...]."""
        return add_rows(back, self.rows, self.count)


def add_rows(x: Tensor, index: Tensor, count: int) -> Tensor:
    """[count, ...]: in each row the sum of those of x whose index it is, summed in float32 at least. No gradient."""
    out = x.new_zeros(count, *x.shape[1:], dtype=torch.promote_types(x.dtype, torch.float32))
    return out.index_add_(0, index, x.to(out.dtype)).to(x.dtype)


# The wire ----------------------------------------------------------------------------------------------


def encode(x: Tensor, wire: Wire) -> Tensor:
    """x [rows, width] as it is sent: in FP8, uint8 [rows, width + ceil(width / 128)]."""
    if wire == "plain":
        return x
    quantized, scale = quantize_tiles(x, power_of_two=True)
    exponents = (scale.view(torch.int32) >> 23).to(torch.uint8)  # all that a power of two in float32 has
    return torch.cat((quantized.view(torch.uint8), exponents), dim=1)


def decode(message: Tensor, wire: Wire, width: int, dtype: torch.dtype) -> Tensor:
    """What `encode` was given, rounded to FP8 if it was sent so."""
    if wire == "plain":
        return message
    quantized = message[:, :width].contiguous().view(torch.float8_e4m3fn)
    scale = (message[:, width:].to(torch.int32) << 23).view(torch.float32)
    return dequantize_tiles(quantized, scale, dtype)


# With gradients ----------------------------------------------------------------------------------------


def scatter(
    x: Tensor, beside: Tensor, route: Route, forward: Wire = "plain", backward: Wire = "plain"
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Start to send rows to all that want them; what is returned is called for what has come, at the latest.

    x: [rows, width], which travels as `forward`, its gradients as `backward`; beside: [rows, any], floating point, a
    few numbers that travel with each row as they are. Gives both of the rows that came, ordered by whose they were.
    """
    with torch.no_grad():
        arrive = route.send(encode(x, forward), beside)
    if torch.is_grad_enabled() and not beside.requires_grad:
        beside = beside.detach().requires_grad_()

    def finish() -> tuple[Tensor, Tensor]:
        came: tuple[Tensor, Tensor] = _Scatter.apply(x, beside, route, arrive, forward, backward)  # type: ignore[no-untyped-call]
        return came

    return finish


def gather(rows: Tensor, route: Route, forward: Wire = "plain", backward: Wire = "plain") -> Tensor:
    """Send what became of rows back, [sum of route.come, width], and add it up: [route.count, width].

    It travels as `forward`, its gradients as `backward`.
    """
    out: Tensor = _Gather.apply(rows, route, forward, backward)  # type: ignore[no-untyped-call]
    return out


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, beside: Tensor, route: Route, arrive: Arrival, forward: Wire, backward: Wire
    ) -> tuple[Tensor, Tensor]:
        ctx.route, ctx.wire = route, backward
        rows, near = arrive()
        return decode(rows, forward, x.shape[1], x.dtype), near

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad, near), route, wire = grads, ctx.route, ctx.wire
        back, near = route.send_back(encode(grad, wire), near)()
        back = decode(back, wire, grad.shape[1], grad.dtype)
        return route.add(back), route.add(near), None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: Route, forward: Wire, backward: Wire) -> Tensor:
        ctx.route, ctx.wire = route, backward
        (back,) = route.send_back(encode(rows, forward))()
        return route.add(decode(back, forward, rows.shape[1], rows.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), route, wire = grads, ctx.route, ctx.wire
        (came,) = route.send(encode(grad, wire))()
        return decode(came, wire, grad.shape[1], grad.dtype), None, None, None
