"""`dsv3 eval`: what a model can do, task by task."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsv3.cli.bars import progress_bar

if TYPE_CHECKING:  # these import torch, which --help does not wait for
    from dsv3.engine.llm import LLM
    from dsv3.eval.loads import LoadsResult
    from dsv3.eval.needle import NeedleResult


@dataclass(frozen=True)
class Settings:
    """What the flags say; each task takes from them what it knows."""

    model: str
    lengths: tuple[int, ...] | None
    depths: int
    samples: int
    seed: int
    raw: bool
    haystack: Path | None
    data: Path | None
    window: int
    text: Path | None


@dataclass(frozen=True)
class Report:
    """What came of a task, in the three forms in which it may be wanted."""

    facts: dict[str, Any]
    shown: RenderableType
    plot: Callable[[Path], None]


def _needle(llm: LLM, settings: Settings) -> Report:
    from dsv3.eval.haystack import built_in, from_file
    from dsv3.eval.needle import even_depths, plot, sweep

    filler = built_in if settings.haystack is None else from_file(settings.haystack)
    with progress_bar("needle") as progress:
        result = sweep(
            llm,
            settings.lengths,
            even_depths(settings.depths),
            settings.samples,
            settings.seed,
            raw=settings.raw,
            filler=filler,
            progress=progress,
        )
    haystack = None if settings.haystack is None else str(settings.haystack)
    facts = result.to_dict() | {"haystack": haystack}
    return Report(facts, _needle_table(result), lambda path: plot(result, path, settings.model))


def _bits_per_byte(llm: LLM, settings: Settings) -> Report:
    from dsv3.eval.bits import bits_per_byte, plot

    if settings.data is None:
        raise typer.BadParameter("bits-per-byte needs the folder of held-out text", param_hint="--data")
    with progress_bar("bits per byte") as progress:
        bits = bits_per_byte(llm, settings.data, settings.window, progress)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("held-out text")
    table.add_column("bits per byte", justify="right")
    for kind, value in bits.items():
        table.add_row(kind, f"{value:.3f}")
    facts = {"data": str(settings.data), "window": settings.window, "bits_per_byte": bits}
    return Report(facts, table, lambda path: plot(bits, path, settings.model))


def _loads(llm: LLM, settings: Settings) -> Report:
    from dsv3.eval.loads import expert_loads, plot

    if settings.text is None:
        raise typer.BadParameter("loads needs a text to read", param_hint="--text")
    with progress_bar("expert loads") as progress:
        result = expert_loads(llm, settings.text, settings.window, progress)
    facts = {"text": str(settings.text)} | result.to_dict()
    return Report(facts, _loads_table(result), lambda path: plot(result, path, settings.model))


TASKS: dict[str, Callable[[LLM, Settings], Report]] = {
    "needle": _needle,
    "bits-per-byte": _bits_per_byte,
    "loads": _loads,
}


def _tasks(value: str) -> list[str]:
    names = [name.strip() for name in value.split(",")]
    for name in names:
        if name not in TASKS:
            raise typer.BadParameter(
                f"{name!r} is none of the tasks: {', '.join(TASKS)}", param_hint="--tasks"
            )
    return list(dict.fromkeys(names))


def _lengths(value: str) -> tuple[int, ...]:
    try:
        lengths = tuple(int(item) for item in value.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{value!r} must be numbers of tokens, like 512,1024", param_hint="--lengths"
        ) from None
    if min(lengths) < 1:
        raise typer.BadParameter(f"{min(lengths)} must be at least 1", param_hint="--lengths")
    return lengths


def evaluate(
    model: Annotated[
        str, typer.Argument(help="nano, a checkpoint's folder, a GGUF file, or a hub id.", metavar="MODEL")
    ],
    tasks: Annotated[str, typer.Option(help=f"What to measure, with commas between: {', '.join(TASKS)}.")],
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a text, answer included: 512,1024. Default: 512 and its doubles.", metavar="N,N"
        ),
    ] = None,
    depths: Annotated[int, typer.Option(min=1, help="Places of the needle from begin to end.")] = 11,
    samples: Annotated[int, typer.Option(min=1, help="Texts for each length and depth.")] = 10,
    seed: Annotated[int, typer.Option(help="The same seed asks the same questions.")] = 0,
    haystack: Annotated[
        Path | None,
        typer.Option(help="Hide the needle in this text instead of the built-in one.", metavar="FILE.txt"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="bits-per-byte: what `dsv3 data build` wrote, for its held-out text.", metavar="DATA"
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="bits-per-byte, loads: tokens seen at most.")] = 512,
    text: Annotated[
        Path | None, typer.Option(help="loads: the text to read, UTF-8.", metavar="FILE.txt")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Let it continue plain text: for base models, which do not chat.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the result, as .png, .svg or .pdf.", metavar="FILE.png")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or one GPU such as cuda:0.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Measure a model: how well it finds one sentence in a long text (needle) or predicts text (bits-per-byte), and
    how often it chooses each of its experts (loads)."""
    names = _tasks(tasks)
    settings = Settings(
        model,
        None if lengths is None else _lengths(lengths),
        depths,
        samples,
        seed,
        raw,
        haystack,
        data,
        window,
        text,
    )

    from dsv3.engine.llm import LLM
    from dsv3.figures import check_picture

    if plot is not None:
        check_picture(plot)
    llm = LLM(model, dtype=dtype, device=device, progress=sys.stderr.isatty())
    llm.use_threads()
    reports = {name: TASKS[name](llm, settings) for name in names}
    for name, report in reports.items():
        if plot is not None:
            report.plot(plot if len(reports) == 1 else plot.with_stem(f"{plot.stem}-{name}"))
    if as_json:
        facts = {name: report.facts for name, report in reports.items()}
        print(json.dumps({"model": model, "tasks": facts}, indent=2))
        return
    for report in reports.values():
        Console(highlight=False).print("", report.shown)


def _needle_table(result: NeedleResult) -> Group:
    """Depths downwards, lengths to the right; in each cell both rates."""
    form = "plain text" if result.raw else "chat format"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("depth", justify="right")
    for length in result.lengths:
        table.add_column(f"{length:,}", justify="right")
    rates = zip(result.depths, result.table("exact"), result.table("first"), strict=True)
    for depth, exact, first in rates:
        cells = (f"{e:.0%} / {f:.0%}" for e, f in zip(exact, first, strict=True))
        table.add_row(f"{depth:.0%}", *cells)
    exact_mean, first_mean = result.mean("exact"), result.mean("first")
    return Group(
        Text(f"Needle in a haystack: {form}, {result.samples} texts per cell", style="bold"),
        "",
        table,
        "",
        f"answer has the number   {exact_mean:6.1%}   (chance 0.01%)",
        f"number ranks first      {first_mean:6.1%}   (chance {result.chance:.0%}, of {1 + result.distractors})",
        f"margin                  {result.mean('margin'):+6.2f}   nats per token (chance 0)",
    )


def _loads_table(result: LoadsResult) -> Group:
    """How uneven each layer is."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("layer", "busiest expert", "load", "least", "never chosen"):
        table.add_column(column, justify="right")
    for layer in result.layers:
        loads = result.over_mean(layer)
        unused = f"{loads.count(0)} of {len(loads)}"
        busiest = loads.index(max(loads))
        table.add_row(str(layer), str(busiest), f"{max(loads):.2f}", f"{min(loads):.2f}", unused)
    heading = f"Loads of the experts over their mean: {result.tokens:,} tokens, {result.window} at a time"
    return Group(Text(heading, style="bold"), "", table)
