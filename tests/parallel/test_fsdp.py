"""Weights cut over processes: the same losses and gradients, with less of the model in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dsv3.checkpoint import DeepseekV3
from dsv3.data.stream import open_stream
from dsv3.model.transformer import Block
from dsv3.parallel.fsdp import first_row, local
from dsv3.recipe import Layout, load_recipe
from dsv3.recipe.fields import RecipeError
from dsv3.train.guard import name_the_layer
from dsv3.train.loop import backward
from dsv3.train.run import Run
from dsv3.train.stages import make_run
from dsv3.train.state import Piece
from tests.parallel.processes import run
from tests.train.small_data import write_data, write_recipe

ROWS = 12
# Relative to the largest number of a tensor.
TOLERANCES = {"master": 0.0, "ema": 0.0, "exp_avg": 1e-5, "exp_avg_sq": 2e-5}
LAYOUTS = {
    "data": Layout(data=2, sharding="fsdp"),
    "uneven": Layout(data=3, sharding="fsdp"),  # which divides nothing
    "experts once": Layout(data=4, expert=4, sharding="fsdp"),
    "experts twice": Layout(data=2, context=2, expert=2, sharding="fsdp"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("small") / "data")


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", extend=None, sft=None)


def make(path: Path, changes: dict[str, Any], data: Path) -> tuple[Run, Any]:
    """A run, and this process's rows of a batch."""
    recipe = load_recipe(path, {"optimizer": {"moments": "fp32", "ema": 0.5}} | changes)
    here, phase = make_run(recipe, "pretrain", path.parent), recipe.phases["pretrain"]
    stream = open_stream(data, phase.mixture, 1, phase.sequence_length)
    return here, stream.next(ROWS, slice(None) if here.team is None else here.team.rows(ROWS))


def gradients(path: Path, changes: dict[str, Any], data: Path, init: Path | None = None) -> dict[str, Any]:
    """What a process has of the masters, and of the first moments after a step, which are a tenth of the gradients."""
    here, batch = make(path, changes, data)
    if init is not None:
        here.start_from(init)
    gathered = watched(here)
    backward(here, batch, 1, 0.3)
    losses = backward(here, batch, 2, 0.3)  # gradients of both add up
    norm = here.optimizer.step(0.0, clip=1.0)
    assert norm > 2.0, "gradients are not clipped"
    assert all(p.grad is None for p in here.model.parameters())
    pieces = {
        name: (piece.start, piece.here.numpy())
        for name, piece in here.tensors().items()
        if isinstance(piece, Piece)
    }
    return {
        "numbers": (losses.main, losses.mtp, losses.balance, losses.choices, norm),
        "pieces": pieces,
        "kept": sum(local(p).numel() for p in here.model.parameters()),
        "gathered": max(gathered),
    }


def watched(here: Run) -> list[int]:
    """How many blocks are whole, each time that one begins to run, forward or backward."""
    counts: list[int] = []
    blocks = [module for module in here.model.modules() if isinstance(module, Block)]

    def look(*_: Any) -> None:
        counts.append(sum(not isinstance(b.self_attn.o_proj.weight, DTensor) for b in blocks))

    def after(block: Block, args: Any, out: Tensor) -> None:
        out.register_hook(look)

    for block in blocks:
        block.self_attn.register_forward_pre_hook(look)
        block.register_forward_hook(after)
    return counts


def check(results: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for result in results:
        assert result["numbers"] == pytest.approx(alone["numbers"], rel=1e-5)
        assert result["kept"] < 0.75 * alone["kept"]
        assert result["gathered"] <= 2
    for name, (_, wanted) in alone["pieces"].items():
        got = np.full(wanted.shape, np.nan, dtype=np.float32)
        for result in results:
            if name in result["pieces"]:
                start, part = result["pieces"][name]
                got[start : start + part.size] = part
        bound = TOLERANCES[name.partition(".")[0]] * np.abs(wanted).max()
        assert np.abs(got - wanted).max() <= bound, name


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_those_of_one_process(name: str, data: Path, recipe_file: Path) -> None:
    changes = {"parallel": vars(LAYOUTS[name])}
    check(run(LAYOUTS[name].world, gradients, recipe_file, changes, data), gradients(recipe_file, {}, data))


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_low_precision_with_recomputation(precision: str, data: Path, recipe_file: Path) -> None:
    """A row is computed as in one process, so that sums in float32 are all that differs."""
    changes = {"precision": precision, "recompute": True}
    alone = gradients(recipe_file, changes, data)
    check(run(3, gradients, recipe_file, changes | {"parallel": vars(LAYOUTS["uneven"])}, data), alone)


@pytest.mark.parametrize("name", ["uneven", "experts twice"])
def test_a_checkpoint_is_read_in_parts(name: str, data: Path, recipe_file: Path, tmp_path: Path) -> None:
    model = DeepseekV3(load_recipe(recipe_file).config("pretrain"))
    model.init_weights(77)
    model.save_pretrained(tmp_path / "model", "fp32")
    alone = gradients(recipe_file, {}, data, tmp_path / "model")
    assert np.array_equal(alone["pieces"]["master.norm.weight"][1], model.norm.weight.detach().numpy())
    changes = {"parallel": vars(LAYOUTS[name])}
    check(run(LAYOUTS[name].world, gradients, recipe_file, changes, data, tmp_path / "model"), alone)


def sick(path: Path, changes: dict[str, Any], data: Path, expert: int) -> tuple[str, bool]:
    """What the guard says of an expert of which one process has the weights, and whether this is the one."""
    here, batch = make(path, changes, data)
    stack = here.model.get_parameter("mtp.0.block.mlp.experts.down_proj")
    rows, first = local(stack), first_row(stack)
    mine = first <= expert < first + len(rows)
    if mine:
        rows[expert - first, 0, 0] = torch.nan
    return str(name_the_layer(here.model, lambda: backward(here, batch, 4, 0.3))), mine


def test_sick_weights_are_named_by_the_number_of_the_whole(data: Path, recipe_file: Path) -> None:
    (said, first), (also, second) = run(2, sick, recipe_file, {"parallel": vars(LAYOUTS["data"])}, data, 5)
    assert said == also == "weights of mtp.0.block.mlp.experts.down_proj[5] are not finite"
    assert (first, second) == (False, True)


def test_what_it_does_not_go_with() -> None:
    with pytest.raises(RecipeError, match="sharding is fsdp: it does not go with pipeline 2"):
        Layout(pipeline=2, sharding="fsdp")
