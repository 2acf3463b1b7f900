"""Samples of text in tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3.errors import UserError
from dsv3.text.tokenizer import Tokenizer
from dsv3.text.windows import windows
from tests.text import toy


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_pretrained(toy.save(tmp_path_factory.mktemp("toy")))


def test_the_first_tokens_in_order(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "the quick brown fox " * 50
    (tmp_path / "a.txt").write_text(text)
    ids = tokenizer.encode(text, add_bos=True)
    got = windows(tmp_path / "a.txt", tokenizer, 3, 16)
    assert got.tolist() == [ids[:16], ids[16:32], ids[32:48]]
    few = windows(tmp_path / "a.txt", tokenizer, 10**6, 16)
    assert few.flatten().tolist() == ids[: len(ids) // 16 * 16], "as many as there are"


def test_records_follow_each_other_and_files_share(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["a fox", "a lazy dog", "brown dog"] * 20
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "b.txt").write_text("over the lazy dog " * 40)
    records = [i for text in texts for i in tokenizer.encode(text, add_bos=True)]
    plain = tokenizer.encode("over the lazy dog " * 40, add_bos=True)
    got = windows(tmp_path, tokenizer, 4, 8).tolist()
    assert got == [records[:8], records[8:16], plain[:8], plain[8:16]]


def test_too_little_text_is_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fox")
    with pytest.raises(UserError, match=r"a.txt holds \d+ tokens: give more text"):
        windows(tmp_path / "a.txt", tokenizer, 1, 100)
    with pytest.raises(UserError, match="nowhere"):
        windows(tmp_path / "nowhere", tokenizer, 1, 100)
