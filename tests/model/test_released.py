"""Every released model of this architecture, from its own config.json: size, switches, and logits when shrunk.

The files are written down in full, as published. Parameters are counted on the meta device at full size;
for logits, widths, depth and the number of experts are cut, and no switch is touched.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3.checkpoint.pretrained import DeepseekV3
from dsv3.config import ModelConfig
from dsv3.model import Transformer
from tests.checkpoint import released
from tests.model.reference import assert_close, gates, in_transformers, random_ids, random_model

FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def auto_map(version: str) -> dict[str, str]:
    return {
        "AutoConfig": f"configuration_deepseek.Deepseek{version}Config",
        "AutoModel": f"modeling_deepseek.Deepseek{version}Model",
        "AutoModelForCausalLM": f"modeling_deepseek.Deepseek{version}ForCausalLM",
    }


DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": auto_map("V3"),
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": FP8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
DEEPSEEK_V3_0324 = DEEPSEEK_V3 | {"transformers_version": "4.46.3"}
DEEPSEEK_R1 = DEEPSEEK_V3 | {
    "aux_loss_alpha": 0.001,
    "pretraining_tp": 1,
    "seq_aux": True,
    "transformers_version": "4.46.3",
}
DEEPSEEK_V3_1 = DEEPSEEK_V3 | {
    "quantization_config": FP8 | {"scale_fmt": "ue8m0"},
    "transformers_version": "4.44.2",
}
MOONLIGHT: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": auto_map("V3"),
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11264,
    "kv_lora_rank": 512,
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}
KIMI_K2: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": auto_map("V3"),
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": FP8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}
DEEPSEEK_V2: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": auto_map("V2"),
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1536,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 128,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
DEEPSEEK_V2_LITE = DEEPSEEK_V2 | {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "topk_method": "greedy",
    "transformers_version": "4.33.1",
}

RELEASED = {
    "DeepSeek-V3": DEEPSEEK_V3,
    "DeepSeek-V3-0324": DEEPSEEK_V3_0324,
    "DeepSeek-V3.1": DEEPSEEK_V3_1,
    "DeepSeek-R1": DEEPSEEK_R1,
    "Moonlight-16B-A3B": MOONLIGHT,
    "Kimi-K2": KIMI_K2,
    "DeepSeek-V2-Lite": DEEPSEEK_V2_LITE,
    "DeepSeek-V2": DEEPSEEK_V2,
}
every_model = pytest.mark.parametrize("name", RELEASED)

# Parameters without MTP modules, and what their makers say.
PARAMETERS = {
    "DeepSeek-V3": (671_026_419_200, "671.0B"),
    "Moonlight-16B-A3B": (15_960_110_208, "16.0B"),
    "Kimi-K2": (1_026_408_232_448, "1026.4B"),
    "DeepSeek-V2-Lite": (15_706_484_224, "15.7B"),
    "DeepSeek-V2": (235_741_434_880, "235.7B"),
}

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 12,
    "vocab_size": 160,
}


def shrunk(name: str) -> dict[str, Any]:
    """The same file with small sizes, two layers of experts, and four experts for each it must choose from."""
    values = dict(RELEASED[name])
    small = {key: size for key, size in SIZES.items() if values[key] is not None}
    small["num_hidden_layers"] = values["first_k_dense_replace"] + 2
    small["n_routed_experts"] = 4 * max(values["n_group"], values["num_experts_per_tok"])
    return values | small | {"bos_token_id": 0, "eos_token_id": 1}


# Size and switches -------------------------------------------------------------------------------------


@every_model
def test_no_key_is_lost(name: str) -> None:
    """Every key is read, and written back with the value it had."""
    config = ModelConfig.from_dict(RELEASED[name])
    written = config.to_dict()
    assert {"type": "yarn"}.items() <= (written["rope_scaling"] or {"type": "yarn"}).items()
    for key, value in RELEASED[name].items():
        assert written[key] == value, key
    assert ModelConfig.from_dict(json.loads(json.dumps(written))) == config
    assert config.num_nextn_predict_layers == RELEASED[name].get("num_nextn_predict_layers", 0)


@pytest.mark.parametrize("name", PARAMETERS)
def test_full_size_parameters(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_dict(RELEASED[name]))
    count = sum(t.numel() for key, t in model.state_dict().items() if not key.startswith("mtp."))
    exact, said = PARAMETERS[name]
    assert count == exact
    assert f"{count / 1e9:.1f}B" == said
    by_hand = released.shapes(dict(RELEASED[name]) | {"num_nextn_predict_layers": 0})
    assert count == sum(math.prod(shape) for shape in by_hand.values())


@every_model
def test_shrinking_touches_no_switch(name: str) -> None:
    values, full = shrunk(name), RELEASED[name]
    changed = {key for key in full if values[key] != full[key]}
    allowed = {*SIZES, "num_hidden_layers", "n_routed_experts", "bos_token_id", "eos_token_id"}
    assert values.keys() == full.keys()
    assert changed <= allowed
    ours, theirs = ModelConfig.from_dict(values), ModelConfig.from_dict(full)
    assert ours.limits_groups == theirs.limits_groups
    assert (ours.rope_scaling, ours.rope_theta) == (theirs.rope_scaling, theirs.rope_theta)
    assert ours.softmax_scale * ours.qk_head_dim**0.5 == pytest.approx(
        theirs.softmax_scale * theirs.qk_head_dim**0.5
    )


def test_what_tells_them_apart() -> None:
    configs = {name: ModelConfig.from_dict(values) for name, values in RELEASED.items()}
    grouped = {name for name, config in configs.items() if config.limits_groups}
    assert grouped == {"DeepSeek-V3", "DeepSeek-V3-0324", "DeepSeek-V3.1", "DeepSeek-R1", "DeepSeek-V2"}
    assert {n for n, c in configs.items() if c.q_lora_rank is None} == {
        "Moonlight-16B-A3B",
        "DeepSeek-V2-Lite",
    }
    assert {n for n, c in configs.items() if c.scoring_func == "softmax"} == {
        "DeepSeek-V2",
        "DeepSeek-V2-Lite",
    }
    for name, config in configs.items():
        with torch.device("meta"):
            model = Transformer(config.replace(num_hidden_layers=4, num_nextn_predict_layers=0))
        biased = [gate.e_score_correction_bias is not None for gate in gates(model)]
        assert biased == [config.scoring_func == "sigmoid"] * (4 - config.first_k_dense_replace), name


# Numbers -----------------------------------------------------------------------------------------------


def far_apart(tokens: int) -> Tensor:
    """Positions up to some thousands, where YaRN's stretched pairs have turned by visible angles."""
    return torch.arange(tokens) * 211


