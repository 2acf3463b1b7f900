"""A checkpoint as one GGUF file, the way llama.cpp and what is built on it read DeepSeek's models.

A GGUF file is a list of keys (the config, and the whole tokenizer), a list of tensors, and their bytes. The
architecture is called `deepseek2` there, and DeepSeek-V3 is one of its shapes. The tensors are ours under other
names, but for three things:

- **Attention is stored absorbed.** Decoding never expands the latent to keys and values: it multiplies the query
  by what would make keys of it, and the sum of latents by what would make values. So `kv_b_proj` is cut in two
  for each head, `attn_k_b` (transposed: latent by key) and `attn_v_b`, and the keys that describe attention say
  what is left of it: one key head of `kv_lora_rank + qk_rope_head_dim` numbers.
- **Experts are stacked**, all of a layer's gates in one tensor. A released checkpoint spreads them over shards, so
  each matrix is written to its place in the file as it comes by: nothing is held but the tensor in hand.
- **Norms, gates and correction biases are float32**, since llama.cpp multiplies by nothing else there.

What else there is can be smaller (`dsv3.quant.ggml` has the formats). A mix such as `q4_k_m` names a format and, as
llama.cpp does, gives more bits to what suffers most: the head, in some layers what leads out of the feed-forward. A matrix
whose rows are no whole blocks takes a simpler format. What our own int8 and int4 hold in groups of 32 is Q8_0 and Q4_0 in
another order of bytes, and is not rounded again where the wanted format has as many bits or more.

Multi-token prediction modules are blocks after the last one (`block_count` counts them, `nextn_predict_layers`
says how many they are). Embedding and head are left out of them: what reads the file shares the main model's.

llama.cpp runs fewer shapes than dsv3 does, and a few keys of YaRN it does not read. What it would compute
differently is refused here, by the name of the key; what one can tell it on its command line is said in a note.
The keys and names were checked against its loader (src/models/deepseek2.cpp), not only its converter.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from dsv3.checkpoint.hub import expand
from dsv3.checkpoint.names import Piece
from dsv3.checkpoint.ollama import modelfile
from dsv3.checkpoint.progress import progress_bar
from dsv3.checkpoint.reader import Checkpoint, Stored, generation_config, open_checkpoint
from dsv3.checkpoint.writer import check_space, staged_file
from dsv3.config import ModelConfig
from dsv3.errors import CheckpointError, UserError
from dsv3.files import write_whole
from dsv3.gguf import FILE_TYPES, MAGIC, TYPES, Quant, Type, Value, is_gguf, write_header
from dsv3.kernels.packed import Packed, dequantize
from dsv3.quant import ggml
from dsv3.text.bpe import PATTERNS
from dsv3.text.chat import DEEPSEEK_TEMPLATE
from dsv3.text.gguf import CONTROL, NORMAL, UNUSED, USER_DEFINED
from dsv3.text.tokenizer import Tokenizer

_SIMPLER = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What rows take that are no multiple of 256, as in llama.cpp."""
ARCHITECTURE = "deepseek2"

GATING = {"softmax": 1, "sigmoid": 2}
SAMPLING = {"temperature": ("temp", float), "top_p": ("top_p", float), "top_k": ("top_k", int)}


@dataclass(frozen=True)
class Written:
    """What `export_gguf` wrote."""

    nbytes: int
    """Of the tensors."""
    tensors: int
    notes: tuple[str, ...]
    """What whoever runs the file should know, a line each."""


