"""Starting processes that train together, and ending them: torchrun's agent, with less to read.

`dsv3 train RECIPE --nproc 4` starts itself four times under torch's elastic agent, exactly as

    torchrun --standalone --nproc-per-node 4 --max-restarts 3 -m dsv3 train RECIPE

would. The agent keeps the store in which processes find each other, waits for them, and starts all of them again when
one was lost. `launch` adds manners: rank 0 is heard as it is, the others are kept for the case that they fail; what a
person must mend is not tried again; and in the end there is one line that says which rank failed, on which host,
how, and at which step, in place of torchrun's table.

On several machines torchrun itself is the launcher (docs/parallel.md). Inside, `worker` does for each process what is
the same under both: joins the others, watches them, and sees to it that of many that fail one speaks.

| status | of a worker | of the launcher |
|---|---|---|
| 0 | done | done |
| 1 | a mistake that a person can mend, or a defect | the same, or started again in vain |
| 75 | another was lost: worth starting again | |
| 130, 143 | interrupted, terminated | the same |
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.rendezvous import rendezvous

from dsv3.errors import UserError
from dsv3.parallel.watch import (
    GAVE_UP,
    LOST,
    TIMEOUT,
    PeerLost,
    Watch,
    is_of_an_exchange,
    leave_words,
    naming_peers,
    open_store,
    read_beats,
)

_GRACE = 10  # seconds that workers have to end after a signal
_TAIL = 15  # lines of a failed worker's output
_ENDINGS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_ENDED = {status for end in _ENDINGS for status in (128 + end, -end)}  # after a signal from us


# The launcher ---------------------------------------------------------------------------------------------


def launch(nproc: int, argv: Sequence[str], restarts: int = 3) -> int:
    """Run `python ARGV` in so many processes on this machine; returns the exit status.

    restarts: how often all are started again after one was killed, died or hung. Says on standard error what failed.
    Call it in the main thread. Raises UserError if there are fewer GPUs than processes, where there are any.
    """
    if nproc < 1:
        raise UserError(f"--nproc is {nproc}: it must be at least 1")
    with tempfile.TemporaryDirectory(prefix="dsv3-") as folder, _surroundings(nproc), _quiet():
        parameters = RendezvousParameters(
            backend="c10d",
            endpoint="localhost:0",
            run_id=str(uuid.uuid4()),
            min_nodes=1,
            max_nodes=1,
            local_addr="localhost",
        )
        agent: _Agent | None = None
        try:
            agent = _Agent(
                WorkerSpec(
                    role="dsv3",
                    local_world_size=nproc,
                    entrypoint=sys.executable,
                    args=tuple(argv),
                    rdzv_handler=get_rendezvous_handler(parameters),
                    max_restarts=restarts,
                    monitor_interval=0.1,
                ),
                DefaultLogsSpecs(folder, redirects={rank: Std.ALL for rank in range(1, nproc)}),
            )
            result = agent.run()
        except (SignalException, KeyboardInterrupt) as ended:
            number = getattr(ended, "sigval", signal.SIGINT)
            if number == signal.SIGINT:
                _say("interrupted: the same command goes on from the last save")
            return 128 + int(number)
        finally:
            if agent is not None:
                agent.kill()
                with suppress(Exception):  # it only says that there is no one left
                    agent.get_worker_group().spec.rdzv_handler.shutdown()
    return agent.status if result is None or result.is_failed() else 0


class _Agent(LocalElasticAgent):
    """torch's agent, which says in a line what failed, and starts again only what may succeed."""

    def __init__(self, spec: WorkerSpec, logs: DefaultLogsSpecs) -> None:
        super().__init__(spec, logs)
        self.status = 1

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed() and result.failures:
            self._tell(worker_group, result.failures)
        return result

    def _tell(self, group: WorkerGroup, failures: dict[int, ProcessFailure]) -> None:
        rank = min(failures, key=lambda r: (_weight(failures[r]), failures[r].timestamp, r))
        failure = failures[rank]
        kind, text, trace = _words(failure)
        if not text or kind == "defect":
            trace = trace or self._tail(failure)
            text = (
                f"rank {rank} on {socket.gethostname()} {_how(failure, text)}{self._last_place(group, rank)}"
            )
        if trace:
            _say(trace.rstrip())
        again = failure.exitcode < 0 or failure.exitcode == LOST or kind == "hang"
        if again and self._remaining_restarts > 0:
            count = group.spec.max_restarts - self._remaining_restarts + 1
            _say(
                f"dsv3: {text}; starting again from the last save ({count} of {group.spec.max_restarts} times)"
            )
            return
        if again:
            text += "; the same command goes on from the last save"
        self._remaining_restarts = 0
        self.status = failure.exitcode if failure.exitcode in (1, 2) else 1
        _say(f"dsv3: {text}")

    def _last_place(self, group: WorkerGroup, rank: int) -> str:
        attempt = group.spec.max_restarts - self._remaining_restarts
        with suppress(RuntimeError):
            store = open_store(group.master_addr or "", group.master_port or 0, 5.0)
            beats = read_beats(store, len(group.workers), attempt)
            if rank in beats:
                return f": it was at {beats[rank].place}"
        return ": it had not started"

    def _tail(self, failure: ProcessFailure) -> str:
        """The end of what a worker wrote; rank 0 has been heard already."""
        path = "" if self._pcontext is None else self._pcontext.stderrs.get(failure.local_rank, "")
        with suppress(OSError):
            if path:
                lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
                return "\n".join(lines[-_TAIL:])
        return ""

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, *args: Any, **kwargs: Any) -> None:
        if self._pcontext is not None:
            self._pcontext.close(death_sig, _GRACE)
        super()._shutdown(death_sig, *args, **kwargs)

    def kill(self) -> None:
        """End what a second signal has kept `_shutdown` from ending."""
        for handler in getattr(self._pcontext, "subprocess_handlers", {}).values():
            if handler.proc.poll() is None:
                handler.close(signal.SIGKILL)


