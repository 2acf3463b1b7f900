"""`dsv3 plan`: every question through the entry point, in 80 columns and in JSON. tests/planner checks the numbers."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv3.cli.main import main
from dsv3.config import PRESETS

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SMALL = "--gpu h100 --layout pipeline=4,data=2,expert=2,schedule=dualpipe --batch 64"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run a command line; gives its status, what it printed, and what it complained of."""

    def call(line: str, columns: int = 80) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        status = main(["plan", *shlex.split(line)])
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def facts(run):
    def call(line: str) -> dict[str, Any]:
        status, out, err = run(f"{line} --json")
        assert status == 0, err
        return json.loads(out)

    return call


def rows(out: str, *patterns: str) -> None:
    for pattern in patterns:
        assert re.search(pattern, out), f"{pattern!r} is not in\n{out}"


# ---------------------------------------- serving


@pytest.mark.parametrize("columns", [80, 120])
def test_serving_in_a_terminal(columns: int, run) -> None:
    status, out, _ = run("v3-671b --serve", columns)
    assert status == 0
    rows(
        out,
        r"prefill unit +32 GPUs on 4 nodes, 9 routed experts",
        r"decode unit +144 GPUs on 18 nodes, 2 routed experts",
        r"routed experts +23\.\d GB +5\.\d GB",
        r"in tokens +[\d,]{7} +[\d,]{7}",
        r"dispatch, combine +[\d,.]+ +[\d,.]+",
        r"input +[\d,]+ tokens/s per node \([\d,]+ with the 56% found",
        r"output +[\d,]+ tokens/s per node; 20\.\d per user, one in 49\.\d ms",
        r"price of output +\$0\.\d+ per million tokens",
        r"overlap +0\.6 +SGLang",
        r"kernel +4 us",
    )
    assert max(map(len, out.splitlines())) <= columns


def test_serving_as_json(facts) -> None:
    plan = facts("v3-671b --serve --gpu H100 --units 32,72 --batch 256 --sequence-length 2000")
    assert plan["decode"]["gpus"] == 72 and plan["decode"]["batch"] == 256
    assert plan["decode"]["length"] == plan["prefill"]["length"] == 2000
    assert sum(plan["decode"]["time"].values()) == pytest.approx(plan["decode"]["seconds_per_step"])
    assert {a["name"] for a in plan["assumptions"]} >= {"overlap", "balance"}
    assert all(a["source"] for a in plan["assumptions"])
    assert plan["hardware"]["name"] == "h100" and plan["hardware"]["sources"]["bandwidth"]


def test_nothing_here_needs_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from dsv3.cli.main import main; "
        "sys.exit(main(['plan', 'v3-671b', '--serve', '--json']) or main(['plan', 'nano', '--fit', '--ram', '8GB']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_serving_draws_memory(tmp_path: Path, run) -> None:
    assert run(f"v3-671b --serve --plot {tmp_path / 'a.png'}")[0] == 0
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_hardware_of_ones_own(tmp_path: Path, facts) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("ours:\n  like: h800\n  dollars_per_hour: {value: 1, source: contract}\n")
    half = facts(f"v3-671b --serve --gpu ours --profiles {mine}")
    whole = facts("v3-671b --serve")
    assert half["dollars_per_million_output"] * 2 == pytest.approx(whole["dollars_per_million_output"])


# ---------------------------------------- one machine


@pytest.mark.parametrize("columns", [80, 120])
def test_two_4090s_and_256_gb(columns: int, run) -> None:
    status, out, _ = run("v3-671b --fit --gpu '2x RTX-4090' --ram 256GB", columns)
    assert status == 0
    rows(
        out,
        r"v3-671b on 2 x NVIDIA GeForce RTX 4090, 256\.0 GB of RAM at 89\.6 GB/s",
        r"q4_k_m +404\.4 +[\d.]+ +[\d.]+ +[\d.]+ +32,768",
        r"q2_k_xl +251\.1 +[\d.]+ +[\d.]+ +- +32,768 +\d\.\d",
        r"The largest that stays in memory is q2_k_xl: about \d\.\d tokens/s",
        r"int8 +none that we know splits it so",
        r"dsv3: bf16 in RAM or on one GPU",
        r"overhead +0\.5 ms",
        r"disk +3\.0 GB/s",
    )
    assert max(map(len, out.splitlines())) <= columns


