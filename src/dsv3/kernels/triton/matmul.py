"""Matrix products with e4m3 weights: of one matrix, or of many experts' in one launch.

All are one kernel. A program makes a tile of the result; it walks along the summed dimension 128 numbers at a time,
which is how far a scale reaches, multiplies on tensor cores, and adds the partial sum times its scales to a float32
tile in registers (`dsv3.kernels.fp8` has the formula). Since e4m3 has a narrow range and tensor cores add FP8
products with about 14 bits, leaving them every 128 terms is also what keeps the sum accurate.

**FP8 or bf16 activations.** A product of m rows does 2 m operations for each byte of weights. A Hopper GPU can do
some 250 bf16 operations in the time it reads a byte (H100: 0.8-0.99 PFLOP/s over 3.35 TB/s), so for m below about 100
reading weights is all that takes time, and FP8 arithmetic, twice as quick, gains nothing. Hence:

- few rows (decoding): activations stay bf16, weights become bf16 in registers, exactly, as they are read. One launch,
  and no rounding of activations. The product is turned around, `weights @ rows.T`: `wgmma` wants 64 rows of its first
  operand, which weights have, and may take it from registers, where conversion leaves it; the second may be as
  narrow as 16 here.
- many rows (prompts): activations are rounded to e4m3 with a scale per 1 x 128 tile, as in training and in DeepSeek's
  own inference, and both operands stay FP8 up to the tensor cores.

Where even so there are fewer programs than multiprocessors (a narrow matrix), each walks part of the summed
dimension and the parts are added up afterwards, in a fixed order.

**Experts.** Rows come sorted by expert, `ends[e]` says where those of e end, and only the device knows. The host launches
as many programs as there could be tiles; each adds up the tiles of all experts (one vector of some hundred numbers) to
find its own, and the few left over return. Programs of one expert are neighbours, so that its weights, which are most
of the traffic, are read from memory once and then from the L2 cache. (DeepGEMM has such products too, but wants each
expert's rows padded to a multiple of 128, by which decoding, with a row or two for an expert, would be all padding.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3.kernels import fp8
from dsv3.kernels.fp8 import TILE
from dsv3.kernels.triton import processors

_FEW = 64  # rows up to which activations stay bf16
_SLICES = 8  # tiles that one program quantises


class _Tiles(NamedTuple):
    rows: int
    cols: int
    warps: int
    stages: int


def _tiles(rows: float, both_fp8: bool) -> _Tiles:
    """For so many rows of one matrix. Shared memory: stages * 128 * (rows + cols) numbers."""
    if not both_fp8:
        height = 16 if rows <= 16 else 32 if rows <= 32 else 64
        return _Tiles(height, 64, 4, 4) if rows <= 64 else _Tiles(128, 128, 8, 3)
    return _Tiles(64, 128, 4, 4) if rows <= 128 else _Tiles(128, 128, 8, 4)


def quantize_tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """`dsv3.quant.quantize_tiles` in one launch: x [rows, cols] in any float dtype, its rows contiguous.

    Returns float8_e4m3fn [rows, cols] and float32 [rows, ceil(cols / 128)].
    """
    rows, cols = x.shape
    slices = -(-cols // TILE)
    if not x.numel():
        return x.to(torch.float8_e4m3fn), x.new_ones(rows, slices, dtype=torch.float32)
    codes = torch.empty(rows, cols, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, slices, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _quantize[rows, triton.cdiv(slices, _SLICES)](x, codes, scale, cols, slices, x.stride(0), _SLICES)
    return codes, scale


def fp8_matmul(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """`dsv3.kernels.fp8.fp8_matmul` on FP8 tensor cores."""
    return _launch(a, scale_a, b, scale_b, dtype)


def linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x @ weight.T with a weight of e4m3 blocks, as released.

    x: bfloat16 or float16 [rows, k]; codes: float8_e4m3fn [n, k]; scale: float32 [ceil(n / 128), ceil(k / 128)].
    Returns [rows, n] in x's dtype. Up to 64 rows x is taken as it is; more are rounded to e4m3, and in bfloat16 go where
    `dsv3.kernels.fp8` sends them, such as DeepGEMM.
    """
    if x.shape[0] <= _FEW:
        return _launch(x, None, codes, scale, x.dtype)
    product = fp8.fp8_matmul if x.dtype == torch.bfloat16 else fp8_matmul
    return product(*quantize_tiles(x.contiguous()), codes, scale, x.dtype)


