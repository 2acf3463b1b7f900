"""llama.cpp's number formats: rows of blocks, each with its own scales.

The simple ones take 32 neighbours together, with a scale in half precision, and those that end in `_1` a minimum:

    Q4_0, Q5_0, Q8_0    d q                 q from -8, -16, -128 on
    Q4_1, Q5_1          d q + m             q from 0 on

Q4_0 and Q8_0 are our int4 and int8 in groups of 32 (`dsv3.kernels.packed`) in another order of bytes. They are quantised
as these are, and what is in these already moves without being rounded again, both ways.

The K formats take 256 together, in groups of 16 or 32. Each group has a scale, or a scale and a minimum, of few bits
itself, in units that all of a block share:

            bits    group   scale    minimum      weight
    Q2_K    2       16      4 bits   4 bits       d s q - e m
    Q3_K    3       16      6 bits   -            d s q          s from -32, q from -4 on
    Q4_K    4       32      6 bits   6 bits       d s q - e m
    Q5_K    5       32      6 bits   6 bits       d s q - e m
    Q6_K    6       16      8 bits   -            d s q          s from -128, q from -32 on

Scales are searched as in `dsv3.quant.integers`: for a few steps that are tried the weights are rounded, least squares tell
the best scale (and minimum) for these codes, and the one with the least squared error wins. Scales are then rounded to
their few bits, and weights rounded anew with what is left of them. With a minimum, errors count by `|x| + rms(x)`, an idea
of llama.cpp's: of nano it makes better models, although the error that all weights have together is 1% larger.

On normally distributed weights that error (root mean square) is within 1% of what llama.cpp's quantiser leaves in Q4_K and
Q5_K, 3 to 7% smaller in Q6_K, Q3_K and Q2_K, and 6 to 10% smaller in the simple formats, for which it does not search.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv3.errors import UserError
from dsv3.gguf import TYPES, Type
from dsv3.kernels.packed import ROWS, Kind, Packed, packs, panel, unpanel
from dsv3.quant import integers

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
GROUP = 32
"""Of the formats that int4 and int8 go over to."""
_INTEGERS: dict[str, Kind] = {"Q4_0": "int4", "Q8_0": "int8"}
TYPE_OF = {kind: TYPES[name] for name, kind in _INTEGERS.items()}
"""What symmetric integers of this kind, in groups of 32, move to without being rounded."""
_CHUNK = 1 << 18  # weights worked on at once: they stay in cache


def moves(packed: Packed, to: Type) -> bool:
    """Whether `to_blocks` makes this format of a packed matrix."""
    return packed.zero is None and packed.group == GROUP and TYPE_OF.get(packed.kind) == to


def quantize(x: Tensor, to: Type) -> Tensor:
    """The bytes of a matrix, or a stack of them, [..., in]: uint8 [..., in / block * bytes].

    x: any float dtype; `in` a multiple of the format's block. Raises UserError if a number is infinite, undefined, or
    too large for the format.
    """
    if x.shape[-1] % to.block:
        raise ValueError(f"rows of {x.shape[-1]} numbers are no blocks of {to.block}")
    if to.name in FLOATS:
        numbers = x.to(FLOATS[to.name])
        if to.name == "F16" and not bool(numbers.isfinite().all()):
            raise UserError("cannot be written as F16: it holds infinite, undefined (NaN) or huge weights")
        return numbers.contiguous().view(torch.uint8)
    rows = x.flatten(0, -2)
    if to.name in _INTEGERS:
        filled = pad(rows, (0, 0, 0, -len(rows) % ROWS))
        blocks = to_blocks(integers.quantize(filled, 4 if to.name == "Q4_0" else 8, GROUP))[: len(rows)]
    else:
        encode = _ENCODERS[to.name]
        blocks = torch.empty(len(rows), rows.shape[1] // to.block * to.nbytes, dtype=torch.uint8)
        step = max(1, _CHUNK // rows.shape[1])
        for first in range(0, len(rows), step):
            part = rows[first : first + step].float()
            if not bool((part.abs() < 1e6).all()):  # NaN is not, either
                raise _no_number(to)
            try:
                blocks[first : first + step] = encode(part.view(-1, to.block)).view(len(part), -1)
            except OverflowError:
                raise _no_number(to) from None
    return blocks.view(*x.shape[:-1], -1)


def _no_number(to: Type) -> UserError:
    return UserError(f"cannot be quantised to {to.name}: it holds infinite, undefined (NaN) or huge weights")


def dequantize(blocks: Tensor, kind: Type, dtype: torch.dtype) -> Tensor:
    """The numbers that are meant by the bytes of a matrix or a stack, uint8 [..., bytes of a row]: [..., in] as `dtype`.

    Floats of that dtype are a view of the bytes."""
    if kind.name in FLOATS:
        return blocks.view(FLOATS[kind.name]).to(dtype)
    rows = blocks.flatten(0, -2)
    width = rows.shape[1] // kind.nbytes * kind.block
    out = torch.empty(len(rows), width, dtype=dtype)
    step = max(1, _CHUNK // width)
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        bytes_ = part.reshape(-1, kind.nbytes)
        numbers = _DECODERS[kind.name](bytes_) if kind.name in _DECODERS else _by_library(bytes_, kind)
        out[first : first + step] = numbers.reshape(len(part), width)
    return out.view(*blocks.shape[:-1], width)


def check_readable(kind: Type, what: str) -> None:
    """Raise UserError if `dequantize` needs a package for this format that is not installed."""
    if kind.name not in FLOATS and kind.name not in _DECODERS and find_spec("gguf") is None:
        raise UserError(f"{what} is {kind.name}, which needs gguf to be read: pip install 'dsv3[gguf]'")


def _by_library(blocks: Tensor, kind: Type) -> Tensor:
    import gguf

    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(kind.code)))


# int4 and int8 -----------------------------------------------------------------------------------------


def to_blocks(packed: Packed) -> Tensor:
    """The bytes of an int8 or int4 matrix as Q8_0 or Q4_0, uint8 [out, in / 32 * bytes]. See `moves`."""
    quads = packed.codes.view(torch.int32).squeeze(-1)  # [out / 16, in / 4 or in / 8, 16]
    quads = quads.transpose(1, 2).reshape(packed.out, -1, GROUP * packed.bits // 32).contiguous()
    if packed.kind == "int8":
        codes = quads ^ _BYTES_OF_128
    else:  # numbers 0 to 15 in low halves, 16 to 31 in high ones; ours: four and four
        a, b, c, d = quads.unbind(-1)
        low, high = 0x0F0F0F0F, 0xF0F0F0F0 - (1 << 32)
        codes = torch.stack(
            (
                (a & low) | ((c & low) << 4),
                ((a >> 4) & low) | (c & high),
                (b & low) | ((d & low) << 4),
                ((b >> 4) & low) | (d & high),
            ),
            dim=-1,
        )
    scale = unpanel(packed.scale).unsqueeze(-1).contiguous().view(torch.uint8)
    return torch.cat((scale, codes.view(torch.uint8)), dim=-1).flatten(1)


def from_blocks(blocks: Tensor, kind: Type) -> Packed:
    """The way back from `to_blocks`: uint8 [..., out, in / 32 * bytes] of Q8_0 or Q4_0, out a multiple of 16."""
    parts = blocks.unflatten(-1, (-1, kind.nbytes))
    scale = parts[..., :2].contiguous().view(torch.float16).squeeze(-1)
    quads = parts[..., 2:].contiguous().view(torch.int32)
    if kind.name == "Q8_0":
        codes = quads ^ _BYTES_OF_128
    else:
        a, b, c, d = quads.unbind(-1)
        low, high = 0x0F0F0F0F, 0xF0F0F0F0 - (1 << 32)
        codes = torch.stack(
            (
                (a & low) | ((b & low) << 4),
                (c & low) | ((d & low) << 4),
                ((a >> 4) & low) | (b & high),
                ((c >> 4) & low) | (d & high),
            ),
            dim=-1,
        )
    codes = codes.flatten(-2).unflatten(-2, (-1, ROWS)).transpose(-1, -2).contiguous()
    return Packed(_INTEGERS[kind.name], codes.unsqueeze(-1).view(torch.uint8), panel(scale))


def can_pack(kind: Type, shape: tuple[int, ...]) -> bool:
    """Whether `from_blocks` takes a matrix of this format and shape."""
    return kind.name in _INTEGERS and packs(shape[-2], shape[-1], GROUP)


_BYTES_OF_128 = 0x80808080 - (1 << 32)
"""Between -128 .. 127 and 0 .. 255, four at once."""


# Scales and codes --------------------------------------------------------------------------------------


def _search(x: Tensor, tries: tuple[float, ...]) -> Tensor:
    """The scale of each group with which codes centred on zero leave the least error. x: [..., group]; [..., 1].

    tries: what the largest number of a group, of either sign, is made to be, negative; the first is the lowest code.
    """
    reach = int(tries[0])
    low, high = (end.unsqueeze(-1) for end in torch.aminmax(x, dim=-1))
    extreme = torch.where(-low > high, low, high)
    extreme = torch.where(extreme.abs() > 1e-30, extreme, 1.0)
    search = integers.Search(x, None, 2 * reach - 1)
    for wanted in tries:
        search.consider(-wanted / extreme, reach)
    return search.scale


def _search_with_minimum(x: Tensor, tries: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """The same for codes from 0 on: scales, and minima, which are 0 or less.

    tries: what a group's whole range is made to be; the first is the highest code.
    """
    levels = tries[0]
    low, high = (end.unsqueeze(-1) for end in torch.aminmax(x, dim=-1))
    low, high = low.clamp(max=0), high.clamp(min=0)
    span = torch.where(high - low > 1e-30, high - low, 1.0)
    h = x.abs() + x.square().mean(-1, keepdim=True).sqrt() + 1e-30
    weight, total = h.sum(-1, keepdim=True), (h * x).sum(-1, keepdim=True)
    least = torch.full_like(low, torch.inf)
    scale, minimum = torch.zeros_like(low), torch.zeros_like(low)
    for wanted in tries:
        q = ((x - low) * (wanted / span)).round_().clamp_(0, levels)
        along = q * h
        sum_q, square, along = (t.sum(-1, keepdim=True) for t in (along, along * q, along * x))
        determinant = weight * square - sum_q.square()
        varied = determinant > 1e-6 * weight * square  # or else all codes are the same
        d = (weight * along - total * sum_q) / determinant
        m = (square * total - sum_q * along) / determinant
        m = torch.where(varied, m, torch.where(square > 0, 0, total / weight)).clamp(max=0)
        d = torch.where((m < 0) & varied, d, along / square.clamp(min=1e-30))
        error = (x - q * d - m).square_().mul_(h).sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        scale, minimum = torch.where(better, d, scale), torch.where(better, m, minimum)
    return scale.clamp(min=0), minimum


def _codes(x: Tensor, scale: Tensor, minimum: Tensor | float, low: int, high: int) -> Tensor:
    """The nearest codes, counted from 0: uint8."""
    step = torch.where(scale == 0, torch.inf, scale)
    return ((x - minimum) / step).round_().clamp_(low, high).sub_(low).to(torch.uint8)


def _units(values: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Half-precision units [n, 1, 1] of which the values, [n, groups, 1], are 0 .. most; and how many each is."""
    unit = (values.amax(1, keepdim=True) / most).half().float()
    counts = (values / torch.where(unit == 0, torch.inf, unit)).round_().clamp_(0, most)
    return unit, counts


