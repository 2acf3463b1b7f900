"""A little of some text, in tokens: what a model is calibrated on, or compared with another."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dsv3.errors import UserError
from dsv3.text.corpus import Corpus
from dsv3.text.tokenizer import Tokenizer


def windows(path: Path, tokenizer: Tokenizer, samples: int, length: int) -> Tensor:
    """The first tokens of a file, or of each file of a folder in equal shares, as int64 [samples, length].

    Each text begins with BOS; the next one follows it. Where there is less text there are fewer rows. Raises UserError if
    it does not make one.
    """
    files = [str(file) for file, _ in Corpus([str(path)]).files]
    rows: list[list[int]] = []
    rest: list[int] = []
    for done, file in enumerate(files, start=1):
        share = -(-samples * done // len(files))
        for text in Corpus([file]):
            rest += tokenizer.encode(text.text, add_bos=True)
            while len(rest) >= length and len(rows) < share:
                rows.append(rest[:length])
                del rest[:length]
            if len(rows) >= share:
                rest = []
                break
    if not rows:
        raise UserError(f"{path} holds {len(rest):,} tokens: give more text, or a --length of at most that")
    return torch.tensor(rows)
