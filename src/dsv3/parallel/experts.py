"""Expert parallelism: each process holds some of a layer's experts, and tokens travel to them and back (section 3.2.2).

A process sends each of its tokens once to every process that holds one of the token's experts, with the numbers of
those experts and their weights. There the experts' outputs are weighed and added up, so that one row a token comes
back, and what comes back from several processes is added up again.

Between machines the network is slower than within, so there are two hops where an expert group lies on several nodes:
a token crosses to a node once, however many of its experts are there, to the process at the same place of that node,
and is handed on within the node; on the way back rows are added up within the node before they cross. A gate that
admits `topk_group` groups of experts, of which each lies on one node, bounds the crossings of a token to so many.

With `dispatch: fp8` tokens travel to their experts in FP8, in tiles of 128 channels whose scales are powers of two, and
so do, in the backward pass, the gradients of what the experts gave; what is added up travels as it was computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from dsv3.model.moe import Experts, MoE
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.overlap import pause
from dsv3.quant import dequantize_tiles, quantize_tiles


def own_experts(mesh: Mesh, experts: int) -> slice:
    """The experts of a layer of so many that this process holds."""
    each = experts // mesh.layout.expert
    return slice(mesh.expert * each, (mesh.expert + 1) * each)


def apply_expert_parallel(model: nn.Module, mesh: Mesh, dispatch: str = "bf16") -> None:
    """Make each layer's routed experts of a model those of this process, in place. After `apply_fp8`.

    Stacks that are whole are cut; those that have this process's experts only are taken as they are.
    """
    for module in model.modules():
        if isinstance(module, MoE):
            experts, kind = module.experts, type(module.experts)
            experts.__class__ = type(f"Parallel{kind.__name__}", (_ParallelExperts, kind), {})
            cast(_ParallelExperts, experts).spread(mesh, len(module.gate.weight), dispatch == "fp8")


class _ParallelExperts(Experts):
    """The experts of one process, for the tokens of all."""

    def spread(self, mesh: Mesh, total: int, fp8: bool) -> None:
        layout = mesh.layout
        mine = own_experts(mesh, total)
        for name in ("gate_up_proj", "down_proj"):
            whole = getattr(self, name)
            if whole.shape[0] == total and layout.expert > 1:
                setattr(self, name, nn.Parameter(whole.detach()[mine].clone()))
        self.fp8 = fp8
        # The groups of each hop, and how many experts lie behind each of its members.
        self.hops = [(mesh.local_group, total // layout.expert)]
        if layout.nodes > 1:
            self.hops.insert(0, (mesh.node_group, total // layout.nodes))

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """x: [tokens, hidden], indices and weights: [tokens, chosen] over all experts. Returns [tokens, hidden]."""
        return self._hop(0, x, indices, weights)

    def _hop(self, n: int, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """indices: numbers among the experts that lie behind this process and its group, -1 for one elsewhere."""
        if n == len(self.hops):
            return self._compute(x, indices, weights)
        group, behind = self.hops[n]
        route = _Route.of(indices, behind, group)
        indices = route.there(indices, behind)
        weights = _exchange(weights[route.tokens], route)
        rows = _exchange(x[route.tokens], route, fp8=self.fp8)
        out = self._hop(n + 1, rows, indices, weights)
        back = _exchange(out, route, back=True, fp8_gradient=self.fp8)
        return torch.zeros_like(x).index_add(0, route.tokens, back)

    def _compute(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """What this process's experts make of rows, each of which chose at least one of them."""
        row, choice = (indices >= 0).nonzero(as_tuple=True)
        chosen = indices[row, choice].unsqueeze(1), weights[row, choice].unsqueeze(1)
        out = super().forward(x[row], *chosen)
        return torch.zeros_like(x).index_add(0, row, out)


@dataclass(frozen=True)
class _Route:
    """Which of this process's rows go to whom in a group, and how many come."""

    group: ProcessGroup
    tokens: Tensor
    """[sent]: for each row sent, which one it is, ordered by who gets it."""
    owners: Tensor
    """[sent]: who gets it."""
    sent: list[int]
    come: list[int]

    @classmethod
    def of(cls, indices: Tensor, behind: int, group: ProcessGroup) -> _Route:
        members = dist.get_world_size(group)
        owner = torch.where(indices < 0, members, indices.div(behind, rounding_mode="floor"))
        wanted = torch.zeros(indices.shape[0], members + 1, dtype=torch.bool, device=indices.device)
        wanted.scatter_(1, owner, True)
        wanted = wanted[:, :members].T
        owners, tokens = wanted.nonzero(as_tuple=True)
        sent = wanted.sum(1)
        come = torch.empty_like(sent)
        dist.all_to_all_single(come, sent, group=group)
        both: list[list[int]] = torch.stack((sent, come)).tolist()  # on a GPU the host waits here
        return cls(group, tokens, owners, *both)

    def there(self, indices: Tensor, behind: int) -> Tensor:
        """The choices of the rows that come, as numbers among the experts behind this process; -1 for others."""
        chosen = indices[self.tokens] - (self.owners * behind).unsqueeze(1)
        chosen = torch.where((chosen >= 0) & (chosen < behind), chosen, -1)
        return self.move(chosen, False)

    def move(self, x: Tensor, back: bool) -> Tensor:
        """Rows to whom they are for, or, back, rows of whom they came from. Others may compute meanwhile."""
        sent, come = (self.come, self.sent) if back else (self.sent, self.come)
        out = x.new_empty(sum(come), *x.shape[1:])
        work = dist.all_to_all_single(out, x.contiguous(), come, sent, group=self.group, async_op=True)
        pause()
        work.wait()
        return out

    def move_fp8(self, x: Tensor, back: bool) -> Tensor:
        """The same in FP8: a byte for each number, and one for each tile's scale, a power of two."""
        q, scale = quantize_tiles(x, power_of_two=True)
        exponents = (scale.view(torch.int32) >> 23).to(torch.uint8)
        moved = self.move(torch.cat((q.view(torch.uint8), exponents), dim=1), back)
        q, exponents = moved.split((q.shape[1], scale.shape[1]), dim=1)
        scale = (exponents.to(torch.int32) << 23).view(torch.float32)
        return dequantize_tiles(q.contiguous().view(torch.float8_e4m3fn), scale, x.dtype)


def _exchange(
    x: Tensor, route: _Route, back: bool = False, fp8: bool = False, fp8_gradient: bool = False
) -> Tensor:
    out: Tensor = _Exchange.apply(x, route, back, fp8, fp8_gradient)  # type: ignore[no-untyped-call]
    return out


class _Exchange(torch.autograd.Function):
    """Rows over a route, and their gradients back over it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, route: _Route, back: bool, fp8: bool, fp8_gradient: bool) -> Tensor:
        ctx.route, ctx.back, ctx.fp8 = route, back, fp8_gradient
        return route.move_fp8(x, back) if fp8 else route.move(x, back)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        move = ctx.route.move_fp8 if ctx.fp8 else ctx.route.move
        return move(grads[0], not ctx.back), None, None, None, None
