"""Simulated schedules against DeepSeek's table, entry by entry, and by hand."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.planner.pictures import draw_memory, draw_timeline
from dsv3.planner.pipeline import Op, Schedule, make_schedule
from dsv3.planner.simulate import Costs, formula_bubble, peak_activations, simulate
from dsv3.recipe.layout import ScheduleName

SIZES = [(2, 4), (4, 8), (4, 10), (6, 12), (8, 20), (16, 120)]


def _bubble(name: ScheduleName, devices: int, microbatches: int, costs: tuple[float, ...]) -> float:
    forward, inputs, weight, overlapped = costs
    schedule = make_schedule(name, devices, microbatches)
    return max(simulate(schedule, Costs(forward, inputs, weight, overlapped)).bubble)


def _formula(name: ScheduleName, devices: int, costs: tuple[float, ...]) -> float:
    forward, inputs, weight, overlapped = costs
    return formula_bubble(name, devices, forward, inputs + weight, weight, overlapped)


# ------------------------------------------------------------------------------------- the table's bubbles


@pytest.mark.parametrize("costs", [(1, 1, 1, 3), (3, 5, 2, 8), (4, 1, 7, 12)])
@pytest.mark.parametrize(("devices", "microbatches"), [*SIZES, (1, 3), (5, 2), (7, 7)])
def test_1f1b(devices: int, microbatches: int, costs: tuple[float, ...]) -> None:
    forward, inputs, weight, _ = costs
    timeline = simulate(make_schedule("1f1b", devices, microbatches), Costs(forward, inputs, weight))
    bubble = (devices - 1) * (forward + inputs + weight)
    assert timeline.bubble == (bubble,) * devices
    assert bubble == _formula("1f1b", devices, costs)
    assert timeline.makespan == bubble + microbatches * (forward + inputs + weight)


@pytest.mark.parametrize("costs", [(1, 1, 1, 3), (3, 5, 2, 8), (7, 4, 4, 12)])
@pytest.mark.parametrize(("devices", "microbatches"), [*SIZES, (1, 3), (5, 5), (7, 30)])
def test_zb1p(devices: int, microbatches: int, costs: tuple[float, ...]) -> None:
    forward, inputs, weight, _ = costs
    timeline = simulate(make_schedule("zb1p", devices, microbatches), Costs(forward, inputs, weight))
    assert timeline.bubble == (_formula("zb1p", devices, costs),) * devices
    # The zero-bubble paper's own form of it, where B is the input half.
    assert timeline.bubble[0] == (devices - 1) * (forward + inputs - weight)


def test_zb1p_is_held_up_by_weights_longer_than_a_forward() -> None:
    """Not the formula's case: the simulation says more, and is right (a device does W while another waits)."""
    costs = (2, 3, 3, 8)
    assert _bubble("zb1p", 4, 12, costs) == 9 > _formula("zb1p", 4, costs) == 6


