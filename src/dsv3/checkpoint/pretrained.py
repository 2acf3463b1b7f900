"""A model with weights: from a checkpoint folder, and back into one."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from dsv3.checkpoint.direct import DirectReader
from dsv3.checkpoint.hub import is_on_hub, resolve
from dsv3.checkpoint.mapped import MappedFiles, count
from dsv3.checkpoint.memory import check_bytes, check_memory, has_room, weight_bytes
from dsv3.checkpoint.names import Piece, table
from dsv3.checkpoint.progress import progress_bar
from dsv3.checkpoint.reader import (
    INDEX,
    QUANTIZATION,
    Checkpoint,
    Layout,
    float_dtype,
    open_checkpoint,
    read_config,
)
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
from dsv3.config import ModelConfig, read_json
from dsv3.errors import CheckpointError, size
from dsv3.kernels.fp8 import TILE
from dsv3.kernels.packed import ROWS, Kind, Packed, Weight, dequantize, empty
from dsv3.model import Transformer
from dsv3.model.layers import PackedLinear, put_packed
from dsv3.model.outline import outline
from dsv3.model.rope import Rope
from dsv3.model.stored import Store, put_stored

_PACKED = ("codes", "scale", "zero")
"""What a `PackedLinear` calls the tensors of its matrix."""


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
        packed: bool = False,
        experts: Store | None = None,
    ) -> Self:
        """Load a checkpoint: a folder, `nano`, or a hub id (`org/name`, `org/name@revision`).

        dtype: of the weights in memory (float32, bfloat16 or float16, or their names); by default as stored,
        and bfloat16 where they are packed (FP8, int8, int4); these are dequantised, or with `packed` stay as they are
        in layers that compute with them but are not trained or saved. The correction biases keep their stored dtype. mtp: whether
        to load the multi-token prediction modules, which plain generation does not need; without them the config
        counts none. experts: where the model gets its routed experts from, which are not loaded then, and the others are
        read without mapping a file into memory. On a CPU, weights that the files have as they are wanted are not read but
        mapped (`dsv3.checkpoint.mapped`), and can be written to like any others; all takes little more memory than the
        model itself. Raises CheckpointError before allocating anything if the folder is not whole, or the model larger
        than what is free; what the hub's small files say does not fit is not even downloaded.
        """
        wanted = None if dtype is None else float_dtype(dtype)
        if dtype is not None and wanted is None:
            raise CheckpointError(f"dtype is {dtype}: load weights as float32, bfloat16 or float16")
        device = torch.device(device)
        checkpoint = open_checkpoint(locate(path, wanted, device, packed, whole=experts is None))
        if not mtp:
            checkpoint = checkpoint.without_mtp()
        if experts is not None:
            checkpoint = checkpoint.without_experts()
        wanted = wanted or checkpoint.dtype
        with outline():
            model = cls(checkpoint.config.replace(quantization_config=None))
        if experts is not None:
            put_stored(model, experts)
        stays = layouts(checkpoint) if packed else {}
        if experts is not None:
            check_bytes(loaded_bytes(checkpoint, stays, wanted), device, "what stays in memory of the model")
        elif stays:
            check_bytes(loaded_bytes(checkpoint, stays, wanted), device, "the model, packed as it is,")
        else:
            check_memory(checkpoint.config, wanted, device)
        checkpoint.check_copies()
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        for parameter, (kind, group, zero) in stays.items():
            put_packed(model, parameter, empty(kind, shapes[parameter], group, zero, torch.device("meta")))
        like = _like(model, checkpoint, wanted)
        state = _load(like, checkpoint, device, progress, sparing=experts is not None)
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
        blocks of 128 x 128. max_shard_size: in bytes; a parameter that is larger is a file of its own.
        mtp_copies: whether the MTP modules repeat embedding and head, as released files do. The folder
        appears when it is complete; an existing checkpoint there is replaced, any other folder that is not
        empty is refused. Raises CheckpointError for that, and if weights are packed, or experts not in memory.
        """
        if format not in DTYPES:
            raise CheckpointError(f"format is {format!r}: dsv3 writes {', '.join(DTYPES)}")
        state = self.state_dict()
        pieces = [
            piece
            for piece in table(self.config).values()
            if piece.copy_of is None or (mtp_copies and ".layers." in piece.name)
        ]
        if absent := [piece.parameter for piece in pieces if piece.parameter not in state]:
            raise CheckpointError(
                f"{absent[0]} is packed, or stays on disk until it is needed: a model is saved if it was loaded without "
                "`packed` and `experts` (dsv3 convert copies packed weights as they are)"
            )
        infos = [info for piece in pieces for info in plan(piece, state[piece.parameter].dtype, format)]

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for piece in pieces:
                yield from encode(piece, piece.of(state[piece.parameter]).detach(), format)

        with staged(Path(path)) as folder:
            quantization = QUANTIZATION if format == "fp8" else None
            write_config(folder, self.config.to_dict(), DTYPES[format], quantization)
            write_weights(folder, infos, tensors(), max_shard_size)