def export_gguf(
    source: str | Path,
    out: str | Path,
    quant: Quant = "bf16",
    mtp: bool = True,
    ollama: bool = False,
    progress: bool = False,
) -> Written:
    """Write the checkpoint in `source`, a folder or a GGUF file, to the file `out`, with its tokenizer and chat template.

    Keeps about one tensor in memory. Without `mtp` the multi-token prediction modules are left out. A GGUF file at
    `out` is replaced, and with `ollama` the Modelfile beside it (`dsv3.checkpoint.ollama`), which is written last. Raises
    CheckpointError or OSError, with nothing written, if the source is not whole, is of a shape that llama.cpp does not
    run, or the file cannot be written.
    """
    if quant not in get_args(Quant):
        raise CheckpointError(f"quant is {quant!r}: choose {', '.join(get_args(Quant))}")
    source, out = expand(source), expand(out)
    _check_replaceable(out)
    recipe = out.with_suffix(".Modelfile")
    if ollama and (recipe.is_dir() or recipe == out):
        raise CheckpointError(f"{recipe} is where the Modelfile goes: name another file than {out.name}")
    checkpoint = open_checkpoint(source)
    if not mtp:
        checkpoint = checkpoint.without_mtp()
    checkpoint.check_copies()
    config = checkpoint.config
    check(config)
    tokenizer = _tokenizer(source)
    values = metadata(config) | tokenizer_metadata(tokenizer, config) | _general(source, quant)
    beside = modelfile(out.name, tokenizer, generation_config(source)) if ollama else None
    places = {name: destinations(piece, config) for name, piece in checkpoint.pieces.items()}
    outs = {
        place.tensor: Out(place, type_for(place, quant, config, _moves(checkpoint, name)))
        for name, of_piece in places.items()
        for place in of_piece
    }
    nbytes = sum(each.nbytes for each in outs.values())
    total = sum(map(checkpoint.stored_nbytes, places))
    with staged_file(out) as path, progress_bar(f"Converting to {quant}", total, progress) as advance:
        check_space(path.parent, nbytes)
        announced = [(each.place.tensor, each.type, tuple(each.place.shape)) for each in outs.values()]
        offsets = dict(zip(outs, write_header(path, values, announced), strict=True))
        with path.open("r+b") as file:
            for piece, stored in checkpoint.stream():
                for place in places[piece.name]:
                    kind = outs[place.tensor].type
                    file.seek(offsets[place.tensor] + place.first // kind.block * kind.nbytes)
                    file.write(_encode(piece.name, stored, place, kind).flatten().numpy().data)
                advance(stored.nbytes)
            file.flush()
            os.fsync(file.fileno())
    if beside is not None:
        write_whole(recipe, beside)
    return Written(nbytes, len(outs), tuple(_notes(config)))


def _moves(checkpoint: Checkpoint, name: str) -> Type | None:
    """The format that a tensor of the checkpoint is in already but for the order of bytes."""
    layout = checkpoint.layout(name)
    if layout is None or layout[1:] != (ggml.GROUP, False):
        return None
    return ggml.TYPE_OF[layout[0]]


def _encode(name: str, stored: Stored, place: Place, to: Type) -> Tensor:
    """The bytes that go to a place: uint8."""
    if isinstance(stored, Packed):
        if ggml.moves(stored, to):
            return ggml.to_blocks(stored)
        stored = dequantize(stored, ggml.FLOATS.get(to.name, torch.float32))
    try:
        return ggml.quantize(place.take(stored).contiguous(), to)
    except UserError as error:
        raise CheckpointError(f"{name} {error}") from None


def type_for(place: Place, quant: Quant, config: ModelConfig, kept: Type | None = None) -> Type:
    """The format of a tensor: llama.cpp's choice (llama-quant.cpp, `llama_tensor_get_type`), but for what may stay as it is.

    kept: what it is in already (`dsv3.quant.ggml.type_of`). For a head in Q8_0 that is as good as llama.cpp's Q6_K.
    """
    name = place.tensor
    if len(place.shape) == 1 or name.endswith(".ffn_gate_inp.weight"):
        return TYPES["F32"]
    if quant in ("f32", "f16", "bf16"):
        return TYPES[quant.upper()]
    base = re.sub(r"_k_[sml]$", "_k", quant).upper()
    block = TYPES[base].block
    wanted = _more_bits(name, quant, config) or base
    if name == "output.weight" or (name == "token_embd.weight" and config.tie_word_embeddings):
        wanted = "Q8_0" if base == "Q8_0" or place.shape[-1] % block else "Q6_K"
        if kept is not None:
            return kept
    kind = TYPES[wanted]
    if kept is not None and kept.nbytes / kept.block <= kind.nbytes / kind.block:
        return kept
    if place.shape[-1] % kind.block:
        kind = TYPES[_SIMPLER.get(wanted, "F16")]
    return TYPES["F16"] if place.shape[-1] % kind.block else kind


def _more_bits(name: str, quant: Quant, config: ModelConfig) -> str | None:
    """The format of a tensor for which a mix has another than its own."""
    if name.endswith(".attn_output.weight"):
        return {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}.get(quant)
    match = re.match(r"blk\.(\d+)\.ffn_down", name)
    if match is None:
        return None
    layer, layers = int(match[1]), config.num_hidden_layers + config.num_nextn_predict_layers
    eighth = layers // 8
    if quant in ("q4_k_m", "q5_k_m"):  # the first and last eighth, and every third layer
        return "Q6_K" if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2 else None
    if quant == "q4_k_s":
        return "Q5_K" if layer < eighth else None
    if quant == "q3_k_m":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    return {"q2_k": "Q3_K", "q3_k_l": "Q5_K"}.get(quant)


# Tensors -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where numbers of a source tensor go."""

    tensor: str
    """GGUF's name."""
    shape: torch.Size
    """Of the whole GGUF tensor, in torch's order of dimensions (the file has them the other way round)."""
    first: int = 0
    """The number in it, counted from its start, where these begin; they lie in one run."""
    take: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """What of the source tensor goes there, and in which order."""
    one: tuple[int, ...] | None = None
    """The shape of these numbers, if they are not all."""


_GLOBAL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_BLOCK = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "eh_proj.weight": "nextn.eh_proj.weight",
    "shared_head.norm.weight": "nextn.shared_head_norm.weight",
}