@pytest.mark.parametrize("costs", [(1, 1, 1, 3), (4, 4, 3, 11), (4, 4, 3, 9), (4, 4, 3, 7), (5, 5, 1, 10)])
@pytest.mark.parametrize(("devices", "microbatches"), SIZES)
def test_dualpipe_and_dualpipev(devices: int, microbatches: int, costs: tuple[float, ...]) -> None:
    """With F&B as a cost of its own, from all of it hidden (7) to none (11)."""
    bubble = (devices / 2 - 1) * (costs[3] + costs[1] + costs[2] - 3 * costs[2])
    assert _bubble("dualpipe", devices, microbatches, costs) == bubble
    assert _formula("dualpipe", devices, costs) == bubble
    assert _bubble("dualpipev", devices // 2, microbatches // 2, costs) == bubble
    assert _formula("dualpipev", devices // 2, costs) == bubble


@pytest.mark.parametrize("costs", [(4, 3, 3, 9), (5, 4, 2, 10), (6, 2, 1, 6)])
@pytest.mark.parametrize(("devices", "microbatches"), SIZES)
def test_dualpipe_where_forward_and_input_gradients_differ(
    devices: int, microbatches: int, costs: tuple[float, ...]
) -> None:
    """The table's I stands where an F belongs; it takes the two to be equal."""
    forward, _, weight, overlapped = costs
    assert _bubble("dualpipe", devices, microbatches, costs) == (devices / 2 - 1) * (
        overlapped + forward - 2 * weight
    )


def test_dualpipes_outer_devices_work_longer_and_wait_less() -> None:
    """Each pair saves F + B - F&B, and towards the ends there are fewer of them."""
    timeline = simulate(make_schedule("dualpipe", 8, 20), Costs(4, 4, 3, 9))
    saved = 4 + 4 + 3 - 9
    pairs = [sum(len(event.slot) == 2 for event in own) for own in timeline.events]
    assert pairs == [9, 10, 11, 11, 11, 11, 10, 9]
    assert timeline.bubble == tuple(21 - saved * (11 - n) for n in [9, 10, 11, 11, 11, 11, 10, 9])
    assert _formula("dualpipe", 8, (4, 4, 3, 9)) == 21
    assert timeline.idle == pytest.approx(sum(timeline.bubble) / 8 / timeline.makespan)


@pytest.mark.parametrize(
    ("devices", "microbatches", "chunks"), [(2, 4, 2), (4, 8, 2), (4, 4, 4), (8, 24, 3), (3, 6, 5)]
)
def test_interleaved_has_a_bubble_chunks_times_smaller(devices: int, microbatches: int, chunks: int) -> None:
    """F = 6 and B = 14 for all of a device's layers, spread over its stages."""
    thin = [n / chunks for n in (6, 8, 6)]
    timeline = simulate(make_schedule("interleaved", devices, microbatches, chunks), Costs(*thin))
    assert timeline.bubble == pytest.approx([(devices - 1) * (6 + 14) / chunks] * devices)
    assert formula_bubble("interleaved", devices, 6 / chunks, 14 / chunks, 0, 0) == pytest.approx(
        timeline.bubble[0]
    )


# ---------------------------------------------------------------------- the table's memory and parameters


@pytest.mark.parametrize(("devices", "microbatches"), SIZES)
def test_activations(devices: int, microbatches: int) -> None:
    falling = tuple(range(devices, 0, -1))
    one, zero = (make_schedule(name, devices, microbatches) for name in ("1f1b", "zb1p"))
    assert peak_activations(one) == peak_activations(one, "I") == falling
    assert peak_activations(zero) == (devices,) * devices
    assert peak_activations(zero, "I") == falling
    both = make_schedule("dualpipe", devices, microbatches)
    folded = make_schedule("dualpipev", devices // 2, microbatches // 2)
    for schedule in (both, folded):
        assert (
            peak_activations(schedule) == peak_activations(schedule, "I") == (devices + 1,) * schedule.devices
        )
    assert simulate(both, Costs(1, 1, 1)).activations == (devices + 1,) * devices


def test_interleaved_activations_are_megatrons() -> None:
    """Its first device holds more: chunks P + P - 1 thin stages' worth, 1 + (P-1)/(P chunks) times 1F1B's."""
    assert peak_activations(make_schedule("interleaved", 4, 8, 2))[0] == 2 * 4 + 4 - 1


def test_activations_have_the_sizes_of_their_stages() -> None:
    """Two devices, each with both stages: three of the first and two of the last at the worst, or the reverse."""
    assert peak_activations(make_schedule("dualpipe", 2, 4), sizes=[10, 1]) == (21, 21)
    assert peak_activations(make_schedule("1f1b", 2, 4), sizes=[10, 1]) == (20, 1)


def test_parameters() -> None:
    def stages(name: ScheduleName, devices: int, chunks: int = 1) -> tuple[int, ...]:
        return simulate(make_schedule(name, devices, 8, chunks), Costs(1, 1, 1)).stages

    assert stages("1f1b", 4) == stages("zb1p", 4) == (1, 1, 1, 1)
    assert stages("dualpipe", 4) == (2, 2, 2, 2)
    assert stages("dualpipev", 2) == (2, 2)
    assert stages("interleaved", 2, 3) == (3, 3)


# --------------------------------------------------------------------------------------- what time passes


def test_two_devices_by_hand() -> None:
    timeline = simulate(make_schedule("1f1b", 2, 2), Costs(1, [1, 2], 1, transfer=[0.5, 99]))
    assert [
        [(e.slot[0].kind, e.slot[0].microbatch, e.start, e.end) for e in own] for own in timeline.events
    ] == [
        [("F", 0, 0, 1), ("F", 1, 1, 2), ("B", 0, 6, 8), ("B", 1, 10, 12)],
        [("F", 0, 1.5, 2.5), ("B", 0, 2.5, 5.5), ("F", 1, 5.5, 6.5), ("B", 1, 6.5, 9.5)],
    ]
    assert timeline.makespan == 12 and timeline.bubble == (6, 4)


def test_a_pair_of_two_stages_takes_the_mean_and_without_a_cost_the_sum() -> None:
    schedule = make_schedule("dualpipe", 2, 4)

    def pair(costs: Costs) -> float:
        (event,) = (e for e in simulate(schedule, costs).events[0] if len(e.slot) == 2)
        return event.end - event.start

    assert pair(Costs(1, 2, 3, [10, 20])) == 15
    assert pair(Costs([1, 2], [10, 20], [100, 200])) == 2 + 10 + 100  # F of stage 1, B of stage 0


@given(
    st.sampled_from(["1f1b", "zb1p", "dualpipe", "dualpipev"]),
    st.lists(st.floats(0.1, 10), min_size=5, max_size=5),
)
def test_nothing_starts_before_what_it_needs(name: ScheduleName, numbers: list[float]) -> None:
    forward, inputs, weight, overlapped, transfer = numbers
    schedule = make_schedule(name, 4, 10)
    timeline = simulate(schedule, Costs(forward, inputs, weight, overlapped, transfer))
    ends: dict[tuple[str, int, int], tuple[int, float]] = {}
    for own in timeline.events:
        assert all(before.end <= after.start for before, after in pairwise(own))
        for event in own:
            for op in event.slot:
                kind = "I" if op.kind == "B" else op.kind
                ends[kind, op.stage, op.microbatch] = (event.device, event.end)
    for own in timeline.events:
        for event in own:
            for op in event.slot:
                step = {"F": -1, "W": 0}.get(op.kind, 1)
                if not 0 <= op.stage + step < schedule.stages:
                    continue
                device, end = ends["F" if op.kind == "F" else "I", op.stage + step, op.microbatch]
                assert event.start >= end + (transfer if device != event.device else 0)


def test_a_schedule_that_cannot_go_on_says_who_waits_for_what() -> None:
    stuck = Schedule("mine", 2, 2, 2, (((Op("F", 0, 0),), (Op("B", 0, 0),)), ((Op("F", 1, 1),),)))
    with pytest.raises(ValueError, match="schedule mine cannot go on") as error:
        simulate(stuck, Costs(1, 1, 1))
    assert "device 0 waits with its B of microbatch 0 in stage 0 for the I of microbatch 0 in stage 1" in str(
        error.value
    )
    assert "device 1 waits with its F of microbatch 1 in stage 1 for the F of microbatch 1 in stage 0" in str(
        error.value
    )


@pytest.mark.parametrize(
    "slots", [[Op("W", 0, 0), Op("F", 0, 0), Op("I", 0, 0)], [Op("F", 0, 0), Op("W", 0, 0), Op("I", 0, 0)]]
)
def test_weights_wait_for_their_input_half(slots: list[Op]) -> None:
    with pytest.raises(
        ValueError, match=r"device 0 waits with its W .* for the I of microbatch 0 in stage 0"
    ):
        simulate(Schedule("mine", 1, 1, 1, (tuple((op,) for op in slots),)), Costs(1, 1, 1))


def test_costs_must_be_one_per_stage() -> None:
    with pytest.raises(ValueError, match="weight costs of 3 stages: the schedule has 4"):
        simulate(make_schedule("1f1b", 4, 8), Costs(1, 1, [1, 2, 3]))


def test_v3s_own_case_is_quick() -> None:
    """16 devices; 15,360 sequences over 128 data ranks."""
    start = time.perf_counter()
    timeline = simulate(make_schedule("dualpipe", 16, 120), Costs(1, 1.2, 0.8, 2.6))
    assert time.perf_counter() - start < 1.0
    assert sum(len(own) for own in timeline.events) == sum(len(slots) for slots in timeline.schedule.slots)


# ------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize(
    ("name", "devices", "chunks"),
    [("1f1b", 4, 1), ("interleaved", 2, 3), ("zb1p", 4, 1), ("dualpipe", 4, 1), ("dualpipev", 2, 1)],
)
def test_a_timeline_is_drawn_with_all_there_is(
    name: ScheduleName, devices: int, chunks: int, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    timeline = simulate(make_schedule(name, devices, 8, chunks), Costs(1, 1, 1, 2.5))
    draw_timeline(timeline, path := tmp_path / "timeline.svg")
    picture = path.read_text()
    kinds = {op.kind for slots in timeline.schedule.slots for slot in slots for op in slot}
    said = {"F": "forward", "B": "backward, whole", "I": "input gradients", "W": "weight gradients"}
    for kind, words in said.items():
        assert (f"<!-- {words} -->" in picture) == (kind in kinds)
    assert ("run as a pair" in picture) == name.startswith("dualpipe")
    assert ("paler" in picture) == (name not in ("1f1b", "zb1p"))
    assert f"{timeline.idle:.1%} bubble" in picture
    numbers = picture.count("<!-- 7 -->")
    assert numbers >= sum(op.microbatch == 7 for slots in timeline.schedule.slots for s in slots for op in s)


def test_memory_is_drawn_by_part_with_its_limit(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    devices = [{"weights": 30e9, "moments": 20e9}, {"weights": 60e9, "cache": 31e9}]
    draw_memory(devices, path := tmp_path / "memory.svg", limit=80e9)
    picture = path.read_text()
    for words in ("weights", "moments", "cache", "80 GB", "the most is 91 GB, on device 1"):
        assert f"<!-- {words} -->" in picture
    draw_memory([{"weights": 3e6}], path)
    assert "<!-- the most is 3 MB, on device 0 -->" in path.read_text()
