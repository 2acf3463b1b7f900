"""What travels between the stages of a pipeline: hidden states forward, their gradients backward.

A schedule says who sends what to whom in which order, and every process knows the schedule. So messages carry no
header: both ends of a channel know what comes next. Each direction between two processes is a channel of its own, with
its own process group (on NCCL, its own communicator and stream), on which messages arrive as they were sent, so that
what goes one way never waits for what goes the other.

Receives are posted before they are needed, for a transfer begins only when both ends are there; sends are not waited
for, and their tensors are kept until they have gone (with gloo, which says so only to who waits, until a run's end).
Stages on the same process hand over directly.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from dsv3.parallel.mesh import Mesh, make_groups
from dsv3.planner.pipeline import Op, Schedule, device_of

Message = tuple[Literal["F", "B"], int, int]
"""What a forward (F) or backward (B, or I) pass needs: kind, stage and microbatch of the one that receives it."""


@dataclass(frozen=True)
class Channel:
    """From one process to another, by ranks."""

    source: int
    target: int
    group: ProcessGroup

    def send(self, tensor: Tensor) -> Work:
        return _begun(dist.isend(tensor, self.target, self.group))

    def receive(self, buffer: Tensor) -> Work:
        return _begun(dist.irecv(buffer, self.source, self.group))


def _begun(work: Work | None) -> Work:
    assert work is not None, "this process is at neither end of the channel"
    return work


Channels = dict[tuple[int, int], Channel]
"""By the places in the pipeline that they join."""


def connect(mesh: Mesh, device: torch.device) -> Channels:
    """The channels of a layout's pipeline that begin or end at this process. All processes call this.

    In all there are 2 (pipeline - 1) data * context groups, which cost only those who are in them, but for NCCL bound to
    a device, which splits the world for each.
    """
    layout, here = mesh.layout, mesh.pipeline
    width = layout.data * layout.context
    pairs: set[tuple[int, int]] = set()
    for stage in range(layout.stages - 1):
        a, b = (device_of(layout.schedule, s, layout.pipeline) for s in (stage, stage + 1))
        pairs |= {(a, b), (b, a)} if a != b else set()
    ranks = {
        (a, b): (a * width + mesh.rank % width, b * width + mesh.rank % width)
        for a, b in sorted(pairs)
        if here in (a, b)
    }
    groups = make_groups(ranks.values(), dist.get_default_backend_for_device(device))
    channels = {pair: Channel(*ends, groups[ends]) for pair, ends in ranks.items()}
    # NCCL connects two at their first message, and holds up both until it has.
    for channel in channels.values():
        first = torch.zeros(1, device=device)
        (channel.send(first) if mesh.rank == channel.source else channel.receive(first)).wait()
    return channels


def messages(schedule: Schedule, device: int) -> Iterator[tuple[int, Message]]:
    """What a device sends, in order, each with the device that receives it, which may be itself.

    Of two operations that overlap, the forward's message goes first.
    """
    for slot in schedule.slots[device]:
        for op in slot:
            step = {"F": 1, "B": -1, "I": -1, "W": 0}[op.kind]
            stage = op.stage + step
            if step and 0 <= stage < schedule.stages:
                message: Message = ("F" if step == 1 else "B", stage, op.microbatch)
                yield schedule.device(stage, op.microbatch), message


class Mail:
    """One process's messages during one run of a schedule."""

    def __init__(
        self,
        schedule: Schedule,
        here: int,
        channels: Channels,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """here: this process's place in the pipeline; shape, dtype: of every message."""
        self._schedule, self._here, self._channels = schedule, here, channels
        self._shape, self._dtype, self._device = shape, dtype, device
        self._source: dict[Message, int] = {}
        self._announced: dict[int, deque[Message]] = defaultdict(deque)
        for source in range(schedule.devices):
            for target, message in messages(schedule, source):
                if target == here:
                    self._source[message] = source
                    self._announced[source].append(message)
        self._coming: dict[Message, tuple[Tensor, Work]] = {}
        self._handed: dict[Message, Tensor] = {}
        self._going: list[tuple[Tensor, Work]] = []

    def expect(self, op: Op) -> None:
        """Post the receive of what an operation needs, and of all that its sender sends before."""
        message: Message = ("F" if op.kind == "F" else "B", op.stage, op.microbatch)
        source = self._source.get(message) if op.kind != "W" else None
        if source is None or source == self._here:
            return
        announced = self._announced[source]
        while message in announced:
            buffer = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._coming[announced.popleft()] = buffer, self._channels[source, self._here].receive(buffer)

    def take(self, message: Message) -> Tensor:
        """Wait for a message that has been expected, or handed over."""
        if message in self._handed:
            return self._handed.pop(message)
        buffer, work = self._coming.pop(message)
        work.wait()
        return buffer

    def send(self, message: Message, tensor: Tensor) -> None:
        """Send in the order of `messages`; the tensor must not change any more."""
        if tuple(tensor.shape) != self._shape or tensor.dtype != self._dtype:
            raise ValueError(
                f"stages send {self._dtype} {self._shape}, not {tensor.dtype} {tuple(tensor.shape)}"
            )
        _, stage, microbatch = message
        target = self._schedule.device(stage, microbatch)
        if target == self._here:
            self._handed[message] = tensor
            return
        self._going = [(t, work) for t, work in self._going if not work.is_completed()]
        tensor = tensor.contiguous()
        self._going.append((tensor, self._channels[self._here, target].send(tensor)))

    def end(self) -> None:
        """Wait until all has gone."""
        for _, work in self._going:
            work.wait()
        self._going.clear()
