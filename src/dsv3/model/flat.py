"""The batch of inference: new tokens of many sequences, laid end to end, and the blocks that hold their past.

A sequence's latents lie in blocks of a few dozen tokens that it need not own alone and that need not be
neighbours; a *table* lists its blocks in order. So nothing is padded, nothing moves when a sequence comes or
goes, and sequences that begin alike can share the blocks of their beginning. The price is an indirection in every
read of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsv3.kernels.inference import Batch

if TYPE_CHECKING:
    from dsv3.model.fused import Network

SHORT = 16
"""New tokens of one sequence up to which each of them attends by itself, straight from the blocks. One is decoding,
a few are decoding with drafts; longer pieces of a prompt share one copy of their past."""


class Piece(NamedTuple):
    """Consecutive new tokens of one sequence."""

    blocks: Sequence[int]
    """The sequence's blocks, in order, with room for the new tokens."""
    start: int
    """How many tokens of the sequence are in the cache already."""
    new: int

    @property
    def end(self) -> int:
        return self.start + self.new


@dataclass(frozen=True)
class Span:
    """A longer piece inside a flat batch."""

    tokens: slice
    """Where its tokens stand in the flat batch."""
    blocks: Tensor
    """[blocks] int64: where its past and its own latents are."""
    context: int
    """Tokens of the sequence once these are in."""


@dataclass(frozen=True)
class FlatBatch:
    """New tokens of several sequences, one after the other, and the cache that holds their past."""

    positions: Tensor
    """[tokens] int64: each token's position in its sequence; it sees everything up to there."""
    slots: Tensor
    """[tokens] int64: where its latent goes: block * tokens per block + place in the block."""
    owners: Tensor
    """[tokens] int32: each token's row in `tables`."""
    tables: Tensor
    """[sequences, most blocks] int32: each sequence's blocks in order, then zeros."""
    cache: Sequence[Tensor]
    """For each layer [blocks, tokens per block, latent_dim], written in place."""
    short: int
    """The first so many tokens belong to short pieces; spans follow."""
    short_blocks: int
    """The most blocks that a short piece looks at."""
    spans: tuple[Span, ...]
    network: Network | None = None
    """The model's layers as `dsv3.model.fused` has looked at them before, if nobody has changed the model since."""
    native: list[Batch] = field(default_factory=list, repr=False, compare=False)
    """What `dsv3.model.fused` makes of this once, for all layers."""

    @classmethod
    def lay(
        cls,
        pieces: Sequence[Piece],
        cache: Sequence[Tensor],
        short: int = SHORT,
        network: Network | None = None,
    ) -> FlatBatch:
        """Pieces in the order of their tokens; those of up to `short` tokens must come before all longer ones."""
        device, size = cache[0].device, cache[0].shape[1]
        used = [-(-piece.end // size) for piece in pieces]
        tables = np.zeros((len(pieces), max(used)), dtype=np.int32)
        for row, (piece, blocks) in enumerate(zip(pieces, used, strict=True)):
            tables[row, :blocks] = piece.blocks[:blocks]
        on_device = torch.from_numpy(tables).to(device)
        if short and all(piece.new == 1 for piece in pieces):  # decoding: the same with less ado
            places = [piece.blocks[piece.start // size] * size + piece.start % size for piece in pieces]
            rows = torch.tensor([[piece.start for piece in pieces], places], device=device)
            each = torch.arange(len(pieces), dtype=torch.int32, device=device)
            return cls(rows[0], rows[1], each, on_device, cache, len(pieces), max(used), (), network)
        counts = np.array([piece.new for piece in pieces])
        owners = np.arange(len(pieces)).repeat(counts)
        before = counts.cumsum() - counts
        starts = np.array([piece.start for piece in pieces])
        positions = np.arange(len(owners)) + (starts - before)[owners]
        slots = tables[owners, positions // size].astype(np.int64) * size + positions % size

        few = sum(piece.new <= short for piece in pieces)
        flat = torch.from_numpy(np.stack([positions, slots])).to(device)
        spans = tuple(
            Span(slice(first, first + piece.new), on_device[row, : used[row]].long(), piece.end)
            for row, (piece, first) in enumerate(zip(pieces, before.tolist(), strict=True))
            if row >= few
        )
        return cls(
            positions=flat[0],
            slots=flat[1],
            owners=torch.from_numpy(owners.astype(np.int32)).to(device),
            tables=on_device,
            cache=cache,
            short=int(counts[:few].sum()),
            short_blocks=max(used[:few], default=0),
            spans=spans,
            network=network,
        )
