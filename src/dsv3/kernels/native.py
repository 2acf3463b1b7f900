"""The optional C++ half of the kernels: built at first use, and done without where it cannot be.

torch has no fused CPU kernel for several things that training does over and over, and where it has one
(attention) it is far from what the machine can do without AMX. `native.cpp` holds these few; here it is
compiled by the machine's own compiler, kept in the user's cache, and loaded through ctypes, which needs neither
Python's nor torch's headers, so that a build takes seconds. Each kernel that has a native way asks `library()`;
what comes back is None where there is no compiler, no AVX512-BF16, or DSV3_NATIVE=0, and then torch does the work.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-w"]


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
        assert x.dim() == 4 and x.stride(-1) == 1 and x.dtype == torch.bfloat16, (
            x.shape,
            x.stride(),
            x.dtype,
        )
        return cls(x.data_ptr(), *x.stride()[:3])


def usable(*tensors: Tensor) -> bool:
    """Whether the native kernels take these: bf16 on the CPU, in whole vectors of 16 numbers."""
    fit = all(t.is_cpu and t.dtype == torch.bfloat16 and t.shape[-1] % 16 == 0 for t in tensors)
    return fit and library() is not None


def trains(*tensors: Tensor) -> bool:
    """Whether to go through a native kernel with a backward pass. Without gradients torch's ways are as good."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and usable(*tensors)


def pointer(x: Tensor) -> ctypes.c_void_p:
    """Where a tensor's numbers begin, for a kernel that is told how far its rows lie apart."""
    return ctypes.c_void_p(x.data_ptr())


def call(name: str, *arguments: Tensor | View | ctypes.c_void_p | int | float | None) -> None:
    """Run the kernel of that name. Tensors must be contiguous: give others as a View or `pointer`."""
    native = library()
    assert native is not None
    getattr(native, name)(*map(_as_c, arguments))


def _as_c(x: Tensor | View | ctypes.c_void_p | int | float | None) -> object:
    if isinstance(x, Tensor):
        assert x.is_contiguous(), (x.shape, x.stride())
        return ctypes.c_void_p(x.data_ptr())
    if isinstance(x, float):
        return ctypes.c_float(x)
    return ctypes.c_int64(x) if isinstance(x, int) else x


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had."""
    supported = platform.machine() == "x86_64" and torch.cpu._is_avx512_bf16_supported()
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if not supported or compiler is None or os.environ.get("DSV3_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.SubprocessError):
        return None


def _build(compiler: str) -> Path:
    """Compile unless it was done before, for this source, these flags and this kind of processor."""
    cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    traits = [
        line for line in cpu.splitlines() if line.startswith(("vendor_id", "cpu family", "model", "flags"))
    ]
    what = "\n".join([_SOURCE.read_text(), compiler, *_FLAGS, *traits])
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    built = cache_home / "dsv3" / f"native-{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:  # appears whole, whoever else builds it
            partial = Path(folder) / built.name
            subprocess.run(
                [compiler, *_FLAGS, str(_SOURCE), "-o", str(partial)], check=True, capture_output=True
            )
            os.replace(partial, built)
    return built
