"""A person at a terminal, for tests: a process in a pseudo-terminal, keys to press, text to read."""

from __future__ import annotations

import os
import pty
import re
import select
import sys
import time
from pathlib import Path

_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[=>])")


class Terminal:
    """Runs a Python script with the terminal as its standard streams. A context manager: leaving kills it."""

    def __init__(self, script: str, *args: str, env: dict[str, str]) -> None:
        source = Path(__file__).parents[2] / "src"
        env = os.environ | {"PYTHONPATH": str(source), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"} | env
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [sys.executable, "-c", script, *args], env)
        self.text = ""
        self._read_to = 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pid:
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0)
        os.close(self.fd)

    def press(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Read on until `text` has come since the last wait; fails with the screen if it does not."""
        deadline = time.monotonic() + seconds
        while (place := self.text.find(text, self._read_to)) < 0:
            if not self._read(deadline):
                raise AssertionError(f"waited for {text!r}; the terminal shows:\n{self.text[-2000:]}")
        self._read_to = place + len(text)

    def wait_for_exit(self, seconds: float = 30) -> int:
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def _read(self, deadline: float) -> bool:
        """Take in what there is; False at the end of the process or of the time."""
        ready, _, _ = select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))
        try:
            data = os.read(self.fd, 65536) if ready else b""
        except OSError:  # Linux says so when the other side has closed
            data = b""
        self.text += _ESCAPES.sub("", data.decode("utf-8", "replace"))
        return bool(data)