def _signed_units(values: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """The same for values of either sign, that are -reach .. reach - 1."""
    at = values.abs().argmax(1, keepdim=True)
    unit = (values.gather(1, at) / -reach).half().float()
    counts = (values / torch.where(unit == 0, torch.inf, unit)).round_().clamp_(-reach, reach - 1)
    return unit, counts


def _half(x: Tensor) -> Tensor:
    """Numbers [n, ...] as the bytes of halves, [n, bytes]. OverflowError if one is larger than those are."""
    halves = x.flatten(1).half()
    if not bool(halves.isfinite().all()):
        raise OverflowError
    return halves.view(torch.uint8)


def _float(halves: Tensor) -> Tensor:
    """The way back from `_half`: [n, ...] bytes as float32."""
    return halves.contiguous().view(torch.float16).float()


# Blocks of 32 ------------------------------------------------------------------------------------------


def _fives(q: Tensor) -> Tensor:
    """The fifth bits of 32 codes, in four bytes."""
    bits: Tensor = (q >> 4).unflatten(-1, (4, 8)) << torch.arange(8, dtype=torch.uint8)
    return bits.sum(-1, dtype=torch.uint8)


def _halves(q: Tensor) -> Tensor:
    """The low four bits of 32 codes: of the first half below those of the second."""
    halves: Tensor = (q & 0xF).unflatten(-1, (2, 16))
    return halves[:, 0] | halves[:, 1] << 4


def _unfives(bytes_: Tensor) -> Tensor:
    """The way back from `_fives`: 16 where the bit is set, [n, 32]."""
    return ((bytes_.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1) << 4


def _unhalves(bytes_: Tensor) -> Tensor:
    return torch.cat((bytes_ & 0xF, bytes_ >> 4), dim=1)


def _decode_q8_0(b: Tensor) -> Tensor:
    return _float(b[:, :2]) * b[:, 2:].contiguous().view(torch.int8)


def _decode_q4_0(b: Tensor) -> Tensor:
    return _float(b[:, :2]) * (_unhalves(b[:, 2:]).float() - 8)


def _decode_q4_1(b: Tensor) -> Tensor:
    return _float(b[:, :2]) * _unhalves(b[:, 4:]) + _float(b[:, 2:4])


def _decode_q5_0(b: Tensor) -> Tensor:
    return _float(b[:, :2]) * ((_unhalves(b[:, 6:]) | _unfives(b[:, 2:6])).float() - 16)


def _decode_q5_1(b: Tensor) -> Tensor:
    return _float(b[:, :2]) * (_unhalves(b[:, 8:]) | _unfives(b[:, 4:8])) + _float(b[:, 2:4])


def _encode_q5_0(x: Tensor) -> Tensor:
    scale = _search(x, _TRIES_5).half().float()
    q = _codes(x, scale, 0.0, -16, 15)
    return torch.cat((_half(scale), _fives(q), _halves(q)), dim=1)


def _encode_q4_1(x: Tensor) -> Tensor:
    scale, minimum = (t.half().float() for t in _search_with_minimum(x, _SPANS_4))
    q = _codes(x, scale, minimum, 0, 15)
    return torch.cat((_half(scale), _half(minimum), _halves(q)), dim=1)


def _encode_q5_1(x: Tensor) -> Tensor:
    scale, minimum = (t.half().float() for t in _search_with_minimum(x, _SPANS_5))
    q = _codes(x, scale, minimum, 0, 31)
    return torch.cat((_half(scale), _half(minimum), _fives(q), _halves(q)), dim=1)


# Blocks of 256 -----------------------------------------------------------------------------------------


def _with_minimum(x: Tensor, group: int, tries: tuple[float, ...], most: int) -> tuple[Tensor, ...]:
    """Units d and e [n, 1, 1], counts of them s and m uint8 [n, groups], and codes uint8 [n, 256]."""
    x = x.unflatten(-1, (-1, group))
    scale, minimum = _search_with_minimum(x, tries)
    d, s = _units(scale, most)
    e, m = _units(-minimum, most)
    q = _codes(x, d * s, -e * m, 0, int(tries[0]))
    return d, e, s.to(torch.uint8).squeeze(-1), m.to(torch.uint8).squeeze(-1), q.flatten(1)


def _centred(x: Tensor, tries: tuple[float, ...], reach: int) -> tuple[Tensor, Tensor, Tensor]:
    """Units d [n, 1, 1], counts of them int8 [n, 16], and codes counted from 0, uint8 [n, 256]."""
    x, lowest = x.unflatten(-1, (-1, 16)), int(tries[0])
    d, s = _signed_units(_search(x, tries), reach)
    q = _codes(x, d * s, 0.0, -lowest, lowest - 1)
    return d, s.to(torch.int8).squeeze(-1), q.flatten(1)


def _six_bits(s: Tensor, m: Tensor) -> Tensor:
    """Eight scales and eight minima of six bits in twelve bytes: the last four of each are torn apart."""
    (s0, s1), (m0, m1) = s.split(4, dim=1), m.split(4, dim=1)
    return torch.cat((s0 | s1 >> 4 << 6, m0 | m1 >> 4 << 6, (s1 & 0xF) | (m1 & 0xF) << 4), dim=1)


def _nibbles(q: Tensor) -> Tensor:
    """Four bits of 256 codes: 32 of them below the next 32."""
    parts: Tensor = (q & 0xF).unflatten(-1, (4, 2, 32))
    return (parts[:, :, 0] | parts[:, :, 1] << 4).flatten(1)


def _quarters(q: Tensor) -> Tensor:
    """Two bits of 256 codes: of 32, the next 32, ... of each half in one byte."""
    parts: Tensor = (q & 3).unflatten(-1, (2, 4, 32))
    a, b, c, d = parts.unbind(-2)
    return (a | b << 2 | c << 4 | d << 6).flatten(1)


def _bits(q: Tensor) -> Tensor:
    """One bit of 256 codes: in byte i of codes i, 32 + i, 64 + i, ..."""
    bits: Tensor = (q & 1).unflatten(-1, (8, 32)) << torch.arange(8, dtype=torch.uint8).view(8, 1)
    return bits.sum(1, dtype=torch.uint8)


def _unsix_bits(bytes_: Tensor) -> tuple[Tensor, Tensor]:
    first, second, low = bytes_.split(4, dim=1)
    s = torch.cat((first & 63, (low & 0xF) | first >> 6 << 4), dim=1)
    return s, torch.cat((second & 63, low >> 4 | second >> 6 << 4), dim=1)


def _unnibbles(bytes_: Tensor) -> Tensor:
    parts = bytes_.unflatten(-1, (4, 32))
    return torch.stack((parts & 0xF, parts >> 4), dim=2).flatten(1)


def _unquarters(bytes_: Tensor) -> Tensor:
    parts = bytes_.unflatten(-1, (2, 32))
    return torch.stack([parts >> shift & 3 for shift in (0, 2, 4, 6)], dim=2).flatten(1)


def _unbits(bytes_: Tensor) -> Tensor:
    return (bytes_.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8).view(8, 1) & 1).flatten(1)


def _grouped(q: Tensor, d: Tensor, s: Tensor, e: Tensor | None = None, m: Tensor | None = None) -> Tensor:
    """d s q - e m. Codes [n, 256], units [n, 1], counts [n, groups]."""
    scaled: Tensor = q.float().unflatten(-1, (s.shape[1], -1)) * (d * s).unsqueeze(-1)
    return (scaled if e is None or m is None else scaled - (e * m).unsqueeze(-1)).flatten(1)


def _decode_q2_k(b: Tensor) -> Tensor:
    return _grouped(
        _unquarters(b[:, 16:80]), _float(b[:, 80:82]), b[:, :16] & 0xF, _float(b[:, 82:]), b[:, :16] >> 4
    )


def _decode_q3_k(b: Tensor) -> Tensor:
    low, high = b[:, 96:104], b[:, 104:108]
    counts = (
        torch.cat((low & 0xF, low >> 4), dim=1) | torch.cat([high >> n & 3 for n in (0, 2, 4, 6)], dim=1) << 4
    )
    q = _unquarters(b[:, 32:96]) | _unbits(b[:, :32]) << 2
    return _grouped(q.float() - 4, _float(b[:, 108:]), counts.float() - 32)


def _decode_q4_k(b: Tensor) -> Tensor:
    s, m = _unsix_bits(b[:, 4:16])
    return _grouped(_unnibbles(b[:, 16:]), _float(b[:, :2]), s, _float(b[:, 2:4]), m)


def _decode_q5_k(b: Tensor) -> Tensor:
    s, m = _unsix_bits(b[:, 4:16])
    q = _unnibbles(b[:, 48:]) | _unbits(b[:, 16:48]) << 4
    return _grouped(q, _float(b[:, :2]), s, _float(b[:, 2:4]), m)


def _decode_q6_k(b: Tensor) -> Tensor:
    low = b[:, :128].unflatten(-1, (2, 64))
    q = torch.stack((low & 0xF, low >> 4), dim=2).flatten(1) | _unquarters(b[:, 128:192]) << 4
    return _grouped(q.float() - 32, _float(b[:, 208:]), b[:, 192:208].contiguous().view(torch.int8))


def _encode_q2_k(x: Tensor) -> Tensor:
    d, e, s, m, q = _with_minimum(x, 16, _SPANS_2, 15)
    return torch.cat((s | m << 4, _quarters(q), _half(d), _half(e)), dim=1)


def _encode_q3_k(x: Tensor) -> Tensor:
    d, s, q = _centred(x, _TRIES_3, 32)
    counts = (s + 32).to(torch.uint8)
    low, high = counts & 0xF, (counts >> 4).unflatten(-1, (4, 4))
    high = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
    return torch.cat((_bits(q >> 2), _quarters(q), low[:, :8] | low[:, 8:] << 4, high, _half(d)), dim=1)


def _encode_q4_k(x: Tensor) -> Tensor:
    d, e, s, m, q = _with_minimum(x, 32, _SPANS_4, 63)
    return torch.cat((_half(d), _half(e), _six_bits(s, m), _nibbles(q)), dim=1)


def _encode_q5_k(x: Tensor) -> Tensor:
    d, e, s, m, q = _with_minimum(x, 32, _SPANS_5, 63)
    return torch.cat((_half(d), _half(e), _six_bits(s, m), _bits(q >> 4), _nibbles(q)), dim=1)


def _encode_q6_k(x: Tensor) -> Tensor:
    d, s, q = _centred(x, _TRIES_6, 128)
    a, b = (q & 0xF).unflatten(-1, (2, 2, 64)).unbind(-2)
    return torch.cat(((a | b << 4).flatten(1), _quarters(q >> 4), s.view(torch.uint8), _half(d)), dim=1)


_TRIES_3 = (4, 3, 3.25, 3.5, 3.75, 4.25, 4.5, 5)
_TRIES_5 = (16, 14.5, 15, 15.5, 16.5, 17)
_TRIES_6 = (32, 30.5, 31, 31.5, 32.5, 33)
_SPANS_2 = (3, 2.4, 2.7, 3.3, 3.6, 4, 4.5)
_SPANS_4 = (15, 14, 14.2, 14.4, 14.6, 14.8, 15.2, 15.4, 15.6, 15.8, 16.1, 16.5)
_SPANS_5 = (31, 30, 30.25, 30.5, 30.75, 31.25, 31.5, 31.75, 32.1, 32.5)
_ENCODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_1": _encode_q4_1,
    "Q5_0": _encode_q5_0,
    "Q5_1": _encode_q5_1,
    "Q2_K": _encode_q2_k,
    "Q3_K": _encode_q3_k,
    "Q4_K": _encode_q4_k,
    "Q5_K": _encode_q5_k,
    "Q6_K": _encode_q6_k,
}
_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _decode_q8_0,
    "Q4_0": _decode_q4_0,
    "Q4_1": _decode_q4_1,
    "Q5_0": _decode_q5_0,
    "Q5_1": _decode_q5_1,
    "Q2_K": _decode_q2_k,
    "Q3_K": _decode_q3_k,
    "Q4_K": _decode_q4_k,
    "Q5_K": _decode_q5_k,
    "Q6_K": _decode_q6_k,
}
