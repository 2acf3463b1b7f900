"""RMSNorm against its formula in float64, with and without gradients, in both dtypes it is used in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.kernels import norm
from dsv3.kernels.norm import rms_norm

SHAPES = [(1,), (7,), (3, 5), (2, 3, 8), (40, 33), (2, 17, 64)]


def naive(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.double(), weight.double()
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight


def inputs(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(len(shape) + shape[-1])
    x = torch.randn(shape, generator=g) * scale
    return x.to(dtype), (1 + 0.3 * torch.randn(shape[-1], generator=g)).to(dtype)


def error(ours: Tensor, exact: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    assert ours.shape == exact.shape
    return ((ours.double() - exact).abs().max() / exact.abs().max()).item()


def with_gradients(f: Callable[..., Tensor], x: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = f(x, weight, eps)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(x.dtype)
    return [out, *torch.autograd.grad(out, (x, weight), pull.to(out.dtype))]


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32(shape: tuple[int, ...], eps: float) -> None:
    x, weight = inputs(shape, torch.float32)
    assert error(rms_norm(x, weight, eps), naive(x, weight, eps)) < 1e-6
    if shape == (1,):
        return  # the gradient of x / |x| is zero: nothing to be relative to
    ours, exact = (with_gradients(f, x, weight, eps) for f in (rms_norm, naive))
    for name, a, b in zip(("value", "x", "weight"), ours, exact, strict=True):
        assert error(a, b.double()) < 3e-6, name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16(shape: tuple[int, ...]) -> None:
    """(40, 33) and (2, 17, 64) have more rows than the one-call path takes; the others take it."""
    x, weight = inputs(shape, torch.bfloat16)
    out = rms_norm(x, weight, 1e-6)
    assert out.dtype == torch.bfloat16
    assert error(out, naive(x, weight, 1e-6)) < 0.015
    if shape == (1,):
        return
    ours, exact = (with_gradients(f, x, weight, 1e-6) for f in (rms_norm, naive))
    assert [t.dtype for t in ours] == [torch.bfloat16] * 3
    for name, a, b in zip(("value", "x", "weight"), ours, exact, strict=True):
        assert error(a, b.double()) < 0.03, name


@settings(max_examples=40)
@given(
    rows=st.integers(1, 40),
    dim=st.integers(2, 70),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_random_shapes_and_scales(rows: int, dim: int, scale: float, dtype: torch.dtype) -> None:
    x, weight = inputs((rows, dim), dtype, scale)
    tolerance = 1e-6 if dtype == torch.float32 else 0.015
    exact = naive(x, weight, 1e-6)
    assert error(rms_norm(x, weight, 1e-6), exact) < tolerance
    assert error(rms_norm(x, weight.clone().requires_grad_(), 1e-6), exact) < tolerance


def test_gradients_against_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, for which the one float32 step is replaced by an exact one."""

    def exactly(x: Tensor, eps: float) -> Tensor:
        return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    monkeypatch.setattr(norm, "_inverse_rms", exactly)
    x, weight = (t.double().requires_grad_() for t in inputs((3, 5), torch.float32))
    with torch.autograd.set_multithreading_enabled(False):
        assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-2), (x, weight), atol=1e-5, rtol=1e-4)


def test_the_mean_is_taken_in_float32() -> None:
    """In bfloat16 a sum of 4096 ones would stop at 256."""
    x = torch.ones(32, 4096, dtype=torch.bfloat16)
    weight = torch.ones(4096, dtype=torch.bfloat16)
    for w in (weight, weight.clone().requires_grad_()):
        for rows in (1, 32):
            assert (rms_norm(x[:rows], w, 1e-6) == 1).all()


def test_a_row_of_zeros_stays_zero_and_has_a_finite_gradient() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    out = rms_norm(x, torch.ones(8), 1e-6)
    assert (out == 0).all()
    out.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    torch.testing.assert_close(x.grad, torch.full((2, 8), 1e3))  # 1 / sqrt(eps)


@pytest.mark.parametrize("leaf", ["x", "weight"])
def test_either_may_be_frozen(leaf: str) -> None:
    x, weight = inputs((4, 6), torch.float32)
    exact = dict(zip(("x", "weight"), with_gradients(naive, x, weight, 1e-6)[1:], strict=True))
    given = {"x": x.clone(), "weight": weight.clone()}
    given[leaf].requires_grad_()
    pull = torch.randn((4, 6), generator=torch.Generator().manual_seed(3))
    (grad,) = torch.autograd.grad(rms_norm(**given, eps=1e-6), given[leaf], pull)
    assert error(grad, exact[leaf].double()) < 3e-6


def test_rows_are_independent_of_their_batch() -> None:
    """The one-call path and the other give a row the same value, within bfloat16's rounding."""
    x, weight = inputs((40, 32), torch.bfloat16)
    together = rms_norm(x, weight, 1e-6)
    alone = torch.cat([rms_norm(row, weight, 1e-6) for row in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=0.016, atol=0)


def test_second_derivatives_are_refused() -> None:
    x, weight = inputs((4, 6), torch.float32)
    out = rms_norm(x.requires_grad_(), weight, 1e-6)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
