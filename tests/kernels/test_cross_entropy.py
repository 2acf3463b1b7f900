"""The head and its loss, a piece at a time, equal torch's cross-entropy of all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.kernels import cross_entropy
from dsv3.kernels.cross_entropy import IGNORE, linear_cross_entropy


def case(tokens: int, dim: int, vocab: int, ignored: float = 0.2, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, dim, generator=g)
    weight = torch.randn(vocab, dim, generator=g)
    targets = torch.randint(vocab, (tokens,), generator=g)
    targets[torch.rand(tokens, generator=g) < ignored] = IGNORE
    return hidden, weight, targets


def exact(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0) -> list[Tensor]:
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    loss = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE)
    return [loss.detach(), *torch.autograd.grad(loss * scale, (hidden, weight))]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0) -> list[Tensor]:
    hidden, weight = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, targets)
    return [loss.detach(), *torch.autograd.grad(loss * scale, (hidden, weight))]


def check(inputs: tuple[Tensor, ...], scale: float = 1.0, tolerance: float = 1e-5) -> None:
    names = ("loss", "hidden", "weight")
    for name, a, b in zip(names, ours(*inputs, scale), exact(*inputs, scale), strict=True):
        assert a.shape == b.shape
        assert b.abs().max() > 1e-6, name
        worst = ((a.double() - b).abs().max() / b.abs().max()).item()
        assert worst < tolerance, f"{name} differs by {worst:.1e}"


@pytest.mark.parametrize("tokens", [1, 5, 1023, 1024, 1025, 2500])
def test_value_and_gradients(tokens: int) -> None:
    """Fewer tokens than one piece of 1024, one piece, and several with a last one that is not full."""
    assert cross_entropy._PIECE == 1024
    check(case(tokens, 6, 11, ignored=0.2 if tokens > 1 else 0.0))


@settings(max_examples=40)
@given(
    st.integers(1, 60), st.integers(1, 9), st.integers(2, 30), st.sampled_from([0.0, 0.3]), st.integers(0, 99)
)
def test_small_pieces(tokens: int, dim: int, vocab: int, ignored: float, seed: int) -> None:
    inputs = case(tokens, dim, vocab, ignored, seed)
    inputs[2][0] = vocab - 1  # at least one counts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "_PIECE", 7)
        check(inputs, tolerance=1e-4)


@pytest.mark.parametrize("scale", [0.3, -2.0, 1024.0])
def test_the_gradient_that_comes_from_above_is_obeyed(scale: float) -> None:
    check(case(30, 6, 11), scale=scale)


def test_gradients_add_up_over_two_losses() -> None:
    """The head is shared by the main model and its MTP modules."""
    hidden, weight, targets = case(30, 6, 11)
    head = weight.clone().requires_grad_()
    other = hidden.flip(0)
    (
        linear_cross_entropy(hidden, head, targets) + 0.3 * linear_cross_entropy(other, head, targets)
    ).backward()
    assert head.grad is not None
    expected = exact(hidden, weight, targets)[2] + exact(other, weight, targets, 0.3)[2]
    torch.testing.assert_close(head.grad.double(), expected, rtol=1e-4, atol=1e-6)


def test_ignored_positions_count_for_nothing() -> None:
    hidden, weight, targets = case(20, 6, 11, ignored=0.5)
    counted = targets != IGNORE
    assert 0 < counted.sum() < 20
    loss, grad_hidden, grad_weight = ours(hidden, weight, targets)
    assert (grad_hidden[~counted] == 0).all() and (grad_hidden[counted] != 0).any(1).all()
    hidden[~counted] = 50.0
    again = ours(hidden, weight, targets)
    torch.testing.assert_close(again[0], loss)
    torch.testing.assert_close(again[2], grad_weight)
    alone = ours(hidden[counted], weight, targets[counted])
    torch.testing.assert_close(alone[0], loss)


def test_nothing_but_ignored_is_a_loss_of_zero() -> None:
    """torch's own mean would be 0 / 0; a batch of prompts alone must not spoil a training run."""
    hidden, weight, _ = case(9, 6, 11)
    for value in ours(hidden, weight, torch.full((9,), IGNORE)):
        assert (value == 0).all()


@pytest.mark.parametrize("target", [-1, -99, 11])
def test_targets_outside_the_vocabulary_are_not_silently_another_token(target: int) -> None:
    hidden, weight, targets = case(9, 6, 11)
    targets[4] = target
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(hidden, weight, targets)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = case(9, 6, 11)
    check((hidden * 1e3, weight, targets))


def test_bfloat16_has_a_float32_loss() -> None:
    hidden, weight, targets = case(50, 16, 40)
    inputs = hidden.bfloat16(), weight.bfloat16(), targets
    loss, grad_hidden, grad_weight = ours(*inputs)
    assert (loss.dtype, grad_hidden.dtype, grad_weight.dtype) == (
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    )
    check(inputs, tolerance=0.02)


def test_weight_gradients_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """400 pieces of bfloat16 that each add the same small amount: rounding every sum would lose many."""
    monkeypatch.setattr(cross_entropy, "_PIECE", 1)
    hidden = torch.ones(400, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16)
    _, _, grad = ours(hidden, weight, torch.zeros(400, dtype=torch.long))
    torch.testing.assert_close(grad.float(), torch.tensor([[-0.5], [0.5]]), rtol=0.01, atol=0)


def test_without_gradients() -> None:
    hidden, weight, targets = case(30, 6, 11)
    loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss.double(), exact(hidden, weight, targets)[0])


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for weights that could have one, as in validation."""
    hidden, weight, targets = case(30, 6, 11)
    monkeypatch.setattr(torch, "mm", lambda *a, **k: pytest.fail("a gradient was made"))
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight.requires_grad_(), targets) > 0


def test_second_derivatives_are_refused() -> None:
    hidden, weight, targets = case(30, 6, 11)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    (grad,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("leaf", [0, 1])
def test_either_may_be_frozen(leaf: int) -> None:
    inputs = list(case(30, 6, 11))
    expected = exact(*inputs)[1 + leaf]
    inputs[leaf] = inputs[leaf].requires_grad_()
    (grad,) = torch.autograd.grad(linear_cross_entropy(*inputs), inputs[leaf])
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-6)
