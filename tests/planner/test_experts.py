"""Expert load balancing: what every placement must be, and how good it is beside DeepSeek's own balancer."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv3.errors import UserError
from dsv3.planner.experts import Placement, balance, draw_balance, read_loads


def device_loads(placement: Placement, loads: Any) -> Any:
    """[layers, devices], each expert's tokens split evenly among its replicas, one by one; 1 is the mean."""
    loads = np.asarray(loads, dtype=float)
    layers = []
    for slots, layer in zip(placement.slots.tolist(), loads.tolist(), strict=True):
        held = [expert for device in slots for expert in device]
        layers.append([sum(layer[e] / held.count(e) for e in device) for device in slots])
    return np.array(layers) * placement.slots.shape[1] / np.maximum(loads.sum(axis=1, keepdims=True), 1e-300)


def eplb(loads: Any, devices: int, nodes: int, redundant: int, groups: int) -> Any:
    """The busiest device over the mean, per layer, by the algorithm of deepseek-ai/EPLB, written plainly."""

    def pack(weights: list[float], bins: int) -> list[list[int]]:
        packed: list[list[int]] = [[] for _ in range(bins)]
        totals = [0.0] * bins
        for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
            b = min((b for b in range(bins) if len(packed[b]) < len(weights) // bins), key=totals.__getitem__)
            packed[b].append(item)
            totals[b] += weights[item]
        return packed

    if groups % nodes:
        nodes = groups = 1
    worst = []
    for layer in np.asarray(loads, dtype=float):
        size, busiest = len(layer) // groups, 0.0
        for home in pack(layer.reshape(groups, size).sum(axis=1).tolist(), nodes):
            mine = [float(layer[g * size + i]) for g in home for i in range(size)]
            held = list(range(len(mine)))
            while len(held) < (len(layer) + redundant) // nodes:
                held.append(max(range(len(mine)), key=lambda e: mine[e] / held.count(e)))
            shares = [mine[e] / held.count(e) for e in held]
            busiest = max(busiest, *(sum(shares[i] for i in d) for d in pack(shares, devices // nodes)))
        worst.append(busiest * devices / layer.sum())
    return np.array(worst)


def skewed(kind: str, layers: int, experts: int) -> Any:
    rng = np.random.default_rng(7)
    if kind == "zipf":
        return np.stack([rng.permutation(1 / np.arange(1, experts + 1)) for _ in range(layers)])
    return rng.lognormal(0, {"mild": 0.5, "strong": 1.0}[kind], (layers, experts))


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], int, int, int, int]:
    nodes, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    groups = draw(st.integers(1, 6))
    experts = groups * draw(st.integers(1, 5))
    devices = nodes * per_node
    redundant = -experts % devices + devices * draw(st.integers(0, 2))
    count = st.one_of(st.integers(0, 3), st.integers(0, 10**6))
    layer = st.lists(count, min_size=experts, max_size=experts)
    return draw(st.lists(layer, min_size=1, max_size=3)), devices, nodes, redundant, groups


@settings(max_examples=300, deadline=None)
@given(problems())
@example(([[0, 7, 3, 4]], 2, 1, 2, 1))  # in order it is perfect; any replica on another device is worse
def test_every_placement(problem: tuple[list[list[float]], int, int, int, int]) -> None:
    loads, devices, nodes, redundant, groups = problem
    placement = balance(loads, devices, nodes, redundant, groups)
    experts = len(loads[0])
    assert placement.slots.shape == (len(loads), devices, (experts + redundant) // devices)
    for layer in placement.slots:
        assert set(layer.ravel().tolist()) == set(range(experts)), "each expert at least once"
    assert placement.replicas.sum(axis=1).tolist() == [experts + redundant] * len(loads)
    assert placement.hierarchical == (nodes > 1 and groups % nodes == 0)
    if placement.hierarchical:
        group_of = placement.slots // (experts // groups)
        for layer in group_of.reshape(len(loads), nodes, -1):
            homes = [set(node.tolist()) for node in layer]
            assert all(len(home) == groups // nodes for home in homes), homes
            assert sum(map(len, homes)) == len(set.union(*homes)), "no group on two nodes"
    some = np.asarray(loads).sum(axis=1) > 0
    np.testing.assert_allclose(placement.after[some], device_loads(placement, loads)[some], rtol=1e-9)
    np.testing.assert_allclose(placement.after.mean(axis=1), 1, rtol=1e-9)
    assert (placement.balance <= placement.balance_before * (1 + 1e-9)).all()
    assert (balance(loads, devices, nodes, redundant, groups).slots == placement.slots).all()


@pytest.mark.parametrize("kind", ["mild", "strong", "zipf"])
@pytest.mark.parametrize(
    ("devices", "nodes", "redundant"),
    [(32, 4, 32), (32, 4, 0), (64, 8, 64), (16, 2, 32), (96, 12, 32)],
)
def test_it_is_at_least_as_good_as_deepseeks(kind: str, devices: int, nodes: int, redundant: int) -> None:
    loads = skewed(kind, 3, 256)
    ours = balance(loads, devices, nodes, redundant, groups=8)
    theirs = eplb(loads, devices, nodes, redundant, groups=8)
    assert (ours.balance <= theirs * (1 + 1e-9)).all(), (ours.balance, theirs)
    assert (ours.balance < ours.balance_before).all()


@pytest.mark.parametrize(
    ("kind", "devices", "nodes", "redundant", "left"),
    [
        ("mild", 32, 4, 0, 0.5),
        ("mild", 16, 2, 32, 0.4),
        ("strong", 96, 12, 32, 0.7),
        ("zipf", 64, 8, 64, 0.95),
    ],
)
def test_the_search_gains(kind: str, devices: int, nodes: int, redundant: int, left: float) -> None:
    """Of what DeepSeek's balancer leaves above the mean, at most this much is left."""
    loads = skewed(kind, 3, 256)
    ours = balance(loads, devices, nodes, redundant, groups=8).balance - 1
    theirs = eplb(loads, devices, nodes, redundant, groups=8) - 1
    assert ours.mean() < left * theirs.mean(), (ours, theirs)


def test_deepseeks_example() -> None:
    """The example of EPLB's README: 12 experts in 4 groups, 4 redundant ones, 8 devices on 2 nodes."""
    loads = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    theirs = [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    placement = balance(loads, devices=8, nodes=2, redundant=4, groups=4)
    assert placement.hierarchical
    for layer, slots, worst in zip(loads, theirs, placement.balance, strict=True):
        shares = [layer[e] / slots.count(e) for e in slots]
        busiest = max(a + b for a, b in zip(shares[::2], shares[1::2], strict=True))
        assert worst <= busiest * 8 / sum(layer) + 1e-9
        assert eplb([layer], 8, 2, 4, 4)[0] == pytest.approx(busiest * 8 / sum(layer)), "our copy of it"


def test_decoding_in_the_report_is_quick() -> None:
    """58 layers, 256 experts and 64 redundant ones on 320 devices: one in each, the loved ones in several."""
    loads = skewed("strong", 58, 256)
    start = time.process_time()
    placement = balance(loads, devices=320, nodes=40, redundant=64, groups=8)
    assert time.process_time() - start < 5
    assert not placement.hierarchical and placement.slots.shape == (58, 320, 1)
    # One to a device, no placement is better than the replication, and that is best if no replica could be moved:
    shares = placement.loads / placement.replicas
    fewer = placement.loads / np.maximum(placement.replicas - 1, 1e-9)
    assert (fewer.min(axis=1) >= shares.max(axis=1) - 1e-12).all()
    assert placement.balance.mean() < 0.25 * placement.balance_before.mean()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"devices": 0}, "devices is 0: it must be at least 1"),
        ({"devices": 4, "redundant": -4}, "redundant is -4"),
        ({"devices": 4, "nodes": 3}, "nodes is 3: it must divide the 4 devices"),
        ({"devices": 4, "groups": 3}, "groups is 3: it must divide the 8 experts"),
        (
            {"devices": 5},
            "8 experts and 0 redundant ones do not fill 5 devices evenly: take 2 redundant ones",
        ),
        ({"devices": 4, "loads": [1, 2]}, "shape"),
        ({"devices": 1, "loads": [[1, -2]]}, "negative"),
        ({"devices": 1, "loads": [[1, float("nan")]]}, "negative"),
    ],
)
def test_what_does_not_come_out_even_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as problem:
        balance(**({"loads": [[1] * 8]} | arguments))
    assert says in str(problem.value) and "\n" not in str(problem.value)


def test_loads_are_read_as_they_are_and_as_eval_prints_them(tmp_path: Path) -> None:
    loads = {"layers": {"10": [1, 2], "3": [3, 4]}}
    for form in (loads, {"model": "nano", "tasks": {"loads": loads | {"tokens": 5}}}):
        path = tmp_path / "loads.json"
        path.write_text(json.dumps(form))
        read = read_loads(path)
        assert read.layers == (3, 10) and read.counts.tolist() == [[3, 4], [1, 2]]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"layers": {}}', '{"layers": {"a": [1]}}', '{"layers": {"1": [1], "2": [1, 2]}}',
     '{"layers": {"1": 3}}', '{"tasks": {"needle": {}}}', '{"layers": {"1": [-1]}}', '{"tasks": []}'],
)  # fmt: skip
def test_a_file_without_loads_is_told(text: str, tmp_path: Path) -> None:
    path = tmp_path / "loads.json"
    path.write_text(text)
    with pytest.raises(UserError) as problem:
        read_loads(path)
    assert "\n" not in str(problem.value)
    with pytest.raises(UserError, match=r"none\.json cannot be read"):
        read_loads(tmp_path / "none.json")


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    placement = balance(skewed("strong", 3, 64), devices=16, nodes=2, redundant=16, groups=8)
    draw_balance(placement, tmp_path / "balance.svg", "toy")
    drawn = (tmp_path / "balance.svg").read_text()
    assert f"busiest {placement.balance.mean():.2f}" in drawn
    assert f"busiest {placement.balance_before.mean():.2f}" in drawn
