"""Which device holds which experts when a model is served (report, section 3.4.1).

A layer takes as long as its busiest device, and experts are not loved alike: on one kind of text a few of them get
many times their share of the tokens. Training keeps the balance over a whole batch; what people ask at a time is
no such batch. So experts are laid over devices by the loads that were observed, again every so often, and the busiest
are held several times ("redundant experts"): an expert's tokens are split evenly among its replicas. The report
serves prompts on 32 devices in 4 nodes with 32 redundant experts (each device holds 9 of 256 + 32), and answers on 320
devices with one expert each.

There are two ways, those of DeepSeek's own balancer (deepseek-ai/EPLB):

- hierarchical, where the nodes divide the groups of experts that routing is limited to: groups are laid on nodes, so
  that tokens of a group cross to one node only; then experts are replicated and laid on devices within each node.
- global, in all other cases: groups do not count.

Either way the same three questions are asked in turn, and each is answered greedily: which groups go together, which
experts get one more replica (always the one whose replicas are busiest, which is optimal for the busiest replica),
and where does each go (the busiest first, to the device that has the least so far and has room). EPLB ends there.
Here a local search goes on from it: while the busiest device gets better, one of its slots is swapped with another's,
or one replica somewhere makes room for another replica of an expert that the busiest device holds.

Loads are only shares: their sum within a layer means nothing. They come as a file,

    {"layers": {"3": [1041, 987, ...], "4": [...], ...}}

for each MoE layer, by its number, how many tokens chose each of its experts. `dsv3 eval MODEL --tasks loads --text FILE
--json` prints it (under "tasks", "loads", which is read as well).
"""

from __future__ import annotations

import heapq
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv3.errors import UserError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_ROUNDS = 1000  # steps of the search for one node of one layer; it ends by itself after a few dozen
_LEAST = 1e-6  # what a step must gain of the busiest device's load


@dataclass(frozen=True)
class Loads:
    """How often each expert was chosen."""

    layers: tuple[int, ...]
    """The layers' numbers."""
    counts: Floats
    """[layers, experts]"""


@dataclass(frozen=True)
class Placement:
    """What each device holds, layer by layer."""

    slots: Ints
    """[layers, devices, slots]: the expert in each slot."""
    loads: Floats
    """[layers, experts]: the observed loads, as shares of their layer's tokens."""
    nodes: int
    """Machines: device d is on node d // (devices / nodes)."""
    hierarchical: bool
    """Whether each node holds whole groups of experts."""
    before: Floats
    """[layers, devices]: loads of devices that hold the experts in order and none twice; 1 is the mean."""

    @property
    def replicas(self) -> Ints:
        """[layers, experts]: how often each is held."""
        counts = [np.bincount(layer.ravel(), minlength=self.loads.shape[1]) for layer in self.slots]
        return np.stack(counts).astype(np.int64)

    @property
    def after(self) -> Floats:
        """[layers, devices]: loads of the devices; 1 is the mean."""
        shares = self.loads / self.replicas
        layers = zip(shares, self.slots, strict=True)
        loads: Floats = np.stack([layer[slots].sum(axis=1) for layer, slots in layers]) * self.slots.shape[1]
        return loads

    @property
    def balance_before(self) -> Floats:
        """[layers]: the busiest device's load over the mean, the experts in order; 1 is perfect."""
        busiest: Floats = self.before.max(axis=1)
        return busiest

    @property
    def balance(self) -> Floats:
        """[layers]: the same as placed."""
        busiest: Floats = self.after.max(axis=1)
        return busiest

    def to_dict(self) -> dict[str, Any]:
        """Numbers for a program: `placement` is [layer][device][slot]."""
        return {
            "hierarchical": self.hierarchical,
            "balance_before": self.balance_before.tolist(),
            "balance": self.balance.tolist(),
            "placement": self.slots.tolist(),
            "replicas": self.replicas.tolist(),
        }


