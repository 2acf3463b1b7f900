"""How a run is laid over processes: the degrees of each kind of parallelism (report, section 3.2).

    parallel: {pipeline: 16, data: 128, expert: 64, nodes: 8, schedule: dualpipe, sharding: zero1}

is the report's own, on 2,048 GPUs. A process is one GPU (or, here, one CPU process). Its rank is

    rank = (pipeline place * data + data place) * context + context place

so that the processes that exchange tokens at every layer, those of one expert group, have consecutive ranks.
Expert parallelism takes no processes of its own: the `data * context` processes at one place of the pipeline are
cut into groups of `expert`, each of which holds every expert of the layer once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsv3.config import ModelConfig
from dsv3.recipe.fields import RecipeError

ScheduleName = Literal["1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev"]
Sharding = Literal["none", "zero1", "fsdp"]


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism; all ones is a single process."""

    pipeline: int = 1
    """PP: devices that a microbatch passes through."""
    data: int = 1
    """DP: parts that a batch's sequences are split into."""
    context: int = 1
    """CP: parts that each sequence is split into."""
    expert: int = 1
    """EP: processes that hold a layer's routed experts together; divides data * context."""
    nodes: int = 1
    """Machines that one expert group lies on. A token crosses to at most `topk_group` of them."""
    schedule: ScheduleName = "1f1b"
    """Order of the pipeline's work (`dsv3.planner.pipeline`)."""
    chunks: int = 1
    """Stages per device of the interleaved schedule."""
    sharding: Sharding = "zero1"
    """Who keeps masters and moments: everyone (none), each a share (zero1), of blocks' weights too (fsdp)."""
    dispatch: Literal["fp8", "bf16"] = "bf16"
    """What tokens travel as on their way to experts; they come back as they were computed."""

    def __post_init__(self) -> None:
        for name in ("pipeline", "data", "context", "expert", "nodes", "chunks"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.data * self.context % self.expert:
            raise RecipeError(
                f"expert is {self.expert}: it must divide data * context = {self.data * self.context}"
            )
        if self.expert % self.nodes:
            raise RecipeError(f"nodes is {self.nodes}: it must divide expert = {self.expert}")
        if self.chunks > 1 and self.schedule != "interleaved":
            raise RecipeError(f"chunks is {self.chunks}: only the interleaved schedule has several")
        if self.schedule == "interleaved" and self.chunks == 1 and self.pipeline > 1:
            raise RecipeError("chunks is 1: the interleaved schedule needs at least 2, or take 1f1b")
        if self.schedule == "dualpipe" and self.pipeline % 2 and self.pipeline > 1:
            raise RecipeError(f"pipeline is {self.pipeline}: dualpipe needs an even number of devices")
        if self.sharding == "fsdp" and self.pipeline > 1:
            raise RecipeError(
                f"sharding is fsdp: it does not go with pipeline {self.pipeline}, which needs its weights for many "
                "microbatches at once; take zero1, or pipeline 1"
            )

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.pipeline * self.data * self.context

    @property
    def replicas(self) -> int:
        """How often each expert is held at one place of the pipeline."""
        return self.data * self.context // self.expert

    @property
    def stages(self) -> int:
        """Parts that the layers are cut into."""
        if self.pipeline == 1:
            return 1
        return self.pipeline * {"interleaved": self.chunks, "dualpipev": 2}.get(self.schedule, 1)

    def check_model(self, config: ModelConfig) -> None:
        """Raise RecipeError if a model cannot be laid out so."""
        experts = config.n_routed_experts
        if self.expert > 1 and (experts is None or experts % self.expert):
            raise RecipeError(
                f"parallel.expert is {self.expert}: it must divide the model's {experts or 0} routed experts"
            )
        units = 2 + config.num_hidden_layers + config.num_nextn_predict_layers
        if self.stages > units:
            raise RecipeError(
                f"parallel gives {self.stages} stages, but the model has {units} parts to cut between: use fewer"
            )

    def granule(self, microbatch: int) -> int:
        """Sequences that a batch is a multiple of: every process has the same number of whole microbatches."""
        if self.pipeline == 1:
            return self.data
        return self.data * microbatch * (2 if self.schedule == "dualpipe" else 1)
