"""A model with weights: from a checkpoint folder, and back into one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Self

import psutil
import torch
from torch import Tensor

from dsv3.checkpoint.hub import resolve
from dsv3.checkpoint.names import table
from dsv3.checkpoint.progress import progress_bar
from dsv3.checkpoint.reader import FLOATS, QUANTIZATION, Checkpoint, open_checkpoint
from dsv3.checkpoint.writer import (
    DTYPES,
    SHARD_SIZE,
    Format,
    encode,
    plan,
    staged,
    write_config,
    write_weights,
)
from dsv3.errors import CheckpointError, size
from dsv3.model import Transformer
from dsv3.model.rope import Rope
from dsv3.quant.fp8 import dequantize_blocks


class DeepseekV3(Transformer):
    """A `Transformer` that loads and saves itself."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        progress: bool = False,
        mtp: bool = True,
    ) -> Self:
        """Load a checkpoint: a folder, `nano`, or a hub id (`org/name`, `org/name@revision`).

        dtype: of the weights in memory (float32, bfloat16 or float16); by default as stored, and bfloat16
        for FP8, which is dequantised. The correction biases keep their stored dtype. mtp: whether to load the
        multi-token prediction modules, which plain generation does not need; without them the config counts
        none. Takes little more memory than the model itself. Raises CheckpointError before allocating
        anything if the folder is not whole, or the model larger than what is free.
        """
        checkpoint = open_checkpoint(resolve(path))
        if not mtp:
            checkpoint = checkpoint.without_mtp()
        dtype = dtype or checkpoint.dtype
        if dtype not in FLOATS:
            raise CheckpointError(f"dtype is {dtype}: load weights as float32, bfloat16 or float16")
        with torch.device("meta"):
            model = cls(checkpoint.config.replace(quantization_config=None))
        device = torch.device(device)
        check_memory(model, dtype, device)
        checkpoint.check_copies()
        state = _allocate(model, checkpoint, dtype, device)
        _fill(state, checkpoint, progress)
        model.load_state_dict(state, assign=True)
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        model.rope = Rope(model.config)  # its frequencies were computed on the meta device
        return model.eval()

    def save_pretrained(
        self,
        path: str | Path,
        format: Format = "bf16",
        max_shard_size: int = SHARD_SIZE,
        mtp_copies: bool = True,
    ) -> None:
        """Write a checkpoint folder that transformers, vLLM and SGLang read.

        format: `bf16`, `fp8` (128 x 128 blocks, as released) or `fp32`. max_shard_size is in bytes.
        mtp_copies: whether the MTP modules repeat embedding and head, as released files do. The folder
        appears when it is complete; an existing checkpoint there is replaced, any other folder that is not
        empty is refused.
        """
        if format not in DTYPES:
            raise CheckpointError(f"format is {format!r}: dsv3 writes {', '.join(DTYPES)}")
        state = self.state_dict()
        pieces = [
            piece
            for piece in table(self.config).values()
            if piece.copy_of is None or (mtp_copies and ".layers." in piece.name)
        ]
        infos = [info for piece in pieces for info in plan(piece, state[piece.parameter].dtype, format)]

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for piece in pieces:
                yield from encode(piece, piece.of(state[piece.parameter]).detach(), None, format)

        with staged(Path(path)) as folder:
            quantization = QUANTIZATION if format == "fp8" else None
            write_config(folder, self.config.to_dict(), DTYPES[format], quantization)
            write_weights(folder, infos, tensors(), max_shard_size)


def free_memory(device: torch.device) -> int | None:
    """Bytes that tensors on a device may still take; None where there is no telling."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    if device.type == "cuda":  # what torch holds but does not use is free too
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    return None


def check_memory(model: Transformer, dtype: torch.dtype, device: torch.device) -> None:
    """Raise CheckpointError if the device lacks the memory for a model of this shape and dtype.

    The alternatives are an allocation that fails halfway, or a kernel that ends the process.
    """
    free, numbers = free_memory(device), sum(parameter.numel() for parameter in model.parameters())
    needed = numbers * dtype.itemsize
    if free is None or needed <= free:
        return
    halved = numbers * torch.bfloat16.itemsize
    if halved < needed and halved <= free:
        advice = f"load it as bfloat16 ({size(halved)})"
    else:
        advice = "it takes a machine with more memory"
    name = str(dtype).removeprefix("torch.")
    raise CheckpointError(
        f"the model needs {size(needed)} as {name}, but {size(free)} are free on {device}: {advice}"
    )


def _allocate(
    model: Transformer, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Uninitialised memory for a model on the meta device."""
    stored = {
        piece.parameter: checkpoint.tensors[name].dtype
        for name, piece in checkpoint.pieces.items()
        if piece.keeps_dtype
    }
    return {
        name: torch.empty(tensor.shape, dtype=stored.get(name, dtype), device=device)
        for name, tensor in model.state_dict().items()
    }


@torch.no_grad()
def _fill(state: dict[str, Tensor], checkpoint: Checkpoint, progress: bool) -> None:
    total = sum(checkpoint.tensors[name].nbytes for name in checkpoint.pieces)
    with progress_bar(f"Loading {checkpoint.folder.name}", total, progress) as advance:
        for piece, tensor, scale in checkpoint.stream():
            advance(tensor.nbytes)
            if piece.copy_of is not None:
                continue
            target = piece.of(state[piece.parameter])
            if scale is None:
                target.copy_(tensor)
            else:
                device = target.device
                target.copy_(dequantize_blocks(tensor.to(device), scale.to(device), target.dtype))
