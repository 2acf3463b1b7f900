"""A checkpoint folder as Hugging Face has it, checked whole before a single weight is read.

`open_checkpoint` reads the config, the index and the headers of the shards: a few megabytes even for 671B.
From them follows everything that can be wrong with a folder short of flipped bits, so whatever is broken is
said in one line before memory is allocated or a byte is written. `stream` then gives weights shard by shard as they lie
on disk, only one of which is mapped at a time; `dsv3.checkpoint.pretrained` knows shorter ways into main memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from dsv3.checkpoint.names import (
    EMBEDDING,
    HEAD,
    INTEGER_SCALE_SUFFIX,
    SCALE_SUFFIX,
    ZERO_SUFFIX,
    Piece,
    mtp_prefix,
    table,
)
from dsv3.checkpoint.shards import TensorInfo, read_header
from dsv3.config import ModelConfig, read_json, read_optional_json
from dsv3.errors import CheckpointError
from dsv3.gguf import is_gguf
from dsv3.kernels.fp8 import TILE
from dsv3.kernels.packed import GROUPS, Kind, Packed, integer_shapes, packs
from dsv3.quant.fp8 import BLOCK, scale_shape

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FP8 = torch.float8_e4m3fn
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
QUANTIZATION: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
"""The `quantization_config` of released FP8 files."""
INTEGERS: dict[str, Any] = {"quant_method": "dsv3", "layout": "panels16"}
"""That of integer files (`dsv3.kernels.packed`); what each matrix is packed into follows from its dtype and shape."""
Stored = Tensor | Packed
"""A tensor of a checkpoint as it lies there."""
Layout = tuple[Kind, int, bool]
"""How a matrix is packed: kind, numbers to a group, and whether there are zero points."""


def float_dtype(name: str | torch.dtype) -> torch.dtype | None:
    """One of FLOATS by its name, as `float32`, `fp32` or torch has it; None if it is none of them."""
    return _NAMES.get(str(name).removeprefix("torch."))


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose config, index and headers agree."""

    folder: Path
    config: ModelConfig
    """As it will be loaded: without MTP modules if the folder has none of their tensors."""
    pieces: Mapping[str, Piece]
    """Every tensor that will be read, by name; FP8 scales are not among them."""
    shards: Mapping[str, Mapping[str, TensorInfo]]
    """For each file the tensors in it, in the order of their bytes."""

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors, FP8 scales included."""
        return {name: info for shard in self.shards.values() for name, info in shard.items()}

    @cached_property
    def shard_of(self) -> dict[str, str]:
        """The file that each tensor lies in."""
        return {name: file for file, shard in self.shards.items() for name in shard}

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def count(self) -> int:
        """Tensors in the files."""
        return len(self.tensors)

    @property
    def format(self) -> str:
        """The dtypes in the files, the one with most bytes first."""
        sizes: dict[str, int] = {}
        for info in self.tensors.values():
            name = _short(info.dtype)
            sizes[name] = sizes.get(name, 0) + info.nbytes
        return " + ".join(sorted(sizes, key=lambda name: -sizes[name]))

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """What is packed, by name, and into what."""
        found = {name: packed_kind(piece, self.tensors[name]) for name, piece in self.pieces.items()}
        return {name: kind for name, kind in found.items() if kind is not None}

    @property
    def quantized(self) -> bool:
        """Whether anything is packed."""
        return bool(self.kinds)

    @property
    def dtype(self) -> torch.dtype:
        """What to load the weights as if nothing else is asked for: bfloat16 where they are packed."""
        return torch.bfloat16 if self.quantized else self.tensors[EMBEDDING].dtype

    def without_mtp(self) -> Self:
        """The same folder, of which the multi-token prediction modules will not be read."""
        modules = range(self.config.num_nextn_predict_layers)
        prefixes = tuple(mtp_prefix(self.config, k) for k in modules)
        return replace(
            self,
            config=self.config.replace(num_nextn_predict_layers=0),
            pieces={n: p for n, p in self.pieces.items() if not n.startswith(prefixes)},
        )

    def without_experts(self) -> Self:
        """The same folder, of which the routed experts will not be read with the rest."""
        return replace(self, pieces={n: p for n, p in self.pieces.items() if ".mlp.experts." not in n})

    def stream(self) -> Iterator[tuple[Piece, Stored]]:
        """Every tensor of the model as stored, shard by shard.

        Tensors are views of the file. Keep none of them, or their whole shard stays mapped.
        """
        for file, names in self.stream_order().items():
            with safe_open(self.folder / file, framework="pt") as shard:

                def read(name: str, file: str = file, shard: Any = shard) -> Tensor:
                    tensor: Tensor = (shard if self.shard_of[name] == file else self).get_tensor(name)
                    return tensor

                for name in names:
                    yield self.pieces[name], self._stored(name, read)

    def _stored(self, name: str, read: Callable[[str], Tensor]) -> Stored:
        tensors = map(read, self.parts(name))
        return Packed(self.kinds[name], *tensors) if name in self.kinds else next(tensors)

    def parts(self, name: str) -> list[str]:
        """The names of what is stored of a tensor: itself, and if it is packed its scales, and zeros if there are any."""
        if name not in self.kinds:
            return [name]
        scale, zero = SCALE_SUFFIX if self.kinds[name] == "fp8" else INTEGER_SCALE_SUFFIX, name + ZERO_SUFFIX
        return [name, name + scale, *([zero] if zero in self.tensors else [])]

    def layout(self, name: str) -> Layout | None:
        """How a tensor is packed; None if it is not."""
        kind = self.kinds.get(name)
        if kind is None:
            return None
        _, scale, *zero = self.parts(name)
        group = TILE if kind == "fp8" else self.pieces[name].shape[1] // self.tensors[scale].shape[1]
        return kind, group, bool(zero)

    def stored_nbytes(self, name: str) -> int:
        """Bytes of a tensor with its scales and zeros."""
        return sum(self.tensors[part].nbytes for part in self.parts(name))

    def stream_order(self) -> dict[str, list[str]]:
        """For each file the names that `stream` yields from it."""
        return {file: [name for name in shard if name in self.pieces] for file, shard in self.shards.items()}

    def get_tensor(self, name: str) -> Tensor:
        """One tensor as stored."""
        with safe_open(self.folder / self.shard_of[name], framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(name)
        return tensor

    def check_copies(self) -> None:
        """Raise CheckpointError if a tensor that repeats another one differs from it.

        The model keeps one of them, so loading would lose the other. Reads both, a few megabytes at a time.
        """
        for name, piece in self.pieces.items():
            if piece.copy_of is None:
                continue
            same = self.tensors[name].shape == self.tensors[piece.copy_of].shape and all(
                torch.equal(one, other.to(one.dtype))
                for one, other in zip(
                    self._read_through(piece.copy_of), self._read_through(name), strict=True
                )
            )
            if not same:
                raise CheckpointError(
                    f"{self.folder}: {name} differs from {piece.copy_of}, but the model shares one "
                    "matrix between the two: save the checkpoint again with one in the place of both"
                )

    def _read_through(self, name: str, at_once: int = 1 << 22) -> Iterator[Tensor]:
        """The numbers of a tensor, so many after so many."""
        info = self.tensors[name]
        with (self.folder / self.shard_of[name]).open("rb") as file:
            for numbers in torch.empty(info.shape, dtype=info.dtype, device="meta").flatten().split(at_once):
                read = torch.empty_like(numbers, device="cpu")
                file.seek(info.offset + numbers.storage_offset() * info.dtype.itemsize)
                file.readinto(read.view(torch.uint8).numpy().data)
                yield read


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint's config, index and headers, and check that they make a whole model.

    path: a folder, or a GGUF file (`dsv3.checkpoint.gguf_reader`). Raises CheckpointError (or ConfigError, for what
    config.json says) with one line that names what is wrong.
    """
    folder = Path(path)
    if is_gguf(folder):
        from dsv3.checkpoint.gguf_reader import open_gguf

        return open_gguf(folder)
    config = read_config(folder)
    shards = _read_shards(folder)
    tensors = {name: info for shard in shards.values() for name, info in shard.items()}
    modules = range(config.num_nextn_predict_layers)
    if not any(name.startswith(mtp_prefix(config, k)) for k in modules for name in tensors):
        # transformers drops the MTP modules when it saves, and keeps their number in the config.
        config = config.replace(num_nextn_predict_layers=0)
    pieces = table(config)
    _check_names(folder, config, pieces, tensors)
    for name, info in tensors.items():
        if name in pieces:
            _check_tensor(folder, config, pieces[name], info, tensors)
    present = {name: piece for name, piece in pieces.items() if name in tensors}
    return Checkpoint(folder, config, present, shards)