def test_fit_as_json(facts) -> None:
    found = facts("v3-671b --fit --gpu rtx4090 --gpus 2 --ram 256GB --ram-bandwidth 90GB/s")
    assert found["best"] == "q2_k_xl" and found["machine"]["gpus"] == 2
    assert found["machine"]["ram"] == 256e9 and found["machine"]["ram_bandwidth"] == 90e9
    assert len(found["options"]) == 11 and {o["format"] for o in found["options"]} >= {"fp8", "int8", "q8_0"}


def test_fit_of_this_machine(facts) -> None:
    found = facts("nano --fit")
    assert found["machine"]["gpu"] is None and found["machine"]["ram"] > 1e8
    assert found["best"] == "bf16" and found["options"][0]["programs"][0] == "dsv3"


# ---------------------------------------- experts


def loads(path: Path, experts: int) -> Path:
    counts = [1000 // (1 + i) for i in range(experts)]
    path.write_text(json.dumps({"layers": {"3": counts, "4": counts[::-1]}}))
    return path


def test_experts_are_laid_by_their_loads(tmp_path: Path, run, facts) -> None:
    line = f"v3-671b --experts {loads(tmp_path / 'loads.json', 256)} --gpus 32 --nodes 4 --redundant 32"
    status, out, _ = run(line)
    assert status == 0
    rows(
        out,
        r"Experts of v3-671b on 32 GPUs",
        r"Each GPU holds 9 of a layer",
        r"\n3 +\d+\.\d\d +\d\.\d\d +\d+",
        r"mean +\d+\.\d\d +\d\.\d\d",
    )
    found = facts(f"{line} --plot {tmp_path / 'balance.png'}")
    assert (tmp_path / "balance.png").exists()
    assert found["layers"] == [3, 4] and len(found["placement"][0]) == 32
    assert {expert for gpu in found["placement"][0] for expert in gpu} == set(range(256))
    assert all(a < b for a, b in zip(found["balance"], found["balance_before"], strict=True))


# ---------------------------------------- training


@pytest.mark.parametrize("columns", [80, 120])
def test_training_in_a_terminal(columns: int, run) -> None:
    status, out, err = run(f"v3-16b {SMALL} --tokens 1.33T", columns)
    assert status == 0, err
    rows(
        out,
        r"hardware +8 x NVIDIA H100",
        r"layout +pipeline=4, data=2, expert=2, schedule=dualpipe \(as given\)",
        r"step +64 sequences of 4,096 tokens, fp8",
        r"Memory of a GPU",
        r"h100 has 80\.0 GB: ",
        r"Time of a step",
        r"together +[\d.]+",
        r"tokens per second +[\d,]+, [\d,]+ per GPU",
        r"1\.33T tokens +[\d,]+ GPU hours, [\d,.]+ days",
        r"price +\$[\d,]+ at \$2\.99 per GPU hour",
        r"Assumed",
    )
    assert max(map(len, out.splitlines())) <= columns


def test_training_as_json(facts) -> None:
    plan = facts(f"v3-16b {SMALL}")
    assert plan["layout"]["schedule"] == "dualpipe" and len(plan["memory"]) == 4
    assert plan["peak_memory"] == pytest.approx(max(sum(parts.values()) for parts in plan["memory"]))
    assert plan["seconds_per_step"] == pytest.approx(sum(plan["step_time"].values()))
    assert plan["tokens_per_second"] == pytest.approx(64 * 4096 / plan["seconds_per_step"])
    assert plan["gpu_hours"] == pytest.approx(1e12 / plan["tokens_per_second_per_gpu"] / 3600)
    assert 0 < plan["bubble"] < 1 and 0 < plan["mfu"] < 1
    assert all(a["source"] for a in plan["assumptions"])


def test_training_draws_schedule_and_memory(tmp_path: Path, run) -> None:
    assert run(f"v3-16b {SMALL} --plot {tmp_path / 'x.svg'}")[0] == 0
    assert (tmp_path / "x.svg").exists() and (tmp_path / "x-memory.svg").exists()
    status, _, err = run(f"v3-16b --layout data=8,expert=8 --batch 64 --plot {tmp_path / 'y.png'}")
    assert status == 1 and "no schedule to draw" in err and not (tmp_path / "y.png").exists()


def test_without_a_layout_the_best_is_taken(facts) -> None:
    line = "v3-16b --gpu h100 --gpus 8 --batch 64"
    best, all_of_them = facts(line), facts(f"{line} --search")["layouts"]
    assert best["layout"] == all_of_them[0]["layout"] and best["fits"]
    speeds = [found["tokens_per_second"] for found in all_of_them if not found["reason"]]
    assert speeds == sorted(speeds, reverse=True) and best["tokens_per_second"] == pytest.approx(speeds[0])


def test_searching_in_a_terminal(run) -> None:
    status, out, err = run("v3-16b --gpu h100 --gpus 8 --batch 64 --search")
    assert status == 0, err
    rows(out, r"Layouts of v3-16b on 8 h100", r"MFU", r"\d+ of \d+ fit\. 64 sequences of 4,096 tokens, fp8")
    assert max(map(len, out.splitlines())) <= 80


def test_a_recipe_is_planned_phase_by_phase(run, facts) -> None:
    plan = facts(str(RECIPES / "v3-671b.yaml"))
    names = [phase["name"] for phase in plan["phases"]]
    assert names[0] == "pretrain" and plan["phases"][0]["layout"]["pipeline"] == 16
    assert plan["gpu_hours"] == pytest.approx(sum(phase["gpu_hours"] for phase in plan["phases"]))
    assert set(names) | plan["skipped"].keys() == {"pretrain", "extend-1", "extend-2", "sft"}
    status, out, _ = run(str(RECIPES / "v3-671b.yaml"))
    assert status == 0
    rows(
        out,
        r"All phases",
        r"pretrain +14\.8T",
        r"layout +pipeline=16, data=128, expert=64, nodes=8",
    )
    assert max(map(len, out.splitlines())) <= 80


# ---------------------------------------- whose plan


def test_a_config_a_folder_and_a_preset_are_the_same(tmp_path: Path, facts) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["v3-16b"].to_dict()))
    answers = [
        facts(f"{name} --serve --gpu h100")["decode"]
        for name in ("v3-16b", tmp_path, tmp_path / "config.json")
    ]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        ("nope", 1, ("'nope'", "v3-671b", "recipe")),
        ("nope.yaml", 1, ("nope.yaml", "does not exist")),
        ("v3-671b --serve --gpu h900", 1, ("'h900'", "h800")),
        ("v3-671b --serve --fit", 2, ("--serve and --fit", "ask one")),
        ("v3-671b --serve --ram 2GB", 2, ("--ram", "--fit", "leave it out")),
        ("v3-671b --search --tokens 1T", 2, ("--tokens", "training")),
        ("v3-671b --fit --ram lots", 2, ("'lots'", "256GB")),
        ("v3-671b --fit --gpus 2", 2, ("--gpus", "--gpu")),
        ("v3-671b --fit --gpu '2x h100' --gpus 3", 2, ("2x h100", "3", "give one")),
        ("v3-671b --layout pipeline", 2, ("'pipeline'", "KEY=VALUE")),
        ("v3-671b --layout pipeline=²", 2, ("pipeline", "²")),
        ("v3-671b --layout tensor=8", 2, ("'tensor'", "pipeline, data")),
        ("v3-671b --layout pipeline=3,schedule=dualpipe", 2, ("pipeline is 3", "even")),
        ("v3-671b --layout data=8 --gpus 4", 2, ("4", "8 GPUs")),
        ("v3-671b --microbatch 2", 2, ("--microbatch", "--layout")),
        ("v3-671b --precision int4", 2, ("'int4'", "fp8 or bf16")),
        ("v3-671b --tokens many", 1, ("'many'", "14.8T")),
        ("v3-671b --gpus 0", 2, ("0", "at least 1")),
        ("v3-671b --gpus 8 --batch 64", 1, ("layouts fits on 8 h800", "--search")),
        ("v3-671b --serve --units 32", 2, ("'32'", "32,144")),
        ("v3-671b --serve --units 8,144", 1, ("8 h800", "more GPUs")),
        ("v3-671b --serve --plot x.txt", 1, ("x.txt", ".png")),
        ("v3-671b --experts missing.json", 1, ("missing.json",)),
        ("nano --experts LOADS", 1, ("8 experts", "nano has 16")),
        ("v3-671b --profiles missing.yaml --serve", 1, ("missing.yaml", "does not exist")),
        (f"{RECIPES / 'v3-671b.yaml'} --batch 3", 2, ("--batch is 3", "recipe")),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    line: str, status: int, words: tuple[str, ...], tmp_path: Path, run
) -> None:
    code, out, err = run(line.replace("LOADS", str(loads(tmp_path / "loads.json", 8))))
    assert (code, out) == (status, ""), err
    assert err.startswith("dsv3: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
