"""A small byte-level BPE in the shape of DeepSeek-V3's, for tests of whatever needs a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
CORPUS = [
    "Once upon a time there was a little fox who lived in the woods by the river.",
    "The fox said: good morning, how are you? I'm well, thank you, and it's a fine day!",
    "从前有一只小狐狸，住在河边的树林里。它说：早上好，你好吗？",
    "café naïve 12345 déjà vu; emoji 🙂🦊👩‍👩‍👧‍👦 flags 🇫🇷 and e\u0301 combining marks",
] * 3


def train(vocab_size: int = 384, corpus: list[str] = CORPUS) -> Tokenizer:
    """DeepSeek's pre-tokenisation in short, merges learned from `corpus`; control tokens come first.

    As in DeepSeek-V3's own file, `<｜User｜>` and `<think>` are added tokens that are not flagged special.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), behavior="isolated"),
            pre_tokenizers.Split(Regex(r"[一-龥]+| ?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS, EOS, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t in (USER, ASSISTANT, "<think>", "</think>", "<|im_end|>")]
    )
    return tokenizer


def save(folder: Path, tokenizer: Tokenizer | None = None, **config: object) -> Path:
    """Write the tokenizer files of a checkpoint; `config` overrides keys of tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (tokenizer or train()).save(str(folder / "tokenizer.json"))
    values = {
        "bos_token": {"__type": "AddedToken", "content": BOS},
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": None,
        "add_bos_token": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values | config))
    return folder
