"""A GGUF file as a checkpoint: what `dsv3.checkpoint.gguf` writes, and what llama.cpp's own tools do.

To whoever asks, the file is a `Checkpoint` like a folder: tensors have Hugging Face's names, and formats are those of ours.

- What is Q8_0 or Q4_0, and would be packed in a folder, is int8 or int4 in groups of 32. Its bytes are put into the order
  of panels as it is read, which loses nothing.
- Other matrices in blocks are bfloat16 once they are read: each is dequantised by itself as it comes by.
- `kv_b_proj` is put together from the two halves that GGUF keeps of it. Experts are slices of the stack that they lie in.

The file is mapped, never read whole. A large model in several files is opened by its first.

The config comes from the keys. What they do not tell is what llama.cpp takes for it, since files of older converters lack
some: softmax where no gating function is named, no limit to groups of experts where no groups are counted.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3.checkpoint.gguf import ARCHITECTURE, GATING, SAMPLING, Place, destinations
from dsv3.checkpoint.names import INTEGER_SCALE_SUFFIX, Piece, table
from dsv3.checkpoint.reader import Checkpoint, Stored
from dsv3.checkpoint.shards import TensorInfo
from dsv3.checkpoint.writer import write_json
from dsv3.config import ModelConfig
from dsv3.errors import CheckpointError
from dsv3.gguf import Entry, Header, read_header
from dsv3.kernels.packed import integer_shapes
from dsv3.quant import ggml
from dsv3.text.gguf import tokenizer_from_gguf

_LARGEST = 1 << 24
_COPIES = ("nextn.embed_tokens.weight", "nextn.shared_head_head.weight")
"""What an MTP module may repeat of the main model."""


def open_gguf(path: str | Path) -> GGUFCheckpoint:
    """Read a file's keys and list of tensors, and check that they make a whole model.

    Raises CheckpointError (or ConfigError, for what the keys say of its shape) with one line that names what is wrong.
    """
    header = read_header(Path(path))
    config = _config(header)
    pieces, sources, used = {}, {}, set()
    for name, piece in table(config).items():
        if piece.copy_of is None:
            pieces[name] = piece
            sources[name] = _find(header, piece, config)
            used |= {part.entry.name for part in sources[name]}
    left = [name for name in header.tensors if name not in used and not name.endswith(_COPIES)]
    if left:
        more = f" (and {len(left) - 1} others)" if len(left) > 1 else ""
        raise CheckpointError(f"{path}: unexpected tensor {left[0]}{more}: the keys describe another model")
    shards: dict[str, dict[str, TensorInfo]] = {}
    # In the order of their bytes, a stack's experts one after the other.
    for name, parts in sorted(sources.items(), key=lambda item: (item[1][0].entry.path, item[1][0].offset)):
        shards.setdefault(parts[0].entry.path.name, {}).update(_infos(pieces[name], parts))
    return GGUFCheckpoint(Path(path), config, pieces, shards, sources)


@dataclass(frozen=True)
class _Part:
    """Numbers of a file that make a tensor, or one half of it."""

    entry: Entry
    place: Place

    @property
    def shape(self) -> tuple[int, ...]:
        """Of these numbers: what the file has, or a matrix of its stack."""
        return self.place.one or tuple(self.place.shape)

    @property
    def nbytes(self) -> int:
        return self.entry.type.size(self.shape)

    @property
    def offset(self) -> int:
        """Where in the file they begin."""
        kind = self.entry.type
        return self.entry.offset + self.place.first // kind.block * kind.nbytes


@dataclass(frozen=True)
class GGUFCheckpoint(Checkpoint):
    """A GGUF file, `folder`, whose keys and tensors agree."""

    sources: Mapping[str, list[_Part]]
    """For each tensor where its numbers are."""

    @cached_property
    def _entries(self) -> list[Entry]:
        return list(
            {part.entry.name: part.entry for parts in self.sources.values() for part in parts}.values()
        )

    @property
    def count(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries)

    @property
    def format(self) -> str:
        """llama.cpp's names of the number formats, the one with most bytes first."""
        sizes: dict[str, int] = {}
        for entry in self._entries:
            sizes[entry.type.name] = sizes.get(entry.type.name, 0) + entry.nbytes
        return " + ".join(sorted(sizes, key=lambda name: -sizes[name]))

    def stream(self) -> Iterator[tuple[Piece, Stored]]:
        """Every tensor of the model, in the order of their bytes; those in 16 bits and more are views of the file."""
        for names in self.stream_order().values():
            for name in names:
                yield self.pieces[name], self.read(name)

    def read(self, name: str) -> Stored:
        """One tensor: packed, or in float32, float16 or bfloat16."""
        parts = self.sources[name]
        if name in self.kinds:
            (part,) = parts
            return ggml.from_blocks(self._bytes(part), part.entry.type)
        wanted = self.tensors[name].dtype
        if len(parts) == 1:
            return self._numbers(parts[0], wanted)
        keys, values = (self._numbers(part, wanted) for part in parts)
        return torch.cat((keys.transpose(1, 2), values), dim=1).flatten(0, 1)

    def get_tensor(self, name: str) -> Tensor:
        found = self.read(name)
        assert isinstance(found, Tensor), name
        return found

    def check_copies(self) -> None:
        """There are none: copies of embedding and head, which some files have, are passed over."""

    @cached_property
    def _maps(self) -> dict[Path, Any]:
        files = {entry.path for entry in self._entries}
        return {file: np.memmap(file, mode="r") for file in files}

    def _bytes(self, part: _Part) -> Tensor:
        """uint8 [..., bytes of a row]."""
        bytes_ = self._maps[part.entry.path][part.offset : part.offset + part.nbytes]
        with warnings.catch_warnings():  # torch says that it is read-only, and nobody writes to it
            warnings.simplefilter("ignore", UserWarning)
            run = torch.from_numpy(bytes_)
        return run.view(*part.shape[:-1], -1)

    def _numbers(self, part: _Part, dtype: torch.dtype) -> Tensor:
        return ggml.dequantize(self._bytes(part), part.entry.type, dtype)


