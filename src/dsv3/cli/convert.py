"""`dsv3 convert`: a checkpoint in another format.

What is in the wanted format already stays bit for bit. Tokenizer, chat template and licence go along, code does
not. The folder appears once it is complete, and takes the place of a checkpoint that was there. bf16 and fp8 are for all
tools; int8, int4 and mixed (experts in int4, the rest in int8) are dsv3's own, and can be calibrated on text. GGUF is one
file in llama.cpp's number formats, with tokenizer and chat template inside, and may be what is converted, too. A report tells how far the result is from its source.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from dsv3.cli.bars import progress_bar
from dsv3.cli.tables import table
from dsv3.errors import UserError, size
from dsv3.gguf import Quant

if TYPE_CHECKING:  # these import torch, which --help does not wait for
    from torch import Tensor

    from dsv3.eval.divergence import Divergence, Reading

_INTEGERS = ("int8", "int4", "mixed")


def convert(
    model: Annotated[
        str, typer.Argument(help="nano, a checkpoint's folder, a GGUF file, or a hub id.", metavar="MODEL")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write; for GGUF, the file.", metavar="OUT")],
    to: Annotated[
        Literal["bf16", "fp8", "int8", "int4", "mixed", "gguf"],
        typer.Option(
            help="bf16, or fp8 with 128 x 128 block scales as released: for all tools. int8, int4, mixed (experts "
            "int4, the rest int8): for dsv3. gguf: one file for llama.cpp."
        ),
    ],
    quant: Annotated[
        Quant | None,
        typer.Option(
            help="GGUF: the number format, or llama.cpp's mix of them; bf16 by default.", show_default=False
        ),
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(
            help="Integers: how many weights share a scale: 32 (the default), 64 or 128.", show_default=False
        ),
    ] = None,
    zero_points: Annotated[
        bool, typer.Option("--zero-points", help="Integers: groups need not be centred on zero.")
    ] = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="Integers: mind what the model multiplies by when it reads this text.", metavar="TEXT"
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Compare the result with the source on this text, a file or a folder.", metavar="TEXT"
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Pieces of a text to read at most; 64 by default.", show_default=False),
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a piece; 512 by default.", show_default=False)
    ] = None,
    mtp: Annotated[
        bool,
        typer.Option("--mtp/--no-mtp", help="GGUF: with the multi-token prediction modules, or without."),
    ] = True,
    ollama: Annotated[
        bool, typer.Option("--ollama", help="GGUF: write a Modelfile beside it, for Ollama.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Say what was written as JSON.")] = False,
) -> None:
    """Convert a checkpoint, tensor by tensor: it may be larger than memory (but not to calibrate or report)."""
    from dsv3.checkpoint.convert import convert as run
    from dsv3.checkpoint.gguf import export_gguf
    from dsv3.checkpoint.hub import expand, resolve
    from dsv3.checkpoint.reader import open_checkpoint

    for flag, given in (
        ("--group", group is not None),
        ("--zero-points", zero_points),
        ("--calibrate", calibrate is not None),
    ):
        if given and to not in _INTEGERS:
            raise UserError(f"{flag} is for integers: --to is {to}")
    for flag, number in (("--samples", samples), ("--length", length)):
        if number is not None and calibrate is None and report is None:
            raise UserError(f"{flag} is of a text: give one to --calibrate or --report")
    if quant is not None and to != "gguf":
        raise UserError(f"--quant is for GGUF: --to is {to}")
    if ollama and to != "gguf":
        raise UserError(f"--ollama is for GGUF: --to is {to}")
    if not mtp and to != "gguf":
        raise UserError(f"--no-mtp is for GGUF: --to is {to}, which keeps the modules")
    samples, length, group = samples or 64, length or 512, 32 if group is None else group
    out = expand(out)
    notes: tuple[str, ...] = ()
    compared: Divergence | None = None
    there = expand(out)
    replaces = there.is_file() or (there / "config.json").is_file()
    try:
        source = resolve(model)
        before = None if report is None else _read(source, _ids(source, report, samples, length))
        if to == "gguf":
            made = export_gguf(source, out, quant or "bf16", mtp, ollama, progress=sys.stderr.isatty())
            files, nbytes, notes = 1, made.nbytes, made.notes
        else:
            importance = None if calibrate is None else _importance(source, calibrate, samples, length)
            notes = run(
                source,
                out,
                to,
                progress=sys.stderr.isatty(),
                group=group,
                zero_points=zero_points,
                importance=importance,
            )
            written = open_checkpoint(out)
            files, nbytes = len(written.shards), written.nbytes
        if before is not None:
            from dsv3.eval.divergence import compare

            compared = compare(before, _read(out, before.ids))
    except KeyboardInterrupt as interrupt:
        print(": ".join(["dsv3: interrupted", *getattr(interrupt, "__notes__", [])]), file=sys.stderr)
        raise
    if as_json:
        facts: dict[str, Any] = {"out": str(out), "format": to, "shards": files, "bytes": nbytes}
        if to == "gguf":
            facts["quant"] = quant or "bf16"
        if notes:
            facts["notes"] = list(notes)
        if compared is not None:
            facts["report"] = {"text": str(report)} | compared.to_dict()
        print(json.dumps(facts))
        return
    form = f"gguf {quant or 'bf16'}" if to == "gguf" else to
    place = ", in the place of what was there" if replaces else ""
    print(
        f"wrote {out} as {form}{place}: {size(nbytes)} of weights in {'1 file' if files == 1 else f'{files} files'}"
    )
    for note in notes:
        print(f"note: {note}")
    if compared is not None:
        Console(highlight=False).print("", _table(compared))


def _ids(folder: Path, text: Path, samples: int, length: int) -> Tensor:
    """A text in a model's tokens, [samples, length]. Raises UserError for a length that it is not made for."""
    from dsv3.checkpoint.reader import read_config
    from dsv3.text.tokenizer import Tokenizer
    from dsv3.text.windows import windows

    longest = read_config(folder).max_position_embeddings
    if length > longest:
        raise UserError(f"--length is {length}: the model reads {longest} tokens at most")
    return windows(text, Tokenizer.from_pretrained(folder), samples, length)


def _importance(folder: Path, text: Path, samples: int, length: int) -> dict[str, Tensor]:
    from dsv3.checkpoint.calibrate import calibrate
    from dsv3.checkpoint.pretrained import DeepseekV3
    from dsv3.engine.machine import choose_device

    ids = _ids(folder, text, samples, length)
    model = DeepseekV3.from_pretrained(folder, device=choose_device("auto"), progress=sys.stderr.isatty())
    with progress_bar("Calibrating") as progress:
        return calibrate(model, ids, progress)


def _read(folder: Path, ids: Tensor) -> Reading:
    from dsv3.engine.machine import choose_device
    from dsv3.eval.divergence import read

    with progress_bar(f"Reading with {folder.name}") as progress:
        return read(folder, ids, choose_device("auto"), progress)


def _table(found: Divergence) -> Table:
    made = table(f"Against the source, on {found.tokens:,} tokens", "", "source", "result")
    made.add_row("perplexity", f"{found.source_perplexity:.3f}", f"{found.perplexity:.3f}")
    made.add_row("divergence, nats per token", "", f"{found.divergence:.4f}")
    made.add_row("same likeliest token", "", f"{found.agreement:.1%}")
    return made
