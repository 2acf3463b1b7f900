"""Pictures of a run, from its `metrics.jsonl` alone: a finished run, one that was killed, or one that still goes on.

    plot_run(run / "metrics.jsonl", run / "plots")

writes `loss.png`, `schedule.png`, `balance.png` and `speed.png`; `plot_schedules` draws what is planned before the
first step is taken, such as the 14.8T tokens of DeepSeek-V3. x is tokens everywhere, because steps mean different
things when the batch grows. Single steps are noisy: they are drawn thin, and over them an average that reaches
back over a hundredth of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsv3.errors import UserError
from dsv3.figures import COLORS, FAINT, INK, amount, end_label, figure, title, token_axis
from dsv3.train.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Formatter

Numbers = NDArray[np.float64]

_WIDTH = 7.2  # inches
_SMOOTH = 100  # the average reaches back over this fraction of the steps
_LABELLED = 8  # layers up to which each has its name in the legend


def plot_run(metrics: Path, folder: Path) -> list[Path]:
    """Draw a run's pictures into a folder, which is made; returns the files.

    Raises UserError if the file holds no step, or pictures cannot be drawn here.
    """
    steps = read_metrics(metrics)
    if not steps:
        raise UserError(f"{metrics} holds no step: there is nothing to draw yet")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): name another folder") from None
    drawings = {
        "loss": _draw_loss,
        "schedule": _draw_schedule,
        "balance": _draw_balance,
        "speed": _draw_speed,
    }
    paths = []
    for name, draw in drawings.items():
        paths.append(folder / f"{name}.png")
        draw(steps, paths[-1])
    return paths


def plot_schedules(
    schedules: Sequence[tuple[str, Callable[[float], float]]],
    total_tokens: float,
    path: Path,
    name: str = "Schedules",
) -> Path:
    """Draw functions of tokens, one panel each, from 0 to `total_tokens`: the plan of a run that has not begun."""
    # Even steps, and close ones at the start, where a warm-up of a thousandth of the run must not look like a jump.
    tokens = np.union1d(np.linspace(0, total_tokens, 4001), np.geomspace(1e-6, 0.05, 400) * total_tokens)
    tokens = tokens[tokens < total_tokens]
    panels = [(label, np.array([function(float(t)) for t in tokens])) for label, function in schedules]
    _panels(path, name, f"planned, {amount(total_tokens)} tokens", tokens, panels, total_tokens)
    return path


# The pictures ------------------------------------------------------------------------------------------


def _draw_loss(steps: list[dict[str, Any]], path: Path) -> None:
    tokens = _column(steps, "tokens")
    with figure(path, _WIDTH, 4.6) as canvas:
        axes, below = canvas.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3.2, 1]})
        tops, ends = [], []
        for key, label, color in (("loss", "main", COLORS[0]), ("mtp", "MTP", COLORS[1])):
            values = _column(steps, key)
            if np.isnan(values).all():
                continue
            _noisy(axes, tokens, values, color)
            smooth = _smooth(values)
            tops.append(_top(values))
            ends.append((label, color, float(smooth[~np.isnan(smooth)][-1])))
        _end_labels(axes, ends, 0.07 * (max(tops) - _low(axes)))
        axes.set_ylim(_low(axes), max(tops))
        axes.set_ylabel("Loss, nats per token")
        _noisy(below, tokens, _column(steps, "norm"), COLORS[6])
        below.set_yscale("log")
        below.set_ylabel("Gradient norm")
        token_axis(below, tokens[-1])
        title(axes, "Training loss", _progress_note(steps))


def _draw_schedule(steps: list[dict[str, Any]], path: Path) -> None:
    tokens = _column(steps, "tokens")
    started = np.concatenate(([0.0], tokens[:-1]))  # a step uses the values at the tokens before it
    panels = [
        ("Learning rate", _column(steps, "lr")),
        ("Batch, sequences", _column(steps, "batch")),
        ("MTP weight λ", _column(steps, "mtp_weight")),
        ("Bias speed γ", _column(steps, "gamma")),
    ]
    _panels(path, "Schedules", _progress_note(steps), started, panels, tokens[-1])


def _draw_balance(steps: list[dict[str, Any]], path: Path) -> None:
    tokens = _column(steps, "tokens")
    layers = sorted({int(layer) for s in steps for layer in (s.get("loads") or {})})
    dropped = int(np.nansum(_column(steps, "dropped")))
    with figure(path, _WIDTH, 4.8) as canvas:
        axes, below = canvas.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [1.6, 1]})
        if layers:
            _draw_layers(axes, steps, layers)
        else:
            _noisy(axes, tokens, _column(steps, "load"), COLORS[0])
        axes.axhline(1, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_ylabel("Busiest expert / mean")
        axes.set_ylim(0.9 if axes.get_ylim()[1] < 4 else 0, None)
        balance = _column(steps, "balance")
        if layers:
            balance = balance / np.array([len(s.get("loads") or layers) for s in steps])
        _noisy(below, tokens, balance, COLORS[2])
        below.set_ylabel("Balance loss\nper layer" if layers else "Balance loss")
        if layers:
            below.axhline(1, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
        token_axis(below, tokens[-1])
        tail = "no token dropped" if not dropped else f"{amount(dropped)} tokens dropped"
        title(axes, "Balance of the experts", f"dashed: an even load; {tail}")


def _draw_layers(axes: Axes, steps: list[dict[str, Any]], layers: list[int]) -> None:
    """The load of each layer, light for the first and dark for the last."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    shades = colormaps["viridis"](np.linspace(0.9, 0.05, len(layers)))
    tokens = _column(steps, "tokens")
    for layer, shade in zip(layers, shades, strict=True):
        loads = np.array([_number((s.get("loads") or {}).get(str(layer))) for s in steps])
        axes.plot(tokens, _smooth(loads), color=shade, linewidth=1.2, label=f"layer {layer}")
    if len(layers) <= _LABELLED:
        axes.legend(ncols=min(4, len(layers)), loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
        return
    scale = ScalarMappable(Normalize(layers[0], layers[-1]), ListedColormap(list(shades)))
    bar = axes.figure.colorbar(scale, ax=axes, pad=0.01, aspect=30, label="Layer")
    bar.outline.set_visible(False)


def _draw_speed(steps: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    tokens = _column(steps, "tokens")
    panels: list[tuple[str, Numbers, Formatter]] = [
        ("Tokens per second", _column(steps, "tokens_per_second"), FuncFormatter(lambda n, _: amount(n)))
    ]
    share = _column(steps, "flops_share")
    if not np.isnan(share).all():
        panels.append(("Share of matmul peak", share, PercentFormatter(1.0, decimals=0)))
    with figure(path, _WIDTH, 1.1 + 1.9 * len(panels)) as canvas:
        each: list[Axes] = list(canvas.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0])
        for axes, (label, values, form), color in zip(each, panels, COLORS, strict=False):
            _noisy(axes, tokens, values, color)
            axes.set_ylabel(label)
            axes.set_ylim(0, 1.15 * float(np.nanpercentile(values, 99.5)) or 1)
            axes.yaxis.set_major_formatter(form)
        token_axis(each[-1], tokens[-1])
        title(each[0], "Speed", _progress_note(steps))


def _panels(
    path: Path, name: str, note: str, tokens: Numbers, panels: Sequence[tuple[str, Numbers]], total: float
) -> None:
    """Small pictures over one another that share their tokens; each level that lasts says its value."""
    from matplotlib.ticker import FuncFormatter

    with figure(path, _WIDTH, 0.9 + 1.3 * len(panels)) as canvas:
        each: list[Axes] = list(canvas.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0])
        for axes, (label, values), color in zip(each, panels, COLORS * len(panels), strict=False):
            ends, held = np.append(tokens, total), np.append(values, values[-1])
            axes.plot(ends, held, color=color, drawstyle="steps-post")
            axes.fill_between(ends, held, step="post", color=color, alpha=0.08, linewidth=0)
            top = float(np.nanmax(values))
            axes.set_ylim(0, 1.3 * top if top > 0 else 1)
            axes.set_ylabel(label)
            axes.locator_params(axis="y", nbins=3)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda n, _: _exact(n)))
            _name_levels(axes, ends, held, color)
        token_axis(each[-1], total)
        title(each[0], name, note)


