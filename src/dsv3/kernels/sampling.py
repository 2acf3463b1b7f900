"""Drawing the next word of several requests at once.

Each request brings a temperature, the rules top_k, top_p and min_p, and one random number. A rule is a least
probability: words as likely as the last one kept are kept as well, so that a row's result depends on nothing but the
row. Among what is left the number picks by inverse transform: the word at which the running sum, in the order of the
vocabulary, passes it.

With torch that is a softmax, a sort of the likeliest words (of all, where these do not suffice), and running sums over
the whole vocabulary; natively, one pass for the weights and a look at the few words that can matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dsv3.kernels.native import call, library

PREFIX = 256
"""How many of the likeliest words are looked at before all of a large vocabulary is sorted."""


def draw(
    logits: Tensor,
    temperature: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    min_p: Sequence[float],
    uniform: Sequence[float],
) -> list[int]:
    """One id for each row of logits [requests, vocab] float32; -1 for a row without a finite largest number.

    One of everything for each row: temperature above 0, top_k (0 or less keeps all), top_p and min_p (1 and 0 keep
    all), uniform in [0, 1).
    """
    if logits.is_cpu and library() is not None:
        ids = torch.empty(len(logits), dtype=torch.int64)
        rules = (
            torch.tensor(temperature, dtype=torch.float32),
            torch.tensor([min(k, logits.shape[-1]) for k in top_k], dtype=torch.int64),
            torch.tensor(top_p, dtype=torch.float64),
            torch.tensor(min_p, dtype=torch.float32),
            torch.tensor(uniform, dtype=torch.float64),
        )
        call("draw", logits.contiguous(), *rules, ids, *logits.shape)
    else:
        ids = inverse_transform(distribution(logits, temperature, top_k, top_p, min_p), uniform)
        ids[~logits.amax(dim=-1).isfinite()] = -1
    drawn: list[int] = ids.tolist()
    return drawn


def distribution(
    logits: Tensor,
    temperature: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    min_p: Sequence[float],
) -> Tensor:
    """What to draw from: weights [requests, vocab], zero for what is ruled out and not normalised."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=logits.device).unsqueeze(1)

    probs = (logits / column(temperature)).softmax(dim=-1)
    if max(top_k) <= 0 and min(top_p) >= 1 and max(min_p) <= 0:
        return probs
    vocab = logits.shape[-1]
    most = column([min(k, vocab) if k > 0 else vocab for k in top_k]).long()
    share = column([p if p < 1 else 2.0 for p in top_p])  # 2: sums round, and all must stay
    least_share = column(min_p)

    ranked = probs.topk(min(PREFIX, vocab), dim=-1).values
    # What comes after is less likely still: it matters only to a row that no rule cuts off before, or where
    # top_p is a share of what a top_k beyond it leaves.
    rest_is_out = ranked.sum(-1, keepdim=True) >= share
    rest_is_out |= ranked[:, -1:] < least_share * ranked[:, :1]
    rest_is_out &= (most == vocab) | (share > 1)
    rest_is_out |= most <= PREFIX
    if not bool(rest_is_out.all()):
        ranked = _in_order(probs)
    in_top_k = ranked >= ranked.gather(1, (most - 1).clamp_(max=ranked.shape[1] - 1))
    total = torch.where(most < vocab, (ranked * in_top_k).sum(-1, keepdim=True), 1.0)
    before = ranked.cumsum(dim=-1) - ranked
    kept = in_top_k & (before < share * total) & (ranked >= least_share * ranked[:, :1])
    least = ranked.gather(1, (kept.sum(-1, keepdim=True) - 1).clamp_(min=0))
    return probs.masked_fill(probs < least, 0.0)


def _in_order(probs: Tensor) -> Tensor:
    """Each row sorted, largest first. On a CPU by NumPy, whose vectorised sort is many times torch's speed."""
    if probs.device.type == "cpu":
        return torch.from_numpy(np.sort(probs.numpy(), axis=-1)).flip(-1)
    return probs.sort(dim=-1, descending=True).values


def inverse_transform(weights: Tensor, uniform: Sequence[float]) -> Tensor:
    """The word at which the running sum passes u * total.

    weights: [requests, vocab], not negative, not all zero in a row; uniform: one in [0, 1) for each request.
    Returns ids [requests] int64.
    """
    sums = weights.cumsum(dim=-1, dtype=torch.float64)
    targets = torch.tensor(uniform, dtype=torch.float64, device=weights.device).unsqueeze(1) * sums[:, -1:]
    return torch.searchsorted(sums, targets, right=True).squeeze(1)