def destinations(piece: Piece, config: ModelConfig) -> list[Place]:
    """Where a tensor of the checkpoint goes: to one place, cut in two, or nowhere if it repeats another."""
    if piece.copy_of is not None:
        return []
    shape = torch.Size(piece.shape)
    if piece.name in _GLOBAL:
        return [Place(_GLOBAL[piece.name], shape)]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", piece.name)
    assert match is not None, piece.name
    block, name = f"blk.{match[1]}.", match[2]
    if name == "self_attn.kv_b_proj.weight":
        heads, nope, v = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
        rank = config.kv_lora_rank

        def keys(kv_b: Tensor) -> Tensor:
            return kv_b.view(heads, nope + v, rank)[:, :nope].transpose(1, 2)

        def values(kv_b: Tensor) -> Tensor:
            return kv_b.view(heads, nope + v, rank)[:, nope:]

        return [
            Place(f"{block}attn_k_b.weight", torch.Size((heads, rank, nope)), take=keys),
            Place(f"{block}attn_v_b.weight", torch.Size((heads, v, rank)), take=values),
        ]
    expert = re.fullmatch(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight", name)
    if expert is not None:
        assert config.n_routed_experts is not None
        stacked = torch.Size((config.n_routed_experts, *shape))
        return [
            Place(f"{block}ffn_{expert[2]}_exps.weight", stacked, int(expert[1]) * shape.numel(), one=shape)
        ]
    return [Place(block + _IN_BLOCK[name], shape)]


@dataclass(frozen=True)
class Out:
    """A tensor of the file."""

    place: Place
    """One of those it is filled from."""
    type: Type

    @property
    def nbytes(self) -> int:
        return self.type.size(self.place.shape)


# Keys --------------------------------------------------------------------------------------------------


def check(config: ModelConfig) -> None:
    """Raise CheckpointError, by the name of the key, for what llama.cpp would refuse or compute differently."""

    def refuse(key: str, value: Any, why: str) -> None:
        raise CheckpointError(f"{key} is {value!r}: llama.cpp {why}, so no GGUF was written")

    # Its loader tells DeepSeek-V2-Lite and two others by their number of layers, and reads no rank for them.
    layers = config.num_hidden_layers
    if config.q_lora_rank and (layers in (26, 27) or (layers, config.vocab_size) == (48, 128256)):
        refuse("num_hidden_layers", layers, "takes that for a model without q_lora_rank")
    if config.attention_bias:
        refuse("attention_bias", True, "has no biases in this architecture")
    if not config.rope_interleave:
        refuse("rope_interleave", False, "turns neighbouring numbers in this architecture")
    if config.n_routed_experts is not None:
        if config.moe_layer_freq != 1:
            refuse("moe_layer_freq", config.moe_layer_freq, "has experts in every layer after the dense ones")
        if not config.n_shared_experts:
            refuse("n_shared_experts", config.n_shared_experts, "needs a shared expert in this architecture")
        if _limits_groups(config) and config.topk_method != "noaux_tc":
            refuse("topk_method", config.topk_method, "ranks groups by their best two, as 'noaux_tc' does")
    yarn = config.rope_scaling
    if yarn is not None and yarn.factor > 1:
        name = "rope_scaling.mscale"
        if yarn.mscale_all_dim == 0:
            refuse(f"{name}_all_dim", yarn.mscale_all_dim, "scales attention as if it were not zero")
        if yarn.attention_factor not in (None, 1.0):
            refuse("rope_scaling.attention_factor", yarn.attention_factor, "reads no such factor")
        if yarn.attention_factor is None and yarn.mscale != yarn.mscale_all_dim:
            refuse(name, yarn.mscale, f"takes mscale_all_dim's {yarn.mscale_all_dim} for it")


def _limits_groups(config: ModelConfig) -> bool:
    """Whether a limit is to be written. llama.cpp takes none that limits nothing."""
    return config.limits_groups and config.topk_group < config.n_group


def metadata(config: ModelConfig) -> dict[str, Value]:
    """The keys of a config, with `deepseek2.` before them."""
    blocks = config.num_hidden_layers + config.num_nextn_predict_layers
    dense = blocks if config.n_routed_experts is None else min(config.first_k_dense_replace, blocks)
    values: dict[str, Value] = {
        "block_count": blocks,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "leading_dense_block_count": dense,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.q_lora_rank": config.q_lora_rank or 0,  # the loader wants the key all the same
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.latent_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    values |= _expert_metadata(config)
    if config.num_nextn_predict_layers:
        values["nextn_predict_layers"] = config.num_nextn_predict_layers
    yarn = config.rope_scaling
    if yarn is not None:
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(yarn.factor),
            "rope.scaling.original_context_length": yarn.original_max_position_embeddings,
            "rope.scaling.yarn_log_multiplier": 0.1 * yarn.mscale_all_dim,  # the loader divides by 0.1 again
            "rope.scaling.yarn_beta_fast": float(yarn.beta_fast),
            "rope.scaling.yarn_beta_slow": float(yarn.beta_slow),
        }
    return {f"{ARCHITECTURE}.{key}": value for key, value in values.items()}


def _expert_metadata(config: ModelConfig) -> dict[str, Value]:
    if config.n_routed_experts is None:  # the loader wants these two all the same
        return {"expert_feed_forward_length": config.intermediate_size, "expert_shared_count": 0}
    values: dict[str, Value] = {
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts or 0,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_weights_scale": float(config.routing_factor),
        "expert_weights_norm": config.norm_topk_prob,
        "expert_gating_func": GATING[config.scoring_func],
    }
    if _limits_groups(config):
        values |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    return values


def _general(source: Path, quant: Quant) -> dict[str, Value]:
    values: dict[str, Value] = {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.name": source.stem if is_gguf(source) else source.resolve().name,
        "general.file_type": FILE_TYPES[quant],
        "general.quantization_version": 2,
    }
    generation = generation_config(source)
    for ours, (theirs, kind) in SAMPLING.items():
        value = generation.get(ours)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            # No limit is -1 or 0 to those who read checkpoints, and 0 to llama.cpp, which takes 40 where nothing is said.
            values[f"general.sampling.{theirs}"] = kind(value if ours != "top_k" else max(value, 0))
    return values


def _notes(config: ModelConfig) -> Iterator[str]:
    if config.num_nextn_predict_layers:
        yield (
            f"multi-token prediction is block {config.num_hidden_layers}: llama.cpp passes over it, or drafts with it "
            "(--spec-type draft-mtp); --no-mtp leaves it out, for programs that take it for one more layer"
        )
    yarn = config.rope_scaling
    if yarn is not None and (yarn.beta_fast, yarn.beta_slow) != (32, 1):
        yield (
            "llama.cpp does not read YaRN's betas: start it with "
            f"--yarn-beta-fast {yarn.beta_fast:g} --yarn-beta-slow {yarn.beta_slow:g}"
        )


# Tokenizer ---------------------------------------------------------------------------------------------


def _tokenizer(source: Path) -> Tokenizer:
    if not (source / "tokenizer.json").exists() and (source / "tiktoken.model").exists():
        raise CheckpointError(
            f"{source} has its tokenizer in tiktoken.model alone, without the merges that GGUF lists: "
            "add a tokenizer.json"
        )
    return Tokenizer.from_pretrained(source)


def tokenizer_metadata(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Value]:
    """The keys of a tokenizer and chat format, with `tokenizer.` before them.

    Raises CheckpointError for a tokenizer that cuts text otherwise than DeepSeek-V3's: llama.cpp knows the ways of
    cutting by name.
    """
    content = json.loads(tokenizer.backend.to_str())
    _check_text_rules(content)
    tokens, kinds = _tokens(content, config.vocab_size)
    values: dict[str, Value] = {
        "ggml.model": "gpt2",
        "ggml.pre": "deepseek-v3",
        "ggml.tokens": tokens,
        "ggml.token_type": kinds,
        "ggml.merges": [
            pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]
        ],
        "ggml.add_bos_token": tokenizer.add_bos_token,
        "ggml.add_eos_token": False,
    }
    ends = [*tokenizer.eos_token_ids, *config.eos_token_ids]
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": ends[0] if ends else None,
        "eot": next((end for end in ends if end != ends[0]), None),
        "padding": tokenizer.pad_token_id,
    }
    values |= {f"ggml.{name}_token_id": i for name, i in ids.items() if i is not None}
    if tokenizer.chat_template is not None:
        values["chat_template"] = tokenizer.chat_template
    elif tokenizer.backend.token_to_id("<｜User｜>") is not None:
        values["chat_template"] = DEEPSEEK_TEMPLATE
    return {f"tokenizer.{key}": value for key, value in values.items()}


