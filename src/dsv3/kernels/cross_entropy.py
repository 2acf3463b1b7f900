"""The output head and its cross-entropy in one, a piece of the tokens at a time.

Logits are by far the largest tensor of training (tokens * vocabulary), and everything the loss needs from
them is one number per token. So each piece of logits is made, turned into its loss and its gradient at once,
and forgotten: memory is one piece, and the softmax is computed in float32 whatever the model's dtype is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3.kernels.native import call, usable

IGNORE = -100
"""Target of a position that carries no loss."""

_PIECE = 1024  # tokens whose logits exist at once


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, count: int | None, needs_grad: bool
    ) -> Tensor:
        share = 1.0 / max(1, int((targets != IGNORE).sum()) if count is None else count)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        for start in range(0, hidden.shape[0], _PIECE):
            piece = slice(start, start + _PIECE)
            h = hidden[piece]
            loss, grad = _cross_entropy(h @ weight.T, targets[piece], share)
            total += loss
            if grad_hidden is not None and grad_weight is not None:
                torch.mm(grad, weight, out=grad_hidden[piece])
                grad_weight += grad.T @ h
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden, grad_weight = (t * grad.to(t.dtype) for t in (grad_hidden, grad_weight))
        return grad_hidden, grad_weight, None, None, None


def _cross_entropy(logits: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Sum of the losses, and the gradient of `share` times it; the logits are used up."""
    if usable(logits):
        if targets.shape != logits.shape[:1]:
            raise ValueError(f"targets of shape {tuple(targets.shape)} for {logits.shape[0]} tokens")
        wrong = (targets >= logits.shape[1]) | ((targets < 0) & (targets != IGNORE))
        if wrong.any():
            raise IndexError(f"target {int(targets[wrong][0])} of a vocabulary of {logits.shape[1]}")
        losses = torch.empty(len(targets), dtype=torch.float32)
        call("cross_entropy", logits, targets.contiguous(), losses, *logits.shape, share)
        return losses.sum(), logits
    counted = targets != IGNORE
    index = targets.masked_fill(~counted, 0).unsqueeze(1)
    grad = logits.float()
    lse = grad.logsumexp(dim=1, keepdim=True)
    loss = ((lse - grad.gather(1, index)).squeeze(1) * counted).sum()
    grad.sub_(lse).exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=grad.dtype))
    return loss, grad.mul_((counted * share).unsqueeze(1)).to(logits.dtype)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, count: int | None = None) -> Tensor:
    """Mean cross-entropy in nats of `hidden @ weight.T` against `targets`, a float32 scalar.

    hidden: [tokens, dim]; weight: [vocab, dim]; targets: [tokens] int64, IGNORE where there is no loss;
    count: what the sum is divided by, by default the targets that carry loss.
    """
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, count, needs_grad
    )
    return loss
