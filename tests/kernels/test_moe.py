"""Every way through the routed experts equals the plain sum over them, and so do its gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.kernels import moe
from dsv3.kernels.moe import routed_experts, swiglu

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def naive(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One token and one expert at a time, in float64."""
    x, weights, gate_up, down = x.double(), weights.double(), gate_up.double(), down.double()
    rows = []
    for token, chosen in enumerate(indices.tolist()):
        out = torch.zeros_like(x[token])
        for place, expert in enumerate(chosen):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            out = out + weights[token, place] * (down[expert] @ (gate * torch.sigmoid(gate) * up))
        rows.append(out)
    return torch.stack(rows)


def case(
    tokens: int,
    experts: int,
    chosen: int,
    hidden: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    used: int | None = None,
    seed: int = 0,
) -> Case:
    """Random inputs in which only the first `used` experts are ever chosen."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=g)
    indices = torch.stack([torch.randperm(used or experts, generator=g)[:chosen] for _ in range(tokens)])
    weights = torch.rand(tokens, chosen, generator=g) + 0.1
    gate_up = torch.randn(experts, 2 * width, hidden, generator=g) / hidden**0.5
    down = torch.randn(experts, hidden, width, generator=g) / width**0.5
    return x.to(dtype), indices, weights, gate_up.to(dtype), down.to(dtype)


def check(ways: Callable[..., Tensor], inputs: Case, tolerance: float) -> None:
    """Values and all four gradients, relative to the largest number of each (or to 0.1)."""
    x, indices, weights, gate_up, down = inputs

    def run(f: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (x, weights, gate_up, down)]
        out = f(leaves[0], indices, *leaves[1:])
        pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
        return [out, *torch.autograd.grad(out, leaves, pull)]

    names = ["output", "x", "weights", "gate_up", "down"]
    for name, ours, theirs in zip(names, run(ways), run(naive), strict=True):
        assert ours.shape == theirs.shape
        assert theirs.any(), name
        largest = max(theirs.abs().max().item(), 0.1)
        worst = (ours.double() - theirs.double()).abs().max().item() / largest
        assert worst < tolerance, f"{name} differs by {worst:.1e}"


CASES = {
    "plain": case(9, 6, 3, 16, 8),
    "odd widths": case(11, 5, 2, 7, 3),
    "one expert": case(4, 1, 1, 8, 8),
    "all experts": case(5, 4, 4, 8, 12),
    "experts without tokens": case(6, 9, 2, 8, 4, used=3),
    "the last expert is empty": case(200, 4, 1, 8, 4, used=2),
    "rows that need padding": case(131, 3, 2, 8, 4),
    "rows that need none": case(64, 2, 2, 8, 4),
    "one token": case(1, 6, 3, 16, 8),
    "one number": case(3, 2, 1, 1, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_loop(name: str) -> None:
    check(moe._loop, CASES[name], 1e-5)
    check(routed_experts, CASES[name], 1e-5)


@settings(max_examples=40)
@given(st.data())
def test_loop_over_random_shapes(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 7), "experts")
    used = data.draw(st.integers(1, experts), "used")
    inputs = case(
        data.draw(st.sampled_from([1, 2, 17, 70]), "tokens"),
        experts,
        data.draw(st.integers(1, used), "chosen"),
        data.draw(st.integers(1, 20), "hidden"),
        data.draw(st.integers(1, 20), "width"),
        used=used,
        seed=data.draw(st.integers(0, 99), "seed"),
    )
    check(moe._loop, inputs, 2e-5)


def test_loop_gradients_against_finite_differences() -> None:
    x, indices, weights, gate_up, down = case(3, 4, 2, 2, 2, used=3)
    leaves = [t.double().requires_grad_() for t in (x, weights, gate_up, down)]
    assert torch.autograd.gradcheck(lambda x, w, g, d: moe._loop(x, indices, w, g, d), leaves)


def test_unused_experts_have_zero_gradient_and_not_none() -> None:
    x, indices, weights, gate_up, down = CASES["experts without tokens"]
    gate_up, down = gate_up.clone().requires_grad_(), down.clone().requires_grad_()
    routed_experts(x, indices, weights, gate_up, down).sum().backward()
    for grad in (gate_up.grad, down.grad):
        assert grad is not None
        assert (grad[3:] == 0).all()
        assert all(bool(grad[expert].any()) for expert in indices.unique())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens_at_all(dtype: torch.dtype) -> None:
    x, indices, weights, gate_up, down = case(3, 6, 3, 16, 8, dtype)
    leaves = [t.requires_grad_() for t in (x[:0], weights[:0], gate_up, down)]
    out = routed_experts(leaves[0], indices[:0], *leaves[1:])
    assert (out.shape, out.dtype) == ((0, 16), dtype)
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape and not grad.any(), "a gradient that is zero, not one that is missing"
    with torch.no_grad():
        assert routed_experts(leaves[0], indices[:0], *leaves[1:]).shape == (0, 16)


@pytest.mark.parametrize("name", ["one token", "one expert", "experts without tokens", "all experts"])
def test_one_token(name: str) -> None:
    x, indices, weights, gate_up, down = CASES[name]
    inputs = (x[:1], indices[:1], weights[:1], gate_up, down)
    torch.testing.assert_close(moe._one_token(*inputs).double(), naive(*inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_few_tokens(name: str) -> None:
    torch.testing.assert_close(moe._few_tokens(*CASES[name]).double(), naive(*CASES[name]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped(dtype: torch.dtype) -> None:
    """What a GPU runs; torch has a CPU version of it for widths of whole 16 bytes."""
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for inputs in [
        case(9, 6, 3, 16, 8, dtype),
        case(6, 9, 2, 8, 16, dtype, used=3),
        case(4, 1, 1, 8, 8, dtype),
        case(200, 4, 1, 8, 8, dtype, used=2),
    ]:
        check(moe._grouped, inputs, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    for inputs in [case(9, 6, 3, 16, 8, dtype), case(300, 9, 2, 64, 48, dtype, used=3)]:
        check(routed_experts, tuple(t.cuda() for t in inputs), tolerance)  # type: ignore[arg-type]


def test_loop_in_bfloat16() -> None:
    check(moe._loop, case(9, 6, 3, 16, 8, torch.bfloat16), 0.02)
    check(moe._loop, case(131, 3, 2, 8, 4, torch.bfloat16), 0.02)  # rows are padded


def test_the_way_is_chosen_by_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("_loop", "_one_token", "_few_tokens", "_grouped"):
        way = getattr(moe, name)
        monkeypatch.setattr(moe, name, lambda *a, name=name, way=way: (taken.append(name), way(*a))[1])
    one, few, many = CASES["one token"], CASES["plain"], CASES["rows that need padding"]
    with torch.no_grad():
        a = routed_experts(*one)
        routed_experts(*few)
        routed_experts(*many)
    b = routed_experts(*one)
    assert taken == ["_one_token", "_few_tokens", "_loop", "_loop"]
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_output_has_the_dtype_of_x(dtype: torch.dtype, tokens: int) -> None:
    inputs = case(tokens, 4, 2, 8, 8, dtype)
    assert inputs[2].dtype == torch.float32
    with torch.no_grad():
        out = routed_experts(*inputs)
    assert (out.dtype, out.shape) == (dtype, (tokens, 8))


def test_tokens_do_not_touch_each_other() -> None:
    """A row of NaN stays one row, in the value and in the gradient."""
    x, indices, weights, gate_up, down = case(6, 3, 2, 8, 4)
    x[2] = float("nan")
    x.requires_grad_()
    out = routed_experts(x, indices, weights, gate_up, down)
    assert out.isnan().any(1).tolist() == [i == 2 for i in range(6)]
    out[[0, 1, 3, 4, 5]].sum().backward()
    assert x.grad is not None and not x.grad[[0, 1, 3, 4, 5]].isnan().any()


def test_swiglu_is_silu_of_the_first_half_times_the_second() -> None:
    x = torch.randn(3, 4, 10, dtype=torch.float64)
    gate, up = x[..., :5], x[..., 5:]
    torch.testing.assert_close(swiglu(x), gate / (1 + (-gate).exp()) * up)
