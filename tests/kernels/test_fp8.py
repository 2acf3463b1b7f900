"""FP8 products against float64, every way to compute them, and what the ways on a GPU hand to their libraries."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.kernels import fp8
from dsv3.kernels.fp8 import TILE, fp8_matmul, widen

Operands = tuple[Tensor, Tensor, Tensor, Tensor]
Way = Callable[..., Tensor]

CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
WAYS: dict[str, Way] = {"by slices": fp8._by_slices, "dequantized": fp8._dequantized, "chosen": fp8_matmul}


def operands(m: int, n: int, k: int, blocks: bool, seed: int = 0) -> Operands:
    """Numbers from all over e4m3, and scales over six orders of magnitude."""
    g = torch.Generator().manual_seed(seed)

    def numbers(rows: int) -> Tensor:
        return (torch.randn(rows, k, generator=g) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)

    def scales(rows: int) -> Tensor:
        return 10 ** (6 * torch.rand(rows, -(-k // TILE), generator=g) - 4)

    return numbers(m), scales(m), numbers(n), scales(-(-n // TILE) if blocks else n)


def terms(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor) -> tuple[Tensor, Tensor]:
    """The operands in float64, a scale at a time."""

    def dequantized(q: Tensor, scale: Tensor) -> Tensor:
        x = q.double()
        tall = 1 if scale.shape[0] == q.shape[0] else TILE
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                x[i * tall : (i + 1) * tall, j * TILE : (j + 1) * TILE] *= scale[i, j].double()
        return x

    return dequantized(a, scale_a), dequantized(b, scale_b)


def check(way: Way, given: Operands) -> None:
    """Within float32's rounding of every step: one for each of k terms, and a few for scales."""
    left, right = terms(*(t.cpu() for t in given))
    out = way(*given, torch.float32)
    assert (out.dtype, out.shape) == (torch.float32, (left.shape[0], right.shape[0]))
    error = (out.cpu().double() - left @ right.T).abs()
    allowed = (left.shape[1] + 8) * 2.0**-24 * (left.abs() @ right.abs().T)
    assert (error <= allowed).all(), f"off by {(error / allowed).max():.1f} times what rounding explains"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("blocks", [False, True], ids=["tiles", "blocks"])
@pytest.mark.parametrize(
    "shape", [(4, 256, 384), (5, 7, 300), (1, 1, 1), (130, 129, 64), (3, 300, 128)], ids=str
)
def test_product(way: str, blocks: bool, shape: tuple[int, int, int]) -> None:
    check(WAYS[way], operands(*shape, blocks))


@settings(max_examples=60)
@given(st.integers(1, 140), st.integers(1, 300), st.integers(1, 400), st.booleans(), st.integers(0, 99))
def test_product_of_ragged_shapes(m: int, n: int, k: int, blocks: bool, seed: int) -> None:
    given = operands(m, n, k, blocks, seed)
    for way in WAYS.values():
        check(way, given)


@pytest.mark.parametrize("way", WAYS)
def test_products_of_two_numbers_are_exact(way: str) -> None:
    """All pairs of all numbers: one term, so nothing is rounded."""
    finite = CODES[CODES.float().isfinite()].unsqueeze(1)
    one = torch.ones(len(finite), 1)
    assert len(finite) == 254
    out = WAYS[way](finite, one, finite, one, torch.float32)
    assert torch.equal(out.double(), finite.double() @ finite.double().T)


def test_sums_that_fit_are_exact_and_so_are_powers_of_two() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (rows, 300), generator=g).to(torch.float8_e4m3fn) for rows in (9, 11))
    scale_a, scale_b = (2.0 ** torch.randint(-3, 4, (rows, 3), generator=g) for rows in (9, 11))
    left, right = terms(a, scale_a, b, scale_b)
    for way in WAYS.values():
        assert torch.equal(way(a, scale_a, b, scale_b, torch.float32).double(), left @ right.T)


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_is_the_float32_result_rounded_once(way: str) -> None:
    given = operands(20, 150, 300, blocks=True)
    out = WAYS[way](*given, torch.bfloat16)
    assert torch.equal(out, WAYS[way](*given, torch.float32).bfloat16())


@pytest.mark.parametrize("way", WAYS)
def test_a_block_is_tiles_of_equal_scale(way: str) -> None:
    a, scale_a, b, scale_b = operands(20, 300, 260, blocks=True)
    spread = scale_b.repeat_interleave(TILE, dim=0)[:300]
    out = WAYS[way](a, scale_a, b, scale_b, torch.float32)
    assert torch.equal(out, WAYS[way](a, scale_a, b, spread, torch.float32))


def test_the_reference_adds_slices_in_float32() -> None:
    """Not in more: of a large slice and a small one that float32 cannot see beside it, the small one is lost."""
    a = torch.ones(1, 256).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0**-26]])
    out = fp8._by_slices(a, scale, a, torch.ones(1, 2), torch.float32)
    assert out.item() == 128.0