def locate(
    path: str | Path,
    dtype: torch.dtype | None,
    device: torch.device,
    packed: bool = False,
    whole: bool = True,
) -> Path:
    """The folder of a model, as `resolve` has it; weights come from the hub only if they fit on this machine.

    What can be told from the small files is checked on them first: that dsv3 reads such a config, that the main
    model fits into the device's memory as `dtype` (None: as stored, which is half precision at least) or, with `packed`,
    as it is packed, if the `whole` of it shall be there, and that the disk has room for the weights. Raises
    CheckpointError or ConfigError.
    """
    if is_on_hub(path):
        folder = resolve(path, weights=False)
        config, total = read_config(folder), _total_size(folder)
        main = config.replace(num_nextn_predict_layers=0)
        if whole and packed and config.quantization_config is not None:
            if total is not None:
                # Files may have modules that need not be loaded, and what lies in FP8 may not stay so: this is the least.
                modules = weight_bytes(config, torch.bfloat16) - weight_bytes(main, torch.bfloat16)
                check_bytes(total - modules - _copies_bytes(config), device, "the model, packed as it is,")
        elif whole:
            check_memory(main, dtype or torch.bfloat16, device)
        if total is not None:
            _check_disk(folder, total)
    return resolve(path)


def has_room_for(folder: Path, dtype: torch.dtype, device: torch.device, packed: bool) -> bool:
    """Whether the device has the memory for a checkpoint with its MTP modules, loaded as `from_pretrained` does."""
    checkpoint = open_checkpoint(folder)
    stays = layouts(checkpoint) if packed else {}
    needed = loaded_bytes(checkpoint, stays, dtype) if stays else weight_bytes(checkpoint.config, dtype)
    return has_room(needed, device)


def _total_size(folder: Path) -> int | None:
    """Bytes of all weights, as a folder's index has it; None where there is none: all are in one file, or it says no size."""
    if not (folder / INDEX).is_file():
        return None
    metadata = read_json(folder / INDEX, CheckpointError).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return total if isinstance(total, int) else None


def _copies_bytes(config: ModelConfig) -> int:
    """Of embedding and head, that MTP modules of released files repeat."""
    return (
        2 * config.num_nextn_predict_layers * config.vocab_size * config.hidden_size * torch.bfloat16.itemsize
    )


def _check_disk(folder: Path, total: int) -> None:
    """Raise CheckpointError if what a folder from the hub still lacks of `total` bytes would not fit beside it."""
    here = sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.exists())
    free = shutil.disk_usage(folder).free
    if total - here > free:
        raise CheckpointError(
            f"the download takes {size(total - here)}, but {size(free)} are free where {folder} is: free some, or "
            "set HF_HOME to a folder on another disk"
        )


def layouts(checkpoint: Checkpoint) -> dict[str, Layout]:
    """Of the parameters all of whose tensors are packed alike, and can be stacked as they are: how.

    `kv_b_proj` is not among them, by which heads are multiplied from either side (`Piece.packs`)."""
    found: dict[str, Layout | None] = {}
    for name, piece in checkpoint.pieces.items():
        if piece.copy_of is not None:
            continue
        layout = _layout(checkpoint, name, piece)
        same = found.setdefault(piece.parameter, layout) == layout
        found[piece.parameter] = layout if same else None
    return {parameter: layout for parameter, layout in found.items() if layout is not None}


def _layout(checkpoint: Checkpoint, name: str, piece: Piece) -> Layout | None:
    layout = checkpoint.layout(name) if piece.packs else None
    if layout is not None and layout[0] == "fp8":  # halves of one matrix keep their own blocks
        rows, width = piece.shape
        unit = TILE if any(isinstance(i, slice) for i in piece.index) else ROWS
        return layout if rows % unit == 0 and width % ROWS == 0 else None
    return layout


def loaded_bytes(checkpoint: Checkpoint, stays: Mapping[str, Layout], dtype: torch.dtype) -> int:
    """Bytes of the weights in memory, those that `stays` names packed and the others as `dtype`."""
    return sum(
        checkpoint.stored_nbytes(name)
        if piece.parameter in stays
        else math.prod(piece.shape) * dtype.itemsize
        for name, piece in checkpoint.pieces.items()
        if piece.copy_of is None
    )


