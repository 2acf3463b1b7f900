"""`dsv3 bench`: tokens a second, beside what this machine allows."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group

from dsv3.cli.bars import progress_bar
from dsv3.cli.tables import grid, noted, table
from dsv3.errors import UserError, size

if TYPE_CHECKING:  # these import torch, which --help does not wait for
    from dsv3.engine.bench import Ceilings, Work


def bench(
    model: Annotated[
        str, typer.Argument(help="nano, a checkpoint's folder, a GGUF file, or a hub id.", metavar="MODEL")
    ] = "nano",
    prompt: Annotated[
        int, typer.Option(help="Tokens of the prompt for prefill; 0: leave it out.", min=0)
    ] = 512,
    depths: Annotated[str, typer.Option(help="Tokens in the cache before decoding, with commas.")] = "0,1024",
    batch: Annotated[str, typer.Option(help="Sequences decoded at once, with commas.")] = "1,8",
    tokens: Annotated[int, typer.Option(help="Steps of decoding that are timed.", min=1)] = 32,
    repeats: Annotated[int, typer.Option(help="Prompts that are timed.", min=1)] = 3,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; default: one for a small model, else all cores.", min=1)
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    plot: Annotated[Path | None, typer.Option(help="Draw it here: .png, .svg or .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Measure prefill and decoding, as shares of what memory and arithmetic allow."""
    lengths, batches = _numbers("--depths", depths, 0), _numbers("--batch", batch, 1)
    if plot is not None:
        from dsv3.figures import check_picture

        check_picture(plot)
    import torch

    from dsv3.engine.bench import bench as run
    from dsv3.engine.bench import measure_ceilings, peak_memory
    from dsv3.engine.llm import LLM

    start = time.perf_counter()
    llm = LLM(model, dtype=dtype, device=device, speculation="off", progress=sys.stderr.isatty())
    llm.use_threads(threads)
    loaded = time.perf_counter() - start
    ceilings = measure_ceilings(llm.model.embed_tokens.weight.device)
    works = []
    total = (prompt > 0) + len(lengths) * len(batches)
    with progress_bar("Measuring") as advance:
        for work in run(llm.model, ceilings, prompt, lengths, batches, tokens, repeats):
            works.append(work)
            if advance is not None:
                advance(len(works), total)
    facts: dict[str, Any] = {
        "model": model,
        "threads": torch.get_num_threads(),
        "load_seconds": loaded,
        "peak_bytes": peak_memory(),
        "ceilings": asdict(ceilings),
        "results": [asdict(work) | {"share": work.share} for work in works],
    }
    if plot is not None:
        _draw(plot, model, works)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    Console(highlight=False).print(_shown(facts, ceilings, works))


def _numbers(option: str, text: str, least: int) -> list[int]:
    """Numbers with commas between them."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least:
        raise UserError(f"{option} is {text!r}: give whole numbers of at least {least}, such as {option} 1,8")
    return numbers


def _name(work: Work) -> str:
    if work.name == "prefill":
        return f"prefill {work.depth:,}"
    several = f" x {work.batch}" if work.batch > 1 else ""
    return f"decode{several} at {work.depth:,}"


def _shown(facts: dict[str, Any], ceilings: Ceilings, works: list[Work]) -> Group:
    rows = table(
        f"{facts['model']}, {facts['threads']} threads",
        "",
        "tokens/s",
        "±",
        "GB/s",
        "GFLOP/s",
        "of what is possible",
    )
    for work in works:
        rows.add_row(
            _name(work),
            f"{work.tokens_per_second:,.1f}",
            f"{work.spread:.0%}",
            f"{work.bytes_per_second / 1e9:.1f}",
            f"{work.ops_per_second / 1e9:,.0f}",
            f"{work.share:.0%}",
        )
    machine = grid(
        "This machine",
        {
            "reads": f"{ceilings.bandwidth / 1e9:.1f} GB/s",
            "multiplies": f"{ceilings.products / 1e9:,.0f} GFLOP/s in bf16, {ceilings.byte_products / 1e9:,.0f} with int8 weights",
            "loaded in": f"{facts['load_seconds']:.1f} s",
            "peak memory": size(facts["peak_bytes"]),
        },
    )
    note = "possible: the larger of (bytes of weights and cache / what memory gives) and (operations / rate of products)"
    return Group("", noted(rows, note), "", machine)


def _draw(path: Path, model: str, works: list[Work]) -> None:
    from dsv3.figures import COLORS, FAINT, figure, title

    with figure(path, 6.5, 0.42 * len(works) + 1.3) as canvas:
        axes = canvas.subplots()
        names = [_name(work) for work in works]
        axes.barh(names, [1.0] * len(works), color="#F3F4F6")
        axes.barh(names, [work.share for work in works], color=COLORS[0])
        for i, work in enumerate(works):
            axes.text(
                1.02, i, f"{work.tokens_per_second:,.0f} tokens/s", va="center", color=FAINT, fontsize=8
            )
        axes.set_xlim(0, 1.3)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25%", "50%", "75%", "100%"])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        title(axes, model, "share of what memory and arithmetic of this machine allow")
