"""Reading tensors straight into memory that is there already.

This is for weights that cannot stay in their file (`dsv3.checkpoint.mapped`), because they lie there in another order or
dtype than they are wanted in, or because memory is counted: which pages of a map are in memory is up to the system. Bytes
are read to where they will be used, so nothing is there twice but what the system keeps of the file, for whoever reads it
next; where memory is dear that is given back.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from dsv3.checkpoint.reader import Checkpoint
from dsv3.checkpoint.shards import TensorInfo
from dsv3.errors import CheckpointError
from dsv3.kernels.packed import Packed, Weight, dequantize, empty

_AT_ONCE = 1 << 26  # bytes that wait in between where numbers have to be converted
_LONGEST_READ = 1 << 30  # what the system reads in one call is a little less than 2 GiB


class DirectReader:
    """Fills tensors from a checkpoint's files. Good from several threads at once."""

    def __init__(self, checkpoint: Checkpoint, names: Iterable[str], forget: bool) -> None:
        """names: the tensors that will be read. The files that they lie in stay open, so that all come from the same ones,
        even if somebody replaces them. forget: whether the system shall let go of what it has kept of a file."""
        self.checkpoint, self.forget = checkpoint, forget
        self._files: dict[str, int] = {}
        if checkpoint.folder.is_file():
            raise CheckpointError(
                f"{checkpoint.folder} is a GGUF file: to read experts when they are needed takes a folder: make one with `dsv3 convert`"
            )
        weakref.finalize(self, _close, self._files)
        for file in {checkpoint.shard_of[part] for name in names for part in checkpoint.parts(name)}:
            self._files[file] = os.open(checkpoint.folder / file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def read(self, name: str, target: Weight) -> int:
        """Fill a tensor, or a packed matrix of the kind that is stored, with what the checkpoint calls `name`,
        converted to the tensor's dtype. Returns how many bytes were read.

        Raises CheckpointError if the file ends too early, which means that it has changed.
        """
        layout = self.checkpoint.layout(name)
        infos = [self.checkpoint.tensors[part] for part in self.checkpoint.parts(name)]
        if layout is None:
            assert isinstance(target, Tensor)
            return self._fill(infos[0], target)
        stored = target
        if isinstance(target, Tensor):
            kind, group, zero = layout
            stored = empty(kind, target.shape, group, zero, torch.device("cpu"))
        assert isinstance(stored, Packed)
        got = sum(self._fill(info, tensor) for info, tensor in zip(infos, stored.tensors, strict=True))
        if isinstance(target, Tensor):
            target.copy_(dequantize(stored, target.dtype))
        return got

    def _fill(self, info: TensorInfo, target: Tensor) -> int:
        assert info.shape == target.shape, (info, target.shape)
        if target.dtype == info.dtype and target.is_cpu and target.is_contiguous():
            self._read(info, 0, target)
            return info.nbytes
        of_row = info.nbytes // max(info.shape[0], 1)
        rows = max(1, _AT_ONCE // max(of_row, 1))
        for first in range(0, info.shape[0], rows):
            part = target[first : first + rows]
            stored = torch.empty(part.shape, dtype=info.dtype)
            self._read(info, first * of_row, stored)
            part.copy_(stored)
        return info.nbytes

    def _read(self, info: TensorInfo, skip: int, target: Tensor) -> None:
        """A run of the tensor's bytes, from so many on."""
        file = self.checkpoint.shard_of[info.name]
        descriptor, first = self._files[file], info.offset + skip
        bytes_ = memoryview(target.detach().flatten().view(torch.uint8).numpy().data)
        done = 0
        while done < len(bytes_):
            got = os.preadv(descriptor, [bytes_[done : done + _LONGEST_READ]], first + done)
            if not got:
                raise CheckpointError(
                    f"{self.checkpoint.folder / file} ends at {first + done:,} bytes, within {info.name}: it has been cut "
                    "off since it was opened: get it again"
                )
            done += got
        if self.forget and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, first, done, os.POSIX_FADV_DONTNEED)


def _close(files: dict[str, int]) -> None:
    for descriptor in files.values():
        os.close(descriptor)
