"""FP8 weights with a scale per block, as DeepSeek-V3 is trained and released (report, section 3.3).

An e4m3 number has 3 bits of mantissa and reaches from 2^-9 to 448: precise to about 6%, over a narrow range.
One scale for a whole matrix would let its single largest weight push all small ones out of that range.
So each block of 128 x 128 weights has its own scale, chosen so that the block's largest weight becomes 448:

    scale_inv = amax / 448        quantized = round(weight / scale_inv)        weight ~ quantized * scale_inv

The checkpoint calls the scale `weight_scale_inv`, since it is what undoes the scaling: one multiplies by it.
Matrices whose sides are no multiples of 128 end in smaller blocks. Both directions walk over the rows in
chunks, so that what they need besides their result is a few dozen megabytes, whatever the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.errors import UserError

BLOCK = 128
_LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
_CHUNK = 1 << 22  # weights worked on at once


def scale_shape(rows: int, cols: int) -> tuple[int, int]:
    """How many blocks a matrix has, down and across."""
    return -(-rows // BLOCK), -(-cols // BLOCK)


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to e4m3 with a scale per 128 x 128 block.

    weight: [rows, cols], any float dtype. Returns float8_e4m3fn [rows, cols] and scale_inv float32
    [ceil(rows / 128), ceil(cols / 128)]. Raises UserError if a weight is infinite or not a number.
    """
    rows, cols = weight.shape
    quantized = torch.empty(rows, cols, dtype=torch.float8_e4m3fn, device=weight.device)
    scale_inv = torch.empty(scale_shape(rows, cols), dtype=torch.float32, device=weight.device)
    for here, blocks_here in _row_chunks(rows, cols):
        part = weight[here].float()
        height = part.shape[0]
        padded = F.pad(part, (0, -cols % BLOCK, 0, -height % BLOCK))  # zeros change no block's maximum
        blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [down, 128, across, 128]
        scale = blocks.abs().amax(dim=(1, 3)) / _LARGEST
        if not scale.isfinite().all():
            raise UserError("cannot be quantised to FP8: it holds infinite or undefined (NaN) weights")
        scale = torch.where(scale > 0, scale, 1.0)  # an empty block, or one too small for float32 to scale
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
    weight = torch.empty(rows, cols, dtype=dtype, device=quantized.device)
    for here, blocks_here in _row_chunks(rows, cols):
        part = quantized[here].float()
        scale = scale_inv[blocks_here].float().repeat_interleave(BLOCK, dim=1)[:, :cols]
        weight[here] = part.mul_(scale.repeat_interleave(BLOCK, dim=0)[: part.shape[0]])
    return weight


def _row_chunks(rows: int, cols: int) -> Iterator[tuple[slice, slice]]:
    """Rows in chunks of whole blocks, as slices of the matrix and of its scales."""
    blocks = max(1, _CHUNK // (max(cols, 1) * BLOCK))
    for first in range(0, scale_shape(rows, cols)[0], blocks):
        yield slice(first * BLOCK, (first + blocks) * BLOCK), slice(first, first + blocks)
