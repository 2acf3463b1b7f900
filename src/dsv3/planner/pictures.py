"""What the planner shows: who does what when, and who holds how many bytes of what."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3.figures import COLORS, GRID, INK, end_label, figure, title
from dsv3.planner.pipeline import Kind, Op, Schedule
from dsv3.planner.simulate import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KINDS: dict[Kind, tuple[str, str]] = {
    "F": ("forward", COLORS[0]),
    "B": ("backward, whole", COLORS[1]),
    "I": ("input gradients", COLORS[4]),
    "W": ("weight gradients", COLORS[2]),
}
_NAMES = {
    "1f1b": "1F1B",
    "interleaved": "Interleaved 1F1B",
    "zb1p": "ZB1P",
    "dualpipe": "DualPipe",
    "dualpipev": "DualPipeV",
}
_SECOND = {
    "dualpipe": "from the other end",
    "dualpipev": "on the way back",
    "interleaved": "a device's later stages",
}
_HEIGHT = 0.86  # of a row that a box takes
_Box = tuple[float, float, float, float]  # left, width, bottom, height


def draw_timeline(timeline: Timeline, path: Path) -> None:
    """Time to the right, a row per device, a box per slot; a pair is one frame, its forward above its backward.

    Boxes carry their microbatch where it can be read. Grey is the bubble. Raises UserError where `figure` does.
    """
    schedule, makespan = timeline.schedule, timeline.makespan
    shortest = min(e.end - e.start for own in timeline.events for e in own)
    width = min(16.0, max(8.0, 0.14 * makespan / max(shortest, 1e-3 * makespan)))
    row = 0.3 if schedule.devices <= 8 else 0.22
    with figure(path, width, row * schedule.devices + 1.5) as canvas:
        axes = canvas.subplots()
        inches = (width - 1.1) / makespan  # of one second
        axes.set_xlim(0, makespan)
        axes.set_ylim(schedule.devices - 0.5, -0.5)
        axes.barh(range(schedule.devices), makespan, _HEIGHT, color=GRID, linewidth=0)
        _draw_boxes(axes, timeline, inches, edge=0.4 if shortest * inches > 0.08 else 0.15)
        axes.set_yticks(range(schedule.devices))
        axes.set_ylabel("Device")
        axes.set_xlabel("Time (s)")
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        title(axes, f"{_NAMES[schedule.name]}, {_size(schedule)}", _note(timeline))
        _legend(axes, schedule)


def _size(schedule: Schedule) -> str:
    stages = f"{schedule.stages} stages on " if schedule.stages != schedule.devices else ""
    return f"{stages}{schedule.devices} devices, {schedule.microbatches} microbatches"


def _note(timeline: Timeline) -> str:
    most, least = max(timeline.bubble), min(timeline.bubble)
    each = f"{most:.3g} s" if most - least < 1e-3 * timeline.makespan else f"{least:.3g} to {most:.3g} s"
    return f"{timeline.makespan:.4g} s, of which each device is idle {each}: {timeline.idle:.1%} bubble"


def _draw_boxes(axes: Axes, timeline: Timeline, inches: float, edge: float) -> None:
    from matplotlib.collections import PolyCollection

    boxes: dict[str, list[_Box]] = defaultdict(list)
    frames: list[_Box] = []
    for own in timeline.events:
        for event in own:
            whole = (event.start, event.end - event.start, event.device - _HEIGHT / 2, _HEIGHT)
            if len(event.slot) == 2:
                frames.append(whole)
            for i, op in enumerate(event.slot):
                left, width, bottom, height = whole
                part = height / len(event.slot)
                color = _color(timeline.schedule, op)
                box = left, width, bottom + i * part, part
                boxes[color].append(box)
                _label(axes, box, str(op.microbatch), color, inches)
    for color, group in boxes.items():
        axes.add_collection(
            PolyCollection([_corners(b) for b in group], facecolor=color, edgecolor="white", linewidth=edge)
        )
    axes.add_collection(
        PolyCollection([_corners(b) for b in frames], facecolor="none", edgecolor=INK, linewidth=2 * edge)
    )


def _corners(box: _Box) -> list[tuple[float, float]]:
    left, width, bottom, height = box
    return [
        (left, bottom),
        (left + width, bottom),
        (left + width, bottom + height),
        (left, bottom + height),
    ]


def _label(axes: Axes, box: _Box, text: str, color: str, inches: float) -> None:
    left, width, bottom, height = box
    # A digit is 0.62 of its size wide, and a box should not be filled to its edges.
    size = min(6.0 if height == _HEIGHT else 4.5, 72 * width * inches / (0.62 * (len(text) + 0.5)))
    if size < 4.5:
        return
    axes.text(
        left + width / 2,
        bottom + height / 2,
        text,
        ha="center",
        va="center_baseline",
        fontsize=size,
        color="white" if _dark(color) else INK,
    )


def _color(schedule: Schedule, op: Op) -> str:
    """The kind's colour, paler on the second way, or with every further stage of a device."""
    color = _KINDS[op.kind][1]
    if schedule.name == "dualpipe":
        return _paler(color, 0.55 * (op.microbatch >= schedule.microbatches // 2))
    return _paler(
        color, 0.55 * (op.stage // schedule.devices) / max(1, schedule.stages // schedule.devices - 1)
    )


def _paler(color: str, share: float) -> str:
    from matplotlib.colors import to_hex, to_rgb

    red, green, blue = (c + (1 - c) * share for c in to_rgb(color))
    return to_hex((red, green, blue))


def _dark(color: str) -> bool:
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(color)
    return 0.3 * red + 0.59 * green + 0.11 * blue < 0.55


def _legend(axes: Axes, schedule: Schedule) -> None:
    from matplotlib.patches import Patch

    used = {op.kind for slots in schedule.slots for slot in slots for op in slot}
    handles = [Patch(color=color, label=name) for kind, (name, color) in _KINDS.items() if kind in used]
    if any(len(slot) == 2 for slots in schedule.slots for slot in slots):
        handles.append(Patch(facecolor="white", edgecolor=INK, label="run as a pair"))
    if schedule.name in _SECOND:
        handles.append(Patch(color=_paler(COLORS[0], 0.55), label=f"paler: {_SECOND[schedule.name]}"))
    handles.append(Patch(color=GRID, label="idle"))
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def draw_memory(
    devices: Sequence[Mapping[str, float]],
    path: Path,
    limit: float | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """A bar per device of its bytes, stacked by part in the order they are first named; `limit` is a line.

    names: what stands under the bars instead of the devices' numbers. Raises UserError where `figure` does.
    """
    parts = list(dict.fromkeys(part for device in devices for part in device))
    totals = [sum(device.values()) for device in devices]
    highest = max([*totals, limit or 0.0])
    scale, unit = (1e9, "GB") if highest >= 1e9 else (1e6, "MB")
    places = range(len(devices))
    with figure(path, min(14.0, max(6.0, 3 + 0.5 * len(devices))), 4.2) as canvas:
        axes = canvas.subplots()
        below = [0.0] * len(devices)
        for i, part in enumerate(parts):
            heights = [device.get(part, 0.0) / scale for device in devices]
            color = _paler(COLORS[i % len(COLORS)], 0.5 * (i // len(COLORS)))
            axes.bar(places, heights, 0.78, below, color=color, label=part, edgecolor="white", linewidth=0.5)
            below = [b + h for b, h in zip(below, heights, strict=True)]
        if limit is not None:
            axes.axhline(limit / scale, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            end_label(axes, f"{limit / scale:.3g} {unit}", limit / scale, INK)
        for i, total in enumerate(totals):
            over = limit is not None and total > limit
            axes.annotate(
                f"{total / scale:.3g}",
                (i, total / scale),
                (0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                color=COLORS[1] if over else INK,
                fontweight="bold" if over else "normal",
                bbox={"facecolor": "white", "linewidth": 0, "pad": 0.8},
            )
        axes.set_xlim(-0.6, len(devices) - 0.4)
        axes.set_ylim(0, 1.1 * highest / scale)
        axes.set_xticks(places, names)
        axes.set_xlabel("Device" if names is None else "")
        axes.set_ylabel(unit)
        axes.grid(visible=False, axis="x")
        fullest = max(places, key=totals.__getitem__)
        title(
            axes,
            "Memory per device",
            f"the most is {totals[fullest] / scale:.3g} {unit}, on device {fullest}" if names is None else "",
        )
        handles, labels = axes.get_legend_handles_labels()
        canvas.legend(handles[::-1], labels[::-1], loc="outside right center")
