"""Pipeline schedules: complete, possible, and the order that others use."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from dsv3.planner.pipeline import Op, Schedule, Slot, cut, make_schedule
from dsv3.recipe.fields import RecipeError
from dsv3.recipe.layout import ScheduleName


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    name: ScheduleName = draw(st.sampled_from(get_args(ScheduleName)))
    devices, chunks = draw(st.integers(1, 9)), 1
    microbatches = draw(st.integers(1, 30))
    if name == "interleaved":
        chunks, microbatches = draw(st.integers(2, 4)), devices * draw(st.integers(1, 4))
    if name == "dualpipe":
        devices *= 2
        microbatches = 2 * (devices + draw(st.integers(0, 9)))
    if name == "dualpipev":
        microbatches += 2 * devices - 1
    return make_schedule(name, devices, microbatches, chunks)


def ops(schedule: Schedule) -> list[tuple[int, Op]]:
    return [(d, op) for d, slots in enumerate(schedule.slots) for slot in slots for op in slot]


@given(schedules())
def test_every_microbatch_goes_once_through_every_stage_each_way(schedule: Schedule) -> None:
    everything = {(s, m) for s in range(schedule.stages) for m in range(schedule.microbatches)}
    done = Counter((op.kind, op.stage, op.microbatch) for _, op in ops(schedule))
    assert set(done.values()) == {1}
    assert {(s, m) for kind, s, m in done if kind == "F"} == everything
    whole, halves, weights = ({(s, m) for k, s, m in done if k == kind} for kind in "BIW")
    assert whole | halves == everything and not whole & halves
    assert halves == weights


@given(schedules())
def test_operations_are_where_their_stage_is(schedule: Schedule) -> None:
    for device, op in ops(schedule):
        assert schedule.device(op.stage, op.microbatch) == device
        assert op.stage in schedule.held(device)
    assert all(len(slots) for slots in schedule.slots)


@given(schedules())
def test_devices_that_go_through_their_lists_never_wait_for_each_other(schedule: Schedule) -> None:
    """Round after round every device does what it can, until all is done."""
    done: set[tuple[str, int, int]] = set()
    places = [0] * schedule.devices

    def can(op: Op) -> bool:
        if op.kind == "F":
            return op.stage == 0 or ("F", op.stage - 1, op.microbatch) in done
        if op.kind == "W":
            return ("I", op.stage, op.microbatch) in done
        last = op.stage == schedule.stages - 1
        return ("F", op.stage, op.microbatch) in done and (last or ("I", op.stage + 1, op.microbatch) in done)

    while True:
        moved = False
        for device, slots in enumerate(schedule.slots):
            while places[device] < len(slots) and all(map(can, slots[places[device]])):
                for op in slots[places[device]]:
                    done.add(("I" if op.kind == "B" else op.kind, op.stage, op.microbatch))
                places[device] += 1
                moved = True
        if not moved:
            break
    assert places == [len(slots) for slots in schedule.slots]


@given(schedules())
def test_only_dualpipe_has_pairs_and_each_is_a_forward_with_another_microbatchs_backward(
    schedule: Schedule,
) -> None:
    pairs = [slot for slots in schedule.slots for slot in slots if len(slot) > 1]
    assert bool(pairs) == schedule.name.startswith("dualpipe")
    for forward, backward in pairs:
        assert (forward.kind, backward.kind) == ("F", "B")
        assert forward.stage != backward.stage
        if schedule.name == "dualpipe":
            assert forward.microbatch != backward.microbatch


def test_the_middle_of_dualpipe_by_hand() -> None:
    """Two devices, four microbatches, as deepseek-ai/DualPipe runs them."""
    schedule = make_schedule("dualpipe", 2, 4)
    assert [" ".join(map(_word, slots)) for slots in schedule.slots] == [
        "F0.0 F1.2 F0.1 B1.2 F1.3+B0.0 B1.3 I0.1 W0.1",
        "F0.2 F1.0 F0.3 B1.0 F1.1+B0.2 B1.1 I0.3 W0.3",
    ]


def _word(slot: Slot) -> str:
    return "+".join(f"{op.kind}{op.stage}.{op.microbatch}" for op in slot)


@pytest.mark.parametrize(("devices", "microbatches"), [(2, 4), (4, 10), (8, 20), (16, 120)])
def test_each_half_of_dualpipe_is_dualpipev(devices: int, microbatches: int) -> None:
    """What way 1 brings is from the other end in one, and has turned in the other; the lists are the same."""
    both = make_schedule("dualpipe", devices, microbatches)
    folded = make_schedule("dualpipev", devices // 2, microbatches // 2)
    assert folded.stages == devices
    half = microbatches // 2
    for device in range(devices):
        place = min(device, devices - 1 - device)
        there = [
            tuple(Op(op.kind, op.stage, op.microbatch % half) for op in slot) for slot in both.slots[device]
        ]
        assert there == list(folded.slots[place])
        halves = {(op.stage, op.microbatch // half) for slot in both.slots[device] for op in slot}
        first = int(
            device != place
        )  # way 0 brings the first half of the microbatches in the first half of devices
        assert halves == {(place, first), (devices - 1 - place, 1 - first)}


def test_one_device_accumulates() -> None:
    (slots,) = make_schedule("1f1b", 1, 3).slots
    assert [_word(slot) for slot in slots] == ["F0.0", "B0.0", "F0.1", "B0.1", "F0.2", "B0.2"]


# ------------------------------------------------------------------------------------- torch's own orders


def _stages(devices: int, each: int) -> list[Any]:
    """What torch's schedules ask of a stage to make their lists; there are no processes."""
    module = torch.nn.Identity()
    stage = {"num_stages": devices * each, "group_size": devices, "group_rank": 0, "submod": module}
    return [SimpleNamespace(stage_index=i, is_last=False, **stage) for i in range(each)]


