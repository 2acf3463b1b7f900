"""Writing a checkpoint folder as Hugging Face has it, whole or not at all.

Three formats: `bf16` and `fp8` are the released ones, `fp32` loses nothing of a model in training. In all
of them the correction biases keep their dtype. FP8 quantises exactly what the released files do
(`Piece.in_fp8`). A fourth, `same`, keeps each float and FP8 tensor as it is. `Packing` is for our own files, with matrices
in integers as they lie in memory (`dsv3.kernels.packed`).

Everything goes into a new folder beside the target, which takes the target's place once it is complete.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from dsv3.checkpoint.hub import expand
from dsv3.checkpoint.names import HEAD, INTEGER_SCALE_SUFFIX, SCALE_SUFFIX, ZERO_SUFFIX, Piece
from dsv3.checkpoint.reader import CONFIG, FP8, INDEX, SINGLE, Stored
from dsv3.checkpoint.shards import TensorInfo, write_shards
from dsv3.errors import CheckpointError, UserError, size
from dsv3.files import write_whole
from dsv3.kernels.packed import Packed, dequantize, integer_shapes, packs
from dsv3.quant.fp8 import quantize_blocks, scale_shape
from dsv3.quant.integers import quantize

Format = Literal["bf16", "fp8", "fp32"]
SHARD_SIZE = 5_000_000_000
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp32": torch.float32}
"""Of what a format does not quantise."""
_RESTATED = ("torch_dtype", "dtype", "quantization_config", "auto_map")
"""Keys of `config.json` that are not copied; `dtype` is a newer name of `torch_dtype`."""


@dataclass(frozen=True)
class Packing:
    """Integer formats: which matrices take how many bits, and how many weights share a scale."""

    mix: Literal["int8", "int4", "mixed"]
    """`mixed`: routed experts, nearly all weights of a large model, in four bits, what every token goes through in eight."""
    group: int = 32
    zero_points: bool = False

    def bits(self, piece: Piece) -> int | None:
        """Of a tensor's codes; None if it stays in bf16. The head, which decides between tokens, has eight in any mix."""
        if not piece.packs or piece.copy_of is not None:
            return None
        out, width = piece.shape
        if not packs(out, width, self.group):
            return None
        in_four = self.mix == "int4" or (self.mix == "mixed" and ".mlp.experts." in piece.name)
        return 4 if in_four and piece.name != HEAD else 8

    def has(self, packed: Packed, bits: int) -> bool:
        """Whether a matrix is in so many bits already, in the same groups."""
        layout = packed.kind, packed.group, packed.zero is not None
        return layout == (f"int{bits}", self.group, self.zero_points)


Target = Format | Literal["same"] | Packing


def stored_dtype(piece: Piece, dtype: torch.dtype, target: Target) -> torch.dtype:
    """What a tensor that has `dtype` now is stored as, if not in integers."""
    if piece.keeps_dtype or target == "same":
        return dtype
    if isinstance(target, Packing):
        return torch.bfloat16
    return FP8 if target == "fp8" and (piece.in_fp8 or dtype == FP8) else DTYPES[target]


