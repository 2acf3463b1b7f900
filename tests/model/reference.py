"""What the model tests lean on: random models, the same weights in transformers, a small latent cache."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from dsv3.config import ModelConfig
from dsv3.model import FlatBatch, Piece, Transformer
from dsv3.model.layers import RMSNorm
from dsv3.model.moe import Gate, MoE

transformers.logging.set_verbosity_error()  # it warns of YaRN factors that do not match the tests' lengths

TOLERANCE = 1e-4


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """A float32 model in which everything matters: no zero bias, no norm weight of one, spread router scores."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float, mean: float = 0.0) -> None:
        tensor.normal_(mean, std, generator=generator)

    model = Transformer(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        normal(parameter, 0.2)
    normal(model.embed_tokens.weight, 1.0)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            normal(module.weight, 0.3, mean=1.0)
        elif isinstance(module, Gate):
            normal(module.weight, 0.4)  # wide scores: a tie within rounding would choose another expert
            if module.e_score_correction_bias is not None:
                normal(module.e_score_correction_bias, 0.5)
    return model


def random_ids(config: ModelConfig, batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


# transformers ------------------------------------------------------------------------------------------


def in_transformers(model: Transformer, values: dict[str, Any] | None = None) -> nn.Module:
    """The same weights in transformers' own class, configured by `values` or by our own `to_dict`."""
    values = dict(values or model.config.to_dict())
    v2 = values.pop("model_type") == "deepseek_v2"
    config = (DeepseekV2Config if v2 else DeepseekV3Config)(**values)
    theirs = (DeepseekV2ForCausalLM if v2 else DeepseekV3ForCausalLM)(config).eval().requires_grad_(False)
    theirs.set_experts_implementation("eager")  # grouped_mm takes no odd widths
    missing, unexpected = theirs.load_state_dict(transformers_weights(model), strict=False)
    assert not unexpected
    empty = [name for name, tensor in theirs.state_dict().items() if tensor.numel() == 0]
    assert sorted(missing) == sorted(empty)  # without shared experts transformers keeps matrices of width 0
    return theirs


def transformers_weights(model: Transformer) -> dict[str, Tensor]:
    """Our state by transformers' names. Its experts are stacked as ours; its gate and up are two matrices."""
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("mtp."):
            continue
        name = name if name.startswith("lm_head") else f"model.{name}"
        if name.endswith("gate_up_proj.weight"):
            gate, up = tensor.chunk(2)
            weights[name.replace("gate_up_proj", "gate_proj")] = gate
            weights[name.replace("gate_up_proj", "up_proj")] = up
        else:
            weights[name] = tensor
    return weights


# A cache -----------------------------------------------------------------------------------------------


class LatentCache:
    """The least that an engine does: blocks of latents in any order, and flat batches of new tokens over them.

    What was never written is garbage of large numbers, so that a position that should be masked shows.
    """

    def __init__(self, model: Transformer, rows: int, capacity: int, size: int = 8) -> None:
        self.model = model
        each = -(-capacity // size)
        shape = (rows * each, size, model.config.latent_dim)
        layers = model.config.num_hidden_layers + model.config.num_nextn_predict_layers
        self.layers = [100 * torch.randn(shape) for _ in range(layers)]
        self.tables = torch.randperm(rows * each).view(rows, each).tolist()
        self.lengths = [0] * rows

    def lay(self, new: dict[int, int]) -> FlatBatch:
        """A batch of so many new tokens for each row; short ones must come first."""
        pieces = [Piece(self.tables[row], self.lengths[row], count) for row, count in new.items()]
        for row, count in new.items():
            self.lengths[row] += count
        return FlatBatch.lay(pieces, self.layers, short=1)

    def step(self, new: dict[int, Tensor]) -> dict[int, Tensor]:
        """Add tokens to rows: {row: ids [new]} to {row: logits [new, vocab]}."""
        rows = sorted(new, key=lambda row: (len(new[row]) > 1, row))
        batch = self.lay({row: len(new[row]) for row in rows})
        with torch.no_grad():
            hidden = self.model.forward_flat(torch.cat([new[row] for row in rows]), batch)
            logits = self.model.lm_head(hidden).split([len(new[row]) for row in rows])
        return dict(zip(rows, logits, strict=True))


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE, what: object = "") -> None:
    """Absolute difference under `tolerance`, and numbers large enough for that to mean something."""
    assert ours.shape == theirs.shape, f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)} {what}"
    assert theirs.abs().max() > 0.1, f"nothing to compare: all under 0.1 {what}"
    worst = (ours.double() - theirs.double()).abs().max().item()
    assert worst < tolerance, f"differs by {worst:.2e}, allowed {tolerance:.0e} {what}"


def gates(model: Transformer) -> list[Gate]:
    return [module.gate for module in model.modules() if isinstance(module, MoE)]
