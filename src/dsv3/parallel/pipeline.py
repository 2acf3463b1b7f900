"""A pipeline's schedule, carried out: each process runs its slots, and messages between stages do the rest.

`dsv3.planner.pipeline` makes the lists that say who does what in which order. Here one process goes down its list,
whatever schedule made it:

- F takes what the stage before has sent, runs the stage, keeps its graph and sends its output on;
- B takes the output's gradient from the stage after, runs the graph backward, and sends its input's gradient back;
- I does the same but leaves the gradients of matrices (`dsv3.parallel.deferred`), which W then computes;
- F with B or I runs both interwoven (`dsv3.parallel.overlap`).

What a stage computes is up to the caller, including its loss: a stage may add to the loss without being the last (the
balance loss of its experts). No process waits for all others at any point of a run. DualPipe sends microbatches in at
both ends; each process holds two stages, and is told with each microbatch which one it goes through.

torch's own runtime (`torch.distributed.pipelining`) has most of these schedules, but not DualPipe, no losses before
the last stage, and no exchange of tokens that a pair could overlap; tests hold this one's gradients to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dsv3.parallel.channels import Mail, connect
from dsv3.parallel.deferred import Work, put_off
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.overlap import together
from dsv3.planner.pipeline import Op, schedule_of
from dsv3.planner.simulate import Event

Forward = Callable[[int, int, Tensor | None], tuple[Tensor | None, Tensor]]
"""One stage on one microbatch: from its number, the microbatch's and what the stage before gave (None for stage 0), to
what the next one takes (None from the last) and the stage's own loss, a scalar that may lack a gradient."""


class Pipeline:
    """This process's place in a pipeline."""

    def __init__(
        self,
        mesh: Mesh,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        """Connect to the neighbours; all processes of the mesh call this.

        shape, dtype: of the hidden states of one microbatch, [rows, seq, hidden].
        """
        self.mesh, self.shape, self.dtype, self.device = mesh, shape, dtype, torch.device(device)
        self._channels = connect(mesh, self.device)

    def run(
        self, microbatches: int, forward: Forward, accumulate: Callable[[], None] = lambda: None
    ) -> list[Event]:
        """Forward and backward passes of so many microbatches through this process's stages.

        Gradients are added to the parameters' `.grad`. accumulate: called after each slot that has added some, for who
        would rather have them elsewhere before the next. Returns what ran when, in seconds since the start (on CUDA, by
        the host's clock, which runs ahead of the device's).
        """
        schedule, here = schedule_of(self.mesh.layout, microbatches), self.mesh.pipeline
        mail = Mail(schedule, here, self._channels, self.shape, self.dtype, self.device)
        stages = _Stages(schedule.stages, forward, mail)
        slots, events, began = schedule.slots[here], [], time.perf_counter()
        for i, slot in enumerate(slots):
            for op in (op for near in slots[i : i + 2] for op in near):
                mail.expect(op)
            start = time.perf_counter()
            stages.run(slot)
            if slot[-1].kind != "F":
                accumulate()
            events.append(Event(here, slot, start - began, time.perf_counter() - began))
        mail.end()
        return events


class _Stages:
    """The operations of one process during a run, and what they leave to each other."""

    def __init__(self, stages: int, forward: Forward, mail: Mail) -> None:
        self._last, self._call, self._mail = stages - 1, forward, mail
        self._kept: dict[tuple[int, int], tuple[Tensor | None, Tensor | None, Tensor]] = {}
        self._left: dict[tuple[int, int], Work] = {}

    def run(self, slot: tuple[Op, ...]) -> None:
        ways = {"F": self._forward, "B": self._backward, "I": self._input, "W": self._weights}
        first, *others = (partial(ways[op.kind], op) for op in slot)
        if others:
            _, send = together(first, others[0])
        else:
            send = first()
        if send is not None:
            send()

    def _forward(self, op: Op) -> None:
        hidden = None
        if op.stage:
            hidden = self._mail.take(("F", op.stage, op.microbatch)).requires_grad_()
        out, loss = self._call(op.stage, op.microbatch, hidden)
        self._kept[op.stage, op.microbatch] = hidden, out, loss
        if op.stage < self._last:
            assert out is not None, f"stage {op.stage} gave nothing for the next"
            self._mail.send(("F", op.stage + 1, op.microbatch), out.detach())

    def _backward(self, op: Op) -> Callable[[], None] | None:
        """Gives what is still to be sent: where two overlap, the forward's message goes first."""
        hidden, out, loss = self._kept.pop((op.stage, op.microbatch))
        grad = None
        if op.stage < self._last:
            grad = self._mail.take(("B", op.stage, op.microbatch))
        roots = [(t, g) for t, g in ((out, grad), (loss, None)) if t is not None and t.requires_grad]
        if roots:
            torch.autograd.backward([t for t, _ in roots], [g for _, g in roots])
        if hidden is None:
            return None
        back = torch.zeros_like(hidden) if hidden.grad is None else hidden.grad
        return partial(self._mail.send, ("B", op.stage - 1, op.microbatch), back)

    def _input(self, op: Op) -> Callable[[], None] | None:
        with put_off() as work:
            send = self._backward(op)
        self._left[op.stage, op.microbatch] = work
        return send

    def _weights(self, op: Op) -> None:
        work = self._left.pop((op.stage, op.microbatch))
        work.reverse()
        while work:  # what each piece has kept goes with it
            work.pop()()
