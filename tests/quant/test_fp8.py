"""FP8 blocks against the formula written out block by block."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv3.errors import UserError
from dsv3.quant import BLOCK, dequantize_blocks, fp8, quantize_blocks

# Multiples of the block, ragged in one or both directions, and smaller than one block.
SHAPES = [(128, 128), (256, 384), (130, 128), (128, 5), (300, 257), (1, 1), (576, 320)]


def blocks(tensor: Tensor) -> dict[tuple[int, int], Tensor]:
    return {
        (i, j): tensor[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
        for i in range(math.ceil(tensor.shape[0] / BLOCK))
        for j in range(math.ceil(tensor.shape[1] / BLOCK))
    }


def spread(rows: int, cols: int) -> Tensor:
    """Weights whose blocks differ in size by orders of magnitude."""
    return torch.randn(rows, cols) * torch.logspace(-6, 2, cols)


@pytest.fixture(params=[1 << 22, 1], ids=["whole", "in chunks"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "_CHUNK", request.param)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantised_is_the_weight_over_its_blocks_scale(shape: tuple[int, int]) -> None:
    weight = spread(*shape)
    quantized, scale_inv = quantize_blocks(weight)
    assert quantized.dtype == torch.float8_e4m3fn and quantized.shape == weight.shape
    assert scale_inv.dtype == torch.float32
    assert scale_inv.shape == (math.ceil(shape[0] / BLOCK), math.ceil(shape[1] / BLOCK))
    stored = blocks(quantized)
    for (i, j), block in blocks(weight).items():
        assert scale_inv[i, j] == block.abs().max() / 448
        assert torch.equal(stored[i, j].float(), (block / scale_inv[i, j]).to(torch.float8_e4m3fn).float())


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantised_is_bit_equal_to_weight_times_scale(shape: tuple[int, int], dtype: torch.dtype) -> None:
    quantized, _ = quantize_blocks(spread(*shape))
    scale_inv = torch.rand(math.ceil(shape[0] / BLOCK), math.ceil(shape[1] / BLOCK)) + 1e-3
    weight = dequantize_blocks(quantized, scale_inv, dtype)
    assert weight.dtype == dtype
    expected = blocks(quantized)
    for (i, j), block in blocks(weight).items():
        assert torch.equal(block, (expected[i, j].float() * scale_inv[i, j]).to(dtype))


@given(st.integers(1, 300), st.integers(1, 300), st.floats(1e-30, 1e30), st.integers(0, 2**31))
def test_rounding_error_is_half_a_step_of_e4m3(rows: int, cols: int, size: float, seed: int) -> None:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * size
    quantized, scale_inv = quantize_blocks(weight)
    again = blocks(dequantize_blocks(quantized, scale_inv))
    for (i, j), block in blocks(weight).items():
        # Three bits of mantissa: half a step is 1/16 of a number, and of 2^-6 for all below it.
        allowed = block.abs().clamp(min=scale_inv[i, j] * 2.0**-6) / 16
        assert ((again[i, j] - block).abs() <= allowed * 1.0001).all()


def test_all_256_codes_dequantise_to_themselves() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(2, 128)
    weight = dequantize_blocks(codes, torch.full((1, 1), 0.25))
    assert torch.equal(weight.nan_to_num(7), (codes.float() * 0.25).nan_to_num(7))
    assert weight.isnan().sum() == 2  # 0x7f and 0xff


@pytest.mark.parametrize("size", [0.0, 1e-45, 8.8e-43, 1e-42, 3e-38, 3e38])
def test_the_ends_of_float32_stay_finite(size: float) -> None:
    weight = torch.full((130, 130), size)
    weight[0, 0] = -size
    quantized, scale_inv = quantize_blocks(weight)
    assert quantized.float().isfinite().all()
    assert (scale_inv > 0).all()
    torch.testing.assert_close(dequantize_blocks(quantized, scale_inv), weight, rtol=0.07, atol=1e-40)


def test_an_empty_block_has_scale_one() -> None:
    weight = torch.zeros(256, 128)
    weight[200, 3] = 448.0
    quantized, scale_inv = quantize_blocks(weight)
    assert scale_inv.tolist() == [[1.0], [1.0]]
    assert torch.equal(quantized.float(), weight)
    weight[200, 3] = 0.4375
    assert quantize_blocks(weight)[1].tolist() == [[1.0], [2.0**-10]]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_weights_that_are_no_numbers_are_refused(bad: float) -> None:
    weight = torch.randn(140, 140)
    weight[139, 139] = bad
    with pytest.raises(UserError, match="infinite or undefined"):
        quantize_blocks(weight)


def test_scales_of_another_shape_are_refused() -> None:
    with pytest.raises(UserError, match=r"\[2, 1\].*130 x 257 has \[2, 3\]"):
        dequantize_blocks(torch.zeros(130, 257, dtype=torch.float8_e4m3fn), torch.ones(2, 1))


def test_bfloat16_weights_are_quantised_as_their_float32_values() -> None:
    weight = torch.randn(200, 150).bfloat16()
    for one, other in zip(quantize_blocks(weight), quantize_blocks(weight.float()), strict=True):
        assert torch.equal(one.float(), other.float())
