"""The part of a model that one process holds: a `Transformer` with holes.

A pipeline cuts the layers into stages (`dsv3.planner.pipeline.cut`). A process holds one or two of them: then its
`Part` has their layers, under the names that the whole model gives them, and the embedding and the head where a
stage needs them. The MTP modules, on the last stage, look tokens up too, so there the embedding is held as well, and
its gradients are added up with the first stage's; a process that holds both ends has it once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from dsv3.config import ModelConfig
from dsv3.model import Transformer
from dsv3.model.transformer import Block
from dsv3.planner.pipeline import cut


@dataclass(frozen=True)
class Span:
    """The layers of one stage, and whether it begins or ends the model."""

    layers: range
    first: bool
    last: bool


def spans(config: ModelConfig, stages: int) -> list[Span]:
    """A model cut into so many stages."""
    pieces = cut(config.num_hidden_layers, config.num_nextn_predict_layers, stages)
    return [Span(layers, s == 0, s == stages - 1) for s, layers in enumerate(pieces)]


class Part(Transformer):
    """Those modules of a model that some of its stages need. Shares them with the model it is made from."""

    def __init__(self, whole: Transformer, held: Iterable[Span]) -> None:
        nn.Module.__init__(self)
        held = list(held)
        self.config, self.rope = whole.config, whole.rope
        first, last = any(s.first for s in held), any(s.last for s in held)
        if first or (last and (len(whole.mtp) or whole.config.tie_word_embeddings)):
            self.embed_tokens = whole.embed_tokens
        layers = sorted(layer for span in held for layer in span.layers)
        self.layers = nn.ModuleDict({str(layer): whole.layers[layer] for layer in layers})  # type: ignore[assignment]
        if last:
            self.norm, self.lm_head = whole.norm, whole.lm_head
        self.mtp = whole.mtp if last else nn.ModuleList()

    def block(self, layer: int) -> Block:
        found: Block = self.layers.get_submodule(str(layer))  # type: ignore[assignment]
        return found


def stages_with(name: str, config: ModelConfig, stages: int) -> tuple[int, ...]:
    """The stages that have the parameter or buffer of this name."""
    kind, _, rest = name.partition(".")
    if kind == "layers":
        layer = int(rest.split(".")[0])
        return tuple(s for s, span in enumerate(spans(config, stages)) if layer in span.layers)
    if kind == "embed_tokens" and (config.num_nextn_predict_layers or config.tie_word_embeddings):
        return (0, stages - 1)
    return (0,) if kind == "embed_tokens" else (stages - 1,)
