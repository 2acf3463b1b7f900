"""From one format to another, tensor by tensor: a checkpoint larger than memory passes through.

Tensors that are in the wanted format already are copied bit for bit, so that converting FP8 to FP8 changes
nothing, and BF16 to BF16 only what was stored wider. What is not weights (tokenizer, chat template,
generation config, licence) goes along; code does not, nor does the `auto_map` in config.json that names it.

`bf16` and `fp8` are Hugging Face's formats, for all tools. `int8`, `int4` and `mixed` are our own (`writer.Packing`), as the
kernels want the bytes. They leave out the copies of embedding and head that the MTP modules of released files carry.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from dsv3.checkpoint.gguf_reader import GGUFCheckpoint, write_companions
from dsv3.checkpoint.hub import expand
from dsv3.checkpoint.names import Piece
from dsv3.checkpoint.progress import progress_bar
from dsv3.checkpoint.reader import CONFIG, INTEGERS, QUANTIZATION, Checkpoint, open_checkpoint
from dsv3.checkpoint.writer import (
    DTYPES,
    SHARD_SIZE,
    Packing,
    Target,
    encode,
    is_weights,
    plan,
    staged,
    write_config,
    write_weights,
)
from dsv3.config import read_json
from dsv3.errors import CheckpointError
from dsv3.kernels.packed import GROUPS, ROWS

To = Literal["bf16", "fp8", "int8", "int4", "mixed"]
_COMPANIONS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")
_LICENCES = ("LICENSE", "NOTICE")
_OF_ONE_MODEL = {
    "README.md",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
}
"""What must not stay beside another model's weights, and licences. Any other file in a folder that is replaced is somebody's own."""


def convert(
    source: str | Path,
    out: str | Path,
    to: To,
    progress: bool = False,
    max_shard_size: int = SHARD_SIZE,
    group: int = 32,
    zero_points: bool = False,
    importance: Mapping[str, Tensor] | None = None,
) -> tuple[str, ...]:
    """Write the checkpoint in `source` to the folder `out` as `to`, and return what there is to say of it.

    group, zero_points, importance: for integers, how many weights share a scale (32, 64 or 128), whether they have zero
    points, and what `calibrate` made. Keeps about one tensor in memory. A checkpoint at `out` is replaced, with all that
    belongs to it: nothing of its tokenizer, template or licence is left beside the new weights, other files stay.
    Raises CheckpointError or OSError, with nothing written, if the source is not whole or the target cannot be written.
    """
    if to not in get_args(To):
        raise CheckpointError(f"cannot convert to {to!r}: choose {', '.join(get_args(To))}")
    if group not in GROUPS:
        raise CheckpointError(f"group is {group}: choose {', '.join(map(str, GROUPS))}")
    source, out = expand(source), expand(out)
    checkpoint = open_checkpoint(source)
    if out.exists() and out.samefile(source):
        raise CheckpointError(f"{out} is the checkpoint to be converted: name another folder for the result")
    target = _target(checkpoint, to, group, zero_points)
    if isinstance(target, Packing):
        checkpoint.check_copies()  # they are left out

    def is_written(piece: Piece) -> bool:
        return piece.copy_of is None or not isinstance(target, Packing)

    pieces = list(checkpoint.pieces.values())  # in the model's order, whatever the source's is
    infos = [
        info
        for piece in pieces
        if is_written(piece)
        for info in plan(piece, checkpoint.tensors[piece.name].dtype, target)
    ]
    total = sum(map(checkpoint.stored_nbytes, checkpoint.pieces))

    def is_replaced(file: Path) -> bool:
        return is_weights(file) or file.name in _OF_ONE_MODEL or file.name.startswith(_LICENCES)

    with (
        staged(out, is_replaced) as folder,
        progress_bar(f"Converting to {to}", total, progress) as advance,
    ):

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for piece, stored in checkpoint.stream():
                if is_written(piece):
                    yield from encode(piece, stored, target, (importance or {}).get(piece.name))
                advance(stored.nbytes)

        write_config(folder, _config(checkpoint), DTYPES["bf16"], _quantization(checkpoint, to))
        if isinstance(checkpoint, GGUFCheckpoint):
            write_companions(source, folder)
        for file in _companions(source):
            shutil.copy(file, folder)
        write_weights(folder, infos, tensors(), max_shard_size)
    return tuple(_notes(pieces, target))


def _target(checkpoint: Checkpoint, to: To, group: int, zero_points: bool) -> Target:
    if to == "fp8":  # what is FP8 in part may be so on purpose: FP8 to FP8 quantises nothing more
        return "same" if _is_fp8(checkpoint) else to
    return to if to == "bf16" else Packing(to, group, zero_points)


def _is_fp8(checkpoint: Checkpoint) -> bool:
    return set(checkpoint.kinds.values()) == {"fp8"}


def _notes(pieces: list[Piece], target: Target) -> Iterator[str]:
    if not isinstance(target, Packing):
        return
    left = [p for p in pieces if p.packs and p.copy_of is None and target.bits(p) is None]
    if left:
        shape, others = " x ".join(map(str, left[0].shape)), len(left) - 1
        yield (
            f"{left[0].name} ({shape}) {f'and {others} others stay' if others else 'stays'} in bf16: only matrices of "
            f"{ROWS} n rows and {target.group} m columns are packed"
        )


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The source's own `config.json`, which must not count MTP modules that the folder lacks."""
    if isinstance(checkpoint, GGUFCheckpoint):
        return checkpoint.config.to_dict()
    values = read_json(checkpoint.folder / CONFIG, CheckpointError)
    counts = [key for key in ("num_nextn_predict_layers", "num_mtp_layers") if key in values]
    return values | {key: checkpoint.config.num_nextn_predict_layers for key in counts}


def _quantization(checkpoint: Checkpoint, to: To) -> dict[str, Any] | None:
    """Copied FP8 weights keep their own description, which may say more than ours."""
    if to == "fp8":
        return checkpoint.config.quantization_config if _is_fp8(checkpoint) else QUANTIZATION
    return None if to == "bf16" else INTEGERS


def _companions(folder: Path) -> list[Path]:
    if folder.is_file():  # GGUF, with all of it inside
        return []
    return [file for file in sorted(folder.iterdir()) if file.is_file() and _is_companion(file)]


def _is_companion(file: Path) -> bool:
    """Whether a file belongs to a model besides config and weights."""
    is_one = file.suffix in _COMPANIONS or file.name.startswith(_LICENCES)
    return is_one and not is_weights(file)
