"""From one format to another, tensor by tensor: a checkpoint larger than memory passes through.

Tensors that are in the wanted format already are copied bit for bit, so that converting FP8 to FP8 changes
nothing, and BF16 to BF16 only what was stored wider. What is not weights (tokenizer, chat template,
generation config, licence) goes along; code does not, nor does the `auto_map` in config.json that names it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from dsv3.checkpoint.hub import expand
from dsv3.checkpoint.progress import progress_bar
from dsv3.checkpoint.reader import CONFIG, QUANTIZATION, Checkpoint, open_checkpoint
from dsv3.checkpoint.writer import (
    DTYPES,
    SHARD_SIZE,
    Format,
    encode,
    is_weights,
    plan,
    staged,
    write_config,
    write_weights,
)
from dsv3.config import read_json
from dsv3.errors import CheckpointError

Target = Literal["hf-bf16", "hf-fp8"]
_FORMATS: dict[Target, Format] = {"hf-bf16": "bf16", "hf-fp8": "fp8"}
_COMPANIONS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")


def convert(
    source: str | Path, out: str | Path, to: Target, progress: bool = False, max_shard_size: int = SHARD_SIZE
) -> None:
    """Write the checkpoint in `source` to the folder `out` as `to`.

    Keeps about one tensor in memory. A checkpoint at `out` is replaced, with all that belongs to it: nothing of
    its tokenizer, template or licence is left beside the new weights, other files stay. Raises CheckpointError
    or OSError, with nothing written, if the source is not whole or the target cannot be written.
    """
    if to not in get_args(Target):
        raise CheckpointError(f"cannot convert to {to!r}: choose {' or '.join(get_args(Target))}")
    source, out = expand(source), expand(out)
    checkpoint = open_checkpoint(source)
    # What is FP8 in part may be so on purpose: FP8 to FP8 quantises nothing more.
    format = "same" if to == "hf-fp8" and checkpoint.quantized else _FORMATS[to]
    if out.exists() and out.samefile(source):
        raise CheckpointError(f"{out} is the checkpoint to be converted: name another folder for the result")
    names = [name for shard in checkpoint.stream_order().values() for name in shard]
    stored = [(checkpoint.pieces[name], checkpoint.tensors[name]) for name in names]
    infos = [info for piece, source_info in stored for info in plan(piece, source_info.dtype, format)]
    total = sum(source_info.nbytes for _, source_info in stored)

    def is_replaced(file: Path) -> bool:
        return is_weights(file) or _is_companion(file)

    with (
        staged(out, is_replaced) as folder,
        progress_bar(f"Converting to {to}", total, progress) as advance,
    ):

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for piece, tensor, scale in checkpoint.stream():
                yield from encode(piece, tensor, scale, format)
                advance(tensor.nbytes)

        write_config(folder, _config(checkpoint), DTYPES["bf16"], _quantization(checkpoint, to))
        for file in _companions(source):
            shutil.copy(file, folder)
        write_weights(folder, infos, tensors(), max_shard_size)


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The source's own `config.json`, which must not count MTP modules that the folder lacks."""
    values = read_json(checkpoint.folder / CONFIG, CheckpointError)
    counts = [key for key in ("num_nextn_predict_layers", "num_mtp_layers") if key in values]
    return values | {key: checkpoint.config.num_nextn_predict_layers for key in counts}


def _quantization(checkpoint: Checkpoint, to: Target) -> dict[str, Any] | None:
    """Copied FP8 weights keep their own description, which may say more than ours."""
    if to == "hf-bf16":
        return None
    return checkpoint.config.quantization_config if checkpoint.quantized else QUANTIZATION


def _companions(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.is_file() and _is_companion(file)]


def _is_companion(file: Path) -> bool:
    """Whether a file belongs to a model besides config and weights."""
    is_one = file.suffix in _COMPANIONS or file.name.startswith(("LICENSE", "NOTICE"))
    return is_one and not is_weights(file)
