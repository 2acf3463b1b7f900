"""All blocks in one native call, for flat batches on CPUs that multiply bf16 (`dsv3.kernels.inference`).

In that call attention has the absorbed form, so pieces of prompts take it only where it costs little more than the
plain one. The model that ships is such a shape; DeepSeek-V3 is not: its prompts go through the modules of attention,
which call native kernels for their parts, and then to the native experts. Whatever does not fit (other dtypes and
devices, odd sizes, layers that somebody replaced) goes the way of the modules themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from operator import is_
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dsv3.kernels.inference import (
    BLOCK,
    Batch,
    Layer,
    Layers,
    attention_half,
    blocks_forward,
    feed_forward,
    feed_forward_wave,
    route,
)
from dsv3.kernels.native import usable
from dsv3.kernels.packed import Weight
from dsv3.model.layers import FeedForward, RMSNorm, weight_of
from dsv3.model.moe import MoE
from dsv3.model.stored import StoredExperts

if TYPE_CHECKING:
    from dsv3.model.flat import FlatBatch
    from dsv3.model.rope import Rope
    from dsv3.model.transformer import Block

_DEAR = 1.5
"""How much a pair of tokens may cost in absorbed form, relative to the plain one, for prompts to take it."""


class Network:
    """Blocks one after the other, each with its cache, looked at once.

    Whether a block still is what the kernels were given takes longer to ask than a small layer to compute. Who knows that
    nobody replaces weights or modules between two steps keeps one of these; should somebody do it all the same, then the
    steps go on with the weights that were there.
    """

    def __init__(self, blocks: Iterable[nn.Module], cache: Sequence[Tensor]) -> None:
        self.whole: Layers | None = None
        """All of it in one call; None if any block has to be done otherwise."""
        self.absorbs_cheaply = True
        self.weights: list[torch.UntypedStorage] = []
        layers, caches = [], []
        for block in cast("Iterable[Block]", blocks):
            layer, own = _layer(block), cache[block.self_attn.layer]
            if layer is None or not _fits(own) or _stored(block) is not None:
                return
            layers.append(layer)
            caches.append(own)
            self.absorbs_cheaply &= _absorbs_cheaply(block)
            self.weights += [tensor.untyped_storage() for tensor in _known[block].tensors]
        self.whole = Layers(layers, caches)

    def forward(
        self, x: Tensor, rope: Rope, angles: tuple[Tensor, Tensor], batch: FlatBatch
    ) -> Tensor | None:
        """x [tokens, hidden] through all blocks, in place; None, and x as it was, if any has to be done otherwise."""
        if self.whole is None or not _takes(x) or (batch.spans and not self.absorbs_cheaply):
            return None
        x = x.contiguous()
        blocks_forward(self.whole, _native(batch, rope, angles), x)
        return x


def forward(
    block: Block, x: Tensor, rope: Rope, angles: tuple[Tensor, Tensor], batch: FlatBatch
) -> Tensor | None:
    """One block, in halves that go different ways if need be; None if both have to be done otherwise."""
    if not _takes(x):
        return None
    network = Network((block,), batch.cache)
    done = network.forward(x.clone(), rope, angles, batch) if network.whole is not None else None
    if done is not None:
        return done
    layer, cache = _layer(block), batch.cache[block.self_attn.layer]
    if layer is None:
        return None
    if _fits(cache) and (not batch.spans or _absorbs_cheaply(block)):
        x = x.clone(memory_format=torch.contiguous_format)
        attention_half(layer, _native(batch, rope, angles), x, cache)
    elif not layer.form and torch.cpu._is_amx_tile_supported():
        return None  # oneDNN multiplies bf16 with it, and we do not
    else:
        x = x + block.self_attn(block.input_layernorm(x), rope, angles, None, batch)
    _feed_forward(block, layer, x)
    return x


def _takes(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and not torch.is_grad_enabled() and usable(x)


def _fits(cache: Tensor) -> bool:
    return cache.dtype == torch.bfloat16 and cache.shape[1] == BLOCK


def _native(batch: FlatBatch, rope: Rope, angles: tuple[Tensor, Tensor]) -> Batch:
    if not batch.native:
        where = batch.positions, batch.slots, batch.owners, batch.tables
        batch.native.append(Batch.of(*where, angles, rope.interleave))
    return batch.native[0]


def _stored(block: Block) -> StoredExperts | None:
    experts = block.mlp.experts if isinstance(block.mlp, MoE) else None
    return experts if isinstance(experts, StoredExperts) else None


def _feed_forward(block: Block, layer: Layer, x: Tensor) -> None:
    """`feed_forward`, with experts that may have to be fetched: those that were chosen, a wave at a time."""
    experts, table = _stored(block), layer.table
    if experts is None or table is None:
        feed_forward(layer, x)
        return
    chosen, weights = route(layer, x)
    wanted = sorted(set(chosen.flatten().tolist()))
    sums = x.new_empty(x.shape, dtype=torch.float32)
    done = 0
    with closing(experts.store.waves(experts.layer, wanted)) as waves:
        for number, wave in enumerate(waves):
            if not number:  # what this layer needs has been asked for: now the next one's
                _foretell(experts, x)
            for e, expert in wave.items():
                table[2 * e], table[2 * e + 1] = expert.matrices
            last = max(wave) + 1 if wave and max(wave) != wanted[-1] else layer.experts
            feed_forward_wave(layer, x, chosen, weights, sums, range(done, last))
            done = last


def _foretell(experts: StoredExperts, x: Tensor) -> None:
    """The next layer's gate says of x what it may say of what becomes of it: of trained experts it got two thirds right."""
    for block in experts.next:
        layer, after = _layer(block), _stored(block)
        if layer is not None and after is not None:
            chosen, _ = route(layer, x)
            after.store.foretell(after.layer, sorted(set(chosen.flatten().tolist())))


