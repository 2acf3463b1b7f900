"""Routed experts that lie elsewhere: a layer is told which ones it needs, and gets them a few at a time.

Of 256 experts a token of DeepSeek-V3 goes through 8, so a model runs with far fewer in memory, if somebody fetches
those that are missing. Where they come from is not the model's business: it asks a `Store`. A step of many tokens
may need more experts than fit; they come in waves then, in the order of their numbers, and what they give is added up
in that order, as if all were there.

To fetch early means to guess. What a layer adds to the stream is small beside what is there, so the next layer's gate
says much about the next layer's choice before this layer is through.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from dsv3.kernels.inference import Matrix, linear
from dsv3.kernels.moe import routed_experts
from dsv3.kernels.packed import Weight
from dsv3.model.moe import MoE

if TYPE_CHECKING:
    from dsv3.model.transformer import Block, Transformer


@dataclass(frozen=True)
class Expert:
    """One routed expert, in memory that its store may use for another one later."""

    gate_up: Weight
    """[2 * width, hidden]"""
    down: Weight
    """[hidden, width]"""

    @cached_property
    def matrices(self) -> tuple[Matrix, Matrix]:
        """What the native kernels read. ValueError if they cannot."""
        return Matrix.of(self.gate_up), Matrix.of(self.down)


class Store(Protocol):
    """Where experts come from. Not for several threads at once."""

    device: torch.device
    """Of their memory."""

    def like(self, layer: int) -> Expert:
        """What an expert of a layer looks like: shapes, formats and strides are right, the numbers are any."""

    def waves(self, layer: int, experts: Sequence[int]) -> Generator[dict[int, Expert], None, None]:
        """These experts, given in ascending order, in one wave or more; each may be used until the next wave is
        asked for. No experts are one wave, an empty one."""

    def foretell(self, layer: int, experts: Sequence[int]) -> None:
        """These may be wanted soon, in the order of their numbers."""


class StoredExperts(nn.Module):
    """Stands in the place of a layer's `Experts`."""

    linear: None = None
    """Nothing multiplies by the matrices in a way of its own."""

    def __init__(self, store: Store, layer: int, count: int) -> None:
        super().__init__()
        self.store, self.layer, self.count = store, layer, count
        self.next: list[Block] = []
        """The block whose experts are wanted next, if there is one."""

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """What `Experts` gives, computed where the store's memory is, wherever x is."""
        if not x.shape[0]:
            return x
        wanted = sorted(set(indices.flatten().tolist()))
        with closing(self.store.waves(self.layer, wanted)) as waves:
            down: list[Weight] = []
            ins = _Stack(self.count, self._in_turn(waves, down))
            outs = _Stack(self.count, (down[-1] if down else None for _ in range(self.count)))
            device = self.store.device
            given = x.to(device), indices.to(device), weights.to(device)
            return routed_experts(*given, ins, outs, linear).to(x.device)  # type: ignore[arg-type]

    def _in_turn(self, waves: Iterator[dict[int, Expert]], down: list[Weight]) -> Iterator[Weight | None]:
        """Each expert's first matrix, None for those that nobody wants; the second goes to the end of `down`."""
        done = 0
        for wave in waves:
            for number, expert in wave.items():
                yield from repeat(None, number - done)
                down[:] = [expert.down]
                yield expert.gate_up
                done = number + 1
        yield from repeat(None, self.count - done)


class _Stack:
    """Passes for a stack of matrices, of which each is there only while it has its turn."""

    kind = "in turn"
    """No kind of packing for a whole stack; what comes may be packed."""

    def __init__(self, count: int, matrices: Iterator[Weight | None]) -> None:
        self.shape = (count,)
        self._matrices = matrices

    def unbind(self) -> Iterator[Weight | None]:
        return self._matrices


def put_stored(model: Transformer, store: Store) -> None:
    """Take the routed experts out of a model: from now on it gets them from a store."""
    before: StoredExperts | None = None
    for block in list(model.modules()):
        if not isinstance(mlp := getattr(block, "mlp", None), MoE):
            continue
        count = mlp.gate.weight.shape[0]
        mlp.experts = StoredExperts(store, mlp.layer, count)  # type: ignore[assignment]
        if before is not None and mlp.layer < model.config.num_hidden_layers:
            before.next.append(block)  # type: ignore[arg-type]
        before = mlp.experts  # type: ignore[assignment]
