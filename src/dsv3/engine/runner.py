"""The model's side of a step: from pieces of sequences to hidden states and logits.

New tokens of all scheduled sequences are laid end to end (`FlatBatch`) and go through the layers together, so that each
weight is read once for all of them. The head is applied only where something is to be chosen or reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from dsv3.model import FlatBatch, Piece, Transformer
from dsv3.model.flat import SHORT
from dsv3.model.fused import Network


class ModelRunner:
    """Runs pieces through one model and one cache, on the model's device."""

    def __init__(self, model: Transformer, cache: list[Tensor], alone: bool = False) -> None:
        """cache: for each layer, and the first MTP module's after them; alone: pieces go one by one, for results
        that do not depend on what else is in the batch where kernels do not see to that."""
        self.model = model
        self.cache = cache
        self.alone = alone
        self._network: Network | None = None

    def look_again(self) -> None:
        """Somebody may have changed the model since the last step."""
        self._network = None

    def run(self, pieces: Seq[Piece], token_ids: Seq[list[int]]) -> list[Tensor]:
        """Put each piece's tokens through the model. Returns hidden states [new, hidden] for each."""

        def forward(batch: FlatBatch, members: list[int]) -> Tensor:
            return self.model.forward_flat(self._tensor(token_ids[i] for i in members), batch)

        return self._forward(pieces, forward)

    def draft(self, pieces: Seq[Piece], next_ids: Seq[list[int]], hidden: Seq[Tensor]) -> list[Tensor]:
        """Put each piece through the MTP module.

        next_ids: for each piece, the successors of its tokens; hidden: what the main model, or this function, gave
        there. Returns hidden states [new, hidden] for each.
        """

        def forward(batch: FlatBatch, members: list[int]) -> Tensor:
            rows = torch.cat([hidden[i] for i in members])
            return self.model.draft_flat(self._tensor(next_ids[i] for i in members), rows, batch)

        return self._forward(pieces, forward)

    def logits(self, hidden: Seq[Tensor]) -> Tensor:
        """[rows, vocab] of these hidden states, all rows one after the other."""
        rows = hidden[0] if len(hidden) == 1 else torch.cat(list(hidden))
        if self.alone:
            return torch.cat([self.model.logits_flat(row) for row in rows.split(1)])
        return self.model.logits_flat(rows)

    def _forward(self, pieces: Seq[Piece], forward: Callable[[FlatBatch, list[int]], Tensor]) -> list[Tensor]:
        if self._network is None:
            self._network = Network(self.model.layers, self.cache)
        order = sorted(range(len(pieces)), key=lambda i: pieces[i].new > SHORT)
        results: dict[int, Tensor] = {}
        for members in [[i] for i in order] if self.alone else [order]:
            batch = FlatBatch.lay([pieces[i] for i in members], self.cache, network=self._network)
            hidden = forward(batch, members).split([pieces[i].new for i in members])
            results.update(zip(members, hidden, strict=True))
        return [results[i] for i in range(len(pieces))]

    def _tensor(self, token_ids: Iterable[list[int]]) -> Tensor:
        flat = [token_id for ids in token_ids for token_id in ids]
        return torch.tensor(flat, dtype=torch.int64, device=self.cache[0].device)
