"""Expert parallelism: each process holds some of a layer's experts, and tokens travel to them and back (section 3.2.2).

A process sends each of its tokens once to every process that holds one of the token's experts, with the numbers of
its experts and their weights. There the experts' outputs are weighed and added up, so that one row a token comes
back, and what comes back from several processes is added up again. Shared experts, which every process has, work on
a process's own tokens while these travel.

Between machines the network is slower than within, so there are two hops where an expert group lies on several nodes:
a token crosses to a node once, however many of its experts are there, to the process at the same place of that node,
and is handed on within the node; on the way back rows are added up within the node before they cross. A gate that
admits `topk_group` groups of experts, of which each lies on one node, bounds the crossings of a token to so many.

With `dispatch: fp8` tokens travel to their experts in FP8, in tiles of 128 channels whose scales are powers of two, and
so do, in the backward pass, the gradients of what the experts gave; what is added up travels as it was computed.
FP8 experts (`dsv3.train.fp8`) round their input to the same tiles, which changes nothing that has come in them.

Gate and shared experts are replicated. Experts see the tokens of all processes of the group, so their gradients are
sums over the group as they are. DeepEP's kernels, which do a hop's copying and sending in one, are not used yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from dsv3.model.moe import Experts, MoE, Routing
from dsv3.parallel.exchange import Route, Wire, add_rows, gather, scatter
from dsv3.parallel.mesh import Mesh


def own_experts(mesh: Mesh, experts: int) -> slice:
    """The experts of a layer of so many that this process holds."""
    each, rest = divmod(experts, mesh.layout.expert)
    assert not rest, f"{experts} experts cannot be divided over {mesh.layout.expert} processes"
    return slice(mesh.expert * each, (mesh.expert + 1) * each)


def keep_experts(experts: Experts, mine: slice) -> None:
    """Cut a layer's stacks to some of its experts, into parameters of their own, in place."""
    for name in ("gate_up_proj", "down_proj"):
        stack: nn.Parameter = getattr(experts, name)
        setattr(experts, name, nn.Parameter(stack.detach()[mine].clone(), stack.requires_grad))


def apply_expert_parallel(model: nn.Module, mesh: Mesh, dispatch: Literal["fp8", "bf16"] = "bf16") -> None:
    """Make each layer's routed experts of a model those of this process, in place: names and hooks stay.

    Stacks that are whole are cut, into parameters of their own; those that have this process's experts only are taken
    as they are. dispatch: what tokens travel as; bf16 is the dtype they are computed in. Before or after `apply_fp8`,
    `apply_recompute` and `apply_deferral`, and before there is an optimiser.
    """
    if mesh.layout.expert == 1:
        return
    for module in model.modules():
        if isinstance(module, MoE):
            module.__class__ = ParallelMoE
            cast(ParallelMoE, module).spread(mesh, dispatch)


@dataclass(frozen=True)
class Hop:
    """A group that tokens are handed on in."""

    group: ProcessGroup
    behind: int
    """Experts that are reached through each of its members: the first has those from 0 on, and so on."""

    def wanted(self, numbers: Tensor) -> Tensor:
        """How many of a row's experts, [rows, chosen] with -1 for none, are behind each member: [rows, members]."""
        members = dist.get_world_size(self.group)
        owner = torch.where(numbers < 0, members, numbers.div(self.behind, rounding_mode="floor"))
        wanted = numbers.new_zeros(len(numbers), members + 1)
        return wanted.scatter_add_(1, owner, torch.ones_like(owner))[:, :members]

    def behind_here(self, numbers: Tensor) -> Tensor:
        """The same experts, counted from the first of those behind this process; -1 for those elsewhere."""
        numbers = numbers - dist.get_rank(self.group) * self.behind
        return torch.where((numbers >= 0) & (numbers < self.behind), numbers, -1)


class ParallelMoE(MoE):
    """A layer whose `experts` are a process's own, for tokens of all."""

    hops: tuple[Hop, ...]
    dispatch: Wire
    routes: tuple[Route, ...] = ()
    """Of the latest forward pass: the way over each hop, where one can see what was sent."""

    def spread(self, mesh: Mesh, dispatch: Literal["fp8", "bf16"]) -> None:
        """Hold this process's experts only."""
        layout, total = mesh.layout, len(self.gate.weight)
        if len(self.experts.down_proj) == total:
            keep_experts(self.experts, own_experts(mesh, total))
        self.dispatch = "fp8" if dispatch == "fp8" else "plain"
        hops = Hop(mesh.node_group, total // layout.nodes), Hop(mesh.local_group, total // layout.expert)
        self.hops = tuple(hop for hop in hops if dist.get_world_size(hop.group) > 1)

    def forward(self, x: Tensor, routing: list[Routing] | None = None) -> Tensor:
        """x: [..., hidden], this process's tokens. As `MoE.forward`; all processes of the expert group call it."""
        flat = x.reshape(-1, x.shape[-1])
        scores, numbers, weights = self.gate(flat)
        if routing is not None:
            routing.append(Routing(self.layer, scores, numbers))
        rows, shared, routes = flat, None, list[Route]()
        for hop in self.hops:
            route = Route.of(hop.wanted(numbers), hop.group)
            # In one message: numbers of experts are exact in float32.
            beside = torch.cat((weights.float(), numbers.float()), dim=1)
            arrive = scatter(rows, beside, route, self.dispatch)
            if not routes and self.shared_experts is not None:
                shared = self.shared_experts(flat)
            rows, beside = arrive()
            weights, numbers = beside.chunk(2, dim=1)
            numbers = hop.behind_here(numbers.detach().long())
            routes.append(route)
        out = self._compute(rows, numbers, weights, routes[-1].choices)
        for route in reversed(routes):
            out = gather(out, route, backward=self.dispatch)
        self.routes = tuple(routes)
        return (out if shared is None else out + shared).view_as(x)

    def _compute(self, rows: Tensor, numbers: Tensor, weights: Tensor, choices: int) -> Tensor:
        """The weighed sum of what this process's experts make of each row, of those that it chose: `choices` in all."""
        row, choice = (numbers >= 0).nonzero_static(size=choices).unbind(1)
        chosen = numbers[row, choice].unsqueeze(1), weights[row, choice].unsqueeze(1)
        copies = _Copies.apply(rows, row)  # type: ignore[no-untyped-call]
        out: Tensor = _Sums.apply(self.experts(copies, *chosen), row, len(rows))  # type: ignore[no-untyped-call]
        return out


class _Copies(torch.autograd.Function):
    """A row for each choice."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, row: Tensor) -> Tensor:
        ctx.row, ctx.count = row, len(rows)
        return rows.index_select(0, row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return add_rows(grads[0], ctx.row, ctx.count), None


class _Sums(torch.autograd.Function):
    """The sum of each row's choices."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, row: Tensor, count: int) -> Tensor:
        ctx.row = row
        return add_rows(out, row, count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.row), None, None
