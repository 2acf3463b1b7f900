"""Pipeline schedules: which device does what, in which order.

A model is cut into stages; a batch into microbatches. Each microbatch goes forward (F) through all stages and
backward through all of them. The backward pass has two halves: gradients of the stage's input (I), for which the
stage before waits, and gradients of its weights (W), for which nobody does; together they are B.

A schedule is a list of slots for each device. A slot holds one operation, or a forward and a backward of different
microbatches that run interwoven so that one computes while the other's tokens travel (DualPipe). The same lists are
simulated and drawn here, and executed by `dsv3.parallel.pipeline`.

Five schedules are known, each an answer to the same question: what does a device do while it waits?

- `1f1b`: nothing. Forwards until the first backward arrives, then one of each in turn, so that no more than
  P microbatches are held (Narayanan et al., 2021).
- `interleaved`: each device holds several thin stages instead of one thick one, and what it waits for is thinner
  too (Megatron-LM; arXiv 2104.04473).
- `zb1p`: 1F1B that puts the weight gradients off and fills the gaps with them (ZB-H1 in "Zero Bubble Pipeline
  Parallelism", arXiv 2401.10241; ZB1P in DeepSeek's table).
- `dualpipe`: microbatches enter at both ends. Each device holds two stages, one for each direction, so it always
  has a forward and a backward to run as a pair (DeepSeek-V3 report, section 3.2.1; deepseek-ai/DualPipe).
- `dualpipev`: one half of DualPipe with the pipeline folded in the middle: the same lists on half the devices, all
  microbatches entering at one end ("Cut-in-half", Sea AI Lab; deepseek-ai/DualPipe).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from dsv3.recipe.fields import RecipeError
from dsv3.recipe.layout import Layout, ScheduleName

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


def make_schedule(name: ScheduleName, devices: int, microbatches: int, chunks: int = 1) -> Schedule:
    """The schedule of that name; `chunks` is the number of stages per device of the interleaved one.

    Every microbatch goes once forward and once backward through every stage, in an order that cannot deadlock as
    long as sending does not block. Raises RecipeError, in one line, for what the schedule cannot do.
    """
    _check(name, devices, microbatches, chunks)
    stages = devices * {"interleaved": chunks, "dualpipev": 2}.get(name, 1)
    slots = (tuple(_device(name, d, devices, microbatches, chunks)) for d in range(devices))
    return Schedule(name, devices, stages, microbatches, tuple(slots))


@lru_cache(64)
def schedule_of(layout: Layout, microbatches: int) -> Schedule:
    """What a layout's pipeline does with so many microbatches; raises as `make_schedule`.

    DualPipe needs two for each device. With fewer, as at the start of a batch that grows, they all go one way through
    the same stages, as in ZB1P, while each device's other stage rests.
    """
    name = layout.schedule if layout.pipeline > 1 else "1f1b"
    if name == "dualpipe" and microbatches < 2 * layout.pipeline:
        name = "zb1p"
    return make_schedule(name, layout.pipeline, microbatches, layout.chunks if name == "interleaved" else 1)


def _check(name: str, devices: int, microbatches: int, chunks: int) -> None:
    if name not in get_args(ScheduleName):
        raise RecipeError(f"schedule is {name!r}: it must be one of {', '.join(get_args(ScheduleName))}")
    for thing, value in (("devices", devices), ("microbatches", microbatches), ("chunks", chunks)):
        if value < 1:
            raise RecipeError(f"{thing} is {value}: a pipeline needs at least 1")
    if name == "interleaved":
        if chunks == 1:
            raise RecipeError("chunks is 1: the interleaved schedule needs at least 2, or take 1f1b")
        if microbatches % devices:
            raise RecipeError(
                f"microbatches is {microbatches}: the interleaved schedule needs a multiple of the {devices} devices"
            )
    elif chunks > 1:
        raise RecipeError(f"chunks is {chunks}: only the interleaved schedule has several")
    if name == "dualpipe" and devices % 2:
        raise RecipeError(f"devices is {devices}: dualpipe needs an even number, or take dualpipev")
    if name == "dualpipe" and microbatches % 2:
        raise RecipeError(
            f"microbatches is {microbatches}: dualpipe needs an even number, half for each direction"
        )
    if name in ("dualpipe", "dualpipev") and microbatches < 2 * devices:
        raise RecipeError(
            f"microbatches is {microbatches}: {name} needs at least 2 for each device, {2 * devices} here"
        )


def _device(name: str, device: int, devices: int, microbatches: int, chunks: int) -> Iterator[Slot]:
    if name == "1f1b":
        return _number(_1f1b(device, devices, microbatches), [device])
    if name == "zb1p":
        return _number(_zb1p(device, devices, microbatches), [device])
    if name == "interleaved":
        return _interleaved(device, devices, microbatches, chunks)
    if name == "dualpipev":
        return _number(_dual(device, devices, microbatches), [device, 2 * devices - 1 - device])
    place = min(device, devices - 1 - device)  # the second half of the devices mirrors the first
    half = microbatches // 2
    first = [0, half] if device < devices // 2 else [half, 0]
    return _number(_dual(place, devices // 2, half), [place, devices - 1 - place], first)


def _1f1b(device: int, devices: int, microbatches: int) -> list[str]:
    ahead = min(devices - 1 - device, microbatches)
    return ["F0"] * ahead + ["F0", "B0"] * (microbatches - ahead) + ["B0"] * ahead


def _zb1p(device: int, devices: int, microbatches: int) -> list[str]:
    """1F1B whose weight gradients lag behind by as many microbatches as there are devices before this one.

    Those have as many microbatches more under way, so that all devices hold the activations of P.
    """
    words = []
    inputs = 0
    for word in _1f1b(device, devices, microbatches):
        words += ["I0" if word == "B0" else word]
        if word == "B0":
            inputs += 1
            words += ["W"] * (inputs > device)
    return words + ["W"] * min(device, microbatches)


def _dual(place: int, places: int, microbatches: int) -> list[str]:
    """The eight steps of DualPipe for one of `places` devices between an end, 0, and the middle, places - 1.

    Way 0 leads from the end to the middle, way 1 back. In DualPipe the microbatches of way 1 come from the other
    end; in DualPipeV they are those of way 0 that have turned. `microbatches` is how many go each way.
    """
    ahead = places - 1 - place
    pairs = microbatches - 2 * places + place + 1
    last = ["B1", "B0"] * (place + 1)
    split = [word.replace("B", "I") for word in last[place + 1 :]]
    return [
        *["F0"] * (2 * ahead),
        *["F0", "F1"] * (place + 1),
        *["I1", "W", "F1"] * ahead,
        # The first pair in the middle is not run as one: whoever waits for its forward waits less long.
        *(["F0 B1", "F1 B0"] if ahead else ["F0", "B1", "F1 B0"]),
        *["F0 B1", "F1 B0"] * (pairs - 1),
        *["B1", "F1 B0"] * ahead,
        *last[: place + 1],
        *split,
        *["W", "I0"] * ahead,
        *["W"] * (place + 1),
    ]


def _number(words: Iterable[str], stages: list[int], first: list[int] | None = None) -> Iterator[Slot]:
    """Slots from words such as "F0" and "F0 B1": a kind, and the way whose next microbatch it is for.

    Way w leads through `stages[w]`, and its microbatches count from `first[w]`. A W belongs to the oldest I that
    still lacks one.
    """
    first = first or [0] * len(stages)
    forward, backward = Counter[int](), Counter[int]()
    owed: deque[Op] = deque()

    def op(word: str) -> Op:
        if word == "W":
            return owed.popleft()
        kind, way = word[0], int(word[1])
        count = forward if kind == "F" else backward
        microbatch = first[way] + count[way]
        count[way] += 1
        if kind == "F":
            return Op("F", stages[way], microbatch)
        if kind == "B":
            return Op("B", stages[way], microbatch)
        owed.append(Op("W", stages[way], microbatch))
        return Op("I", stages[way], microbatch)

    return (tuple(map(op, word.split())) for word in words)


def _interleaved(device: int, devices: int, microbatches: int, chunks: int) -> Iterator[Slot]:
    """Rounds of `devices` microbatches go through a device's first stage, then its second, and so on."""
    total = microbatches * chunks

    def op(kind: Literal["F", "B"], k: int) -> Op:
        chunk = k // devices % chunks
        if kind == "B":
            chunk = chunks - 1 - chunk
        return Op(kind, chunk * devices + device, k // (devices * chunks) * devices + k % devices)

    ahead = min(total, (chunks - 1) * devices + 2 * (devices - 1 - device))
    for k in range(total + ahead):
        if k < total:
            yield (op("F", k),)
        if k >= ahead:
            yield (op("B", k - ahead),)
