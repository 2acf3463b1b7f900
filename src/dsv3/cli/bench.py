"""`dsv3 bench`: tokens a second, beside what this machine allows."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group

from dsv3.cli.bars import progress_bar
from dsv3.cli.tables import grid, noted, table
from dsv3.cli.units import number_or_word
from dsv3.errors import UserError, size

_NOTE = (
    "roofline: the larger of (bytes of weights and cache that a step must read / what memory gives) and (operations / "
    "rate of products)"
)


def bench(
    model: Annotated[
        str, typer.Argument(help="nano, a checkpoint's folder, a GGUF file, or a hub id.", metavar="MODEL")
    ] = "nano",
    prompt: Annotated[
        int, typer.Option(help="Tokens of the prompt for prefill; 0: leave it out.", min=0)
    ] = 512,
    depths: Annotated[
        str | None,
        typer.Option(
            help="Tokens in the cache before decoding, with commas.",
            show_default="0,1024,4096, those that fit the context",
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Sequences decoded at once, with commas.")] = "1,8",
    tokens: Annotated[int, typer.Option(help="Steps of decoding in each repetition.", min=1)] = 32,
    repeats: Annotated[int, typer.Option(help="How often each is timed.", min=1)] = 3,
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads; default: all cores, but one for decoding with a small model.", min=1),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    speculation: Annotated[str, typer.Option(help="Tokens guessed ahead: auto, off, or a number.")] = "off",
    plot: Annotated[Path | None, typer.Option(help="Draw it here: .png, .svg or .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Measure prefill and decoding, as shares of what memory and arithmetic allow."""
    lengths = None if depths is None else _numbers("--depths", depths, 0)
    batches = _numbers("--batch", batch, 1)
    if plot is not None:
        from dsv3.figures import check_picture

        check_picture(plot)
    import torch

    from dsv3.engine.bench import bench as run
    from dsv3.engine.bench import first_token, peak_memory
    from dsv3.engine.ceilings import measure_ceilings
    from dsv3.engine.llm import LLM
    from dsv3.kernels.native import instructions

    kernels = instructions()  # which compiles them, if they are not yet: not a part of loading
    guesses: Any = number_or_word(speculation)
    every = threads or torch.get_num_threads()
    start = time.perf_counter()
    llm = LLM(
        model, dtype=dtype, device=device, speculation=guesses, max_num_seqs=1, progress=sys.stderr.isatty()
    )
    llm.use_threads(threads)
    weights, decoding, place = llm.model, torch.get_num_threads(), llm.model.embed_tokens.weight.device
    del llm  # and its cache
    first_token(weights)
    loaded = time.perf_counter() - start

    if lengths is None:
        room = weights.config.max_position_embeddings - 2 * (tokens * repeats + 8)
        lengths = [depth for depth in (0, 1024, 4096) if not depth or depth <= room]
    works, total = [], (prompt > 0) + len(lengths) * len(batches)
    with progress_bar("Measuring") as advance:
        for work in run(weights, prompt, lengths, batches, tokens, repeats, guesses, every):
            works.append(work)
            if advance is not None:
                advance(len(works), total)
    peak = peak_memory(place)  # before the ceilings, which take some themselves
    torch.set_num_threads(every)
    ceilings = measure_ceilings(place)
    facts: dict[str, Any] = {
        "model": model,
        "device": str(place) if place.type == "cpu" else torch.cuda.get_device_name(place),
        "dtype": str(weights.embed_tokens.weight.dtype).removeprefix("torch."),
        "threads": {"decode": decoding, "prefill": every},
        "native_kernels": kernels,
        "speculation": guesses,
        "load_seconds": loaded,
        "peak_bytes": peak,
        "ceilings": vars(ceilings),
        "results": [work.facts(ceilings) for work in works],
    }
    if plot is not None:
        _draw(plot, facts)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        Console(highlight=False).print(_shown(facts))


def _numbers(option: str, text: str, least: int) -> list[int]:
    """Numbers with commas between them."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least:
        raise UserError(f"{option} is {text!r}: give whole numbers of at least {least}, such as {option} 1,8")
    return numbers


def _name(work: dict[str, Any]) -> str:
    if work["name"] == "prefill":
        return f"prefill {work['depth']:,}"
    several = f" x {work['batch']}" if work["batch"] > 1 else ""
    return f"decode{several} at {work['depth']:,}"


def _speed(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"


def _ops(number: float) -> str:
    return f"{number / 1e12:.2f}" if number >= 1e10 else f"{number / 1e12:.3f}"


def _where(facts: dict[str, Any]) -> str:
    """What it runs on."""
    few, every = facts["threads"]["decode"], facts["threads"]["prefill"]
    threads = f"{every} thread{'s' * (every > 1)}" + (f", {few} for decoding" if few != every else "")
    return f"{facts['model']}, {facts['dtype']}, {threads if facts['device'] == 'cpu' else facts['device']}"


def _shown(facts: dict[str, Any]) -> Group:
    rows = table(_where(facts), "", "tokens/s", "±", "GB/s", "TFLOP/s", "of roofline", "bound by")
    for work in facts["results"]:
        rows.add_row(
            _name(work),
            _speed(work["tokens_per_second"]),
            f"{work['spread']:.0%}",
            f"{work['bytes_per_second'] / 1e9:.1f}",
            _ops(work["ops_per_second"]),
            f"{work['share']:.0%}",
            work["bound_by"],
        )
    most = facts["ceilings"]
    machine = grid(
        "This machine",
        {
            "reads": f"{most['bandwidth'] / 1e9:.1f} GB/s",
            "multiplies": f"{_ops(most['products'])} TFLOP/s in bf16 (torch: {_ops(most['torch_products'])}), "
            f"{_ops(most['byte_products'])} in int8",
            "first token": f"{facts['load_seconds']:.1f} s after the start of loading",
            "peak memory": size(facts["peak_bytes"]),
        },
    )
    return Group("", noted(rows, _NOTE), "", machine)


def _draw(path: Path, facts: dict[str, Any]) -> None:
    """Tokens a second, each bar as long as its share of the roofline."""
    from dsv3.figures import COLORS, FAINT, INK, figure, title

    works = facts["results"]
    with figure(path, 7, 0.42 * len(works) + 1.3) as canvas:
        axes = canvas.subplots()
        names = [_name(work) for work in works]
        axes.barh(names, [1.0] * len(works), color="#F3F4F6")
        colors = [COLORS[0] if work["name"] == "decode" else COLORS[2] for work in works]
        axes.barh(names, [min(work["share"], 1.0) for work in works], color=colors)
        for i, work in enumerate(works):
            most = f"tokens/s, {work['share']:.0%} of {_speed(work['roofline'])}; {work['bound_by']}"
            at: dict[str, Any] = {"va": "center", "fontsize": 8}
            axes.text(
                1.17, i, _speed(work["tokens_per_second"]), color=INK, ha="right", fontweight="bold", **at
            )
            axes.text(1.2, i, most, color=FAINT, **at)
        axes.set_xlim(0, 1.95)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25%", "50%", "75%", "roofline"])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.spines["bottom"].set_bounds(0, 1)
        most = facts["ceilings"]
        machine = f"memory {most['bandwidth'] / 1e9:.1f} GB/s, {_ops(most['products'])} TFLOP/s in bf16"
        title(axes, _where(facts), f"{machine}, {_ops(most['byte_products'])} in int8")
