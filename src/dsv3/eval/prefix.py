"""A prompt that the model has read, from which it may go on in several ways.

Most of an evaluation is prompts that share a long beginning: one text, ten answers to weigh. The engine would read
the text once for each. Here it is read once, into a latent cache of its own; an answer is written after
it, scored, and written over by the next one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from dsv3.engine.cache import allocate
from dsv3.kernels.inference import BLOCK
from dsv3.model import FlatBatch, Piece, Transformer

_CHUNK = (
    2048  # tokens that go through the model at once, as in the engine: what a long prompt needs stays small
)


class Prefix:
    """Tokens in a cache of their own, and what the model expects after them."""

    def __init__(self, model: Transformer, ids: Sequence[int], room: int) -> None:
        """ids: at least one; room: how many tokens will follow at most."""
        weight = model.embed_tokens.weight
        self.model = model
        self.length = 0
        """Tokens that every continuation follows."""
        blocks = -(-(len(ids) + room) // BLOCK)
        self._blocks = range(blocks)
        self._cache = allocate(model.config, blocks, weight.dtype, weight.device)
        self._last = weight
        self.extend(ids)

    def extend(self, ids: Sequence[int]) -> None:
        """Make tokens part of the prefix."""
        for start in range(0, len(ids), _CHUNK):
            part = ids[start : start + _CHUNK]
            self._last = self._read(part, self.length)[-1:]
            self.length += len(part)

    def logprobs(self, ids: Sequence[int]) -> list[float]:
        """The log-probability of each of these tokens after the prefix and those before it."""
        hidden = self._last
        if len(ids) > 1:
            hidden = torch.cat((hidden, self._read(ids[:-1], self.length)))
        table = self._logits(hidden).log_softmax(dim=-1)
        wanted = torch.tensor(ids, device=table.device).unsqueeze(1)
        each: list[float] = table.gather(1, wanted).squeeze(1).tolist()
        return each

    def greedy(self, most: int, end_ids: Collection[int] = ()) -> list[int]:
        """The likeliest token, over and over: up to `most`, or to one of `end_ids`, which is not part of it."""
        ids: list[int] = []
        hidden = self._last
        while len(ids) < most:
            token = int(self._logits(hidden).argmax())
            if token in end_ids:
                break
            ids.append(token)
            if len(ids) < most:
                hidden = self._read(ids[-1:], self.length + len(ids) - 1)
        return ids

    @torch.inference_mode()
    def _read(self, ids: Sequence[int], start: int) -> Tensor:
        """Put tokens into the cache from a place on, over what may stand there; returns hidden [tokens, hidden]."""
        tokens = torch.tensor(ids, dtype=torch.int64, device=self.model.embed_tokens.weight.device)
        batch = FlatBatch.lay([Piece(self._blocks, start, len(ids))], self._cache)
        return self.model.forward_flat(tokens, batch)

    @torch.inference_mode()
    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(hidden)
        return logits.float()