def _like(model: Transformer, checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the state of a model shall be, on the meta device; packed matrices have their dtypes already."""
    stored = {
        piece.parameter: checkpoint.tensors[name].dtype
        for name, piece in checkpoint.pieces.items()
        if piece.keeps_dtype
    }
    packed = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear)
        for part in _PACKED
    }
    return {
        name: tensor
        if name in packed
        else torch.empty(tensor.shape, dtype=stored.get(name, dtype), device="meta")
        for name, tensor in model.state_dict().items()
    }


@torch.no_grad()
def _load(
    like: Mapping[str, Tensor], checkpoint: Checkpoint, device: torch.device, progress: bool, sparing: bool
) -> dict[str, Tensor]:
    """A state as it shall be, by the shortest way there is.

    sparing: nothing is mapped, and nothing of the files left in the system's cache.
    """
    direct = device.type == "cpu" and not checkpoint.folder.is_file()
    mapped = _map(like, checkpoint) if direct and not sparing else {}
    state = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        for name, tensor in like.items()
        if name not in mapped
    }
    total = sum(map(checkpoint.stored_nbytes, checkpoint.pieces))
    with progress_bar(f"Loading {checkpoint.folder.name}", total, progress) as advance:
        if direct or sparing:
            _read(state, checkpoint, advance, forget=sparing)
        else:
            _stream(state, checkpoint, advance)
    return state | mapped


def _map(like: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Those that can stay in their files, the tensors of a packed matrix together or not at all."""
    dequantized = {checkpoint.pieces[name].parameter for name in checkpoint.kinds} & like.keys()
    parts: dict[str, dict[str, list[tuple[str, Tensor]]]] = {}
    for name, piece in checkpoint.pieces.items():
        if piece.copy_of is None and piece.parameter not in dequantized:
            target = _target(like, piece, checkpoint.kinds.get(name))
            tensors = target.tensors if isinstance(target, Packed) else [target]
            of = parts.setdefault(piece.parameter, {})
            for own, part, tensor in zip(_names(like, piece), checkpoint.parts(name), tensors, strict=True):
                of.setdefault(own, []).append((part, tensor))
    files = MappedFiles(checkpoint)
    mapped: dict[str, Tensor] = {}
    for of in parts.values():
        views = {own: view for own in of if (view := files.view(like[own], of[own])) is not None}
        if len(views) == len(of):
            mapped |= views
    count(mapped.values())
    return mapped


def _stream(state: Mapping[str, Tensor], checkpoint: Checkpoint, advance: Callable[[int], None]) -> None:
    """Fill a state, shard by shard: where weights go elsewhere than to main memory, or have to be put together."""
    for piece, stored in checkpoint.stream():
        advance(stored.nbytes)
        if piece.copy_of is not None:
            continue
        target = _target(state, piece, stored.kind if isinstance(stored, Packed) else None)
        if isinstance(target, Packed):
            assert isinstance(stored, Packed)
            for part, tensor in zip(target.tensors, stored.tensors, strict=True):
                part.copy_(tensor)
        elif isinstance(stored, Packed):
            target.copy_(dequantize(stored.to(target.device), target.dtype))
        else:
            target.copy_(stored)


def _read(
    state: Mapping[str, Tensor], checkpoint: Checkpoint, advance: Callable[[int], None], forget: bool
) -> None:
    """Fill a state straight from the files; what it lacks is mapped, or a copy."""
    order = [name for names in checkpoint.stream_order().values() for name in names]
    wanted = {n for n in order if (p := checkpoint.pieces[n]).copy_of is None and _names(state, p)}
    reader = DirectReader(checkpoint, wanted, forget)
    for name in order:
        if name in wanted:
            reader.read(name, _target(state, checkpoint.pieces[name], checkpoint.kinds.get(name)))
        advance(checkpoint.stored_nbytes(name))


def _names(state: Mapping[str, Tensor], piece: Piece) -> list[str]:
    """What of a state makes a piece's parameter: itself, or the tensors that it is packed into."""
    if piece.parameter in state:
        return [piece.parameter]
    stem = piece.parameter.removesuffix("weight").removesuffix(".")
    return [name for part in _PACKED if (name := f"{stem}.{part}") in state]


def _target(state: Mapping[str, Tensor], piece: Piece, kind: Kind | None) -> Weight:
    """The part of a parameter that a piece, of this kind in the checkpoint, is."""
    tensors = [state[name] for name in _names(state, piece)]
    if piece.parameter in state:
        return piece.of(tensors[0])
    assert kind is not None
    part = Packed(kind, *tensors)
    for index in piece.index:
        part = part[index] if isinstance(index, int) else part.rows(index.start, index.stop)
    return part
