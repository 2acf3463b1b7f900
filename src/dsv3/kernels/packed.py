"""Matrices in less than 16 bits a number.

Decoding reads every weight for a few tokens, so its speed is the number of bytes that a weight takes. A packed matrix
stays packed in memory; a kernel unpacks it in registers as it multiplies.

- **fp8** is DeepSeek's released format: e4m3 codes row by row, a float32 scale for each 128 x 128 block.
- **int8** and **int4** have a float16 scale, and if wanted a zero point, for each group of 32, 64 or 128 neighbours
  along the summed dimension: `weight = scale * (code - zero)`, the zero of a symmetric group being 128 or 8.

Integer codes lie as the processor multiplies them. Its instruction for bytes (VNNI) adds up four products in each of
16 lanes, so a *panel* of 16 rows keeps four neighbours of row 0, four of row 1, ..., 64 bytes, then the next four:

    int8  [out / 16, in / 4, 16, 4]    byte [p, q, r, j] is the code of weight [16 p + r, 4 q + j]
    int4  [out / 16, in / 8, 16, 4]    its low half that of [16 p + r, 8 q + j], its high half of [16 p + r, 8 q + 4 + j]

and scales and zeros [out / 16, in / group, 16]. A file of such bytes can be mapped into memory and multiplied from there.

`dsv3.kernels.inference.linear` multiplies. The native kernels round each group of x to int8 for integer weights, as llama.cpp does, so
that whole products are integers; for fp8 weights x stays bf16. Everywhere else the matrix is unpacked first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dsv3.kernels.fp8 import TILE, widen

Kind = Literal["fp8", "int8", "int4"]
GROUPS = (32, 64, 128)
ROWS = 16
"""Rows of a panel."""
_CHUNK = 1 << 22  # numbers unpacked at once


@dataclass(frozen=True)
class Packed:
    """A matrix [out, in], or a stack of them with more dimensions in front."""

    kind: Kind
    codes: Tensor
    """fp8: float8_e4m3fn [..., out, in]; int8: uint8 [..., out / 16, in / 4, 16, 4]; int4: uint8 [..., out / 16, in / 8, 16, 4]."""
    scale: Tensor
    """fp8: float32 [..., ceil(out / 128), ceil(in / 128)]; int8, int4: float16 [..., out / 16, in / group, 16]."""
    zero: Tensor | None = None
    """uint8 of scale's shape; None where all are 128 (int8) or 8 (int4), and for fp8."""

    @property
    def bits(self) -> int:
        return 4 if self.kind == "int4" else 8

    @property
    def out(self) -> int:
        return self.codes.shape[-2] if self.kind == "fp8" else self.codes.shape[-4] * ROWS

    @property
    def width(self) -> int:
        """The summed dimension, `in`."""
        return self.codes.shape[-1] if self.kind == "fp8" else self.codes.shape[-3] * (32 // self.bits)

    @property
    def shape(self) -> torch.Size:
        """Of the numbers: [..., out, in]."""
        ahead = self.codes.shape[: -2 if self.kind == "fp8" else -4]
        return torch.Size((*ahead, self.out, self.width))

    @property
    def group(self) -> int:
        """Numbers along `in` that share a scale."""
        return TILE if self.kind == "fp8" else self.width // self.scale.shape[-2]

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.codes, self.scale, self.zero) if t is not None]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def to(self, device: torch.device) -> Packed:
        zero = None if self.zero is None else self.zero.to(device)
        return Packed(self.kind, self.codes.to(device), self.scale.to(device), zero)

    def unbind(self) -> list[Packed]:
        """All matrices of a stack."""
        return [self[i] for i in range(self.codes.shape[0])]

    def __getitem__(self, index: int) -> Packed:
        """One matrix of a stack."""
        zero = None if self.zero is None else self.zero[index]
        return Packed(self.kind, self.codes[index], self.scale[index], zero)

    def rows(self, first: int, last: int) -> Packed:
        """Rows first .. last, which must be whole panels, or whole blocks of fp8."""
        unit, per_scale = (1, TILE) if self.kind == "fp8" else (ROWS, ROWS)
        if first % per_scale or last % unit or (last % per_scale and last != self.out):
            raise ValueError(f"rows {first} to {last} cut through what shares a scale")
        axis = -2 if self.kind == "fp8" else -4
        codes = self.codes.narrow(axis, first // unit, (last - first) // unit)
        scales = slice(first // per_scale, -(-last // per_scale))
        at = (..., scales, slice(None)) if self.kind == "fp8" else (..., scales, slice(None), slice(None))
        return Packed(self.kind, codes, self.scale[at], None if self.zero is None else self.zero[at])


Weight = Tensor | Packed
"""What one multiplies by."""


class Shapes(NamedTuple):
    """The shapes of a packed matrix's tensors."""

    codes: tuple[int, ...]
    scale: tuple[int, ...]


def packs(out: int, width: int, group: int) -> bool:
    """Whether a matrix of this shape can be packed into integers."""
    return out % ROWS == 0 and width % group == 0 and width > 0


def integer_shapes(out: int, width: int, bits: int, group: int) -> Shapes:
    panels = out // ROWS
    return Shapes((panels, width * bits // 32, ROWS, 4), (panels, width // group, ROWS))


def empty(kind: Kind, shape: torch.Size, group: int, zero: bool, device: torch.device) -> Packed:
    """Memory for a packed matrix [out, in], or a stack of them."""
    ahead, (out, width) = shape[:-2], shape[-2:]
    if kind == "fp8":
        codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        blocks = -(-out // TILE), -(-width // TILE)
        return Packed(kind, codes, torch.empty(*ahead, *blocks, dtype=torch.float32, device=device))
    shapes = integer_shapes(out, width, 4 if kind == "int4" else 8, group)
    codes = torch.empty(*ahead, *shapes.codes, dtype=torch.uint8, device=device)
    scale = torch.empty(*ahead, *shapes.scale, dtype=torch.float16, device=device)
    return Packed(
        kind, codes, scale, torch.empty(scale.shape, dtype=torch.uint8, device=device) if zero else None
    )


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [..., out, in] as they lie in panels, [..., out / 16, in * bits / 32, 16, 4]."""
    if bits == 4:
        low, high = codes.unflatten(-1, (-1, 2, 4)).unbind(-2)
        codes = (high << 4 | low).flatten(-2)
    panels: Tensor = codes.unflatten(-1, (-1, 4)).unflatten(-3, (-1, ROWS))
    return panels.transpose(-2, -3).contiguous()


def unpack(codes: Tensor, bits: int) -> Tensor:
    """What `pack` packed: uint8 [..., out, in]."""
    codes = codes.transpose(-2, -3).flatten(-2).flatten(-3, -2)
    if bits == 4:
        quads = codes.unflatten(-1, (-1, 4))
        codes = torch.stack((quads & 0xF, quads >> 4), dim=-2).flatten(-3)
    return codes


def unpanel(scale: Tensor) -> Tensor:
    """Scales or zeros [..., out / 16, groups, 16] row by row, [..., out, groups]."""
    return scale.transpose(-1, -2).flatten(-3, -2)


def panel(scale: Tensor) -> Tensor:
    """The way back from `unpanel`."""
    panels: Tensor = scale.unflatten(-2, (-1, ROWS))
    return panels.transpose(-1, -2).contiguous()


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that are meant, [..., out, in]: computed in float32, then cast to `dtype`."""
    out = torch.empty(packed.shape, dtype=dtype, device=packed.codes.device)
    if len(packed.shape) > 2:
        for i in range(packed.shape[0]):
            out[i] = dequantize(packed[i], dtype)
        return out
    rows = max(TILE, _CHUNK // max(packed.width, 1) // TILE * TILE)
    for first in range(0, packed.out, rows):
        last = min(first + rows, packed.out)
        out[first:last] = _numbers(packed.rows(first, last))
    return out


def _numbers(packed: Packed) -> Tensor:
    if packed.kind == "fp8":
        scale = packed.scale.float().repeat_interleave(TILE, dim=0)[: packed.out]
        return widen(packed.codes).mul_(scale.repeat_interleave(TILE, dim=1)[:, : packed.width])
    codes: Tensor = unpack(packed.codes, packed.bits).float().unflatten(-1, (-1, packed.group))
    zero = 2.0 ** (packed.bits - 1) if packed.zero is None else unpanel(packed.zero).float().unsqueeze(-1)
    return ((codes - zero) * unpanel(packed.scale).float().unsqueeze(-1)).flatten(-2)
