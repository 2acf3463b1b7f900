"""The header of a GGUF file: what it says of itself, and where its tensors lie.

The file that llama.cpp reads is plain, too: a magic word and three counts; keys, each a name, a type and a value (the
model's shape, and its whole tokenizer); for each tensor its name, sizes, number format and place; then the bytes. A large
model is spread over files, which count themselves in `split.no` and `split.count`, and of which the first has the keys.

Everything that can be wrong with such a file short of flipped bits is said here in one line. What the keys mean is told
by `dsv3.checkpoint.gguf`, `dsv3.checkpoint.gguf_reader` and `dsv3.text.gguf`.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from dsv3.errors import CheckpointError

MAGIC = b"GGUF"
ALIGNMENT = 32
_MOST = 1 << 24  # keys, tensors or characters of a name; far more than there ever are
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
Value = str | bool | int | float | list[str] | list[int]
"""Of a key that we write; whole numbers as 32 bits, those below zero with a sign."""
Quant = Literal[
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "q6_k",
    "q5_k_m",
    "q5_k_s",
    "q5_1",
    "q5_0",
    "q4_k_m",
    "q4_k_s",
    "q4_1",
    "q4_0",
    "q3_k_l",
    "q3_k_m",
    "q3_k_s",
    "q2_k",
]
"""Number formats, and mixes of them, as llama.cpp names them."""
FILE_TYPES: dict[Quant, int] = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q2_k": 10,
    "q3_k_s": 11,
    "q3_k_m": 12,
    "q3_k_l": 13,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
    "bf16": 32,
}
"""What `general.file_type` says."""


@dataclass(frozen=True)
class Type:
    """A number format of ggml, llama.cpp's library of tensors."""

    name: str
    code: int
    block: int
    """Neighbours in a row that are stored together."""
    nbytes: int
    """Of such a block."""

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor."""
        return math.prod(shape) // self.block * self.nbytes


TYPES = {
    name: Type(name, code, block, nbytes)
    for name, code, block, nbytes in (
        ("F32", 0, 1, 4),
        ("F16", 1, 1, 2),
        ("BF16", 30, 1, 2),
        ("Q4_0", 2, 32, 18),
        ("Q4_1", 3, 32, 20),
        ("Q5_0", 6, 32, 22),
        ("Q5_1", 7, 32, 24),
        ("Q8_0", 8, 32, 34),
        ("Q2_K", 10, 256, 84),
        ("Q3_K", 11, 256, 110),
        ("Q4_K", 12, 256, 144),
        ("Q5_K", 13, 256, 176),
        ("Q6_K", 14, 256, 210),
        ("IQ2_XXS", 16, 256, 66),
        ("IQ2_XS", 17, 256, 74),
        ("IQ3_XXS", 18, 256, 98),
        ("IQ1_S", 19, 256, 50),
        ("IQ4_NL", 20, 32, 18),
        ("IQ3_S", 21, 256, 110),
        ("IQ2_S", 22, 256, 82),
        ("IQ4_XS", 23, 256, 136),
        ("IQ1_M", 29, 256, 56),
        ("TQ1_0", 34, 256, 54),
        ("TQ2_0", 35, 256, 66),
        ("MXFP4", 39, 32, 17),
    )
}
_TYPE_OF = {kind.code: kind for kind in TYPES.values()}


@dataclass(frozen=True)
class Entry:
    """A tensor of a GGUF file."""

    name: str
    type: Type
    shape: tuple[int, ...]
    """In torch's order of dimensions; the file has them the other way round."""
    path: Path
    """The file that it lies in, one of several perhaps."""
    offset: int
    """Where in that file its bytes begin."""

    @property
    def nbytes(self) -> int:
        return self.type.size(self.shape)


@dataclass(frozen=True)
class Header:
    """What a GGUF file, or several that make a model, says before the tensors' bytes."""

    path: Path
    """The first file."""
    keys: Mapping[str, Any]
    tensors: Mapping[str, Entry]
    """In the order of their bytes, file by file."""

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of a key that must be of this kind; CheckpointError if it is another, or missing without a default."""
        value = self.keys.get(key, default)
        if kind is float and type(value) is int:
            value = float(value)
        if value is None and default is None and key not in self.keys:
            raise CheckpointError(
                f"{self.path} lacks the key {key}: no file of llama.cpp's converter is without it"
            )
        if type(value) is not kind:
            raise CheckpointError(f"{self.path}: {key} is {_shown(value)}: it must be {kind.__name__}")
        return value


def is_gguf(path: Path) -> bool:
    """Whether this is a file that says that it is GGUF, by its name or its first bytes."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: Path) -> Header:
    """Raises CheckpointError if a file is missing, not GGUF, cut off or inconsistent."""
    try:
        state = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return _read_header(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=2)
def _read_header(
    path: Path, size: int, changed: int
) -> Header:  # the last two tell whether it is the same file still
    first = _read_file(path)
    count = first.keys.get("split.count", 1)
    if type(count) is not int or not 0 <= count < _MOST:
        raise CheckpointError(f"{path}: split.count is {_shown(count)}: it must count files")
    if count <= 1:
        return first
    match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None or int(match[3]) != count or int(match[2]) != 1:
        raise CheckpointError(
            f"{path} is one of {count} files: give the first, whose name ends in -00001-of-{count:05}.gguf"
        )
    tensors = dict(first.tensors)
    for number in range(2, count + 1):
        other = path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf")
        if not other.is_file():
            raise CheckpointError(f"{other} is missing, one of {count} files of the model: download it")
        tensors |= _read_file(other).tensors
    return Header(path, first.keys, tensors)


