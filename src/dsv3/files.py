"""Manners with files that everything here keeps: a file that is there is whole, and a folder has one writer."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_whole(path: Path, text: str, mode: int | None = None) -> None:
    """Write a text file through a temporary name beside it, so that it appears whole or not at all.

    mode: who may read it, from its first byte on; a file that is there keeps its own, and its owner. None: as
    always."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with open(os.open(partial, flags, 0o666 if mode is None else mode), "w", encoding="utf-8") as file:
            if mode is not None and path.exists():
                before = path.stat()
                with suppress(PermissionError):  # another's file: only root may give it back
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone, after waiting for whoever holds it."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


@contextmanager
def only_writer(folder: Path, otherwise: Exception) -> Iterator[None]:
    """Make a folder and hold it for this process alone; raises `otherwise` where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise otherwise from None
        yield
    finally:
        os.close(held)
