"""A process that dies, stops or hangs is named by those that are left, once, and soon."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dsv3.errors import UserError
from dsv3.parallel import watch as watching
from dsv3.parallel.launch import worker
from dsv3.parallel.watch import LOST, Watch, agree, code_facts
from tests.parallel.processes import _context, run

Work = Callable[[Watch], None]


# In the processes --------------------------------------------------------------------------------------


def _member(rank: int, world: int, port: int, folder: Path, timeout: float, work: Work) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    os.dup2(os.open(folder / f"{rank}", os.O_WRONLY | os.O_CREAT), 2)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    watching._GRACE = 0.5
    torch.set_num_threads(1)
    with worker("cpu", timeout) as (_, watch):
        work(watch)


def _serve(folder: Path) -> None:
    store = watching.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    (folder / "port.partial").write_text(str(store.port))
    (folder / "port.partial").rename(folder / "port")
    time.sleep(600)


def _steps(watch: Watch, fails: int, fault: Callable[[], None], steps: int = 3) -> None:
    for step in range(1, steps + 1):
        watch.beat("reading", step)
        if dist.get_rank() == fails and step == 3:
            fault()
        watch.beat("training")
        dist.all_reduce(torch.ones(3))


def _raise() -> None:
    raise UserError("the data are bad: mend them")


def killed(watch: Watch) -> None:
    _steps(watch, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))


def stopped(watch: Watch) -> None:
    _steps(watch, 1, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def hanging(watch: Watch) -> None:
    _steps(watch, 2, lambda: time.sleep(600))


def mistaken(watch: Watch) -> None:
    _steps(watch, 1, _raise)


def all_hanging(watch: Watch) -> None:
    watch.beat("waiting for each other", 7)
    time.sleep(600)


def resting(watch: Watch) -> None:
    """As long as it takes."""
    watch.beat("training", 1)
    watch.rest("saving")
    time.sleep(4.5)


def waiting(watch: Watch) -> None:
    watch.rest("waiting", 5)
    if dist.get_rank() == 1:
        print("ready", file=sys.stderr, flush=True)
        time.sleep(600)
    dist.recv(torch.ones(1), src=1)


# The tests ---------------------------------------------------------------------------------------------


class Crew:
    """Processes that watch each other, and the store between them in a process of its own."""

    def __init__(self, folder: Path, world: int, timeout: float, work: Work) -> None:
        self.folder = folder
        self.server = _context.Process(target=_serve, args=(folder,))
        self.server.start()
        self.until((folder / "port").exists)
        port = int((folder / "port").read_text())
        self.members: list[BaseProcess] = [
            _context.Process(target=_member, args=(rank, world, port, folder, timeout, work))
            for rank in range(world)
        ]
        for member in self.members:
            member.start()

    @staticmethod
    def until(true: Callable[[], object], seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.02)

    def statuses(self, seconds: float = 30.0) -> list[int | None]:
        end = time.monotonic() + seconds
        for member in self.members:
            member.join(max(0.0, end - time.monotonic()))
        return [member.exitcode for member in self.members]

    def said(self) -> list[str]:
        """What all together wrote."""
        files = [self.folder / str(rank) for rank in range(len(self.members))]
        return [line for file in files if file.exists() for line in file.read_text().splitlines()]

    def close(self) -> None:
        for process in (self.server, *self.members):
            process.kill()
            process.join()


@pytest.mark.parametrize(
    ("work", "timeout", "statuses", "line"),
    [
        (
            killed,
            30,
            [LOST, -9, LOST],
            "rank 1 on {host} has died: it was at step 3, reading; the same command",
        ),
        (
            stopped,
            2,
            [LOST, -9, LOST],
            "rank 1 on {host} is no longer heard of (--timeout 2 s): it was at step 3",
        ),
        (
            hanging,
            2,
            [LOST] * 3,
            "rank 2 on {host} has not moved for 2 s (--timeout): it is still at step 3, reading",
        ),
        (mistaken, 30, [LOST, 1, LOST], "the data are bad: mend them"),
        (
            all_hanging,
            2,
            [LOST] * 3,
            "no process has moved for 2 s (--timeout) and none is behind the others, all",
        ),
        (resting, 3, [0, 0, 0], None),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_one_line_names_it(
    tmp_path: Path, work: Work, timeout: float, statuses: list[int], line: str | None
) -> None:
    crew = Crew(tmp_path, 3, timeout, work)
    try:
        assert crew.statuses() == statuses, crew.said()
        said = [text for text in crew.said() if text.startswith("dsv3:")]
        host = os.uname().nodename
        assert len(said) == (line is not None), said
        assert line is None or said[0].startswith(f"dsv3: {line.format(host=host)}"), said
    finally:
        crew.close()


def test_without_the_store_all_end(tmp_path: Path) -> None:
    crew = Crew(tmp_path, 2, 30.0, waiting)
    try:
        crew.until(lambda: "ready" in crew.said())
        crew.server.kill()
        assert crew.statuses() == [LOST, LOST]
        (line,) = [text for text in crew.said() if text.startswith("dsv3:")]
        assert line.startswith("dsv3: the store that torchrun keeps is gone")
    finally:
        crew.close()


def test_a_signal_ends_who_waits_in_a_collective(tmp_path: Path) -> None:
    """Python runs no handler there; the other, which could go on, names nobody wrongly."""
    crew = Crew(tmp_path, 2, 60.0, waiting)
    try:
        crew.until(lambda: "ready" in crew.said())
        time.sleep(0.2)
        assert crew.members[0].pid is not None
        os.kill(crew.members[0].pid, signal.SIGTERM)
        crew.members[0].join(20)
        assert crew.members[0].exitcode == 128 + signal.SIGTERM
    finally:
        crew.close()


def _agreement(facts: list[dict[str, str]]) -> str:
    try:
        agree(facts[dist.get_rank()])
    except UserError as error:
        return str(error)
    return ""


def test_what_differs_is_named_on_all_ranks() -> None:
    facts = [code_facts() | {"recipe": "ab"} for _ in range(3)]
    facts[2]["recipe"] = "cd"
    host = os.uname().nodename
    expected = (
        f"recipe is cd on rank 2 ({host}), but ab on rank 0 ({host}): start all processes from the same"
    )
    assert run(3, _agreement, facts) == [expected] * 3
    assert run(2, _agreement, facts[:2]) == [""] * 2


def _other_errors() -> tuple[str, bool]:
    with pytest.raises(RuntimeError, match="shapes") as found, watching.naming_peers(None):  # type: ignore[arg-type]
        raise RuntimeError("shapes differ")
    return str(found.value), isinstance(found.value, UserError)


def test_other_errors_pass() -> None:
    assert _other_errors() == ("shapes differ", False)
