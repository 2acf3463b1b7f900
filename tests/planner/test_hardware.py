"""Profiles are complete and sourced; own ones are read, and refused in one line where they are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv3.errors import UserError
from dsv3.planner.hardware import find_profile, load_profiles

NUMBERS = {
    "memory", "bandwidth", "bf16_flops", "fp8_flops", "int8_ops", "int4_ops", "nvlink", "network",
    "gpus_per_node", "dollars_per_hour", "sms", "grouped",
}  # fmt: skip


def test_shipped() -> None:
    profiles = load_profiles()
    assert set(profiles) == {"a100", "h100", "h800", "h200", "b200", "rtx4090", "cpu", "server-cpu"}
    for name, hardware in profiles.items():
        assert hardware.name == name and hardware.title
        assert set(hardware.sources) == NUMBERS and all(hardware.sources.values()), name
        assert hardware.memory > 1e9 and hardware.bandwidth > 1e10 and hardware.dollars_per_hour > 0
        assert hardware.network <= hardware.nvlink <= hardware.bandwidth, name
    h800, h100 = profiles["h800"], profiles["h100"]
    assert h800.bf16_flops == h100.bf16_flops and h800.nvlink < h100.nvlink, "what makes a H800 of a H100"
    assert h800.dollars_per_hour == 2.0, "report, table 1"
    assert {name for name, each in profiles.items() if not each.grouped} == {"cpu", "server-cpu"}
    assert profiles["a100"].fp8_flops == 0
    assert profiles["a100"].flops("fp8") == profiles["a100"].bf16_flops, "computed in bf16"
    assert h100.flops("fp8") == 2 * h100.bf16_flops + 1e12 == 1979e12
    assert h100.flops("fp32") == h100.bf16_flops / 2


def test_own_profiles(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        """
mine:
  title: 8 x H100 at our provider
  like: h100
  network: {value: 25e9, source: "200 Gb/s, our contract"}
  gpus_per_node: {value: 4, source: counted}
h800:
  like: mine
  dollars_per_hour: {value: 1, source: cheap}
"""
    )
    profiles = load_profiles(path)
    mine, h100 = profiles["mine"], profiles["h100"]
    assert (mine.network, mine.gpus_per_node, mine.memory) == (25e9, 4, h100.memory)
    assert (
        mine.sources["network"] == "200 Gb/s, our contract"
        and mine.sources["memory"] == h100.sources["memory"]
    )
    assert profiles["h800"].network == 25e9 and profiles["h800"].dollars_per_hour == 1, "own ones come first"
    assert load_profiles()["h800"].network == 50e9, "and leave the shipped ones alone"
    assert find_profile("MINE", path) == mine
    with pytest.raises(UserError, match=r"hardware 'mine' is not known: there are a100, .*server-cpu"):
        find_profile("mine")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "has no profiles"),
        ("[1]", "has no profiles"),
        ("a: {", "is not valid YAML"),
        ("a: 3", "a is 3: it must map memory, bandwidth"),
        ("a: {like: h100, colour: red}", "a has an unknown key 'colour': there are title, like, memory"),
        ("a: {like: tpu}", "a.like is 'tpu': there are a100"),
        ("a: {memory: {value: 1, source: x}}", "a lacks 'bandwidth': give it, or `like` another"),
        (
            "a: {like: h100, memory: 80e9}",
            "a.memory is '80e9': it must be like {value: 80e9, source: data sheet}",
        ),
        (
            "a: {like: h100, memory: {value: much, source: x}}",
            "a.memory.value is 'much': it must be a number",
        ),
        ("a: {like: h100, memory: {value: true, source: x}}", "a.memory.value is True: it must be a number"),
        ("a: {like: h100, memory: {value: 1, source: ''}}", "a.memory.source is '': say where"),
        ("a: {like: h100, memory: {value: 1, source: x, unit: GB}}", "a.memory is "),
        ("a: {like: h100, memory: {value: 0, source: x}}", "a.memory is 0.0: it must be above 0"),
        ("a: {like: h100, memory: {value: .nan, source: x}}", "a.memory is nan: it must be above 0"),
        ("a: {like: h100, network: {value: .inf, source: x}}", "a.network is inf: it must be above 0"),
        ("a: {like: h100, fp8_flops: {value: -1, source: x}}", "a.fp8_flops is -1.0: it must be at least 0"),
        ("a: {like: h100, sms: {value: 1.5, source: x}}", "a.sms is 1.5: it must be a whole number"),
    ],
)
def test_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        load_profiles(path)
    assert message in str(refused.value) and str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_profiles(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_profiles(tmp_path)
