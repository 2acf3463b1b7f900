"""Training state on disk: what `torch.distributed.checkpoint` writes, in safetensors, for any layout to read.

    PHASE/state-00001200/                     the phase after 1,200 steps
        shard-00001-model-*.safetensors, ...  each process's masters, moments, averages, and biases
        position.json                         steps, tokens, where the data stands

Whatever the layout, what a process holds of a parameter is one run of the flattened whole: the share of ZeRO-1, an
expert's rows, a stage's layers. So a parameter is saved as a flat tensor of which each process writes a run (`Run`
in the file's own header), and a process of any other layout reads the runs that it needs. One process is a layout too.

Tensors are copied first and written by a thread while training goes on. A state is written beside its place and
renamed when every process has written its part, so that a state that is there is whole; the last ones are kept.
Nothing here is pickled: `torch.distributed.checkpoint` usually keeps a pickled table of contents, but not with its
safetensors storage, which finds it in the files' headers.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dsv3.config import read_json
from dsv3.errors import UserError
from dsv3.files import write_whole
from dsv3.parallel.mesh import leads

KEPT = 2
"""States of a phase that are kept."""
_POSITION = "position.json"
_NAME = re.compile(r"state-(\d{8,})")


@dataclass
class Position:
    """How far a phase is."""

    step: int = 0
    tokens: int = 0
    planned: int = 0
    """Tokens at which the phase ends."""
    seconds: float = 0.0
    updates: int = 0
    """Steps since the optimiser's moments were fresh."""
    stream: dict[str, Any] | None = None
    """Where the data stands."""
    past: dict[str, list[float]] | None = None
    """The steps that a spike is compared with."""

    @property
    def done(self) -> bool:
        return self.tokens >= self.planned


class Piece(Tensor):
    """A run of a flattened tensor, in the words of `torch.distributed.checkpoint`: one chunk of one dimension."""

    start: int
    whole: int

    @classmethod
    def of(cls, tensor: Tensor, start: int, whole: int) -> Piece:
        """tensor: what is here, contiguous; start: where it begins among the `whole` numbers. Shares its memory."""
        piece = tensor.detach().view(-1).as_subclass(cls)
        piece.start, piece.whole = start, whole
        return piece

    def size(self, dim: int | None = None) -> Any:
        """Of the whole, which is what checkpoints compare."""
        return torch.Size([self.whole]) if dim is None else self.whole

    @property
    def here(self) -> Tensor:
        return self.as_subclass(Tensor)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size([self.start]), self.here.size())]

    def __create_write_items__(self, name: str, piece: Piece) -> list[WriteItem]:
        (chunk,) = self.__create_chunk_list__()
        data = TensorWriteData(chunk, TensorProperties.create_from_tensor(self.here), self.size())
        return [WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.here


class Saver:
    """Writes the states of a phase, one at a time, behind the training's back."""

    def __init__(self, folder: Path, processes: bool) -> None:
        """folder: the phase's. processes: whether there are others, who all make one at the same time."""
        self.folder = folder
        # A group of its own, for what the thread says to the others must not get between what training says.
        self._group: ProcessGroup | None = dist.new_group(backend="gloo") if processes else None
        self._thread = ThreadPoolExecutor(1, "save")
        self._pending: Future[None] | None = None

    def save(self, tensors: Mapping[str, Tensor], position: Position) -> None:
        """Copy tensors, and begin to write them. Waits for the save before, and raises what that one failed of."""
        self.wait()
        copies = {name: _copy(tensor) for name, tensor in tensors.items()}
        said = json.dumps(vars(position))
        self._pending = self._thread.submit(self._write, copies, position.step, said)

    def wait(self) -> None:
        """Until the last save is on the disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, tensors: dict[str, Tensor], step: int, position: str) -> None:
        target = self.folder / f"state-{step:08d}"
        partial = self.folder / f".state-{step:08d}.partial"
        if leads():
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".state-*"):  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir()
            write_whole(partial / _POSITION, position)
        self._together()
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process
            save(tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        self._together()
        if leads():
            if target.exists():  # the same step, saved again at the end of a phase
                target.rename(self.folder / f".state-{step:08d}.old")
            partial.rename(target)
            for old in [*_states(self.folder)[:-KEPT], *self.folder.glob(".state-*")]:
                shutil.rmtree(old, ignore_errors=True)

    def _together(self) -> None:
        if self._group is not None:
            dist.barrier(self._group)


def _copy(tensor: Tensor) -> Tensor:
    if isinstance(tensor, Piece):
        return Piece.of(tensor.here.to("cpu", copy=True), tensor.start, tensor.whole)
    return tensor.detach().to("cpu", copy=True)


def _states(folder: Path) -> list[Path]:
    """The whole states of a phase, the latest last."""
    return sorted(path for path in folder.glob("state-*") if _NAME.fullmatch(path.name))


def latest(folder: Path) -> Path | None:
    """The latest state of a phase, if there is one."""
    return next(reversed(_states(folder)), None)


def read_position(folder: Path) -> Position:
    """How far a phase is by its latest state. Raises UserError if there is none, or it is broken."""
    state = latest(folder)
    if state is None:
        raise UserError(f"{folder} holds no state: train the stage before it first")
    try:
        return Position(**read_json(state / _POSITION, UserError))
    except (TypeError, UserError) as problem:
        raise _broken(state, problem) from None


def read_state(folder: Path, tensors: Mapping[str, Tensor]) -> Position:
    """Fill tensors (`Piece`s of parameters, and whole ones) from the latest state of a phase, and say how far it is.

    Raises UserError if there is none, if it is broken, or of another model.
    """
    position = read_position(folder)
    state = latest(folder)
    assert state is not None
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    try:
        reader = HuggingFaceStorageReader(str(state))
        saved = reader.read_metadata().state_dict_metadata
        for name, tensor in tensors.items():
            if name not in saved or saved[name].size != tensor.size():  # type: ignore[union-attr]
                raise UserError(
                    f"{folder.parent} is the run of another recipe ({name} differs): name another --out"
                )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(dict(tensors), storage_reader=reader, no_dist=True)
    except (OSError, SafetensorError, CheckpointException, KeyError, ValueError, RuntimeError) as problem:
        if isinstance(problem, UserError):
            raise
        raise _broken(state, problem) from None
    return position


def _broken(state: Path, problem: BaseException) -> UserError:
    said = " ".join(str(problem).split())
    return UserError(f"{state} is broken ({said}): remove it to go on from the one before, or anew")