def theirs_at(model: Transformer, values: dict[str, Any], ids: Tensor) -> Tensor:
    """transformers' logits; the mask of ones keeps it from taking jumps in position for packed documents."""
    theirs = in_transformers(model, {k: v for k, v in values.items() if k != "quantization_config"})
    positions = far_apart(ids.shape[1])[None].expand(len(ids), -1)
    logits: Tensor = theirs(ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits
    return logits


@every_model
def test_logits_equal_transformers(name: str) -> None:
    """In float32, with every expert's bias, norm and matrix random."""
    values = shrunk(name)
    model = random_model(ModelConfig.from_dict(values), seed=3)
    ids = random_ids(model.config, batch=2, length=30)
    ours = model(ids, positions=far_apart(30))
    assert_close(ours.logits, theirs_at(model, values, ids), what=name)
    assert len(ours.mtp_logits) == values.get("num_nextn_predict_layers", 0)


@every_model
def test_a_checkpoint_in_the_released_form_loads(name: str, tmp_path: Path) -> None:
    """FP8 with block scales where it was released so; names and shapes are written out by hand elsewhere."""
    values = shrunk(name)
    weights = released.tensors(values, fp8="quantization_config" in values)
    folder = released.write(tmp_path / name, values, weights)
    (folder / "config.json").write_text(json.dumps(values))
    model = DeepseekV3.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    assert torch.equal(model.embed_tokens.weight, weights["model.embed_tokens.weight"].float())
    ids = random_ids(model.config, batch=2, length=30)
    ours = model(ids, positions=far_apart(30)).logits
    assert_close(ours, theirs_at(model, values, ids), what=name)
