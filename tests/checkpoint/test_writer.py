"""The folder that appears whole or not at all, whatever goes wrong while it takes the place of another."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3.checkpoint.writer import staged
from dsv3.errors import CheckpointError


def checkpoint(folder: Path, text: str = "old") -> Path:
    folder.mkdir()
    for name in ("config.json", "notes.txt"):
        (folder / name).write_text(text)
    return folder


def write(out: Path) -> None:
    with staged(out) as folder:
        (folder / "config.json").write_text("new")


def contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


def refuse_renames(monkeypatch: pytest.MonkeyPatch, *refused: int) -> None:
    """Let these renames fail, counted from 1."""
    rename, calls = os.rename, []

    def sometimes(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) in refused:
            raise OSError(5, "Input/output error", str(source))
        rename(source, target)

    monkeypatch.setattr("os.rename", sometimes)


def test_a_replaced_checkpoint_keeps_its_other_files(tmp_path: Path) -> None:
    out = checkpoint(tmp_path / "out")
    write(out)
    assert contents(out) == {"config.json": "new", "notes.txt": "old"}
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_leaves_the_old_checkpoint(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = checkpoint(tmp_path / "out")
    refuse_renames(monkeypatch, failing)
    with pytest.raises(OSError, match="Input/output error"):
        write(out)
    assert contents(out) == {"config.json": "old", "notes.txt": "old"}
    assert list(tmp_path.iterdir()) == [out]


def test_what_cannot_be_put_back_is_named_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = checkpoint(tmp_path / "out")
    refuse_renames(monkeypatch, 2, 3)
    with pytest.raises(CheckpointError, match="nor put back: it is at ") as caught:
        write(out)
    (left,) = tmp_path.iterdir()
    assert str(left) in str(caught.value) and "\n" not in str(caught.value)
    assert contents(left) == {"config.json": "old", "notes.txt": "old"}


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = platform.node()
    stale = tmp_path / f".out.{here}-{gone.pid}-0123abcd.partial"
    others = [
        tmp_path / f".out.{here}-{os.getpid()}-0123abcd.partial",  # at work
        tmp_path / f".out.elsewhere-{gone.pid}-0123abcd.partial",  # on another machine, which we cannot see
        tmp_path / f".out2.{here}-{gone.pid}-0123abcd.partial",  # not for this target
        tmp_path / f".out.{here}-{gone.pid}-0123abcd.old",  # the last copy of somebody's checkpoint
    ]
    for folder in (stale, *others):
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
    write(tmp_path / "out")
    assert set(tmp_path.iterdir()) == {tmp_path / "out", *others}


def test_the_hidden_folder_is_known_by_its_process(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as folder:
        assert folder.name.startswith(f".out.{platform.node()}-{os.getpid()}-")
        assert folder.name.endswith(".partial")


def test_places_that_cannot_be_written_are_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", Path("~nobody-of-this-name/out")):
        with pytest.raises(CheckpointError) as caught, staged(out):
            pass
        assert str(out) in str(caught.value) and "\n" not in str(caught.value)


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(CheckpointError, match="is a mount point"), staged(tmp_path):
        raise AssertionError("hours of work would be lost")
