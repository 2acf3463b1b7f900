"""Who has died, and who hangs: said in one line, within a bounded time.

Processes that train together wait for each other at every exchange, so when one stops, all stop, and none of them can
say why: a collective tells that a connection was closed, if it tells anything, never whose. So each process says
beforehand where it is. The training thread notes what it begins (`beat`), and a thread beside it writes that down
every few seconds in the store that torchrun keeps, and reads what the next process in the ring wrote:

- no news for `timeout` seconds: that process is dead, stopped, or cut off;
- news, but the same place for `timeout` seconds: it hangs, and of all that wait the one that has come least far is it.

Whoever finds this out first writes the verdict, tells it, and leaves; the others read it and leave in silence. They
do so by `os._exit`, since a thread that waits in a collective cannot be woken. In a ring there is always somebody
alive before the dead, and a process costs the store three requests every few seconds, however many there are.

Where a collective does raise an error (gloo does at once, NCCL when it notices), `naming_peers` finds out whose end
that was: a process of the same machine is looked up, another is waited for until it should have written again.

A process that gives up because of another ends with status 75 (EX_TEMPFAIL of sysexits.h: try again): what a launcher
should start anew, as opposed to 1, where it would only fail again. (NCCL's part is written, but not yet run.)
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import select
import signal
import socket
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from dsv3.errors import UserError

LOST = 75
TIMEOUT = 300.0

_INTERVAL = 5.0  # seconds between news of a process that does not move
_BRIEF = 0.05  # and between those of one that moves fast
_GRACE = 5.0  # for ending by oneself after a signal
_NOBODY = "-"
_STORELESS = "the store that torchrun keeps is gone"
_SOURCES = (".py", ".cpp", ".h", ".yaml")


class PeerLost(UserError):
    """Another process has died or hangs, so this one cannot go on."""


# At the start ---------------------------------------------------------------------------------------------


def agree(facts: Mapping[str, str]) -> None:
    """Raise UserError, on all processes alike, unless all have the same facts (same keys, in short strings)."""
    world = dist.get_world_size()
    told: list[tuple[str, dict[str, str]]] = [("", {})] * world
    dist.all_gather_object(told, (socket.gethostname(), dict(facts)))
    for fact in facts:
        values = [theirs.get(fact, "nothing") for _, theirs in told]
        usual, _ = Counter(values).most_common(1)[0]  # of equally many, the first process's
        for rank, value in enumerate(values):
            if value != usual:
                other = values.index(usual)
                raise UserError(
                    f"{fact} is {value} on rank {rank} ({told[rank][0]}), but {usual} on rank {other} "
                    f"({told[other][0]}): start all processes from the same"
                )


def code_facts() -> dict[str, str]:
    """What two machines that should run the same may have different: dsv3's own sources, Python, torch."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(p for p in package.rglob("*") if p.suffix in _SOURCES):
        digest.update(f"{path.relative_to(package).as_posix()}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return {
        "dsv3's code": digest.hexdigest()[:12],
        "Python": platform.python_version(),
        "torch": torch.__version__,
    }


# Heartbeats -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beat:
    """What a process last wrote of itself."""

    host: str
    pid: int
    parent: int
    serial: int
    """Counts what it has written."""
    moves: int
    """Counts what it has begun; processes that train together count alike."""
    step: int
    doing: str
    still: float
    """Seconds since it began that; 0 where that may take as long as it takes."""
    gone: str | None = None
    """Why it ended."""

    @property
    def place(self) -> str:
        return f"step {self.step}, {self.doing}"


def read_beats(store: Store, world: int, attempt: int = 0) -> dict[int, Beat]:
    """The last news of each process that has written any. attempt: how often all have been started again."""
    if not store.check([_announced(attempt)]):
        return {}
    run = PrefixStore(store.get(_announced(attempt)).decode(), store)
    return {rank: Beat(**json.loads(run.get(_key(rank)))) for rank in range(world) if run.check([_key(rank)])}


def _announced(attempt: int) -> str:
    return f"dsv3/watch/{attempt}"


