"""Expert loads: counted as the gates decide, over any length of text, in the form that the balancer reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dsv3 import LLM
from dsv3.cli.main import main
from dsv3.errors import UserError
from dsv3.eval import loads
from dsv3.eval.loads import expert_loads
from dsv3.model import Routing
from dsv3.planner.experts import balance, read_loads

LINE = "Once upon a time there was a fox, and the fox was very hungry. \u72d0\u72f8!\n"


@pytest.fixture(scope="module")
def nano() -> LLM:
    return LLM("nano", dtype="fp32")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(LINE * 12 + "The end", encoding="utf-8")
    return path


def test_it_counts_what_the_gates_choose(nano: LLM, text: Path) -> None:
    ids = torch.tensor(nano.tokenizer.encode(text.read_text(encoding="utf-8"), add_bos=True))
    expected: dict[int, torch.Tensor] = {}
    for start in range(0, len(ids), 16):
        routing: list[Routing] = []
        nano.model(ids[None, start : start + 16], routing=routing)
        for layer in routing:
            one_hot = torch.zeros_like(layer.scores).scatter_(1, layer.indices, 1)
            expected[layer.layer] = expected.get(layer.layer, 0) + one_hot.sum(dim=0)
    found = expert_loads(nano, text, window=16)
    assert found.tokens == len(ids) and len(ids) % 16, "the last window is shorter"
    assert found.layers == {layer: count.int().tolist() for layer, count in expected.items()}
    config = nano.model.config
    first = next(iter(found.layers))
    assert sum(found.layers[first]) == len(ids) * config.num_experts_per_tok
    assert sum(found.over_mean(first)) == pytest.approx(config.n_routed_experts)


def test_a_long_file_is_read_in_pieces(nano: LLM, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = expert_loads(nano, text, window=16)
    monkeypatch.setattr(loads, "_PIECE", 100)  # a line or two
    told: list[tuple[int, int]] = []
    pieces = expert_loads(nano, text, 16, lambda done, total: told.append((done, total)))
    assert pieces == whole
    size = text.stat().st_size
    assert len(told) > 5 and told == sorted(told) and told[-1] == (size, size)


def test_the_command(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "nano", "--tasks", "loads", "--dtype", "fp32"]
    picture = tmp_path / "loads.png"
    assert main([*command, "--text", str(text), "--plot", str(picture)]) == 0
    table = capsys.readouterr().out
    assert "busiest expert" in table and "of 16" in table and picture.stat().st_size > 5000
    assert main([*command, "--text", str(text), "--window", "64", "--json"]) == 0
    file = tmp_path / "loads.json"
    file.write_text(capsys.readouterr().out)
    facts = json.loads(file.read_text())["tasks"]["loads"]
    assert facts["text"] == str(text) and facts["window"] == 64
    read = read_loads(file)
    assert [str(layer) for layer in read.layers] == list(facts["layers"])
    assert read.counts.tolist() == list(facts["layers"].values())
    placement = balance(read.counts, devices=8, nodes=2, redundant=8, groups=4)
    assert (placement.balance < placement.balance_before).all()


@pytest.mark.parametrize(
    ("args", "status", "says"),
    [
        ([], 2, "--text"),
        (["--text", "none.txt"], 1, "none.txt cannot be read"),
        (["--text", "empty.txt"], 1, "empty.txt holds no text"),
        (["--text", "bytes.bin"], 1, "bytes.bin is not UTF-8 text"),
        (["--text", "empty.txt", "--window", "1000000"], 1, "--window is 1000000: the model reads"),
    ],
)
def test_what_a_person_can_mend_is_one_line(
    args: list[str],
    status: int,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("bytes.bin").write_bytes(b"ab\xff\xfe")
    assert main(["eval", "nano", "--tasks", "loads", *args]) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dsv3: ") and err.count("\n") == 1 and says in err, err


def test_a_dense_model_is_refused(nano: LLM, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = nano.model.config
    monkeypatch.setattr(nano.model, "config", config.replace(first_k_dense_replace=config.num_hidden_layers))
    with pytest.raises(UserError, match="no routed experts"):
        expert_loads(nano, text)
