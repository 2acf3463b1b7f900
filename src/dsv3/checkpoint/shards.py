"""One safetensors file: its header, and how it is written tensor by tensor.

The format is plain: eight bytes that give the header's length, the header (JSON: for each tensor its dtype,
shape, and the bytes it occupies), then the tensors' bytes without holes. Nothing in it can run code.

We read headers ourselves, since they tell everything that can be wrong with a file before any weight is touched. We also
write ourselves: where each tensor lies follows from shapes alone, so shards are written while their tensors are made, one
in memory at a time, in any order. Files of ours are laid out to be used where they lie (`dsv3.checkpoint.mapped`): tensors
of whole lines of the processor's cache, as all large matrices are, begin where a line does, and what the model keeps together
lies together.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3.errors import CheckpointError

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors library
ALIGNED = 64
"""Bytes of a line of the processor's cache, where matrices begin."""


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = field(default=0, compare=False)
    """Where in the file its bytes begin, for one that lies in a file."""
    parameter: str = field(default="", compare=False)
    """What it is a part of, for one that is to be written."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises CheckpointError if the file is not whole: cut off, not safetensors, or inconsistent.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise CheckpointError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull` there")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or (length <= _LONGEST_HEADER and 8 + length > size):
            raise CheckpointError(f"{path} is cut off within its header, at {size:,} bytes: get it again")
        if length > _LONGEST_HEADER:
            raise CheckpointError(f"{path} has a corrupt header, or is not safetensors: download it again")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda entry: entry[1]["data_offsets"])
        tensors, end = {}, 0
        for name, entry in entries:
            info = _read_entry(path, name, entry)
            tensors[name] = replace(info, offset=8 + length + end)
            if entry["data_offsets"] != [end, end + info.nbytes]:
                raise ValueError(f"{name} does not occupy the bytes that its shape and dtype ask for")
            end += info.nbytes
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a corrupt header ({error}): download it again") from None
    wanted = 8 + length + end
    if size < wanted:
        raise CheckpointError(f"{path} is cut off: it has {size:,} of {wanted:,} bytes: download it again")
    if size > wanted:
        raise CheckpointError(f"{path} is corrupt: it has {size - wanted:,} bytes too many: get it again")
    return tensors


def _read_entry(path: Path, name: str, entry: dict[str, Any]) -> TensorInfo:
    if entry["dtype"] not in _DTYPES:
        raise CheckpointError(f"{path}: {name} has unsupported dtype {entry['dtype']}")
    shape = tuple(entry["shape"])
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"{name} has shape {entry['shape']}")
    return TensorInfo(name, _DTYPES[entry["dtype"]], shape)


def write_shards(shards: Mapping[Path, Sequence[TensorInfo]], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write safetensors files. `tensors` yields exactly what is announced for them, in any order."""
    places: dict[str, tuple[Path, TensorInfo]] = {}
    for path, infos in shards.items():
        header, laid_out = _lay_out(infos)
        path.write_bytes(header)
        places |= {info.name: (path, info) for info in laid_out}
    for name, tensor in tensors:
        path, info = places.pop(name)
        if (tensor.dtype, tuple(tensor.shape)) != (info.dtype, info.shape):
            raise AssertionError(f"announced {info}, got {name} {tensor.dtype} {list(tensor.shape)}")
        with path.open("r+b") as file:
            file.seek(info.offset)
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        del tensor
    if places:
        raise AssertionError(f"announced but not given: {', '.join(places)}")
    for path in shards:
        with path.open("r+b") as file:
            os.fsync(file.fileno())


def _lay_out(infos: Sequence[TensorInfo]) -> tuple[bytes, list[TensorInfo]]:
    """The beginning of a file, and where in it each tensor goes."""

    # Whole lines come first, then wider dtypes, so that every tensor is aligned. Those alike, as the scales of all experts of
    # a layer are, stay in a row, or a stack of them could not be mapped: codes and zeros have the same dtype, but not as
    # many dimensions.
    def place(info: TensorInfo) -> tuple[bool, int, str, int]:
        return info.nbytes % ALIGNED != 0, -info.dtype.itemsize, _CODES[info.dtype], -len(info.shape)

    ordered = sorted(infos, key=place)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in ordered:
        header[info.name] = {
            "dtype": _CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [end, end + info.nbytes],
        }
        end += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNED)
    first = 8 + len(text)
    laid_out = [replace(info, offset=first + header[info.name]["data_offsets"][0]) for info in ordered]
    return len(text).to_bytes(8, "little") + text, laid_out
