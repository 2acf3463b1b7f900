"""Routed experts: every token through the few experts chosen for it.

All experts' weights lie in two tensors, `gate_up [experts, 2 * width, hidden]` and
`down [experts, hidden, width]`. Tokens are sorted by expert so that each expert multiplies one dense block,
then returned to their places and added up with their gates; no token is dropped.

Four ways to the same numbers, chosen by what is given:
- one token (decoding): one matrix-vector product per chosen expert, no sorting;
- a few tokens without gradient (decoding several sequences): the choices are sorted in Python, which is quicker
  than a dozen operations on small tensors;
- `grouped_mm`, one launch for all experts without reading the counts back to the host (CUDA in bf16), and where
  weights are FP8 its like in `dsv3.kernels.triton`;
- a loop over the experts that were chosen (everything else). In bf16 it pads an expert's rows, by an
  eighth at most: on a CPU oneDNN generates code for each new shape, which takes longer than multiplying a few
  hundred rows, and rounding makes shapes recur.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3.kernels import inference, triton
from dsv3.kernels.native import call, trains, usable
from dsv3.kernels.packed import Packed, Weight

Linear = Callable[[Tensor, Any], Tensor]
Grouped = Callable[[Tensor, Any, Tensor], Tensor]
"""Rows [rows, in] sorted by expert, matrices [experts, out, in], and where each expert's rows end [experts] int32."""

_FEW = 64  # tokens up to which `_few_tokens` was at least as fast as `_loop` (32 experts, 4 chosen)


def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up, where `gate_up` [..., 2 * width] holds both halves. Returns [..., width]."""
    if trains(gate_up) and gate_up.shape[-1] % 32 == 0:
        result: Tensor = _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
        return result
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def routed_experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Weight, down: Weight, linear: Linear | None = None
) -> Tensor:
    """Sum over each token's chosen experts of weight * down(SiLU(gate x) * up x).

    x: [tokens, hidden]; indices: [tokens, chosen] int64; weights: [tokens, chosen]; gate_up:
    [experts, 2 * width, hidden]; down: [experts, hidden, width], both may be packed; linear: what multiplies one expert's rows
    [rows, in] with a matrix [out, in], by default `F.linear`; its attribute `grouped`, if it has one, does so for all
    experts at once where `grouped_mm` would. Returns [tokens, hidden] in x's dtype.
    """
    if x.shape[0] and not torch.is_grad_enabled() and triton.takes_fp8(x, gate_up, down):
        return _grouped(x, indices, weights, gate_up, down, _grouped_fp8)
    if isinstance(gate_up, Packed) or isinstance(down, Packed):
        return _loop(x, indices, weights, gate_up, down, inference.linear) if x.shape[0] else x
    if not x.shape[0]:  # nothing to do, but whoever trains finds a gradient, zero, everywhere
        return F.linear(swiglu(F.linear(x, gate_up[0])), down[0]) * weights.sum()
    grouped: Grouped | None = _grouped_mm if linear is None else getattr(linear, "grouped", None)
    if grouped is not None and x.is_cuda and x.dtype == torch.bfloat16:
        return _grouped(x, indices, weights, gate_up, down, grouped)
    if linear is not None:
        return _loop(x, indices, weights, gate_up, down, linear)
    if x.shape[0] <= _FEW and not torch.is_grad_enabled():
        way = _one_token if x.shape[0] == 1 else _few_tokens
        return way(x, indices, weights, gate_up, down)
    return _loop(x, indices, weights, gate_up, down)


def _one_token(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    chosen: list[int] = indices[0].tolist()
    hidden = swiglu(torch.cat([F.linear(x, gate_up[e]) for e in chosen]))
    out = torch.cat([F.linear(row, down[e]) for e, row in zip(chosen, hidden.split(1), strict=True)])
    return weights.to(x.dtype) @ out


def _few_tokens(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    choices: list[int] = indices.flatten().tolist()
    order = sorted(range(len(choices)), key=choices.__getitem__)
    back = sorted(range(len(order)), key=order.__getitem__)
    runs = groupby(choices[i] for i in order)
    experts, sizes = zip(*((e, len(list(run))) for e, run in runs), strict=True)
    token, place = torch.tensor([[i // indices.shape[1] for i in order], back], device=x.device)

    rows = x.index_select(0, token).split(sizes)
    hidden = swiglu(torch.cat([F.linear(r, gate_up[e]) for e, r in zip(experts, rows, strict=True)]))
    rows = hidden.split(sizes)
    out = torch.cat([F.linear(r, down[e]) for e, r in zip(experts, rows, strict=True)])
    return _weighted(out.index_select(0, place), weights)


def _loop(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Weight, down: Weight, linear: Linear = F.linear
) -> Tensor:
    order, counts = _by_expert(indices, gate_up.shape[0])
    sizes: list[int] = counts.tolist()
    if x.dtype == torch.bfloat16:  # float32 goes through MKL, which takes any shape as it comes
        sizes = [_padded(count) for count in sizes]
    # Where the j-th choice (in expert order) stands in the padded rows, and which token each row holds.
    gaps = torch.tensor(sizes, device=x.device) - counts
    shift = (gaps.cumsum(0) - gaps).repeat_interleave(counts)
    place = torch.arange(order.numel(), device=x.device) + shift
    token = order.new_zeros(sum(sizes)).index_copy_(0, place, order // indices.shape[1])
    back = torch.empty_like(order).index_copy_(0, order, place)

    rows = _Dispatch.apply(x, token, back).split(sizes)  # type: ignore[no-untyped-call]
    # unbind and split, not indexing: their backward writes each gradient once instead of a padded copy per slice.
    experts = zip(rows, gate_up.unbind(), down.unbind(), strict=True)
    out = torch.cat([linear(swiglu(linear(r, w_in)), w_out) for r, w_in, w_out in experts if r.shape[0]])
    if weights.shape == indices.shape and trains(out):
        combined: Tensor = _Combine.apply(out, back, weights.float())  # type: ignore[no-untyped-call]
        return combined
    per_token: Tensor = _Collect.apply(out, back)  # type: ignore[no-untyped-call]
    return _weighted(per_token, weights)


def _padded(count: int) -> int:
    """The count rounded up to four significant bits: 1 to 16, then 18, 20 .. 32, then 36, 40 .. 64, ..."""
    step = 1 << max(0, (count - 1).bit_length() - 4)
    return -(-count // step) * step


def _grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)


def _grouped_fp8(rows: Tensor, weights: Packed, ends: Tensor) -> Tensor:
    from dsv3.kernels.triton import matmul

    return matmul.grouped(rows, weights.codes, ends, weights.scale)


def _grouped(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Weight,
    down: Weight,
    product: Grouped = _grouped_mm,
) -> Tensor:
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    # Not `bincount`, which has the host wait for the largest number.
    experts = torch.arange(gate_up.shape[0], device=x.device)
    ends = torch.searchsorted(flat[order], experts, right=True, out_int32=True)
    rows = x[order // indices.shape[1]]
    out = product(swiglu(product(rows, gate_up, ends)), down, ends)
    back = torch.empty_like(order).index_copy_(0, order, torch.arange(order.numel(), device=order.device))
    return _weighted(out[back], weights)


def _by_expert(indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Order [tokens * chosen] of the flat choices by expert, and how many each expert has [experts]."""
    flat = indices.flatten()
    return flat.argsort(stable=True), torch.bincount(flat, minlength=experts)


