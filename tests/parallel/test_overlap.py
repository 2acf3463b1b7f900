"""Two passes take turns at their exchanges, always in the same order, and neither is left hanging."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3.parallel.overlap import pause, together


class Exchange(torch.autograd.Function):
    """What expert parallelism does: start, pause, await; and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: list[str], name: str) -> Tensor:
        ctx.log, ctx.name = log, name
        return _exchange(x * 2, log, f"forward {name}")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _exchange(grads[0] * 2, ctx.log, f"backward {ctx.name}"), None, None


def _exchange(x: Tensor, log: list[str], name: str) -> Tensor:
    log.append(f"start {name}")
    pause()
    log.append(f"await {name}")
    return x


def through(layers: int, log: list[str], name: str) -> tuple[Tensor, Tensor]:
    x = torch.ones(3, requires_grad=True)
    out = x
    for layer in range(layers):
        out = Exchange.apply(out, log, f"{name}{layer}")
    return x, out.sum()


def test_each_computes_while_the_other_waits() -> None:
    log: list[str] = []
    x, loss = through(2, log, "a")
    del log[:]
    (y, other), _ = together(lambda: through(2, log, "b"), loss.backward)
    assert log == [
        "start forward b0",
        "start backward a1",
        "await forward b0",
        "start forward b1",
        "await backward a1",
        "start backward a0",
        "await forward b1",
        "await backward a0",
    ]
    assert x.grad is not None and torch.equal(x.grad, torch.full((3,), 4.0))
    assert torch.equal(other, torch.tensor(12.0))
    other.backward()  # the graph that was made meanwhile is whole
    assert y.grad is not None and torch.equal(y.grad, x.grad)


@pytest.mark.parametrize(("forward", "backward"), [(1, 4), (4, 1), (0, 3), (3, 0), (0, 0)])
def test_the_longer_one_goes_on_alone(forward: int, backward: int) -> None:
    log: list[str] = []
    x, loss = through(backward, log, "a")
    del log[:]
    together(lambda: through(forward, log, "b"), loss.backward)
    assert len(log) == 2 * (forward + backward) and x.grad is not None
    shared = min(forward, backward)
    assert [line.split()[0] for line in log[: 2 * shared]] == (
        ["start", "start", *["await", "start"] * (2 * shared)]
    )[: 2 * shared]


def test_exactly_one_runs() -> None:
    """Each counts up what both share, in steps that would be lost if they ran at once."""
    count = 0

    def work() -> None:
        nonlocal count
        for _ in range(300):
            seen = count
            pause_somewhere()
            count = seen + 1
            pause()

    def pause_somewhere() -> None:
        threading.Event().wait(0.00001)  # lets another thread run, if one may

    together(work, work)
    assert count == 600


def test_without_a_second_pass_a_pause_is_nothing() -> None:
    pause()
    together(lambda: None, lambda: None)
    pause()


def fails() -> None:
    raise ZeroDivisionError


def pauses_then_fails() -> None:
    pause()
    pause()
    raise ZeroDivisionError


def goes_on(ended: list[str]) -> None:
    try:
        for _ in range(9):
            pause()
        ended.append("came to its end")
    except BaseException:
        ended.append("was ended")
        raise


@pytest.mark.parametrize("failing", [fails, pauses_then_fails])
@pytest.mark.parametrize("first", [True, False])
def test_a_failure_ends_both(failing: Callable[[], None], first: bool) -> None:
    ended: list[str] = []
    pair = [failing, lambda: goes_on(ended)]
    with pytest.raises(ZeroDivisionError):
        together(*(pair if first else reversed(pair)))
    assert ended == ([] if failing is fails and first else ["was ended"])
    assert together(lambda: 1, lambda: 2) == (1, 2)  # and the next pair can run


def test_a_failure_in_autograd() -> None:
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            pause()
            raise ZeroDivisionError

    log: list[str] = []
    loss = Failing.apply(torch.ones(3, requires_grad=True)).sum()
    with pytest.raises(ZeroDivisionError):
        together(lambda: through(3, log, "b"), loss.backward)
    assert log == ["start forward b0", "await forward b0", "start forward b1"]


def test_one_that_fails_after_the_other_has_ended() -> None:
    with pytest.raises(ZeroDivisionError):
        together(lambda: None, pauses_then_fails)


def test_interrupted_while_the_other_runs() -> None:
    """Ctrl-C reaches the thread that waits; the other is ended at its next pause."""
    import _thread

    ended: list[str] = []

    def interrupts() -> None:
        _thread.interrupt_main()
        for _ in range(200):
            pause_long()
        goes_on(ended)

    def pause_long() -> None:
        threading.Event().wait(0.001)

    # A background job of a shell has no handler of its own.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            together(pause, interrupts)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == ["was ended"]


def test_the_second_pass_has_the_first_one_s_state() -> None:
    def state() -> tuple[bool, int]:
        return torch.is_grad_enabled(), torch.get_num_threads()

    for threads in (2, 1):
        torch.set_num_threads(threads)
        with torch.no_grad():
            assert together(state, state) == ((False, threads),) * 2
        assert together(state, state) == ((True, threads),) * 2


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """Autograd's own threads find the baton, and both passes are on the caller's stream."""
    log: list[str] = []
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.ones(3, requires_grad=True, device="cuda")
        loss = Exchange.apply(Exchange.apply(x, log, "a0"), log, "a1").sum()
        del log[:]
        together(lambda: through(2, log, "b"), loss.backward)
        seen = together(torch.cuda.current_stream, torch.cuda.current_stream)
    assert seen == (stream, stream)
    assert log[:3] == ["start forward b0", "start backward a1", "await forward b0"]
    assert x.grad is not None and x.grad.tolist() == [4.0] * 3