def plan(piece: Piece, dtype: torch.dtype, target: Target) -> list[TensorInfo]:
    """The tensors that `encode` will make of one, before there is any."""

    def info(suffix: str, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorInfo:
        return TensorInfo(piece.name + suffix, dtype, shape, parameter=piece.parameter)

    if isinstance(target, Packing) and (bits := target.bits(piece)) is not None:
        rows, cols = piece.shape
        shapes = integer_shapes(rows, cols, bits, target.group)
        return [
            info("", torch.uint8, shapes.codes),
            info(INTEGER_SCALE_SUFFIX, torch.float16, shapes.scale),
            *([info(ZERO_SUFFIX, torch.uint8, shapes.scale)] if target.zero_points else []),
        ]
    infos = [info("", stored_dtype(piece, dtype, target), piece.shape)]
    if infos[0].dtype == FP8:
        rows, cols = piece.shape
        infos.append(info(SCALE_SUFFIX, torch.float32, scale_shape(rows, cols)))
    return infos


def encode(
    piece: Piece, stored: Stored, target: Target, importance: Tensor | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Bring a tensor into the wanted format, bit for bit where it is in it already.

    importance: of each column, for integers (`dsv3.quant.integers`). Raises CheckpointError for what cannot be quantised.
    """
    try:
        if isinstance(target, Packing) and (bits := target.bits(piece)) is not None:
            if isinstance(stored, Packed) and target.has(stored, bits):
                packed = stored
            else:
                packed = quantize(stored, bits, target.group, target.zero_points, importance)
        else:
            wanted = stored_dtype(
                piece, stored.codes.dtype if isinstance(stored, Packed) else stored.dtype, target
            )
            if wanted != FP8:
                yield (
                    piece.name,
                    dequantize(stored, wanted) if isinstance(stored, Packed) else stored.to(wanted),
                )
                return
            if isinstance(stored, Packed) and stored.kind == "fp8":
                packed = stored
            else:
                numbers = dequantize(stored) if isinstance(stored, Packed) else stored
                packed = Packed("fp8", *quantize_blocks(numbers))
    except UserError as error:
        raise CheckpointError(f"{piece.name} {error}") from None
    yield piece.name, packed.codes
    if packed.kind == "fp8":
        yield piece.name + SCALE_SUFFIX, packed.scale.float()
        return
    yield piece.name + INTEGER_SCALE_SUFFIX, packed.scale
    if packed.zero is not None:
        yield piece.name + ZERO_SUFFIX, packed.zero


def write_weights(
    folder: Path, infos: Sequence[TensorInfo], tensors: Iterable[tuple[str, Tensor]], max_shard_size: int
) -> None:
    """Write shards and their index, or one file where one is enough.

    infos: in the model's order, which becomes that of the files; `tensors` yields what they announce in any order.
    max_shard_size is in bytes; a parameter larger than that, such as all experts of a layer, is a file of its own, or it
    could not be mapped.
    """
    total = sum(info.nbytes for info in infos)
    check_space(folder, total)
    shards = _split(infos, max_shard_size)
    if len(shards) == 1:
        write_shards({folder / SINGLE: shards[0]}, tensors)
        return
    files = {
        f"model-{number:05}-of-{len(shards):05}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }
    write_shards({folder / file: shard for file, shard in files.items()}, tensors)
    weight_map = {info.name: file for file, shard in files.items() for info in shard}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def check_space(folder: Path, total: int) -> None:
    """Raise CheckpointError if the disk of a folder that `staged` or `staged_file` gave has no room for `total` bytes."""
    free = shutil.disk_usage(folder).free
    if total > free:
        raise CheckpointError(
            f"{folder.parent} has {size(free)} free, but the weights take {size(total)}: free some, or name a "
            "folder on another disk"
        )


def _split(infos: Sequence[TensorInfo], max_shard_size: int) -> list[list[TensorInfo]]:
    """Into shards as full as can be, whose parameters are whole: one that is too large is a shard of its own."""
    shards: list[list[TensorInfo]] = [[]]
    room = max_shard_size
    for _, tensors in groupby(infos, key=lambda info: info.parameter or info.name):
        together = list(tensors)
        nbytes = sum(info.nbytes for info in together)
        if shards[-1] and nbytes > room:
            shards.append([])
            room = max_shard_size
        shards[-1] += together
        room -= nbytes
    return shards


def write_config(
    folder: Path, values: Mapping[str, Any], dtype: torch.dtype, quantization: Mapping[str, Any] | None
) -> None:
    """Write `config.json`, with the dtype of what is not quantised and how the rest is.

    `auto_map` is left out: it names code beside the weights, and we write none.
    """
    values = {key: value for key, value in values.items() if key not in _RESTATED}
    values["torch_dtype"] = str(dtype).removeprefix("torch.")
    if quantization is not None:
        values["quantization_config"] = quantization
    write_json(folder / CONFIG, values)


def write_json(path: Path, values: Any) -> None:
    write_whole(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def is_weights(file: Path) -> bool:
    """Whether a file of a checkpoint is its config, or some of its weights."""
    return file.suffix == ".safetensors" or file.name in (CONFIG, INDEX)


@contextmanager
def staged(out: Path, is_replaced: Callable[[Path], bool] = is_weights) -> Iterator[Path]:
    """Give an empty folder beside `out` that becomes `out` if all goes well, and vanishes if not.

    `out` may be an existing checkpoint: what `is_replaced` goes, its other files (tokenizer, model card) stay.
    Any other folder with something in it is refused.
    """
    out = expand(out).resolve()
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file: name a folder to write the checkpoint to")
    if out.is_dir() and any(out.iterdir()) and not (out / CONFIG).is_file():
        raise CheckpointError(
            f"{out} is neither empty nor a checkpoint, so nothing was written: name a new folder"
        )
    if out.is_mount():
        raise CheckpointError(f"{out} is a mount point, which cannot be replaced: name a folder in it")
    with _workplace(out, "folder") as new:
        with _nothing_written():
            yield new
        _exchange(new, out, is_replaced)


@contextmanager
def staged_file(out: Path) -> Iterator[Path]:
    """Give the path of a file to write that becomes `out` if all goes well, and vanishes if not."""
    out = expand(out).resolve()
    if out.is_dir():
        raise CheckpointError(f"{out} is a folder: name a file to write to, for example {out / 'model.gguf'}")
    with _workplace(out, "file") as folder:
        with _nothing_written():
            yield folder / out.name
        os.replace(folder / out.name, out)


@contextmanager
def _nothing_written() -> Iterator[None]:
    """Let an interruption say so."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note("nothing was written")
        raise


@contextmanager
def _workplace(out: Path, kind: str) -> Iterator[Path]:
    """Give an empty folder beside `out`, which is to be a `kind`. What is left of it in the end vanishes."""
    here = f".{out.name}.{platform.node()}-"
    new = out.with_name(f"{here}{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out.parent, here)
        new.mkdir()
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}"
        raise CheckpointError(f"{out} cannot be written ({problem}): name a {kind} elsewhere") from None
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _remove_stale(parent: Path, here: str) -> None:
    """Remove what processes of this machine left there when they were killed; `here` is what its name begins with."""
    for folder in parent.iterdir():
        process = re.fullmatch(re.escape(here) + r"(\d+)-[0-9a-f]{8}\.partial", folder.name)
        if process is not None and not psutil.pid_exists(int(process[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _exchange(new: Path, out: Path, is_replaced: Callable[[Path], bool]) -> None:
    """Put `new` in the place of `out`, and what is replaced of `out`, if it is there, in the place of `new`."""
    if not out.exists():
        os.rename(new, out)
        return
    old = new.with_suffix(".old")
    try:
        os.rename(out, old)
        os.rename(new, out)
    except BaseException as error:
        if old.exists() and not out.exists():
            _put_back(old, out, error)
        raise
    for file in old.iterdir():
        if not is_replaced(file) and not (out / file.name).exists():
            os.rename(file, out / file.name)
    os.rename(old, new)


def _put_back(old: Path, out: Path, error: BaseException) -> None:
    try:
        os.rename(old, out)
    except OSError:
        raise CheckpointError(
            f"{out} could not be replaced ({error}), nor put back: it is at {old} now, move it yourself"
        ) from None
