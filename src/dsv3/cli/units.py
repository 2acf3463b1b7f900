"""Numbers as people write and read them."""

from __future__ import annotations

from typing import Any


def count(n: int) -> str:
    """Parameters as model cards give them: 671.0B."""
    return f"{n / 1e9:,.1f}B" if n >= 1e9 else f"{n / 1e6:,.1f}M" if n >= 1e6 else f"{n:,}"


def number_or_word(text: str) -> Any:
    """An int or the text, for an option that takes numbers and some words: digits are a number, "²" is none."""
    return int(text) if text.isdecimal() else text