def _key(rank: int) -> str:
    return f"beat/{rank}"


def open_store(host: str, port: int, timeout: float) -> Store:
    """A connection of its own to the store that torchrun keeps; raises RuntimeError if there is none."""
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout), wait_for_workers=False)


_own: Watch | None = None  # of this process, which has one or none


def doing(what: str, step: int | None = None) -> None:
    """Note what this process begins, for whoever watches it; see `Watch.beat`. Alone, it is nothing to anybody."""
    if _own is not None:
        _own.beat(what, step)


def waiting(what: str) -> None:
    """The same of something that may take as long as it takes; see `Watch.rest`."""
    if _own is not None:
        _own.rest(what)


class Watch:
    """Tells the others where this process is, and ends it when one of them is lost. All processes make one."""

    def __init__(self, store: Store, timeout: float = TIMEOUT) -> None:
        """store: a connection that nobody else uses, so that nobody waits in it; timeout: in seconds.

        Make it in the main thread, after `init_process_group`.
        """
        self.timeout = timeout
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.host, self._parent = socket.gethostname(), os.getppid()
        self._interval = min(_INTERVAL, timeout / 10)
        self._serial, self._moves, self._step, self._doing = 0, 0, 0, "starting"
        self._moved: float | None = None  # when; None while at rest
        self._gone: str | None = None
        self.signalled: int | None = None
        """The signal that has reached this process, if one has."""
        self._writing, self._speaking, self._has_spoken = threading.Lock(), threading.Lock(), False

        names = [uuid.uuid4().hex]
        dist.broadcast_object_list(names, src=0)
        self._store = PrefixStore(names[0], store)
        if self.rank == 0:
            store.set(_announced(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))), names[0])
            self._store.set("verdict", _NOBODY)
        self._publish()
        dist.all_gather_object([None] * self.world, None)  # from here on everybody's key is there

        self._watched = (self.rank + 1) % self.world
        self._news = (-1, time.monotonic())
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        global _own
        _own = self

    # What the training thread says ---------------------------------------------------------------------------

    def beat(self, doing: str, step: int | None = None) -> None:
        """This begins now, and ends within `timeout` seconds. The same sequence in all processes, for comparison.

        step: with it, this is written down at once (one request to the store), without it within a moment.
        """
        self._moved = time.monotonic()
        self._note(doing, step)

    def rest(self, doing: str, step: int | None = None) -> None:
        """This begins now, and may take as long as it takes; only the process's life is watched meanwhile."""
        self._moved = None
        self._note(doing, step)

    def _note(self, doing: str, step: int | None) -> None:
        self._doing, self._moves = doing, self._moves + 1
        if step is None:
            with suppress(BlockingIOError):  # full: the thread will wake anyway
                os.write(self._pipe[1], b"\0")
            return
        self._step = step
        with suppress(RuntimeError):  # no store: the thread sees that too
            self._publish()

    @property
    def place(self) -> str:
        return f"step {self._step}, {self._doing}"

    def close(self, why: str = "done") -> None:
        """Stop watching, and tell the others that this process ends by itself."""
        if self._gone is not None:
            return
        self._gone = why
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._pipe[1], b"\0")
        self._thread.join(self.timeout)

    def speak(self, text: str) -> None:
        """Say on standard error what went wrong, unless any process has said something."""
        with self._speaking:
            if self._has_spoken:
                return
            self._has_spoken = True
            try:
                first = self._store.add("spoken", 1) == 1
            except RuntimeError:  # without a store there is one voice for each machine
                first = os.environ.get("LOCAL_RANK", "0") == "0"
            if first:
                sys.stderr.write(("\n" if sys.stderr.isatty() else "") + f"{text}\n")
                sys.stderr.flush()

    # Finding out who it was ----------------------------------------------------------------------------------

    def name_peer(self, error: BaseException) -> str:
        """After a collective has failed: who was lost, as far as can be told; within a few intervals."""
        self._moved = None
        first = self._beats()
        began, patience = time.monotonic(), min(3 * self._interval + 1, self.timeout)
        beats = first
        while True:
            verdict = self._verdict()
            if verdict is not None:
                return str(verdict["text"])
            for rank, beat in beats.items():
                if beat.gone is None and self._is_dead(beat):
                    return f"rank {rank} on {beat.host} has died: it was at {beat.place}"
            left = {rank: beat for rank, beat in beats.items() if beat.gone not in (None, GAVE_UP)}
            for rank, beat in left.items():
                return f"rank {rank} on {beat.host} has ended ({beat.gone}): it was at {beat.place}"
            if time.monotonic() - began > patience:
                break
            time.sleep(0.05)
            beats = self._beats()
        for rank, beat in beats.items():
            if beat.gone is None and beat.serial == first[rank].serial:
                return self._silence(rank, beat)
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"an exchange failed on rank {self.rank} ({self.host}) at {self.place}: {said}"

    def _verdict(self) -> dict[str, Any] | None:
        """What another's thread has found, if one has: text, and the rank that is not heard of or None."""
        written = self._store.get("verdict").decode()
        return None if written == _NOBODY else json.loads(written)

    def _beats(self) -> dict[int, Beat]:
        """Of all others."""
        ranks = [rank for rank in range(self.world) if rank != self.rank]
        values = self._store.multi_get([_key(rank) for rank in ranks]) if ranks else []
        return {rank: Beat(**json.loads(value)) for rank, value in zip(ranks, values, strict=True)}

    def _is_dead(self, beat: Beat) -> bool:
        """Whether it is known to be: a child of the same parent on this machine that is no more."""
        if beat.host != self.host or beat.parent != self._parent or not Path("/proc/self/stat").exists():
            return False
        return _state(beat.pid, self._parent) is None

    # The thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        last, judged, deadline = time.monotonic(), 0.0, float("inf")
        try:
            while True:
                select.select([self._pipe[0]], [], [], min(self._interval, 0.5))
                with suppress(BlockingIOError):
                    for number in os.read(self._pipe[0], 4096):
                        if number:
                            self.signalled = number
                            deadline = time.monotonic() + _GRACE
                now = time.monotonic()
                if now - last > 3 * self._interval + 1:  # stopped as a whole: nobody is to be blamed for that
                    self._news = (self._news[0], now)
                    self._moved = None if self._moved is None else self._moved + now - last
                last = now
                if now > deadline:
                    self._exit(128 + (self.signalled or 0))
                moved = self._published[:2] != (self._moves, self._gone)
                if moved or now - judged > self._interval:
                    self._publish()
                if self._gone is not None:
                    return
                if now - judged > self._interval:
                    judged = now
                    self._judge(now)
                time.sleep(_BRIEF)
        except RuntimeError as problem:  # what the store raises
            if self._gone is None:
                self._report(f"{_STORELESS} ({str(problem).splitlines()[0]})", None)

    def _publish(self) -> None:
        with self._writing:
            moves, gone, moved = self._moves, self._gone, self._moved
            self._serial += 1
            still = 0.0 if moved is None else time.monotonic() - moved
            beat = Beat(
                self.host,
                os.getpid(),
                self._parent,
                self._serial,
                moves,
                self._step,
                self._doing,
                still,
                gone,
            )
            self._store.set(_key(self.rank), json.dumps(asdict(beat)))
            self._published = (moves, gone)

    def _judge(self, now: float) -> None:
        if os.getppid() != self._parent:
            self._report(f"the launcher on {self.host} has ended", None)
        verdict = self._verdict()
        if verdict is not None:
            self._leave(verdict["rank"])
        beat = Beat(**json.loads(self._store.get(_key(self._watched))))
        if beat.gone is not None and self._watched != self.rank:
            self._watched = (self._watched + 1) % self.world
            self._news = (-1, now)
        elif beat.serial != self._news[0]:
            self._news = (beat.serial, now)
        if self._watched == self.rank:
            return
        if now - self._news[1] > self.timeout:
            self._report(self._silence(self._watched, beat), self._watched)
        if beat.still > self.timeout:
            self._who_hangs()

    def _silence(self, rank: int, beat: Beat) -> str:
        limit = f"--timeout {self.timeout:g} s"
        return f"rank {rank} on {beat.host} is no longer heard of ({limit}): it was at {beat.place}"

    def _who_hangs(self) -> None:
        """Of processes that all wait: who is behind the others, and whether it is there at all."""
        before = self._beats()
        time.sleep(2.5 * self._interval)
        self._publish()
        beats = {rank: beat for rank, beat in self._beats().items() if beat.gone is None}
        mine = Beat(**json.loads(self._store.get(_key(self.rank))))
        if beats.get(self._watched, mine).still <= self.timeout:
            return  # it has moved on
        rank, beat = min(({self.rank: mine} | beats).items(), key=lambda pair: pair[1].moves)
        if rank in before and before[rank].serial == beat.serial:
            self._report(self._silence(rank, beat), rank)
        if all(other.moves == beat.moves for other in beats.values()):
            self._report(
                f"no process has moved for {self.timeout:g} s (--timeout) and none is behind the others, all are at "
                f"{beat.place}: if that takes as long, raise --timeout",
                None,
            )
        self._report(
            f"rank {rank} on {beat.host} has not moved for {self.timeout:g} s (--timeout): it is still at {beat.place}",
            None,
        )

    def _report(self, text: str, rank: int | None) -> NoReturn:
        """Tell what was found, if nobody has, and end."""
        mine = json.dumps({"text": text, "rank": rank})
        try:
            found = self._store.compare_set("verdict", _NOBODY, mine).decode() == mine
        except RuntimeError:
            found = True
        if found and not leave_words("hang", text):
            self.speak(f"dsv3: {text}")
        self._leave(rank)

    def _leave(self, stopped: int | None) -> NoReturn:
        """End, after the one that is not heard of; else whoever started both would wait for it."""
        self._gone = GAVE_UP
        with suppress(RuntimeError):
            self._publish()
        if stopped is not None and stopped != self.rank:
            with suppress(RuntimeError, ProcessLookupError):
                beat = Beat(**json.loads(self._store.get(_key(stopped))))
                if beat.host == self.host and _state(beat.pid, self._parent) is not None:
                    os.kill(beat.pid, signal.SIGKILL)
        self._exit(LOST)

    def _exit(self, status: int) -> NoReturn:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


