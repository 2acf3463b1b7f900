"""Splitting joined tokens at random in training (report, section 4.1).

The vocabulary has tokens of punctuation *and* the line breaks after it: `.⏎⏎` is one token. A model that has
always read them so has never seen `.` with `⏎⏎` to come, for there `.⏎⏎` would have stood instead. Now take a
few-shot prompt that ends in `Answer:` without a line break. Its last token is `:`, and to this model that says:
*no* line break follows. The bias is of the token boundary, not of the text (Lundberg, "The Art of Prompt
Design: Prompt Boundaries and Token Healing", 2023). The cure is to let the model see both: in training a
certain share of such tokens is split, `.⏎⏎` into `.` and `⏎⏎`. The report does not say how many; the recipe
sets the rate. Text that is encoded for inference is never split.

A joined token here is one that ends in line breaks (`\\n`, `\\r`) and has punctuation or symbols before them, in
whole or, where a merge has cut a character, in part: DeepSeek-V3 has 801. It is split where the line breaks
begin, since that is where prompts end. Tokens of blanks and line breaks alone are no joined tokens; nor are
special tokens.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import tokenizers

from dsv3.text.tiktoken import BYTES_OF

Ids = TypeVar("Ids", bound=np.integer[Any])


class JoinedTokens:
    """Which ids of a vocabulary are joined tokens, and what each is split into."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """backend: a byte-level BPE; `dsv3.text.Tokenizer.backend` is one."""
        special = backend.get_added_tokens_decoder().keys()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.parts: dict[int, tuple[int, ...]] = {}
        """The ids that a joined token is split into; together they are the same bytes."""
        for token, token_id in sorted(vocabulary.items(), key=lambda item: item[1]):
            cut = _start_of_breaks(token)
            if cut and token_id not in special:
                pieces = [*backend.model.tokenize(token[:cut]), *backend.model.tokenize(token[cut:])]
                self.parts[token_id] = tuple(piece.id for piece in pieces)

        # Row i of a ragged table, `_flat[_start[i] : _start[i] + _length[i]]`, is what id i becomes.
        size = max(vocabulary.values(), default=-1) + 1
        self._is_joined = np.zeros(size, bool)
        self._start = np.zeros(size, np.int64)
        self._length = np.ones(size, np.int64)
        flat: list[int] = []
        for token_id, parts in self.parts.items():
            self._is_joined[token_id] = True
            self._start[token_id], self._length[token_id] = len(flat), len(parts)
            flat += parts
        self._flat = np.array(flat, np.int64)

    def __len__(self) -> int:
        return len(self.parts)

    def split(self, ids: npt.NDArray[Ids], rate: float, rng: np.random.Generator) -> npt.NDArray[Ids]:
        """The ids [n] with each joined token split with probability `rate`; they decode to the same text.

        `rng` gives one number per joined token, in order: the same generator gives the same result, whether
        a stream is split at once or in chunks. Ids that the vocabulary does not have are left alone.
        """
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"rate is {rate}: it must be from 0 to 1")
        if ids.ndim != 1:
            raise ValueError(f"ids has the shape {ids.shape}: it must be one row of ids")
        if not len(ids) or not len(self._is_joined):
            return ids.copy()
        known = (ids >= 0) & (ids < len(self._is_joined))
        places = np.flatnonzero(self._is_joined[np.where(known, ids, 0)] & known)
        places = places[rng.random(len(places)) < rate]  # those that are split
        chosen = ids[places]
        lengths = self._length[chosen]
        counts = np.ones(len(ids), np.int64)
        counts[places] = lengths
        out = np.repeat(ids, counts)
        # Where the parts go: one run of places for each split token, written in one go.
        first = places + np.cumsum(lengths) - lengths - np.arange(len(places))
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        out[np.repeat(first, lengths) + within] = self._flat[np.repeat(self._start[chosen], lengths) + within]
        return out


def _start_of_breaks(token: str) -> int:
    """Where the line breaks begin that end a joined token; 0 if it is none. In characters of the token as the
    vocabulary writes it, one for each byte."""
    if any(c not in BYTES_OF for c in token):
        return 0  # an added token: written as it is
    content = bytes(BYTES_OF[c] for c in token)
    head = content.rstrip(b"\r\n")
    if head == content:
        return 0
    # Bytes of a cut character belong to punctuation: a piece that ends in line breaks has nothing else but blanks.
    before = head.decode("utf-8", "replace")
    return 0 if not before.strip() or any(c.isalnum() for c in before) else len(head)
