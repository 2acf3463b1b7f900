"""One of several processes is killed, and the run goes on to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from dsv3.train.metrics import read_metrics
from dsv3.train.state import latest
from tests.train.small_data import write_data, write_recipe

LAYOUT = "parallel={pipeline: 2, data: 1, schedule: dualpipe}"


def command(folder: Path, out: str) -> list[str]:
    args = [
        *("train", str(folder / "recipe.yaml"), "--data", str(folder / "data"), "--out", str(folder / out)),
        *("--save-every", "0", "--no-compile", "--device", "cpu", "--nproc", "2", "--set", LAYOUT),
    ]
    return [sys.executable, "-m", "dsv3", *args]


def state(folder: Path) -> dict[str, torch.Tensor]:
    last = latest(folder)
    assert last is not None
    return {f"{path.name} {k}": t for path in last.glob("*.safetensors") for k, t in load_file(path).items()}


def test_a_rank_is_killed_and_the_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    steps = {"tokens": "24 steps", "batch": 8, "microbatch": 2, "lr": 1e-3}
    write_recipe(tmp_path / "recipe.yaml", pretrain=steps, extend=None, sft=None)
    subprocess.run(command(tmp_path, "whole"), check=True, capture_output=True, timeout=240)

    metrics = tmp_path / "killed" / "pretrain" / "metrics.jsonl"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command(tmp_path, "killed"), stdout=log, stderr=log)
        deadline = time.monotonic() + 240
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 6):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
        workers = [
            c for c in psutil.Process(process.pid).children(recursive=True) if c.cmdline()[1:2] == ["-m"]
        ]
        os.kill(workers[-1].pid, signal.SIGKILL)
        assert process.wait(240) == 0
    said = (tmp_path / "log").read_text()
    assert "was killed by SIGKILL" in said and "starting again from the last save (1 of 3 times)" in said
    one, two = (read_metrics(tmp_path / out / "pretrain" / "metrics.jsonl") for out in ("whole", "killed"))
    assert [line["loss"] for line in one] == [line["loss"] for line in two] and len(one) == 24
    whole, killed = state(tmp_path / "whole" / "pretrain"), state(tmp_path / "killed" / "pretrain")
    assert whole.keys() == killed.keys() and all(torch.equal(t, killed[name]) for name, t in whole.items())
