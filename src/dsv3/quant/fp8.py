"""FP8 numbers with a scale per block or tile, as DeepSeek-V3 is trained and released (report, section 3.3).

An e4m3 number has 3 bits of mantissa and reaches from 2^-9 to 448: precise to about 6%, over a narrow range.
One scale for a whole matrix would let its single largest number push all small ones out of that range. So
each block of 128 x 128 weights has its own scale, chosen so that the block's largest weight becomes 448:

    scale_inv = amax / 448        quantized = round(weight / scale_inv)        weight ~ quantized * scale_inv

The checkpoint calls the scale `weight_scale_inv`, since it is what undoes the scaling: one multiplies by it.
Activations have outliers in few channels of few tokens, so they get a scale per tile, 128 channels of one
token. To tile along tokens instead (128 x 1), transpose before. Matrices whose sides are no multiples of 128
end in smaller blocks and tiles.

A scale may be rounded up to a power of two. Then quantising changes no digit of a number beyond rounding it
to the format, and a number once rounded can change tiles and be rounded again for nothing (unless it is so
much smaller than the new tile's largest that it becomes subnormal). For the input of attention's output
matrix the report has a format of its own with three more bits of mantissa, E5M6: twelve bits a number, here
those of a float16 whose mantissa is rounded to six bits.

Blocks walk over the rows in chunks, so that what they need besides their result is a few dozen megabytes,
whatever the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.errors import UserError
from dsv3.kernels.fp8 import TILE, scale_tiles, widen
from dsv3.kernels.packed import Packed, dequantize

BLOCK = TILE  # 128
_LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
_LARGEST_E5M6 = 65024.0  # float16's largest, with six bits of mantissa
_CHUNK = 1 << 22  # weights worked on at once


def scale_shape(rows: int, cols: int) -> tuple[int, int]:
    """How many blocks a matrix has, down and across."""
    return -(-rows // BLOCK), -(-cols // BLOCK)


def quantize_blocks(weight: Tensor, check: bool = True) -> tuple[Tensor, Tensor]:
    """Round a matrix to e4m3 with a scale per 128 x 128 block.

    weight: [rows, cols], any float dtype. Returns float8_e4m3fn [rows, cols] and scale_inv float32
    [ceil(rows / 128), ceil(cols / 128)]. Raises UserError if a weight is infinite or not a number; without
    `check`, which makes a GPU wait, it spoils its block instead.
    """
    rows, cols = weight.shape
    quantized = torch.empty(rows, cols, dtype=torch.float8_e4m3fn, device=weight.device)
    scale_inv = torch.empty(scale_shape(rows, cols), dtype=torch.float32, device=weight.device)
    for here, blocks_here in _row_chunks(rows, cols):
        part = weight[here].float()
        height = part.shape[0]
        padded = F.pad(part, (0, -cols % BLOCK, 0, -height % BLOCK))  # zeros change no block's maximum
        blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [down, 128, across, 128]
        amax = blocks.abs().amax(dim=(1, 3))
        if check and not amax.isfinite().all():
            raise UserError("cannot be quantised to FP8: it holds infinite or undefined (NaN) weights")
        scale = _scale(amax, _LARGEST)
        # The clamp matters where the scale itself is so small that it has lost digits: e4m3 has no infinity,
        # and what a cast makes of a quotient beyond 448, the largest number or NaN, depends on the device.
        scaled = (blocks / scale[:, None, :, None]).clamp(-_LARGEST, _LARGEST)
        quantized[here] = scaled.flatten(2, 3).flatten(0, 1)[:height, :cols].to(quantized.dtype)
        scale_inv[blocks_here] = scale
    return quantized, scale_inv


def dequantize_blocks(quantized: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that blocks stand for: `quantized.float() * scale_inv` in float32, then cast to `dtype`.

    quantized: float8_e4m3fn [rows, cols]; scale_inv: [ceil(rows / 128), ceil(cols / 128)].
    Returns [rows, cols]. Raises UserError if the shapes do not fit.
    """
    rows, cols = quantized.shape
    if tuple(scale_inv.shape) != scale_shape(rows, cols):
        raise UserError(
            f"scale_inv has shape {list(scale_inv.shape)}: a matrix of {rows} x {cols} has "
            f"{list(scale_shape(rows, cols))} blocks of {BLOCK} x {BLOCK}"
        )
    return dequantize(Packed("fp8", quantized, scale_inv), dtype)


