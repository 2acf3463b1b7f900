"""`dsv3 train` as a person types it: a whole small run, and what is said of mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv3.cli.main import main
from tests.train.small_data import write_data, write_recipe

STAGES = {"pretrain": {"tokens": "3 steps"}, "extend": None, "sft": None}


def test_a_recipe_becomes_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, path = write_data(tmp_path / "data"), write_recipe(tmp_path / "recipe.yaml", **STAGES)
    out = tmp_path / "run"
    command = ["train", str(path), "--data", str(data), "--out", str(out), "--no-compile", "--device", "cpu"]
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "step 1/3" in said and "dropped 0" in said and "bits per byte" in said and "dsv3 chat" in said
    assert (out / "model" / "model.safetensors").exists()
    assert main([*command, "--set", "stages.pretrain.lr=1e-4"]) == 1
    assert "name another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["nowhere.yaml"], 1, "nowhere.yaml does not exist: name a recipe"),
        (["RECIPE", "--stage", "rl"], 1, "no stage 'rl': it has pretrain"),
        (["RECIPE", "--set", "stages.pretrain"], 2, "KEY=VALUE"),
        (["RECIPE", "--set", "stages.rl.lr=1"], 1, "there is no stages.rl to change"),
        (["RECIPE", "--set", "precision=int4"], 1, "precision is 'int4': it must be one of bf16, fp8, fp32"),
        (["RECIPE", "--scale", "0"], 2, "above 0"),
        (["RECIPE", "--init", "nowhere"], 1, "nowhere"),
        (["RECIPE", "--device", "tpu9"], 2, "'tpu9' is not on this machine"),
        (["BROKEN"], 1, "is not valid YAML"),
        (["EMPTY"], 1, "a recipe is a mapping"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "RECIPE": write_recipe(tmp_path / "recipe.yaml", **STAGES),
        "BROKEN": tmp_path / "broken.yaml",
        "EMPTY": tmp_path / "empty.yaml",
    }
    files["BROKEN"].write_text("name: [", encoding="utf-8")
    files["EMPTY"].write_text("", encoding="utf-8")
    data = write_data(tmp_path / "data", documents=30, chats=5)
    named = [str(files[a]) if a in files else a for a in arguments]
    tail = ["--data", str(data), "--out", str(tmp_path / "run"), "--no-compile"]
    assert main(["train", *named, *tail]) == status
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1, said
