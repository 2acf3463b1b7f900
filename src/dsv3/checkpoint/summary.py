"""What a model is made of, what it weighs, and whether this machine can hold it.

All of it follows from the list of tensors that a checkpoint of a config has (`names.table`), so nothing here
can drift from the architecture, and nothing needs weights: V3's 671 billion parameters are counted in a
second.

Of a mixture of experts one token uses a small part only, its *active* parameters: everything but the routed
experts that it did not choose. Embedding and head are counted whole, 0.9B each in V3, where all comes to
37.6B; DeepSeek says 37B. A multi-token prediction module shares embedding and head with the main model, but
released files repeat both for each module: hence three totals (main model, with MTP, as the files count).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil
import torch

from dsv3.checkpoint.hub import NANO, expand, resolve
from dsv3.checkpoint.memory import cache_tokens, free_memory, token_bytes
from dsv3.checkpoint.names import HEAD, Piece, table
from dsv3.checkpoint.reader import CONFIG, INDEX, Checkpoint, open_checkpoint
from dsv3.checkpoint.writer import DTYPES, Packing, Target, plan
from dsv3.config import PRESETS, ModelConfig
from dsv3.errors import CheckpointError

# The first pattern that a name matches says what part it is.
_PARTS = {
    "embedding": r"^model\.embed_tokens\.",
    "norms": r"norm\.weight$",
    "attention": r"\.self_attn\.",
    "dense feed-forward": r"\.mlp\.(gate|up|down)_proj\.",
    "routed experts": r"\.mlp\.experts\.",
    "shared experts": r"\.mlp\.shared_experts\.",
    "router": r"\.mlp\.gate\.",
    "head": r"^lm_head\.",
}
MTP = "multi-token prediction"


@dataclass(frozen=True)
class Part:
    """A kind of parameters and how many there are."""

    name: str
    total: int
    active: int
    """Of them, those that one token uses."""


@dataclass(frozen=True)
class Weights:
    """What the weights take in one number format, in bytes."""

    format: str
    memory: int
    """Of the main model, which is all that generating needs."""
    disk: int
    """Of files, with MTP modules and, but for integers, their copies of embedding and head."""

    @property
    def packed(self) -> bool:
        """Whether it takes kernels of our own to compute with weights in this format."""
        return self.format not in DTYPES or self.format == "fp8"


@dataclass(frozen=True)
class Pool:
    """One kind of memory of this machine, in bytes."""

    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Files:
    """What lies in a checkpoint's folder."""

    folder: Path
    format: str
    """The dtypes of its tensors, the one with most bytes first."""
    tensors: int
    shards: int
    nbytes: int