def _find(header: Header, piece: Piece, config: ModelConfig) -> list[_Part]:
    """Where a tensor's numbers are. Raises CheckpointError if they are missing, or not of this shape."""
    places = destinations(piece, config)
    whole = Place(places[0].tensor.replace("attn_k_b", "attn_kv_b"), torch.Size(piece.shape))
    if len(places) > 1 and places[0].tensor not in header.tensors and whole.tensor in header.tensors:
        places = [whole]  # as old files have it
    found = []
    for place in places:
        entry = header.tensors.get(place.tensor)
        if entry is None:
            raise CheckpointError(f"{header.path}: tensor {place.tensor} is missing")
        if entry.shape != tuple(place.shape):
            raise CheckpointError(
                f"{entry.path}: {place.tensor} has shape {list(entry.shape)}, but the keys ask for {list(place.shape)}"
            )
        ggml.check_readable(entry.type, f"{entry.path}: {entry.name}")
        found.append(_Part(entry, place))
    return found


def _infos(piece: Piece, parts: list[_Part]) -> dict[str, TensorInfo]:
    """What a header of ours would say of it."""
    name, kinds = piece.name, {part.entry.type.name for part in parts}
    if piece.packs and ggml.can_pack(parts[0].entry.type, piece.shape):
        rows, width = piece.shape
        shapes = integer_shapes(rows, width, 4 if "Q4_0" in kinds else 8, ggml.GROUP)
        scale = name + INTEGER_SCALE_SUFFIX
        return {
            name: TensorInfo(name, torch.uint8, shapes.codes),
            scale: TensorInfo(scale, torch.float16, shapes.scale),
        }
    floats = {ggml.FLOATS.get(kind, torch.bfloat16) for kind in kinds}
    return {name: TensorInfo(name, floats.pop() if len(floats) == 1 else torch.float32, piece.shape)}


# Keys --------------------------------------------------------------------------------------------------


def config_from_gguf(path: str | Path) -> ModelConfig:
    """The shape of the model in a file."""
    return _config(read_header(Path(path)))


def generation_config_from_gguf(path: str | Path) -> dict[str, Any]:
    """What a `generation_config.json` beside the weights would hold."""
    header = read_header(Path(path))
    values: dict[str, Any] = {}
    for name in ("bos", "eos", "eot"):
        i = header.keys.get(f"tokenizer.ggml.{name}_token_id")
        if i is not None and name == "eot" and "eos_token_id" in values and i != values["eos_token_id"]:
            values["eos_token_id"] = [values["eos_token_id"], i]
        elif i is not None and name != "eot":
            values[f"{name}_token_id"] = i
    for ours, (theirs, kind) in SAMPLING.items():
        if f"general.sampling.{theirs}" in header.keys:
            values[ours] = _plain(header.get(f"general.sampling.{theirs}", kind))
    return values


def write_companions(path: Path, folder: Path) -> None:
    """Write what a folder of Hugging Face's has besides config and weights: tokenizer, template, generation config."""
    tokenizer = tokenizer_from_gguf(path)
    (folder / "tokenizer.json").write_text(tokenizer.backend.to_str(pretty=True), encoding="utf-8")
    values: dict[str, Any] = {**tokenizer.special_tokens, "add_bos_token": tokenizer.add_bos_token}
    if tokenizer.chat_template is not None:
        values["chat_template"] = tokenizer.chat_template
    write_json(folder / "tokenizer_config.json", values)
    if generation := generation_config_from_gguf(path):
        write_json(folder / "generation_config.json", generation)


