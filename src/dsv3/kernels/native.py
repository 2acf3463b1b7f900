"""The optional C++ half of the kernels: built at first use, and done without where it cannot be.

torch has no fused CPU kernel for several things that training does over and over, and where it has one
(attention) it is far from what the machine can do without AMX. `native.cpp` holds these few, and `inference.cpp` what
a model needs that answers: whole layers over a cache, for few tokens at a time. Here they are compiled by the
machine's own compiler, kept in the user's cache, and loaded through ctypes, which needs neither
Python's nor torch's headers, so that a build takes seconds. Each kernel that has a native way asks `library()`;
what comes back is None where there is no compiler, no AVX2, or DSV3_NATIVE=0, and then torch does the work. Best is a
processor that multiplies bf16 and bytes (AVX512-BF16, VNNI); for others the same sources take more instructions, about
twice the time where time is not that of reading memory. DSV3_NATIVE=avx2, or avx512, builds them as for an older one.
CXX may name another compiler than g++, in front of it whatever it needs ("ccache g++").
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_SOURCES = [
    Path(__file__).with_name(f"{name}.cpp") for name in ("native", "inference", "sampling", "ceilings")
]
_HEADERS = [Path(__file__).with_name(name) for name in ("older.h", "vectors.h", "products.h")]
_FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-Wall", "-Wextra"]
_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # which gcc says of its own intrinsics
_FLAGS += ["-ffp-contract=off"]  # or the same function would round differently in different places
# Older kinds of processor that DSV3_NATIVE may ask for.
_TARGETS = {"avx2": "x86-64-v3", "avx512": "x86-64-v4"}

# What each kernel takes, a letter an argument: a contiguous tensor of bf16 (b), float32 (f), float64 (d), int64 (l) or int32 (i), a
# bf16 `pointer` (p), a View (v), a reference to another structure or an array of pointers (r), a whole number (n), a
# fraction (x).
_SIGNATURES = {
    "attention_forward": "vvvvf" + "nnnnnx",
    "attention_backward": "vvvvf" + "vvvv" + "nnnnnx",
    "rope_forward": "bbnpnffnbb" + "nnnnn",
    "rope_backward": "bbffnbnb" + "nnnnn",
    "cross_entropy": "blfnnx",
    "swiglu_forward": "bbnn",
    "swiglu_backward": "bbbnn",
    "rms_norm_forward": "pnbbfnnx",
    "rms_norm_backward": "bpnbfbfnnn",
    "combine_forward": "blfbnnn",
    "combine_backward": "bblfbfnnn",
    "adamw": "fbbfnxxxxxx",
    "paged_attention": "bbiilb" + "nnnnnx",
    "plain_attention": "bbpnb" + "nnnnnnx",
    "linear": "pnrbbn",
    "feed_forward": "rbn",
    "route": "rbnif",
    "feed_forward_wave": "rbniffnn",
    "attention_half": "rrbb",
    "blocks_forward": "rrnrb",
    "draw": "ffldfdlnn",
    "read_all": "lnl",
    "multiply_bf16": "nd",
    "multiply_int8": "nd",
}
_DTYPES = {"b": torch.bfloat16, "f": torch.float32, "d": torch.float64, "l": torch.int64, "i": torch.int32}


class View(ctypes.Structure):
    """A bf16 tensor [batch, heads, seq, dim] whose last dimension is contiguous, as native.cpp sees it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("seq", ctypes.c_int64),
    )

    @classmethod
    def of(cls, x: Tensor) -> View:
        if x.dim() != 4 or x.stride(-1) != 1 or x.dtype != torch.bfloat16:
            raise TypeError(f"no bf16 heads: {x.dtype} {tuple(x.shape)} with strides {x.stride()}")
        return cls(x.data_ptr(), *x.stride()[:3])


Argument = (
    Tensor | View | ctypes.Structure | ctypes.Array[ctypes.c_void_p] | ctypes.c_void_p | int | float | None
)


def usable(*tensors: Tensor) -> bool:
    """Whether the native kernels take these: bf16 on the CPU, in whole vectors of 16 numbers."""
    fit = all(t.is_cpu and t.dtype == torch.bfloat16 and t.shape[-1] % 16 == 0 for t in tensors)
    return fit and library() is not None


def trains(*tensors: Tensor) -> bool:
    """Whether to go through a native kernel with a backward pass. Without gradients torch's ways are as good."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and usable(*tensors)


def pointer(x: Tensor) -> ctypes.c_void_p:
    """Where a bf16 tensor's numbers begin, for a kernel that is told how far its rows lie apart."""
    if x.dtype != torch.bfloat16 or x.stride(-1) != 1:
        raise TypeError(f"no bf16 rows: {x.dtype} with strides {x.stride()}")
    return ctypes.c_void_p(x.data_ptr())


