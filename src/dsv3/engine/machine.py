"""What this machine has, and what follows from it: the device, the number format, and how much cache fits."""

from __future__ import annotations

import torch

from dsv3.checkpoint.pretrained import free_memory
from dsv3.config import ModelConfig
from dsv3.engine.cache import token_bytes
from dsv3.errors import UserError

DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "fp32": torch.float32,
}

CACHE_SHARE = 0.5
"""The part of the free memory that the cache may take; the rest is for activations and everybody else."""


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
    """ "auto" is bfloat16 where the hardware multiplies it, which halves memory and time, else float32."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" or cpu_has_bf16() else torch.float32
    dtype = DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise UserError(f"dtype is {name!r}: it must be auto, {' or '.join(DTYPES)}")
    return dtype


def cpu_has_bf16() -> bool:
    """Whether this is an x86 with instructions that multiply bfloat16 (AVX512_BF16 or AMX)."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        known = capabilities()
        return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # where torch does not have that yet
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def fitting_tokens(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    """How many tokens of cache fit in the memory that is free now, the model being loaded already."""
    return int((free_memory(device) or 0) * CACHE_SHARE) // token_bytes(config, dtype)