def _weight(failure: ProcessFailure) -> int:
    """How likely this is the cause, and the other failures what came of it: less is more likely."""
    kind, _, _ = _words(failure)
    if kind in ("user", "defect"):
        return 0
    if kind == "hang":
        return 1
    if failure.exitcode in _ENDED:
        return 5
    if failure.exitcode == LOST:
        return 4
    return 2 if failure.exitcode < 0 else 3


def _words(failure: ProcessFailure) -> tuple[str, str, str]:
    """Kind, text and traceback that a worker has left (`leave_words`), or nothing."""
    said = failure.error_file_data.get("dsv3")
    if said is None:
        return "", "", ""
    return said["kind"], failure.error_file_data["message"]["message"], said["trace"]


def _how(failure: ProcessFailure, text: str) -> str:
    if text:
        return f"failed by {text}"
    if failure.exitcode == -signal.SIGKILL:
        return "was killed by SIGKILL (out of memory?)"
    if failure.exitcode < 0:
        return f"was killed by {failure.signal_name()}"
    return f"ended with status {failure.exitcode}"


def _say(text: str) -> None:
    start = "\r\x1b[K" if sys.stderr.isatty() else ""  # where a line of progress may still stand
    print(f"{start}{text}", file=sys.stderr, flush=True)


@contextmanager
def _surroundings(nproc: int) -> Iterator[None]:
    """Environment and signal handlers of the agent, and what they were before."""
    environment, handlers = dict(os.environ), {end: signal.getsignal(end) for end in _ENDINGS}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ["DSV3_LAUNCHED"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        yield
    finally:
        for end, handler in handlers.items():
            signal.signal(end, handler)
        os.environ.clear()
        os.environ.update(environment)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the agent's log to itself, unless LOGLEVEL asks for it."""
    logger = logging.getLogger("torch.distributed.elastic")
    before = logger.propagate
    handler = logging.NullHandler()
    if "LOGLEVEL" not in os.environ:
        logger.propagate = False
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.propagate = before
        logger.removeHandler(handler)


# A worker -------------------------------------------------------------------------------------------------


def in_torchrun() -> bool:
    """Whether this process was started by torchrun or `launch`, to train with others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def start(device: str, timeout: float = TIMEOUT) -> str:
    """Join the others, as torchrun's environment says; returns this process's device, `cpu` or `cuda:LOCAL_RANK`.

    On CPUs by gloo, on GPUs by NCCL with gloo beside it for what lies in main memory. A collective may take twice
    `timeout` (seconds): after once as long the watch speaks, who knows more. (NCCL is written, but not yet run.)
    """
    kind, local = torch.device(device).type, int(os.environ["LOCAL_RANK"])
    gpu = None
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"{socket.gethostname()} has {torch.cuda.device_count()} GPUs for "
                f"{os.environ.get('LOCAL_WORLD_SIZE')} processes: start one per GPU"
            )
        gpu = torch.device("cuda", local)
        torch.cuda.set_device(gpu)
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, rank, world = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
        dist.init_process_group(
            "gloo" if gpu is None else "cpu:gloo,cuda:nccl",
            store=_unwritten(store, rank, world, timeout),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=2 * timeout),
            device_id=gpu,
        )
    except RuntimeError as problem:
        if not is_of_an_exchange(problem):
            raise
        raise PeerLost(
            f"the other processes cannot be joined through {place} ({str(problem).splitlines()[0]})"
        ) from None
    return kind if gpu is None else str(gpu)


class _PeerMissing(PeerLost):
    """Others have not come in time, which is why they will be ended."""


def _unwritten(store: Store, rank: int, world: int, timeout: float) -> Store:
    """A part of the store that is new, and the same for all.

    The agent keeps one store over all restarts, and torch looks up addresses where those before have left theirs
    (pytorch issue 135712). So rank 0 thinks of a name, and tells it to whom it has just been asked by: each asks with
    a word of its own, until it has the answer to that.
    """
    if rank:
        word = uuid.uuid4().hex
        store.set(f"dsv3/asks/{rank}", word)
        name = store.get(f"dsv3/answer/{word}").decode()
        store.set(f"dsv3/{name}/knows/{rank}", "")
        return PrefixStore(name, store)
    name, answered, began = uuid.uuid4().hex, dict[int, str](), time.monotonic()
    missing = list(range(1, world))
    while missing:
        for other in missing:
            if store.check([f"dsv3/asks/{other}"]):
                word = store.get(f"dsv3/asks/{other}").decode()
                if answered.get(other) != word:
                    answered[other] = word
                    store.set(f"dsv3/answer/{word}", name)
        missing = [other for other in missing if not store.check([f"dsv3/{name}/knows/{other}"])]
        if missing and time.monotonic() - began > timeout:
            ranks = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise _PeerMissing(
                f"{len(missing)} of {world} processes have not come within {timeout:g} s: ranks {ranks}"
            )
        time.sleep(0.01)
    return PrefixStore(name, store)


def finish() -> None:
    """Part from the others, after all are done."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def worker(device: str, timeout: float = TIMEOUT) -> Iterator[tuple[str, Watch]]:
    """Everything a process does among others goes in here; gives its device, and its `Watch`.

    What fails in here ends the process, with one voice for all: that of the launcher, if it is ours, else of the first
    process that fails. So this does not return after an exception.
    """
    watch: Watch | None = None
    try:
        own = start(device, timeout)
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        watch = Watch(open_store(address, int(port), timeout), timeout)
        with naming_peers(watch):
            yield own, watch
            watch.rest("done")
            dist.barrier()  # nobody leaves while another could still need it
    except BaseException as problem:
        _end(problem, watch)
    else:
        watch.close()
        finish()


def _end(problem: BaseException, watch: Watch | None) -> NoReturn:
    """Tell what happened, unless another does, and end the process, which may hold communicators that never end."""
    status, kind, text = 1, "user", str(problem)
    signalled = None if watch is None else watch.signalled
    if signalled is not None or isinstance(problem, KeyboardInterrupt):
        status, kind = 128 + (signalled or signal.SIGINT), "signal"
        text = "interrupted: the same command goes on from the last save"
    elif isinstance(problem, SystemExit):
        status, kind = problem.code if isinstance(problem.code, int) else 1, "exit"
    elif isinstance(problem, PeerLost):
        status, kind = LOST, "hang" if isinstance(problem, _PeerMissing) else "peer"
    elif isinstance(problem, OSError) and problem.strerror:
        text = problem.strerror if problem.filename is None else f"{problem.filename}: {problem.strerror}"
    elif not isinstance(problem, UserError):
        kind, text = "defect", f"{type(problem).__name__}: {problem}".splitlines()[0]
    trace = "".join(traceback.format_exception(problem)) if kind == "defect" else ""
    with suppress(Exception):
        told = kind in ("user", "defect", "peer", "hang") and leave_words(kind, text, trace)
        told = told or "DSV3_LAUNCHED" in os.environ or kind == "exit" or status == 128 + signal.SIGTERM
        if not told and watch is not None:
            watch.speak(f"{trace}dsv3: {text}")
        elif not told:
            print(f"{trace}dsv3: {text}", file=sys.stderr)
    if watch is not None:
        with suppress(Exception):
            watch.close(GAVE_UP if status == LOST else f"status {status}: {text}")
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
