"""`dsv3 inspect`: numbers where they belong, in 80 columns and in JSON. test_summary checks what they are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dsv3.cli.main import main
from dsv3.cli.units import count
from dsv3.errors import size
from dsv3.kernels import native


@pytest.mark.parametrize("columns", [80, 120])
def test_v3_in_a_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["inspect", "v3-671b"]) == 0
    out = capsys.readouterr().out
    for row in (
        r"parameters +671\.0B, 37\.6B of them active per token",
        r"attention +128 heads of 128\+64, values 128; query rank 1536, latent 512\+64",
        r"experts +8 of 256 routed from 4 of 8 groups, 1 shared; width 2,048, sigmoid",
        r"context +163,840 tokens, YaRN x40 from 4,096",
        r"routed experts +653,908,770,816 +20,434,649,088",
        r"main model +671,026,419,200 +37,552,297,472",
        r"as files count them +684,489,845,504",
        r"Weights: in memory without MTP, on disk with it",
        r"bf16 +1,342\.1 GB +1,369\.\d GB +(fits|does not fit)",
        r"fp8 +674\.\d GB +688\.6 GB +(does not fit|made bf16)",
        r"int8 +714\.9 GB +727\.3 GB",
        r"mixed +387\.9 GB +394\.8 GB",
        r"int4 +380\.9 GB +387\.6 GB",
        r"one token +70,272 bytes",
        r"128K tokens +9\.2 GB",
    ):
        assert re.search(row, out), f"{row!r} is not in\n{out}"
    assert max(map(len, out.splitlines())) <= columns


def test_json_has_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "v3-671b", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"]["main"] == {"total": 671_026_419_200, "active": 37_552_297_472}
    assert sum(part["total"] for part in facts["parameters"]["parts"]) == facts["parameters"]["with_mtp"]
    assert facts["cache"] == {"dtype": "bf16", "per_token": 70_272, "at_128k": 70_272 * 131_072}
    assert [w["format"] for w in facts["weights"]] == ["fp32", "bf16", "fp8", "int8", "mixed", "int4"]
    bf16 = next(w for w in facts["weights"] if w["format"] == "bf16")
    assert bf16["memory"] // 2 == pytest.approx(671_026_419_200, rel=1e-6), "without MTP"
    assert bf16["disk"] // 2 == pytest.approx(facts["parameters"]["in_files"], rel=1e-6), "with it"
    runs = {"fp32", "bf16"} | ({"fp8", "int8", "mixed", "int4"} if facts["native_kernels"] else set())
    assert facts["machine"][0]["context"].keys() == runs, "packed weights stay packed where there are kernels"
    assert facts["machine"][0]["name"] == "RAM" and facts["checkpoint"] is None
    assert facts["config"]["num_hidden_layers"] == 61


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setenv("DSV3_NATIVE", "0")
    assert main(["inspect", "tiny"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "native kernels none: DSV3_NATIVE is 0" in shown and "made bf16" in shown
    assert "what that costs nano decodes 8 times slower" in shown
    assert main(["inspect", "tiny", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["native_kernels"] is None
    assert facts["without_native_kernels"]["reason"] == "DSV3_NATIVE is 0"


def test_older_processors_are_told_what_it_costs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for found, words in (
        ("AVX2", "AVX2, without instructions"),
        ("AVX-512 BF16 VNNI", "AVX-512 BF16 VNNI RAM"),
    ):
        monkeypatch.setattr(native, "instructions", lambda found=found: found)
        assert main(["inspect", "tiny"]) == 0
        assert f"native kernels {words}" in " ".join(capsys.readouterr().out.split())


def test_a_checkpoint_tells_what_lies_on_disk(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"checkpoint +bfloat16 \+ float32, [\d.]+ kB, 135 tensors in 1 file", out), out
    assert re.search(r"bf16 .*fits, 512 tokens", out), out
    assert re.search(r"512 tokens +[\d.]+ kB *\n128K tokens +[\d.]+ MB, beyond its context", out), out
    assert main(["inspect", str(checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"]["tensors"] == 135


def test_of_several_gpus_the_roomiest_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    free = {0: 10**9, 1: 80 * 10**9}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda gpu: (free[gpu.index], 90 * 10**9))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda gpu: "NVIDIA H100")
    assert main(["inspect", "v3-16b"]) == 0
    out = capsys.readouterr().out
    assert "80.0 GB of free" in out and "GPU 1" in out and "GPU 0" not in out
    assert re.search(r"fp32 .*fits, 4,096 tokens", out), out
    assert max(map(len, out.splitlines())) <= 80
    assert main(["inspect", "v3-16b", "--json"]) == 0
    machine = json.loads(capsys.readouterr().out)["machine"]
    assert [pool["name"] for pool in machine] == ["RAM", "GPU 0 (NVIDIA H100)", "GPU 1 (NVIDIA H100)"]
    assert machine[1]["context"]["fp32"] is None and machine[2]["context"]["fp32"] == 4096


def test_units() -> None:
    assert [count(n) for n in (59_496, 13_197_776, 671_026_419_200)] == ["59,496", "13.2M", "671.0B"]
    assert [size(n) for n in (999, 1000, 3.2e6, 1.36e12)] == ["999 bytes", "1.0 kB", "3.2 MB", "1,360.0 GB"]