def _read_file(path: Path) -> Header:
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise CheckpointError(f"{path} is no GGUF file: it does not begin with the letters GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
                return _Parser(path, memory).header()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def write_header(
    path: Path, keys: Mapping[str, Value], tensors: Sequence[tuple[str, Type, tuple[int, ...]]]
) -> list[int]:
    """Begin a file with all that comes before the tensors' bytes, make room for these, and return where each begins.

    tensors: name, format and shape of each, in torch's order of dimensions. Raises CheckpointError for a number that is too
    large for its key.
    """
    parts = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(keys))]
    for name, value in keys.items():
        try:
            parts += [_text(name), _value(value)]
        except (struct.error, OverflowError):
            raise CheckpointError(f"{name} is {_shown(value)}: numbers of GGUF's keys have 32 bits") from None
    place = 0
    places = []
    for name, kind, shape in tensors:
        places.append(place)
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts += [_text(name), sizes, struct.pack("<IQ", kind.code, place)]
        place += -(-kind.size(shape) // ALIGNMENT) * ALIGNMENT
    header = b"".join(parts)
    first = -(-len(header) // ALIGNMENT) * ALIGNMENT
    with path.open("wb") as file:
        file.write(header)
        file.truncate(first + place)
    return [first + place for place in places]


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Value) -> bytes:
    if isinstance(value, list):
        if value and isinstance(value[0], str):
            return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(_text(str(v)) for v in value)
        return struct.pack(f"<IIQ{len(value)}i", _ARRAY, 5, len(value), *value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<Ii", 5, value) if value < 0 else struct.pack("<II", 4, value)
    return struct.pack("<If", 6, value)


class _Parser:
    """Goes through a header from front to back."""

    def __init__(self, path: Path, memory: mmap.mmap) -> None:
        self.path, self.memory, self.at = path, memory, len(MAGIC)

    def header(self) -> Header:
        try:
            return self._header()
        except struct.error:
            raise CheckpointError(
                f"{self.path} is cut off within its header, at {len(self.memory):,} bytes: get it again"
            ) from None
        except (UnicodeDecodeError, _Corrupt) as error:
            raise CheckpointError(f"{self.path} has a corrupt header ({error}): download it again") from None

    def _header(self) -> Header:
        version = self._scalar("I")
        if version not in (2, 3):
            raise CheckpointError(
                f"{self.path} has version {version} of GGUF, or another order of bytes: dsv3 reads 2 and 3, "
                "little-endian"
            )
        tensors, keys = self._count(), self._count()
        values: dict[str, Any] = {}
        for _ in range(keys):
            name = self._text()
            if name in values:
                raise _Corrupt(f"the key {name} is there twice")
            values[name] = self._value(self._scalar("I"))
        listed = [self._entry() for _ in range(tensors)]
        align = values.get("general.alignment", ALIGNMENT)
        if type(align) is not int or align < 8 or align & (align - 1):
            raise _Corrupt(f"general.alignment is {_shown(align)}")
        data = -(-self.at // align) * align
        entries: dict[str, Entry] = {}
        for name, kind, shape, offset in sorted(listed, key=lambda entry: entry[3]):
            if name in entries:
                raise _Corrupt(f"the tensor {name} is there twice")
            if offset % align:
                raise _Corrupt(f"{name} begins at {offset}, no multiple of {align}")
            entries[name] = Entry(name, kind, shape, self.path, data + offset)
        wanted = max((entry.offset + entry.nbytes for entry in entries.values()), default=0)
        if len(self.memory) < wanted:
            raise CheckpointError(
                f"{self.path} is cut off: it has {len(self.memory):,} of {wanted:,} bytes: download it again"
            )
        return Header(self.path, values, entries)

    def _entry(self) -> tuple[str, Type, tuple[int, ...], int]:
        name, dimensions = self._text(), self._scalar("I")
        if not 1 <= dimensions <= 4:
            raise _Corrupt(f"{name} has {dimensions} dimensions")
        shape = tuple(reversed([self._scalar("Q") for _ in range(dimensions)]))
        code, offset = self._scalar("I"), self._scalar("Q")
        if code not in _TYPE_OF:
            raise CheckpointError(
                f"{self.path}: {name} is in ggml's number format {code}, which dsv3 does not know: convert it with "
                "llama.cpp's tools to another"
            )
        kind = _TYPE_OF[code]
        if math.prod(shape) >= 1 << 62 or shape[-1] % kind.block:
            raise _Corrupt(f"{name} has shape {list(shape)} in {kind.name}")
        return name, kind, shape, offset

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self.memory, self.at)
        self.at += struct.calcsize(f"<{form}")
        return value

    def _count(self) -> int:
        count: int = self._scalar("Q")
        if count > _MOST:
            raise _Corrupt(f"it counts {count:,} of something")
        return count

    def _text(self) -> str:
        length = self._count()
        if self.at + length > len(self.memory):
            raise struct.error
        text = self.memory[self.at : self.at + length]
        self.at += length
        return text.decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._scalar(self._form(kind))
        of, count = self._scalar("I"), self._count()
        if of == _STRING:
            return [self._text() for _ in range(count)]
        form = f"<{count}{self._form(of)}"
        values = struct.unpack_from(form, self.memory, self.at)
        self.at += struct.calcsize(form)
        return list(values)

    def _form(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise _Corrupt(f"there is a value of the type {kind}")
        return _SCALARS[kind]


class _Corrupt(Exception):
    """A header that no writer makes."""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
