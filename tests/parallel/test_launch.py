"""Processes under torch's agent: started again when one is killed, ended at once by Ctrl-C, and one line at the end."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from dsv3.parallel.launch import in_torchrun, launch

PROGRAM = """
import os, signal, sys, time
import torch, torch.distributed as dist
from dsv3.errors import UserError
from dsv3.parallel.launch import in_torchrun, worker

fault, folder = sys.argv[1:]
assert in_torchrun()
with worker("cpu", 30.0) as (device, watch):
    rank, attempt = dist.get_rank(), os.environ["TORCHELASTIC_RESTART_COUNT"]
    print(f"hello of rank {rank} with {torch.get_num_threads()} threads on {device}")
    open(f"{folder}/{attempt}-{rank}", "w").write(str(os.getpid()))
    for step in range(1, 5):
        watch.beat("reading", step)
        if (fault, step, rank) == ("killed", 3, 1) and attempt == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        if (fault, step, rank) == ("defect", 3, 1):
            raise ZeroDivisionError("a defect")
        if (fault, step, rank) == ("mistake", 3, 1):
            raise UserError("the data are bad: mend them")
        if (fault, step) == ("slow", 3):
            watch.rest("sleeping")
            dist.recv(torch.ones(1), src=1) if rank == 0 else time.sleep(600)
        watch.beat("training")
        dist.all_reduce(torch.ones(3))
print(f"rank {rank} is done")
"""


def start(folder: Path, fault: str, restarts: int = 2) -> int:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    return launch(2, [str(program), fault, str(folder)], restarts)


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("?-?")]


def test_a_killed_process_is_named_and_all_start_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert start(tmp_path, "killed") == 0
    said = capfd.readouterr()
    assert said.err.splitlines() == [
        f"dsv3: rank 1 on {os.uname().nodename} was killed by SIGKILL (out of memory?): it was at step 3, reading; "
        "starting again from the last save (1 of 2 times)"
    ]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    hello = f"hello of rank 0 with {threads} threads on cpu"
    assert said.out.splitlines() == [hello, hello, "rank 0 is done"]  # and nothing of rank 1
    assert {path.name for path in tmp_path.glob("?-?")} == {"0-0", "0-1", "1-0", "1-1"}
    assert (dict(os.environ), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert not in_torchrun()


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("mistake", "the data are bad: mend them"),
        ("defect", "rank 1 on {host} failed by ZeroDivisionError: a defect: it was at step 3, reading"),
    ],
)
def test_what_would_fail_again_is_not_tried_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], fault: str, line: str
) -> None:
    assert start(tmp_path, fault) == 1
    *trace, last = capfd.readouterr().err.splitlines()
    assert last == f"dsv3: {line.format(host=os.uname().nodename)}"
    assert bool(trace) == (fault == "defect") and (not trace or trace[-1] == "ZeroDivisionError: a defect")
    assert {path.name for path in tmp_path.glob("?-?")} == {"0-0", "0-1"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all(tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals) -> None:
    """Also the process that waits in a collective, where Python runs no handler."""

    def interrupt() -> None:
        end = time.monotonic() + 60
        while len(pids(tmp_path)) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert start(tmp_path, "slow") == 128 + number
    thread.join()
    said = capfd.readouterr().err.splitlines()
    assert said == (
        ["interrupted: the same command goes on from the last save"] if number == signal.SIGINT else []
    )
    for pid in pids(tmp_path):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
