"""How well a model predicts text that it was not trained on, in a unit that no tokenizer changes.

Bits per byte: the negative log-likelihood of the text, in bits, over its length in UTF-8 bytes. Text is read in
windows, each token predicted from those before it in its window. Special tokens are read but not counted, on either
side: they are no bytes of the text.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy

from dsv3.data.stream import heldout
from dsv3.errors import UserError
from dsv3.model import Transformer


def bits_per_byte(model: Transformer, data: Path, window: int = 512) -> dict[str, float]:
    """Bits per byte of each kind of held-out text in a folder that `dsv3 data build` wrote, of its tokens.

    window: tokens that the model sees at most. Raises UserError if the text is of another tokenizer's.
    """
    added = torch.tensor(list(Tokenizer.from_file(str(data / "tokenizer.json")).get_added_tokens_decoder()))
    result = {}
    for kind, held in heldout(data).items():
        known, largest = model.config.vocab_size, int(held.tokens.max(initial=0))
        if largest >= known:
            raise UserError(
                f"{data} has the token {largest}, but the model knows {known}: it is of another model"
            )
        tokens = torch.from_numpy(held.tokens.astype("int64"))
        result[kind] = text_bits(model, tokens, added, window) / held.bytes
    return result


@torch.inference_mode()
def text_bits(model: Transformer, tokens: Tensor, special: Tensor, window: int) -> float:
    """Bits that a model needs for tokens [n] int64 in windows, those among the ids `special` not counted."""
    nats, weight = 0.0, model.lm_head.weight
    tokens, special = tokens.to(weight.device), special.to(weight.device)
    for start in range(0, len(tokens) - 1, window):
        piece = tokens[start : start + window + 1]
        hidden, _ = model.features(piece[:-1].unsqueeze(0), mtp=False)
        each = cross_entropy(model.lm_head(hidden[0]).float(), piece[1:], reduction="none")
        nats += float(each[~torch.isin(piece[1:], special)].sum())
    return nats / math.log(2)