def _theirs(order: dict[int, list[Any]]) -> list[list[Slot]]:
    return [
        [
            tuple(
                Op(a.computation_type.value, a.stage_index, a.microbatch_index)
                for a in action.sub_actions or (action,)
            )
            for action in order[rank]
            if action is not None and action.is_compute_op
        ]
        for rank in sorted(order)
    ]


def _ours(name: ScheduleName, devices: int, microbatches: int, chunks: int = 1) -> list[list[Slot]]:
    return [list(slots) for slots in make_schedule(name, devices, microbatches, chunks).slots]


@pytest.mark.parametrize(("devices", "microbatches"), [(2, 2), (3, 7), (4, 9), (8, 20)])
def test_1f1b_is_torchs(devices: int, microbatches: int) -> None:
    theirs = _theirs(torch_schedules.Schedule1F1B(_stages(devices, 1)[0], microbatches).pipeline_order)
    ours = _ours("1f1b", devices, microbatches)
    assert ours[:-1] == theirs[:-1]
    # On the last rank the list, which torch does not run, counts forwards from 1: the kinds must do.
    assert [[op.kind for op in slot] for slot in ours[-1]] == [
        [op.kind for op in slot] for slot in theirs[-1]
    ]


@pytest.mark.parametrize(("devices", "microbatches", "chunks"), [(1, 2, 2), (2, 4, 2), (4, 4, 3), (8, 24, 3)])
def test_interleaved_is_torchs(devices: int, microbatches: int, chunks: int) -> None:
    theirs = torch_schedules.ScheduleInterleaved1F1B(_stages(devices, chunks), microbatches)
    assert _ours("interleaved", devices, microbatches, chunks) == _theirs(theirs.pipeline_order)


@pytest.mark.parametrize(("devices", "microbatches"), [(1, 3), (2, 6), (4, 12), (8, 8), (4, 3)])
def test_zb1p_is_torchs_interleaved_zero_bubble_with_one_stage_each(devices: int, microbatches: int) -> None:
    theirs = torch_schedules.ScheduleInterleavedZeroBubble(_stages(devices, 1), microbatches)
    assert _ours("zb1p", devices, microbatches) == _theirs(theirs.pipeline_order)


@pytest.mark.parametrize(("devices", "microbatches"), [(1, 2), (2, 5), (4, 9), (8, 20)])
def test_dualpipev_is_torchs(devices: int, microbatches: int) -> None:
    theirs = torch_schedules.ScheduleDualPipeV(_stages(devices, 2), microbatches)
    assert _ours("dualpipev", devices, microbatches) == _theirs(theirs.pipeline_order)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("name", "devices", "microbatches", "chunks", "said"),
    [
        ("gpipe", 2, 4, 1, r"schedule is 'gpipe': .*1f1b, interleaved, zb1p, dualpipe, dualpipev"),
        ("1f1b", 0, 4, 1, "devices is 0: .*at least 1"),
        ("1f1b", 2, 0, 1, "microbatches is 0: .*at least 1"),
        ("1f1b", 2, 4, 2, "chunks is 2: only the interleaved"),
        ("interleaved", 2, 4, 1, "chunks is 1: .*at least 2"),
        ("interleaved", 4, 6, 2, "microbatches is 6: .*multiple of the 4 devices"),
        ("dualpipe", 3, 6, 1, "devices is 3: .*even"),
        ("dualpipe", 2, 5, 1, "microbatches is 5: .*even"),
        ("dualpipe", 4, 6, 1, "microbatches is 6: .*at least 2 for each device, 8 here"),
        ("dualpipev", 4, 7, 1, "microbatches is 7: .*8 here"),
    ],
)
def test_what_cannot_be_is_refused(
    name: Any, devices: int, microbatches: int, chunks: int, said: str
) -> None:
    with pytest.raises(RecipeError, match=said) as error:
        make_schedule(name, devices, microbatches, chunks)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------- the cut


def test_deepseek_v3_on_16_stages() -> None:
    runs = cut(61, 1, 16)
    assert [len(run) for run in runs] == [3, *[4] * 14, 2]
    assert [layer for run in runs for layer in run] == list(range(61))


@given(st.integers(0, 40), st.integers(0, 2), st.data())
def test_stages_are_runs_that_cover_all_layers(layers: int, modules: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, layers + modules + 2))
    runs = cut(layers, modules, stages)
    assert len(runs) == stages and [layer for run in runs for layer in run] == list(range(layers))
    with pytest.raises(ValueError, match="cannot be cut"):
        cut(layers, modules, layers + modules + 3)
