"""AdamW with float32 masters under a bfloat16 model, and moments in bfloat16 (report, section 3.3.3).

The model computes in bf16, which has 8 bits of precision: a step of a thousandth of a weight would round to
nothing. So the optimiser keeps every weight in float32, adds gradients up in float32, steps there, and
rounds the result into the model. The two moments bear rounding: what they say is multiplied by the rate, and
each step renews a tenth of the first and a twentieth of the second, far more than bf16's half a percent.

Masters, gradients and moments each lie in one flat tensor, of which the named ones are views: the norm is
one reduction, and the update walks over pieces that stay in a CPU's cache from the first to the last of its
dozen operations. (torch's own AdamW keeps moments in the dtype of what it updates.)

Where a parameter lies on several processes, they share the work (ZeRO-1, as in the report, section 3.2): the parameters
that the same processes hold are one flat tensor, cut into as many shares as there are of them. Gradients, each
process's own in float32, are added up so that each gets the sum of its share; it keeps masters and moments of that
alone, steps there, and gives the others the new weights, rounded. As losses are divided by the whole batch, sums are
all that is needed. Of parameters that FSDP has cut (`dsv3.parallel.fsdp`) each process has its own rows, in float32,
and finds their gradients added up already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from dsv3.kernels.native import call, usable
from dsv3.parallel.fsdp import local
from dsv3.parallel.mesh import all_gather, make_groups, reduce_scatter
from dsv3.parallel.sharding import Held

_PIECE = 1 << 17  # numbers updated at once: five float32 arrays of them are 2.5 MB
_KINDS = ("master", "exp_avg", "exp_avg_sq")


class MasterAdamW:
    """AdamW over float32 copies of a model's parameters.

    Weight decay is on matrices only, as is usual: norms and biases are left alone.
    """

    def __init__(
        self,
        model: nn.Module,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        eps: float = 1e-8,
        moments: torch.dtype = torch.bfloat16,
        held: Mapping[str, Held] | None = None,
        share: bool = True,
    ) -> None:
        """held: who else holds each parameter, by default nobody (`dsv3.parallel.sharding.holdings`); all processes
        then make their optimisers at the same time. share: cut masters and moments into shares.
        """
        self.betas, self.weight_decay, self.eps = betas, weight_decay, eps
        self.steps = 0
        named = dict(model.named_parameters())
        owners = {name: (0,) if held is None else held[name].ranks for name in named}
        groups = {} if held is None else make_groups(r for r in owners.values() if len(r) > 1)
        self._buckets = [
            _Bucket(
                {n: p for n, p in named.items() if owners[n] == ranks},
                ranks,
                groups.get(ranks),
                moments,
                share,
            )
            for ranks in sorted(set(owners.values()))
        ]
        self._alone = held is None
        self._norm: float | None = None  # of the gradients, once they are added up
        self.masters: dict[str, Tensor] = {}
        """Float32 weights by name; of those that are shared the part that is here, flat."""
        self.starts: dict[str, int] = {}
        """Where in the flattened parameter, as this process's model has it, each of these parts begins."""
        for bucket in self._buckets:
            self.masters |= bucket.views["master"]
            self.starts |= bucket.starts
        self._set_masters({name: local(p).detach() for name, p in named.items()})

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the model's gradients to the float32 ones and drop them from the model."""
        self._norm = None
        for bucket in self._buckets:
            for total, parameter in zip(bucket.grads, bucket.parameters, strict=True):
                if parameter.grad is not None:
                    total += local(parameter.grad)
                    parameter.grad = None

    @torch.no_grad()
    def norm(self) -> float:
        """Add up the gradients of all processes, once before each step, and give their norm."""
        if self._norm is None:
            for bucket in self._buckets:
                bucket.reduce()
            for bucket in self._buckets:
                bucket.wait()
            self._norm = self._measure()
        return self._norm

    def _measure(self) -> float:
        if self._alone:
            (bucket,) = self._buckets
            return float(torch.linalg.vector_norm(bucket.grad))
        total = sum(torch.linalg.vector_norm(b.grad).double() ** 2 / b.copies for b in self._buckets)
        assert isinstance(total, Tensor)
        dist.all_reduce(total)
        return math.sqrt(total.item())

    @torch.no_grad()
    def step(self, lr: float, clip: float = 1.0) -> float:
        """One update at rate `lr`. Returns the gradient's norm before it was clipped to `clip`.

        Where the norm is not finite nothing is updated, and the gradients stay for whoever looks into it.
        """
        norm = self.norm()
        if not math.isfinite(norm):
            return norm
        self.steps, self._norm = self.steps + 1, None
        shrink = min(1.0, clip / (norm + 1e-6))
        for bucket in self._buckets:
            piece = _PIECE if bucket.grad.is_cpu else max(1, bucket.grad.numel())
            parts = (slice(0, bucket.decayed), self.weight_decay), (slice(bucket.decayed, None), 0.0)
            for part, decay in parts:
                pieces = (t[part].split(piece) for t in (*bucket.state.values(), bucket.grad))
                for master, exp_avg, exp_avg_sq, grad in zip(*pieces, strict=True):
                    if grad.numel():
                        self._update(master, exp_avg, exp_avg_sq, grad.mul_(shrink), lr, decay)
            bucket.give_weights()
        for bucket in self._buckets:
            bucket.wait()
        return norm

    def _update(
        self, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, lr: float, decay: float
    ) -> None:
        beta1, beta2 = self.betas
        rate, root = lr / (1 - beta1**self.steps), 1 / math.sqrt(1 - beta2**self.steps)
        keep = 1 - lr * decay
        if usable(exp_avg, exp_avg_sq):
            call(
                "adamw",
                master,
                exp_avg,
                exp_avg_sq,
                grad,
                grad.numel(),
                beta1,
                beta2,
                self.eps,
                rate,
                root,
                keep,
            )
            return
        first = exp_avg.float().lerp_(grad, 1 - beta1)
        second = exp_avg_sq.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        exp_avg.copy_(first)
        exp_avg_sq.copy_(second)
        master.mul_(keep).addcdiv_(first, second.sqrt().mul_(root).add_(self.eps), value=-rate)

    def state(self) -> dict[str, Tensor]:
        """Masters and moments as named tensors; of those that are shared the parts that are here, flat."""
        return {
            f"{kind}.{name}": t
            for bucket in self._buckets
            for kind in _KINDS
            for name, t in bucket.views[kind].items()
        }

    @torch.no_grad()
    def begin_from(self, weights: Mapping[str, Tensor]) -> None:
        """Begin anew from these weights, by name, as this process's model has them: with fresh moments."""
        self.steps = 0
        for bucket in self._buckets:
            for kind in _KINDS[1:]:
                bucket.state[kind].zero_()
        self._set_masters(weights)
        self.write_weights()

    @torch.no_grad()
    def _set_masters(self, weights: Mapping[str, Tensor]) -> None:
        for name, master in self.masters.items():
            start = self.starts[name]
            master.copy_(weights[name].flatten()[start : start + master.numel()].view_as(master))

    @torch.no_grad()
    def write_weights(self) -> None:
        """Set the model's weights from the masters, after those were changed."""
        for bucket in self._buckets:
            bucket.give_weights()
        for bucket in self._buckets:
            bucket.wait()


