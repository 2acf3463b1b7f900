"""Who holds which numbers of a model, and building only those.

A parameter lies on several processes (replicas of data parallelism, both ends of DualPipe, the embedding on the first
and the last stage), or it is a stack of experts that several processes hold in parts. `Held` says both of a parameter:
what part of the whole is here, which is always one run of the flattened whole, and who else has the same run. From
that follows who must add up whose gradients (the optimiser), and how a saved state is read by another layout
(`dsv3.train.state`). Where FSDP cuts the weights themselves (`dsv3.parallel.fsdp`), a process has some rows, alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dsv3.config import ModelConfig
from dsv3.model import Transformer
from dsv3.model.moe import Experts
from dsv3.model.transformer import Block, MTPModule
from dsv3.parallel.experts import keep_experts, own_experts
from dsv3.parallel.fsdp import Cutter, first_row
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.part import Part, spans, stages_with

STACKS = (".experts.gate_up_proj", ".experts.down_proj")


@dataclass(frozen=True)
class Held:
    """What a process holds of a parameter."""

    shape: torch.Size
    """Of the whole."""
    start: int
    """Where in the flattened whole what is here begins."""
    ranks: tuple[int, ...]
    """Who holds the same, this process included."""


def holdings(model: Transformer, mesh: Mesh | None) -> dict[str, Held]:
    """What this process holds of each parameter of a model, or of its part of it."""
    if mesh is None:
        return {name: Held(p.shape, 0, (0,)) for name, p in model.named_parameters()}
    held = {}
    for name, p in model.named_parameters():
        shape, start = p.shape, first_row(p) * p.shape[1:].numel()
        stacked = name.endswith(STACKS)
        if stacked and mesh.layout.expert > 1:
            shape = torch.Size((p.shape[0] * mesh.layout.expert, *p.shape[1:]))
            start += mesh.expert * p.numel()
        ranks = mesh.holders(stages_with(name, model.config, mesh.layout.stages), stacked)
        held[name] = Held(shape, start, (mesh.rank,) if isinstance(p, DTensor) else ranks)
    return held


def build(
    config: ModelConfig, mesh: Mesh | None, seed: int, dtype: torch.dtype, device: torch.device
) -> Transformer:
    """A model with random weights, or this process's part of it, which never takes more memory than that part.

    Weights are the same numbers whatever the layout: each has a generator of its own (`Transformer.init_weights`).
    They are drawn on the CPU in float32, a block at a time; with FSDP that block is whole until it is cut.
    """
    with torch.device("meta"):
        model = Transformer(config)
        first = 0
        if mesh is not None:
            all_spans = spans(config, mesh.layout.stages)
            if mesh.layout.pipeline > 1:
                model = Part(model, [all_spans[stage] for stage in mesh.stages])
            if mesh.layout.expert > 1 and config.n_routed_experts is not None:
                mine = own_experts(mesh, config.n_routed_experts)
                first = mine.start
                for module in model.modules():
                    if isinstance(module, Experts):
                        keep_experts(module, mine)
    cutter = Cutter(mesh, dtype) if mesh is not None and mesh.layout.sharding == "fsdp" else None
    for name, module in _pieces(model):
        if name == "lm_head" and config.tie_word_embeddings:  # which `to_empty` would part
            module.weight = model.embed_tokens.weight
            continue
        module.to_empty(device="cpu")
        model.init_weights(seed, first, name)
        module.to(device=device, dtype=dtype)
        if cutter is not None and isinstance(module, Block):
            cutter.cut(module)
    if cutter is not None:
        cutter.join(model)
    return model


def _pieces(module: nn.Module, within: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What a model is made of: its blocks, and the single layers beside them; the embedding before the head."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict | MTPModule):
            yield from _pieces(child, f"{within}{name}.")
        else:
            yield f"{within}{name}", child