GAVE_UP = "it had lost another"


def _state(pid: int, parent: int) -> str | None:
    """A process's state (R, S, T, ...) by Linux's account; None if this parent has no such child that lives."""
    try:
        state, its_parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (OSError, ValueError):
        return None
    return state if state not in "ZX" and int(its_parent) == parent else None


def leave_words(kind: str, text: str, trace: str = "") -> bool:
    """Leave to the launcher what ended this process, the way torchrun wants it.

    kind: user, defect, peer or hang. Returns whether `dsv3.parallel.launch` will tell it; else nobody has told anyone.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": trace or text, "timestamp": str(int(time.time()))}
        words = {"message": {"message": text, "extraInfo": extra}, "dsv3": {"kind": kind, "trace": trace}}
        with suppress(OSError):
            Path(path).write_text(json.dumps(words), encoding="utf-8")
    return "DSV3_LAUNCHED" in os.environ


@contextmanager
def naming_peers(watch: Watch) -> Iterator[None]:
    """Make of an exchange's error one that names who was lost; other errors pass."""
    try:
        yield
    except RuntimeError as error:
        if not is_of_an_exchange(error):
            raise
        try:
            said = watch.name_peer(error)
        except RuntimeError:  # the store's: its thread says so
            said = f"{_STORELESS}: rank {watch.rank} on {watch.host} was at {watch.place}"
        raise PeerLost(f"{said}; the same command goes on from the last save") from error


def is_of_an_exchange(error: RuntimeError) -> bool:
    """Whether processes could not talk to each other. gloo raises plain RuntimeErrors, from files of its own."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        part in text for part in ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    )
