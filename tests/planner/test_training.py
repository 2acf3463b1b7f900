"""The bill of training: DeepSeek's own, Megatron's, and how cost grows with the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from dsv3.config import PRESETS, ModelConfig
from dsv3.planner.hardware import load_profiles
from dsv3.planner.model import forward_flops, parameters, stages
from dsv3.planner.training import TrainingPlan, plan_recipe, plan_training, search
from dsv3.recipe import Layout, RecipeError, load_recipe

V3 = PRESETS["v3-671b"]
RECIPE = Path(__file__).parents[2] / "recipes" / "v3-671b.yaml"
HARDWARE = load_profiles(None)
REPORTS = Layout(pipeline=16, data=128, expert=64, nodes=8, schedule="dualpipe", dispatch="fp8")


def planned(
    layout: Layout = REPORTS, config: ModelConfig = V3, gpu: str = "h800", **changes: object
) -> TrainingPlan:
    options = {"batch": 15360, "precision": "fp8"} | changes
    return plan_training(config, HARDWARE[gpu], layout, **options)  # type: ignore[arg-type]


# The published numbers -----------------------------------------------------------------------------------


def test_the_reports_bill() -> None:
    """Table 1 of the report, from first principles: none of its numbers is an input."""
    whole = plan_recipe(load_recipe(RECIPE), HARDWARE["h800"])
    pretrain = whole.phases[0]
    assert pretrain.name == "pretrain" and pretrain.plan.fits, "in 80 GB"
    assert pretrain.plan.gpu_hours(1e12) == pytest.approx(180e3, rel=0.10)
    assert pretrain.gpu_hours == pytest.approx(2664e3, rel=0.10)
    extensions = [phase for phase in whole.phases if phase.name.startswith("extend")]
    assert all(phase.plan.fits for phase in extensions)
    # How sequences of 128K were laid out is not published; ours (context 8 and 32) comes out a quarter cheaper.
    assert sum(phase.gpu_hours for phase in extensions) == pytest.approx(119e3, rel=0.30)
    assert whole.gpu_hours == pytest.approx(2788e3, rel=0.10)
    assert whole.dollars == pytest.approx(5.576e6, rel=0.10)
    assert set(whole.skipped) == {"sft"}, "how long its epochs are is not known without the data"


def test_megatron_on_1024_h100() -> None:
    """1,297 tokens/s and 338 TFLOP/s per GPU, in bf16 with dispatch hidden behind computing."""
    layout = Layout(pipeline=16, data=64, expert=64, nodes=8, schedule="dualpipe")
    plan = planned(layout, gpu="h100", batch=8192, precision="bf16")
    assert plan.tokens_per_second_per_gpu == pytest.approx(1297, rel=0.10)
    assert plan.flops_per_second == pytest.approx(338e12, rel=0.10)


def test_every_assumption_has_a_source() -> None:
    assumptions = planned().assumptions
    assert len(assumptions) >= 8 and all(a.source for a in assumptions)


def test_the_best_layout_is_the_reports_or_as_good() -> None:
    best = search(V3, HARDWARE["h800"], 2048, batch=15360, precision="fp8")
    assert best[0].plan is not None and best[0].plan.fits
    reports = planned()
    assert best[0].plan.tokens_per_second == pytest.approx(reports.tokens_per_second, rel=0.02)
    assert any("more memory" in c.reason for c in best) and best[-1].plan is None


# The model -----------------------------------------------------------------------------------------------


def test_parameters_and_flops_are_those_counted_elsewhere() -> None:
    from dsv3.checkpoint.summary import summarize
    from dsv3.train.flops import forward_flops_per_token

    summary = summarize("v3-671b")
    counted = parameters(V3)
    assert sum(counted.values()) == pytest.approx(summary.with_mtp, rel=1e-6)
    for config in PRESETS.values():
        for mtp in (False, True):
            ours = sum(forward_flops(config, 512, mtp).values())
            assert ours == pytest.approx(forward_flops_per_token(config, 512, mtp), rel=1e-9)


def test_stages_hold_every_layer_once() -> None:
    for count in (1, 2, 5, 16, 63):
        cut = stages(V3, count)
        assert sorted(i for s in cut for i in s.layers) == list(range(62))
        assert cut[0].first and cut[-1].last and cut[-1].modules == 1


# How cost grows ------------------------------------------------------------------------------------------


def test_memory() -> None:
    plan = planned()
    assert plan.peak_memory == max(sum(parts.values()) for parts in plan.memory) and len(plan.memory) == 16
    alone = planned(dataclasses.replace(REPORTS, sharding="none"))
    for shared, whole in zip(plan.memory, alone.memory, strict=True):
        assert shared["weights"] == whole["weights"]
        assert shared["masters"] < whole["masters"] / 4, "experts lie on 2 x 2 processes, the rest on 256"
    one_way = planned(dataclasses.replace(REPORTS, schedule="zb1p"))
    assert one_way.memory[1]["weights"] < 0.6 * plan.memory[1]["weights"], "one stage instead of two"
    kept = planned(recompute=False)
    assert kept.memory[8]["activations"] > 1.3 * plan.memory[8]["activations"]


def test_more_of_anything_costs_more() -> None:
    base = planned()
    for name, value in (
        ("num_hidden_layers", 77),
        ("moe_intermediate_size", 4096),
        ("num_experts_per_tok", 16),
    ):
        assert planned(config=V3.replace(**{name: value})).seconds_per_step > 1.1 * base.seconds_per_step
    longer = planned(batch=15360 // 4, sequence_length=16384)
    assert longer.tokens_per_step == base.tokens_per_step
    assert longer.step_time["pipeline"] > 1.2 * base.step_time["pipeline"], "attention grows with the square"
    assert planned(batch=7680).timeline.idle > base.timeline.idle  # type: ignore[union-attr]
    hidden, exposed = base, planned(dataclasses.replace(REPORTS, schedule="zb1p"))
    assert exposed.seconds_per_step > 1.3 * hidden.seconds_per_step, "dispatch is not hidden"
    slow = planned(dataclasses.replace(REPORTS, dispatch="bf16"))
    assert slow.traffic["dispatch"]["network"] > 1.9 * base.traffic["dispatch"]["network"]


def test_a_token_crosses_to_few_nodes() -> None:
    free = planned(config=V3.replace(n_group=1, topk_group=1))
    assert planned().traffic["combine"]["network"] < 0.75 * free.traffic["combine"]["network"]


def test_one_process_has_no_traffic() -> None:
    plan = planned(
        Layout(), PRESETS["nano"], "cpu", batch=8, microbatch=2, precision="bf16", sequence_length=512
    )
    assert plan.traffic == {} and plan.timeline is None and plan.fits
    assert list(plan.step_time) == ["microbatches", "update"]


@pytest.mark.parametrize(
    "layout, options, message",
    [
        (REPORTS, {"batch": 1000}, "batch is 1000: with this layout it must be a multiple of 256"),
        (
            dataclasses.replace(REPORTS, nodes=4),
            {},
            "64 GPUs of an expert group are on at least 8 nodes of 8",
        ),
        (Layout(data=96, expert=96), {}, "parallel.expert is 96"),
        (Layout(pipeline=128), {}, "128 stages, but the model has 64 parts"),
    ],
)
def test_what_does_not_go(layout: Layout, options: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        planned(layout, **options)
