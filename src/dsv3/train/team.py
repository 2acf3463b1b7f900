"""One process among those that train a model together: its layout applied to the model, and its part of a step.

Each process reads its own rows of a batch, or its own places of them, and runs its own stages and experts. Losses are
divided by what the *whole* batch holds, so that whatever the processes compute, it only has to be added up: losses
and loads here, gradients in the optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.model import Transformer
from dsv3.parallel.context import Context, apply_context_parallel
from dsv3.parallel.deferred import apply_deferral
from dsv3.parallel.experts import apply_expert_parallel, own_experts
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.part import spans
from dsv3.parallel.pipeline import Pipeline
from dsv3.recipe import Layout


class Team:
    """What a process needs to know of the others."""

    def __init__(self, mesh: Mesh, model: Transformer, device: torch.device) -> None:
        """Apply the layout to a model or part of it, in place."""
        layout = mesh.layout
        self.mesh, self.device, self.config = mesh, device, model.config
        self.spans = spans(model.config, layout.stages)
        self.places: Context | None = None
        if layout.expert > 1:
            apply_expert_parallel(model, mesh, layout.dispatch)
        if layout.context > 1:
            self.places = apply_context_parallel(model, mesh)
        if layout.pipeline > 1:
            apply_deferral(model)
        self._pipeline: Pipeline | None = None

    @property
    def layout(self) -> Layout:
        return self.mesh.layout

    @property
    def reads(self) -> bool:
        """Whether this process is the first of those that read the same rows."""
        return self.mesh.pipeline == 0 and self.mesh.context == 0

    @property
    def first_expert(self) -> int:
        """Of those of each layer that this process holds."""
        first: int = own_experts(self.mesh, self.config.n_routed_experts or 0).start
        return first

    def rows(self, rows: int) -> slice:
        """This process's rows of a batch of so many."""
        each = rows // self.layout.data
        return slice(self.mesh.data * each, (self.mesh.data + 1) * each)

    def counted(self, rows: int, targets: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Rows and targets of the whole batch, from those of this process's rows."""
        counts = torch.tensor([rows, *targets], device=self.device)
        dist.all_reduce(counts, group=self.mesh.places.get_group("data"))
        total: list[int] = counts.tolist()
        return total[0], tuple(total[1:])

    def sum(self, *tensors: Tensor) -> None:
        """Add up over all processes, in place."""
        for tensor in tensors:
            dist.all_reduce(tensor)

    def first_says(self, answer: bool) -> bool:
        """The first process's answer, which holds for all."""
        said = torch.tensor([answer], device=self.device)
        dist.broadcast(said, src=0)
        return bool(said)

    def pipeline(self, rows: int, seq: int, dtype: torch.dtype) -> Pipeline:
        """The pipeline, for microbatches of so many rows and tokens."""
        tokens = seq if self.places is None else len(self.places.of(seq))
        shape = rows, tokens, self.config.hidden_size
        if self._pipeline is None:
            self._pipeline = Pipeline(self.mesh, shape, dtype, self.device)
        self._pipeline.shape = shape
        return self._pipeline
