"""Kernels for CUDA devices, written in Triton (torch's CUDA builds bring it; without it nothing here is used).

A Triton kernel says what one *program* does with tiles of tensors; the compiler decides which thread holds what,
which instruction multiplies (on Hopper `wgmma`, for tiles of at least 64 rows) and when the next tile is fetched.
What is left to choose is the work of a program, hence each file's docstring says what bounds the operation, memory or
arithmetic, and how the work is cut for that.

- `matmul`: products with FP8 weights, of one matrix or of one per expert;
- `attention`: latent attention over a paged cache, split over the context;
- `routing`: from a gate's logits to experts and their weights.

Tile sizes are fixed by shape, not tuned at run time: no first call that measures for seconds, and nothing that chooses
differently from run to run. Functions here take tensors on any device that Triton runs on; with TRITON_INTERPRET=1,
set before triton is imported, that is a CPU, which is how the tests hold them to float64.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dsv3.kernels.packed import Weight

HALVES = (torch.bfloat16, torch.float16)


def usable(*tensors: Tensor) -> bool:
    """Whether these kernels can take the tensors: all on CUDA devices, and Triton is there."""
    return all(t.is_cuda for t in tensors) and _is_installed()


def usable_fp8(*tensors: Tensor) -> bool:
    """`usable`, and the devices know e4m3, as they do from compute capability 8.9 on."""
    return usable(*tensors) and all(torch.cuda.get_device_capability(t.device) >= (8, 9) for t in tensors)


def takes_fp8(x: Tensor, *weights: Weight) -> bool:
    """Whether `matmul` multiplies x, of 16 bits, by these weights: they are packed in FP8."""
    codes = [w.codes for w in weights if not isinstance(w, Tensor) and w.kind == "fp8"]
    return x.dtype in HALVES and len(codes) == len(weights) and usable_fp8(x, *codes)


@cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device: below as many programs, some of it idles. 8 for the interpreter, to exercise splits."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
