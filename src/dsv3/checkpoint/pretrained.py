"""A model with weights: from a checkpoint folder, and back into one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from dsv3.checkpoint.hub import is_on_hub, resolve
from dsv3.checkpoint.memory import check_memory
from dsv3.checkpoint.names import table
from dsv3.checkpoint.progress import progress_bar
from dsv3.checkpoint.reader import INDEX, QUANTIZATION, Checkpoint, float_dtype, open_checkpoint, read_config
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
from dsv3.config import read_json
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
        dtype: str | torch.dtype | None = None,
        device: str | torch.device = "cpu",
        progress: bool = False,
        mtp: bool = True,
    ) -> Self:
        """Load a checkpoint: a folder, `nano`, or a hub id (`org/name`, `org/name@revision`).

        dtype: of the weights in memory (float32, bfloat16 or float16, or their names); by default as stored,
        and bfloat16 for FP8, which is dequantised. The correction biases keep their stored dtype. mtp: whether
        to load the multi-token prediction modules, which plain generation does not need; without them the config
        counts none. Takes little more memory than the model itself. Raises CheckpointError before allocating
        anything if the folder is not whole, or the model larger than what is free; weights that do not fit
        are not even downloaded.
        """
        wanted = None if dtype is None else float_dtype(dtype)
        if dtype is not None and wanted is None:
            raise CheckpointError(f"dtype is {dtype}: load weights as float32, bfloat16 or float16")
        device = torch.device(device)
        checkpoint = open_checkpoint(locate(path, wanted, device))
        if not mtp:
            checkpoint = checkpoint.without_mtp()
        wanted = wanted or checkpoint.dtype
        check_memory(checkpoint.config, wanted, device)
        with torch.device("meta"):
            model = cls(checkpoint.config.replace(quantization_config=None))
        checkpoint.check_copies()
        state = _allocate(model, checkpoint, wanted, device)
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
        """Write a checkpoint folder.

        format: `bf16` and `fp32` folders are read by transformers (tested); `fp8` is DeepSeek's released layout,
        blocks of 128 x 128. max_shard_size is in bytes.
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


def locate(path: str | Path, dtype: torch.dtype | None, device: torch.device) -> Path:
    """The folder of a model, as `resolve` has it; weights come from the hub only if they fit on this machine.

    What can be told from the small files is checked on them first: that dsv3 reads such a config, that the main
    model fits into the device's memory as `dtype` (None: as stored, which is half precision at least), and that
    the disk has room for the weights. Raises CheckpointError or ConfigError.
    """
    if is_on_hub(path):
        folder = resolve(path, weights=False)
        main = read_config(folder).replace(num_nextn_predict_layers=0)
        check_memory(main, dtype or torch.bfloat16, device)
        _check_disk(folder)
    return resolve(path)


def _check_disk(folder: Path) -> None:
    """Raise CheckpointError if the weights that a folder from the hub still lacks would not fit beside it."""
    if not (folder / INDEX).is_file():
        return  # all weights in one file, and no other tells its size
    metadata = read_json(folder / INDEX, CheckpointError).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if not isinstance(total, int):
        return
    here = sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.exists())
    free = shutil.disk_usage(folder).free
    if total - here > free:
        raise CheckpointError(
            f"the download takes {size(total - here)}, but {size(free)} are free where {folder} is: free some, or "
            "set HF_HOME to a folder on another disk"
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
