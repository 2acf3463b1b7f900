"""Which Hugging Face tensor is which part of which parameter.

    dsv3                                            Hugging Face
    embed_tokens, norm                              model.embed_tokens, model.norm
    lm_head                                         lm_head
    layers.{i}.*                                    model.layers.{i}.*
    mtp.{k}.enorm, hnorm, eh_proj                   model.layers.{L + k}.enorm, hnorm, eh_proj
    mtp.{k}.block.*                                 model.layers.{L + k}.*
    mtp.{k}.norm                                    model.layers.{L + k}.shared_head.norm

with L = num_hidden_layers, and within a layer's `mlp`, where the model keeps together what it multiplies
together:

    gate_up_proj.weight          rows [:I], [I:]    gate_proj.weight, up_proj.weight
    experts.gate_up_proj [e]     rows [:I], [I:]    experts.{e}.gate_proj.weight, experts.{e}.up_proj.weight
    experts.down_proj [e]                           experts.{e}.down_proj.weight

All other names are the same on both sides. The multi-token prediction modules of released files also carry
`embed_tokens` and `shared_head.head`, copies of the main model's embedding and head: the model shares them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from dsv3.config import ModelConfig
from dsv3.model import Transformer
from dsv3.model.outline import outline

SCALE_SUFFIX = "_scale_inv"  # of `x.weight` is `x.weight_scale_inv`
INTEGER_SCALE_SUFFIX, ZERO_SUFFIX = "_scale", "_zero"  # of integer codes
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Piece:
    """One Hugging Face tensor, and the part of a parameter that it is."""

    name: str
    """Hugging Face's name."""
    shape: tuple[int, ...]
    parameter: str
    """The name in the model's state dict."""
    index: tuple[int | slice, ...] = ()
    """What to index the parameter with."""
    copy_of: str | None = None
    """The tensor that this one repeats, if it does."""

    def of(self, parameter: Tensor) -> Tensor:
        """The view of the parameter that this tensor fills or is written from."""
        return parameter[self.index]

    @property
    def in_fp8(self) -> bool:
        """Whether released FP8 files quantise it: every matrix of attention and feed-forward but the gate's.

        Embedding, head, norms, gates, biases and `eh_proj` stay as they are.
        """
        return (
            len(self.shape) == 2
            and re.search(r"\.(self_attn|mlp)\.", self.name) is not None
            and not self.name.endswith(".mlp.gate.weight")
        )

    @property
    def packs(self) -> bool:
        """Whether integer formats pack it: what FP8 quantises and the head, but not `kv_b_proj`, by which queries and
        outputs of every head are multiplied from either side; it is 3% of what a token of V3 reads."""
        return (self.in_fp8 and not self.name.endswith(".kv_b_proj.weight")) or self.name == HEAD

    @property
    def keeps_dtype(self) -> bool:
        """The correction biases decide between near-equal scores: they are never rounded to another dtype."""
        return self.name.endswith(".e_score_correction_bias")


def table(config: ModelConfig) -> dict[str, Piece]:
    """Every tensor that a checkpoint of this config has, by Hugging Face's name, copies included."""
    with outline():
        state = Transformer(config).state_dict()
    pieces: dict[str, Piece] = {}
    for parameter, tensor in state.items():
        for piece in _pieces(parameter, tuple(tensor.shape), config.num_hidden_layers):
            pieces[piece.name] = piece
    shape = pieces[EMBEDDING].shape
    head = HEAD
    if config.tie_word_embeddings:
        head = EMBEDDING
        pieces[HEAD] = Piece(HEAD, shape, "embed_tokens.weight", copy_of=EMBEDDING)
    for k in range(config.num_nextn_predict_layers):
        layer = mtp_prefix(config, k)
        embedding_copy = Piece(f"{layer}embed_tokens.weight", shape, "embed_tokens.weight", copy_of=EMBEDDING)
        head_copy = Piece(f"{layer}shared_head.head.weight", shape, "lm_head.weight", copy_of=head)
        pieces |= {piece.name: piece for piece in (embedding_copy, head_copy)}
    return pieces


def mtp_prefix(config: ModelConfig, k: int) -> str:
    """What the names of MTP module k's tensors start with."""
    return f"model.layers.{config.num_hidden_layers + k}."


def _pieces(parameter: str, shape: tuple[int, ...], num_hidden_layers: int) -> Iterator[Piece]:
    """The tensors that a parameter of this shape is made of."""
    name = _rename(parameter, num_hidden_layers)
    stem, _, projection = name.removesuffix(".weight").rpartition(".")
    if stem.endswith(".experts"):
        experts: list[tuple[str, tuple[int, ...]]] = [(f"{stem}.{e}", (e,)) for e in range(shape[0])]
    elif projection == "gate_up_proj":
        experts = [(stem, ())]
    else:
        yield Piece(name, shape, parameter)
        return
    rows, cols = shape[-2:]
    for prefix, index in experts:
        if projection == "gate_up_proj":
            half = rows // 2
            yield Piece(f"{prefix}.gate_proj.weight", (half, cols), parameter, (*index, slice(0, half)))
            yield Piece(f"{prefix}.up_proj.weight", (half, cols), parameter, (*index, slice(half, rows)))
        else:
            yield Piece(f"{prefix}.{projection}.weight", (rows, cols), parameter, index)


def _rename(parameter: str, num_hidden_layers: int) -> str:
    mtp = re.fullmatch(r"mtp\.(\d+)\.(.+)", parameter)
    if mtp is None:
        return parameter if parameter.startswith("lm_head.") else f"model.{parameter}"
    layer, rest = num_hidden_layers + int(mtp[1]), mtp[2]
    if rest.startswith("norm."):
        rest = f"shared_head.{rest}"
    return f"model.layers.{layer}.{rest.removeprefix('block.')}"
