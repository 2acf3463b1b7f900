"""Weights in 8 or 4 bits: `weight ~ scale * (code - zero)`, with a scale for each group of neighbours in a row.

Four bits are sixteen numbers, so where they lie is all that matters. To let them just reach a group's largest
weight is a poor choice: one outlier then widens the steps for all. So for each group a dozen scales are tried, from
wide ones that lose a sixth of the codes to narrow ones that cut the largest weight off. For each the weights are
rounded, and least squares tell both the best scale for these codes and what it leaves of the error:

    scale = sum(h w q) / sum(h q^2)        error = sum(h w^2) - sum(h w q)^2 / sum(h q^2)        q = code - zero

The scale with the least error is rounded to float16, as it is stored, and the weights are rounded anew with that. On
normally distributed weights the error is within 2% of the best that there is, and 12% below that of the largest weight
made -8, as llama.cpp's q4_0 does it.

- Codes -8 .. 7 are not symmetric. The scale may be negative, so that the largest weight of either sign can be -8.
- With zero points the range -zero .. 15 - zero is where the group's weights lie. They cost a byte a group, and take
  10% off the error in groups of 32, 4% in groups of 128. The symmetric way is one of those tried.
- h is 1, or the *importance* of a column, such as the mean square of the inputs that it is multiplied with.

At 8 bits there is little to be won: only a group's reach is chosen, then the scale by least squares.

Where the inputs' mean products H = E[x x^T] are known, rounding does more than that (GPTQ, arXiv 2210.17323). What an
output lacks after one column was rounded, the columns not yet rounded can make up for, as far as their inputs go along
with this one's. With U the upper Cholesky factor of H^-1, column after column:

    error = (w_j - rounded w_j) / U_jj        w_k -= error U_jk  for k > j

and what cannot be made up for is sum(error^2), so that h = 1 / U_jj^2. `calibrate` in `dsv3.checkpoint.calibrate` has H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.errors import UserError
from dsv3.kernels.fp8 import TILE
from dsv3.kernels.packed import (
    GROUPS,
    ROWS,
    Packed,
    Weight,
    dequantize,
    empty,
    pack,
    packs,
    panel,
)

_REACHES = {4: (8, 7, 7.5, 8.5, 6.5, 9, 9.5, 6, 10, 5, 11), 8: (128, 127)}
"""What a group's largest weight is tried as; beyond the largest code it is cut off."""
_SPANS = {4: (13, 14, 15, 16, 17, 18, 19, 20), 8: (254, 255)}
"""With zero points, what a group's whole range is tried as."""
_CHUNK = 1 << 18  # weights worked on at once: they stay in cache
_BLOCK = 1 << 20  # unpacked at once
_UNDEFINED = "cannot be quantised: its inputs are infinite or undefined (NaN) on the calibration text"
_LEAST = 1e-3  # of the mean importance: no column counts less
_LARGEST = torch.finfo(torch.float16).max


