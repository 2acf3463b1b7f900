"""`tiktoken.model` files give the ids that tiktoken gives, whose algorithm is written out here."""

from __future__ import annotations

import base64
import json
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st

from dsv3.errors import CheckpointError
from dsv3.text import Tokenizer
from dsv3.text.tiktoken import BYTES_OF
from tests.text.toy import train

# tokenization_kimi.py's pattern in the `regex` module's words, where intersection of classes needs V1.
PATTERN = regex.compile(
    r"[\p{Han}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    regex.V1,
)
RANKS = {
    token: rank
    for rank, token in enumerate(
        sorted(
            {bytes(BYTES_OF[c] for c in token) for token in train(700).get_vocab() if token[0] != "<"}
            | {bytes([b]) for b in range(256)}
            | {b"\n\n", b"  ", b"aa", b"aaa", "狐狸".encode()},
            key=lambda token: (len(token), token),
        )
    )
}
FIRST = len(RANKS)
SPECIALS = {str(FIRST): "[BOS]", str(FIRST + 1): "[EOS]", str(FIRST + 5): "<|im_end|>"}


def tiktoken_encode(text: str) -> list[int]:
    """In each piece, join the neighbours whose union ranks lowest, leftmost first, while there are any."""
    ids = []
    for piece in PATTERN.findall(text):
        parts = [bytes([b]) for b in piece.encode()]
        if piece.encode() in RANKS:
            parts = [piece.encode()]
        while joined := [(RANKS[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in RANKS]:
            i = min(joined)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [RANKS[part] for part in parts]
    return ids


def write(folder: Path, ranks: dict[bytes, int] = RANKS) -> Path:
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in ranks.items()]
    (folder / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    added = {i: {"content": token, "special": True} for i, token in SPECIALS.items()}
    config = {"bos_token": "[BOS]", "eos_token": "[EOS]", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": FIRST + 5}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_pretrained(write(tmp_path_factory.mktemp("kimi")))


hard_text = st.text(
    st.one_of(
        st.sampled_from("aabbeo the fox'sSLL \n\r\t123,.!"),
        st.characters(min_codepoint=0x4E00, max_codepoint=0x4E80),
        st.characters(codec="utf-8", exclude_categories=("Cn", "Co")),
    )
)


@given(hard_text)
@example("I'LL say we've done what they'd want, it's John's")
@example("从前有一只狐狸，它说hello 世界。12345 café\n\n  \n x")
@example("aaaa aaaaa aaaaaaa")
@example("日本語のテキスト 한국어 中'se 々〇")
def test_ids_are_tiktokens(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == tiktoken_encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    decoder = tokenizer.stream()
    assert "".join(map(decoder.push, tokenizer.encode(text))) + decoder.flush() == text


def test_special_tokens_keep_their_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_token_id == FIRST
    assert tokenizer.eos_token_id == FIRST + 1
    assert tokenizer.eos_token_ids == (FIRST + 1, FIRST + 5), "the model's own end of turn stops as well"
    assert tokenizer.encode("a<|im_end|>") == [RANKS[b"a"], FIRST + 5]
    assert tokenizer.encode(f"<|reserved_token_{FIRST + 2}|>") == [FIRST + 2], "unnamed ids are reserved"
    assert tokenizer.decode([RANKS[b"a"], FIRST + 5]) == "a"
    assert not tokenizer.add_bos_token, "Moonlight and Kimi begin a text without BOS"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"YQ== 0 0\n", "line 1"),
        (b"YQ== 0\n!!! 1\n", "line 2"),
        (b"YQ== 7\n", "from 0 on"),
        (b"YQ== 0\n", "every byte"),
        (b"", "every byte"),
    ],
)
def test_broken_files_say_so(tmp_path: Path, content: bytes, says: str) -> None:
    write(tmp_path)
    (tmp_path / "tiktoken.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as error:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    assert "tiktoken.model" in str(error.value)


BROKEN = [
    {"x": {"content": "a"}},
    {str(FIRST): "a"},
    {str(FIRST + 9): {"content": "[EOS]"}},
    {"2000000000": {"content": "far"}},
    {str(FIRST - 1): {"content": "a rank's place"}},
    {"-1": {"content": "nowhere"}},
]


@pytest.mark.parametrize("added", BROKEN)
def test_broken_special_tokens_say_so(tmp_path: Path, added: dict[str, object]) -> None:
    config = json.loads((write(tmp_path) / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] |= added
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="added") as error:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
