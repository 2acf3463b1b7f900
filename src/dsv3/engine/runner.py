"""The model's side of a step: from a schedule to logits.

New tokens of all scheduled sequences are laid end to end, decoding ones first (`FlatBatch`), and go through
the layers together, so that each weight is read once for all of them. The head is applied only where a token
will be sampled: at every decoding token, and at the last token of a prompt.
"""

from __future__ import annotations

from itertools import compress

import torch
from torch import Tensor

from dsv3.engine.cache import LatentCache
from dsv3.engine.scheduler import Schedule
from dsv3.engine.sequence import Sequence
from dsv3.model import FlatBatch, Span, Transformer


class ModelRunner:
    """Runs schedules through one model and one cache, on the model's device."""

    def __init__(self, model: Transformer, cache: LatentCache) -> None:
        self.model = model
        self.cache = cache
        self.device = cache.layers[0].device
        self._counting = torch.arange(max(cache.max_length, cache.max_rows), device=self.device)

    @torch.inference_mode()
    def run(self, schedule: Schedule) -> tuple[list[Sequence], Tensor]:
        """Put the scheduled tokens through the model.

        Returns the sequences that are ready for their next token, and logits [ready, vocab] for it. No
        sequence is changed: if anything fails, the step can be taken again.
        """
        if schedule.prefill:
            batch, input_ids = self._mixed_batch(schedule)
            hidden = self.model.forward_flat(input_ids, batch)
            complete = [new == sequence.pending for sequence, new in schedule.prefill]
            ends = [span.tokens.stop - 1 for span in compress(batch.spans, complete)]
            hidden = hidden[
                torch.tensor([*range(batch.decoding), *ends], dtype=torch.int64, device=self.device)
            ]
            ready = schedule.decoding + [sequence for sequence, _ in compress(schedule.prefill, complete)]
        else:
            batch, input_ids = self._decode_batch(schedule.decoding)
            hidden = self.model.forward_flat(input_ids, batch)
            ready = schedule.decoding
        logits: Tensor = self.model.lm_head(hidden)
        return ready, logits

    def _decode_batch(self, decoding: list[Sequence]) -> tuple[FlatBatch, Tensor]:
        """One token of each sequence: the hot path, so as few and small operations as can be."""
        places = [sequence.computed for sequence in decoding]
        tokens = [sequence.tokens[-1] for sequence in decoding]
        input_ids, positions = torch.tensor([tokens, places], device=self.device).unbind()
        context, mask = self._context(places, positions)
        rows = self._counting[: len(decoding)]
        return FlatBatch(positions, rows, self.cache.layers, len(decoding), (), context, mask), input_ids

    def _mixed_batch(self, schedule: Schedule) -> tuple[FlatBatch, Tensor]:
        decoding = len(schedule.decoding)
        places = [sequence.computed for sequence in schedule.decoding]
        tokens = [sequence.tokens[-1] for sequence in schedule.decoding]
        positions, rows, spans = list(places), list(range(decoding)), []
        for row, (sequence, new) in enumerate(schedule.prefill, start=decoding):
            start, end = sequence.computed, sequence.computed + new
            spans.append(Span(slice(len(tokens), len(tokens) + new), row, end))
            tokens += sequence.tokens[start:end]
            positions += range(start, end)
            rows += [row] * new
        flat = torch.tensor([tokens, positions, rows], dtype=torch.int64, device=self.device)
        context, mask = self._context(places, flat[1, :decoding])
        batch = FlatBatch(flat[1], flat[2], self.cache.layers, decoding, tuple(spans), context, mask)
        return batch, flat[0]

    def _context(self, places: list[int], positions: Tensor) -> tuple[int, Tensor | None]:
        """The longest context of decoding sequences, and the mask that their unequal lengths need, if any."""
        if not places:
            return 0, None
        context = max(places) + 1
        if min(places) + 1 == context:
            return context, None
        return context, (self._counting[:context] <= positions.unsqueeze(1)).unsqueeze(1)
