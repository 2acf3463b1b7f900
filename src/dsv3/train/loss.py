"""The training objective (report, sections 2.1.2 and 2.2).

    L = next-token loss + lambda / D * sum over MTP modules + alpha * sequence-wise balance loss

The balance loss (equations 17-20) only guards against extreme imbalance inside one sequence; the work of
balancing is done outside the gradient by `update_biases` (section 2.1.2): after each step the bias of an
expert that had more than its share of tokens goes down by gamma, that of one that had less goes up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.data.stream import Batch
from dsv3.kernels.cross_entropy import IGNORE, linear_cross_entropy
from dsv3.model import Routing, Transformer
from dsv3.model.moe import MoE


@dataclass(frozen=True)
class Losses:
    """The terms of the objective, in nats per token, and each expert's load."""

    total: Tensor
    main: Tensor
    mtp: Tensor | None
    balance: Tensor
    loads: dict[int, Tensor]
    """For each MoE layer [n_routed_experts]: how many tokens each expert was given."""
    choices: int
    """How many experts all tokens chose, in all layers."""


@dataclass(frozen=True)
class Targets:
    """How many targets a batch has, so that parts of it know their share when gradients are accumulated."""

    rows: int
    """Sequences."""
    counted: tuple[int, ...]
    """Targets that carry loss: of the main head, then of MTP module 1, 2, ..."""

    @classmethod
    def of(cls, batch: Batch, modules: int) -> Targets:
        """Count a whole batch for a model of so many MTP modules."""
        wanted = (
            batch.tokens if batch.loss_mask is None else batch.tokens.masked_fill(~batch.loss_mask, IGNORE)
        )
        counts = (int((_ahead(wanted, batch.segments, k) != IGNORE).sum()) for k in range(1, modules + 2))
        return cls(batch.tokens.shape[0], tuple(counts))


def objective(
    model: Transformer,
    batch: Batch,
    mtp_weight: float,
    whole: Targets | None = None,
) -> Losses:
    """The loss of a batch of token rows.

    batch.tokens: [rows, seq + 1] int64, inputs and targets in one; loss_mask: bool of the same shape, True for
    tokens whose prediction counts; segments: the sample each token belongs to. With segments, attention and
    positions start anew in each sample (SFT); without, rows are one stream (pretraining packs without
    cross-sample masks; report, section 4.1). whole: the targets of the batch that this one is a part of; the
    losses of all parts then add up to the whole batch's.
    """
    tokens, segments = batch.tokens, batch.segments
    inputs = tokens[:, :-1]
    targets = tokens if batch.loss_mask is None else tokens.masked_fill(~batch.loss_mask, IGNORE)
    positions = mask = None
    if segments is not None:
        positions, mask = _per_sample(segments[:, :-1])
    routing: list[Routing] = []
    hidden, mtp_hidden = model.features(inputs, positions, mask, routing, mtp=mtp_weight > 0)

    weight = model.lm_head.weight
    whole = whole or Targets.of(batch, len(mtp_hidden))
    terms = [
        linear_cross_entropy(h.flatten(0, 1), weight, _ahead(targets, segments, k + 1), whole.counted[k])
        for k, h in enumerate((hidden, *mtp_hidden))
    ]
    total = main = terms[0]
    mtp = None
    if mtp_hidden:
        mtp = torch.stack(terms[1:]).mean()
        total = total + mtp_weight * mtp
    balance = sequence_balance(routing, inputs.shape[0]) * (inputs.shape[0] / whole.rows)
    total = total + model.config.aux_loss_alpha * balance
    loads = expert_loads(routing)
    choices = (model.config.num_experts_per_tok or 0) * sum(r.scores.shape[0] for r in routing)
    return Losses(
        total,
        main.detach(),
        None if mtp is None else mtp.detach(),
        balance.detach(),
        loads,
        choices,
    )


def _ahead(targets: Tensor, segments: Tensor | None, k: int) -> Tensor:
    """The target k tokens after each position, flat; none where that token belongs to another sample."""
    wanted = targets[:, k:]
    if segments is not None:
        wanted = wanted.masked_fill(segments[:, k:] != segments[:, :-k], IGNORE)
    return wanted.flatten()


def _per_sample(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Positions that restart with each sample [batch, seq], and who may see whom [batch, 1, seq, seq]."""
    seq = segments.shape[1]
    same = segments.unsqueeze(2) == segments.unsqueeze(1)
    index = torch.arange(seq, device=segments.device)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = torch.where(starts, index, 0).cummax(dim=1).values
    return index - first, (same & (index.unsqueeze(1) >= index)).unsqueeze(1)


def sequence_balance(routing: Sequence[Routing], batch: int) -> Tensor:
    """Sum over layers of the complementary sequence-wise balance loss, before alpha (equations 17-20)."""
    total = torch.zeros((), device=routing[0].scores.device if routing else None)
    for layer in routing:
        scores = layer.scores.unflatten(0, (batch, -1))
        share = (scores / scores.sum(dim=-1, keepdim=True)).mean(dim=1)
        chosen = layer.indices.view(batch, -1)
        counts = torch.zeros_like(share).scatter_add_(1, chosen, torch.ones_like(chosen, dtype=share.dtype))
        frequency = counts * (scores.shape[-1] / chosen.shape[1])
        total = total + (frequency * share).sum(dim=-1).mean()
    return total


def expert_loads(routing: Sequence[Routing]) -> dict[int, Tensor]:
    """Tokens per expert for each MoE layer, MTP modules included."""
    return {r.layer: torch.bincount(r.indices.flatten(), minlength=r.scores.shape[-1]) for r in routing}


@torch.no_grad()
def update_biases(model: Transformer, loads: dict[int, Tensor], gamma: float) -> None:
    """Auxiliary-loss-free balancing: move each expert's bias by gamma against its load over the batch."""
    for module in model.modules():
        if (
            isinstance(module, MoE)
            and module.layer in loads
            and module.gate.e_score_correction_bias is not None
        ):
            load = loads[module.layer].float()
            module.gate.e_score_correction_bias += gamma * torch.sign(load.mean() - load)
