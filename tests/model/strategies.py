"""Random configurations for hypothesis: small, but every switch of the architecture in every position."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from dsv3.config import ModelConfig, YarnConfig

# mscale without mscale_all_dim (other than 1) is left out: transformers ignores it there (docs/fidelity.md).
_MSCALES = [(1.0, 1.0), (0.707, 0.707), (1.0, 0.707), (0.5, 1.3), (1.0, 0.0)]


@st.composite
def yarns(draw: st.DrawFn) -> YarnConfig:
    mscale, mscale_all_dim = draw(st.sampled_from(_MSCALES))
    return YarnConfig(
        factor=draw(st.sampled_from([1.0, 2.5, 40.0])),
        original_max_position_embeddings=draw(st.sampled_from([8, 16, 64])),
        beta_fast=draw(st.sampled_from([32.0, 4.0, 1.0])),
        beta_slow=draw(st.sampled_from([1.0, 0.25])),
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
        attention_factor=draw(st.sampled_from([None, None, None, 1.25])),
    )


@st.composite
def _shapes(draw: st.DrawFn) -> dict[str, Any]:
    """What both families share."""
    heads = draw(st.sampled_from([1, 2, 4]))
    layers = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 4]))
    experts = groups * draw(st.integers(2, 4))
    return {
        "vocab_size": draw(st.sampled_from([33, 64])),
        "hidden_size": draw(st.sampled_from([32, 44])),
        "intermediate_size": draw(st.sampled_from([24, 50])),
        "moe_intermediate_size": draw(st.sampled_from([8, 14])),
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": 0,
        "num_attention_heads": heads,
        "q_lora_rank": draw(st.sampled_from([None, 10, 24])),
        "kv_lora_rank": draw(st.sampled_from([6, 16, 20])),
        "qk_nope_head_dim": draw(st.sampled_from([3, 8, 12])),
        "qk_rope_head_dim": draw(st.sampled_from([2, 4, 8, 16])),
        "v_head_dim": draw(st.sampled_from([5, 8, 12, 24])),
        "attention_bias": draw(st.booleans()),
        "n_routed_experts": experts,
        "n_shared_experts": draw(st.sampled_from([0, 1, 2])),
        "n_group": groups,
        "topk_group": draw(st.integers(1, groups)),
        "first_k_dense_replace": draw(st.integers(0, min(2, layers))),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "rope_theta": draw(st.sampled_from([10000.0, 50000.0, 500.0])),
        "rope_scaling": draw(st.none() | yarns()),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "tie_word_embeddings": draw(st.booleans()),
    }


@st.composite
def v3_configs(draw: st.DrawFn) -> ModelConfig:
    shape = draw(_shapes())
    choosable = shape["n_routed_experts"] // shape["n_group"] * shape["topk_group"]
    return ModelConfig(
        **shape,
        num_experts_per_tok=draw(st.integers(1, min(choosable, 4))),
        norm_topk_prob=draw(st.booleans()),
        rope_interleave=draw(st.booleans()),
    )


@st.composite
def v2_configs(draw: st.DrawFn) -> ModelConfig:
    shape = draw(_shapes())
    shape["qk_nope_head_dim"] = draw(st.sampled_from([4, 8, 12]))  # transformers' V2 cannot view an odd one
    method = draw(st.sampled_from(["greedy", "group_limited_greedy"]))
    choosable = shape["n_routed_experts"]
    if method == "group_limited_greedy":
        choosable = choosable // shape["n_group"] * shape["topk_group"]
    return ModelConfig(
        **shape,
        num_experts_per_tok=draw(st.integers(1, min(choosable, 4))),
        scoring_func="softmax",
        topk_method=method,
        norm_topk_prob=False,
        model_type="deepseek_v2",
        inert={"architectures": ["DeepseekV2ForCausalLM"]},
    )
