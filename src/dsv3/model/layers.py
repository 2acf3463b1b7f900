"""The small layers that everything else is made of: RMSNorm, the SwiGLU feed-forward, a linear layer that is packed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsv3.kernels.inference import linear
from dsv3.kernels.moe import swiglu
from dsv3.kernels.norm import rms_norm
from dsv3.kernels.packed import Kind, Packed, Weight


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale per channel."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class PackedLinear(nn.Module):
    """y = x W^T (+ b) with a W [out, in] that stays packed, or a stack of such W for `Experts` to use."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None = None) -> None:
        super().__init__()
        self.kind: Kind = packed.kind
        self.out_features, self.in_features = packed.shape[-2:]
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("zero", packed.zero)
        self.bias = bias

    @property
    def packed(self) -> Packed:
        return Packed(self.kind, self.codes, self.scale, self.zero)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Move between devices with the rest; codes and scales keep their dtypes."""
        packed = {id(tensor) for tensor in self.packed.tensors}

        def moved(tensor: Tensor) -> Tensor:
            after = fn(tensor)
            keeps = id(tensor) in packed and after.dtype != tensor.dtype
            return tensor.to(after.device) if keeps else after

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.packed, self.bias)


def put_packed(model: nn.Module, parameter: str, packed: Packed) -> None:
    """Put a packed matrix, or a stack of them, in the place of a model's parameter, by its name."""
    path, _, name = parameter.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, nn.Linear):
        parent, _, own = path.rpartition(".")
        setattr(model.get_submodule(parent), own, PackedLinear(packed, module.bias))
    else:
        delattr(module, name)
        setattr(module, name, PackedLinear(packed))


def weight_of(layer: nn.Module | Tensor) -> Weight:
    """What a linear layer multiplies by."""
    if isinstance(layer, PackedLinear):
        return layer.packed
    if isinstance(layer, Tensor):
        return layer
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight


class FeedForward(nn.Module):
    """SwiGLU: down(SiLU(gate x) * up x). The checkpoint's `gate_proj` and `up_proj` are one matrix here."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(swiglu(self.gate_up_proj(x)))
        return out
