"""`dsv3 convert`: a checkpoint in another format.

What is in the wanted format already stays bit for bit. Tokenizer, chat template and licence go along, code does
not. The folder appears once it is complete, and takes the place of a checkpoint that was there. GGUF is one file,
with tokenizer and chat template inside.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from dsv3.errors import UserError, size


def convert(
    model: Annotated[str, typer.Argument(help="nano, a checkpoint's folder, or a hub id.", metavar="MODEL")],
    out: Annotated[Path, typer.Argument(help="The folder to write; for GGUF, the file.", metavar="OUT")],
    to: Annotated[
        Literal["hf-bf16", "hf-fp8", "gguf-bf16", "gguf-f32"],
        typer.Option(
            help="hf: Hugging Face safetensors in bf16, or in FP8 with 128 x 128 block scales as released. "
            "gguf: one file for llama.cpp."
        ),
    ],
    mtp: Annotated[
        bool,
        typer.Option("--mtp/--no-mtp", help="GGUF: with the multi-token prediction modules, or without."),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Say what was written as JSON.")] = False,
) -> None:
    """Convert a checkpoint, tensor by tensor: it may be larger than memory."""
    from dsv3.checkpoint.convert import convert as run
    from dsv3.checkpoint.gguf import export_gguf
    from dsv3.checkpoint.hub import expand, resolve
    from dsv3.checkpoint.reader import open_checkpoint

    if not mtp and not to.startswith("gguf-"):
        raise UserError(f"--no-mtp is for GGUF: --to is {to}, which keeps the modules")
    out = expand(out)
    notes: tuple[str, ...] = ()
    try:
        if to == "gguf-bf16" or to == "gguf-f32":
            made = export_gguf(resolve(model), out, to, mtp, progress=sys.stderr.isatty())
            files, nbytes, notes = 1, made.nbytes, made.notes
        else:
            run(resolve(model), out, to, progress=sys.stderr.isatty())
            written = open_checkpoint(out)
            files, nbytes = len(written.shards), written.nbytes
    except KeyboardInterrupt as interrupt:
        print(": ".join(["dsv3: interrupted", *getattr(interrupt, "__notes__", [])]), file=sys.stderr)
        raise
    if as_json:
        facts = {"out": str(out), "format": to, "shards": files, "bytes": nbytes}
        print(json.dumps(facts | ({"notes": list(notes)} if notes else {})))
        return
    print(f"wrote {out} as {to}: {size(nbytes)} of weights in {'1 file' if files == 1 else f'{files} files'}")
    for note in notes:
        print(f"note: {note}")
