"""Bits per byte: the definition, by hand, and what is said where there is no text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from dsv3 import LLM
from dsv3.cli.main import main
from dsv3.errors import UserError
from dsv3.eval.bits import bits_per_byte

TEXTS = ["One day a fox went out.", "Once upon a time there was a king, and \u72d0\u72f8."]


@pytest.fixture(scope="module")
def nano() -> LLM:
    return LLM("nano", dtype="fp32")


def write(folder: Path) -> Path:
    (folder / "heldout").mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "heldout" / "tales.jsonl").write_text(lines, encoding="utf-8")
    return folder


def test_it_is_the_negative_log_likelihood_over_the_bytes(nano: LLM, tmp_path: Path) -> None:
    ids = [i for text in TEXTS for i in [0, *nano.tokenizer.encode(text), 1]]
    logits = nano.model(torch.tensor([ids[:-1]])).logits[0].detach().log_softmax(-1)
    nats = -sum(float(logits[n, i]) for n, i in enumerate(ids[1:]) if i > 1)
    size = sum(len(text.encode()) for text in TEXTS)
    found = bits_per_byte(nano, write(tmp_path))
    assert found == {"tales": pytest.approx(nats / math.log(2) / size, rel=1e-4)}
    assert bits_per_byte(nano, tmp_path, window=4)["tales"] > found["tales"], (
        "less context predicts less well"
    )


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "nano", "--tasks", "bits-per-byte"]
    picture = tmp_path / "bits.png"
    assert main([*command, "--data", str(write(tmp_path)), "--json", "--plot", str(picture)]) == 0
    facts = json.loads(capsys.readouterr().out)["tasks"]["bits-per-byte"]
    assert 1 < facts["bits_per_byte"]["tales"] < 5 and picture.stat().st_size > 1000
    assert main(command) == 2 and "--data" in capsys.readouterr().err
    assert main([*command, "--data", str(tmp_path / "heldout")]) == 1
    assert "holds no held-out text" in capsys.readouterr().err


def test_no_text_is_said(nano: LLM, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no held-out text"):
        bits_per_byte(nano, tmp_path)
