"""Folders as they are released, made without dsv3: names, shapes and dtypes are written out by hand here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FP8 = torch.float8_e4m3fn
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}

# DeepSeek-V3's config.json, shrunk. Widths are no multiples of 128, so that blocks are ragged.
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 160,
    "initializer_range": 0.02,
    "intermediate_size": 200,
    "kv_lora_rank": 32,
    "max_position_embeddings": 1024,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 136,
    "moe_layer_freq": 1,
    "n_group": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 64,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 16,
    "vocab_size": 130,
}
# Moonlight: no query compression, one group, no MTP.
MOONLIGHT = V3 | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_scaling": None}
del MOONLIGHT["num_nextn_predict_layers"]
# DeepSeek-V2-Lite: softmax scores, greedy choice, two shared experts, no correction bias.
V2_LITE = MOONLIGHT | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "rope_scaling": V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
}


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of such a checkpoint, in the order of the released files."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    heads, rank, rope = config["num_attention_heads"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, v = config["qk_nope_head_dim"], config["v_head_dim"]
    named: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}

    def feed_forward(prefix: str, width: int) -> None:
        named[f"{prefix}.gate_proj.weight"] = (width, hidden)
        named[f"{prefix}.up_proj.weight"] = (width, hidden)
        named[f"{prefix}.down_proj.weight"] = (hidden, width)

    layers, mtp = config["num_hidden_layers"], config.get("num_nextn_predict_layers", 0)
    for i in range(layers + mtp):
        layer = f"model.layers.{i}"
        attention = f"{layer}.self_attn"
        if config["q_lora_rank"] is None:
            named[f"{attention}.q_proj.weight"] = (heads * (nope + rope), hidden)
        else:
            named[f"{attention}.q_a_proj.weight"] = (config["q_lora_rank"], hidden)
            named[f"{attention}.q_a_layernorm.weight"] = (config["q_lora_rank"],)
            named[f"{attention}.q_b_proj.weight"] = (heads * (nope + rope), config["q_lora_rank"])
        named[f"{attention}.kv_a_proj_with_mqa.weight"] = (rank + rope, hidden)
        named[f"{attention}.kv_a_layernorm.weight"] = (rank,)
        named[f"{attention}.kv_b_proj.weight"] = (heads * (nope + v), rank)
        named[f"{attention}.o_proj.weight"] = (hidden, heads * v)
        if i < config["first_k_dense_replace"]:
            feed_forward(f"{layer}.mlp", config["intermediate_size"])
        else:
            named[f"{layer}.mlp.gate.weight"] = (config["n_routed_experts"], hidden)
            if config["topk_method"] == "noaux_tc":
                named[f"{layer}.mlp.gate.e_score_correction_bias"] = (config["n_routed_experts"],)
            for e in range(config["n_routed_experts"]):
                feed_forward(f"{layer}.mlp.experts.{e}", config["moe_intermediate_size"])
            shared = config["moe_intermediate_size"] * config["n_shared_experts"]
            feed_forward(f"{layer}.mlp.shared_experts", shared)
        named[f"{layer}.input_layernorm.weight"] = (hidden,)
        named[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        if i >= layers:
            named[f"{layer}.embed_tokens.weight"] = (vocab, hidden)
            named[f"{layer}.enorm.weight"] = (hidden,)
            named[f"{layer}.hnorm.weight"] = (hidden,)
            named[f"{layer}.eh_proj.weight"] = (hidden, 2 * hidden)
            named[f"{layer}.shared_head.norm.weight"] = (hidden,)
            named[f"{layer}.shared_head.head.weight"] = (vocab, hidden)
    return named | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


# What DeepSeek-V3's files have in FP8, by the end of the name.
_FP8_ENDINGS = (
    *(f"{name}_proj.weight" for name in ("q_a", "q_b", ".q", "kv_b", ".o", "gate", "up", "down")),
    "kv_a_proj_with_mqa.weight",
)


def fp8_names(config: Mapping[str, Any]) -> set[str]:
    return {name for name in shapes(config) if name.endswith(_FP8_ENDINGS)}


def tensors(
    config: Mapping[str, Any], fp8: bool = False, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Random weights: unit embeddings and small matrices, so that the stream mostly carries its tokens."""
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    for name, shape in shapes(config).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            made[name] = values * 0.1  # float32, and not representable in bfloat16
        elif len(shape) == 1:
            made[name] = (1 + 0.1 * values).to(dtype)
        elif fp8 and name in fp8_names(config):
            made[name] = (values * 100).clamp(-448, 448).to(FP8)
            blocks = -(-shape[0] // 128), -(-shape[1] // 128)
            made[f"{name}_scale_inv"] = 2e-4 * (1 + torch.rand(blocks, generator=generator))
        else:
            made[name] = (values * (1.0 if "embed" in name else 0.02)).to(dtype)
    for name in made:
        if name.endswith("shared_head.head.weight"):
            made[name] = made["lm_head.weight"].clone()
        elif name.endswith("embed_tokens.weight"):
            made[name] = made["model.embed_tokens.weight"].clone()
    return made


def write(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], shards: int = 3) -> Path:
    """A folder with `shards` shards and an index, or one file; weights and their scales may be parted."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(tensor.dtype == FP8 for tensor in weights.values()):
        config = dict(config) | {"quantization_config": QUANTIZATION}
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = list(weights), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:06}.safetensors"  # released files pad the two numbers unequally
        mine = names[len(names) * i // shards : len(names) * (i + 1) // shards]
        save_file({name: weights[name] for name in mine}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, read by the safetensors library alone."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                assert name not in found, f"{name} is in two shards"
                found[name] = shard.get_tensor(name).clone()
    return found


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert one.keys() == other.keys(), f"only in one: {sorted(one.keys() ^ other.keys())}"
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, f"{name}: {tensor.dtype} and {other[name].dtype}"
        assert tensor.shape == other[name].shape, f"{name}: {tensor.shape} and {other[name].shape}"
        same = torch.equal(tensor.flatten().view(torch.uint8), other[name].flatten().view(torch.uint8))
        assert same, f"{name} differs"


def config_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))