class _Bucket:
    """The parameters that the same processes hold: in one flat tensor, and this process's share of it."""

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        ranks: tuple[int, ...],
        group: ProcessGroup | None,
        moments: torch.dtype,
        share: bool,
    ) -> None:
        ordered = sorted(named.items(), key=lambda pair: pair[1].dim() <= 1)  # matrices first
        self.parameters = [p for _, p in ordered]
        weights = self.weights
        self.group = group
        members = len(ranks) if share else 1
        self.copies = len(ranks) // members
        """Processes that have the same share."""
        size = sum(w.numel() for w in weights)
        each = -(-size // members)
        place = ranks.index(dist.get_rank()) if members > 1 else 0
        self.begin, self.end = place * each, (place + 1) * each
        device = weights[0].device
        self._all = torch.zeros(each * members, device=device)  # this process's gradients
        self.grads = self._like_weights(self._all)
        self.grad = self._all if members == 1 else torch.zeros(each, device=device)
        """Gradients of the share, added up after `reduce`."""
        dtypes = {"master": torch.float32, "exp_avg": moments, "exp_avg_sq": moments}
        self.state = {kind: torch.zeros(each, dtype=dtype, device=device) for kind, dtype in dtypes.items()}
        matrices = sum(w.numel() for w in weights if w.dim() > 1)
        self.decayed = min(max(matrices - self.begin, 0), each)
        self.starts: dict[str, int] = {}
        self.views: dict[str, dict[str, Tensor]] = {kind: {} for kind in _KINDS}
        at = 0
        for (name, _), weight in zip(ordered, weights, strict=True):
            first, last = max(at, self.begin), min(at + weight.numel(), self.end)
            if first < last:
                self.starts[name] = first - at
                for kind in _KINDS:
                    part = self.state[kind][first - self.begin : last - self.begin]
                    whole = part.numel() == weight.numel()
                    self.views[kind][name] = part.view(weight.shape) if whole else part
            at += weight.numel()
        self._work: list[Any] = []
        self._gathered: Tensor | None = None

    @property
    def weights(self) -> list[Tensor]:
        """What is here of the parameters. FSDP may move it, so it is looked up each time."""
        return [local(p) for p in self.parameters]

    def reduce(self) -> None:
        """Begin to add up the gradients."""
        if self.group is None:
            return
        if self.grad is self._all:
            self._work.append(dist.all_reduce(self._all, group=self.group, async_op=True))
        else:
            work = reduce_scatter(self.grad, self._all, group=self.group, async_op=True)
            self._work.append(work)

    def give_weights(self) -> None:
        """Begin to set the model's weights from the masters, everyone's shares; gradients are zero again."""
        self._all.zero_()
        if self.group is None or self.grad is self._all:
            self._set_weights(self.state["master"])
            return
        mine = self.state["master"].to(self.parameters[0].dtype)
        self._gathered = mine.new_empty(self._all.numel())
        self._work.append(all_gather(self._gathered, mine, group=self.group, async_op=True))

    @torch.no_grad()
    def wait(self) -> None:
        """Until what was begun is done."""
        while self._work:
            self._work.pop().wait()
        if self._gathered is not None:
            self._set_weights(self._gathered)
            self._gathered = None

    def _set_weights(self, flat: Tensor) -> None:
        torch._foreach_copy_(self.weights, self._like_weights(flat))

    def _like_weights(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat tensor in the order and shapes of the weights."""
        weights = self.weights
        sizes = [w.numel() for w in weights]
        parts = flat[: sum(sizes)].split(sizes)
        return [part.view(w.shape) for part, w in zip(parts, weights, strict=True)]