def read_config(folder: Path) -> ModelConfig:
    """What a folder's config.json asks for. Raises like `open_checkpoint`, and needs no weights."""
    if is_gguf(folder):
        from dsv3.checkpoint.gguf_reader import config_from_gguf

        return config_from_gguf(folder)
    _check_folder(folder)
    config = ModelConfig.from_json(folder / CONFIG)
    if config.quantization_config is not None:
        _check_quantization(folder, config.quantization_config)
    return config


def generation_config(folder: Path) -> dict[str, Any]:
    """What a checkpoint's generation_config.json says, or the keys of a GGUF file; nothing, if it says none."""
    if is_gguf(folder):
        from dsv3.checkpoint.gguf_reader import generation_config_from_gguf

        return generation_config_from_gguf(folder)
    return read_optional_json(folder / "generation_config.json", CheckpointError)


def _check_folder(folder: Path) -> None:
    if folder.suffix in PICKLES and folder.is_file():
        raise CheckpointError(_pickle_message(folder.parent, folder.name))
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file: give the folder that holds config.json and the weights")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist: give a checkpoint's folder")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no config.json: a checkpoint holds it beside the weights")


def _pickle_message(folder: Path, name: str) -> str:
    return (
        f"{folder}: {name} is a pickle, which can run any code when it is opened, and is refused: "
        "convert it to safetensors first, for example with transformers' save_pretrained"
    )


