"""Context parallelism: each sequence is split over processes, and only latents travel.

At 128K tokens what training keeps of one sequence outgrows a device. All of a layer works on each token by itself, so
a process can keep some of the tokens and know nothing of the others, but for attention, where a token looks at all
before it. Ways to bring keys and values to it: pass them around a ring; or send each head's to a process that does
that head (Ulysses). Multi-head latent attention makes the plainest way the cheapest: keys and values of all heads are
functions of `kv_lora_rank + qk_rope_head_dim` numbers per token, 576 for DeepSeek-V3 against 40,960. So

    forward     each process projects its own tokens, turns their rotary keys, and gathers everyone's latents;
                it expands keys and values of the whole row, and attends with its own queries
    backward    gradients of the latents are added up, each process receiving those of its own tokens

What is paid is the expansion, `kv_b_proj` on the whole row in every process: at 128K tokens over 8 processes,
5% of attention's multiplications.

Causal attention makes late tokens dearer than early ones. So a row is cut into 2 C chunks for C processes, and process
c has the chunks c and 2 C - 1 - c, one early and one late (as in Llama 3's training, arXiv 2407.21783, section 3.3.2,
and Megatron-LM). A process's queries are attended in these two runs, each against the keys up to its own end,
and all processes have the same number of pairs to look at, little more than half of what a mask over all keys has.

`apply_context_parallel` changes a model from outside. Parameters stay whole in every process; each has a part of their
gradients, to be added up. The modules of multi-token prediction have no work at a row's last places
(`dsv3.train.loss`), so processes have unlike numbers of tokens there; what travels is padded. Where attention is
recomputed (`dsv3.train.recompute`) latents are gathered once more in the backward pass. (Written for NCCL as well as
gloo; not yet run on the former.)
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from dsv3.errors import UserError
from dsv3.kernels.attention import causal_attention
from dsv3.model import FlatBatch, Transformer
from dsv3.model.attention import LatentAttention
from dsv3.model.rope import Rope
from dsv3.parallel.mesh import Mesh, all_gather, reduce_scatter
from dsv3.parallel.overlap import pause


def zigzag(seq: int, parts: int) -> list[Tensor]:
    """The places of a row of `seq` tokens that each of so many processes has, ascending int64.

    Chunks c and 2 * parts - 1 - c of 2 * parts, of which the first are one longer where they are not all alike.
    """
    chunks = torch.arange(seq).tensor_split(2 * parts)
    return [torch.cat((chunks[c], chunks[-1 - c])) for c in range(parts)]


class Context:
    """The processes that share rows, and this one's part of them: the `Places` of `dsv3.train.loss`."""

    def __init__(self, group: ProcessGroup, modules: int = 0) -> None:
        """modules: how many tokens the model looks ahead, at whose end there are places without work."""
        self.group, self.modules = group, modules
        self.size, self.place = dist.get_world_size(group), dist.get_rank(group)
        self.layout = torch.compiler.disable(cache(self._layout))

    def of(self, seq: int) -> Tensor:
        """This process's places of a row of `seq` tokens, ascending int64.

        Raises UserError if the row is so short that some process would have nothing to do.
        """
        least = 2 * max(self.size, self.modules)
        if seq < least:
            raise UserError(
                f"sequence_length is {seq}: context {self.size} needs at least {least}; use longer sequences, or "
                "a smaller parallel.context"
            )
        return zigzag(seq, self.size)[self.place]

    def total(self, counts: Tensor) -> Tensor:
        """Counts (without gradient) added up over the processes that share the rows."""
        counts = counts.clone()
        dist.all_reduce(counts, group=self.group)
        return counts

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def gather(self, x: Tensor, seq: int, ahead: int) -> Tensor:
        """All places of rows of `seq` tokens without the last `ahead`, from each process's own.

        x: [batch, local, dim]; returns [batch, seq - ahead, dim]. Gradients go back to the process that has the place.
        """
        most, order, _ = self.layout(seq, ahead, x.device)
        padded = torch.nn.functional.pad(x, (0, 0, 0, most - x.shape[1]))
        everyones: Tensor = _Gather.apply(padded, self.group)  # type: ignore[no-untyped-call]
        return everyones.transpose(0, 1).flatten(1, 2).index_select(1, order)

    def _layout(
        self, seq: int, ahead: int, device: torch.device
    ) -> tuple[int, Tensor, list[tuple[int, int]]]:
        """The most places that a process has; where each place of the row is among all that was gathered,
        [seq - ahead]; and the runs of neighbours among this process's places, by their first and the end."""
        everyones = [places[places < seq - ahead] for places in zigzag(seq, self.size)]
        most = max(map(len, everyones))
        order = torch.empty(seq - ahead, dtype=torch.int64)
        for process, places in enumerate(everyones):
            order[places] = process * most + torch.arange(len(places))
        mine = everyones[self.place]
        breaks = torch.nonzero(mine.diff() != 1).flatten() + 1
        runs = [(int(run[0]), int(run[-1]) + 1) for run in mine.tensor_split(breaks.tolist())]
        return most, order.to(device), runs


