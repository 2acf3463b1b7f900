"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, the mean in float32.

torch's `rms_norm` has no fused CPU kernel, and its decomposition walks over the data in float32 several
times, which in bf16 costs more than the matrix products around it. Here the sum of squares is one reduction
in float32 without a converted copy, the backward pass is written out, and only `x` and one number per row
are kept for it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3.kernels.native import call, pointer, trains, usable


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.rsqrt(norm.square() / x.shape[-1] + eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        return x * inverse.to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        x, weight, inverse = ctx.saved_tensors
        unit = x * inverse.to(x.dtype)
        grad_weight = (grad * unit).reshape(-1, x.shape[-1]).sum(0, dtype=torch.float32).to(weight.dtype)
        grad_unit = grad * weight
        # d unit / dx is the projection off x, divided by the rms.
        along = (grad_unit * unit).sum(-1, keepdim=True, dtype=torch.float32) / x.shape[-1]
        return (grad_unit - unit * along.to(x.dtype)) * inverse.to(x.dtype), grad_weight, None


def _native(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and x as rows with 1 / rms of each."""
    rows = x.reshape(-1, weight.shape[0])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    inverse = torch.empty(len(rows), dtype=torch.float32)
    call("rms_norm_forward", pointer(rows), rows.stride(0), weight, out, inverse, *rows.shape, eps)
    return out, rows, inverse


class _NativeRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, rows, inverse = _native(x, weight, eps)
        ctx.save_for_backward(rows, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad = grads[0].contiguous()
        rows, weight, inverse = ctx.saved_tensors
        grad_x = torch.empty_like(grad)
        sums = torch.empty(min(64, len(rows)), rows.shape[1], dtype=torch.float32)
        sizes = (*rows.shape, len(sums))
        call("rms_norm_backward", grad, pointer(rows), rows.stride(0), weight, inverse, grad_x, sums, *sizes)
        return grad_x, sums.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last dimension.

    x: [..., dim], float32 or bfloat16; weight: [dim]. Returns the shape and dtype of x.
    """
    if weight.shape == x.shape[-1:] and trains(x, weight):
        result: Tensor = _NativeRMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return result
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        result = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return result
    if weight.shape == x.shape[-1:] and usable(x, weight):
        return _native(x, weight, eps)[0]
    if x.dtype == torch.float32 or x.is_cuda or x.numel() <= 16 * x.shape[-1]:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)  # one call: the least overhead per token
    return (x * _inverse_rms(x, eps)).to(x.dtype) * weight
