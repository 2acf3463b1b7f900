"""Whole recipes: the two that ship, and what is said of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsv3.config import PRESETS
from dsv3.recipe import RecipeError, load_recipe
from tests.train.small_data import RECIPE, write_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def test_the_reports_recipe() -> None:
    recipe = load_recipe(RECIPES / "v3-671b.yaml")
    optimizer = recipe.optimizer
    assert optimizer.betas == (0.9, 0.95) and optimizer.weight_decay == 0.1 and optimizer.clip == 1.0
    assert optimizer.moments == "bf16" and recipe.precision == "fp8" and recipe.recompute
    assert list(recipe.phases) == ["pretrain", "extend-1", "extend-2", "sft"]
    pretrain = recipe.config("pretrain")
    assert pretrain.rope_scaling is None and pretrain.max_position_embeddings == 4096
    assert pretrain.aux_loss_alpha == 1e-4 and pretrain.num_nextn_predict_layers == 1
    yarn = recipe.config("extend-2").rope_scaling
    released = PRESETS["v3-671b"].rope_scaling
    assert yarn == released and recipe.config("extend-2").max_position_embeddings == 131072
    assert recipe.data.fim_rate == 0.1


def test_the_tiny_recipe_reads_what_ships_alone() -> None:
    recipe = load_recipe(RECIPES / "tiny.yaml")
    sources = [source for corpus in recipe.data.corpora.values() for source in corpus.sources]
    assert sources and all(not source.path and source.hub is None for source in sources)


def test_the_recipe_of_nano() -> None:
    recipe = load_recipe(RECIPES / "nano.yaml")
    assert recipe.config("pretrain").rope_scaling is None
    stretched = recipe.config("sft")
    assert stretched.rope_scaling is not None and stretched.max_position_embeddings == 2048
    assert stretched.replace(rope_scaling=None, inert={}) == PRESETS["nano"].replace(inert={})
    assert recipe.export.format == "fp8"


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"stages.pretrain.rope_scaling": {"factor": 0.5, "original_max_position_embeddings": 4}},
            "at least 1",
        ),
        ({"stages.pretrain.rope_scaling": {"factor": 2}}, "original_max_position_embeddings"),
        ({"stages.pretrain.mixture": {"sword": 1}}, "mixture names 'sword': data.corpora has words, talk"),
        ({"stages.pretrain.mixture": {"words": 1, "talk": 1}}, "has text and chats"),
        ({"stages.pretrain.sequence_length": 4096}, "the model's context is 32"),
        ({"stages": {}}, "must map pretrain, extend, sft"),
        ({"stages.pretrain": []}, "stages.pretrain is empty"),
        ({"stages.rl": {}}, "stages has 'rl'"),
        ({"model": "v4"}, "model is 'v4': there are v3-671b"),
        ({"model": ["nano"]}, r"model is \['nano'\]"),
        ({"model.hidden_size": -1}, "hidden_size"),
        ({"model.colour": "red"}, "colour"),
        ({"optimizer": {"clip": 0}}, "above 0"),
        ({"optimizer": {"ema": 1.5}}, "ema is 1.5"),
        ({"optimizer": {"betas": [0.9]}}, "two numbers"),
        ({"optimizer": {"moments": "fp8"}}, "one of bf16, fp32"),
        ({"export": {"average": True}}, "gives no decay"),
        ({"export": {"top_p": 0}}, "top_p"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "whole number"),
        ({"speed": 3}, "unknown key 'speed'"),
        ({"name.first": "x"}, "there is no name.first to change"),
        ({"stages.extend.7.lr": 1}, "there is no stages.extend.7"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path, changes)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["name", "model", "data", "stages"])
def test_what_is_missing_is_named(key: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({name: value for name, value in RECIPE.items() if name != key}))
    with pytest.raises(RecipeError, match=f"{key!r} is missing"):
        load_recipe(path)


@pytest.mark.parametrize("text", ["name: [", "- a", "name: 2024-13-45", "", "\0", "a: " + "9" * 5000])
def test_what_is_no_recipe_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_values_can_be_changed_by_their_keys(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml")
    changed = load_recipe(path, {"stages.extend.1.lr": "2e-4", "model.hidden_size": 64, "seed": 3})
    assert changed.phases["extend-2"].lr.pieces[0].start == 2e-4
    assert changed.model.hidden_size == 64 and changed.seed == 3
