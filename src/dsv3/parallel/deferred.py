"""Weight gradients put off: the second half of a backward pass, for when a pipeline has nothing else to do.

A matrix W with y = x W^T has two gradients: that of its input, dx = dy W, for which the stage before waits, and its
own, dW = dy^T x, for which nobody does until the optimiser's step. Autograd computes both at once. Zero bubble
schedules (and DualPipe, which takes this from them) compute the first alone (I), hand it on, and fill what would be
waiting with the second (W).

`apply_deferral` changes a model from outside so that its matrices ask, each time their own gradient is due, whether
to compute it now. Inside `put_off()` they do not, but leave a piece of work that holds x and dy; run in order, the
work gives the very numbers that autograd would have, added to the `.grad` of the same parameters:

    with put_off() as work:
        loss.backward()      # I
    ...
    for piece in work:       # W
        piece()

Put off are the matrices of attention, of feed-forwards, and of routed experts. Not put off, that is, in I, is all that
is small or shared: norms, biases, gates, the embedding, the head (whose gradient the loss has made already in its
forward pass, `dsv3.kernels.cross_entropy`) and MTP's `eh_proj`. With `dsv3.train.fp8`, which calls `later` itself, all
FP8 products are split likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsv3.kernels.moe import swiglu
from dsv3.model.layers import FeedForward
from dsv3.model.moe import Experts

Work = list[Callable[[], None]]
"""What is left to do of a backward pass."""

# Where work goes to. One for the process and not for the thread: on CUDA, autograd has threads of its own.
_left: Work | None = None


@contextmanager
def put_off() -> Iterator[Work]:
    """Have backward passes in here leave the gradients of matrices. Gives what is left to do.

    There may be one at a time; a forward pass may run beside it.
    """
    global _left
    assert _left is None, "two backward passes at once"
    work: Work = []
    _left = work
    try:
        yield work
    finally:
        _left = None


def later(matrix: Tensor, gradient: Callable[[], Tensor]) -> Tensor | None:
    """For the backward pass of an autograd function: its matrix's gradient, or None if that is put off.

    matrix: what was given to the function, a parameter or a part of one (`unbind`), and not what `save_for_backward`
    gives back, which does not know whose part it is. gradient: computes it, in the matrix's shape and dtype.
    """
    whole = matrix if matrix.is_leaf else matrix._base
    if _left is None or whole is None or not whole.is_leaf:
        return gradient()
    _left.append(partial(_add, whole, matrix, gradient))
    return None


@torch.no_grad()
def _add(whole: Tensor, matrix: Tensor, gradient: Callable[[], Tensor]) -> None:
    """Add a gradient to that of its parameter, to the rows that the matrix is."""
    if whole is matrix:
        grad = gradient()
        whole.grad = grad if whole.grad is None else whole.grad.add_(grad)
        return
    if whole.grad is None:
        whole.grad = torch.zeros_like(whole)
    offset = int(matrix.storage_offset() - whole.storage_offset() + whole.grad.storage_offset())
    whole.grad.as_strided(matrix.size(), matrix.stride(), offset).add_(gradient())


# The products ------------------------------------------------------------------------------------------


@torch.compiler.disable  # type: ignore[untyped-decorator]
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` whose weight gradient can be put off: x [..., in], weight [out, in]; returns [..., out]."""
    out: Tensor = _Linear.apply(x.flatten(0, -2), weight, bias)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x,), weight = grads, ctx.saved_tensors, ctx.weight
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            grad @ weight if for_x else None,
            later(weight, lambda: grad.T @ x) if for_weight else None,
            grad.sum(0) if for_bias else None,
        )


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, ends)
        ctx.weights = weights
        return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (rows, ends), weights = grads, ctx.saved_tensors, ctx.weights
        for_rows, for_weights, _ = ctx.needs_input_grad
        return (
            F.grouped_mm(grad, weights, offs=ends) if for_rows else None,
            later(weights, lambda: F.grouped_mm(grad.T, rows, offs=ends)) if for_weights else None,
            None,
        )


class DeferredProducts:
    """What `routed_experts` multiplies with: one expert's rows, or those of all experts in one launch."""

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = linear(x, weight)
        return out

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def grouped(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """rows [rows, in] by expert, which end at `ends` [experts]; weights [experts, out, in]."""
        out: Tensor = _Grouped.apply(rows, weights, ends)  # type: ignore[no-untyped-call]
        return out


# Modules -----------------------------------------------------------------------------------------------


class DeferredLinear(nn.Linear):
    """`nn.Linear` whose weight gradient can be put off."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = linear(x, self.weight, self.bias)
        return out


class DeferredFeedForward(FeedForward):
    """SwiGLU feed-forward, the gradients of both of whose matrices can be put off."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = linear(swiglu(self.gate_up_proj(x)), self.down_proj.weight)
        return out


def apply_deferral(model: nn.Module) -> None:
    """Make a model's matrices ask `later`, in place: parameters, names and hooks stay.

    Before or after `apply_recompute`, expert parallelism (of any kind that multiplies by what `Experts.linear` is) and
    `apply_fp8`, whose layers ask by themselves.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = DeferredLinear
        elif type(module) is FeedForward:
            module.__class__ = DeferredFeedForward
        elif isinstance(module, Experts) and module.linear is None:
            module.linear = DeferredProducts()
