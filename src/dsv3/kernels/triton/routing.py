"""From a gate's logits to experts and their weights, in one launch.

The numbers are few (256 logits for a token) and so is the arithmetic; what takes time is that torch does it in some
fifteen launches of a few microseconds each, in every layer. One program does it for one token: its scores fit in
registers, as a tile [groups, experts of a group], and the best k are found by taking the maximum k times, which for k of
8 is cheaper than sorting. Of equal experts the first is taken, of equal groups too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def route(
    logits: Tensor,
    bias: Tensor | None,
    chosen: int,
    sigmoid: bool = True,
    groups: int = 0,
    topk_group: int = 0,
    two_best: bool = True,
    normalize: bool = True,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `dsv3.model.moe.Gate` makes of its logits.

    logits: float32 [tokens, experts]; bias: float32 [experts], added to the scores for choosing alone; sigmoid: scores
    are sigmoids of logits, else their softmax; groups: a token chooses within `topk_group` of so many groups of experts,
    which are ranked by the sum of their two best (`two_best`) or by the best; 0 where it may choose among all; normalize:
    weights are divided by their sum; factor: and multiplied by this. Returns scores float32 [tokens, experts], indices
    int64 and weights float32 [tokens, chosen], best first. ValueError if fewer experts are admitted than chosen.
    """
    tokens, experts = logits.shape
    groups = groups or 1
    each, admitted = experts // groups, topk_group or groups
    if each * groups != experts or each * admitted < chosen or admitted > groups:
        raise ValueError(f"{chosen} of {experts} experts in {admitted} of {groups} groups cannot be chosen")
    logits = logits.float().contiguous()
    scores = torch.empty_like(logits)
    indices = torch.empty(tokens, chosen, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, chosen, dtype=torch.float32, device=logits.device)
    if not tokens:
        return scores, indices, weights
    with torch.cuda.device_of(logits):
        _route[(tokens,)](
            logits, None if bias is None else bias.float().contiguous(), scores, indices, weights, factor,
            CHOSEN=chosen, CHOSEN_WIDTH=triton.next_power_of_2(chosen),
            GROUPS=groups, GROUPS_WIDTH=triton.next_power_of_2(groups),
            EACH=each, EACH_WIDTH=triton.next_power_of_2(each),
            ADMITTED=admitted, TWO_BEST=two_best, SIGMOID=sigmoid, NORMALIZE=normalize,
            num_warps=1 if experts <= 64 else 4,
        )  # fmt: skip
    return scores, indices, weights


# fmt: off
@triton.jit
def _route(
    logits, bias, scores, indices, weights, factor,
    CHOSEN: tl.constexpr, CHOSEN_WIDTH: tl.constexpr, GROUPS: tl.constexpr, GROUPS_WIDTH: tl.constexpr,
    EACH: tl.constexpr, EACH_WIDTH: tl.constexpr, ADMITTED: tl.constexpr,
    TWO_BEST: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    group, place = tl.arange(0, GROUPS_WIDTH), tl.arange(0, EACH_WIDTH)
    there = (group < GROUPS)[:, None] & (place < EACH)
    expert = group[:, None] * EACH + place
    nothing = -float("inf")

    x = tl.load(logits + token * (GROUPS * EACH) + expert, mask=there, other=nothing)
    if SIGMOID:
        score = tl.where(there, 1 / (1 + tl.exp(-x)), 0)
    else:
        powers = tl.exp(x - tl.max(tl.max(x, 1), 0))
        score = powers / tl.sum(tl.sum(powers, 1), 0)
    tl.store(scores + token * (GROUPS * EACH) + expert, score, mask=there)
    biased = score
    if bias is not None:
        biased += tl.load(bias + expert, mask=there, other=0.0)
    # What is not a number is chosen first, so that it is seen.
    biased = tl.where(there, tl.where(biased == biased, biased, float("inf")), nothing)

    free = there
    if ADMITTED < GROUPS:
        rank = tl.max(biased, 1)
        if TWO_BEST:
            first = tl.min(tl.where(biased == rank[:, None], place, EACH_WIDTH), 1)
            rank += tl.max(tl.where(place == first[:, None], nothing, biased), 1)
        left = group < GROUPS
        for _ in tl.static_range(ADMITTED):
            best = tl.max(tl.where(left, rank, nothing), 0)
            left &= group != tl.min(tl.where(left & (rank == best), group, GROUPS_WIDTH), 0)
        free &= (left == 0)[:, None]

    slot = tl.arange(0, CHOSEN_WIDTH)
    taken = tl.zeros((CHOSEN_WIDTH,), tl.int32)
    weight = tl.zeros((CHOSEN_WIDTH,), tl.float32)
    for i in tl.static_range(CHOSEN):
        best = tl.max(tl.max(tl.where(free, biased, nothing), 1), 0)
        hit = tl.where(free & (biased == best), expert, GROUPS * EACH)
        choice = tl.min(tl.min(hit, 1), 0)
        taken = tl.where(slot == i, choice, taken)
        mine = there & (expert == choice)
        weight = tl.where(slot == i, tl.sum(tl.sum(tl.where(mine, score, 0), 1), 0), weight)
        free &= expert != choice
    if NORMALIZE:
        weight /= tl.sum(weight, 0) + 1e-20
    where = token * CHOSEN + slot
    tl.store(indices + where, taken.to(tl.int64), mask=slot < CHOSEN)
    tl.store(weights + where, weight * factor, mask=slot < CHOSEN)