def grouped(rows: Tensor, weights: Tensor, ends: Tensor, scale: Tensor | None = None) -> Tensor:
    """Each expert's rows times the transpose of its matrix.

    rows: bfloat16 or float16 [rows, k], sorted by expert; weights: [experts, n, k], of the same dtype, or float8_e4m3fn
    with scale: float32 [experts, ceil(n / 128), ceil(k / 128)]; ends: int32 [experts], where each expert's rows end.
    Returns [rows, n] in the dtype of `rows`. Rows at and after the last end come back undefined.
    """
    x, scale_x = rows, None
    if scale is not None and rows.shape[0] > _FEW * weights.shape[0]:
        x, scale_x = quantize_tiles(rows.contiguous())
    return _launch(x, scale_x, weights, scale, rows.dtype, ends)


def _launch(
    a: Tensor,
    scale_a: Tensor | None,
    b: Tensor,
    scale_b: Tensor | None,
    dtype: torch.dtype,
    ends: Tensor | None = None,
) -> Tensor:
    """a [m, k] @ b.T for b [n, k], or [experts, n, k] with `ends`; scales as in the kernel."""
    (m, k), n = a.shape, b.shape[-2]
    if m == 0 or n == 0 or k == 0:
        return torch.zeros(m, n, dtype=dtype, device=a.device)
    a, b = a if a.stride(1) == 1 else a.contiguous(), b.contiguous()
    scale_a, scale_b = (None if s is None else s.contiguous() for s in (scale_a, scale_b))
    experts = 0 if ends is None else b.shape[0]
    tiles = _tiles(m / max(experts, 1), both_fp8=scale_a is not None)
    across, slices = triton.cdiv(n, tiles.cols), triton.cdiv(k, TILE)
    busy = min(m, experts)  # experts that can have rows, and so a last tile that is not full
    down = (m - busy) // tiles.rows + busy if experts else triton.cdiv(m, tiles.rows)
    splits = 1
    if not experts and scale_a is None:
        splits = max(1, min(2 * processors(a.device) // (across * down), slices // 4))
        splits = triton.cdiv(slices, triton.cdiv(slices, splits))  # none is left without work
    out = torch.empty(splits, m, n, dtype=torch.float32 if splits > 1 else dtype, device=a.device)
    with torch.cuda.device_of(a):
        _product[across * down, splits](
            a, scale_a, b, scale_b, out, ends, m, n, k, a.stride(0), triton.cdiv(slices, splits), experts,
            EXPERTS=triton.next_power_of_2(experts) if experts else 0,
            BLOCKS=scale_b is not None and scale_b.shape[-2] != n,
            EVEN=k % TILE == 0, ROWS=tiles.rows, COLS=tiles.cols,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0).to(dtype)


# fmt: off
@triton.jit
def _quantize(x, codes, scale, cols, slices, stride, SLICES: tl.constexpr):
    row, s = tl.program_id(0).to(tl.int64), tl.program_id(1) * SLICES + tl.arange(0, SLICES)
    col = s[:, None] * 128 + tl.arange(0, 128)
    tiles = tl.load(x + row * stride + col, mask=col < cols, other=0.0).to(tl.float32)
    top = tl.max(tl.abs(tiles), 1)
    inverse = tl.div_rn(top, tl.full(top.shape, 448.0, tl.float32))  # `/` need not round correctly
    inverse = tl.where(inverse > 0, inverse, 1.0)
    tl.store(scale + row * slices + s, inverse, mask=s < slices)
    numbers = tl.div_rn(tiles, tl.broadcast_to(inverse[:, None], tiles.shape))
    numbers = tl.clamp(numbers, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    # Round by hand, as not everything that runs this rounds (the interpreter cuts off): added to 1.5 * 2^20 times its own
    # power of two, a number keeps three bits of mantissa, rounded to nearest even.
    power = (numbers.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    shift = tl.maximum(power, 2.0**-6) * (1.5 * 2.0**20)
    numbers = (numbers + shift) - shift
    tl.store(codes + row * cols + col, numbers.to(tl.float8e4nv), mask=col < cols)


@triton.jit
def _product(
    a, scale_a,  # [m, k] and float32 [m, slices], or None
    b, scale_b,  # [n, k] or [experts, n, k], and float32 [.., n or n / 128, slices], or None
    out,  # [splits, m, n]
    ends,  # int32 [experts], or None
    m, n, k, stride, slices_each, experts,
    EXPERTS: tl.constexpr,  # a power of two, 0 for one matrix
    BLOCKS: tl.constexpr,  # scale_b is one per 128 rows of b, else one per row
    EVEN: tl.constexpr,  # k is a multiple of 128
    ROWS: tl.constexpr, COLS: tl.constexpr,
):
    # Which tile, and of which expert.
    across = tl.cdiv(n, COLS)
    slices = tl.cdiv(k, 128)
    program = tl.program_id(0)
    if EXPERTS:
        tile, column = program // across, program % across
        each = tl.arange(0, EXPERTS)
        last = tl.load(ends + each, mask=each < experts, other=0)
        first = tl.load(ends + each - 1, mask=(each > 0) & (each < experts), other=0)
        tiles = tl.where(each < experts, (last - first + ROWS - 1) // ROWS, 0)
        until = tl.cumsum(tiles, 0)
        expert = tl.sum((until <= tile).to(tl.int32), 0)
        if expert >= experts:
            return
        mine = each == expert
        stop = tl.sum(tl.where(mine, last, 0), 0)
        start = tl.sum(tl.where(mine, first + (tile - until + tiles) * ROWS, 0), 0)
        b += expert.to(tl.int64) * n * k
        if scale_b is not None:
            scale_b += expert.to(tl.int64) * (tl.cdiv(n, 128) if BLOCKS else n) * slices
    else:
        # Neighbours in time share rows of b: tiles go down eight rows of tiles before they step across.
        down = tl.cdiv(m, ROWS)
        band = program // (8 * across)
        height = tl.minimum(down - band * 8, 8)
        rest = program - band * 8 * across
        start, stop = (band * 8 + rest % height) * ROWS, m
        column = rest // height

    row = (start + tl.arange(0, ROWS)).to(tl.int64)
    col = (column * COLS + tl.arange(0, COLS)).to(tl.int64)
    has_row, has_col = row < stop, col < n
    term = tl.arange(0, 128)
    begin = tl.program_id(1) * slices_each
    a_here = a + row[:, None] * stride + term + begin * 128
    b_here = b + col[:, None] * k + term + begin * 128
    SWAP: tl.constexpr = scale_a is None  # weights first
    sums = tl.zeros((COLS, ROWS) if SWAP else (ROWS, COLS), tl.float32)
    for s in range(begin, tl.minimum(begin + slices_each, slices)):
        if EVEN:
            left = tl.load(a_here, mask=has_row[:, None], other=0.0)
            right = tl.load(b_here, mask=has_col[:, None], other=0.0)
        else:
            inside = term < k - s * 128
            left = tl.load(a_here, mask=has_row[:, None] & inside, other=0.0)
            right = tl.load(b_here, mask=has_col[:, None] & inside, other=0.0)
        if scale_b is None:
            sums = tl.dot(right, tl.trans(left), sums)
        else:
            if SWAP:
                partial = tl.dot(right.to(left.dtype), tl.trans(left))
            else:
                partial = tl.dot(left, tl.trans(right))
                partial *= tl.load(scale_a + row * slices + s, mask=has_row, other=0.0)[:, None]
            if BLOCKS:
                sums += partial * tl.load(scale_b + (column * COLS // 128) * slices + s)
            else:
                scales = tl.load(scale_b + col * slices + s, mask=has_col, other=0.0)
                sums += partial * (scales[:, None] if SWAP else scales)
        a_here += 128
        b_here += 128

    out += tl.program_id(1).to(tl.int64) * m * n
    if SWAP:
        sums = tl.trans(sums)
    where = out + row[:, None] * n + col
    tl.store(where, sums.to(out.dtype.element_ty), mask=has_row[:, None] & has_col)
