"""Pipeline schedules: which device does what, in which order.

A model is cut into stages; a batch into microbatches. Each microbatch goes forward (F) through all stages and
backward through all of them. The backward pass has two halves: gradients of the stage's input (I), for which the
stage before waits, and gradients of its weights (W), for which nobody does; together they are B.

A schedule is a list of slots for each device. A slot holds one operation, or a forward and a backward of different
microbatches that run interwoven so that one computes while the other's tokens travel (DualPipe). The same lists are
simulated and drawn here, and executed by `dsv3.parallel.pipeline`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["F", "B", "I", "W"]


@dataclass(frozen=True)
class Op:
    """One thing to do: a microbatch forward (F) or backward (B, or its halves I and W) through a stage."""

    kind: Kind
    stage: int
    microbatch: int


Slot = tuple[Op, ...]
"""One operation; or two that overlap, the forward first."""


@dataclass(frozen=True)
class Schedule:
    """Each device's slots, in order."""

    name: str
    devices: int
    stages: int
    microbatches: int
    slots: tuple[tuple[Slot, ...], ...]

    def device(self, stage: int, microbatch: int) -> int:
        """Where a microbatch goes through a stage: DualPipe sends the second half of them the other way round."""
        if self.name == "dualpipe" and microbatch >= self.microbatches // 2:
            return self.devices - 1 - stage
        return device_of(self.name, stage, self.devices)

    def held(self, device: int) -> tuple[int, ...]:
        """The stages that a device holds, ascending."""
        return held(self.name, device, self.devices, self.stages)


def device_of(name: str, stage: int, devices: int) -> int:
    """The device of a stage; for DualPipe, of the first half of the microbatches."""
    if name == "dualpipev" and stage >= devices:
        return 2 * devices - 1 - stage
    return stage % devices


def held(name: str, device: int, devices: int, stages: int) -> tuple[int, ...]:
    """The stages that a device holds, ascending."""
    own = {s for s in range(stages) if device_of(name, s, devices) == device}
    if name == "dualpipe":
        own.add(devices - 1 - device)
    return tuple(sorted(own))


def cut(layers: int, modules: int, stages: int) -> list[range]:
    """The layers of each stage, for a model of so many layers and MTP modules.

    The embedding, each layer, each module and the head count as one unit, and stages are equal runs of units; norm,
    modules and head are all on the last stage. DeepSeek-V3 on 16 stages: embedding and the 3 dense layers; 14 times
    4 layers; 2 layers, the MTP module and the head. Raises ValueError for more stages than units.
    """
    units = 1 + layers + modules + 1
    if not 1 <= stages <= units:
        raise ValueError(f"{stages} stages cannot be cut from {layers} layers: at most {units}")
    ends = [min(layers, max(0, round(units * s / stages) - 1)) for s in range(1, stages)]
    return [range(a, b) for a, b in zip([0, *ends], [*ends, layers], strict=True)]
