"""Packed matrices: where each code lies, and what number it stands for, written out one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv3.kernels import packed
from dsv3.kernels.packed import (
    Kind,
    Packed,
    dequantize,
    empty,
    integer_shapes,
    pack,
    packs,
    panel,
    unpack,
    unpanel,
)

LAYOUTS: list[tuple[Kind, int, bool]] = [
    ("fp8", 128, False),
    *((kind, group, zero) for kind in ("int8", "int4") for group in (32, 64, 128) for zero in (False, True)),
]


def filled(kind: Kind, shape: tuple[int, ...], group: int, zero: bool) -> Packed:
    """Random codes, scales and zeros."""
    generator = torch.Generator().manual_seed(sum(shape))
    made = empty(kind, torch.Size(shape), group, zero, torch.device("cpu"))
    for tensor in made.tensors:
        if tensor.dtype == torch.uint8:
            random: Tensor = torch.randint(0, 256, tensor.shape, generator=generator)
        else:
            random = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(random)
    return made


def number(made: Packed, row: int, col: int) -> float:
    """One weight, from the description in the module's docstring."""
    if made.kind == "fp8":
        return float(made.codes[row, col]) * float(made.scale[row // 128, col // 128])
    p, r = divmod(row, 16)
    if made.kind == "int8":
        code, middle = int(made.codes[p, col // 4, r, col % 4]), 128
    else:
        byte, middle = int(made.codes[p, col // 8, r, col % 4]), 8
        code = byte >> 4 if col % 8 >= 4 else byte & 15
    at = p, col // made.group, r
    zero = middle if made.zero is None else int(made.zero[at])
    return float(made.scale[at]) * (code - zero)


@pytest.mark.parametrize("chunk", [1 << 22, 1], ids=["whole", "in chunks"])
@pytest.mark.parametrize(("kind", "group", "zero"), LAYOUTS)
def test_every_number(
    kind: Kind, group: int, zero: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_CHUNK", chunk)
    shape = (150, 139) if kind == "fp8" else (144, 256)
    made = filled(kind, shape, group, zero)
    assert made.shape == shape and made.group == group and made.bits == (4 if kind == "int4" else 8)
    got = dequantize(made)
    assert got.dtype == torch.float32
    for row in range(0, shape[0], 7):
        for col in range(shape[1]):
            assert float(got[row, col]) == pytest.approx(number(made, row, col), rel=1e-6), (row, col)
    assert torch.equal(dequantize(made, torch.bfloat16), got.bfloat16())


@pytest.mark.parametrize(("kind", "group", "zero"), LAYOUTS)
def test_a_stack_and_its_parts(kind: Kind, group: int, zero: bool) -> None:
    stack = filled(kind, (3, 272, 256), group, zero)
    whole = dequantize(stack)
    assert stack.shape == whole.shape == (3, 272, 256)
    for index, one in enumerate(stack.unbind()):
        assert torch.equal(dequantize(one), whole[index])
        assert torch.equal(dequantize(one.rows(128, 256)), whole[index, 128:256])
    with pytest.raises(ValueError, match="cut through"):
        stack.rows(8, 128)


@given(st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 9), st.integers(1, 3))
def test_packing_loses_no_code(bits: int, panels: int, width: int, stack: int) -> None:
    codes = torch.randint(0, 2**bits, (stack, panels * 16, width * 32), dtype=torch.uint8)
    there = pack(codes, bits)
    assert there.shape == (stack, *integer_shapes(panels * 16, width * 32, bits, 32).codes)
    assert there.is_contiguous() and torch.equal(unpack(there, bits), codes)
    scale = torch.randn(stack, panels * 16, width)
    assert torch.equal(unpanel(panel(scale)), scale)


def test_what_can_be_packed() -> None:
    assert packs(16, 64, 32) and packs(16, 64, 64) and not packs(16, 64, 128)
    assert not packs(24, 64, 32) and not packs(16, 0, 32)


@pytest.mark.parametrize(("kind", "group", "zero"), LAYOUTS)
def test_bytes(kind: Kind, group: int, zero: bool) -> None:
    made = empty(kind, torch.Size((2, 256, 512)), group, zero, torch.device("meta"))
    numbers = 2 * 256 * 512
    if kind == "fp8":
        assert made.nbytes == numbers + 2 * 2 * 4 * 4
    else:
        assert made.nbytes == numbers * made.bits // 8 + numbers // group * (3 if zero else 2)
