"""FP8 mixed precision (report, section 3.3): the three matrix products of a linear layer in e4m3.

    Fprop   y  = x W^T      x in 1 x 128 tiles (a token's 128 channels),    W in 128 x 128 blocks
    Dgrad   dx = dy W       dy in 1 x 128 tiles,                            the same blocks, transposed
    Wgrad   dW = dy^T x     both in 128 x 1 tiles (128 tokens of a channel), summed into float32

Tiles lie along the dimension that is summed, so that scales can be taken out of the sum (`dsv3.kernels.fp8`),
and are scaled by the largest number in them as they are made, with no history. All tensors are e4m3: tiles
this small share an exponent, so gradients need no e5m2. What a layer keeps of its input for Wgrad is the FP8
tiles of Fprop, half of bfloat16; in the backward pass they are read back and tiled anew along the tokens.

Where FP8 is: the matrices of attention (q_a, q_b, kv_a, kv_b, o, or q), of dense layers, of shared and of
routed experts, also in the blocks of MTP modules. Where it is not: embedding, output head, gates, norms,
attention itself, and MTP's `eh_proj`, which the report does not name and the released weights keep in
bfloat16. Three inputs are special (3.3.3):

- of the matrix after attention: it is kept as E5M6, and its scales are powers of two, so that tiling anew
  adds no error. (The report's attention reads these twelve bits in its own backward pass too; torch's has its
  own bfloat16.)
- of SwiGLU: kept in FP8, and its output, the input of `down_proj`, is not kept but computed again.
- of routed experts, and the gradients that come back to them: power-of-two scales, as these are what travels
  between nodes in FP8.

`apply_fp8` changes a model from outside, layer by layer. Parameters, their names and the float32 masters in
the optimiser stay what they were. Weights are quantised where they are used, in each pass, from the model's
bfloat16: that costs little beside the product, and leaves no second copy for each microbatch in flight. Wgrad can be
put off, for pipelines that fill gaps with it (`dsv3.parallel.deferred`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsv3.kernels.fp8 import fp8_matmul
from dsv3.kernels.moe import Linear, swiglu
from dsv3.model.attention import LatentAttention
from dsv3.model.layers import FeedForward
from dsv3.model.moe import Experts
from dsv3.parallel.deferred import later
from dsv3.quant import dequantize_e5m6, dequantize_tiles, quantize_blocks, quantize_e5m6, quantize_tiles

Tiles = tuple[Tensor, Tensor]
"""e4m3 numbers [rows, cols] and their scales [rows, ceil(cols / 128)]."""


def apply_fp8(model: nn.Module) -> None:
    """Make every linear layer that the report has in FP8 compute in FP8, in place."""
    for module in model.modules():
        if isinstance(module, LatentAttention):
            for name, linear in module.named_children():
                if isinstance(linear, nn.Linear):
                    linear.__class__ = Fp8AfterAttention if name == "o_proj" else Fp8Linear
        elif isinstance(module, FeedForward):
            module.__class__ = Fp8FeedForward
        elif isinstance(module, Experts):
            module.__class__ = Fp8Experts


class Fp8Linear(nn.Linear):
    """`nn.Linear` with its products in FP8. A bias is added in the output's dtype."""

    after_attention = False

    def forward(self, x: Tensor) -> Tensor:
        out = fp8_linear(x.flatten(0, -2), self.weight, self.after_attention)
        out = out.view(*x.shape[:-1], self.weight.shape[0])
        return out if self.bias is None else out + self.bias


class Fp8AfterAttention(Fp8Linear):
    """The output matrix of attention: its input is kept in E5M6."""

    after_attention = True


class Fp8FeedForward(FeedForward):
    """SwiGLU feed-forward in FP8, a dense layer's or of shared experts."""

    def forward(self, x: Tensor) -> Tensor:
        linear = _ExpertLinear(power_of_two=False)
        hidden = linear(x.flatten(0, -2), self.gate_up_proj.weight)
        return linear(swiglu(hidden), self.down_proj.weight).view_as(x)


class Fp8Experts(Experts):
    """Routed experts in FP8."""

    @property
    def linear(self) -> Linear:  # type: ignore[override]  # a new one for each forward pass
        return _ExpertLinear(power_of_two=True)


