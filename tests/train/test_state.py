"""States on disk: whole or not there, for any number of processes to read, and never trusted."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv3.errors import UserError
from dsv3.train import state
from dsv3.train.state import Piece, Position, Saver, latest, read_position, read_state
from tests.parallel.processes import run

SIZE = 23
"""Numbers of the one parameter, of which each process saves a run."""


def whole(offset: float = 0.0) -> Tensor:
    return torch.arange(SIZE).float() + offset


def tensors(rank: int = 0, world: int = 1, offset: float = 0.0) -> dict[str, Tensor]:
    """What a process has of a state: uneven runs of two parameters, and a buffer that all have."""
    start, end = SIZE * rank // world, SIZE * (rank + 1) // world
    return {
        "master.w": Piece.of(whole(offset)[start:end].clone(), start, SIZE),
        "exp_avg.w": Piece.of(whole(offset)[start:end].bfloat16(), start, SIZE),
        "buffer.b": torch.full((3,), offset),
    }


def write(folder: Path, step: int = 1, offset: float = 0.0) -> None:
    """What each process does to save."""
    together = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    saver = Saver(folder, together)
    saver.save(tensors(rank, world, offset), Position(step=step, tokens=10 * step, planned=100))
    saver.wait()


def read(folder: Path) -> dict[str, Tensor]:
    """The latest state, in one process."""
    target = {
        "master.w": torch.full((SIZE,), -1.0),
        "exp_avg.w": torch.full((SIZE,), -1.0, dtype=torch.bfloat16),
    }
    bias = torch.full((3,), -1.0)
    read_state(folder, {name: Piece.of(t, 0, SIZE) for name, t in target.items()} | {"buffer.b": bias})
    return target | {"buffer.b": bias}


def is_whole(folder: Path, offset: float = 0.0) -> bool:
    got = read(folder)
    return (
        torch.equal(got["master.w"], whole(offset))
        and torch.equal(got["exp_avg.w"], whole(offset).bfloat16())
        and torch.equal(got["buffer.b"], torch.full((3,), offset))
    )


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Any number of processes ------------------------------------------------------------------------------


def read_part(folder: Path) -> bool:
    rank, world = dist.get_rank(), dist.get_world_size()
    got, wanted = tensors(rank, world, -1.0), tensors(rank, world, 4.0)
    assert read_state(folder, got).tokens == 10
    return all(
        torch.equal(a.as_subclass(Tensor), b.as_subclass(Tensor))
        for a, b in zip(got.values(), wanted.values(), strict=True)
    )


@pytest.mark.parametrize(("writers", "readers"), [(3, 2), (1, 3), (2, 4)])
def test_as_many_read_it_as_like(writers: int, readers: int, tmp_path: Path) -> None:
    if writers == 1:
        write(tmp_path / "phase", offset=4.0)
    else:
        run(writers, write, tmp_path / "phase", 1, 4.0)
    assert all(run(readers, read_part, tmp_path / "phase"))
    assert is_whole(tmp_path / "phase", 4.0)
    assert len(list(tmp_path.glob("phase/state-*/*.safetensors"))) == writers, "each writes its own"


def replicated(folder: Path) -> None:
    """Everyone has everything."""
    saver = Saver(folder, True)
    saver.save(tensors(offset=2.0), Position(step=1))
    saver.wait()


def test_what_several_have_is_written_once(tmp_path: Path) -> None:
    run(2, replicated, tmp_path / "phase")
    assert is_whole(tmp_path / "phase", 2.0)
    stored = [load_file(file) for file in tmp_path.glob("phase/state-*/*.safetensors")]
    assert sorted(name for file in stored for name in file) == ["buffer.b", "exp_avg.w", "master.w"]


# Behind training's back -------------------------------------------------------------------------------


def test_what_is_saved_is_what_was_there_when_it_was_asked_for(tmp_path: Path) -> None:
    saver, live = Saver(tmp_path / "phase", False), tensors()
    with patch.object(state, "save", side_effect=_slowly(state.save)):
        saver.save(live, Position(step=1))
        assert latest(tmp_path / "phase") is None, "it is not waited for"
        for tensor in live.values():
            tensor.as_subclass(Tensor).fill_(-5)
        saver.wait()
    assert is_whole(tmp_path / "phase")
    write(tmp_path / "sync")
    (one,), (other,) = (tmp_path.glob(f"{name}/state-*/*.safetensors") for name in ("phase", "sync"))
    stored = load_file(one), load_file(other)
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])


def _slowly(work: Callable[..., None]) -> Callable[..., None]:
    def later(*args: object, **kwargs: object) -> None:
        time.sleep(0.2)
        work(*args, **kwargs)

    return later


def test_one_save_at_a_time(tmp_path: Path) -> None:
    saver = Saver(tmp_path / "phase", False)
    with patch.object(state, "save", side_effect=_slowly(state.save)):
        saver.save(tensors(), Position(step=1))
        saver.save(tensors(offset=1.0), Position(step=2))
        assert read_position(tmp_path / "phase").step == 1, (
            "the first is on the disk before the second begins"
        )
        saver.wait()
    assert is_whole(tmp_path / "phase", 1.0)


def test_what_fails_is_said_at_the_next_save(tmp_path: Path) -> None:
    (tmp_path / "phase").write_text("in the way")
    saver = Saver(tmp_path / "phase", False)
    saver.save(tensors(), Position(step=1))
    with pytest.raises(UserError, match=r"state-00000001 cannot be written \(.*File exists") as caught:
        saver.save(tensors(), Position(step=2))
    assert "\n" not in str(caught.value)
    (tmp_path / "phase").unlink()
    saver.save(tensors(), Position(step=3))
    saver.wait()
    assert is_whole(tmp_path / "phase")


def full_disk(folder: Path, rank: int) -> str:
    """A save for which one process has no room."""
    write(folder)
    full = OSError(28, "No space left on device")
    place: tuple[type, str] = (Path, "mkdir") if rank == 0 else (state.HuggingFaceStorageWriter, "write_data")
    saver = Saver(folder, True)
    with patch.object(*place, side_effect=full) if dist.get_rank() == rank else nullcontext():
        saver.save(tensors(dist.get_rank(), 3, 1.0), Position(step=2))
        try:
            saver.wait()
        except UserError as problem:
            return str(problem)
    return "it was written"


@pytest.mark.parametrize("rank", [0, 2])
def test_what_one_process_cannot_write_is_an_error_on_all(rank: int, tmp_path: Path) -> None:
    said = run(3, full_disk, tmp_path / "phase", rank, timeout=20)
    for line in said:
        assert "state-00000002 cannot be written ([Errno 28] No space left on device)" in line
        assert "\n" not in line
    assert is_whole(tmp_path / "phase"), "the one before is there"


# Whole or not there -----------------------------------------------------------------------------------


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "phase"
    for step in (9, 10, 99_999_999, 100_000_000):  # whose names are not in the order of letters
        write(folder, step, float(step % 1000))
    assert [path.name for path in sorted(folder.iterdir())] == ["state-100000000", "state-99999999"]
    assert read_position(folder).step == 100_000_000 and is_whole(folder, 0.0)


def test_a_step_is_written_once(tmp_path: Path) -> None:
    write(tmp_path / "phase", 7)
    with patch.object(state, "save", side_effect=AssertionError("written again")):
        write(tmp_path / "phase", 7)
    assert is_whole(tmp_path / "phase")


def test_what_a_killed_save_left_is_cleared_away(tmp_path: Path) -> None:
    folder = tmp_path / "phase"
    write(folder, 1)
    for name in (".state-00000002.partial", ".state-00000000.old"):
        (folder / name).mkdir()
        (folder / name / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    assert is_whole(folder) and read_position(folder).step == 1
    write(folder, 2, 3.0)
    assert is_whole(folder, 3.0) and len(list(folder.iterdir())) == 2


def save_for_ever(folder: Path) -> None:
    for step in range(1, 10_000):
        write(folder, step, float(step))


def test_killed_at_any_moment_a_whole_one_is_there(tmp_path: Path) -> None:
    folder, context = tmp_path / "phase", multiprocessing.get_context("forkserver")
    for attempt in range(6):
        process = context.Process(target=save_for_ever, args=(folder,))
        before = read_position(folder).step if attempt else 0
        process.start()
        deadline = time.monotonic() + 60
        while (found := latest(folder)) is None or int(found.name[6:]) < 3:
            assert time.monotonic() < deadline and process.is_alive()
            time.sleep(0.001)
        time.sleep(0.013 * attempt)
        process.kill()
        process.join()
        step = read_position(folder).step
        assert step >= max(3, before) and is_whole(folder, float(step))


# Never trusted ----------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("exploded",)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "phase")
    here = latest(tmp_path / "phase")
    assert here is not None
    assert {file.suffix for file in here.iterdir()} == {".safetensors", ".json"}
    for name in (".metadata", "__0_0.distcp", "0.metadata", "model.pt"):
        (here / name).write_bytes(pickle.dumps(Bomb()))
    assert is_whole(tmp_path / "phase") and not Path("exploded").exists()
    (shard,) = here.glob("*.safetensors")
    size = shard.stat().st_size
    shard.write_bytes(pickle.dumps(Bomb()).ljust(size))
    assert "is broken" in refused(tmp_path / "phase") and not Path("exploded").exists()


def shards(folder: Path) -> list[Path]:
    here = latest(folder)
    assert here is not None
    return sorted(here.glob("*.safetensors"))


def tell_sizes(folder: Path) -> None:
    """Make the list of files agree with what is there, as whoever means harm would."""
    path = shards(folder)[0].parent / "position.json"
    values = json.loads(path.read_text())
    values["files"] = {file.name: file.stat().st_size for file in shards(folder)}
    path.write_text(json.dumps(values))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three") / "phase"
    run(3, write, folder)
    return folder


@pytest.fixture
def folder(three: Path, tmp_path: Path) -> Path:
    """A state that three processes wrote."""
    return Path(shutil.copytree(three, tmp_path / "phase"))


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("knowing", [False, True])
def test_a_file_that_is_missing_is_missed(number: int, knowing: bool, folder: Path) -> None:
    """And not left out: what it held would stay random."""
    gone = shards(folder)[number]
    gone.unlink()
    if knowing:
        tell_sizes(folder)
        assert "state-00000001 is broken" in refused(folder) or "another recipe" in refused(folder)
    else:
        assert f"is broken ({gone.name} has no bytes" in refused(folder)


def test_a_file_that_is_cut_off_or_too_many_is_refused(folder: Path) -> None:
    file = shards(folder)[1]
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert f"{file.name} has {len(content) - 1} bytes, not {len(content)}" in refused(folder)
    tell_sizes(folder)
    assert "is broken" in refused(folder)
    file.write_bytes(content)
    tell_sizes(folder)
    assert is_whole(folder)
    shutil.copyfile(file, file.with_name("shard-00004-model-00001-of-00001.safetensors"))
    assert "shard-00004" in refused(folder)
    tell_sizes(folder)
    assert "goes on at" in refused(folder), "a run that is there twice"


@pytest.mark.parametrize(
    "said",
    [
        "no JSON",
        "[]",
        "{}",
        '{"master.w": {}}',
        '{"master.w": {"saved_offsets": [1]}}',
        '{"master.w": {"saved_offsets": [-7]}}',
        '{"master.w": {"saved_offsets": [1e400]}}',
        '{"master.w": {"saved_offsets": ["7"]}}',
        '{"master.w": {"saved_offsets": []}}',
        '{"master.w": {"saved_offsets": [7, 7]}}',
        '{"master.w": {"saved_offsets": null}}',
        '{"master.w": {"saved_offsets": [99999999999999999999]}}',
        "[" * 100_000,
    ],
)
def test_headers_may_say_anything(said: str, folder: Path) -> None:
    file = shards(folder)[1]
    save_file({"master.w": load_file(file)["master.w"]}, file, {"DCP_SHARDING_INFO": said})
    tell_sizes(folder)
    assert "is broken" in refused(folder) or "another recipe" in refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"step": "one"},
        {"tokens": -1},
        {"planned": None},
        {"updates": 1.5},
        {"step": True},
        {"seconds": "long"},
        {"stream": []},
        {"past": 3},
        {"files": []},
        {"files": {"shard": "long"}},
        {"files": {"../../position.json": 3}},
        {"unheard": "of"},
        {"files": ...},
    ],
)
def test_positions_may_say_anything(change: dict[str, object], folder: Path) -> None:
    path = shards(folder)[0].parent / "position.json"
    values = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))
    assert "is broken" in refused(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00", '{"step": ' + "9" * 5000 + "}"])
def test_a_position_that_is_none_is_refused(content: str, folder: Path) -> None:
    (shards(folder)[0].parent / "position.json").write_text(content)
    assert "is broken" in refused(folder)


def test_a_folder_without_a_state_and_a_state_without_anything(tmp_path: Path) -> None:
    assert "holds no state" in refused(tmp_path / "phase")
    (tmp_path / "phase" / "state-00000003").mkdir(parents=True)
    assert "is broken" in refused(tmp_path / "phase")
    (tmp_path / "phase" / "state-00000004").write_text("a file")
    assert "is broken" in refused(tmp_path / "phase")


def test_the_state_of_another_model_is_named(folder: Path) -> None:
    for wanted in (
        {"master.w": Piece.of(torch.empty(SIZE + 1), 0, SIZE + 1)},
        {"master.other": Piece.of(torch.empty(SIZE), 0, SIZE)},
    ):
        with pytest.raises(UserError, match="is the run of another recipe"):
            read_state(folder, wanted)
