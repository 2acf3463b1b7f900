"""Training a vocabulary: byte-level BPE with DeepSeek-V3's pre-tokenisation (report, section 4.1).

Text is first cut into pieces, and no token ever reaches over a cut. So the cuts decide what a token can be:

- numbers, at most three digits together, from the left: `12345` is `123`, `45`;
- runs of Chinese characters and kana, without their punctuation: `你好`, `，`;
- words with the one space (or other mark) before them: ` fox`, and in code `.append`, `_size`;
- punctuation with a space before it and **the line breaks after it**: `.⏎⏎`, ` {⏎`, `);⏎`. The report names
  these joined tokens as what is new in V3 against V2: they shorten code and paragraphs. What they cost is told
  in `dsv3.text.joined`;
- spaces and line breaks that are left, where the last space before a word goes to the word.

The three patterns below are those of DeepSeek-V3's own tokenizer.json, applied one after the other. Then each
piece is taken as UTF-8 bytes, and the most frequent pair of neighbours becomes a token until the vocabulary is
full. Every byte is a token from the start, so no text is unknown.

Special tokens have DeepSeek's names and, unlike in DeepSeek's file, the first ids: BOS is 0, EOS 1, PAD 2 as
there, but the rest follows at once (`SPECIAL_TOKENS`), not after the words, so that vocabularies of all sizes
agree on them. Their text is cut out of what is trained on: no merge is learned from `<｜User｜>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dsv3.errors import UserError
from dsv3.files import write_whole
from dsv3.text.chat import DEEPSEEK_TEMPLATE

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
TOOL_TOKENS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)
THINKING = ("<think>", "</think>")

SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, FIM_BEGIN, FIM_HOLE, FIM_END, *TOOL_TOKENS, *THINKING)
"""The special tokens in the order of their ids, which are 0 to 18."""

READABLE = frozenset((*TOOL_TOKENS, *THINKING))
"""Special tokens that decoding keeps, since whoever reads an answer parses them: not flagged special."""

DIGITS = r"\p{N}{1,3}"
CJK = r"[一-龥぀-ゟ゠-ヿ]+"  # the ideographs of Unicode 1.1, hiragana, katakana
WORDS = "|".join(
    (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
PATTERNS = (DIGITS, CJK, WORDS)

MAX_TOKEN_BYTES = 128
"""DeepSeek-V3's longest token: as many spaces. Longer ones are rules and separators of one text."""


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """DeepSeek-V3's: text to pieces, each written in the byte alphabet."""
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in PATTERNS]
    return pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    max_token_bytes: int = MAX_TOKEN_BYTES,
) -> Tokenizer:
    """A vocabulary of `vocab_size` tokens, special ones and the 256 bytes included, learned from `texts`.

    It is smaller where the texts have no more pairs to merge. The same texts give the same vocabulary,
    whatever the number of threads. Texts are read once; memory holds their distinct pieces.
    Raises UserError for a size without room for bytes and special tokens.
    """
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise UserError(
            f"the vocabulary size is {vocab_size}: 256 bytes and {len(special_tokens)} special tokens need {least}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=max_token_bytes + 1,  # the trainer takes what is shorter than that
        show_progress=False,
    )
    tokenizer.train_from_iterator(_between(texts, special_tokens), trainer)
    # The trainer flags all of them as special, in a way that only a file can take back.
    written = json.loads(tokenizer.to_str())
    for token in written["added_tokens"]:
        token["special"] = token["content"] not in READABLE
    return Tokenizer.from_str(json.dumps(written))


def _between(texts: Iterable[str], special_tokens: Sequence[str]) -> Iterator[str]:
    """The texts without special tokens, cut where these stood."""
    if not special_tokens:
        yield from texts
        return
    special = re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))))
    for text in texts:
        yield from filter(None, special.split(text))


def save_tokenizer(
    folder: Path,
    tokenizer: Tokenizer,
    model_max_length: int | None = None,
    chat_template: str | None = DEEPSEEK_TEMPLATE,
) -> None:
    """Write tokenizer.json and tokenizer_config.json, as a checkpoint of DeepSeek-V3 has them.

    BOS begins every plain text that a model is to go on with. `model_max_length`: the model's context.
    Raises UserError if the vocabulary lacks BOS, EOS or PAD.
    """
    config: dict[str, Any] = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "add_bos_token": True}
    for name in ("bos_token", "eos_token", "pad_token"):
        if tokenizer.token_to_id(config[name]) is None:
            raise UserError(f"the vocabulary lacks {name} {config[name]!r}: train it with SPECIAL_TOKENS")
    if model_max_length is not None:
        config["model_max_length"] = model_max_length
    if chat_template is not None:
        config["chat_template"] = chat_template
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_whole(folder / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")