def _name_levels(axes: Axes, tokens: Numbers, values: Numbers, color: str) -> None:
    """Write values over the levels that last, beside the end, and where a ramp begins."""
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7.5, "color": INK}
    levels = _levels(tokens, values, 0.02 * tokens[-1])
    for start, end, value in levels:
        if end < tokens[-1]:
            axes.annotate(_exact(value), ((start + end) / 2, value), (0, 3), ha="center", **style)
    if values[0] > 0 and not (levels and levels[0][0] == tokens[0]):
        axes.annotate(_exact(values[0]), (tokens[0], values[0]), (9, 0), va="center", **style)
    end_label(axes, _exact(values[-1]), values[-1], color)


# What they are made of ---------------------------------------------------------------------------------


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _column(steps: list[dict[str, Any]], key: str) -> Numbers:
    return np.array([_number(s.get(key)) for s in steps])


def _smooth(values: Numbers) -> Numbers:
    """An exponential average over a hundredth of the run, at its start over less; what is missing stays missing."""
    longest = max(1.0, len(values) / _SMOOTH)
    out, seen, average = np.full(len(values), math.nan), 0, 0.0
    for i, value in enumerate(values):
        if math.isnan(value):
            continue
        seen += 1
        average += (value - average) / min(longest, 1 + seen / 5) if seen > 1 else value
        out[i] = average
    return out


