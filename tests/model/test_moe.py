"""The gate's choice and its weights, rule by rule, and the layer against a loop in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.config import PRESETS, ModelConfig
from dsv3.model.layers import FeedForward
from dsv3.model.moe import Gate, MoE, Routing
from tests.model.reference import random_model
from tests.model.strategies import v2_configs, v3_configs

# Eight experts in four groups of two; a token uses two groups and three experts.
V3 = PRESETS["tiny"].replace(routed_scaling_factor=2.5)
V2 = V3.replace(
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    norm_topk_prob=False,
    routed_scaling_factor=16.0,
    model_type="deepseek_v2",
)


def gate(config: ModelConfig, bias: list[float] | None = None, **changes: Any) -> Gate:
    """A gate whose scores are functions of its input alone: the logit of expert i is x[i]."""
    config = config.replace(**changes)
    assert config.n_routed_experts is not None
    made = Gate(config, config.n_routed_experts).requires_grad_(False)
    made.weight.copy_(torch.eye(config.n_routed_experts, config.hidden_size))
    if bias is not None:
        assert made.e_score_correction_bias is not None
        made.e_score_correction_bias.copy_(torch.tensor(bias))
    return made


def logits_of(scores: list[float], config: ModelConfig = V3) -> Tensor:
    """An input [1, hidden] on which a sigmoid gate gives these scores."""
    x = torch.zeros(1, config.hidden_size)
    x[0, : len(scores)] = torch.tensor(scores).logit()
    return x


def chosen(made: Gate, scores: list[float]) -> set[int]:
    return set(made.choose(torch.tensor([scores]))[0].tolist())


# Groups left out ---------------------------------------------------------------------------------------


def masked_with_zero(scores: list[float], bias: list[float]) -> set[int]:
    """The rule of early transformers, for four groups of two of which two are admitted, and three experts."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    ranked = sorted(range(4), key=lambda g: biased[2 * g] + biased[2 * g + 1])
    admitted = ranked[-2:]
    masked = [value if i // 2 in admitted else 0.0 for i, value in enumerate(biased)]
    return set(sorted(range(8), key=lambda i: masked[i])[-3:])


def test_negative_biased_scores_never_let_an_excluded_group_in() -> None:
    """Groups 0 and 1 are admitted. Masked with 0.0, experts of 2 and 3 would beat every one of theirs."""
    scores = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    bias = [-1.0] * 8
    assert masked_with_zero(scores, bias) & {4, 5, 6, 7}
    assert chosen(gate(V3, bias), scores) == {0, 1, 2}


def test_one_negative_score_in_an_admitted_group() -> None:
    """Admitted groups have three positive experts of which two are wanted more than the negative one."""
    scores = [0.9, 0.1, 0.8, 0.1, 0.2, 0.1, 0.1, 0.2]
    bias = [0.0, -0.3, 0.0, -0.2, 0.0, 0.0, 0.0, 0.0]
    assert masked_with_zero(scores, bias) & {4, 5, 6, 7}
    assert chosen(gate(V3, bias), scores) == {0, 2, 3}


@settings(max_examples=60)
@given(
    st.lists(st.floats(0.02, 0.98), min_size=8, max_size=8, unique=True),
    st.lists(st.floats(0.0, 0.9), min_size=8, max_size=8),
)
def test_with_all_scores_positive_both_rules_agree(scores: list[float], bias: list[float]) -> None:
    biased = sorted(s + b for s, b in zip(scores, bias, strict=True))
    sums = sorted(scores[i] + bias[i] + scores[i + 1] + bias[i + 1] for i in (0, 2, 4, 6))
    gaps = [b - a for values in (biased, sums) for a, b in zip(values, values[1:], strict=False)]
    if min(gaps) > 1e-4:  # otherwise rounding decides
        assert chosen(gate(V3, bias), scores) == masked_with_zero(scores, bias)


def test_a_choice_of_all_that_is_admitted() -> None:
    """As many experts as the admitted groups have: with -inf there is no other choice, whatever the scores."""
    made = gate(V3, [-5.0] * 8, num_experts_per_tok=4)
    assert chosen(made, [0.9, 0.1, 0.2, 0.3, 0.1, 0.1, 0.8, 0.1]) == {0, 1, 6, 7}


# Bias, weights, scale ----------------------------------------------------------------------------------


def test_the_bias_chooses_and_does_not_weigh() -> None:
    scores = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    bias = [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    _, indices, weights = gate(V3, bias)(logits_of(scores))
    got = dict(zip(indices[0].tolist(), weights[0].tolist(), strict=True))
    assert got.keys() == {4, 5, 6}
    for expert, weight in got.items():
        assert weight == pytest.approx(scores[expert] / (0.5 + 0.4 + 0.3) * 2.5, rel=1e-5)


def test_groups_are_ranked_by_their_best_two() -> None:
    """Group 0 has the best expert, groups 1 and 2 the best pairs."""
    scores = [0.99, 0.01, 0.6, 0.6, 0.55, 0.55, 0.3, 0.3]
    assert chosen(gate(V3), scores) < {2, 3, 4, 5}


def test_v2_groups_are_ranked_by_their_best_one() -> None:
    scores = [0.40, 0.01, 0.10, 0.09, 0.22, 0.21, 0.43, 0.02]
    assert chosen(gate(V2), scores) == {0, 6, 7}
    assert chosen(gate(V3), scores) == {4, 5, 6}


def test_v2_greedy_knows_no_groups() -> None:
    scores = [0.30, 0.01, 0.25, 0.02, 0.22, 0.03, 0.20, 0.04]
    assert chosen(gate(V2, topk_method="greedy"), scores) == {0, 2, 4}
    assert chosen(gate(V2), scores) == {0, 2, 3}
    assert gate(V2).e_score_correction_bias is None


def test_v2_weights_are_softmax_scores_times_the_scale() -> None:
    x = torch.randn(1, V2.hidden_size)
    scores, indices, weights = gate(V2)(x)
    exact = x[0, :8].double().softmax(0)
    torch.testing.assert_close(scores[0].double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(weights[0].double(), exact[indices[0]] * 16, rtol=1e-5, atol=0)


def test_v2_normalises_or_scales_never_both() -> None:
    _, _, weights = gate(V2, norm_topk_prob=True)(torch.randn(5, V2.hidden_size))
    torch.testing.assert_close(weights.sum(1), torch.ones(5))


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_v3_weights_sum_to_the_scale_even_of_a_single_expert(count: int, scale: float) -> None:
    made = gate(V3, num_experts_per_tok=count, routed_scaling_factor=scale)
    _, indices, weights = made(torch.randn(6, V3.hidden_size))
    assert indices.shape == weights.shape == (6, count)
    torch.testing.assert_close(weights.sum(1), torch.full((6,), scale))


def test_unnormalised_v3_weights_are_scores_times_the_scale() -> None:
    scores, indices, weights = gate(V3, norm_topk_prob=False)(torch.randn(6, V3.hidden_size))
    torch.testing.assert_close(weights, scores.gather(1, indices) * 2.5)


def test_scores_that_vanish_do_not_divide_by_zero() -> None:
    _, _, weights = gate(V3)(torch.full((2, V3.hidden_size), -200.0))
    assert weights.isfinite().all()


def test_gradients_flow_through_weights_and_not_through_the_choice() -> None:
    """The chosen experts' scores are pulled, the others' are not; the bias has no gradient at all."""
    made = gate(V3, [0.1] * 8).requires_grad_()
    x = torch.randn(1, V3.hidden_size)
    scores, indices, weights = made(x)
    (weights * torch.randn(3)).sum().backward()
    assert made.weight.grad is not None
    assert set(made.weight.grad.any(1).nonzero().flatten().tolist()) == set(indices[0].tolist())
    assert scores.requires_grad
    assert "e_score_correction_bias" not in dict(made.named_parameters())


# Precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_bias_is_never_rounded_and_scores_are_float32(dtype: torch.dtype) -> None:
    made = gate(V3, [0.1234567] * 8)
    before = made.e_score_correction_bias
    made = made.to(dtype)
    assert made.weight.dtype == dtype
    bias = made.e_score_correction_bias
    assert bias is not None and before is not None
    assert bias.dtype == torch.float32 and torch.equal(bias, before)
    scores, _, weights = made(torch.randn(2, V3.hidden_size).to(dtype))
    assert scores.dtype == weights.dtype == torch.float32


def test_near_ties_are_decided_in_float32() -> None:
    """Two biases that bfloat16 cannot tell apart, and that bfloat16 would add to nothing."""
    for better, worse in [(0, 1), (1, 0)]:
        bias = [0.0] * 8
        bias[better], bias[worse] = 0.5001, 0.5
        made = gate(V3, bias, num_experts_per_tok=1).to(torch.bfloat16)
        assert made(torch.zeros(1, V3.hidden_size, dtype=torch.bfloat16))[1].item() == better


# Against a loop ----------------------------------------------------------------------------------------


def by_hand(config: ModelConfig, scores: list[float], bias: list[float]) -> dict[int, float]:
    """Weight of each chosen expert of one token."""
    experts, groups = len(scores), config.n_group
    size = experts // groups
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    allowed = list(range(experts))
    if config.topk_method != "greedy":
        best = 2 if config.topk_method == "noaux_tc" else 1
        rank = [sum(sorted(biased[g * size : (g + 1) * size])[-best:]) for g in range(groups)]
        admitted = sorted(range(groups), key=rank.__getitem__)[-config.topk_group :]
        allowed = [e for e in allowed if e // size in admitted]
    picked = sorted(allowed, key=biased.__getitem__)[-config.num_experts_per_tok :]
    total = sum(scores[e] for e in picked) if config.norm_topk_prob else 1.0
    return {e: scores[e] / total * config.routed_scaling_factor for e in picked}


def swiglu(layer: FeedForward, x: Tensor) -> Tensor:
    gate, up = (layer.gate_up_proj.weight.double() @ x).chunk(2)
    return layer.down_proj.weight.double() @ (gate * torch.sigmoid(gate) * up)


def layer_of(config: ModelConfig, seed: int) -> MoE:
    layer = random_model(config.replace(first_k_dense_replace=0, num_hidden_layers=1), seed).layers[0].mlp
    assert isinstance(layer, MoE)
    return layer


@settings(max_examples=80)
@given(config=v3_configs() | v2_configs(), tokens=st.integers(1, 12), seed=st.integers(0, 10_000))
def test_the_layer_is_a_loop_over_tokens_and_experts(config: ModelConfig, tokens: int, seed: int) -> None:
    layer = layer_of(config, seed)
    x = torch.randn(tokens, config.hidden_size, generator=torch.Generator().manual_seed(seed))
    routing: list[Routing] = []
    out = layer(x, routing)
    assert len(routing) == 1
    for token in range(tokens):
        logits = layer.gate.weight.double() @ x[token].double()
        scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(0)
        torch.testing.assert_close(routing[0].scores[token].double(), scores, rtol=1e-4, atol=1e-6)
        bias = layer.gate.e_score_correction_bias
        biases = [0.0] * len(scores) if bias is None else bias.tolist()
        weights = by_hand(config, scores.tolist(), biases)
        assert set(routing[0].indices[token].tolist()) == weights.keys()
        expected = torch.zeros(config.hidden_size, dtype=torch.float64)
        for expert, weight in weights.items():
            one = FeedForward(config.hidden_size, config.moe_intermediate_size).requires_grad_(False)
            one.gate_up_proj.weight.copy_(layer.experts.gate_up_proj[expert])
            one.down_proj.weight.copy_(layer.experts.down_proj[expert])
            expected += weight * swiglu(one, x[token].double())
        if layer.shared_experts is not None:
            expected += swiglu(layer.shared_experts, x[token].double())
        torch.testing.assert_close(out[token].double(), expected, rtol=1e-4, atol=1e-4)


def test_shared_experts_are_one_wide_one() -> None:
    for count, width in [(0, None), (None, None), (1, 32), (3, 96)]:
        layer = layer_of(V3.replace(n_shared_experts=count), seed=0)
        if width is None:
            assert layer.shared_experts is None
        else:
            assert layer.shared_experts is not None
            assert layer.shared_experts.gate_up_proj.weight.shape == (width, V3.hidden_size)


def test_any_leading_shape() -> None:
    layer = layer_of(V3, seed=1)
    x = torch.randn(2, 3, V3.hidden_size)
    routing: list[Routing] = []
    out = layer(x, routing)
    assert out.shape == x.shape
    torch.testing.assert_close(out.flatten(0, 1), layer(x.flatten(0, 1)))
    assert routing[0].scores.shape == (6, 8) and routing[0].indices.shape == (6, 3)
    assert routing[0].layer == layer.layer == 0
