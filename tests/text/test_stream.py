"""Streams of text: whole characters only, nothing lost, nothing late, and the same cost for every token."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dsv3.text import StreamDecoder, Tokenizer
from tests.text.toy import BOS, EOS, train

TOKENIZER = Tokenizer(train(), {"bos_token": BOS, "eos_token": EOS})
SIZE = TOKENIZER.vocab_size

# Text with everything that takes more than one byte, or more than one code point, to show one character.
hard_text = st.text(
    st.one_of(
        st.characters(codec="utf-8"),
        st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF),
        st.characters(min_codepoint=0x1F300, max_codepoint=0x1FAFF),
        st.sampled_from("\u200d\ufe0f\u0301\u0308\ufffd🇫🇷"),
    )
)


def stream(ids: list[int], **kwargs: bool) -> list[str]:
    decoder = TOKENIZER.stream(**kwargs)
    return [*map(decoder.push, ids), decoder.flush()]


@given(hard_text)
@example("👩‍👩‍👧‍👦 e\u0301 从前🦊 \ufffd")
def test_valid_text_streams_in_whole_characters(text: str) -> None:
    pieces = stream(TOKENIZER.encode(text, allow_special=False))
    assert "".join(pieces) == text
    assert pieces[-1] == "", "nothing is left for the flush"
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd"), "no piece is a broken character"


@given(st.lists(st.integers(0, SIZE + 3)), st.booleans())
def test_any_ids_stream_to_what_decode_gives(ids: list[int], skip: bool) -> None:
    pieces = stream(ids, skip_special_tokens=skip)
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=skip)


@given(st.binary(max_size=40))
@example(b"\xf0\x9f\xa6\x8a\xf0\x9f")
@example(b"\xe4\xb8\xe4\xb8\xad\x80\xff\xed\xa0\x80\xf4\x90\x80\x80\xc0\xaf")
def test_any_bytes_stream_to_what_decode_gives(data: bytes) -> None:
    ids = [TOKENIZER.backend.token_to_id(c) for c in map(_letter, data)]
    assert None not in ids
    assert "".join(stream(ids)) == TOKENIZER.decode(ids) == data.decode("utf-8", "replace")


def _letter(byte: int) -> str:
    from dsv3.text.tiktoken import BYTES_OF

    return next(c for c, b in BYTES_OF.items() if b == byte)


def test_a_character_comes_with_its_last_byte() -> None:
    decoder = StreamDecoder(lambda i: "🦊".encode()[i : i + 1])
    assert [decoder.push(i) for i in range(4)] == ["", "", "", "🦊"]


def test_a_broken_character_is_told_as_soon_as_it_is_sure() -> None:
    decoder = StreamDecoder(lambda i: bytes([i]))
    assert decoder.push(0x80) == "\ufffd", "a continuation byte cannot begin a character"
    assert decoder.push(0xE4) == "", "this may become a Chinese character"
    assert decoder.push(ord("a")) == "\ufffda"
    assert decoder.push(0xF0) == ""
    assert decoder.flush() == "\ufffd"


@pytest.mark.parametrize("byte", [0x80, ord("a")])
def test_a_long_stream_costs_the_same_per_token(byte: int) -> None:
    """Held-back windows grow on bytes that never become a character; this one must not."""
    ids = [TOKENIZER.backend.token_to_id(_letter(byte))] * 20_000

    def seconds(n: int) -> float:
        decoder, start = TOKENIZER.stream(), time.perf_counter()
        for token_id in ids[:n]:
            decoder.push(token_id)
        return time.perf_counter() - start

    short = min(seconds(2_000) for _ in range(3))
    long = min(seconds(20_000) for _ in range(3))
    assert long < 60 * short, "ten times the tokens took more than sixty times as long"