def invariant(block: Block) -> bool:
    """Whether `forward` does every flat batch over a cache as the engine has it, in bf16 and blocks of BLOCK tokens, and
    with it promises the same bits for a token in any company."""
    return _absorbs_cheaply(block) and _layer(block) is not None


def _absorbs_cheaply(block: Block) -> bool:
    attention = block.self_attn
    return 2 * attention.rank + attention.rotary <= _DEAR * (attention.qk_dim + attention.v_dim)


class _Known:
    """A block's layer, or None if the kernels cannot take it, and all it was made of."""

    def __init__(self, block: Block) -> None:
        modules = list(block.modules())
        self.held = [d for m in modules for d in (m._modules, m._parameters, m._buffers) if d]
        self.experts = block.mlp.experts if isinstance(block.mlp, MoE) else None
        self.parts = self._parts()
        self.tensors = [part for part in self.parts if isinstance(part, Tensor)]
        self.addresses = [*map(Tensor.data_ptr, self.tensors)]
        self.hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self.hooked = any(self.hooks)
        self.layer: Layer | None = None
        with suppress(ValueError):
            self.layer = _make(block)

    def _parts(self) -> list[object]:
        parts: list[object] = [part for held in self.held for part in held.values()]
        parts.append(self.experts and self.experts.linear)
        return parts

    @property
    def holds(self) -> bool:
        """Whether no part was replaced since, and no weight moved. Asked for each layer in every step."""
        parts = self._parts()
        same = len(parts) == len(self.parts) and all(map(is_, parts, self.parts))
        same = same and any(self.hooks) == self.hooked
        return same and [*map(Tensor.data_ptr, self.tensors)] == self.addresses


_known: WeakKeyDictionary[Block, _Known] = WeakKeyDictionary()


def _layer(block: Block) -> Layer | None:
    known = _known.get(block)
    if known is None or not known.holds:
        known = _known[block] = _Known(block)
    return known.layer


def _make(block: Block) -> Layer:
    """ValueError if it is not what the kernels take."""
    attention, mlp = block.self_attn, block.mlp
    for module in block.modules():
        own = type(module).__module__.startswith("dsv3.model.")
        if not own and type(module) is not nn.Linear:
            raise ValueError(f"{type(module)} instead of a linear layer")
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(f"{type(module)} with hooks or a forward of its own")
    matrices: dict[str, nn.Module] = {"kv_a": attention.kv_a_proj_with_mqa, "o": attention.o_proj}
    vectors: dict[str, Tensor | None] = {
        "input_norm": block.input_layernorm.weight,
        "kv_a_bias": attention.kv_a_proj_with_mqa.bias,
        "kv_norm": attention.kv_a_layernorm.weight,
        "kv_b": attention.kv_b_proj.weight,
        "o_bias": attention.o_proj.bias,
        "post_norm": block.post_attention_layernorm.weight,
    }
    sizes = {
        "hidden": attention.o_proj.out_features,
        "heads": attention.heads,
        "nope": attention.nope,
        "rotary": attention.rotary,
        "v_dim": attention.v_dim,
        "rank": attention.rank,
    }
    norms: RMSNorm = block.input_layernorm
    fractions = {"eps": norms.eps, "latent_eps": attention.kv_a_layernorm.eps, "scale": attention.scale}
    if attention.compresses_q:
        matrices["q_a"], matrices["q_b"] = attention.q_a_proj, attention.q_b_proj
        vectors["q_a_bias"], vectors["q_a_norm"] = attention.q_a_proj.bias, attention.q_a_layernorm.weight
        sizes["q_rank"] = attention.q_a_proj.out_features
    else:
        matrices["q_b"] = attention.q_proj

    dense: FeedForward | None = mlp.shared_experts if isinstance(mlp, MoE) else mlp
    if dense is not None:
        matrices["gate_up"], matrices["down"] = dense.gate_up_proj, dense.down_proj
        sizes["width"] = dense.down_proj.in_features
    routed: list[tuple[Weight, Weight]] = []
    if isinstance(mlp, MoE):
        if mlp.experts.linear is not None:
            raise ValueError("experts that multiply in a way of their own")
        config = mlp.gate.config
        vectors["gate"], vectors["gate_bias"] = mlp.gate.weight, mlp.gate.e_score_correction_bias
        if isinstance(mlp.experts, StoredExperts):
            like = mlp.experts.store.like(mlp.experts.layer)
            routed = [(like.gate_up, like.down)] * mlp.experts.count
        else:
            gate_up, down = weight_of(mlp.experts.gate_up_proj), weight_of(mlp.experts.down_proj)
            routed = list(zip(gate_up.unbind(), down.unbind(), strict=True))
        sizes |= {
            "experts": len(routed),
            "expert_width": routed[0][1].shape[1],
            "chosen": config.num_experts_per_tok,
            "sigmoid": int(config.scoring_func == "sigmoid"),
            "two_best": int(config.topk_method == "noaux_tc"),
            "normalize": int(config.norm_topk_prob),
        }
        if config.limits_groups:
            sizes["groups"], sizes["topk_group"] = config.n_group, config.topk_group
        fractions["factor"] = config.routing_factor
    weights = {name: weight_of(module) for name, module in matrices.items()}
    present = {name: vector.detach() for name, vector in vectors.items() if vector is not None}
    return Layer.of(weights, routed, present, sizes, fractions)
