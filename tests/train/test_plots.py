"""Pictures of a run: they are drawn from any record there may be, and show what is in it."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3.errors import UserError
from dsv3.figures import STYLE
from dsv3.train import plots
from dsv3.train.metrics import FILE, StepMetrics
from dsv3.train.plots import plot_run, plot_schedules

pytest.importorskip("matplotlib")
NAMES = ["loss.png", "schedule.png", "balance.png", "speed.png"]


def record(path: Path, steps: int, **changes: Callable[[int], Any]) -> Path:
    with path.open("w") as file:
        for i in range(1, steps + 1):
            values: dict[str, Any] = {
                "step": i,
                "tokens": 4096 * i,
                "loss": 2 + 6 * math.exp(-i / 20),
                "mtp": 3.0 if 2 * i > steps else None,
                "balance": 2.1,
                "norm": 0.5,
                "lr": 1e-3,
                "batch": 8,
                "load": 1.4,
                "loads": {1: 1.4, 2: 1.2},
                "tokens_per_second": 4800.0,
                "flops_share": 0.3,
                "seconds": float(i),
            }
            values |= {name: change(i) for name, change in changes.items()}
            file.write(StepMetrics(**values).to_json() + "\n")
    return path


def size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG"), f"{path} is no PNG"
    width, height = struct.unpack(">II", head[16:])
    return width, height


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time is pixels."""
    monkeypatch.setitem(STYLE, "savefig.dpi", 40)


@pytest.mark.parametrize("steps", [1, 60])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "loads": lambda i: None,
            "flops_share": lambda i: None,
            "mtp": lambda i: None,
            "dropped": lambda i: 3,
        },
        {"loads": lambda i: {layer: 1.5 for layer in range(3, 61)}, "gamma": lambda i: 0.001},
        {"loss": lambda i: math.nan, "norm": lambda i: math.inf, "lr": lambda i: 0.0},
    ],
)
def test_every_record_gives_four_pictures(steps: int, changes: dict[str, Any], tmp_path: Path) -> None:
    metrics = record(tmp_path / FILE, steps, **changes)
    with metrics.open("a") as file:
        file.write('{"step": 99, "lo')
    written = plot_run(metrics, tmp_path / "plots")
    assert [path.name for path in written] == NAMES
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(NAMES)
    assert all(size(path)[0] > 200 for path in written)


def test_the_same_record_gives_the_same_pictures(tmp_path: Path) -> None:
    metrics = record(tmp_path / FILE, 3)
    one, two = plot_run(metrics, tmp_path / "one"), plot_run(metrics, tmp_path / "two")
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_an_empty_record_is_a_problem_of_the_user(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("")
    with pytest.raises(UserError, match="holds no step"):
        plot_run(tmp_path / FILE, tmp_path / "plots")


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dsv3\[train\]'"):
        plot_run(record(tmp_path / FILE, 3), tmp_path / "plots")


def test_a_plan_is_drawn_before_the_first_step(tmp_path: Path) -> None:
    asked: list[float] = []

    def lr(tokens: float) -> float:
        asked.append(tokens)
        return 2.2e-4 * min(1.0, tokens / 25e9)

    path = plot_schedules([("Learning rate", lr), ("γ", lambda tokens: 0.0)], 14.8e12, tmp_path / "plan.svg")
    assert path.read_text().startswith("<?xml")
    assert min(asked) == 0 and 14.79e12 < max(asked) < 14.8e12
    assert sum(tokens < 25e9 for tokens in asked) > 50, "a warm-up of a thousandth of the run has its slope"


# What the pictures are made of -------------------------------------------------------------------------


def test_an_average_keeps_what_is_constant_and_what_is_missing() -> None:
    values = np.array([math.nan, 2.0, 2.0, math.nan, 2.0])
    np.testing.assert_array_equal(plots._smooth(values), values)


def test_an_average_is_calmer_than_its_values_and_follows_them() -> None:
    rng = np.random.default_rng(0)
    truth = 3 + np.exp(-np.arange(5000) / 800)
    smooth = plots._smooth(truth + rng.normal(0, 0.1, 5000))
    assert np.abs(smooth - truth)[200:].mean() < 0.03


def test_levels_are_where_a_schedule_stands_still() -> None:
    tokens = np.arange(0.0, 11.0)
    values = np.array([0.0, 0.5, 1, 1, 1, 1, 0.3, 0.3, 0.3, 0.1, 0.1])
    assert plots._levels(tokens, values, 2.5) == [(2.0, 6.0, 1.0), (6.0, 9.0, 0.3)]


@pytest.mark.parametrize(
    ("value", "said"),
    [(2.2e-4, "2.2e-4"), (15360.0, "15,360"), (0.3, "0.3"), (0.0, "0"), (0.001, "0.001"), (7.3e-6, "7.3e-6")],
)
def test_values_are_said_as_people_say_them(value: float, said: str) -> None:
    assert plots._exact(value) == said