def _tokens(content: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """The text and the kind of every id; those that the tokenizer has no token for are filled up."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    added = {token["content"]: token for token in content["added_tokens"]}
    ids = content["model"]["vocab"] | {text: token["id"] for text, token in added.items()}
    largest = max(ids.values(), default=-1)
    if largest >= vocab_size:
        raise CheckpointError(f"the tokenizer has an id {largest}, but vocab_size is {vocab_size}")
    for text, i in ids.items():
        tokens[i] = text
        kinds[i] = NORMAL if text not in added else _kind(text, added[text]["special"])
    return tokens, kinds


def _kind(text: str, special: bool) -> int:
    """llama.cpp keeps control tokens out of what it answers. `<think>` stays: its server reads it there."""
    control = special or re.fullmatch(r"<[|｜].*[|｜]>", text) is not None
    return CONTROL if control else USER_DEFINED


def _check_text_rules(content: Mapping[str, Any]) -> None:
    model = content["model"]
    normalizer = content.get("normalizer")
    if model.get("type") != "BPE":
        raise CheckpointError(f"the tokenizer is a {model.get('type')}: only BPE is written to GGUF")
    if normalizer is not None and normalizer != {"type": "Sequence", "normalizers": []}:
        raise CheckpointError(
            f"the tokenizer normalises text ({normalizer['type']}), which llama.cpp does not"
        )
    if model.get("ignore_merges"):
        raise CheckpointError("the tokenizer has ignore_merges, which llama.cpp has not for 'deepseek-v3'")
    wanted = [("Split", _spelled(pattern), "Isolated", False) for pattern in PATTERNS]
    if _cuts(content.get("pre_tokenizer")) != [*wanted, ("ByteLevel", False, False)]:
        raise CheckpointError(
            "the tokenizer does not cut text as DeepSeek-V3's does (pre_tokenizer of tokenizer.json), and llama.cpp "
            "knows other ways by name only: no GGUF was written"
        )


def _cuts(pre_tokenizer: dict[str, Any] | None) -> list[tuple[Any, ...]]:
    """What a pre-tokenizer of tokenizer.json does, step by step, in a form that can be compared."""
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    found: list[tuple[Any, ...]] = []
    for step in steps:
        if step["type"] == "Split":
            pattern = step["pattern"].get("Regex", "")
            found.append(("Split", _spelled(pattern), step["behavior"], step["invert"]))
        elif step["type"] == "ByteLevel":
            found.append(("ByteLevel", step["add_prefix_space"], step["use_regex"]))
        else:
            found.append((step["type"],))
    return found


def _spelled(pattern: str) -> str:
    """One spelling of a pattern: DeepSeek's file has line breaks as they are, and no backslash before a quote."""
    return pattern.replace("\r", r"\r").replace("\n", r"\n").replace(r"\"", '"')


# The file ----------------------------------------------------------------------------------------------


def _check_replaceable(out: Path) -> None:
    """A file that is no GGUF is not ours to replace: it may be one of the checkpoint's own."""
    if out.is_file():
        with out.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise CheckpointError(f"{out} is there, and is no GGUF file: name another")