@dataclass(frozen=True)
class Summary:
    """A model's parameters and what they cost. Bytes are bytes; a GB, where it is shown, is 10^9 of them."""

    config: ModelConfig
    files: Files | None = None
    """None for a model without weights: a preset, or a config alone."""

    @cached_property
    def _kinds(self) -> list[tuple[str, Piece, int]]:
        """The tensors of a released checkpoint, alike ones together: their part, one of them, how many."""
        alike: dict[tuple[str, str], list[Piece]] = {}
        for piece in table(self.config).values():
            if piece.name == HEAD and piece.copy_of is not None:
                continue  # a head that is tied to the embedding is not in the files
            part = self._part(piece.name)
            alike.setdefault((part, re.sub(r"\d+", "#", piece.name)), []).append(piece)
        return [(part, pieces[0], len(pieces)) for (part, _), pieces in alike.items()]

    def _part(self, name: str) -> str:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is not None and int(layer[1]) >= self.config.num_hidden_layers:
            return MTP
        return next(part for part, pattern in _PARTS.items() if re.search(pattern, name))

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The kinds of parameters there are in the main model, and last the MTP modules if there are any."""
        total: dict[str, int] = dict.fromkeys([*_PARTS, MTP], 0)
        active = total.copy()
        for part, piece, count in self._kinds:
            if piece.copy_of is None:
                n = math.prod(piece.shape) * count
                total[part] += n
                active[part] += self._chosen(n) if ".mlp.experts." in piece.name else n
        return tuple(Part(name, total[name], active[name]) for name in total if total[name])

    def _chosen(self, routed: int) -> int:
        """Of so many parameters in routed experts, all equal, those that one token chooses."""
        return routed // (self.config.n_routed_experts or 1) * self.config.num_experts_per_tok

    @property
    def mtp(self) -> Part | None:
        """The multi-token prediction modules, if there are any."""
        return next((part for part in self.parts if part.name == MTP), None)

    @property
    def main(self) -> Part:
        """The main model: all parts but the MTP modules."""
        parts = [part for part in self.parts if part.name != MTP]
        return Part("main model", sum(p.total for p in parts), sum(p.active for p in parts))

    @property
    def with_mtp(self) -> int:
        """Parameters of main model and MTP modules, each once."""
        return sum(part.total for part in self.parts)

    @property
    def in_files(self) -> int:
        """Parameters as released files have them: with a copy of embedding and head in each MTP module."""
        return sum(math.prod(piece.shape) * count for _, piece, count in self._kinds)

    @cached_property
    def weights(self) -> tuple[Weights, ...]:
        """Memory and disk in each number format; integers in groups of 32 without zero points, as by default."""
        formats: dict[str, Target] = {"fp32": "fp32", "bf16": "bf16", "fp8": "fp8", "int8": Packing("int8")}
        formats |= {"mixed": Packing("mixed"), "int4": Packing("int4")}
        return tuple(Weights(name, self._in_memory(t), self._bytes(t)) for name, t in formats.items())

    def _in_memory(self, target: Target) -> int:
        """What generating loads: no MTP modules, and of FP8 what stays out of `Piece.packs` in bf16."""
        size = self._bytes(target, mtp=False)
        if target == "fp8":
            for part, piece, count in self._kinds:
                if part != MTP and piece.in_fp8 and not piece.packs:
                    size += (_stored(piece, "bf16") - _stored(piece, "fp8")) * count
        return size

    def _bytes(self, target: Target, mtp: bool = True) -> int:
        copies = not isinstance(target, Packing)
        return sum(
            _stored(piece, target) * n
            for part, piece, n in self._kinds
            if (mtp or part != MTP) and (copies or piece.copy_of is None)
        )

    def cache_per_token(self) -> int:
        """Bytes that the latent cache takes for one token, in bf16."""
        return token_bytes(self.config, torch.bfloat16)

    def context_in(self, pool: Pool, weights: Weights) -> int | None:
        """Tokens of context that the engine offers beside the weights; None: not even they fit."""
        room = pool.free - weights.memory
        if room < 0:
            return None
        tokens = cache_tokens(self.config, DTYPES.get(weights.format, torch.bfloat16), room)
        return min(tokens, self.config.max_position_embeddings)


def _stored(piece: Piece, target: Target) -> int:
    """Bytes of one tensor, its scales included, as released files have it: correction biases in float32."""
    dtype = torch.float32 if piece.keeps_dtype else torch.bfloat16
    return sum(info.nbytes for info in plan(piece, dtype, target))


def summarize(model: str) -> Summary:
    """The summary of whatever a person may name: a checkpoint's folder, a `config.json`, a preset, a hub id.

    Of weights in a folder the headers are read; from the hub none are downloaded. Raises UserError if there
    is no such model, or a folder's weights do not make a whole one.
    """
    path = expand(model)
    if path.suffix == ".json" and not path.is_dir():
        return Summary(ModelConfig.from_json(path))
    shipped = model == NANO and resolve(NANO).is_dir()
    if model in PRESETS and not shipped and not path.exists():
        return Summary(PRESETS[model])
    try:
        folder = resolve(model, weights=False)
    except CheckpointError as error:
        raise CheckpointError(f"{error} (or a preset: {', '.join(PRESETS)})") from None
    is_here = shipped or path.exists()
    has_weights = (folder / INDEX).exists() or any(folder.glob("*.safetensors"))
    if (folder / CONFIG).is_file() and not (is_here and has_weights):
        return Summary(ModelConfig.from_json(folder / CONFIG))
    checkpoint = open_checkpoint(folder)
    return Summary(checkpoint.config, _files(checkpoint))


def _files(checkpoint: Checkpoint) -> Files:
    return Files(
        folder=checkpoint.folder,
        format=checkpoint.format,
        tensors=checkpoint.count,
        shards=len(checkpoint.shards),
        nbytes=checkpoint.nbytes,
    )


def memory_pools() -> list[Pool]:
    """This machine's main memory and that of each NVIDIA GPU; what is free, is free right now."""
    pools = [Pool("RAM", psutil.virtual_memory().total, free_memory(torch.device("cpu")) or 0)]
    for i in range(torch.cuda.device_count()):
        gpu = torch.device("cuda", i)
        name, total = f"GPU {i} ({torch.cuda.get_device_name(gpu)})", torch.cuda.mem_get_info(gpu)[1]
        pools.append(Pool(name, total, free_memory(gpu) or 0))
    return pools
