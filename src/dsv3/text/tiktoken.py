"""Reading `tiktoken.model`, the only vocabulary that Moonlight and Kimi-K2 ship.

Such a file lists tokens as bytes (base64), each with its rank, and nothing else. Two things are missing and
come from elsewhere:

- The merges. tiktoken merges, of all neighbours whose union is a token, the pair whose union ranks first. A
  `tokenizers` BPE wants the list of pairs instead: for every token, all ways to cut it into two tokens, in
  order of the token's rank. A piece of text that is itself a token is taken whole by both (`ignore_merges`).
- The pattern that cuts text into pieces. It is the `pat_str` of the repositories' own
  tokenization_moonshot.py and tokenization_kimi.py (the same in both): runs of Chinese characters first, so
  the words of other scripts exclude them (`&&[^\\p{Han}]`).

After the ranks come some 256 special tokens; `tokenizer_config.json` names a few, and those between are
called `<|reserved_token_{id}|>`, as those modules call them.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from dsv3.errors import CheckpointError

_WORD = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_UPPER, _LOWER = rf"[\p{{Lu}}\p{{Lt}}{_WORD}]", rf"[\p{{Ll}}{_WORD}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


MOST_SPECIAL = 4096
"""Special tokens that may follow the ranks, many times what there are: an id beyond them is a broken file."""


def _byte_alphabet() -> dict[int, str]:
    """Byte-level BPE writes a byte as a visible character: itself if printable, else one from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    rest = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + i) for i, byte in enumerate(rest)}


BYTE_ALPHABET = _byte_alphabet()
"""The character that each byte is in a byte-level token."""
BYTES_OF = {c: byte for byte, c in BYTE_ALPHABET.items()}
"""The byte that each character of a byte-level token stands for."""


def load_tiktoken(path: Path, added_tokens: dict[str, Any]) -> Tokenizer:
    """A tokenizer that gives the same ids as tiktoken with these ranks and Moonlight's or Kimi's pattern.

    added_tokens: `added_tokens_decoder` of tokenizer_config.json, `{"163585": {"content": ...}, ...}`.
    Raises CheckpointError if the file is not such a list.
    """
    ranks = _read_ranks(path)
    tokenizer = Tokenizer(models.BPE(*_vocab_and_merges(ranks), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(KIMI_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    try:
        named = {int(i): (str(t["content"]), bool(t.get("special", True))) for i, t in added_tokens.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(
            f"{path.parent}: added_tokens_decoder in tokenizer_config.json is broken"
        ) from None
    for token_id in named:
        if not 0 <= token_id - len(ranks) < MOST_SPECIAL:
            raise CheckpointError(
                f"{path.parent}: added_tokens_decoder in tokenizer_config.json has the id {token_id}: special "
                f"tokens come right after the {len(ranks)} of {path.name}"
            )
    for token_id in range(len(ranks), max(named, default=-1) + 1):
        content, special = named.get(token_id, (f"<|reserved_token_{token_id}|>", True))
        tokenizer.add_tokens([AddedToken(content, special=special, normalized=False)])
        if tokenizer.token_to_id(content) != token_id:
            raise CheckpointError(f"{path.parent}: the added token {content!r} ({token_id}) is there twice")
    return tokenizer


def _read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens in order of rank. Ranks are the ids, so they must count 0, 1, 2, ... and hold every byte."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise CheckpointError(f"{path} is broken at line {number}: download it again") from None
    if list(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise CheckpointError(f"{path} does not rank every byte and token from 0 on: download it again")
    return ranks


def _vocab_and_merges(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    text = {token: "".join(map(BYTE_ALPHABET.__getitem__, token)) for token in ranks}
    merges = [
        (text[token[:cut]], text[token[cut:]])
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    return {text[token]: rank for token, rank in ranks.items()}, merges
