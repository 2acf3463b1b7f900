"""llama.cpp's number formats: read as its own library reads them, and written at least as well as it writes them."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3.errors import UserError
from dsv3.gguf import TYPES, Type
from dsv3.kernels.packed import dequantize
from dsv3.quant import ggml, integers
from tests.checkpoint import llama

OURS = [name for name in TYPES if not name.startswith(("IQ", "TQ", "MX"))]
BLOCKS = [name for name in OURS if name not in ggml.FLOATS]
# The root mean square of errors on normally distributed numbers, in parts of their own: what the formats come to.
ERRORS = {
    "Q8_0": 0.0051,
    "Q6_K": 0.0175,
    "Q5_K": 0.0365,
    "Q5_1": 0.0348,
    "Q5_0": 0.0408,
    "Q4_K": 0.0728,
    "Q4_1": 0.0716,
    "Q4_0": 0.082,
    "Q3_K": 0.146,
    "Q2_K": 0.281,
}


def by_library(blocks: Tensor, kind: Type) -> Tensor:
    numbers = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(kind.code))
    return torch.from_numpy(np.ascontiguousarray(numbers))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def error(x: Tensor, numbers: Tensor) -> float:
    return float((x - numbers).square().mean().sqrt() / x.square().mean().sqrt())


def test_sizes_are_the_librarys() -> None:
    for name, kind in TYPES.items():
        code = gguf.GGMLQuantizationType[name]
        assert (kind.code, kind.block, kind.nbytes) == (code.value, *gguf.GGML_QUANT_SIZES[code]), name


@pytest.mark.parametrize("name", OURS)
def test_bytes_are_read_as_the_library_does(name: str) -> None:
    kind = TYPES[name]
    bytes_ = torch.randint(0, 256, (24, 4 * kind.nbytes), generator=torch.Generator().manual_seed(1)).to(
        torch.uint8
    )
    with np.errstate(invalid="ignore"):  # some of these bytes are scales that are no numbers
        wanted = by_library(bytes_, kind).view(24, -1)
    found = ggml.dequantize(bytes_, kind, torch.float32)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert ggml.dequantize(bytes_, kind, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("name", BLOCKS)
def test_the_error_is_what_the_format_has(name: str) -> None:
    kind, x = TYPES[name], normal(96, 512)
    blocks = ggml.quantize(x, kind)
    assert blocks.dtype == torch.uint8 and blocks.shape == (96, 512 // kind.block * kind.nbytes)
    assert error(x, by_library(blocks, kind)) < ERRORS[name]
    assert error(0.01 * x, by_library(ggml.quantize(0.01 * x, kind), kind)) < 1.02 * ERRORS[name]


@pytest.mark.parametrize("name", OURS)
def test_stacks_and_odd_rows(name: str) -> None:
    kind, x = TYPES[name], normal(3, 5, 256)
    blocks = ggml.quantize(x, kind)
    assert blocks.shape == (3, 5, 256 // kind.block * kind.nbytes)
    for matrix, one in zip(x, blocks, strict=True):
        assert torch.equal(ggml.quantize(matrix, kind), one)
    numbers = ggml.dequantize(blocks, kind, torch.float32)
    assert torch.equal(numbers, by_library(blocks.flatten(0, 1), kind).view(3, 5, 256))


@pytest.mark.parametrize("name", OURS)
def test_zeros_and_constants_stay(name: str) -> None:
    kind = TYPES[name]
    for value in (0.0, 0.75, -0.75):
        x = torch.full((16, 256), value)
        assert torch.allclose(by_library(ggml.quantize(x, kind), kind), x, rtol=0.01), value


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_no_number_is_refused(name: str) -> None:
    for wrong in (torch.nan, torch.inf, 1e38):
        x = normal(16, 256)
        x[3, 100] = wrong
        with pytest.raises(UserError, match="infinite, undefined"):
            ggml.quantize(x, TYPES[name])
    with pytest.raises(ValueError, match="no blocks"):
        ggml.quantize(normal(16, 40), TYPES[name])


@pytest.mark.parametrize("name", ["F16", *BLOCKS])
def test_halves_do_not_overflow(name: str) -> None:
    """The largest half is 65504: what asks for more is refused, never written as infinite."""
    for largest in (6e4, 1e5, 9.9e5):
        x = normal(16, 256)
        x[3, 100] = largest
        x[5] += largest
        try:
            blocks = ggml.quantize(x, TYPES[name])
        except UserError as error:
            assert "huge" in str(error) and largest > 65504
        else:
            assert bool(ggml.dequantize(blocks, TYPES[name], torch.float32).isfinite().all())
    x = torch.full((16, 256), 9.9e5)
    if name in ("F16", "Q4_1", "Q5_1", "Q2_K"):
        x[:, ::2] = -9.9e5
        with pytest.raises(UserError, match="huge"):
            ggml.quantize(x, TYPES[name])


@pytest.mark.parametrize(("name", "bits"), [("Q8_0", 8), ("Q4_0", 4)])
def test_integers_move_without_being_rounded(name: str, bits: int) -> None:
    kind, x = TYPES[name], normal(48, 160)
    packed = integers.quantize(x, bits, 32)
    blocks = ggml.to_blocks(packed)
    assert torch.equal(by_library(blocks, kind), dequantize(packed))
    back = ggml.from_blocks(blocks, kind)
    assert back.kind == packed.kind and back.zero is None and back.group == 32
    assert torch.equal(back.codes, packed.codes) and torch.equal(back.scale, packed.scale)
    assert ggml.moves(packed, kind) and not ggml.moves(packed, TYPES["Q6_K"])
    for other in (
        integers.quantize(x, bits, 32, zero_points=True),
        integers.quantize(normal(16, 64), bits, 64),
    ):
        assert not ggml.moves(other, kind)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_any_bytes_move_there_and_back(name: str) -> None:
    kind = TYPES[name]
    bytes_ = torch.randint(0, 256, (3, 32, 5 * kind.nbytes), generator=torch.Generator().manual_seed(2))
    bytes_ = bytes_.to(torch.uint8)
    stack = ggml.from_blocks(bytes_, kind)
    assert stack.shape == (3, 32, 160)
    for packed, blocks in zip(stack.unbind(), bytes_, strict=True):
        assert torch.equal(ggml.to_blocks(packed), blocks)


@pytest.mark.llama
@pytest.mark.parametrize("name", BLOCKS)
def test_no_worse_than_llama_cpp(name: str) -> None:
    library = ctypes.CDLL(str(Path(llama.binary()).with_name("libggml-base.so")))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    kind, rows = TYPES[name], 256
    for x in (normal(rows, 1024), normal(rows, 1024) * normal(rows, 1024).exp().clamp(max=6)):
        theirs = torch.empty(rows, 1024 // kind.block * kind.nbytes, dtype=torch.uint8)
        assert quantize(kind.code, x.data_ptr(), theirs.data_ptr(), 0, rows, 1024, None) == theirs.nbytes
        ours = ggml.quantize(x, kind)
        assert error(x, by_library(ours, kind)) < 1.02 * error(x, by_library(theirs, kind))
