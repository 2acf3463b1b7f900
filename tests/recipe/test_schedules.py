"""Schedules over tokens: the shapes, the units, and the report's own numbers at the points it names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dsv3.recipe.fields import RecipeError, build, number
from dsv3.recipe.train import Phase, Plan, Schedule, plan

V3 = Path(__file__).parents[2] / "recipes" / "v3-671b.yaml"


def phase(**changes: Any) -> Phase:
    values = {"tokens": 1000, "sequence_length": 10, "batch": 2, "lr": 1e-3, "mixture": {"a": 1}}
    return build(Phase, values | changes, "stages.pretrain")


def v3(stage: str, number: int | None = None, **given: Any) -> Plan:
    values = yaml.safe_load(V3.read_text())["stages"][stage]
    return plan(build(Phase, values if number is None else values[number], stage), **given)


def test_the_reports_learning_rate() -> None:
    lr = v3("pretrain").lr
    assert lr(0) == 0
    warm = 2000 * 3072 * 4096  # a little more, as the batch grows meanwhile
    assert lr(warm / 2) == pytest.approx(1.0e-4, rel=0.05) and lr(warm) < lr(warm * 1.2) == 2.2e-4
    assert lr(9.99e12) == 2.2e-4
    assert lr(12.15e12) == pytest.approx((2.2e-4 + 2.2e-5) / 2), "half way down the cosine of 4.3T tokens"
    assert lr(10e12 + 4.3e12 / 4) == pytest.approx(2.2e-5 + 1.98e-4 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert lr(14.31e12) == lr(14.6329e12) == 2.2e-5
    assert lr(14.6331e12) == lr(14.8e12) == 7.3e-6


def test_warm_up_is_2000_steps_of_the_growing_batch() -> None:
    pretrain, tokens = v3("pretrain"), 0
    for step in range(2001):
        if step < 2000:
            assert pretrain.lr(tokens) < 2.2e-4
        tokens += pretrain.rows(tokens) * 4096 if step < 2000 else 0
    assert pretrain.lr(tokens) == 2.2e-4


def test_the_reports_batch_gamma_and_lambda() -> None:
    pretrain = v3("pretrain")
    assert pretrain.tokens == 14_800_000_000_000 and pretrain.sequence_length == 4096
    assert [pretrain.rows(t) for t in (0, 469e9 / 2, 469e9, 14.8e12)] == [3072, 9216, 15360, 15360]
    assert [pretrain.gamma(t) for t in (0, 14.299e12, 14.3e12, 14.8e12)] == [0.001, 0.001, 0, 0]
    assert [pretrain.mtp(t) for t in (0, 9.99e12, 10e12, 14.8e12)] == [0.3, 0.3, 0.1, 0.1]


@pytest.mark.parametrize("index, length, rows", [(0, 32768, 1920), (1, 131072, 480)])
def test_the_reports_context_extension(index: int, length: int, rows: int) -> None:
    extend = v3("extend", index)
    assert extend.tokens == 1000 * rows * length and extend.sequence_length == length
    assert extend.rows(0) == extend.rows(extend.tokens) == rows
    assert extend.lr(0) == extend.lr(extend.tokens) == 7.3e-6
    assert extend.steps_left(0) == 1000


def test_the_reports_chat_tuning_is_two_epochs_of_a_cosine() -> None:
    sft = v3("sft", tokens_per_epoch=10**9)
    assert sft.tokens == 2 * 10**9
    assert sft.lr(0) == 5e-6 and sft.lr(1e9) == pytest.approx(3e-6) and sft.lr(2e9) == 1e-6
    with pytest.raises(RecipeError, match="epochs"):
        v3("sft")


def test_scale_shortens_everything_alike() -> None:
    whole, short = v3("pretrain"), v3("pretrain", scale=1e-3)
    assert short.tokens == whole.tokens // 1000
    for share in (0.0, 0.001, 0.02, 0.3, 0.7, 0.97, 0.999):
        tokens = share * whole.tokens
        for name in ("lr", "batch", "mtp", "gamma"):
            assert getattr(short, name)(tokens / 1000) == pytest.approx(getattr(whole, name)(tokens)), name


def test_pieces_join_where_the_next_begins() -> None:
    schedule = plan(
        phase(
            tokens="100K",
            lr=[{"for": "10K", "linear": [0, 1]}, {"until": 50_000, "constant": 2}, {"cosine": [2, 0]}],
        )
    ).lr
    assert [schedule(t) for t in (0, 5000, 10_000, 49_999, 50_000, 75_000, 100_000, 10**9)] == [
        0, 0.5, 2, 2, 2, pytest.approx(1), 0, 0
    ]  # fmt: skip


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5))
def test_any_schedule_stays_between_its_ends(pieces: list[tuple[int, float, float]]) -> None:
    total = sum(length for length, _, _ in pieces)
    shapes = ["linear", "cosine"]
    lr = [{"for": n, shapes[i % 2]: [a, b]} for i, (n, a, b) in enumerate(pieces)]
    curve = plan(phase(tokens=total, lr=lr)).lr
    at = 0
    for length, start, end in pieces:
        assert curve(at) == pytest.approx(start)
        for share in (0.1, 0.5, 0.9):
            assert min(start, end) - 1e-9 <= curve(at + share * length) <= max(start, end) + 1e-9
        at += length
    assert curve(at) == pytest.approx(pieces[-1][2])


def test_steps_left_counts_down_to_nothing_on_a_ramp() -> None:
    ramp = plan(phase(tokens=20_000, batch=[{"for": 10_000, "linear": [1, 20]}, {"constant": 20}]))
    steps, tokens = 0, 0
    guessed = ramp.steps_left(0)
    while tokens < ramp.tokens:
        tokens += ramp.rows(tokens) * 10
        steps += 1
    assert guessed == pytest.approx(steps, rel=0.15)
    assert ramp.steps_left(tokens) == 0


@pytest.mark.parametrize(
    "text, value",
    [("14.8T", 14.8e12), ("469B", 469e9), ("10e12", 1e13), ("1_000", 1000), ("-2.5K", -2500), (3, 3)],
)
def test_numbers(text: Any, value: float) -> None:
    assert number(text, "x") == pytest.approx(value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lr": "fast"}, "stages.pretrain.lr is 'fast'"),
        ({"lr": []}, "lr is empty"),
        ({"lr": [{"constant": 1}, {"constant": 2}]}, r"lr\[0\] has no end"),
        ({"lr": [{"linear": [1, 2], "cosine": [1, 2]}]}, "one of constant, linear, cosine"),
        ({"lr": [{"linear": 3}]}, r"must be \[from, to\]"),
        ({"lr": [{"for": -3, "constant": 1}]}, "above 0"),
        ({"tokens": True}, "must be a number"),
        ({"sequence_length": 1}, "at least 2"),
        ({"mixture": {}}, "mixture"),
        ({"mixture": {"a": -1}}, "mixture"),
        ({"precision": "int4"}, "one of bf16, fp8, fp32"),
        ({"speed": 3}, "unknown key 'speed'"),
        ({"batch": -4}, "batch falls to -4"),
        ({"lr": [{"linear": [1e-3, -1e-3]}]}, "lr falls to -0.001"),
        ({"lr": 10**400}, "must be a number"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        phase(**changes)


def test_a_plain_number_is_constant() -> None:
    assert Schedule.parse("7.3e-6", "lr") == Schedule.constant(7.3e-6)


def test_steps_of_a_growing_batch_are_its_own() -> None:
    """So many steps of the batch are so many steps taken, whatever it is by then."""
    batch = [{"for": "50 steps", "constant": 2}, {"for": "50 steps", "linear": [2, 8]}, {"constant": 4}]
    ramp = plan(phase(tokens="120 steps", batch=batch))
    rows, tokens = [], 0
    while tokens < ramp.tokens:
        rows.append(ramp.rows(tokens))
        tokens += rows[-1] * 10
    assert len(rows) == pytest.approx(120, abs=2)
    assert rows[:50] == [2] * 50 and set(rows[110:]) == {4} and max(rows) == pytest.approx(8, abs=1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens": "100 steps", "batch": [{"linear": [2, 8]}]}, "steps cannot be counted"),
        ({"batch": [{"until": "5 steps", "constant": 2}, {"constant": 4}]}, "`until` so many steps"),
        (
            {"lr": [{"for": 1000, "constant": 1}, {"until": 500, "constant": 1}, {"constant": 1}]},
            "before it starts",
        ),
    ],
)
def test_schedules_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(phase(**changes))


def test_nothing_is_no_phase() -> None:
    with pytest.raises(RecipeError, match="has no step"):
        plan(phase(), scale=1e-9)