def quantize_tiles(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Round a matrix to e4m3 with a scale per 1 x 128 tile, which is a power of two if asked to be.

    x: [rows, cols], any float dtype. Returns float8_e4m3fn [rows, cols] and scale_inv float32
    [rows, ceil(cols / 128)]. An infinite number makes its tile NaN.
    """
    tiles = _tiles(x)
    scale = _scale(tiles.abs().amax(dim=2), _LARGEST, power_of_two)
    quantized = (tiles / scale.unsqueeze(2)).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return quantized.flatten(1)[:, : x.shape[1]].contiguous(), scale


def dequantize_tiles(quantized: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that tiles stand for: `quantized.float() * scale_inv` in float32, then cast to `dtype`."""
    return scale_tiles(widen(quantized), scale_inv).to(dtype)


def quantize_e5m6(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to E5M6 with a power-of-two scale per 1 x 128 tile.

    x: [rows, cols], any float dtype. Returns uint8 [rows, cols + ceil(cols / 2)], for each number its upper 8
    bits, then for each pair of numbers their lower 4; and scale_inv float32 [rows, ceil(cols / 128)].
    """
    tiles = _tiles(x)
    scale = _scale(tiles.abs().amax(dim=2), _LARGEST_E5M6, power_of_two=True)
    tiles = tiles / scale.unsqueeze(2)
    # Added to 1.5 * 2^17 times its own power of two, a number keeps six bits of mantissa, rounded to nearest even.
    power = (tiles.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=2.0**-14)
    shift = power.mul_(1.5 * 2**17)
    rounded = (tiles + shift).sub_(shift).half().flatten(1)[:, : x.shape[1]]
    codes = rounded.view(torch.int16) >> 4 & 0xFFF
    lower = F.pad(codes & 0xF, (0, x.shape[1] % 2))
    return torch.cat((codes >> 4, lower[:, ::2] << 4 | lower[:, 1::2]), dim=1).to(torch.uint8), scale


def dequantize_e5m6(
    packed: Tensor, scale_inv: Tensor, cols: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The numbers [rows, cols] that `quantize_e5m6` packed."""
    upper, pairs = packed[:, :cols].short(), packed[:, cols:].short()
    lower = torch.stack((pairs >> 4, pairs & 0xF), dim=2).flatten(1)[:, :cols]
    codes = upper << 8 | lower << 4
    return scale_tiles(codes.view(torch.float16).float(), scale_inv).to(dtype)


def _tiles(x: Tensor) -> Tensor:
    """x [rows, cols] in float32 as [rows, tiles, width], the last tile filled up with zeros; one tile is as it is."""
    across = scale_shape(*x.shape)[1]
    width = min(x.shape[1], BLOCK) or BLOCK
    padding = across * width - x.shape[1]
    x = x.float()
    tiles: Tensor = (F.pad(x, (0, padding)) if padding else x).unflatten(1, (across, width))
    return tiles


def _scale(amax: Tensor, largest: float, power_of_two: bool = False) -> Tensor:
    """What brings `amax` to `largest`, or for powers of two, at most there; 1 where that would be 0 or NaN."""
    scale = amax / largest
    if power_of_two:  # float32 is sign, exponent, mantissa: carry any mantissa over into the exponent
        scale = (scale.view(torch.int32) + 0x7FFFFF).bitwise_and_(0x7F800000).view(torch.float32)
    return torch.where(scale > 0, scale, 1.0)  # nothing there, or too small for float32 to scale


def _row_chunks(rows: int, cols: int) -> Iterator[tuple[slice, slice]]:
    """Rows in chunks of whole blocks, as slices of the matrix and of its scales."""
    blocks = max(1, _CHUNK // (max(cols, 1) * BLOCK))
    for first in range(0, scale_shape(rows, cols)[0], blocks):
        yield slice(first * BLOCK, (first + blocks) * BLOCK), slice(first, first + blocks)
