"""`dsv3 bench`: the same numbers as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3.cli.main import main

QUICK = [
    "bench",
    "nano",
    "--prompt",
    "32",
    "--depths",
    "0,16",
    "--batch",
    "1",
    "--tokens",
    "2",
    "--repeats",
    "2",
]


def test_json_and_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "bench.svg"
    assert main([*QUICK, "--threads", "1", "--json", "--plot", str(picture)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [(r["name"], r["depth"]) for r in facts["results"]] == [
        ("prefill", 32),
        ("decode", 0),
        ("decode", 16),
    ]
    assert facts["threads"] == {"decode": 1, "prefill": 1} and facts["dtype"] in ("bfloat16", "float32")
    assert facts["peak_bytes"] > 1e7 and facts["load_seconds"] > 0
    for result in facts["results"]:
        assert len(result["samples"]) == 2 and result["share"] > 0
        assert result["share"] == pytest.approx(result["tokens_per_second"] / result["roofline"])
        step = result["tokens_per_second"] / (32 if result["name"] == "prefill" else 1)
        reading = result["bytes_per_second"] / step / facts["ceilings"]["bandwidth"]
        assert result["bound_by"] == "arithmetic" or result["share"] == pytest.approx(step * reading)
    assert "<svg" in picture.read_text()


def test_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*QUICK, "--speculation", "1"]) == 0
    out = capsys.readouterr().out
    for text in ("prefill 32", "decode at 16", "of roofline", "bound by", "GB/s", "peak memory"):
        assert text in out, f"{text!r} is not in\n{out}"
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch", "0,x"], "--batch is '0,x'"),
        (["--depths", "1,-1"], "--depths is '1,-1'"),
        (["--depths", "5000"], "context is 2048: lower --depths"),
        (["--plot", "bench.txt"], "bench.txt is no picture's name"),
        (["--speculation", "nine"], "speculation is 'nine'"),
        (["--speculation", "²"], "speculation is '²'"),
    ],
)
def test_what_cannot_be(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "nano", *options]) == 1
    assert words in capsys.readouterr().err
