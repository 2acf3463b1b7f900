"""DeepSeekMoE with auxiliary-loss-free balancing (report, section 2.1.2, equations 12-16).

A token goes through the shared experts and through `num_experts_per_tok` of the routed ones. Which ones, is
decided by scores plus a bias per expert that training nudges against the expert's load; how much each
counts, by the scores alone, so that balancing never bends the gradient. A token may choose only within
`topk_group` of the `n_group` groups (in training one group lives on one node), ranked by the sum of their
two best biased scores.

Experts of groups left out are masked with minus infinity, as in DeepSeek's inference code. transformers up to
5.5 masked them with 0.0, which lets an excluded expert win over an admitted one whose biased score is negative;
the two differ only then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.config import ModelConfig
from dsv3.kernels import triton
from dsv3.kernels.moe import Linear, routed_experts
from dsv3.model.layers import FeedForward, weight_of


@dataclass(frozen=True)
class Routing:
    """What one layer's gate decided, for the balance losses, the bias update and the curious."""

    layer: int
    scores: Tensor
    """[tokens, n_routed_experts] float32: affinities before bias, with gradient in training."""
    indices: Tensor
    """[tokens, num_experts_per_tok] int64: the chosen experts, in no particular order."""


class Gate(nn.Module):
    """Chooses experts and weighs them. Always in float32."""

    def __init__(self, config: ModelConfig, n_routed_experts: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(n_routed_experts, config.hidden_size))
        bias = torch.zeros(n_routed_experts) if config.topk_method == "noaux_tc" else None
        self.register_buffer("e_score_correction_bias", bias)
        self.e_score_correction_bias: Tensor | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        """Move between devices with the rest, but never round the bias: near-ties are decided by it."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.e_score_correction_bias
        if before is not None and after is not None and after.dtype != before.dtype:
            self.e_score_correction_bias = before.to(after.device)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: [tokens, hidden]. Returns scores [tokens, experts], indices and weights [tokens, chosen]."""
        config = self.config
        logits = F.linear(x.float(), self.weight.float())
        if triton.usable(logits) and not torch.is_grad_enabled():
            return self._fused(logits)
        scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(dim=-1)
        indices = self.choose(scores.detach())
        weights = scores.gather(1, indices)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return scores, indices, weights * config.routing_factor

    def _fused(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rest of `forward` in one launch, on a GPU."""
        from dsv3.kernels.triton import routing

        config = self.config
        return routing.route(
            logits,
            self.e_score_correction_bias,
            config.num_experts_per_tok,
            sigmoid=config.scoring_func == "sigmoid",
            groups=config.n_group if config.limits_groups else 0,
            topk_group=config.topk_group if config.limits_groups else 0,
            two_best=config.topk_method == "noaux_tc",
            normalize=config.norm_topk_prob,
            factor=config.routing_factor,
        )

    def choose(self, scores: Tensor) -> Tensor:
        """The experts of each token, [tokens, num_experts_per_tok], from its scores [tokens, experts]."""
        config = self.config
        biased = (
            scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias.float()
        )
        if config.limits_groups:
            grouped = biased.unflatten(-1, (config.n_group, -1))
            if config.topk_method == "noaux_tc":
                group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
            else:
                group_scores = grouped.amax(dim=-1)
            admitted = group_scores.topk(config.topk_group, dim=-1, sorted=False).indices
            excluded = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, admitted, False)
            biased = grouped.masked_fill(excluded.unsqueeze(-1), float("-inf")).flatten(1)
        return biased.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices


class Experts(nn.Module):
    """The routed experts of one layer, stacked: the checkpoint keeps each expert's three matrices apart."""

    linear: Linear | None = None
    """What multiplies by the matrices, if training wants something else than torch's linear."""

    def __init__(self, config: ModelConfig, n_routed_experts: int) -> None:
        super().__init__()
        width, hidden = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(n_routed_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(n_routed_experts, hidden, width))

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        gate_up, down = weight_of(self.gate_up_proj), weight_of(self.down_proj)
        return routed_experts(x, indices, weights, gate_up, down, self.linear)


class MoE(nn.Module):
    """Shared experts plus the chosen routed ones."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        self.layer = layer
        self.gate = Gate(config, config.n_routed_experts)
        self.experts = Experts(config, config.n_routed_experts)
        self.shared_experts: FeedForward | None = None
        if config.n_shared_experts:
            self.shared_experts = FeedForward(
                config.hidden_size, config.moe_intermediate_size * config.n_shared_experts
            )

    def forward(self, x: Tensor, routing: list[Routing] | None = None) -> Tensor:
        """x: [..., hidden]. Appends what the gate decided to `routing` if a list is given."""
        flat = x.reshape(-1, x.shape[-1])
        scores, indices, weights = self.gate(flat)
        if routing is not None:
            routing.append(Routing(self.layer, scores, indices))
        out: Tensor = self.experts(flat, indices, weights)
        if self.shared_experts is not None:
            out = out + self.shared_experts(flat)
        return out.view_as(x)
