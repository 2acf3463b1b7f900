"""`dsv3 convert`: the result is a checkpoint that one can go on with."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3.cli.main import main


def test_there_and_back(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fp8, bf16 = tmp_path / "fp8", tmp_path / "bf16"
    assert main(["convert", str(checkpoint), str(fp8), "--to", "fp8", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == {"out": str(fp8), "format": "fp8", "shards": 1, "bytes": facts["bytes"]}
    assert json.loads((fp8 / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    assert main(["convert", str(fp8), str(bf16), "--to", "bf16"]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {bf16} as bf16: ")
    for folder in (fp8, bf16):
        assert (folder / "tokenizer.json").exists()
        assert main(["chat", str(folder), "-p", "fox", "--max-tokens", "4"]) == 0


def test_integers_calibrated_and_compared(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("the quick brown fox jumps over the lazy dog " * 200)
    command = ["convert", str(checkpoint), str(out), "--to", "int4", "--samples", "3", "--length", "64"]
    assert main([*command, "--json", "--report", str(text)]) == 0
    plain = json.loads(capsys.readouterr().out)["report"]
    assert plain["text"] == str(text) and plain["tokens"] == 3 * 63
    assert plain["divergence"] > 0 and 0 < plain["agreement"] <= 1
    weights = (out / "model.safetensors").read_bytes()
    assert main([*command, "--report", str(text), "--calibrate", str(text), "--zero-points"]) == 0
    shown = capsys.readouterr().out
    assert "Against the source, on 189 tokens" in shown and "divergence, nats per token" in shown
    assert (out / "model.safetensors").read_bytes() != weights
    assert main(["chat", str(out), "-p", "fox", "--max-tokens", "4"]) == 0


def test_flags_that_do_not_apply_are_refused_before_anything_is_read(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("fox " * 500)
    model, out = str(checkpoint), str(tmp_path / "out")
    for to, flags, said in (
        ("bf16", ["--group", "32"], "--group is for integers"),
        ("bf16", ["--group", "0"], "--group is for integers"),
        ("int8", ["--group", "0"], "group is 0: choose 32, 64, 128"),
        ("int8", ["--samples", "4"], "--samples is of a text: give one to --calibrate or --report"),
        ("gguf", ["--length", "64"], "--length is of a text"),
        ("fp8", ["--zero-points"], "--zero-points is for integers"),
        ("fp8", ["--calibrate", str(text)], "--calibrate is for integers"),
        ("gguf", ["--group", "32"], "--group is for integers"),
        ("bf16", ["--ollama"], "--ollama is for GGUF"),
        ("int8", ["--quant", "q8_0"], "--quant is for GGUF"),
        ("int4", ["--group", "48"], "group is 48: choose 32, 64, 128"),
        ("int4", ["--report", str(text), "--length", "99999"], "the model reads 512 tokens at most"),
        ("int4", ["--calibrate", str(tmp_path / "no.txt")], "no.txt"),
    ):
        assert main(["convert", model, out, "--to", to, *flags]) == 1, flags
        assert said in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]


def test_gguf_is_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "nano.gguf"
    assert main(["convert", "nano", str(out), "--to", "gguf"]) == 0
    first, note = capsys.readouterr().out.splitlines()
    assert first.startswith(f"wrote {out} as gguf bf16: ") and first.endswith(" of weights in 1 file")
    assert note.startswith("note: multi-token prediction is block ")
    assert out.read_bytes()[:4] == b"GGUF"
    assert main(["convert", "nano", str(out), "--to", "gguf", "--quant", "q8_0", "--no-mtp", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == {"out": str(out), "format": "gguf", "shards": 1, "bytes": facts["bytes"], "quant": "q8_0"}
    (tmp_path / "text").write_text("Once upon a time there was a fox. " * 20)
    command = [
        "convert",
        str(out),
        str(out),
        "--to",
        "gguf",
        "--quant",
        "q4_0",
        "--report",
        str(tmp_path / "text"),
    ]
    assert main([*command, "--length", "64", "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["report"]["divergence"] < 1
    assert main(["convert", "nano", str(out), "--to", "gguf", "--quant", "q8_0", "--ollama"]) == 0
    capsys.readouterr()
    assert main(["chat", str(out), "-p", "fox", "--max-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert main(["inspect", str(out)]) == 0
    assert "Q8_0 + F32" in capsys.readouterr().out
    assert main(["convert", "nano", str(tmp_path), "--to", "gguf"]) == 1
    assert "is a folder: name a file" in capsys.readouterr().err
    assert main(["convert", "nano", str(tmp_path / "hf"), "--to", "bf16", "--no-mtp"]) == 1
    assert "--no-mtp is for GGUF" in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"nano.gguf", "nano.Modelfile", "text"}


def test_a_folder_of_something_else_is_left_alone(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["convert", str(checkpoint), str(tmp_path), "--to", "fp8"]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_tilde_that_the_shell_left_is_the_home_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["convert", str(checkpoint), "~/out", "--to", "fp8"]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {tmp_path / 'out'} as fp8")


def test_an_interruption_leaves_nothing_and_says_so(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("dsv3.checkpoint.convert"), "write_weights", interrupted)
    assert main(["convert", str(checkpoint), str(tmp_path / "out"), "--to", "fp8"]) == 130
    assert capsys.readouterr() == ("", "dsv3: interrupted: nothing was written\n")
    assert list(tmp_path.iterdir()) == []


TERMINATED = """
import importlib, os, signal, sys
from dsv3.cli.main import main

def write_weights(folder, *_):
    (folder / "model.safetensors").write_text("half")
    os.kill(os.getpid(), signal.SIGTERM)

importlib.import_module("dsv3.checkpoint.convert").write_weights = write_weights
sys.exit(main(["convert", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("to", ["fp8", "mixed"])
def test_a_termination_leaves_nothing(to: str, checkpoint: Path, tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    command = [sys.executable, "-c", TERMINATED, str(checkpoint), str(tmp_path / "out"), "--to", to]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "")
    assert list(tmp_path.iterdir()) == []