def _check_quantization(folder: Path, stated: Mapping[str, Any]) -> None:
    """Refuse what would be read wrongly. Lists of names are not needed: dtypes say which tensors are FP8."""
    if stated.get("quant_method") == INTEGERS["quant_method"]:
        if dict(stated) != INTEGERS:
            raise CheckpointError(
                f"{folder}: unknown quantisation: quantization_config is {json.dumps(dict(stated))}, and this version of "
                f"dsv3 reads {json.dumps(INTEGERS)}"
            )
        return
    allowed: dict[str, tuple[Any, ...]] = {key: (value,) for key, value in QUANTIZATION.items()}
    allowed |= {
        "scale_fmt": (None, "float", "ue8m0"),  # ue8m0: the scales are powers of two, still stored as float32
        "dequantize": (False, None),
        "expert_dtype": ("fp8", None),
    }
    stated = {"fmt": "e4m3", "activation_scheme": "dynamic"} | dict(stated)
    for key in ("quant_method", *stated):
        if key in ("modules_to_not_convert", "modules_to_convert", "ignored_layers"):
            continue
        value = stated.get(key)
        if value not in allowed.get(key, ()):
            raise CheckpointError(
                f"{folder}: unknown quantisation: {key} is {value!r} in config.json's quantization_config; "
                f"dsv3 reads DeepSeek's FP8, {json.dumps(QUANTIZATION)}"
            )
    if "weight_block_size" not in stated:
        raise CheckpointError(f"{folder}: unknown quantisation: quantization_config has no weight_block_size")


def _read_shards(folder: Path) -> dict[str, dict[str, TensorInfo]]:
    if (folder / SINGLE).is_file():
        return {SINGLE: read_header(folder / SINGLE)}
    if not (folder / INDEX).is_file():
        raise CheckpointError(_no_weights_message(folder))
    weight_map = _read_index(folder / INDEX)
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: shard {missing[0]} is missing{_and_others(missing)}, though {INDEX} names it: "
            "download it"
        )
    shards = {file: read_header(folder / file) for file in files}
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise CheckpointError(f"{folder}: {INDEX} places {name} in {file}, which does not hold it")
    # The index decides: a tensor that it does not place in this file is a leftover.
    return {
        file: {name: info for name, info in shard.items() if weight_map.get(name) == file}
        for file, shard in shards.items()
    }


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path} is corrupt: it has no object 'weight_map': download it again")
    if not weight_map:
        raise CheckpointError(f"{path} is empty: its weight_map names no tensor: download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path} is corrupt: it places {name} in {file!r}, not in a file beside it")
        if Path(file).suffix in PICKLES:
            raise CheckpointError(_pickle_message(path.parent, file))
    return weight_map


def _no_weights_message(folder: Path) -> str:
    files = sorted(file.name for file in folder.iterdir())
    shards = [file for file in files if file.endswith(".safetensors")]
    pickles = [file for file in files if file.endswith(PICKLES)]
    if shards:
        return f"{folder} has {shards[0]} but no {INDEX}, which says what is in the shards: download it"
    if pickles:
        return _pickle_message(folder, pickles[0])
    return (
        f"{folder} has no weights: neither {SINGLE} nor {INDEX} (from the hub only safetensors are downloaded, "
        "never pickles)"
    )


def _check_names(
    folder: Path, config: ModelConfig, pieces: Mapping[str, Piece], tensors: Mapping[str, TensorInfo]
) -> None:
    missing = [name for name, piece in pieces.items() if name not in tensors and piece.copy_of is None]
    if missing:
        raise CheckpointError(f"{folder}: tensor {missing[0]} is missing{_and_others(missing)}")
    unexpected = [
        name
        for name in tensors
        if name not in pieces and _of_packed(name) not in pieces and not _is_ignored(name)
    ]
    if unexpected:
        advice = "config.json describes another model"
        if unexpected[0].startswith(mtp_prefix(config, config.num_nextn_predict_layers)):
            advice = "an MTP module that num_nextn_predict_layers in config.json does not count"
        raise CheckpointError(
            f"{folder}: unexpected tensor {unexpected[0]}{_and_others(unexpected)}: {advice}"
        )


