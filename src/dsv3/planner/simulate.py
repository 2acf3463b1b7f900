"""What a pipeline schedule takes: when each slot runs, how long who waits, and how much is held meanwhile.

Each device goes through its slots in order. A slot starts when the device is free and what it needs is there: a
forward needs the output of the stage before, a backward the gradient from the stage after, the weights' half of a
backward its input half. Between two devices that takes `transfer` seconds, which hold up neither of them: sends are
asynchronous and links are never full. So a timeline is what a schedule can do at best; its idle time is the bubble.

**DeepSeek's table** (README of deepseek-ai/DualPipe; report, table 2), for PP stages, F, B, W, F&B the seconds of a
forward, a whole backward, its weights' half, and a pair run as one:

| schedule  | bubble               | parameters | activations | devices |
|-----------|----------------------|------------|-------------|---------|
| 1F1B      | (PP-1)(F+B)          | 1x         | PP          | PP      |
| ZB1P      | (PP-1)(F+B-2W)       | 1x         | PP          | PP      |
| DualPipe  | (PP/2-1)(F&B+B-3W)   | 2x         | PP+1        | PP      |
| DualPipeV | (PP/2-1)(F&B+B-3W)   | 2x         | PP+1        | PP/2    |

`formula_bubble` gives its second column and `simulate` agrees with it to the last digit, once one knows what it takes
for granted:

- B is the whole backward, I + W. The paper on zero bubbles calls the input half B and writes (PP-1)(F+B-W) for the
  same number.
- ZB1P: W <= F and W <= I, and at least PP microbatches. A longer W, put where devices would wait, holds them up.
- DualPipe: F = I and W <= F, any F&B from max(F, B) to F + B. In general, as long as W <= I <= F, the bubble is
  (PP/2-1)(F&B+F-2W), which is the table's where F = I; for I > F there is no formula this short.
- DualPipe's bubble is that of the devices in the middle, which run most pairs. A pair saves F + B - F&B seconds;
  towards the ends devices run fewer pairs, so they work longer for the same microbatches and wait less.
- Parameters count stages per device. DualPipeV holds the model once, on half the devices; DualPipe twice.
- Activations are the largest number of (stage, microbatch) held at once by any device. Whether one is freed by its
  input half or only by its weights' half changes no entry, but other devices: ZB1P holds PP everywhere until W, and
  on device r only PP - r until I, as 1F1B does. The +1 is the forward of a pair, which starts before its backward
  has freed anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dsv3.planner.pipeline import Kind, Op, Schedule, Slot
from dsv3.recipe.layout import ScheduleName

Cost = float | Sequence[float]
_Done = tuple[Kind, int, int]


@dataclass(frozen=True)
class Costs:
    """Seconds, each one number for all stages or one per stage.

    A whole backward takes `input` + `weight`, a pair `overlapped`: the mean of its two stages' numbers, or where it
    is None, what its halves take one after the other. `transfer` is from a stage to the next and back, between two
    devices; the last stage's is not used.
    """

    forward: Cost
    input: Cost
    weight: Cost
    overlapped: Cost | None = None
    transfer: Cost = 0.0


@dataclass(frozen=True)
class Event:
    """A slot with its time."""

    device: int
    slot: Slot
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When each device does what: one tuple of events per device, in order."""

    schedule: Schedule
    events: tuple[tuple[Event, ...], ...]

    @property
    def makespan(self) -> float:
        """Seconds from the first start, 0, to the last end."""
        return max(own[-1].end for own in self.events)

    @property
    def bubble(self) -> tuple[float, ...]:
        """Seconds that each device is idle until the last one ends."""
        makespan = self.makespan
        return tuple(makespan - sum(e.end - e.start for e in own) for own in self.events)

    @property
    def idle(self) -> float:
        """The share of all devices' time that is bubble, 0 to 1."""
        return sum(self.bubble) / (self.makespan * len(self.events))

    @property
    def activations(self) -> tuple[float, ...]:
        """The most (stage, microbatch) pairs whose activations each device holds at once, until their W."""
        return peak_activations(self.schedule)

    @property
    def stages(self) -> tuple[int, ...]:
        """Stages whose parameters each device holds."""
        return tuple(len(self.schedule.held(d)) for d in range(self.schedule.devices))


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """Run a schedule on paper. Takes some 20 ms for 16 devices and 120 microbatches.

    Raises ValueError for costs per stage that are not one per stage, and for a schedule that cannot go on: the
    message says which device waits for what.
    """
    seconds = _Seconds(schedule.stages, costs)
    events: list[list[Event]] = [[] for _ in range(schedule.devices)]
    done: dict[_Done, Event] = {}
    waiting: dict[_Done, list[int]] = {}  # what is missing: the devices that cannot go on without it
    ready = deque(range(schedule.devices))
    while ready:
        device = ready.popleft()
        own, slots = events[device], schedule.slots[device]
        while len(own) < len(slots):
            slot = slots[len(own)]
            start = own[-1].end if own else 0.0
            missing = None
            for need, boundary in _needs(slot, schedule.stages):
                if (source := done.get(need)) is None:
                    missing = need
                    break
                travel = seconds.transfer[boundary] if source.device != device else 0.0
                start = max(start, source.end + travel)
            if missing is not None:
                waiting.setdefault(missing, []).append(device)
                break
            own.append(event := Event(device, slot, start, start + seconds.slot(slot)))
            for op in slot:
                result = _result(op)
                done[result] = event
                ready.extend(waiting.pop(result, ()))
    if waiting:
        raise ValueError(_stuck(schedule, [len(own) for own in events], waiting))
    return Timeline(schedule, tuple(map(tuple, events)))


