"""Two passes that take turns: while one's tokens travel, the other computes.

Half the time of an expert-parallel layer can go by in waiting for tokens to travel to their experts and back. DualPipe
pairs the forward pass of one microbatch with the backward pass of another, so that there is always one that can
compute (report, section 3.2.1, figure 4). DeepSeek cut the layers into chunks and wove the two by hand; here any
forward pass and any backward pass are woven, at the places where they call `pause`, which expert parallelism does
between sending something and needing what comes back:

    forward     gate, send | pause               experts, send back | pause          ...
    backward                 experts', send | pause                  gate's, send | pause

`together` runs the two in two threads of which exactly one is running at any time: a baton goes to and fro at each
pause. So it is a pair of coroutines, of code that knows nothing of it, and that autograd may call; as deterministic as
one thread, which it must be, since all processes of an expert group have to start their exchanges in the same order.

On CUDA both passes use one stream. An exchange is started on the stream of its communicator, and then the other pass
queues its kernels behind what has been computed, not behind the exchange; `wait()` holds back the stream, not the
thread, so by the time the first pass goes on, its tokens have arrived while the other's kernels ran. A turn costs the
host some 30 microseconds. Autograd runs backward passes of CUDA tensors in threads of its own, so the baton
belongs to the process: who calls `pause` is who has it. (Written for CUDA with this in mind, but not yet run there.)

On CPUs, gloo's own threads move the tokens meanwhile, which is a gain as far as they have a core to run on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

First = TypeVar("First")
Second = TypeVar("Second")


class _GivenUp(BaseException):
    """Ends one pass where the other has failed."""


class _Turns:
    """The baton of two passes, 0 and 1."""

    def __init__(self) -> None:
        self.turn = 0
        self.ended = [False, False]
        self.failed = False
        self._called = (threading.Semaphore(0), threading.Semaphore(0))

    def switch(self) -> None:
        """Let the other go on until it pauses; at once back here if it has ended."""
        me = self.turn
        if not self.ended[1 - me]:
            self._hand_over()
            self._called[me].acquire()
        if self.failed:
            raise _GivenUp

    def begin(self) -> None:
        """Of pass 1: wait until it is called for the first time."""
        self._called[1].acquire()
        if self.failed:
            raise _GivenUp

    @contextmanager
    def runs(self, me: int) -> Iterator[None]:
        """Around a whole pass: hand over for good when it ends, in whatever way."""
        try:
            yield
        except BaseException:
            self.failed = True
            raise
        finally:
            self.ended[me] = True
            if self.turn == me and not self.ended[1 - me]:
                self._hand_over()

    def _hand_over(self) -> None:
        self.turn = 1 - self.turn
        self._called[self.turn].release()


_turns: _Turns | None = None
_thread: ThreadPoolExecutor | None = None  # kept, since each new thread would start OpenMP's anew


def pause() -> None:
    """Called when something has been sent and not yet arrived: let the other pass go on, if two overlap."""
    if _turns is not None:
        _turns.switch()


def together(first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]:
    """Run two passes, handing over at each `pause`, and give what they return. `first` begins.

    When one has ended the other goes on without pauses. If one fails, the other is ended at its pause, and the failure
    is raised. `second` runs in another thread, with this one's grad mode, number of threads, CUDA device and stream.
    """
    global _turns, _thread
    assert _turns is None, "passes that overlap cannot be made of others that do"
    if _thread is None:
        _thread = ThreadPoolExecutor(1, "overlap")
    turns = _turns = _Turns()
    mode, threads = torch.is_grad_enabled(), torch.get_num_threads()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def other() -> Second:
        with turns.runs(1):
            turns.begin()
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            with torch.set_grad_enabled(mode), torch.cuda.stream(stream):  # which sets the device, too
                return second()

    ran: Future[Second] = _thread.submit(other)
    try:
        with turns.runs(0):
            result = first()
    except _GivenUp:
        ran.result()  # raises what it failed of
        raise
    finally:
        ran.exception()  # wait until nobody runs any more
        _turns = None
    return result, ran.result()
