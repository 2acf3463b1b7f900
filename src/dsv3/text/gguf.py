"""The tokenizer in a GGUF file, as a tokenizer of ours.

llama.cpp keeps a byte-level BPE as two lists, tokens in the order of their ids and merges in the order learned, and a
third that says of each token whether it is text, markup, or none at all (ids that a model has room for and no use). How
text is cut into pieces has a name there, `tokenizer.ggml.pre`, and no pattern: of DeepSeek-V3's we know what the name
means, and refuse any other. What is markup there decoding leaves out, `<｜User｜>` too, which DeepSeek's own file keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from dsv3.errors import CheckpointError
from dsv3.gguf import Header, read_header
from dsv3.text.bpe import READABLE, pre_tokenizer
from dsv3.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""Kinds of tokens."""


def tokenizer_from_gguf(path: str | Path) -> Tokenizer:
    """The tokenizer and chat template of a file; raises CheckpointError if they are missing, broken or of another kind."""
    header = read_header(Path(path))
    tokens, kinds, backend = _backend(header)

    def role(name: str) -> int | None:
        i = header.keys.get(f"tokenizer.ggml.{name}_token_id")
        return i if type(i) is int and 0 <= i < len(tokens) and kinds[i] != UNUSED else None

    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    special = {ours: tokens[i] for ours, theirs in roles.items() if (i := role(theirs)) is not None}
    ends = [i for name in ("eot", "eom") if (i := role(name)) is not None]
    template = header.get("tokenizer.chat_template", str, "")
    add_bos = header.get("tokenizer.ggml.add_bos_token", bool, False)
    return Tokenizer(backend, special, ends, template or None, add_bos)


def _backend(header: Header) -> tuple[list[str], list[int], Backend]:
    kind = header.get("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise CheckpointError(
            f"{header.path}: tokenizer.ggml.model is {kind!r}: dsv3 reads byte-level BPE ('gpt2')"
        )
    tokens: list[str] = _list(header.keys, header.path, "tokens", str)
    kinds: list[int] = _list(header.keys, header.path, "token_type", int)
    merges = [tuple(merge.split(" ")) for merge in _list(header.keys, header.path, "merges", str)]
    if any(len(merge) != 2 for merge in merges):
        raise CheckpointError(
            f"{header.path}: a merge of tokenizer.ggml.merges is no pair: it is no whole model"
        )
    if len(kinds) != len(tokens):
        raise CheckpointError(
            f"{header.path}: tokenizer.ggml.token_type tells {len(kinds)} kinds of {len(tokens)} tokens"
        )
    vocabulary = {text: i for i, (text, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED}
    pre = header.get("tokenizer.ggml.pre", str)
    if pre != "deepseek-v3":
        raise CheckpointError(
            f"{header.path}: tokenizer.ggml.pre is {pre!r}: of llama.cpp's ways of cutting text dsv3 knows 'deepseek-v3'"
        )
    try:
        backend = Backend(models.BPE(vocabulary, merges))
    except Exception as error:  # the library raises nothing narrower
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"{header.path}: the tokenizer's merges do not fit its tokens ({said})"
        ) from None
    backend.pre_tokenizer = pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    added = [
        (text, kinds[i]) for text, i in vocabulary.items() if kinds[i] in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    backend.add_tokens(
        [
            AddedToken(text, special=kind != USER_DEFINED and text not in READABLE, normalized=False)
            for text, kind in added
        ]
    )
    return tokens, kinds, backend


def _list(keys: Mapping[str, Any], path: Path, name: str, of: type) -> list[Any]:
    value = keys.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or not all(type(item) is of for item in value):
        raise CheckpointError(f"{path} has no list tokenizer.ggml.{name}: it is no whole model")
    return value
