"""Matrix products of FP8 numbers with a scale per 128 of them (report, section 3.3.2).

Both operands are e4m3 with the summed dimension last, `a [m, k]` and `b [n, k]`; the product is `a @ b.T`.
The scales run along the summed dimension: a row of `a` has one for each 128 numbers (a 1 x 128 tile), and so
has a row of `b`, or 128 rows of it share theirs (a 128 x 128 block). So within 128 terms of a sum the scale is
one number, and can be taken out:

    out[i, j] = sum over slices s of  scale_a[i, s] * scale_b[j, s] * (sum over k in s of a[i, k] * b[j, k])

This is where the report's accumulation comes from. Hopper's tensor cores add FP8 products with about 14 bits;
after each slice the partial sum leaves them, is multiplied by its scales, and is added up in float32.

What is exact: e4m3 has 4 significant bits, so a product of two has 8 and is exact in float32. What is not:
the sums, which float32 rounds (128 products span up to 43 bits), and the scaling of each partial sum.
`_by_slices` is the formula above and defines the numbers. `_dequantized` scales the operands instead, then
multiplies once: it differs from the formula by float32's rounding alone, a few parts in 10^7 of the sum of
the terms' sizes, and is what runs wherever there is no FP8 hardware. On Hopper `_deep_gemm` (where installed)
or `_scaled_mm` (torch, with CUDA 12.9 or later) do the formula on FP8 tensor cores, on other GPUs that have them (and
on Hopper with an older CUDA) `dsv3.kernels.triton.matmul`.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.kernels import triton

TILE = 128


def fp8_matmul(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """`(a * scale_a) @ (b * scale_b).T`, summed in float32.

    a: float8_e4m3fn [m, k]; scale_a: float32 [m, ceil(k / 128)]; b: float8_e4m3fn [n, k]; scale_b: float32
    [n, ceil(k / 128)] or, a scale per block, [ceil(n / 128), ceil(k / 128)]. Returns [m, n] in `dtype`, which is
    float32 or bfloat16. Any m, n and k will do.
    """
    out: Tensor = _fp8_matmul(a, scale_a, b, scale_b, dtype)
    return out


@torch.library.custom_op("dsv3::fp8_matmul", mutates_args=())
def _fp8_matmul(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """One operator for torch, whatever is behind it: what selective checkpoints keep and compilers see."""
    if not (a.is_cuda and a.numel() and b.numel() and _is_hopper(a.device)):
        if triton.usable_fp8(a, b):
            from dsv3.kernels.triton import matmul

            return matmul.fp8_matmul(a, scale_a, b, scale_b, dtype)
        return _dequantized(a, scale_a, b, scale_b, dtype)
    # DeepGEMM does tiles by tiles into float32, which is Wgrad, and tiles by blocks into bfloat16, the rest.
    for_weights = scale_b.shape[0] == b.shape[0]
    if _deep_gemm_is_installed() and for_weights == (dtype == torch.float32):
        return _deep_gemm(a, scale_a, b, scale_b, dtype)
    return _scaled_mm(a, scale_a, b, scale_b, dtype)


@_fp8_matmul.register_fake
def _(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


def widen(quantized: Tensor) -> Tensor:
    """e4m3 numbers as float32, exactly."""
    if not quantized.is_cpu:
        return quantized.float()
    # By table: torch's own conversion on a CPU computes each number by itself and takes three times as long.
    codes = quantized.contiguous().view(torch.uint8).flatten()
    return _values().index_select(0, codes.int()).view(quantized.shape)


@cache
def _values() -> Tensor:
    """All 256 numbers of e4m3, in the order of their codes."""
    return torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float()


def _by_slices(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    scale_b = _per_row(scale_b, b.shape[0])
    out = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device)
    for s, start in enumerate(range(0, a.shape[1], TILE)):
        here = slice(start, start + TILE)
        partial = a[:, here].float() @ b[:, here].float().T
        out += partial * (scale_a[:, s, None] * scale_b[:, s])
    return out.to(dtype)


def _dequantized(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    left, right = (
        scale_tiles(widen(q), _per_row(scale, q.shape[0])) for q, scale in ((a, scale_a), (b, scale_b))
    )
    return (left @ right.T).to(dtype)


def scale_tiles(x: Tensor, scale: Tensor) -> Tensor:
    """x [rows, cols] times the scale [rows, ceil(cols / 128)] of each number's tile. Works in place."""
    whole = x.shape[1] // TILE * TILE
    x[:, :whole].unflatten(1, (whole // TILE, TILE)).mul_(scale[:, : whole // TILE, None])
    if whole < x.shape[1]:
        x[:, whole:].mul_(scale[:, -1:])
    return x


def _per_row(scale: Tensor, rows: int) -> Tensor:
    """Scales of tiles as they are, those of blocks repeated for each row."""
    return scale if scale.shape[0] == rows else scale.repeat_interleave(TILE, dim=0)[:rows]


# On Hopper ---------------------------------------------------------------------------------------------
# Kernels there want whole tiles and the summed dimension contiguous, which is how FP8 tensor cores read. Widths
# of large models are multiples of 128; a ragged number of tokens is padded with zeros, which add nothing.


@cache
def _is_hopper(device: torch.device) -> bool:
    """Whether the device multiplies e4m3 with these scales: compute capability 9.0, and a CUDA that knows how."""
    cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split("."))
    return torch.cuda.get_device_capability(device) == (9, 0) and (
        cuda >= (12, 9) or _deep_gemm_is_installed()
    )


@cache
def _deep_gemm_is_installed() -> bool:
    return importlib.util.find_spec("deep_gemm") is not None


def _whole(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The operand with both sides a multiple of 128, contiguous, and its scales, of tiles or of blocks."""
    rows, cols = q.shape
    padding = (0, -cols % TILE, 0, -rows % TILE)
    if any(padding):
        q = F.pad(q.view(torch.uint8), padding).view(q.dtype)  # the code of zero is zero
    if scale.shape[0] == rows:  # a scale per row
        scale = F.pad(scale, (0, 0, 0, -rows % TILE))
    return q.contiguous(), scale.contiguous()


def _scaled_mm(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    (left, scale_left), (right, scale_right) = _whole(a, scale_a), _whole(b, scale_b)
    tiles, blocks = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    if scale_right.shape[0] == right.shape[0]:
        recipe, scale_right = tiles, scale_right.T.contiguous().T
    else:  # cuBLAS reads the scales of blocks along the summed dimension, in fours
        recipe, scale_right = blocks, F.pad(scale_right, (0, -scale_right.shape[1] % 4)).T
    out = F.scaled_mm(
        left,
        right.T,
        scale_left.T.contiguous().T,  # and those of tiles along the rows
        tiles,
        scale_right,
        recipe,
        output_dtype=dtype,
    )
    return out[: a.shape[0], : b.shape[0]].contiguous()


def _deep_gemm(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    deep_gemm: Any = importlib.import_module("deep_gemm")
    left, right = _whole(a, scale_a), _whole(b, scale_b)
    shape = left[0].shape[0], right[0].shape[0]
    if dtype == torch.float32:  # tiles by tiles, made to add to a gradient
        out = torch.zeros(shape, dtype=dtype, device=a.device)
        deep_gemm.fp8_gemm_nt(left, right, out, c=out, recipe=(1, 1, TILE))
    else:
        out = torch.empty(shape, dtype=dtype, device=a.device)
        deep_gemm.fp8_gemm_nt(left, right, out, recipe=(1, TILE, TILE))
    return out[: a.shape[0], : b.shape[0]].contiguous()