def _config(header: Header) -> ModelConfig:
    architecture = header.get("general.architecture", str)
    if architecture != ARCHITECTURE:
        raise CheckpointError(
            f"{header.path} holds a model of the architecture {architecture!r}: dsv3 reads {ARCHITECTURE!r}, which "
            "DeepSeek-V2, V3, R1, Moonlight and Kimi-K2 are"
        )

    def key(name: str, kind: type, default: Any = None) -> Any:
        value = header.get(f"{ARCHITECTURE}.{name}", kind, default)
        if kind is int and value >= _LARGEST:
            raise CheckpointError(f"{header.path}: {ARCHITECTURE}.{name} is {value}: no model is so large")
        return value

    modules = key("nextn_predict_layers", int, 0)
    layers = key("block_count", int) - modules
    if not any(name.startswith(f"blk.{layers}.") for name in header.tensors):
        modules = 0  # counted, and left out
    rotary = key("rope.dimension_count", int)
    is_old = (
        f"{ARCHITECTURE}.attention.key_length_mla" not in header.keys
    )  # written before attention was absorbed
    suffix = "" if is_old else "_mla"
    experts = key("expert_count", int, 0)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{header.path}: tensor token_embd.weight is missing")
    if layers + modules > len(header.tensors):
        raise CheckpointError(
            f"{header.path}: {ARCHITECTURE}.block_count is {layers + modules}: it has fewer tensors"
        )
    for name, entry in header.tensors.items():
        if name.endswith("_exps.weight") and entry.shape[0] != experts:
            raise CheckpointError(
                f"{header.path}: {name} has shape {list(entry.shape)}, but {ARCHITECTURE}.expert_count is {experts}"
            )
    values: dict[str, Any] = {
        "model_type": "deepseek_v3",
        "vocab_size": embedding.shape[0],
        "hidden_size": key("embedding_length", int),
        "intermediate_size": key("feed_forward_length", int),
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": modules,
        "num_attention_heads": key("attention.head_count", int),
        "q_lora_rank": key("attention.q_lora_rank", int, 0) or None,
        "kv_lora_rank": key("attention.kv_lora_rank", int),
        "qk_nope_head_dim": key(f"attention.key_length{suffix}", int) - rotary,
        "qk_rope_head_dim": rotary,
        "v_head_dim": key(f"attention.value_length{suffix}", int),
        "n_routed_experts": experts or None,
        "max_position_embeddings": key("context_length", int),
        "rope_theta": _plain(key("rope.freq_base", float, 10000.0)),
        "rms_norm_eps": _plain(key("attention.layer_norm_rms_epsilon", float)),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "eos_token_id": header.keys.get("tokenizer.ggml.eos_token_id"),
        "bos_token_id": header.keys.get("tokenizer.ggml.bos_token_id"),
        "rope_scaling": _yarn(header),
    }
    if experts:
        values |= _expert_config(header, layers)
    return ModelConfig.from_dict(values)


def _expert_config(header: Header, layers: int) -> dict[str, Any]:
    def key(name: str, kind: type, default: Any = None) -> Any:
        return header.get(f"{ARCHITECTURE}.expert_{name}", kind, default)

    scoring = key("gating_func", int, 0) or GATING["softmax"]
    names = {number: name for name, number in GATING.items()}
    if scoring not in names:
        raise CheckpointError(f"{header.path}: expert_gating_func is {scoring}: dsv3 knows {GATING}")
    groups = key("group_count", int, 0)
    corrected = any(name.endswith(".exp_probs_b.bias") for name in header.tensors)
    dense = header.get(f"{ARCHITECTURE}.leading_dense_block_count", int, 0)
    return {
        "num_experts_per_tok": key("used_count", int),
        "n_shared_experts": key("shared_count", int, 0),
        "moe_intermediate_size": key("feed_forward_length", int),
        "first_k_dense_replace": dense,
        "routed_scaling_factor": _plain(key("weights_scale", float, 1.0)) or 1.0,
        "norm_topk_prob": key("weights_norm", bool, False),
        "scoring_func": names[scoring],
        "topk_method": "noaux_tc" if corrected else "group_limited_greedy" if groups > 1 else "greedy",
        "n_group": groups or 1,
        "topk_group": key("group_used_count", int, 1) if groups else 1,
    }


def _yarn(header: Header) -> dict[str, Any] | None:
    def key(name: str, kind: type, default: Any = None) -> Any:
        return header.get(f"{ARCHITECTURE}.rope.scaling.{name}", kind, default)

    kind = key("type", str, "none")
    if kind == "none":
        return None
    if kind != "yarn":
        raise CheckpointError(
            f"{header.path}: rope.scaling.type is {kind!r}: dsv3 supports 'yarn' and plain positions"
        )
    mscale = _plain(10 * key("yarn_log_multiplier", float, 0.0))  # the converter multiplies by 0.1
    return {
        "type": "yarn",
        "factor": _plain(key("factor", float)),
        "original_max_position_embeddings": key("original_context_length", int),
        "beta_fast": _plain(key("yarn_beta_fast", float, 32.0)),
        "beta_slow": _plain(key("yarn_beta_slow", float, 1.0)),
        "mscale": mscale or 1.0,
        "mscale_all_dim": mscale,
    }


def _plain(value: float) -> Any:
    """A number as a person would have written it: 32 bits of 1e-6 are 9.99999997e-7."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
