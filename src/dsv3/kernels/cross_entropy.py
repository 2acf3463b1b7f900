"""The output head and its cross-entropy in one, a piece of the tokens at a time.

Logits are by far the largest tensor of training (tokens * vocabulary), and everything the loss needs from
them is one number per token. So each piece of logits is made, turned into its loss and its gradient at once,
and forgotten: memory is one piece, and the softmax is computed in float32 whatever the model's dtype is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Target of a position that carries no loss."""

_PIECE = 1024  # tokens whose logits exist at once


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        counted = targets != IGNORE
        share = 1.0 / counted.sum().clamp(min=1).item()
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        needs_grad = hidden.requires_grad or weight.requires_grad
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        for start in range(0, hidden.shape[0], _PIECE):
            piece = slice(start, start + _PIECE)
            h, mask = hidden[piece], counted[piece]
            index = targets[piece].masked_fill(~mask, 0).unsqueeze(1)
            logits = (h @ weight.T).float()
            lse = logits.logsumexp(dim=1, keepdim=True)
            total += ((lse - logits.gather(1, index)).squeeze(1) * mask).sum()
            if grad_hidden is None or grad_weight is None:
                continue
            grad = logits.sub_(lse).exp_()
            grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=grad.dtype))
            grad = grad.mul_((mask * share).unsqueeze(1)).to(h.dtype)
            grad_hidden[piece] = grad @ weight
            grad_weight += grad.T @ h
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total * share

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight * grad.to(grad_weight.dtype), None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of `hidden @ weight.T` against `targets`, a float32 scalar.

    hidden: [tokens, dim]; weight: [vocab, dim]; targets: [tokens] int64, IGNORE where there is no loss.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return loss
