"""How far a model in fewer bits is from the one that it was made of, on text.

- *Perplexity* of both: e to the mean surprise at the next token. It tells whether the model got worse, but errors can cancel.
- *Divergence*: the mean Kullback-Leibler divergence of the result's next-token distribution from the source's, in nats
  per token. Nothing cancels in it: it is 0 only where all probabilities are the same.
- *Agreement*: how often both find the same token the likeliest, which is what a user of greedy decoding sees.

One model is in memory at a time. What its head reads at each token is kept, and its head: a hundredth of the logits that
they make, and the same to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dsv3.checkpoint.pretrained import DeepseekV3
from dsv3.engine.machine import computes_packed
from dsv3.kernels.inference import linear
from dsv3.kernels.packed import Packed, Weight
from dsv3.model.layers import weight_of

_ROWS = 512  # tokens whose logits are in memory at once


@dataclass(frozen=True)
class Reading:
    """What a model made of a text."""

    ids: Tensor
    """[samples, length]"""
    features: list[Tensor]
    """Of each sample what the head reads at all tokens but the last, [length - 1, hidden]."""
    head: Weight
    """[vocab, hidden]"""


@dataclass(frozen=True)
class Divergence:
    """What came of a comparison."""

    tokens: int
    """Predictions that were compared."""
    source_perplexity: float
    perplexity: float
    divergence: float
    """Nats per token."""
    agreement: float
    """Share of the tokens at which both have the same likeliest next token."""

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.inference_mode()
def read(
    path: str | Path,
    ids: Tensor,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Reading:
    """Let a model read ids [samples, length], each sample for itself.

    It computes in bf16, and as it does when it generates: by packed weights where there are kernels for that. progress: told
    how many samples are done, of how many. Raises CheckpointError if there is no such model, or no memory for it.
    """
    device = torch.device(device)
    packed = computes_packed(torch.bfloat16, device)
    model = DeepseekV3.from_pretrained(path, torch.bfloat16, device, mtp=False, packed=packed)
    features = []
    for done, row in enumerate(ids, start=1):
        hidden, _ = model.features(row[:-1].unsqueeze(0).to(device), mtp=False)
        features.append(hidden[0])
        if progress is not None:
            progress(done, len(ids))
    return Reading(ids, features, _copy(weight_of(model.lm_head)))


def _copy(weight: Weight) -> Weight:
    """One in memory of its own: a view of a file would keep all of it mapped."""
    if isinstance(weight, Packed):
        return Packed(weight.kind, *(tensor.clone() for tensor in weight.tensors))
    return weight.clone()


@torch.inference_mode()
def compare(source: Reading, result: Reading) -> Divergence:
    """How far the result's predictions are from the source's, on the same text."""
    surprise = [0.0, 0.0]
    divergence, agreed = 0.0, 0
    for row, *features in zip(source.ids, source.features, result.features, strict=True):
        following = row[1:].to(features[0].device)
        for start in range(0, len(following), _ROWS):
            here = slice(start, start + _ROWS)
            logits = [
                linear(f[here], r.head).float() for f, r in zip(features, (source, result), strict=True)
            ]
            p, q = (each.log_softmax(-1) for each in logits)
            divergence += float((p.exp() * (p - q)).sum())
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            for i, each in enumerate(logits):
                surprise[i] += float(cross_entropy(each, following[here], reduction="sum"))
    tokens = source.ids.shape[0] * (source.ids.shape[1] - 1)
    before, after = (math.exp(nats / tokens) for nats in surprise)
    return Divergence(tokens, before, after, divergence / tokens, agreed / tokens)
