"""AdamW with float32 masters under a bfloat16 model, and moments in bfloat16 (report, section 3.3.3).

The model computes in bf16, which has 8 bits of precision: a step of a thousandth of a weight would round to
nothing. So the optimiser keeps every weight in float32, adds gradients up in float32, steps there, and
rounds the result into the model. The two moments bear rounding: what they say is multiplied by the rate, and
each step renews a tenth of the first and a twentieth of the second, far more than bf16's half a percent.

Masters, gradients and moments each lie in one flat tensor, of which the named ones are views: the norm is
one reduction, and the update walks over pieces that stay in a CPU's cache from the first to the last of its
dozen operations. (torch's own AdamW keeps moments in the dtype of what it updates.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dsv3.kernels.native import call, usable

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
    ) -> None:
        named = sorted(model.named_parameters(), key=lambda pair: pair[1].dim() <= 1)  # matrices first
        self.betas, self.weight_decay, self.eps = betas, weight_decay, eps
        self.weights: list[Tensor] = [p for _, p in named]
        self.steps = 0
        size = sum(p.numel() for p in self.weights)
        self._decayed = sum(p.numel() for p in self.weights if p.dim() > 1)
        device = self.weights[0].device
        self._flat = {
            kind: torch.zeros(
                size, dtype=torch.float32 if kind in ("master", "grad") else moments, device=device
            )
            for kind in (*_KINDS, "grad")
        }
        shapes = {name: p.shape for name, p in named}
        self._views = {kind: _views(flat, shapes) for kind, flat in self._flat.items()}
        self.masters = self._views["master"]
        with torch.no_grad():
            torch._foreach_copy_(list(self.masters.values()), self.weights)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the model's gradients to the float32 ones and drop them from the model."""
        pairs = zip(self._views["grad"].values(), self.weights, strict=True)
        for total, weight in pairs:
            if weight.grad is not None:
                total += weight.grad
                weight.grad = None

    @torch.no_grad()
    def norm(self) -> float:
        """The norm of all gradients."""
        return float(torch.linalg.vector_norm(self._flat["grad"]))

    @torch.no_grad()
    def step(self, lr: float, clip: float = 1.0) -> float:
        """One update at rate `lr`. Returns the gradient's norm before it was clipped to `clip`.

        Where the norm is not finite nothing is updated, and the gradients stay for whoever looks into it.
        """
        norm = self.norm()
        if not math.isfinite(norm):
            return norm
        self.steps += 1
        shrink = min(1.0, clip / (norm + 1e-6))
        piece = _PIECE if self._flat["master"].is_cpu else self._flat["master"].numel()
        for part, decay in ((slice(0, self._decayed), self.weight_decay), (slice(self._decayed, None), 0.0)):
            pieces = (self._flat[kind][part].split(piece) for kind in (*_KINDS, "grad"))
            for master, exp_avg, exp_avg_sq, grad in zip(*pieces, strict=True):
                self._update(master, exp_avg, exp_avg_sq, grad.mul_(shrink), lr, decay)
        self._flat["grad"].zero_()
        torch._foreach_copy_(self.weights, list(self.masters.values()))
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
        """Masters and moments as flat named tensors, for a safetensors file."""
        tensors = {f"{kind}.{name}": t for kind in _KINDS for name, t in self._views[kind].items()}
        return tensors | {"steps": torch.tensor(self.steps)}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `state()`; the model's weights are set from the masters."""
        self.load_masters(tensors)
        self.steps = int(tensors["steps"])
        for kind in _KINDS[1:]:
            for name, moment in self._views[kind].items():
                moment.copy_(tensors[f"{kind}.{name}"])

    @torch.no_grad()
    def load_masters(self, tensors: Mapping[str, Tensor]) -> None:
        """Start a new stage from the weights of another, with fresh moments."""
        self.steps = 0
        for kind in _KINDS[1:]:
            self._flat[kind].zero_()
        for name, master in self.masters.items():
            master.copy_(tensors[f"master.{name}"])
        torch._foreach_copy_(self.weights, list(self.masters.values()))


def _views(flat: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    pieces = flat.split([shape.numel() for shape in shapes.values()])
    return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
