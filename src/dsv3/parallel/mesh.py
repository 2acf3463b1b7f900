"""Who does what: each process's place in a `Layout`, and the groups of processes that it talks to.

`torch.distributed` must be initialised (torchrun, or `dsv3.parallel.launch`). Processes are laid out as
`dsv3.recipe.layout` says; torch's `DeviceMesh` makes the groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dsv3.errors import UserError
from dsv3.planner.pipeline import held
from dsv3.recipe.layout import Layout

T = TypeVar("T")

# torch 2.13 has new names for these, and warns of the old ones.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Mesh:
    """This process's place, and its groups."""

    layout: Layout
    rank: int
    places: DeviceMesh
    """[pipeline, data, context]"""
    groups: DeviceMesh
    """[pipeline, replica, node, local]: the same processes; an expert group is node x local."""

    @classmethod
    def of(cls, layout: Layout, device: str = "cpu") -> Mesh:
        """Make the groups; all processes call this. Raises UserError if there are not as many as the layout has."""
        world = dist.get_world_size()
        if world != layout.world:
            raise UserError(
                f"there are {world} processes, but the layout has pipeline {layout.pipeline} x data {layout.data} "
                f"x context {layout.context} = {layout.world}: start that many"
            )
        kind = torch.device(device).type
        places = init_device_mesh(
            kind,
            (layout.pipeline, layout.data, layout.context),
            mesh_dim_names=("pipeline", "data", "context"),
        )
        groups = init_device_mesh(
            kind,
            (layout.pipeline, layout.replicas, layout.nodes, layout.expert // layout.nodes),
            mesh_dim_names=("pipeline", "replica", "node", "local"),
        )
        return cls(layout, dist.get_rank(), places, groups)

    # Places ------------------------------------------------------------------------------------------------

    @property
    def pipeline(self) -> int:
        return self.places.get_local_rank("pipeline")

    @property
    def data(self) -> int:
        return self.places.get_local_rank("data")

    @property
    def context(self) -> int:
        return self.places.get_local_rank("context")

    @property
    def expert(self) -> int:
        """Place in the expert group: node * (expert / nodes) + local."""
        return self.rank % self.layout.expert

    # Groups ------------------------------------------------------------------------------------------------

    @property
    def local_group(self) -> ProcessGroup:
        """Those of the expert group on the same node."""
        return self.groups.get_group("local")

    @property
    def node_group(self) -> ProcessGroup:
        """Those of the expert group at the same place of their nodes."""
        return self.groups.get_group("node")

    @property
    def context_group(self) -> ProcessGroup:
        """Those that share this process's sequences."""
        return self.places.get_group("context")

    # Who holds what ----------------------------------------------------------------------------------------

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages of the model that this process holds."""
        layout = self.layout
        return held(layout.schedule, self.pipeline, layout.pipeline, layout.stages)

    def holders(self, stages: Iterable[int], experts: bool = False) -> tuple[int, ...]:
        """Ranks that hold the same numbers as this process, of a parameter that any of these stages has.

        experts: the parameter is this process's share of the routed experts.
        """
        layout, wanted = self.layout, set(stages)
        width = layout.data * layout.context
        devices = (
            p
            for p in range(layout.pipeline)
            if wanted & set(held(layout.schedule, p, layout.pipeline, layout.stages))
        )
        flat = [f for f in range(width) if not experts or f % layout.expert == self.expert]
        return tuple(p * width + f for p in devices for f in flat)


def make_groups(
    wanted: Iterable[tuple[int, ...]], backend: str | None = None
) -> dict[tuple[int, ...], ProcessGroup]:
    """A group for each of these tuples of ranks, in which this process is. All processes call this."""
    mine = set(wanted)
    everyones: list[set[tuple[int, ...]]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    # In one order, for those in a group wait for each other; and everyone takes part in making all, without waiting,
    # since torch names groups by counting.
    groups = {ranks: dist.new_group(ranks, backend=backend) for ranks in sorted(set().union(*everyones))}
    return {ranks: groups[ranks] for ranks in mine}


# What one does for all ----------------------------------------------------------------------------------

_patient: ProcessGroup | None = None  # for waiting longer than a collective may take


def leads() -> bool:
    """Whether this process speaks for all: it is the first, or there is no other."""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_lead(work: Callable[[], T]) -> T:
    """What `work` gives in the first process, in all of them; a UserError or OSError there is one everywhere.

    All processes call this, and wait as long as it takes.
    """
    global _patient
    if _patient is None and dist.is_initialized():
        _patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    return on_first(work, _patient)


def on_first(work: Callable[[], T], group: ProcessGroup | None) -> T:
    """The same over a group that has all processes; None where this one is alone."""
    said: list[T | Exception | None] = [None]
    if leads():
        try:
            said = [work()]
        except (UserError, OSError) as problem:
            said = [problem]
    if group is not None:
        dist.broadcast_object_list(said, src=0, group=group)
    (result,) = said
    if isinstance(result, Exception):
        raise result
    return result  # type: ignore[return-value]
