"""What fits: the memory that a device has free, and what a model takes of it.

Two things take memory, and both follow from the config: the weights, and the latent cache, which grows with
every token. Loading and the engine decide with the functions here, and `dsv3 inspect` foretells with the same.
"""

from __future__ import annotations

import psutil
import torch

from dsv3.checkpoint.mapped import mapped_bytes
from dsv3.config import ModelConfig
from dsv3.errors import CheckpointError, size
from dsv3.kernels.inference import BLOCK
from dsv3.model import Transformer
from dsv3.model.outline import outline

CACHE_SHARE = 0.5
"""The part of the free memory that the cache may take; the rest is for activations and everybody else."""


def free_memory(device: torch.device) -> int | None:
    """Bytes that tensors on a device may still take; None where there is no telling.

    Weights in mapped files are not free, though the system calls them available: a model that is not in memory is slow.
    """
    if device.type == "cpu":
        return max(psutil.virtual_memory().available - mapped_bytes(), 0)
    if device.type == "cuda":  # what torch holds but does not use is free too
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    return None


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of a model's weights in memory: the parameters as `dtype`, the correction biases as float32."""
    with outline():
        model = Transformer(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters * dtype.itemsize + sum(buffer.numel() for buffer in model.buffers()) * 4


def token_bytes(config: ModelConfig, dtype: torch.dtype, mtp: bool = False) -> int:
    """Bytes that one token takes in the latent cache of all layers, `mtp`: and of the first MTP module's."""
    return (config.num_hidden_layers + mtp) * config.latent_dim * dtype.itemsize


def cache_tokens(config: ModelConfig, dtype: torch.dtype, free: int, mtp: bool = False) -> int:
    """How many tokens of cache, in whole blocks, the engine makes room for where so many bytes are free beside the weights."""
    return int(free * CACHE_SHARE) // token_bytes(config, dtype, mtp) // BLOCK * BLOCK


def has_room(nbytes: int, device: torch.device) -> bool:
    """Whether the device has so much free memory, as far as it tells."""
    free = free_memory(device)
    return free is None or nbytes <= free


def check_memory(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Raise CheckpointError if the device lacks the memory for a model of this shape and dtype.

    The alternatives are an allocation that fails halfway, or a kernel that ends the process.
    """
    needed = weight_bytes(config, dtype)
    if has_room(needed, device):
        return
    free = free_memory(device) or 0
    halved = weight_bytes(config, torch.bfloat16)
    if halved < needed and halved <= free:
        advice = f"load it as bfloat16 ({size(halved)})"
    else:
        advice = "it takes a machine with more memory"
    name = str(dtype).removeprefix("torch.")
    raise CheckpointError(
        f"the model needs {size(needed)} as {name}, but {size(free)} are free on {device}: {advice}"
    )


def check_bytes(needed: int, device: torch.device, what: str) -> None:
    """Raise CheckpointError if the device lacks the memory for so many bytes of weights; it calls them `what`."""
    if not has_room(needed, device):
        raise CheckpointError(
            f"{what} needs {size(needed)}, but {size(free_memory(device) or 0)} are free on {device}: convert it to fewer "
            "bits (dsv3 convert), or it takes a machine with more memory"
        )
