"""`dsv3 train` in several processes: whatever the layout, it is the same training."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from dsv3.checkpoint import DeepseekV3
from dsv3.recipe import Layout, load_recipe
from dsv3.train.metrics import read_metrics
from dsv3.train.stages import make_run, run_recipe
from dsv3.train.state import Piece
from tests.parallel.processes import run
from tests.train.small_data import write_data, write_recipe

BATCH = 16  # sequences a step: a multiple of what every layout wants


def recipe_file(folder: Path) -> Path:
    """Three steps of pretraining and one of chats, of the smallest model."""
    common = {"batch": BATCH, "microbatch": 2, "lr": 1e-3}
    chats = {"tokens": "1 step", "sequence_length": 150, "max_position_embeddings": 256}
    return write_recipe(
        folder / "recipe.yaml",
        pretrain=common | {"tokens": "3 steps", "gamma": 0.001},
        extend=None,
        sft=common | chats,
    )


def training(path: Path, changes: dict[str, Any], data: Path, out: Path, stage: str | None = None) -> None:
    """What each process does."""
    with (
        patch("dsv3.train.stages.plot_run"),
        patch("dsv3.train.stages.measure_matmul_rate", return_value=1e9),
    ):
        run_recipe(load_recipe(path, changes), data, out, stage)


def losses(out: Path) -> list[float]:
    keys = ("loss", "mtp", "balance", "norm", "load")
    return [
        line[key]
        for phase in ("pretrain", "sft")
        if (out / phase).exists()
        for line in read_metrics(out / phase / "metrics.jsonl")
        for key in keys
    ]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return DeepseekV3.from_pretrained(out / "model", dtype=torch.float32).state_dict()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("small") / "data")


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in one process."""
    folder = tmp_path_factory.mktemp("alone")
    torch.set_num_threads(1)
    training(recipe_file(folder), {}, data, folder / "run")
    return folder / "run"


LAYOUTS = {
    "data": Layout(data=2),
    "experts": Layout(data=4, expert=4, nodes=2),
    "shares of nobody": Layout(data=2, expert=2, sharding="none"),
    "fsdp": Layout(data=2, context=2, expert=2, sharding="fsdp"),
    "context": Layout(data=1, context=2, expert=2),
    "1f1b": Layout(pipeline=2, data=2, expert=2),
    "interleaved": Layout(pipeline=2, schedule="interleaved", chunks=2),
    "zb1p": Layout(pipeline=4, schedule="zb1p"),
    "dualpipe": Layout(pipeline=2, data=2, expert=2, schedule="dualpipe"),
    "dualpipev": Layout(pipeline=2, schedule="dualpipev"),
    "too few for dualpipe": Layout(pipeline=4, data=2, schedule="dualpipe"),
    "all": Layout(pipeline=2, data=2, context=2, expert=4, nodes=2, schedule="dualpipe"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_the_same_model(name: str, alone: Path, data: Path, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    changes = {"parallel": {k: v for k, v in vars(layout).items()}}
    run(layout.world, training, recipe_file(tmp_path), changes, data, tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=2e-4, abs=1e-6)
    got, wanted = weights(tmp_path / "run"), weights(alone)
    for key, tensor in wanted.items():
        torch.testing.assert_close(got[key], tensor, rtol=0.02, atol=2e-3, msg=lambda m, k=key: f"{k}: {m}")


# States ------------------------------------------------------------------------------------------------


def numbers(name: str, start: int, count: int) -> torch.Tensor:
    """What a run of a parameter's numbers is filled with: others for each name and place, exact in bf16."""
    return ((torch.arange(start, start + count) + sum(name.encode())) % 251).float()


def save_or_check(path: Path, changes: dict[str, Any], out: Path, check: bool) -> int:
    run = make_run(load_recipe(path, changes), "pretrain", out)
    tensors = run.tensors()
    if check:
        run.resume()
        assert run.position.step == 7 and run.optimizer.steps == 5
    for name, tensor in tensors.items():
        if isinstance(tensor, Piece):
            here = tensor.here
            expected = numbers(name, tensor.start, here.numel()).to(here.dtype)
        else:
            here, expected = tensor, numbers(name, 0, tensor.numel()).view_as(tensor)
        if check:
            assert torch.equal(here, expected), name
        else:
            here.copy_(expected)
    if not check:
        run.position.step, run.optimizer.steps = 7, 5
        run.save()
        run.save(wait=True)
    masters = (t for name, t in tensors.items() if name.startswith("master.") and isinstance(t, Piece))
    return sum(t.here.numel() for t in masters)


def test_a_state_is_read_by_any_other_layout(tmp_path: Path) -> None:
    """Masters, moments, averages and biases, to the bit; and each process really holds a part of them."""
    path = recipe_file(tmp_path)
    layouts = [LAYOUTS[name] for name in ("experts", "fsdp", "1f1b", "dualpipe", "context")] + [Layout()]
    total = 0
    for i, layout in enumerate([*layouts, layouts[0]]):
        changes = {"parallel": vars(layout), "optimizer": {"ema": 0.9}}
        for check in (True, False) if i else (False,):
            args = path, changes, tmp_path / str(max(0, i - check)), check
            held = run(layout.world, save_or_check, *args) if layout.world > 1 else [save_or_check(*args)]
        total = total or sum(held)
        assert sum(held) == total, "every number has one master"
        assert max(held) <= total / layout.world * 1.7


def test_a_save_that_was_interrupted_leaves_the_one_before(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    save_or_check(path, {}, tmp_path, False)
    broken = tmp_path / "pretrain" / ".state-00000009.partial"
    broken.mkdir()
    (broken / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    save_or_check(path, {}, tmp_path, True)
    run = make_run(load_recipe(path), "pretrain", tmp_path)
    for step in (8, 9, 10):
        run.position.step = step
        run.save(wait=True)
    assert sorted(p.name for p in (tmp_path / "pretrain").iterdir()) == ["state-00000009", "state-00000010"]
