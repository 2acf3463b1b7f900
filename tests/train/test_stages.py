"""Recipes as they run: every phase from where the one before ended, killed and gone on, to a model that chats."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dsv3.checkpoint import DeepseekV3
from dsv3.errors import UserError
from dsv3.recipe import Recipe, load_recipe
from dsv3.recipe.train import plan
from dsv3.train import stages
from dsv3.train.loop import Loop, backward, train
from dsv3.train.metrics import MetricsLog, read_metrics
from dsv3.train.run import Run
from dsv3.train.stages import Options, make_run, run_recipe
from dsv3.train.state import latest
from tests.train.small_data import write_data, write_recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("small") / "data")


def recipe(folder: Path, **stages: Any) -> Recipe:
    return load_recipe(write_recipe(folder / "recipe.yaml", **stages))


def state_of(out: Path, phase: str) -> dict[str, torch.Tensor]:
    state = latest(out / phase)
    assert state is not None
    (shard,) = state.glob("*.safetensors")
    return load_file(shard)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def open_stream(data: Path, recipe: Recipe, name: str) -> Any:
    from dsv3.data.stream import open_stream as opened

    phase = recipe.phases[name]
    return opened(data, phase.mixture, recipe.seed, phase.sequence_length)


# A whole recipe ----------------------------------------------------------------------------------------


def test_from_tokens_to_a_model_that_chats(data: Path, tmp_path: Path) -> None:
    out, r = tmp_path / "run", recipe(tmp_path)
    folder = run_recipe(r, data, out)
    for phase in ("pretrain", "extend-1", "extend-2", "sft"):
        lines = read_metrics(out / phase / "metrics.jsonl")
        assert lines[-1]["step"] == len(lines) and all(line["dropped"] == 0 for line in lines)
        assert (out / phase / "plots" / "loss.png").stat().st_size > 1000
        report = json.loads((out / phase / "heldout.json").read_text())
        assert all(kinds["words"] > 0 for kinds in report.values())
        assert max(map(int, report)) == r.phases[phase].sequence_length
    losses = [line["loss"] for line in read_metrics(out / "pretrain" / "metrics.jsonl")]
    assert losses[0] == pytest.approx(5.7, abs=0.5) and losses[-1] < 4.5
    config = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == 256 and config["rope_scaling"]["factor"] == 4

    from dsv3 import LLM, SamplingParams

    answer = LLM(folder).chat(
        [{"role": "user", "content": "The fox"}], SamplingParams(max_tokens=8, temperature=0)
    )
    assert answer[0].token_ids if isinstance(answer, list) else answer.token_ids
    before = {
        path: path.read_bytes() for path in out.rglob("*.*") if path.suffix in (".jsonl", ".safetensors")
    }
    (out / "pretrain" / "heldout.json").unlink()  # killed after the last step: the report is still made
    run_recipe(r, data, out)
    assert all(path.read_bytes() == content for path, content in before.items()), "nothing is trained again"
    assert (out / "pretrain" / "heldout.json").exists()


def test_one_stage_at_a_time_is_the_same(data: Path, tmp_path: Path) -> None:
    short = {"pretrain": {"tokens": "4 steps"}, "sft": None}
    run_recipe(recipe(tmp_path, **short), data, tmp_path / "whole")
    for stage in ("pretrain", "extend"):
        run_recipe(recipe(tmp_path, **short), data, tmp_path / "parts", stage)
    assert same(state_of(tmp_path / "whole", "extend-2"), state_of(tmp_path / "parts", "extend-2"))


def test_a_stage_wants_the_one_before(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train the stage before it first"):
        run_recipe(recipe(tmp_path), data, tmp_path / "run", "sft")
    with pytest.raises(UserError, match="no stage 'rl'"):
        run_recipe(recipe(tmp_path), data, tmp_path / "run", "rl")
    half = make_run(recipe(tmp_path), "extend-2", tmp_path / "run")
    half.folder.mkdir(parents=True)
    half.position.planned = 100
    half.save(wait=True)
    with pytest.raises(UserError, match="extend-2 is at 0 of 100 tokens"):
        run_recipe(recipe(tmp_path), data, tmp_path / "run", "sft")
    with pytest.raises(UserError, match="being trained by another process"), stages._locked(tmp_path / "run"):
        run_recipe(recipe(tmp_path), data, tmp_path / "run")


def test_data_of_another_vocabulary_is_refused(data: Path, tmp_path: Path) -> None:
    r = load_recipe(write_recipe(tmp_path / "recipe.yaml"), {"model.vocab_size": 256})
    with pytest.raises(UserError, match="has 300 words, but the model knows 256"):
        run_recipe(r, data, tmp_path / "run")


def test_a_folder_keeps_its_recipe(data: Path, tmp_path: Path) -> None:
    short = {"pretrain": {"tokens": "2 steps"}, "sft": None}
    run_recipe(recipe(tmp_path, **short), data, tmp_path / "run", "pretrain")
    changed = recipe(tmp_path, pretrain={"tokens": "3 steps"}, sft=None)
    with pytest.raises(UserError, match="another stages"):
        run_recipe(changed, data, tmp_path / "run", "pretrain")


def test_positions_are_plain_until_the_context_is_extended(tmp_path: Path) -> None:
    r = recipe(tmp_path)
    assert r.config("pretrain").rope_scaling is None
    assert r.config("pretrain").max_position_embeddings == 32
    yarn = r.config("extend-1").rope_scaling
    assert yarn is not None and yarn.factor == 4 and yarn.original_max_position_embeddings == 32
    assert [r.config(p).max_position_embeddings for p in ("extend-1", "extend-2", "sft")] == [64, 256, 256]
    one, two = (make_run(r, phase, tmp_path).model.rope for phase in ("pretrain", "extend-1"))
    cpu = torch.device("cpu")
    assert not torch.equal(one.frequencies[cpu], two.frequencies[cpu])


# Going on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_stopped_anywhere_and_gone_on_ends_in_the_same_bits(
    stage: str, precision: str, data: Path, tmp_path: Path
) -> None:
    path = write_recipe(
        tmp_path / "recipe.yaml", pretrain={"tokens": "9 steps"}, extend=None, sft={"tokens": "9 steps"}
    )
    changes = {"precision": precision, "optimizer": {"ema": 0.9}, "model.max_position_embeddings": 256}
    r = load_recipe(path, changes)
    schedule = plan(r.phases[stage])

    def run(name: str, stops: list[int]) -> dict[str, torch.Tensor]:
        for stop in [*stops, schedule.tokens]:
            here = make_run(r, stage, tmp_path / name)
            here.folder.mkdir(parents=True, exist_ok=True)
            if here.saved():
                here.resume()
            part = dataclasses.replace(plan(r.phases[stage]), tokens=stop)
            with MetricsLog(here.folder, here.position.step) as log:
                train(Loop(here, part, open_stream(data, r, stage), r.phases[stage].microbatch), log)
        return state_of(tmp_path / name, stage)

    whole = run("whole", [])
    stopped = run("stopped", [1, schedule.tokens // 2, schedule.tokens - 1])
    assert same(whole, stopped)
    keys = ("step", "tokens", "loss", "mtp", "norm", "lr", "batch", "load")
    lines = [
        [{k: line[k] for k in keys} for line in read_metrics(tmp_path / name / stage / "metrics.jsonl")]
        for name in ("whole", "stopped")
    ]
    assert lines[0] == lines[1]


def test_killed_and_gone_on_ends_in_the_same_bits(data: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", pretrain={"tokens": "60 steps"}, extend=None, sft=None)

    def command(out: Path) -> list[str]:
        args = [
            "train",
            str(path),
            "--data",
            str(data),
            "--out",
            str(out),
            "--save-every",
            "0",
            "--no-compile",
        ]
        return [sys.executable, "-m", "dsv3.cli.main", *args, "--device", "cpu"]

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "whole"), check=True, env=environment, capture_output=True)
    metrics = tmp_path / "killed" / "pretrain" / "metrics.jsonl"
    for lines in (5, 30):
        process = subprocess.Popen(
            command(tmp_path / "killed"),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= lines):
            assert process.poll() is None and time.monotonic() < deadline, (
                "it ended before it could be killed"
            )
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert read_metrics(metrics)[-1]["step"] < 60
    subprocess.run(command(tmp_path / "killed"), check=True, env=environment, capture_output=True)
    assert same(state_of(tmp_path / "whole", "pretrain"), state_of(tmp_path / "killed", "pretrain"))
    assert [line["step"] for line in read_metrics(metrics)] == list(range(1, 61))


def test_a_broken_state_is_named(data: Path, tmp_path: Path) -> None:
    r = recipe(tmp_path, pretrain={"tokens": "2 steps"}, extend=None, sft=None)
    run_recipe(r, data, tmp_path / "run")
    state = latest(tmp_path / "run" / "pretrain")
    assert state is not None
    (shard,) = state.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"state-00000002 is broken .*remove it"):
        run_recipe(r, data, tmp_path / "run")


# Steps -------------------------------------------------------------------------------------------------


def test_microbatches_are_one_batch(data: Path, tmp_path: Path) -> None:
    r = recipe(tmp_path)
    batch = open_stream(data, r, "sft").next(5)
    norms = []
    for rows in (5, 2, 1):
        run = make_run(r, "sft", tmp_path)
        losses = backward(run, batch, rows, 0.1)
        norms.append((run.optimizer.norm(), losses.main, losses.mtp, losses.balance))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4) and norms[2] == pytest.approx(norms[0], rel=1e-4)


def test_one_batch_can_be_learned_by_heart(data: Path, tmp_path: Path) -> None:
    r = recipe(tmp_path)
    run: Run = make_run(r, "pretrain", tmp_path)
    batch = open_stream(data, r, "pretrain").next(2)
    first = backward(run, batch, 2, 0.3).main
    for _ in range(150):
        run.optimizer.step(1e-2)
        last = backward(run, batch, 2, 0.3).main
    assert first > 5 and last < 0.2


def test_schedules_reach_the_step(data: Path, tmp_path: Path) -> None:
    r = recipe(tmp_path, extend=None, sft=None)
    run_recipe(r, data, tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "pretrain" / "metrics.jsonl")
    schedule, tokens = plan(r.phases["pretrain"]), 0
    for line in lines:
        assert line["batch"] == schedule.rows(tokens)
        assert line["lr"] == pytest.approx(schedule.lr(tokens)) and line["gamma"] == schedule.gamma(tokens)
        tokens += line["batch"] * 32
        assert line["tokens"] == tokens
    assert {line["batch"] for line in lines} >= {2, 6} and {line["gamma"] for line in lines} == {0.001, 0}
    biases = [
        t for name, t in state_of(tmp_path / "run", "pretrain").items() if "e_score_correction_bias" in name
    ]
    assert len(biases) == 3 and all(b.abs().max() > 0 for b in biases), (
        "the MTP module's experts are balanced too"
    )


def test_a_loss_that_is_no_number_stops_the_run_at_its_last_save(data: Path, tmp_path: Path) -> None:
    r = recipe(tmp_path, pretrain={"lr": 1e20, "tokens": "50 steps"}, extend=None, sft=None)
    with pytest.raises(UserError, match="try a lower lr"):
        run_recipe(r, data, tmp_path / "run")


def test_a_checkpoint_can_be_trained_further(data: Path, tmp_path: Path) -> None:
    r = recipe(tmp_path, pretrain={"tokens": "10 steps"}, extend=None, sft=None)
    folder = run_recipe(r, data, tmp_path / "one")
    DeepseekV3.from_pretrained(folder)
    run_recipe(r, data, tmp_path / "two", options=Options(init=folder))
    with pytest.raises(UserError, match="another init"):
        run_recipe(r, data, tmp_path / "two")
    first = [
        read_metrics(tmp_path / name / "pretrain" / "metrics.jsonl")[0]["loss"] for name in ("one", "two")
    ]
    assert first[1] < first[0] - 0.3


@pytest.mark.parametrize("precision", ["bf16", "fp8", "fp32"])
def test_every_precision_trains(precision: str, data: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", extend=None, sft=None)
    changes = {"precision": precision, "recompute": True, "optimizer": {"ema": 0.9}}
    r = load_recipe(path, changes)
    run_recipe(r, data, tmp_path / "run")
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "pretrain" / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.8
    state = state_of(tmp_path / "run", "pretrain")
    averages = {name: t for name, t in state.items() if name.startswith("ema.")}
    loaded = DeepseekV3.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32).state_dict()
    master = state["master.norm.weight"]
    assert torch.equal(loaded["norm.weight"], master.bfloat16().float()), (
        "the weights are exported, not their average"
    )
    assert averages and any(
        not torch.equal(t, state["master." + n.removeprefix("ema.")]) for n, t in averages.items()
    )
