"""Rows to all that want them and back as sums, against the same done with indexing in one process."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.parallel import exchange
from dsv3.parallel.exchange import Route, Wire, decode, encode, gather, scatter
from tests.parallel.processes import run

WIRES: tuple[Wire, ...] = ("plain", "fp8")


def rounded(x: Tensor) -> Tensor:
    """x as e4m3 in tiles of 128 with power-of-two scales, one tile after another."""
    out = torch.empty_like(x, dtype=torch.float32)
    for row, into in zip(x.float(), out, strict=True):
        for start in range(0, x.shape[1], 128):
            tile = row[start : start + 128]
            largest = tile.abs().max().item()
            scale = 2.0 ** math.ceil(math.log2(largest / 448)) if largest else 1.0
            into[start : start + 128] = (tile / scale).to(torch.float8_e4m3fn).float() * scale
    return out.to(x.dtype)


# The wire ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 5),
    width=st.sampled_from([1, 2, 127, 128, 129, 300]),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_fp8_messages(rows: int, width: int, size: float, dtype: torch.dtype, seed: int) -> None:
    """A byte for each number and tile; rounded once, rows are the same bits however often they travel."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * size
    x = (x * torch.randn(rows, width, generator=generator).mul(3).exp()).to(dtype)
    if rows > 1:
        x[1] = 0
    message = encode(x, "fp8")
    assert message.dtype == torch.uint8 and message.shape == (rows, width + -(-width // 128))
    once = decode(message, "fp8", width, dtype)
    assert torch.equal(once, rounded(x))
    assert torch.equal(decode(encode(once, "fp8"), "fp8", width, dtype), once)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_so(bad: float) -> None:
    """In its tile, so that whoever looks for it finds it after it has travelled."""
    x = torch.ones(2, 300)
    x[1, 130] = bad
    got = decode(encode(x, "fp8"), "fp8", 300, torch.float32)
    assert not got[1, 128:256].isfinite().all()
    assert torch.equal(got[0], x[0]) and torch.equal(got[1, :128], x[1, :128])


# Exchanges ---------------------------------------------------------------------------------------------
# Member m multiplies what it gets by m + 2 and by the number that travels beside, and sends it back.


@dataclass(frozen=True)
class Case:
    """Rows of each member, how likely one goes to each, and the form in which they travel."""

    rows: tuple[int, ...]
    chances: tuple[float, ...]
    width: int = 5
    forward: Wire = "plain"
    backward: Wire = "plain"
    back: Wire = "plain"
    back_backward: Wire = "plain"
    dtype: torch.dtype = torch.float32
    frozen: tuple[int, ...] = ()
    """Members on which nothing requires a gradient."""

    def inputs(self, member: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [rows, width], beside [rows, 1], wanted [rows, members], and the output's gradient."""
        generator = torch.Generator().manual_seed(member)
        rows, members = self.rows[member], len(self.rows)
        x, grad = torch.randn(2, rows, self.width, generator=generator).to(self.dtype)
        wanted = torch.rand(rows, members, generator=generator) < torch.tensor(self.chances)
        amount = torch.randint(1, 4, (rows, members), generator=generator)
        return x, torch.randn(rows, 1, generator=generator), wanted * amount, grad


CASES = [
    Case((7, 3, 5, 4), (0.5, 0.5, 0.5, 0.5)),
    Case((6, 0, 1, 9), (0.5, 1.0, 0.0, 0.2), width=3),  # one without rows, one that nobody sends to
    Case((5, 3, 8, 2), (0.0, 0.0, 1.0, 0.0)),  # all to one
    Case((0, 0, 1, 0), (1.0, 0.0, 0.0, 1.0)),  # one row in all
    Case((0, 0, 0, 0), (1.0, 1.0, 1.0, 1.0)),  # none
    Case((4, 4, 4, 4), (0.0, 0.0, 0.0, 0.0)),  # rows that nobody wants
    Case((4, 5, 6, 7), (0.5, 0.5, 0.5, 0.5), dtype=torch.float64),
    Case((4, 5, 6, 7), (0.5, 0.5, 0.5, 0.5), frozen=(0, 3)),
    Case((4, 5, 6, 7), (0.5, 0.5, 0.5, 0.5), frozen=(0, 1, 2, 3)),
    Case((7, 0, 5, 4), (0.5, 0.6, 0.7, 0.8), width=200, forward="fp8", back_backward="fp8"),
    Case((7, 3, 5, 4), (0.5, 0.5, 0.5, 0.5), width=128, backward="fp8", back="fp8"),
    Case((0, 0, 0, 0), (0.5, 0.5, 0.5, 0.5), width=130, forward="fp8", back_backward="fp8"),
    Case((7, 3, 5, 4), (0.5, 0.5, 0.5, 0.5), width=300, forward="fp8", back="fp8", dtype=torch.bfloat16),
]


def exchange_all(cases: list[Case]) -> list[dict[str, Any]]:
    """What this process has of each case."""
    me, found = dist.get_rank(), []
    calls: list[str] = []
    original = dist.all_to_all_single

    def started(*args: Any, **kwargs: Any) -> Any:
        calls.append("asynchronous" if kwargs.get("async_op") else "counts")
        return original(*args, **kwargs)

    for case in cases:
        x, beside, wanted, grad = case.inputs(me)
        if me not in case.frozen:
            x.requires_grad_()
            beside.requires_grad_()
        calls.clear()
        with (
            patch.object(dist, "all_to_all_single", started),
            patch.object(exchange, "pause", lambda: calls.append("pause")),
        ):
            route = Route.of(wanted, dist.distributed_c10d._get_default_group())
            rows, near = scatter(x, beside, route, case.forward, case.backward)()
            assert rows.requires_grad
            made = rows * (me + 2) * near.to(rows.dtype)
            out = gather(made, route, case.back, case.back_backward)
            out.backward(grad)
        with torch.no_grad():
            again, _ = scatter(x, beside, route, case.forward)()
            assert not again.requires_grad and torch.equal(again, rows)
        result = {"rows": rows.detach(), "out": out.detach(), "x": x.grad, "beside": beside.grad}
        arrays = {k: None if v is None else v.float().numpy() for k, v in result.items()}
        counts = {"calls": list(calls), "choices": route.choices, "come": route.come}
        found.append(arrays | counts | {"reached": route.reached.tolist()})
    return found


def alone(case: Case, member: int) -> dict[str, Tensor]:
    """The same from one process's sight: what it gets, and what happens to its own rows."""
    forms = {"plain": lambda t: t, "fp8": rounded}
    inputs = [case.inputs(m) for m in range(len(case.rows))]
    got = [forms[case.forward](x)[wanted[:, member] > 0] for x, _, wanted, _ in inputs]
    x, beside, wanted, grad = inputs[member]
    out, for_x, for_beside = (torch.zeros(t.shape) for t in (x, x, beside))
    given, grad, near = forms[case.forward](x), forms[case.back_backward](grad), beside.to(x.dtype)
    for m in range(len(case.rows)):
        goes = (wanted[:, m : m + 1] > 0).float()
        out += forms[case.back](given * (m + 2) * near).float() * goes
        for_x += forms[case.backward](grad * near * (m + 2)).float() * goes
        for_beside += (grad.float() * (m + 2) * given.float() * goes).sum(1, keepdim=True)
    return {"rows": torch.cat(got), "out": out, "x": for_x, "beside": for_beside}


def test_exchanges() -> None:
    """Values and gradients; which collectives and pauses there are does not depend on who has rows or gradients."""
    everyones = run(4, exchange_all, CASES)
    for i, case in enumerate(CASES):
        for member, results in enumerate(everyones):
            found = results[i]
            start_two, one = ["asynchronous"] * 2, ["asynchronous", "pause"]
            order = ["counts", *start_two, "pause", *one, *one, *start_two, "pause"]
            assert found["calls"] == order, (case, member)
            for name, expected in alone(case, member).items():
                if name in ("x", "beside") and member in case.frozen:
                    assert found[name] is None
                    continue
                rtol, atol = (2e-2, 5e-2) if case.dtype == torch.bfloat16 else (1e-5, 1e-6)
                torch.testing.assert_close(
                    torch.from_numpy(found[name]),
                    expected.float(),
                    rtol=rtol,
                    atol=atol,
                    msg=lambda m, where=(case, member, name): f"{where}: {m}",
                )
            inputs = [case.inputs(m)[2] for m in range(4)]
            assert found["come"] == [int((wanted[:, member] > 0).sum()) for wanted in inputs]
            assert found["choices"] == sum(int(wanted[:, member].sum()) for wanted in inputs)
            assert found["reached"] == (inputs[member] > 0).sum(1).tolist()


def sum_many() -> float:
    """One row of ones goes to all and comes back as ones, but from one member as 256."""
    group = dist.distributed_c10d._get_default_group()
    x = torch.ones(1, 4, dtype=torch.bfloat16)
    route = Route.of(torch.ones(1, 4, dtype=torch.int64), group)
    rows, _ = scatter(x, torch.ones(1, 1), route)()
    return gather(rows * (256 if dist.get_rank() == 0 else 1), route)[0, 0].item()


def test_sums_are_rounded_once() -> None:
    """256 + 1 + 1 + 1 is 256 in bfloat16 if it is rounded each time."""
    assert run(4, sum_many) == [260.0] * 4  # 259 lies between 258 and 260