def call(name: str, *arguments: Argument) -> None:
    """Run the kernel of that name. Tensors must be contiguous: give others as a View or `pointer`.

    Types are held against the kernel's signature; that the sizes are those of the tensors is up to the caller.
    """
    native = library()
    assert native is not None
    kinds = _SIGNATURES[name]
    getattr(native, name)(*(_as_c(x, kind) for x, kind in zip(arguments, kinds, strict=True)))


def _as_c(x: Argument, kind: str) -> object:
    if not isinstance(x, Tensor):
        return ctypes.byref(x) if kind == "r" and isinstance(x, ctypes.Structure) else x
    if x.dtype != _DTYPES.get(kind) or not x.is_contiguous():
        raise TypeError(
            f"{x.dtype} {tuple(x.shape)} with strides {x.stride()} for an argument of kind {kind!r}"
        )
    return x.data_ptr()


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def _target() -> str | None:
    """What to compile for; None where the kernels are of no use."""
    choice = os.environ.get("DSV3_NATIVE", "")
    needs = torch.cpu._is_avx512_supported if choice == "avx512" else torch.cpu._is_avx2_supported
    here = platform.system() == "Linux" and platform.machine() == "x86_64" and needs()
    return _TARGETS.get(choice, "native") if here and choice != "0" else None


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had; a build that fails is told, once."""
    compiler = _compiler()
    target = _target()
    if target is None or not shutil.which(compiler[0]):
        return None
    try:
        return _load([*compiler, f"-march={target}"])
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        warnings.warn(
            f"no native kernels, which makes training and inference slower (DSV3_NATIVE=0): {reason}",
            stacklevel=2,
        )
        return None


def instructions() -> str | None:
    """What the native kernels here are compiled to multiply with; None where there are none."""
    if library() is None:
        return None
    flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    target = _target()
    if target != "native":
        return f"compiled for {target}"
    if "avx512f" not in flags:
        return "AVX2"
    return "AVX-512" + "".join(
        f" {name}" for name, flag in (("BF16", "avx512_bf16"), ("VNNI", "avx512_vnni")) if flag in flags
    )


def missing() -> str:
    """Why there are no native kernels here."""
    if os.environ.get("DSV3_NATIVE") == "0":
        return "DSV3_NATIVE is 0"
    if _target() is None:
        return "they are for Linux on x86 processors with AVX2"
    compiler = _compiler()
    if not shutil.which(compiler[0]):
        return f"there is no C++ compiler {compiler[0]}: install it, or name another in CXX"
    return f"{compiler[0]} could not compile them"


def _load(compiler: list[str]) -> ctypes.CDLL:
    """Out of the cache what was built for this source, these flags and this kind of processor; else build it.

    What is loaded may do whatever the user may, so only a file that nobody else could have written counts. One that
    cannot be loaded is replaced.
    """
    cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    traits = [
        line for line in cpu.splitlines() if line.startswith(("vendor_id", "cpu family", "model", "flags"))
    ]
    what = "\n".join([*(file.read_text() for file in (*_SOURCES, *_HEADERS)), *compiler, *_FLAGS, *traits])
    name = f"native-{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    folder = _cache_folder()
    if folder is not None and _only_ours(folder / name):
        try:
            return _open(folder / name)
        except OSError:
            pass  # cut off, or of another system
    if sys.stderr.isatty():
        print("Compiling kernels for this processor, once: some ten seconds", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        built = Path(temporary) / name
        command = [*compiler, *_FLAGS, *map(str, _SOURCES), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        built.chmod(0o700)
        if folder is not None:  # appears whole, whoever else builds it and whenever the power fails
            with built.open("rb") as file:
                os.fsync(file.fileno())
            built = built.replace(folder / name)
        return _open(built)


def _open(path: Path) -> ctypes.CDLL:
    types = {"v": View, "n": ctypes.c_int64, "x": ctypes.c_float}
    native = ctypes.CDLL(str(path))
    for name, kinds in _SIGNATURES.items():
        function = getattr(native, name)
        function.argtypes, function.restype = [types.get(kind, ctypes.c_void_p) for kind in kinds], None
    return native


def _cache_folder() -> Path | None:
    """Where built kernels are kept, or None where there is no such place that is the user's alone."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # not writable; no home
        return None
    return folder if _only_ours(folder) and os.access(folder, os.W_OK) else None


def _only_ours(path: Path) -> bool:
    """Whether it is there, belongs to this user, and others may not write to it."""
    try:
        status = path.stat()
    except OSError:
        return False
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022
