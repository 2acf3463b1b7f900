"""`dsv3 convert`: a checkpoint in another format.

What is in the wanted format already stays bit for bit. Tokenizer, chat template and licence go along, code does
not. The folder appears once it is complete, and takes the place of a checkpoint that was there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from dsv3.errors import size


def convert(
    model: Annotated[str, typer.Argument(help="nano, a checkpoint's folder, or a hub id.", metavar="MODEL")],
    out: Annotated[Path, typer.Argument(help="The folder to write.", metavar="OUT")],
    to: Annotated[
        Literal["hf-bf16", "hf-fp8"],
        typer.Option(
            help="Hugging Face safetensors in bf16, or in FP8 with 128 x 128 block scales as released."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Say what was written as JSON.")] = False,
) -> None:
    """Convert a checkpoint, tensor by tensor: it may be larger than memory."""
    from dsv3.checkpoint.convert import convert as run
    from dsv3.checkpoint.hub import expand, resolve
    from dsv3.checkpoint.reader import open_checkpoint

    out = expand(out)
    try:
        run(resolve(model), out, to, progress=sys.stderr.isatty())
    except KeyboardInterrupt as interrupt:
        print(": ".join(["dsv3: interrupted", *getattr(interrupt, "__notes__", [])]), file=sys.stderr)
        raise
    written = open_checkpoint(out)
    facts = {"out": str(out), "format": to, "shards": len(written.shards), "bytes": written.nbytes}
    if as_json:
        print(json.dumps(facts))
    else:
        files = "1 file" if len(written.shards) == 1 else f"{len(written.shards)} files"
        print(f"wrote {out} as {to}: {size(written.nbytes)} of weights in {files}")
