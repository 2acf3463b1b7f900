"""AdamW with float32 masters under a bfloat16 model.

The model computes in bf16, which has 8 bits of precision: a step of a thousandth of a weight would round to
nothing. So the optimiser keeps every weight in float32, adds gradients up in float32, steps there, and
rounds the result into the model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MasterAdamW:
    """torch's fused AdamW over float32 copies of a model's parameters.

    Weight decay is on matrices only, as is usual: norms and biases are left alone.
    """

    def __init__(
        self, model: nn.Module, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.1
    ) -> None:
        named = dict(model.named_parameters())
        self.weights: list[Tensor] = list(named.values())
        self.masters = {name: p.detach().float().clone() for name, p in named.items()}
        decayed = [m for m in self.masters.values() if m.dim() > 1]
        plain = [m for m in self.masters.values() if m.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)
        for master in self.masters.values():
            master.grad = torch.zeros_like(master)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the model's gradients to the masters' and drop them from the model."""
        for weight, master in zip(self.weights, self.masters.values(), strict=True):
            if weight.grad is not None and master.grad is not None:
                master.grad += weight.grad
                weight.grad = None

    @torch.no_grad()
    def step(self, lr: float, clip: float = 1.0) -> float:
        """One update at rate `lr`. Returns the gradient's norm before it was clipped to `clip`."""
        masters = list(self.masters.values())
        norm = nn.utils.clip_grad_norm_(masters, clip)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        torch._foreach_zero_([m.grad for m in masters if m.grad is not None])
        torch._foreach_copy_(self.weights, masters)
        return float(norm)

    def state(self) -> dict[str, Tensor]:
        """Masters and moments as flat named tensors, for a safetensors file."""
        tensors = {f"master.{name}": m for name, m in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.adamw.state[master].items():
                tensors[f"{key}.{name}"] = value
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `state()`; the model's weights are set from the masters."""
        self.load_masters(tensors)
        for name, master in self.masters.items():
            self.adamw.state[master] = {
                key: tensors[f"{key}.{name}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")
            }

    @torch.no_grad()
    def load_masters(self, tensors: dict[str, Tensor]) -> None:
        """Start a new stage from the weights of another, with fresh moments."""
        self.adamw.state.clear()
        for name, master in self.masters.items():
            master.copy_(tensors[f"master.{name}"])
        torch._foreach_copy_(self.weights, list(self.masters.values()))
