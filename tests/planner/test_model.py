"""Parameters, FLOPs and bytes agree with those counted from a checkpoint's tensors and in training."""

from __future__ import annotations

import pytest

from dsv3.checkpoint.summary import Summary
from dsv3.config import PRESETS, ModelConfig
from dsv3.planner.model import (
    active_parameters,
    cache_bytes,
    forward_flops,
    layer,
    parameters,
    stages,
    training_flops,
)
from dsv3.train.flops import forward_flops_per_token, model_flops_per_token

V3 = PRESETS["v3-671b"]
SMALL = PRESETS["tiny"]
CONFIGS = {
    **PRESETS,
    "tied": SMALL.replace(tie_word_embeddings=True),
    "biases": SMALL.replace(attention_bias=True),
    "no query rank": SMALL.replace(q_lora_rank=None),
    "dense": SMALL.replace(n_routed_experts=None),
    "every second layer": V3.replace(moe_layer_freq=2, num_nextn_predict_layers=2),
    "greedy": SMALL.replace(topk_method="greedy", num_nextn_predict_layers=0),
}
NAMES = {  # ours, and as a summary calls them
    "embedding": "embedding",
    "attention": "attention",
    "dense": "dense feed-forward",
    "routed experts": "routed experts",
    "shared experts": "shared experts",
    "gate": "router",
    "norms": "norms",
    "head": "head",
    "MTP": "multi-token prediction",
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parameters_are_those_of_a_checkpoint(config: ModelConfig) -> None:
    summary = Summary(config)
    theirs = {part.name: part.total for part in summary.parts}
    ours = {NAMES[name]: count for name, count in parameters(config).items() if count}
    assert ours == theirs
    assert active_parameters(config) == summary.main.active
    assert cache_bytes(config) == summary.cache_per_token()


def test_v3() -> None:
    main = sum(parameters(V3).values()) - parameters(V3)["MTP"]
    assert round(main / 1e9, 2) == 671.03
    assert round(active_parameters(V3) / 1e9, 1) == 37.6
    assert cache_bytes(V3) == 70_272, "70 KB (arXiv 2505.09343, table 1)"
    assert round(training_flops(V3, 4096, mtp=False) / 1e9) == 250, "table 2 there: 250 GFLOP"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("mtp", [False, True])
def test_flops_are_those_that_training_counts(config: ModelConfig, mtp: bool) -> None:
    for seq in (1, 100, 4096):
        parts = forward_flops(config, seq, mtp)
        assert sum(parts.values()) == pytest.approx(forward_flops_per_token(config, seq, mtp), rel=1e-12)
        assert training_flops(config, seq, mtp) == pytest.approx(model_flops_per_token(config, seq, mtp))
        assert (parts["MTP"] > 0) == (mtp and config.num_nextn_predict_layers > 0 and seq > 1)


def test_a_layer_is_a_part_of_the_whole() -> None:
    layers = [layer(V3, i) for i in range(V3.num_hidden_layers)]
    whole = parameters(V3)
    assert sum(each.experts for each in layers) == whole["routed experts"]
    assert sum(each.shared for each in layers) == whole["shared experts"]
    assert layers[0].dense and not layers[0].experts and layers[3].experts and not layers[3].dense
    assert layers[3].chosen * 32 == layers[3].experts, "8 of 256"
    assert layer(V3, 61).experts == layers[3].experts, "the MTP module's block"


def test_stages_hold_every_layer_once() -> None:
    for count in (1, 2, 5, 16, 63):
        cut = stages(V3, count)
        assert sorted(i for stage in cut for i in stage.layers) == list(range(62))
        assert [stage.first for stage in cut] == [True] + [False] * (count - 1)
        assert [stage.last for stage in cut] == [False] * (count - 1) + [True]
        assert [stage.modules for stage in cut] == [0] * (count - 1) + [1]
    without = stages(V3, 16, mtp=False)
    assert without[-1].layers == stages(V3, 16)[-1].layers[:-1] and without[-1].modules == 0
