"""What the engine's tests lean on: a small model with well separated logits, and what it says by itself."""

from __future__ import annotations

from functools import cache

import torch

from dsv3.config import PRESETS, ModelConfig
from dsv3.engine.engine import Engine
from dsv3.engine.sequence import Sequence
from dsv3.model import Transformer
from dsv3.model.layers import RMSNorm

CONFIG = PRESETS["tiny"].replace(eos_token_id=None)


@cache
def model(config: ModelConfig = CONFIG) -> Transformer:
    """Float32, random, every part of weight. Shared by all tests: nobody may change it."""
    generator = torch.Generator().manual_seed(1)
    transformer = Transformer(config).eval().requires_grad_(False)
    for parameter in transformer.parameters():
        parameter.normal_(0.0, 0.2, generator=generator)
    transformer.embed_tokens.weight.normal_(0.0, 1.0, generator=generator)
    for module in transformer.modules():
        if isinstance(module, RMSNorm):
            module.weight.normal_(1.0, 0.3, generator=generator)
    return transformer


def engine(**kwargs: object) -> Engine:
    return Engine(model(), **kwargs)  # type: ignore[arg-type]


def run(engine: Engine, *sequences: Sequence) -> None:
    """Add all and step until the engine has nothing left to do."""
    for sequence in sequences:
        engine.add(sequence)
    while engine.unfinished:
        engine.step()


def greedy(prompt: list[int], new: int) -> list[int]:
    """What the plain model says next, over and over: the argmax loop that every engine must reproduce."""
    ids = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            ids.append(int(model()(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def is_greedy(prompt: list[int], output: list[int]) -> bool:
    """Whether each token is the plain model's argmax after those before it, in a single forward pass."""
    if not output:
        return True
    with torch.no_grad():
        logits = model()(torch.tensor([prompt + output])).logits[0]
    return logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist() == output