def read_loads(path: Path) -> Loads:
    """The loads in a file as the module's docstring shows it. Raises UserError if it holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise UserError(f"{path} cannot be read ({problem.strerror}): name a file of expert loads") from None
    except (ValueError, RecursionError):  # also what is not UTF-8
        raise UserError(f"{path} is not valid JSON: name a file of expert loads") from None
    for key in ("tasks", "loads"):  # what `dsv3 eval --json` prints
        values = values[key] if isinstance(values, dict) and key in values else values
    layers = values.get("layers") if isinstance(values, dict) else None
    wrong = f"{path} holds no expert loads: write it by dsv3 eval MODEL --tasks loads --text FILE --json"
    if not isinstance(layers, dict) or not layers:
        raise UserError(wrong)
    try:
        by_number = sorted((int(layer), counts) for layer, counts in layers.items())
        counts = np.array([counts for _, counts in by_number], dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(wrong) from None
    return Loads(tuple(layer for layer, _ in by_number), _checked(counts))


def balance(
    loads: npt.ArrayLike, devices: int, nodes: int = 1, redundant: int = 0, groups: int = 1
) -> Placement:
    """Lay experts over devices by their loads, [layers, experts], each device as many.

    devices: on `nodes` machines, as many on each; redundant: replicas per layer beyond one of each expert; groups: the
    model's `n_group`, runs of as many experts. Loads that are all zero count as all alike. The result depends
    on nothing else, and is never worse than the experts in order. Raises UserError for what does not come out even.
    """
    shares = _checked(np.asarray(loads, dtype=np.float64))
    experts = shares.shape[1]
    for name, value, least in (
        ("devices", devices, 1),
        ("nodes", nodes, 1),
        ("redundant", redundant, 0),
        ("groups", groups, 1),
    ):
        if value < least:
            raise UserError(f"{name} is {value}: it must be at least {least}")
    if devices % nodes:
        raise UserError(f"nodes is {nodes}: it must divide the {devices} devices")
    if experts % groups:
        raise UserError(f"groups is {groups}: it must divide the {experts} experts")
    if (experts + redundant) % devices:
        more = redundant + -(experts + redundant) % devices
        raise UserError(
            f"{experts} experts and {redundant} redundant ones do not fill {devices} devices evenly: take "
            f"{more} redundant ones"
        )
    total = shares.sum(axis=1, keepdims=True)
    shares = np.divide(shares, total, out=np.full_like(shares, 1 / experts), where=total > 0)
    hierarchical = nodes > 1 and groups % nodes == 0
    home = _Homes(*((nodes, groups) if hierarchical else (1, 1)), devices, (experts + redundant) // devices)
    in_order = home.in_order(experts)
    before = np.stack([[float(layer[held].sum()) for held in in_order] for layer in shares]) * devices
    slots = np.stack([home.place(layer) for layer in shares])
    found = Placement(slots, shares, nodes, hierarchical, before)
    worse = np.flatnonzero(found.balance > found.balance_before)
    for i in worse:  # where the order happens to be near perfect
        slots[i] = home.fill(in_order)
    return found


def draw_balance(placement: Placement, path: Path, name: str = "") -> None:
    """A picture of how loaded the devices are, before and after, busiest first: all layers, and the range between.

    path: .png, .svg or .pdf; name: of the model or text. Raises UserError as `dsv3.figures.figure` does.
    """
    from matplotlib.ticker import FuncFormatter

    from dsv3.figures import COLORS, FAINT, figure, title

    devices = placement.before.shape[1]
    sides = (
        ("in order", placement.before, COLORS[1]),
        ("balanced", placement.after, COLORS[0]),
    )
    with figure(path, 7, 3.6) as canvas:
        axes = canvas.subplots()
        for label, loads, color in sides:
            ranked = -np.sort(-loads, axis=1)
            x = np.arange(1, devices + 1)
            middle = ranked.mean(axis=0)
            axes.fill_between(x, ranked.min(axis=0), ranked.max(axis=0), color=color, alpha=0.2, linewidth=0)
            busiest = loads.max(axis=1).mean()
            axes.plot(x, middle, color=color, label=f"{label}: busiest {busiest:.2f} x the mean")
        axes.axhline(1, color=FAINT, linewidth=0.8, linestyle="--")
        axes.set_xlim(1, max(devices, 2))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("Devices of a layer, busiest first")
        axes.set_ylabel("Load over the mean")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.legend(loc="upper right")
        layers, experts = placement.loads.shape
        held = placement.slots.shape[1] * placement.slots.shape[2]
        note = (
            f"{layers} layers, {experts} experts in {held} places; line: mean over layers, band: all of them"
        )
        title(axes, f"Expert load on {devices} devices" + (f": {name}" if name else ""), note)


@dataclass(frozen=True)
class _Homes:
    """What is where: groups of experts at home on nodes, devices of nodes."""

    nodes: int
    groups: int
    devices: int
    slots: int
    """Per device."""

    def place(self, weights: Floats) -> Ints:
        """[devices, slots] for one layer's loads [experts]."""
        size = len(weights) // self.groups
        groups = weights.reshape(self.groups, size).sum(axis=1)
        homes = _pack(groups, np.ones_like(groups, dtype=np.int64), self.nodes)
        _search(groups, homes)
        parts = []
        for home in homes:
            experts = (home[:, None] * size + np.arange(size)).ravel()
            parts.append(experts[_lay(weights[experts], self.devices // self.nodes, self.slots)])
        return np.concatenate(parts)

    def in_order(self, experts: int) -> list[Ints]:
        """Each device's experts if nothing is balanced: in order, the last devices of a node with fewer or none."""
        each = self.devices // self.nodes
        per_node = experts // self.nodes
        most = -(-per_node // each)
        starts = [(n * per_node, (n + 1) * per_node) for n in range(self.nodes)]
        return [
            np.arange(min(start + d * most, end), min(start + (d + 1) * most, end))
            for start, end in starts
            for d in range(each)
        ]

    def fill(self, held: list[Ints]) -> Ints:
        """The same with all slots full, and no device busier: what is left over repeats a device's own experts.

        A device without any takes what the first device of its node has, with which it then shares.
        """
        each = self.devices // self.nodes
        return np.stack(
            [
                np.resize(experts if len(experts) else held[d - d % each], self.slots)
                for d, experts in enumerate(held)
            ]
        )


def _checked(loads: Floats) -> Floats:
    if loads.ndim != 2 or not loads.size:
        raise UserError(f"expert loads of shape {loads.shape} are no table: give layers x experts")
    if not np.isfinite(loads).all() or (loads < 0).any():
        raise UserError("expert loads have negative numbers or none: count how many tokens chose each expert")
    return loads


def _lay(weights: Floats, devices: int, slots: int) -> Ints:
    """[devices, slots]: experts of these loads, replicated, on the devices of one node."""
    tries = []
    for tie in (1, -1):  # where the search ends depends on where it begins
        laid = _pack(weights, _replicate(weights, devices * slots, tie), devices)
        _search(weights, laid)
        counts = np.bincount(laid.ravel(), minlength=len(weights))
        tries.append((float((weights / counts)[laid].sum(axis=1).max()), tie, laid))
    return max(tries, key=lambda found: (-found[0], found[1]))[2]


def _replicate(weights: Floats, slots: int, tie: int) -> Ints:
    """How often each expert is held, `slots` times in all: one more of the one whose replicas are busiest.

    tie: of several as busy, that with the fewest replicas (1) or with the most (-1).
    """
    each, counts = weights.tolist(), [1] * len(weights)
    queue = [(-weight, tie, expert) for expert, weight in enumerate(each)]
    heapq.heapify(queue)
    for _ in range(slots - len(each)):
        expert = queue[0][-1]
        counts[expert] += 1
        heapq.heapreplace(queue, (-each[expert] / counts[expert], tie * counts[expert], expert))
    return np.array(counts, dtype=np.int64)


def _pack(weights: Floats, counts: Ints, bins: int) -> Ints:
    """So many replicas of each item in bins of equally many, [bins, items of each]: the heaviest first, each to the
    lightest bin with room."""
    shares = (weights / counts).tolist()
    replicas = np.repeat(np.arange(len(weights)), counts).tolist()
    room = len(replicas) // bins
    queue = [(0.0, b) for b in range(bins)]
    packed: list[list[int]] = [[] for _ in range(bins)]
    for item in sorted(replicas, key=lambda item: -shares[item]):
        weight, b = heapq.heappop(queue)
        packed[b].append(item)
        if len(packed[b]) < room:
            heapq.heappush(queue, (weight + shares[item], b))
    return np.array(packed, dtype=np.int64)


def _search(weights: Floats, slots: Ints) -> None:
    """Make the busiest of the bins [bins, slots] less busy, in place, until no single step does."""
    if len(slots) == 1 or slots.shape[1] == 1:  # what is one to a bin is as good as it can be
        return
    for _ in range(_ROUNDS):
        counts = np.bincount(slots.ravel(), minlength=len(weights))
        shares = weights / counts
        loads = shares[slots].sum(axis=1)
        limit = loads.max() * (1 - _LEAST)
        if not _swap(shares[slots], loads, limit, slots) and not _replace(
            weights, counts, loads, limit, slots
        ):
            return


def _swap(shares: Floats, loads: Floats, limit: float, slots: Ints) -> bool:
    """Swap the slot of the busiest bin and that of another after which the busier of the two is the least busy."""
    busiest = int(loads.argmax())
    change = shares - shares[busiest][:, None, None]  # [its slots, bins, slots]
    worse = np.maximum(loads[busiest] + change, loads[:, None] - change)
    worse[:, busiest] = np.inf
    best = int(worse.argmin())
    if worse.flat[best] >= limit:
        return False
    ours, other, theirs = np.unravel_index(best, worse.shape)
    slots[busiest, ours], slots[other, theirs] = slots[other, theirs], slots[busiest, ours]
    return True


def _replace(weights: Floats, counts: Ints, loads: Floats, limit: float, slots: Ints) -> bool:
    """Let the replica of an expert somewhere give way to another replica of one that the busiest bin holds."""
    spare = np.flatnonzero(counts > 1)
    if not len(spare):
        return False
    bins = np.arange(len(slots))
    held = np.zeros((len(slots), len(weights)))
    np.add.at(held, (bins[:, None], slots), 1)
    fewer, more = weights[spare] / (counts[spare] - 1), weights / (counts + 1)
    without = loads[:, None] + held[:, spare] * (fewer - weights[spare] / counts[spare])  # [bins, spare]
    best: float = limit
    step: tuple[int, int, int] | None = None
    for expert in dict.fromkeys(slots[loads.argmax()].tolist()):
        after = without - (held[:, expert] * (weights[expert] / counts[expert] - more[expert]))[:, None]
        # The bin where it happens also loses the one and gains the other; the busiest of the rest stays as it is.
        order = after.argsort(axis=0)
        first, second = (np.take_along_axis(after, order[-n, None], axis=0) for n in (1, 2))
        rest = np.where(bins[:, None] == order[-1], second, first)
        worse = np.maximum(after - fewer + more[expert], rest)
        worse[(held[:, spare] == 0) | (spare == expert)] = np.inf
        at = int(worse.argmin())
        if worse.flat[at] < best:
            where, which = np.unravel_index(at, worse.shape)
            best, step = float(worse.flat[at]), (int(where), int(spare[which]), expert)
    if step is None:
        return False
    place, gone, new = step
    slots[place, int(np.flatnonzero(slots[place] == gone)[0])] = new
    return True
