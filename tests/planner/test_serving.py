"""Serving: bytes against the architecture's own count, times against hand-made sums, speeds against published ones.

The tolerances of published speeds are stated beside them, and are what docs/planner.md reports as misses.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dsv3.config import PRESETS
from dsv3.errors import UserError
from dsv3.planner.hardware import find_profile
from dsv3.planner.serving import SOURCES, Assumptions, Matrices, plan_serving

V3 = PRESETS["v3-671b"]
H800, H100 = find_profile("h800"), find_profile("h100")
EVEN = Assumptions(balance=1.0, hits=0.0)  # routing as DeepSeek's profile simulates it


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [("v3-671b", 671_026_419_200, 37_552_297_472), ("v3-16b", 15_706_484_224, None)],
)
def test_matrices_are_the_models(preset: str, total: int, active: int | None) -> None:
    """`dsv3 inspect` counts the checkpoint's tensors; we count matrices, so norms and biases are all that is missing."""
    model = Matrices(PRESETS[preset], 0)
    assert model.total == pytest.approx(total, rel=1e-4)
    if active is not None:
        assert model.active + model.head.numel == pytest.approx(active, rel=1e-4), "with the embedding"


def test_units_are_deepseeks() -> None:
    plan = plan_serving(V3, H800)
    assert (plan.prefill.gpus, plan.prefill.nodes, plan.prefill.experts) == (32, 4, 9)
    assert (plan.decode.gpus, plan.decode.nodes, plan.decode.experts) == (144, 18, 2)
    assert plan.prefill.redundant == plan.decode.redundant == 32


def test_the_reports_own_units() -> None:
    """Report, section 3.4: prompts on 32 GPUs, answers on 320 with one expert each."""
    plan = plan_serving(V3, H800, decode_gpus=320, redundant=64, prefill_gpus=32)
    assert (plan.decode.nodes, plan.decode.experts, plan.prefill.experts) == (40, 1, 10)


@pytest.mark.parametrize("gpu", ["a100", "h200", "b200"])
@pytest.mark.parametrize("experts", [256, 384, 60])
def test_units_come_out_even_on_any_gpu(gpu: str, experts: int) -> None:
    config = V3.replace(n_routed_experts=experts, n_group=1, topk_group=1)
    for unit in plan_serving(config, find_profile(gpu), context=1024).units:
        assert unit.experts * unit.gpus == experts + unit.redundant and unit.redundant >= experts // 8