# The three products ------------------------------------------------------------------------------------


def _fprop(x: Tiles, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return fp8_matmul(*x, *quantize_blocks(weight, check=False), dtype)


def _dgrad(grad: Tensor, weight: Tensor, power_of_two: bool = False) -> Tensor:
    blocks, scale = quantize_blocks(weight, check=False)
    return fp8_matmul(*quantize_tiles(grad, power_of_two), blocks.T, scale.T, grad.dtype)


def _wgrad(grad: Tensor, x: Tensor, dtype: torch.dtype, x_power: bool, grad_power: bool = False) -> Tensor:
    operands = *quantize_tiles(grad.T, grad_power), *quantize_tiles(x.T, x_power)
    return fp8_matmul(*operands, torch.float32).to(dtype)


# Layers ------------------------------------------------------------------------------------------------


def fp8_linear(x: Tensor, weight: Tensor, after_attention: bool = False) -> Tensor:
    """`x @ weight.T` and its gradients in FP8: x [tokens, in], weight [out, in]. Returns [tokens, out] in x's dtype.

    after_attention: whether x is attention's output, which is kept in E5M6 and scaled by powers of two.
    """
    out: Tensor = _Fp8Linear.apply(x, weight, after_attention)  # type: ignore[no-untyped-call]
    return out


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, after_attention: bool) -> Tensor:
        tiles = quantize_tiles(x, after_attention)
        ctx.after_attention = after_attention
        ctx.save_for_backward(*(quantize_e5m6(x) if after_attention else tiles))
        ctx.weight = weight
        return _fprop(tiles, weight, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (kept, scale), weight, after_attention = ctx.saved_tensors, ctx.weight, ctx.after_attention

        def wgrad() -> Tensor:
            if after_attention:
                x = dequantize_e5m6(kept, scale, weight.shape[1])
            else:
                x = dequantize_tiles(kept, scale)
            return _wgrad(grad, x, weight.dtype, after_attention)

        return _dgrad(grad, weight), later(weight, wgrad), None


class _ExpertLinear:
    """The two products of `linear(swiglu(linear(x, gate_up)), down)`, in this order, as one step for autograd.

    To keep SwiGLU's input and not its output, whoever differentiates must see both products and what is between.
    So the first call computes without a graph and remembers; the second puts one node for all into the graph.
    """

    def __init__(self, power_of_two: bool) -> None:
        self.power_of_two = power_of_two
        self.first: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.first is None:
            with torch.no_grad():
                tiles = quantize_tiles(x, self.power_of_two)
                hidden = _fprop(tiles, weight, x.dtype)
            self.first = x, weight, *tiles, hidden
            return hidden
        first, self.first = self.first, None
        out: Tensor = _Fp8Expert.apply(*first, x, weight, self.power_of_two)  # type: ignore[no-untyped-call]
        return out


class _Fp8Expert(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: Tensor,
        tiles: Tensor,
        scale: Tensor,
        hidden: Tensor,
        activated: Tensor,
        down: Tensor,
        power_of_two: bool,
    ) -> Tensor:
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(tiles, scale, *quantize_tiles(hidden))
            ctx.matrices, ctx.power_of_two = (gate_up, down), power_of_two
        return _fprop(quantize_tiles(activated), down, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (gate_up, down), power = ctx.matrices, ctx.power_of_two
        tiles, scale, hidden, hidden_scale = ctx.saved_tensors
        with torch.enable_grad():
            hidden = dequantize_tiles(hidden, hidden_scale, grad.dtype).requires_grad_()
            activated = swiglu(hidden)
        grad_activated = _dgrad(grad, down, power)
        (grad_hidden,) = torch.autograd.grad(activated, hidden, grad_activated)
        grad_x, read = _dgrad(grad_hidden, gate_up), activated.detach()

        def wgrad_down() -> Tensor:
            return _wgrad(grad, read, down.dtype, x_power=False, grad_power=power)

        def wgrad_gate_up() -> Tensor:
            return _wgrad(grad_hidden, dequantize_tiles(tiles, scale), gate_up.dtype, x_power=power)

        grad_gate_up, grad_down = later(gate_up, wgrad_gate_up), later(down, wgrad_down)
        return grad_x, grad_gate_up, None, None, None, None, grad_down, None
