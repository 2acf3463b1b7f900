"""What this machine has, and what follows from it: the device, the number format, and how much cache fits."""

from __future__ import annotations

import torch
from torch import nn

from dsv3.checkpoint.memory import cache_tokens, free_memory
from dsv3.checkpoint.reader import float_dtype
from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.kernels.native import library

SMALL = 64_000_000
"""Bytes of weights up to which one thread is enough: they stay in cache. nano has 27 million."""


def choose_device(name: str | torch.device) -> torch.device:
    """ "auto" is the GPU where there is one. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device is {name!r}: it must be auto, cpu, cuda, or one GPU such as cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device is {name!r}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs"
        )
    return device


def choose_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the hardware or our own kernels multiply it, which halves memory and time, else float32."""
    if name == "auto":
        fast = device.type == "cuda" or cpu_has_bf16() or library() is not None
        return torch.bfloat16 if fast else torch.float32
    dtype = float_dtype(name)
    if dtype not in (torch.bfloat16, torch.float32):
        raise UserError(f"dtype is {name!r}: it must be auto, bfloat16 (bf16) or float32 (fp32)")
    return dtype


def computes_packed(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are kernels that multiply by packed weights as they are; elsewhere these are dequantised when loaded."""
    return device.type == "cpu" and dtype == torch.bfloat16 and library() is not None


def suggested_threads(model: nn.Module) -> int:
    """How many threads should decode with a model on the CPU: one for a small model, else torch's own number.

    A step of a small model is over before a second thread has woken, and where another program keeps a core busy,
    two threads that wait for each other are up to a hundred times slower than one.
    """
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return 1 if size <= SMALL else torch.get_num_threads()


def cpu_has_bf16() -> bool:
    """Whether this is an x86 with instructions that multiply bfloat16 (AVX512_BF16 or AMX)."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        known = capabilities()
        return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # where torch does not have that yet
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def fitting_tokens(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, mtp: bool = False
) -> int | None:
    """How many tokens of cache fit in the memory that is free now, the model being loaded already.

    mtp: with the layer of the first MTP module. None where the device does not tell.
    """
    free = free_memory(device)
    return None if free is None else cache_tokens(config, dtype, free, mtp)