def test_memory_is_that_of_the_weights() -> None:
    plan = plan_serving(V3, H800, assumed=Assumptions(accepted=0.0), redundant=0)
    memory = plan.prefill.memory
    expert = 3 * 7168 * 2048 * (1 + 4 / 128**2)
    assert memory["routed experts"] == pytest.approx(58 * 8 * expert)
    assert memory["embedding, head"] == 2 * 129280 * 7168 * 2
    everything = sum(memory.values()) - memory["reserve"] + 31 * memory["routed experts"]
    assert everything == pytest.approx(673.2e9, rel=2e-3), "FP8 weights as inspect counts them"
    assert plan.prefill.cache == pytest.approx(80e9 - sum(memory.values()))
    assert plan.prefill.cache_tokens == int(plan.prefill.cache // 70_272)


def test_a_gpu_without_fp8_holds_twice_the_bytes() -> None:
    a100 = find_profile("a100")
    wide = plan_serving(V3, a100).decode.memory["routed experts"]
    narrow = plan_serving(V3, H800).decode.memory["routed experts"]
    assert wide / narrow == pytest.approx(2, rel=1e-3)


def test_time_is_compute_and_what_of_travel_is_not_hidden() -> None:
    for unit in plan_serving(V3, H800).units:
        travel, hidden = unit.time["dispatch, combine"], unit.time["hidden by overlap"]
        compute = unit.step - travel - hidden
        assert hidden == pytest.approx(-0.6 * min(compute, travel))
        assert unit.tokens_per_second == pytest.approx(8 * unit.tokens_per_step / unit.step)


def test_attention_over_the_cache_is_bound_by_arithmetic_and_by_bytes() -> None:
    """FlashMLA's analysis: with 128 heads a token reads 1,152 bytes per latent for 278,528 FLOPs."""
    for accepted, queries in ((0.0, 1), (0.85, 2)):
        plan = plan_serving(V3, H800, batch=64, assumed=Assumptions(accepted=accepted))
        layers = 61 + (queries - 1)
        flops = 2 * 128 * (576 + 512) * 4989 * 64 * queries * layers / (989e12 * 0.62)
        read = 4989 * 576 * 2 * 64 * layers / (3.35e12 * 0.9)
        assert plan.decode.time["attention core"] == pytest.approx(max(flops, read))


def test_the_batch_is_the_largest_that_keeps_users_fast_enough() -> None:
    plan = plan_serving(V3, H800, speed=20.0)
    assert plan.decode.tokens_per_user >= 20
    assert plan_serving(V3, H800, batch=plan.decode.batch + 1).decode.tokens_per_user < 20
    slow = plan_serving(V3, H800, speed=0.1).decode
    assert slow.batch == slow.cache_tokens // 4989, "then the cache is the limit"
    assert plan_serving(V3, H800, speed=1e6).decode.batch == 1


def test_guessing_pays() -> None:
    without = plan_serving(V3, H800, batch=64, assumed=Assumptions(accepted=0.0)).decode
    with_mtp = plan_serving(V3, H800, batch=64).decode
    assert 1.0 < with_mtp.tokens_per_user / without.tokens_per_user < 1.85


def test_dollars_follow_from_speed() -> None:
    plan = plan_serving(V3, H800)
    per_node_hour = plan.decode.tokens_per_second * 3600
    assert plan.dollars_per_million_output == pytest.approx(16 / per_node_hour * 1e6)
    assert plan.dollars_per_million_input == pytest.approx(16 / (plan.input_per_second * 3600) * 1e6)


def test_a_small_model_takes_one_gpu_and_sends_nothing() -> None:
    plan = plan_serving(PRESETS["v3-16b"], H100, prompt=2048, context=2048)
    for unit in plan.units:
        assert (unit.gpus, unit.redundant, unit.time["dispatch, combine"]) == (1, 0, 0.0)
        assert unit.tokens_per_second > 0


def test_a_dense_model_is_planned_too() -> None:
    dense = PRESETS["v3-16b"].replace(n_routed_experts=None)
    assert plan_serving(dense, H100, prompt=1024, context=1024).decode.time["routed experts"] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prefill_gpus": 8}, ("8 h800", "80.0 GB", "prefill unit more GPUs")),
        ({"decode_gpus": 100, "redundant": 32}, ("100 GPUs", "decode", "divides 288")),
        ({"gpu": "rtx4090"}, ("rtx4090", "24.0 GB", "GPUs with more memory")),
        ({"batch": 100_000}, ("100000", "661,", "fewer")),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options: dict[str, Any], words: tuple[str, ...]) -> None:
    gpu = H800
    if "gpu" in options:
        gpu = find_profile(options.pop("gpu"))
    with pytest.raises(UserError) as problem:
        plan_serving(V3, gpu, **options)
    assert all(word in str(problem.value) for word in words), problem.value
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("name", ["compute", "overlap", "hits"])
def test_assumptions_are_shares(name: str) -> None:
    with pytest.raises(UserError, match=name):
        dataclasses.replace(Assumptions(), **{name: 1.5})


def test_every_assumption_has_a_source() -> None:
    names = {field.name for field in dataclasses.fields(Assumptions)}
    assert names == SOURCES.keys() and all(SOURCES.values())
    listed = plan_serving(V3, H800).assumptions
    assert {a.name.replace(" ", "_"): a.value for a in listed} == dataclasses.asdict(Assumptions())


# ---------------------------------------- against published speeds


def miss(predicted: float, published: float) -> float:
    return predicted / published - 1


def test_against_deepseeks_profile() -> None:
    """profile-data: balanced routing, prompts of 4K, 16K tokens per GPU: 62,713 tokens/s per node; EP128, 128 answers
    of 4K: 18,598. (Per node as SGLang's blog of 5 May 2025 reckons them.)"""
    plan = plan_serving(
        V3, H800, assumed=EVEN, prefill_gpus=32, decode_gpus=128, redundant=0, batch=128, context=4096
    )
    assert 0 < miss(plan.prefill.tokens_per_second, 62_713) < 0.15
    assert 0 < miss(plan.decode.tokens_per_second, 18_598) < 0.15


def test_against_sglang() -> None:
    """SGLang on 96 H100 (5 May 2025): prefill of 4 nodes, decode of 9 with 256 answers of 2,000 tokens, no MTP."""
    assumed = Assumptions(hits=0.0, accepted=0.0)
    for prompt, published in ((1024, 57_674), (2048, 54_543), (4096, 50_302)):
        plan = plan_serving(
            V3, H100, assumed=assumed, prefill_gpus=32, prompt=prompt, decode_gpus=72, batch=256, context=2000
        )
        assert 0.2 < miss(plan.prefill.tokens_per_second, published) < 0.3
        assert -0.1 < miss(plan.decode.tokens_per_second, 22_282) < 0


def test_against_deepseeks_service() -> None:
    """open-infra-index, day 6: a day's averages, 14.8K tokens/s out per node at 20 to 22 per user, so 88 answers on each
    GPU; 73.7K in, cache hits included. Prefill nodes were not at full load all day: their own profile gives twice as much."""
    plan = plan_serving(V3, H800, batch=88)
    assert 0 < miss(plan.decode.tokens_per_second, 14_800) < 0.15
    assert 20 < plan.decode.tokens_per_user < 25
    assert 0.6 < miss(plan.input_per_second, 73_700) < 0.9
