"""The two small layers that everything else is made of: RMSNorm and the SwiGLU feed-forward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.kernels.moe import swiglu
from dsv3.kernels.norm import rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale per channel."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class FeedForward(nn.Module):
    """SwiGLU: down(SiLU(gate x) * up x). The checkpoint's `gate_proj` and `up_proj` are one matrix here."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(swiglu(self.gate_up_proj(x)), self.down_proj.weight)