def test_no_terms_no_rows() -> None:
    a, scale_a, b, scale_b = operands(3, 5, 200, blocks=False)
    none = torch.zeros(3, 0).to(torch.float8_e4m3fn), torch.zeros(3, 0)
    assert torch.equal(fp8_matmul(*none, *none, torch.float32), torch.zeros(3, 3))
    assert fp8_matmul(a[:0], scale_a[:0], b, scale_b, torch.bfloat16).shape == (0, 5)


def test_widen_is_exact_for_all_codes_in_any_layout() -> None:
    codes = CODES.view(16, 16)
    for x in (codes, codes.T, codes[:, 3:7], codes[:0]):
        assert torch.equal(widen(x).nan_to_num(7), x.float().nan_to_num(7))
    assert widen(codes).isnan().sum() == 2


def test_torch_sees_one_operator() -> None:
    given = (*operands(3, 5, 200, blocks=True), torch.bfloat16)
    torch.library.opcheck(torch.ops.dsv3.fp8_matmul.default, given, test_utils="test_faketensor")


# What runs on Hopper, with a stand-in for the library that holds it to the library's layout ----------------


def cublas(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor,
    recipe_a: F.ScalingType,
    scale_b: Tensor,
    recipe_b: F.ScalingType,
    output_dtype: torch.dtype,
) -> Tensor:
    """`scaled_mm` as torch checks and cuBLAS reads: b by columns, scales of tiles by rows, of blocks in fours."""
    (m, k), (_, n) = mat_a.shape, mat_b.shape
    assert mat_a.stride() == (k, 1) and mat_b.stride() == (1, k)
    assert k % 16 == n % 16 == 0
    slices = -(-k // 128)
    assert recipe_a == F.ScalingType.BlockWise1x128
    assert scale_a.shape == (m, slices) and scale_a.stride() in ((1, m), (1, 1))
    if recipe_b == F.ScalingType.BlockWise1x128:
        assert scale_b.shape == (n, slices) and scale_b.stride() in ((1, n), (1, 1))
    else:
        assert recipe_b == F.ScalingType.BlockWise128x128
        fours = -(-slices // 4) * 4
        assert scale_b.shape == (fours, -(-n // 128)) and scale_b.stride() in ((1, fours), (1, 1))
        scale_b = scale_b[:slices].T
    return fp8._by_slices(mat_a, scale_a, mat_b.T, scale_b, output_dtype)


def gemm_nt(
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    d: Tensor,
    c: Tensor | None = None,
    recipe: tuple[int, int, int] = (1, 128, 128),
) -> None:
    """`deep_gemm.fp8_gemm_nt` as it asserts on compute capability 9.0."""
    for (q, scale), tall in ((a, recipe[0]), (b, recipe[1])):
        assert q.stride(1) == 1
        assert scale.dtype == torch.float32 and scale.is_contiguous()
        assert scale.shape == (-(-q.shape[0] // tall), -(-q.shape[1] // recipe[2]))
    if recipe[1] == 1:
        assert c is not None and d.dtype == torch.float32 and c.data_ptr() == d.data_ptr()
        d += fp8._by_slices(*a, *b, d.dtype)
    else:
        assert c is None and d.dtype == torch.bfloat16
        d.copy_(fp8._by_slices(*a, *b, d.dtype))


RAGGED = [(256, 384, 512), (5, 7, 300), (1, 1, 1), (130, 129, 64), (128, 128, 1280), (300, 1, 128)]


@pytest.mark.parametrize("shape", RAGGED, ids=str)
@pytest.mark.parametrize("blocks", [False, True], ids=["tiles", "blocks"])
def test_what_scaled_mm_is_given(
    shape: tuple[int, int, int], blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(F, "scaled_mm", cublas)
    check(fp8._scaled_mm, operands(*shape, blocks))


@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_what_deep_gemm_is_given(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("deep_gemm")
    module.fp8_gemm_nt = gemm_nt  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deep_gemm", module)
    check(fp8._deep_gemm, operands(*shape, blocks=False))
    given = operands(*shape, blocks=True)
    if shape[1] == 1:  # a block of one row is a tile
        return
    assert torch.equal(fp8._deep_gemm(*given, torch.bfloat16), fp8._by_slices(*given, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", RAGGED, ids=str)
@pytest.mark.parametrize("blocks", [False, True], ids=["tiles", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(shape: tuple[int, int, int], blocks: bool, dtype: torch.dtype) -> None:
    """The tensor cores round within a slice (about 14 bits), hence the tolerance."""
    given = tuple(t.cuda() for t in operands(*shape, blocks))
    left, right = (t.cuda() for t in terms(*(t.cpu() for t in given)))
    size = left.abs() @ right.abs().T
    error = (fp8_matmul(*given, dtype).double() - left @ right.T).abs()
    assert (error <= size * 2.0 ** (-11 if dtype == torch.float32 else -8)).all(), (error / size).max()
