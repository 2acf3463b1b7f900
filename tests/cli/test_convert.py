"""`dsv3 convert`: the result is a checkpoint that one can go on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3.cli.main import main


def test_there_and_back(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fp8, bf16 = tmp_path / "fp8", tmp_path / "bf16"
    assert main(["convert", str(checkpoint), str(fp8), "--to", "hf-fp8", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == {"out": str(fp8), "format": "hf-fp8", "shards": 1, "bytes": facts["bytes"]}
    assert json.loads((fp8 / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    assert main(["convert", str(fp8), str(bf16), "--to", "hf-bf16"]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {bf16} as hf-bf16: ")
    for folder in (fp8, bf16):
        assert (folder / "tokenizer.json").exists()
        assert main(["chat", str(folder), "-p", "fox", "--max-tokens", "4"]) == 0


def test_a_folder_of_something_else_is_left_alone(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["convert", str(checkpoint), str(tmp_path), "--to", "hf-fp8"]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
