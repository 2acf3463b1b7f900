"""Functions run by several processes that talk over gloo.

`run(4, work, ...)` calls `work(...)` in four processes, each after `init_process_group`, and gives what they return.
They are forked from a server that has imported torch and dsv3 once, so a call takes a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "dsv3.train.stages", "tests.parallel.preload"])


def run(world: int, work: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """What `work(*args)` returns in each of `world` processes, by rank. `work` must be a module's function.

    Raises AssertionError with the traceback of the first process that fails, or where one takes too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        ends: list[Connection] = []
        processes = []
        for rank in range(world):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(target=_work, args=(theirs, rank, world, folder, timeout, work, args))
            process.start()
            theirs.close()
            ends.append(ours)
            processes.append(process)
        results: dict[int, Any] = {}
        failures: list[str] = []
        try:
            open_ends = dict(zip(ends, range(world), strict=True))
            while open_ends and not failures:
                ready = wait(list(open_ends), timeout)
                if not ready:
                    failures.append(f"no answer from ranks {sorted(open_ends.values())} in {timeout:.0f} s")
                for end in ready:
                    rank = open_ends.pop(end)  # type: ignore[call-overload]
                    try:
                        ok, value = end.recv()  # type: ignore[union-attr]
                    except EOFError:
                        ok, value = False, "ended without an answer"
                    if ok:
                        results[rank] = value
                    else:
                        failures.append(f"rank {rank}: {value}")
        finally:
            for process in processes:
                if failures:
                    process.kill()
                process.join()
        assert not failures, failures[0]
        return [results[rank] for rank in range(world)]


def _work(
    end: Connection, rank: int, world: int, folder: str, timeout: float, work: Callable[..., Any], args: Any
) -> None:
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
        end.send((True, work(*args)))
        if dist.is_initialized():  # unless the work has left the group itself
            dist.barrier()  # who leaves earlier may break off a connection that another is still making
            dist.destroy_process_group()
    except BaseException:
        end.send((False, traceback.format_exc()))
