"""Bits per byte: how well a model predicts text, in a unit that no vocabulary changes.

The text is what `dsv3 data build` held out, encoded anew with the model's own tokenizer, so that models of different
vocabularies can be compared, on the same bytes. What is counted and what not is told in `dsv3.train.heldout`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsv3.engine.llm import LLM
from dsv3.errors import UserError
from dsv3.figures import COLORS, figure
from dsv3.train.heldout import text_bits


def bits_per_byte(
    llm: LLM, data: Path, window: int = 512, progress: Callable[[int, int], None] | None = None
) -> dict[str, float]:
    """For each kind of held-out text in a data folder: bits per UTF-8 byte.

    window: tokens that the model sees at most; documents follow each other from BOS to EOS. Raises UserError if the
    folder holds no such text.
    """
    files = sorted((data / "heldout").glob("*.jsonl"))
    if not files:
        raise UserError(
            f"{data} holds no held-out text: name what `dsv3 data build` wrote for a recipe with held_out"
        )
    tokenizer = llm.tokenizer
    special = torch.tensor(sorted(tokenizer.special_ids))
    result = {}
    for done, file in enumerate(files):
        if progress is not None:
            progress(done, len(files))
        ids: list[int] = []
        for line in file.read_text(encoding="utf-8").splitlines():
            document = tokenizer.encode(json.loads(line)["text"], add_bos=True)
            eos = tokenizer.eos_token_id
            ids += document if eos is None or document[-1:] == [eos] else [*document, eos]
        size = sum(len(tokenizer.token_bytes(i)) for i in ids if i not in tokenizer.special_ids)
        result[file.stem] = text_bits(llm.model, torch.tensor(ids), special, window) / size
    return result


def plot(bits: dict[str, float], path: Path, name: str) -> None:
    """A bar for each kind of text."""
    with figure(path, 5, 0.8 + 0.45 * len(bits)) as canvas:
        axes: Any = canvas.subplots()
        axes.barh(list(bits), list(bits.values()), color=COLORS[0], height=0.6)
        axes.bar_label(axes.containers[0], fmt="%.3f", padding=3)
        axes.invert_yaxis()
        axes.set_xlabel("bits per byte of held-out text")
        axes.set_title(name)
