"""Weights that stay in their file: parameters that are views of a map of it.

The system brings a mapped file's pages into memory when somebody looks at them, and every process that maps the file has
the same ones. So nothing is read that is not needed, a model that was in use lately is there at once, and it takes no more
memory than the file is large. The maps are private: who writes to a weight gets a copy of its page, and the file never
changes.

A file must not be cut off or written over while it is mapped, or the weights change with it; replacing it, as
`save_pretrained` and downloads do, leaves the old one to those who have it.

A parameter may be many tensors of a file, a layer's experts for instance. It can stay there if each matrix of it is one run
of bytes, and the matrices lie at equal distances. In files of ours they do (`dsv3.checkpoint.shards`); in others often.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from threading import Lock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dsv3.checkpoint.reader import Checkpoint


class MappedFiles:
    """Finds parameters in a checkpoint's files, which it maps when there is something in them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._maps: dict[str, torch.UntypedStorage | None] = {}

    def view(self, like: Tensor, parts: Sequence[tuple[str, Tensor]]) -> Tensor | None:
        """A parameter where it lies in a file; None if it does not lie there as it is wanted.

        like: its shape and dtype, on the meta device, as one run of numbers. parts: the names of the tensors that it is
        made of, and which part of `like` each is; one dimension less are the matrices of a stack, or halves of them.
        """
        infos = [self.checkpoint.tensors[name] for name, _ in parts]
        files = {self.checkpoint.shard_of[name] for name, _ in parts}
        fit = all(
            info.dtype == like.dtype and info.shape == part.shape and part.is_contiguous()
            for info, (_, part) in zip(infos, parts, strict=True)
        )
        if len(files) != 1 or not fit or not like.numel():
            return None
        matrices = like.shape[0] if parts[0][1].dim() < like.dim() else 1
        nbytes = like.nbytes // matrices
        begins: dict[int, set[int]] = {}
        for info, (_, part) in zip(infos, parts, strict=True):
            matrix, within = divmod(int(part.storage_offset()) * like.itemsize, nbytes)
            begins.setdefault(matrix, set()).add(info.offset - within)
        first, *others = [begin for matrix in sorted(begins) for begin in begins[matrix]]
        step = others[0] - first if others else nbytes
        regular = others == [first + i * step for i in range(1, matrices)] and step >= nbytes
        if not regular or first % like.itemsize or step % like.itemsize:
            return None
        inner = like.stride() if matrices == 1 else (step // like.itemsize, *like.stride()[1:])
        storage = self._map(files.pop())
        if storage is None:
            return None
        return torch.empty(0, dtype=like.dtype).set_(storage, first // like.itemsize, like.shape, inner)

    def _map(self, file: str) -> torch.UntypedStorage | None:
        """A file; None if the system refuses, as it does where the address space is limited (`ulimit -v`)."""
        if file not in self._maps:
            path = self.checkpoint.folder / file
            try:
                opened = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
            except RuntimeError:
                self._maps[file] = None
            else:
                assert isinstance(opened, torch.UntypedStorage)
                self._maps[file] = opened
        return self._maps[file]


_IN_FILES: list[tuple[StorageWeakRef, int]] = []
"""The map that each weight in a file is a view of, and its bytes."""
_LOCK = Lock()


def count(weights: Iterable[Tensor]) -> None:
    """Let `mapped_bytes` count weights that stay in their files, until the last view of their file is gone."""
    with _LOCK:
        _IN_FILES.extend((StorageWeakRef(weight.untyped_storage()), weight.nbytes) for weight in weights)


def mapped_bytes() -> int:
    """Bytes of all weights in memory that are views of mapped files, and of nothing else in these files.

    The system counts their pages as available, since it could read them again.
    """
    with _LOCK:
        _IN_FILES[:] = [(file, nbytes) for file, nbytes in _IN_FILES if not file.expired()]
        return sum(nbytes for _, nbytes in _IN_FILES)
