"""Rotary frequencies are transformers' own, and rotation does what makes it a position: only distance counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from dsv3.config import PRESETS, ModelConfig, YarnConfig
from dsv3.model import Transformer
from dsv3.model.rope import Rope, inverse_frequencies

DIMS = st.sampled_from([2, 4, 6, 8, 32, 64])
BASES = st.sampled_from([1.5, 500.0, 10000.0, 50000.0])
LENGTHS = st.sampled_from([1, 2, 16, 4096, 10**7])
BETAS = st.sampled_from([0.1, 1.0, 1.5, 4.0, 32.0])
MSCALES = st.sampled_from([(1.0, 1.0), (0.707, 0.707), (1.0, 0.707), (0.5, 1.3), (1.0, 0.0)])


def config(dim: int = 8, base: float = 10000.0, **changes: Any) -> ModelConfig:
    return PRESETS["tiny"].replace(qk_rope_head_dim=dim, rope_theta=base, **changes)


def in_transformers(ours: ModelConfig) -> DeepseekV3Config:
    return DeepseekV3Config(**{k: v for k, v in ours.to_dict().items() if k != "model_type"})


def rotate(rope: Rope, x: Tensor, positions: Tensor) -> Tensor:
    return rope.rotate(x, *rope(positions))


# Frequencies -------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(DIMS, BASES, st.sampled_from([1.0, 2.5, 32.0, 40.0]), LENGTHS, BETAS, BETAS, MSCALES)
def test_yarn_frequencies_are_transformers(
    dim: int, base: float, factor: float, length: int, fast: float, slow: float, mscales: tuple[float, float]
) -> None:
    """Also where the ramp is empty, upside down, or beyond either end of the pairs."""
    yarn = YarnConfig(factor, length, fast, slow, *mscales)
    ours = config(dim, base, rope_scaling=yarn)
    theirs, scale = ROPE_INIT_FUNCTIONS["yarn"](in_transformers(ours))
    torch.testing.assert_close(inverse_frequencies(ours), theirs, rtol=1e-6, atol=0)
    assert yarn.rotary_scale == pytest.approx(scale, rel=1e-12)


@settings(max_examples=30)
@given(DIMS, BASES)
def test_plain_frequencies_are_transformers(dim: int, base: float) -> None:
    ours = config(dim, base)
    theirs, scale = DeepseekV3RotaryEmbedding.compute_default_rope_parameters(in_transformers(ours))
    torch.testing.assert_close(inverse_frequencies(ours), theirs, rtol=1e-6, atol=0)
    assert Rope(ours).scale == scale == 1.0


def test_the_released_ramp() -> None:
    """DeepSeek-V3: pairs 0-10 are left alone, 23 and later slowed down 40 times, a straight line between."""
    v3 = PRESETS["v3-671b"]
    ratio = inverse_frequencies(v3) / inverse_frequencies(v3.replace(rope_scaling=None))
    expected = [1 - min(max((pair - 10) / 13, 0), 1) * (1 - 1 / 40) for pair in range(32)]
    torch.testing.assert_close(ratio, torch.tensor(expected), rtol=1e-5, atol=0)


def test_attention_factor_overrules_mscales() -> None:
    yarn = YarnConfig(40.0, 4096, mscale=0.5, mscale_all_dim=1.0, attention_factor=1.25)
    _, scale = ROPE_INIT_FUNCTIONS["yarn"](in_transformers(config(rope_scaling=yarn)))
    assert Rope(config(rope_scaling=yarn)).scale == scale == 1.25


# Rotation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleave", [True, False])
def test_each_pair_is_turned_by_its_angle(interleave: bool) -> None:
    ours = config(6, rope_interleave=interleave)
    x, position = torch.randn(6), 11
    turned = rotate(Rope(ours), x, torch.tensor(position))
    for pair, frequency in enumerate(inverse_frequencies(ours).tolist()):
        a, b = (x[2 * pair], x[2 * pair + 1]) if interleave else (x[pair], x[pair + 3])
        z = complex(a, b) * complex(math.cos(position * frequency), math.sin(position * frequency))
        assert turned[pair].item() == pytest.approx(z.real, abs=1e-5)
        assert turned[pair + 3].item() == pytest.approx(z.imag, abs=1e-5)


def test_the_two_layouts_are_one_rotation_of_reordered_numbers() -> None:
    x, positions = torch.randn(5, 8), torch.arange(5)
    halves = torch.cat((x[:, 0::2], x[:, 1::2]), dim=1)
    interleaved = rotate(Rope(config(rope_interleave=True)), x, positions)
    assert torch.equal(interleaved, rotate(Rope(config(rope_interleave=False)), halves, positions))
    assert not torch.allclose(interleaved, rotate(Rope(config(rope_interleave=False)), x, positions))


@settings(max_examples=40)
@given(
    dim=DIMS,
    interleave=st.booleans(),
    yarn=st.none() | st.just(YarnConfig(4.0, 64, mscale=1.0, mscale_all_dim=0.5)),
    distance=st.integers(0, 200),
    shift=st.integers(0, 2000),
    seed=st.integers(0, 99),
)
def test_scores_depend_on_distance_alone(
    dim: int, interleave: bool, yarn: YarnConfig | None, distance: int, shift: int, seed: int
) -> None:
    rope = Rope(config(dim, rope_interleave=interleave, rope_scaling=yarn))
    q, k = torch.randn(2, dim, generator=torch.Generator().manual_seed(seed))

    def score(at: int) -> float:
        return (rotate(rope, q, torch.tensor(at + distance)) @ rotate(rope, k, torch.tensor(at))).item()

    assert score(shift) == pytest.approx(score(0), abs=1e-3)


def test_distance_does_change_scores() -> None:
    rope = Rope(config())
    x = torch.ones(30, 8)
    scores = rotate(rope, x, torch.arange(30)) @ rotate(rope, x[0], torch.tensor(0))
    assert len(set(scores.tolist())) == 30


@pytest.mark.parametrize("scale", [1.0, 1.25])
def test_lengths_are_kept_up_to_yarns_scale(scale: float) -> None:
    yarn = YarnConfig(4.0, 64, attention_factor=scale)
    x = torch.randn(3, 7, 8)
    turned = rotate(Rope(config(rope_scaling=yarn)), x, torch.arange(7) * 991)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1) * scale)


def test_position_zero_turns_nothing() -> None:
    x = torch.randn(8)
    assert torch.equal(rotate(Rope(config(rope_interleave=False)), x, torch.tensor(0)), x)


def test_positions_of_any_shape() -> None:
    rope = Rope(config())
    cos, sin = rope(torch.arange(6).view(2, 3))
    assert cos.shape == sin.shape == (2, 3, 4)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(cos[1, 2], rope(torch.tensor(5))[0])


def test_bfloat16_keeps_its_dtype() -> None:
    x = torch.randn(5, 8)
    turned = rotate(Rope(config()), x.bfloat16(), torch.arange(5))
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned.float(), rotate(Rope(config()), x, torch.arange(5)), rtol=0, atol=0.05)


def test_a_model_on_the_meta_device_keeps_real_frequencies() -> None:
    with torch.device("meta"):
        model = Transformer(PRESETS["tiny"])
    cos, _ = model.rope(torch.arange(3))
    assert torch.equal(cos, Rope(PRESETS["tiny"])(torch.arange(3))[0])