def peak_activations(
    schedule: Schedule, until: Literal["I", "W"] = "W", sizes: Sequence[float] | None = None
) -> tuple[float, ...]:
    """The most that each device holds at once, by the order of its slots alone.

    `sizes` is what one microbatch leaves behind in each stage, such as bytes; without it, 1 everywhere. `until`
    says what frees it where the backward is split: the input half (I), or the weights' half (W), which still needs
    every matrix's input and is nearer to what is really held.
    """
    sizes = sizes or [1] * schedule.stages
    peaks = []
    for slots in schedule.slots:
        now = peak = 0.0
        for slot in slots:
            now += sum(sizes[op.stage] for op in slot if op.kind == "F")
            peak = max(peak, now)
            now -= sum(sizes[op.stage] for op in slot if op.kind in ("B", until))
        peaks.append(peak)
    return tuple(peaks)


def formula_bubble(
    name: ScheduleName, devices: int, forward: float, backward: float, weight: float, overlapped: float
) -> float:
    """Seconds of bubble by DeepSeek's table (see above for when it is exact), and by Megatron's for interleaved.

    Times are one stage's, as in `Costs`; `backward` is the whole one. The interleaved schedule's (PP-1)(F+B) is
    Megatron's (PP-1)(F+B)/chunks, where F and B are a device's, all its thin stages together (arXiv 2104.04473).
    """
    if name in ("1f1b", "interleaved"):
        return (devices - 1) * (forward + backward)
    if name == "zb1p":
        return (devices - 1) * (forward + backward - 2 * weight)
    pairs_of_stages = devices if name == "dualpipev" else devices / 2
    return (pairs_of_stages - 1) * (overlapped + backward - 3 * weight)


class _Seconds:
    """Costs, spread over the stages."""

    def __init__(self, stages: int, costs: Costs) -> None:
        def spread(cost: Cost, name: str) -> list[float]:
            if isinstance(cost, int | float):
                return [float(cost)] * stages
            if len(cost) != stages:
                raise ValueError(f"{name} costs of {len(cost)} stages: the schedule has {stages}")
            return list(cost)

        self.transfer = spread(costs.transfer, "transfer")
        forward, halves = spread(costs.forward, "forward"), spread(costs.input, "input")
        weight = spread(costs.weight, "weight")
        whole = [i + w for i, w in zip(halves, weight, strict=True)]
        self._alone = {"F": forward, "I": halves, "W": weight, "B": whole}
        self._together = None if costs.overlapped is None else spread(costs.overlapped, "overlapped")

    def slot(self, slot: Slot) -> float:
        if len(slot) == 2 and self._together is not None:
            return sum(self._together[op.stage] for op in slot) / 2
        return sum(self._alone[op.kind][op.stage] for op in slot)


def _result(op: Op) -> _Done:
    """What others wait for: of a whole backward, the input half."""
    return ("I" if op.kind == "B" else op.kind, op.stage, op.microbatch)


def _needs(slot: Slot, stages: int) -> Iterator[tuple[_Done, int]]:
    """What a slot needs, each with the stage in front of the boundary that it crosses."""
    for op in slot:
        stage, microbatch = op.stage, op.microbatch
        if op.kind == "F":
            if stage:
                yield ("F", stage - 1, microbatch), stage - 1
        elif op.kind == "W":
            yield ("I", stage, microbatch), stage
        else:
            yield ("F", stage, microbatch), stage
            if stage < stages - 1:
                yield ("I", stage + 1, microbatch), stage


def _stuck(schedule: Schedule, places: list[int], waiting: dict[_Done, list[int]]) -> str:
    def say(kind: Kind, stage: int, microbatch: int) -> str:
        return f"{kind} of microbatch {microbatch} in stage {stage}"

    waits = []
    for missing, devices in waiting.items():
        for device in devices:
            slot = schedule.slots[device][places[device]]
            wanted = " with ".join(say(op.kind, op.stage, op.microbatch) for op in slot)
            waits.append(f"device {device} waits with its {wanted} for the {say(*missing)}")
    more = f"; {len(waits) - 4} more wait" if len(waits) > 4 else ""
    return f"schedule {schedule.name} cannot go on: {'; '.join(sorted(waits)[:4])}{more}"