def quantize(
    weight: Weight, bits: int, group: int, zero_points: bool = False, importance: Tensor | None = None
) -> Packed:
    """Round a matrix to integers with a float16 scale, and if wanted a zero point, for each `group` weights of a row.

    weight: [out, in], any float dtype, or packed in another way; out a multiple of 16, in of `group`. importance: of each
    column, [in], 0 or more; or what `feedback` made of the inputs, [in, in]. Needs little memory besides the result.
    Raises UserError if a weight or an importance is infinite or not a number, or a weight too large for any scale.
    """
    out, width = weight.shape
    if bits not in _REACHES or group not in GROUPS or not packs(out, width, group):
        raise ValueError(f"no way of packing {[out, width]} weights into {bits} bits in groups of {group}")
    device = weight.codes.device if isinstance(weight, Packed) else weight.device
    factor = importance.to(device) if importance is not None and importance.dim() == 2 else None
    importance = importance if factor is None else factor.diagonal().square().reciprocal()
    counts = None if importance is None else _counts(importance.to(device), group)
    result = empty("int4" if bits == 4 else "int8", torch.Size((out, width)), group, zero_points, device)
    # What is packed is unpacked by whole blocks of rows.
    unit = max(1, _BLOCK // width // TILE) * TILE if isinstance(weight, Packed) else out
    rows = max(1, (_CHUNK if factor is None else 16 * _CHUNK) // width // ROWS) * ROWS
    for block in range(0, out, unit):
        end = min(block + unit, out)
        part = dequantize(weight.rows(block, end)) if isinstance(weight, Packed) else weight
        for first in range(block, end, rows):
            last = min(first + rows, end)
            here = part[first - block : last - block].float()
            if factor is None or counts is None:
                w = here.unflatten(1, (-1, group))
                scale, zero = _fit(w, counts, bits, zero_points)
                codes = _codes(w, scale, zero, bits).flatten(1)
            else:
                codes, scale, zero = _one_by_one(here, factor, counts, bits, zero_points)
            panels = slice(first // ROWS, last // ROWS)
            result.codes[panels] = pack(codes, bits)
            result.scale[panels] = panel(scale.squeeze(-1))
            if result.zero is not None:
                result.zero[panels] = panel(zero.squeeze(-1).to(torch.uint8))
    return result


def feedback(products: Tensor) -> Tensor:
    """What to round by, U of the module's docstring, float32 [in, in], from the mean products of inputs, [in, in].

    A hundredth of the mean square is added to all squares: less text than columns must do. Raises UserError if the products
    are infinite or not a number.
    """
    h = products.double()
    damping = 0.01 * h.diagonal().mean()
    if not h.isfinite().all():
        raise UserError(_UNDEFINED)
    h.diagonal().add_(damping if damping > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def _counts(importance: Tensor, group: int) -> Tensor:
    """Importance as [groups, group], its mean 1."""
    mean = importance.float().mean()
    if not mean.isfinite() or importance.min() < 0:
        raise UserError(_UNDEFINED)
    counts = importance.float() / mean if mean > 0 else torch.ones_like(importance, dtype=torch.float32)
    return counts.clamp(min=_LEAST).view(-1, group)


def _one_by_one(
    w: Tensor, factor: Tensor, h: Tensor, bits: int, zero_points: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """w: float32 [rows, in]. Codes uint8 like w, and scales and zeros as `_fit` has them."""
    groups, group = h.shape
    columns = w.T.clone(memory_format=torch.contiguous_format)
    codes = torch.empty_like(columns, dtype=torch.uint8)
    fits = []
    for g in range(groups):
        first, last = g * group, (g + 1) * group
        scale, zero = _fit(columns[first:last].T.unsqueeze(1), h[g : g + 1], bits, zero_points)
        fits.append((scale, zero))
        step, offset = scale.flatten(), zero.flatten()
        errors = torch.empty_like(columns[first:last])
        for j in range(first, last):
            codes[j] = _codes(columns[j], step, offset, bits)
            errors[j - first] = (columns[j] - (codes[j] - offset) * step.float()) / factor[j, j]
            columns[j + 1 : last].addr_(factor[j, j + 1 : last], errors[j - first], alpha=-1)
        columns[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    scales, zeros = (torch.cat(each, dim=1) for each in zip(*fits, strict=True))
    return codes.T, scales, zeros


def _codes(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes, uint8."""
    step = torch.where(scale == 0, torch.inf, scale.float())
    q = (w / step).round_()
    return torch.minimum(torch.maximum(q, -zero), 2**bits - 1 - zero).add_(zero).to(torch.uint8)


def _fit(w: Tensor, h: Tensor | None, bits: int, zero_points: bool) -> tuple[Tensor, Tensor]:
    """w: float32 [rows, groups, group]; h: [groups, group]. Scales float16 and zeros float32, [rows, groups, 1]."""
    levels, middle = 2**bits - 1, 2 ** (bits - 1)
    low, high = (end.unsqueeze(-1) for end in torch.aminmax(w, dim=-1))
    extreme = torch.where(-low > high, low, high)
    if not bool((extreme.abs() <= _LARGEST * middle).all()):  # NaN is not, either
        raise UserError(
            f"cannot be quantised to {bits} bits: it holds infinite, undefined (NaN) or huge weights"
        )
    extreme = torch.where(extreme.abs() > 1e-30, extreme, 1.0)  # no code but 0 will be wanted

    search = Search(w, h, levels)
    zero = torch.full_like(extreme, middle)
    for reach in _REACHES[bits]:
        search.consider(-reach / extreme, middle)
    if zero_points:
        low, high = low.clamp(max=0), high.clamp(min=0)
        span = torch.where(high - low > 1e-30, high - low, 1.0)
        z = (-low * levels / span).round_().clamp_(0, levels)
        for reach in _SPANS[bits]:
            zero = torch.where(search.consider(reach / span, z), z, zero)
    return search.scale.clamp_(-_LARGEST, _LARGEST).half(), zero


class Search:
    """The scale of each group with which codes leave the least error, of those that were considered so far."""

    def __init__(self, w: Tensor, h: Tensor | None, levels: int) -> None:
        """w: float32 [..., group]; h: what weights count, like w; levels: the highest code."""
        self._w, self._h, self._levels = w, h, levels
        self._weighted = w if h is None else w * h
        self._gain = torch.zeros_like(w[..., :1])
        self.scale = torch.zeros_like(w[..., :1])
        """[..., 1]"""

    def consider(self, inverse: Tensor, zero: Tensor | int) -> Tensor:
        """Round with the scales 1 / inverse and let least squares mend these; where that is better, it is kept.
        Returns where, [..., 1]."""
        q = (self._w * inverse).round_()
        torch.clamp(q, -zero, self._levels - zero, out=q)  # type: ignore[arg-type]
        along = (q * self._weighted).sum(-1, keepdim=True)
        square = (q.square_() if self._h is None else q.square_().mul_(self._h)).sum(-1, keepdim=True)
        fit = along / square.clamp(min=1e-30)
        better = along * fit > self._gain
        torch.where(better, along * fit, self._gain, out=self._gain)
        torch.where(better, fit, self.scale, out=self.scale)
        return better
