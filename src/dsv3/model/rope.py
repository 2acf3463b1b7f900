"""Rotary positions, stretched by YaRN where the config says so (report, sections 2.1.1 and 4.3).

A pair of numbers (a, b) of a head at position p is turned by the angle p * frequency. Attention scores then
depend on the distance between tokens alone. In MLA only `qk_rope_head_dim` numbers of each query, and one
key shared by all heads, are turned; the rest carries no position, which is what lets it be compressed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv3.config import ModelConfig
from dsv3.kernels.attention import rotate


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position for each rotary pair, [qk_rope_head_dim / 2], float32."""
    dim, base = config.qk_rope_head_dim, config.rope_theta
    frequencies = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))
    yarn = config.rope_scaling
    if yarn is None:
        return frequencies

    def pair_that_turns(times: float) -> float:
        """The (fractional) pair that makes this many full turns over the original length."""
        length = yarn.original_max_position_embeddings / (times * 2 * math.pi)
        return dim * math.log(length) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low or 0.001)
    interpolated = ramp.clamp(0, 1)
    return frequencies / yarn.factor * interpolated + frequencies * (1 - interpolated)


class Rope:
    """Cosines and sines for positions. Holds no parameters, so a model on the meta device keeps it whole."""

    def __init__(self, config: ModelConfig) -> None:
        self.scale = config.rope_scaling.rotary_scale if config.rope_scaling else 1.0
        self.interleave = config.rope_interleave
        self.frequencies = {torch.device("cpu"): inverse_frequencies(config)}

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: [...] int64. Returns cos and sin, each [..., qk_rope_head_dim / 2], float32."""
        device = positions.device
        if device not in self.frequencies:
            self.frequencies[device] = self.frequencies[torch.device("cpu")].to(device)
        angles = positions.unsqueeze(-1).float() * self.frequencies[device]
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.scale == 1.0 else (cos * self.scale, sin * self.scale)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`dsv3.kernels.attention.rotate` with this model's order of pairs."""
        return rotate(x, cos, sin, self.interleave)
