"""What a model multiplies by: the mean products of each matrix's inputs, measured on text.

With them rounding knows which weights matter and which can make up for others (`dsv3.quant.integers`). The model reads text
as it is and is not trained; it must be in memory for that, as it is before it is quantised, and the products take up to
half as much again.

Routed experts of a layer share the products of all that the layer reads. Inside an expert, between its two matrices,
channels are its own, so there it has products of its own, of the tokens that chose it. Those of an expert that was chosen
rarely are mostly chance: to them the mean squares of all experts are added, which count as much as so many tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.checkpoint.names import table
from dsv3.kernels.moe import swiglu
from dsv3.model import Transformer
from dsv3.model.moe import Experts
from dsv3.quant.integers import feedback

_PRIOR = 64  # tokens that the layer's mean squares count as, for an expert


class _Products:
    """Sums of products of inputs, [in, in]."""

    def __init__(self, width: int) -> None:
        self.total = torch.zeros(width, width)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """x: [..., in]"""
        rows = x.flatten(0, -2).float()
        self.total.addmm_(rows.T.cpu(), rows.cpu())
        self.rows += len(rows)


@torch.inference_mode()
def calibrate(
    model: Transformer, ids: Tensor, progress: Callable[[int, int], None] | None = None
) -> dict[str, Tensor]:
    """Let a model read ids [samples, length], and return for each matrix that integers pack what to round it by, float32
    [in, in], by its name in a checkpoint. progress: told how many samples are done, of how many.

    Raises UserError if the model's numbers are infinite or undefined on this text.
    """
    found: dict[str, _Products] = {"lm_head.weight": _Products(model.config.hidden_size)}
    of_experts: dict[str, list[_Products]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            experts, channels, width = module.down_proj.shape
            found[f"{name}.gate_up_proj"] = layer = _Products(channels)
            of_experts[f"{name}.down_proj"] = inside = [_Products(width) for _ in range(experts)]
            hooks.append(module.register_forward_pre_hook(partial(_on_experts, layer, inside)))
        elif isinstance(module, nn.Linear) and module is not model.lm_head:
            found[f"{name}.weight"] = products = _Products(module.in_features)
            hooks.append(module.register_forward_pre_hook(partial(_on_linear, products)))
    try:
        for done, row in enumerate(ids, start=1):
            hidden, _ = model.features(row.unsqueeze(0).to(model.embed_tokens.weight.device))
            found["lm_head.weight"].add(hidden)
            if progress is not None:
                progress(done, len(ids))
    finally:
        for hook in hooks:
            hook.remove()
    pieces = [p for p in table(model.config).values() if p.packs and p.copy_of is None]
    wanted = {p.parameter for p in pieces}
    # Products go when what they are for is made, so that there is no time at which memory holds both.
    factors: dict[str, Tensor] = {}
    for name in list(found):
        products = found.pop(name)
        if name in wanted:
            factors[name] = feedback(products.total.div_(max(products.rows, 1)))
    inside_factors = {name: _factors(of_experts.pop(name)) for name in list(of_experts)}
    result = {}
    for piece in pieces:
        if piece.parameter in inside_factors:
            expert = piece.index[0]
            assert isinstance(expert, int)
            result[piece.name] = inside_factors[piece.parameter][expert]
        else:
            result[piece.name] = factors[piece.parameter]
    return result


def _factors(experts: list[_Products]) -> list[Tensor]:
    """Those of each expert of a layer, whose products are taken out of the list one after the other."""
    rows = max(sum(each.rows for each in experts), 1)
    squares = torch.stack([each.total.diagonal() for each in experts]).sum(0) / rows
    factors = []
    while experts:
        each = experts.pop(0)
        each.total.diagonal().add_(_PRIOR * squares)
        factors.append(feedback(each.total.div_(each.rows + _PRIOR)))
    return factors


def _on_linear(products: _Products, module: nn.Module, given: tuple[Any, ...]) -> None:
    products.add(given[0])


def _on_experts(layer: _Products, inside: list[_Products], module: Experts, given: tuple[Any, ...]) -> None:
    x, indices, _ = given
    layer.add(x)
    for expert in indices.unique().tolist():
        rows = x[(indices == expert).any(dim=1)]
        inside[expert].add(swiglu(F.linear(rows, module.gate_up_proj[expert])))