def _of_packed(name: str) -> str:
    """What a tensor of scales or zeros belongs to."""
    for suffix in (SCALE_SUFFIX, INTEGER_SCALE_SUFFIX, ZERO_SUFFIX):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


def packed_kind(piece: Piece, info: TensorInfo) -> Kind | None:
    """What a tensor of the model is packed into; None if it is not."""
    if info.dtype == FP8:
        return "fp8"
    if info.dtype != torch.uint8 or len(piece.shape) != 2:
        return None
    return "int4" if info.shape == integer_shapes(*piece.shape, 4, GROUPS[0]).codes else "int8"


def _check_integers(folder: Path, piece: Piece, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise CheckpointError if a tensor of integer codes is not what its shape, scales and zeros say."""
    name, bits = info.name, 4 if packed_kind(piece, info) == "int4" else 8
    if (piece.copy_of or name) == EMBEDDING or not piece.packs:
        raise CheckpointError(
            f"{folder}: {name} is packed into integers, which dsv3 does to other matrices only"
        )
    scale, zero = tensors.get(name + INTEGER_SCALE_SUFFIX), tensors.get(name + ZERO_SUFFIX)
    if scale is None:
        raise CheckpointError(f"{folder}: {name} is packed, but its {name + INTEGER_SCALE_SUFFIX} is missing")
    out, width = piece.shape
    fitting = [integer_shapes(out, width, bits, g) for g in GROUPS if packs(out, width, g)]
    if scale.dtype != torch.float16 or (info.shape, scale.shape) not in fitting:
        raise CheckpointError(
            f"{folder}: {name} has shape {list(info.shape)} with scales {_short(scale.dtype)} {list(scale.shape)}: no way "
            f"of packing {list(piece.shape)} weights in groups of {', '.join(map(str, GROUPS))}"
        )
    if zero is not None and (zero.dtype, zero.shape) != (torch.uint8, scale.shape):
        raise CheckpointError(
            f"{folder}: {zero.name} is {_short(zero.dtype)} {list(zero.shape)}: one uint8 per scale"
        )


def _is_ignored(name: str) -> bool:
    """Old transformers saved the rotary frequencies, which follow from the config."""
    return name.endswith("rotary_emb.inv_freq")


def _check_tensor(
    folder: Path, config: ModelConfig, piece: Piece, info: TensorInfo, tensors: Mapping[str, TensorInfo]
) -> None:
    name = info.name
    scale = tensors.get(name + SCALE_SUFFIX)
    if info.dtype == torch.uint8 and (config.quantization_config or {}).get("quant_method") == "dsv3":
        _check_integers(folder, piece, info, tensors)
        return
    if info.shape != piece.shape:
        raise CheckpointError(
            f"{folder}: {name} has shape {list(info.shape)}, but config.json asks for {list(piece.shape)}"
        )
    if info.dtype != FP8:
        if info.dtype not in FLOATS:
            raise CheckpointError(
                f"{folder}: {name} has unsupported dtype {_short(info.dtype)}: dsv3 reads float32, bfloat16, "
                "float16, float8_e4m3fn with block scales, and what `dsv3 convert` packs"
            )
        if scale is not None:
            raise CheckpointError(f"{folder}: {scale.name} scales a tensor that is {_short(info.dtype)}")
        return
    if config.quantization_config is None:
        raise CheckpointError(f"{folder}: {name} is FP8, but config.json has no quantization_config")
    if len(info.shape) != 2 or (piece.copy_of or name) in (EMBEDDING, HEAD):
        raise CheckpointError(
            f"{folder}: {name} has unsupported dtype float8_e4m3fn: only matrices between embedding and head "
            "may be FP8"
        )
    if scale is None:
        raise CheckpointError(f"{folder}: {name} is FP8, but its scale {name + SCALE_SUFFIX} is missing")
    if scale.shape != scale_shape(*info.shape):
        raise CheckpointError(
            f"{folder}: {scale.name} has shape {list(scale.shape)}, but {list(info.shape)} weights have "
            f"{list(scale_shape(*info.shape))} blocks of {BLOCK} x {BLOCK}"
        )
    if scale.dtype not in FLOATS:
        raise CheckpointError(f"{folder}: {scale.name} has unsupported dtype {_short(scale.dtype)}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _and_others(names: list[str]) -> str:
    return f" (and {len(names) - 1} others)" if len(names) > 1 else ""