def _noisy(axes: Axes, tokens: Numbers, values: Numbers, color: str) -> None:
    """Single steps thin, their average over them."""
    axes.plot(tokens, values, color=color, linewidth=0.6, alpha=0.3)
    axes.plot(tokens, _smooth(values), color=color)


def _top(values: Numbers) -> float:
    """Where to cut a loss curve off: it starts several times higher than where it is worth looking at."""
    later = values[len(values) // 30 :]
    return 1.02 * float(np.nanmax(later if not np.isnan(later).all() else values))


def _low(axes: Axes) -> float:
    return max(0.0, axes.get_ylim()[0])


def _end_labels(axes: Axes, ends: list[tuple[str, str, float]], apart: float) -> None:
    """Each curve's name and last value beside its end, moved apart where they would cover one another."""
    below = -math.inf
    for label, color, value in sorted(ends, key=lambda end: end[2]):
        below = max(value, below + apart)
        end_label(axes, f"{label} {value:.2f}", below, color)


def _levels(tokens: Numbers, values: Numbers, shortest: float) -> list[tuple[float, float, float]]:
    """Stretches on which a schedule stands still: start, end, value."""
    changes = np.flatnonzero(~np.isclose(values[1:], values[:-1], rtol=1e-9, atol=0)) + 1
    edges = [0, *changes.tolist(), len(values) - 1]
    spans = [(tokens[a], tokens[b], values[a]) for a, b in zip(edges, edges[1:], strict=False) if b > a]
    return [(float(a), float(b), float(v)) for a, b, v in spans if b - a >= shortest]


def _exact(value: float) -> str:
    """2.2e-4, 15,360, 0.3."""
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{value:.4g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1e}".replace("e-0", "e-")


def _progress_note(steps: list[dict[str, Any]]) -> str:
    last = steps[-1]
    return f"{last['step']:,} steps, {amount(_number(last.get('tokens')))} tokens"
