"""The training objective (report, sections 2.1.2 and 2.2).

    L = next-token loss + lambda / D * sum over MTP modules + alpha * sequence-wise balance loss

The balance loss (equations 17-20) only guards against extreme imbalance inside one sequence; the work of
balancing is done outside the gradient by `update_biases` (section 2.1.2): after each step the bias of an
expert that had more than its share of tokens goes down by gamma, that of one that had less goes up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsv3.data.stream import Batch
from dsv3.kernels.cross_entropy import IGNORE, linear_cross_entropy
from dsv3.model import Routing, Transformer
from dsv3.model.moe import MoE
from dsv3.parallel.part import Span


@dataclass(frozen=True)
class Losses:
    """The terms of the objective, in nats per token, and each expert's load."""

    total: Tensor
    main: Tensor | None
    """None on a stage of a pipeline that is not the last."""
    mtp: Tensor | None
    balance: Tensor
    loads: dict[int, Tensor]
    """For each MoE layer [n_routed_experts]: how many tokens each expert was given."""
    choices: int
    """How many experts all tokens chose, in all layers."""
    hidden: Tensor | None = None
    """[rows, seq, hidden]: what the next stage of a pipeline takes; None after the last."""


class Places(Protocol):
    """Which places of its rows a process works on, where sequences are split over processes."""

    def of(self, seq: int) -> Tensor:
        """Those of a row of `seq`, ascending, [local] int64."""

    def total(self, counts: Tensor) -> Tensor:
        """Counts added up over the processes that share the rows."""


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
    span: Span | None = None,
    hidden: Tensor | None = None,
    places: Places | None = None,
) -> Losses:
    """The loss of a batch of token rows.

    batch.tokens: [rows, seq + 1] int64, inputs and targets in one; loss_mask: bool of the same shape, True for
    tokens whose prediction counts; segments: the sample each token belongs to. With segments, attention and
    positions start anew in each sample (SFT); without, rows are one stream (pretraining packs without
    cross-sample masks; report, section 4.1). whole: the targets of the batch that this one is a part of; the
    losses of all parts then add up to the whole batch's.

    A stage of a pipeline is told by `span`, and but for the first by `hidden`, what the stage before gave; its loss is
    what its own layers add to the balance loss, and on the last stage all the rest. places: the part of each row that
    is this process's.
    """
    tokens, segments = batch.tokens, batch.segments
    rows, seq = tokens.shape[0], tokens.shape[1] - 1
    mine = torch.arange(seq, device=tokens.device) if places is None else places.of(seq).to(tokens.device)
    positions, mask = mine, None
    if segments is not None:
        positions, mask = _per_sample(segments[:, :-1], mine)
    elif places is not None:
        mask = (mine.unsqueeze(1) >= torch.arange(seq, device=tokens.device))[None, None]
    layers = range(model.config.num_hidden_layers) if span is None else span.layers
    angles = model.rope(positions)
    routing: list[Routing] = []
    if hidden is None:
        hidden = model.embed_tokens(tokens[:, mine])
    hidden = model.through(hidden, angles, mask, routing, layers)

    modules, mtp, main = len(model.mtp) if mtp_weight > 0 else 0, None, None
    if span is None or span.last:
        # A module that looks k tokens ahead has no work at a row's last k places.
        ahead = [tokens[:, mine[mine + k < seq] + k] for k in range(1, modules + 1)]
        hidden, mtp_hidden = model.finish(hidden, ahead, angles, mask, routing)
        targets = tokens if batch.loss_mask is None else tokens.masked_fill(~batch.loss_mask, IGNORE)
        whole = whole or Targets.of(batch, len(mtp_hidden))
        terms = [
            linear_cross_entropy(
                h.flatten(0, 1),
                model.lm_head.weight,
                _ahead(targets, segments, k + 1, mine[: h.shape[1]]),
                whole.counted[k],
            )
            for k, h in enumerate((hidden, *mtp_hidden))
        ]
        main, hidden = terms[0], None
        if mtp_hidden:
            mtp = torch.stack(terms[1:]).mean()
    balance = sequence_balance(routing, rows, places) * (rows / (rows if whole is None else whole.rows))
    total = model.config.aux_loss_alpha * balance
    if main is not None:
        total = total + main
    if mtp is not None:
        total = total + mtp_weight * mtp
    return Losses(
        total,
        None if main is None else main.detach(),
        None if mtp is None else mtp.detach(),
        balance.detach(),
        expert_loads(routing),
        (model.config.num_experts_per_tok or 0) * sum(r.scores.shape[0] for r in routing),
        hidden,
    )


def _ahead(targets: Tensor, segments: Tensor | None, k: int, places: Tensor | None = None) -> Tensor:
    """The target k tokens after each of these places, flat; none where that token belongs to another sample.

    places: [n], by default all from which a target is within the row.
    """
    here = torch.arange(targets.shape[1] - k, device=targets.device) if places is None else places
    wanted = targets[:, here + k]
    if segments is not None:
        wanted = wanted.masked_fill(segments[:, here + k] != segments[:, here], IGNORE)
    return wanted.flatten()


def _per_sample(segments: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Positions that restart with each sample [batch, places], and who may see whom [batch, 1, places, seq]."""
    index = torch.arange(segments.shape[1], device=segments.device)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = torch.where(starts, index, 0).cummax(dim=1).values
    same = segments[:, places].unsqueeze(2) == segments.unsqueeze(1)
    mask = same & (places.unsqueeze(1) >= index)
    return (index - first)[:, places], mask.unsqueeze(1)


def sequence_balance(routing: Sequence[Routing], batch: int, places: Places | None = None) -> Tensor:
    """Sum over layers of the complementary sequence-wise balance loss, before alpha (equations 17-20).

    Where rows are split over processes, each gives the share of its own tokens: how often an expert was chosen,
    which carries no gradient, is counted over all of them.
    """
    total = torch.zeros((), device=routing[0].scores.device if routing else None)
    for layer in routing:
        scores = layer.scores.unflatten(0, (batch, -1))
        chosen = layer.indices.view(batch, -1)
        tokens = torch.tensor(float(scores.shape[1]), device=scores.device)
        affinity = (scores / scores.sum(dim=-1, keepdim=True)).sum(dim=1)
        counts = torch.zeros_like(affinity).scatter_add_(
            1, chosen, torch.ones_like(chosen, dtype=affinity.dtype)
        )
        if places is not None:
            counts, tokens = places.total(counts), places.total(tokens)
        frequency = counts * (scores.shape[-1] / (tokens * layer.indices.shape[1]))
        total = total + (frequency * affinity / tokens).sum(dim=-1).mean()
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