def _weighted(per_choice: Tensor, weights: Tensor) -> Tensor:
    """Outputs [tokens * chosen, hidden] times weights [tokens, chosen], added up per token."""
    per_token = per_choice.view(*weights.shape, -1)
    return (weights.to(per_token.dtype).unsqueeze(1) @ per_token).squeeze(1)


class _Dispatch(torch.autograd.Function):
    """rows = x[token]. A gather whose backward is a gather too: each token's rows are known, none collide."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        ctx.tokens = x.shape[0]
        return x.index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        if usable(grads[0]):
            return _combined(grads[0], back, None, ctx.tokens), None, None
        grad = grads[0].index_select(0, back)
        return grad.view(ctx.tokens, -1, grad.shape[-1]).sum(1), None, None


class _Collect(torch.autograd.Function):
    """per_choice = rows[back]; padding rows are read by nobody, so their gradient is zero."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        ctx.rows = rows.shape[0]
        return rows.index_select(0, back)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (back,) = ctx.saved_tensors
        (grad,) = grads
        return grad.new_zeros(ctx.rows, grad.shape[-1]).index_copy_(0, back, grad), None


def _combined(rows: Tensor, places: Tensor, weights: Tensor | None, tokens: int) -> Tensor:
    out = rows.new_empty(tokens, rows.shape[1])
    call("combine_forward", rows, places, weights, out, tokens, len(places) // tokens, rows.shape[1])
    return out


class _Combine(torch.autograd.Function):
    """_Collect and _weighted in one pass over the rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        rows, weights = rows.contiguous(), weights.contiguous()
        ctx.save_for_backward(rows, places, weights)
        return _combined(rows, places, weights, len(weights))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        rows, places, weights = ctx.saved_tensors
        grad_rows, grad_weights = torch.zeros_like(rows), torch.empty_like(weights)
        sizes = (*weights.shape, rows.shape[1])
        call(
            "combine_backward", grads[0].contiguous(), rows, places, weights, grad_rows, grad_weights, *sizes
        )
        return grad_rows, None, grad_weights


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        call("swiglu_forward", gate_up, out, out.numel() // out.shape[-1], out.shape[-1])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad, result = grads[0].contiguous(), torch.empty_like(gate_up)
        call("swiglu_backward", gate_up, grad, result, grad.numel() // grad.shape[-1], grad.shape[-1])
        return result