class _Gather(torch.autograd.Function):
    """[...] of every process, stacked: [processes, ...]. Backward adds up what all have for this process."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty(dist.get_world_size(group), *x.shape)
        work = all_gather(out.flatten(0, 1), x.contiguous(), group=group, async_op=True)
        pause()
        work.wait()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        out = torch.empty_like(grad[0])
        work = reduce_scatter(out, grad.flatten(0, 1), group=ctx.group, async_op=True)
        pause()
        work.wait()
        return out, None


class ContextAttention(LatentAttention):
    """Attention of this process's places of each row."""

    context: Context
    ahead: int
    """How many places at a row's end are left out of this layer: k for MTP module k."""

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        batch: FlatBatch | None = None,
    ) -> Tensor:
        """x: [batch, local, hidden], with angles of the local places and mask [batch or 1, 1, local, seq - ahead].

        The mask must be causal. Without one, with a square one, and with a cache, x is whole and nothing is gathered.
        """
        if batch is not None or mask is None or mask.shape[-2] == mask.shape[-1]:
            return super().forward(x, rope, angles, mask, batch)
        q_nope, q_rope, latent = self._project(x, rope, angles)
        seq = mask.shape[-1] + self.ahead
        latents, k_rope = self.context.gather(latent, seq, self.ahead).split((self.rank, self.rotary), dim=-1)
        kv = self.kv_b_proj(latents).unflatten(-1, (self.heads, self.nope + self.v_dim))
        k_nope, v = kv.split((self.nope, self.v_dim), dim=-1)
        k = torch.cat((k_nope, k_rope.unsqueeze(-2).expand(*k_nope.shape[:-1], -1)), dim=-1)
        q, k, v = (t.transpose(1, 2) for t in (torch.cat((q_nope, q_rope), dim=-1), k, v))
        outs, done = [], 0
        for first, end in self.context.layout(seq, self.ahead, x.device)[2]:
            mine = slice(done, done + end - first)
            seen = mask[..., mine, :end]
            outs.append(causal_attention(q[:, :, mine], k[:, :, :end], v[:, :, :end], self.scale, seen))
            done = mine.stop
        projected: Tensor = self.o_proj(torch.cat(outs, dim=2).transpose(1, 2).flatten(-2))
        return projected


def apply_context_parallel(model: Transformer, mesh: Mesh) -> Context:
    """Make a model or a part of it work on this process's places of each row, in place; returns which these are.

    After `apply_recompute`, if that is used, which would undo it; before or after `apply_fp8`.
    """
    config = model.config
    context = Context(mesh.context_group, config.num_nextn_predict_layers)
    for module in model.modules():
        if isinstance(module, LatentAttention):
            module.__class__ = _over_context(type(module))
            assert isinstance(module, ContextAttention)
            module.context, module.ahead = context, max(0, module.layer + 1 - config.num_hidden_layers)
    return context


def _over_context(kind: type[LatentAttention]) -> type[LatentAttention]:
    """Attention of some kind that calls `ContextAttention` where it would call the plain one."""
    if kind is LatentAttention:
        return ContextAttention
    return type(f"Context{kind.__name__}", (kind, ContextAttention), {})
