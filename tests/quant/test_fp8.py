"""FP8 blocks and tiles against the formula written out one by one, and E5M6 against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv3.errors import UserError
from dsv3.quant import (
    BLOCK,
    dequantize_blocks,
    dequantize_e5m6,
    dequantize_tiles,
    fp8,
    quantize_blocks,
    quantize_e5m6,
    quantize_tiles,
)

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


# Tiles -------------------------------------------------------------------------------------------------

TILE_SHAPES = [(3, 128), (2, 384), (5, 64), (1, 1), (4, 300), (130, 129)]


def tiles(tensor: Tensor) -> dict[tuple[int, int], Tensor]:
    return {
        (row, i): tensor[row, i * BLOCK : (i + 1) * BLOCK]
        for row in range(tensor.shape[0])
        for i in range(math.ceil(tensor.shape[1] / BLOCK))
    }


@pytest.mark.parametrize("shape", TILE_SHAPES, ids=str)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_are_the_numbers_over_their_own_scale(
    shape: tuple[int, int], power_of_two: bool, dtype: torch.dtype
) -> None:
    x = spread(*shape).to(dtype)
    quantized, scale_inv = quantize_tiles(x, power_of_two)
    assert quantized.dtype == torch.float8_e4m3fn and quantized.shape == x.shape and quantized.is_contiguous()
    assert scale_inv.dtype == torch.float32 and scale_inv.shape == (shape[0], math.ceil(shape[1] / BLOCK))
    stored, again = tiles(quantized), tiles(dequantize_tiles(quantized, scale_inv))
    for place, tile in tiles(x.float()).items():
        scale = tile.abs().max() / 448
        if power_of_two:
            scale = torch.tensor(2.0 ** math.ceil(math.log2(scale)))
        assert scale_inv[place] == scale
        assert torch.equal(stored[place].float(), (tile / scale).to(torch.float8_e4m3fn).float())
        assert torch.equal(again[place], stored[place].float() * scale)


@given(st.integers(-140, 100), st.integers(0, 2**31))
def test_powers_of_two_are_the_least_that_fit(exponent: int, seed: int) -> None:
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    scale = quantize_tiles(x, power_of_two=True)[1].item()
    mantissa, _ = math.frexp(scale)
    assert mantissa == 0.5
    assert x.abs().max() <= 448 * scale
    assert x.abs().max() > 448 * scale / 2 or scale == 2.0**-126, "float32 has no smaller normal number"


def test_a_power_of_two_stays_itself() -> None:
    x = torch.zeros(3, 128)
    x[0, 5], x[1, 5] = 448 * 2.0**-7, 448 * 2.0**-7 * (1 + 2.0**-20)
    assert quantize_tiles(x, power_of_two=True)[1].flatten().tolist() == [2.0**-7, 2.0**-6, 1.0]


def test_powers_of_two_let_rounded_numbers_change_tiles_for_nothing() -> None:
    """The report's reason: from tiles along channels to tiles along tokens without a second error."""
    x = torch.randn(256, 256).exp2()  # within a few powers of two, so that nothing becomes subnormal
    once = dequantize_tiles(*quantize_tiles(x, power_of_two=True))
    assert not torch.equal(once, x)
    assert torch.equal(dequantize_tiles(*quantize_tiles(once.T, power_of_two=True)).T, once)
    once = dequantize_tiles(*quantize_tiles(x))
    assert not torch.equal(dequantize_tiles(*quantize_tiles(once.T)).T, once)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_number_that_is_none_spoils_its_tile_alone(bad: float) -> None:
    x = torch.randn(4, 256)
    x[2, 200] = bad
    for pair in (quantize_tiles(x), quantize_tiles(x, power_of_two=True)):
        again = dequantize_tiles(*pair)
        assert again[2, 200].isnan()
        assert again.isnan().any(1).tolist() == [False, False, True, False]
        assert not again[2, :128].isnan().any()
    blocks_again = dequantize_blocks(*quantize_blocks(x, check=False))
    assert blocks_again[2, 200].isnan() and not blocks_again[:, :128].isnan().any()


def test_no_rows_and_no_columns() -> None:
    assert dequantize_tiles(*quantize_tiles(torch.zeros(0, 200))).shape == (0, 200)
    assert dequantize_tiles(*quantize_tiles(torch.zeros(3, 0))).shape == (3, 0)


# E5M6 --------------------------------------------------------------------------------------------------


def e5m6() -> Tensor:
    """All finite numbers of the format that are not negative, from its definition, in order."""
    small = [m / 64 * 2.0**-14 for m in range(64)]
    normal = [(1 + m / 64) * 2.0 ** (e - 15) for e in range(1, 31) for m in range(64)]
    return torch.tensor(small + normal)


def test_every_number_of_e5m6_is_kept() -> None:
    numbers = torch.cat((e5m6(), -e5m6()))
    # The largest in every row, so that every scale is one.
    x = torch.cat((numbers.view(-1, 62), torch.full((len(numbers) // 62, 1), 65024.0)), dim=1)
    packed, scale_inv = quantize_e5m6(x)
    assert packed.shape == (x.shape[0], 63 + 32) and packed.dtype == torch.uint8, "twelve bits a number"
    assert (scale_inv == 1).all()
    assert torch.equal(dequantize_e5m6(packed, scale_inv, 63), x)


def test_e5m6_rounds_to_the_nearest_and_from_the_middle_to_even() -> None:
    numbers = e5m6()
    middles = (numbers[1:] + numbers[:-1]) / 2
    even = torch.stack((numbers[:-1], numbers[1:]))[
        torch.arange(len(middles)) % 2, torch.arange(len(middles))
    ]
    for factor, expected in [(1 - 2.0**-10, numbers[:-1]), (1 + 2.0**-10, numbers[1:]), (1.0, even)]:
        x = torch.nn.functional.pad(middles * factor, (0, 1), value=65024.0).view(-1, 62)
        x = torch.cat((x, torch.full((x.shape[0], 1), 65024.0)), dim=1)
        again = dequantize_e5m6(*quantize_e5m6(x), 63)[:, :62].flatten()[:-1]
        assert torch.equal(again, expected)


@given(st.integers(1, 5), st.integers(1, 300), st.floats(1e-30, 1e30), st.integers(0, 2**31))
def test_e5m6_is_off_by_half_a_step(rows: int, cols: int, size: float, seed: int) -> None:
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * size
    packed, scale_inv = quantize_e5m6(x)
    again = dequantize_e5m6(packed, scale_inv, cols)
    allowed = tiles(x.abs() / 128)
    for place, difference in tiles((again - x).abs()).items():
        assert (difference <= allowed[place].clamp(min=scale_inv[place] * 2.0**-21)).all()
        assert math.frexp(scale_inv[place].item())[0] == 0.5


def test_e5m6_of_what_is_no_number() -> None:
    x = torch.randn(2, 256)
    x[0, 3], x[1, 200] = math.nan, math.inf
    again = dequantize_e5m6(*quantize_e5m6(x), 256)
    assert again[0, 3].isnan() and again[1, 200].isnan()
    assert not again[0, 128:].isnan().any() and not again[1, :128].isnan().any()
