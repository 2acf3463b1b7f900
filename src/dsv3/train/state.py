"""Training state on disk: what `torch.distributed.checkpoint` writes, in safetensors, for any layout to read.

    PHASE/state-00001200/                     the phase after 1,200 steps
        shard-00001-model-*.safetensors, ...  each process's masters, moments, averages, and biases
        position.json                         steps, tokens, where the data stands; the files and their sizes

Whatever the layout, what a process holds of a parameter is one run of the flattened whole: the share of ZeRO-1, an
expert's rows, a stage's layers. So a parameter is saved as a flat tensor of which each process writes a run (where
it begins is in the file's own header), and a process of any other layout reads the runs that it needs. One process is a
layout too.

Tensors are copied first and written by a thread while training goes on. A state is written beside its place and
renamed when every process has written its part, so that a state that is there is whole; the last ones are kept. A step
that is there already is not written again. What cannot be written on one process is an error on all.

Nothing here is pickled: `torch.distributed.checkpoint` usually keeps a pickled table of contents, but not with its
safetensors storage, which finds it in the files' headers. It would not miss a file, though, and leave what was in it
as it was; so files are compared with the list, and runs must make up the whole without gaps or overlaps.
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
from dsv3.parallel.mesh import on_first

KEPT = 2
"""States of a phase that are kept."""
_POSITION = "position.json"
_FILES = "files"
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
        partial = self.folder / f".{target.name}.partial"
        try:
            if on_first(lambda: _begin(target, partial), self._group):
                return
            writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there is one process
                save(tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            files = self._files(partial)
            said = json.loads(position) | {_FILES: files}
            on_first(lambda: _finish(target, partial, said), self._group)
        except (OSError, CheckpointException) as problem:
            failures = problem.failures if isinstance(problem, CheckpointException) else {}
            why = next((error for error, _ in failures.values()), problem)
            raise UserError(
                f"{target} cannot be written ({_line(why)}): mend that and start again, from the save before"
            ) from None

    def _files(self, partial: Path) -> dict[str, int]:
        """The size of every file that was written, by name. Each process looks at its own."""
        rank = 0 if self._group is None else dist.get_rank(self._group)
        mine = {file.name: file.stat().st_size for file in partial.glob(f"shard-{rank + 1:05d}-*")}
        everyones = [mine]
        if self._group is not None:
            everyones *= dist.get_world_size(self._group)
            dist.all_gather_object(everyones, mine, group=self._group)
        return {name: size for files in everyones for name, size in files.items()}


def _begin(target: Path, partial: Path) -> bool:
    """Make an empty folder to write to; whether there is no need, as what is to be written is there."""
    if target.exists():
        return True
    partial.parent.mkdir(parents=True, exist_ok=True)
    for left in partial.parent.glob(".state-*"):  # of a run that was killed
        shutil.rmtree(left)
    partial.mkdir()
    return False


def _finish(target: Path, partial: Path, position: Mapping[str, Any]) -> None:
    write_whole(partial / _POSITION, json.dumps(position))
    partial.rename(target)
    for old in _states(target.parent)[:-KEPT]:
        gone = old.rename(old.with_name(f".{old.name}.old"))  # whole or not there, also while it is removed
        shutil.rmtree(gone, ignore_errors=True)


def _copy(tensor: Tensor) -> Tensor:
    if isinstance(tensor, Piece):
        return Piece.of(tensor.here.to("cpu", copy=True), tensor.start, tensor.whole)
    return tensor.detach().to("cpu", copy=True)


def _states(folder: Path) -> list[Path]:
    """The whole states of a phase, the latest last."""
    named = ((_NAME.fullmatch(path.name), path) for path in folder.glob("state-*"))
    return [path for _, path in sorted((int(name[1]), path) for name, path in named if name)]


def latest(folder: Path) -> Path | None:
    """The latest state of a phase, if there is one."""
    return next(reversed(_states(folder)), None)


def read_position(folder: Path) -> Position:
    """How far a phase is by its latest state. Raises UserError if there is none, or it is broken."""
    return _read_position(_latest(folder))[0]


def read_state(folder: Path, tensors: Mapping[str, Tensor]) -> Position:
    """Fill tensors (`Piece`s of parameters, and whole ones) from the latest state of a phase, and say how far it is.

    Reads the headers of all files, and of the numbers those that are wanted. Raises UserError if there is no state, if
    it is broken, or of another model; then tensors may be filled in part.
    """
    state = _latest(folder)
    position, files = _read_position(state)
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    try:
        _check_files(state, files)
        reader = HuggingFaceStorageReader(str(state))
        saved = reader.read_metadata().state_dict_metadata
        for name, tensor in tensors.items():
            if name not in saved or saved[name].size != tensor.size():  # type: ignore[union-attr]
                raise UserError(
                    f"{folder.parent} is the run of another recipe ({name} differs): name another --out"
                )
            _check_chunks(name, saved[name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(dict(tensors), storage_reader=reader, no_dist=True)
    except UserError:
        raise
    except (Exception, CheckpointException) as problem:  # there is nothing that a header could not say
        raise _broken(state, problem) from None
    return position


def _latest(folder: Path) -> Path:
    state = latest(folder)
    if state is None:
        raise UserError(f"{folder} holds no state: train the stage before it first")
    return state


def _read_position(state: Path) -> tuple[Position, dict[str, int]]:
    """How far a state is, and which files it consists of."""
    try:
        values = read_json(state / _POSITION, UserError)
        files = values.pop(_FILES)
        position = Position(**values)
        counts = position.step, position.tokens, position.planned, position.updates, *files.values()
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"{_POSITION} has {counts} where whole numbers belong")
        if not isinstance(position.seconds, int | float):
            raise ValueError(f"{_POSITION} has {position.seconds!r} seconds")
        for value in (position.stream, position.past):
            if not isinstance(value, dict | None):
                raise ValueError(f"{_POSITION} has {value!r} where an object belongs")
    except (AttributeError, KeyError, TypeError, ValueError, UserError) as problem:
        raise _broken(state, problem) from None
    return position, files


def _check_files(state: Path, files: Mapping[str, int]) -> None:
    here = {file.name: file.stat().st_size for file in state.glob("*.safetensors")}
    for name in here.keys() | files.keys():
        if here.get(name) != files.get(name):
            raise ValueError(f"{name} has {here.get(name, 'no')} bytes, not {files.get(name, 'none')}")


def _check_chunks(name: str, saved: Any) -> None:
    """Raise ValueError where what was saved of a flat tensor leaves a gap, or says something twice."""
    end = 0
    for chunk in sorted(saved.chunks, key=lambda chunk: tuple(chunk.offsets)):
        if chunk.offsets[0] != end:
            raise ValueError(f"{name} goes on at {chunk.offsets[0]}, not at {end}")
        end += chunk.sizes[0]
    if end != saved.size[0]:
        raise ValueError(f"{name} ends at {end}, not at {saved.size[0]}")


def _broken(state: Path, problem: BaseException) -> UserError:
    return UserError(f"{state} is broken ({_line(problem)}): remove it to go on from the one before, or anew")


def _line(problem: BaseException) -> str:
    said = " ".join(str(problem).split()) or type(problem).__name__
    return said if len(said) < 300 else f"{said[:300]} ..."
