"""A model as numbers: parameters, FLOPs and bytes of each of its parts, from the config alone.

FLOPs are those of the forward pass per token: two for each number of a matrix that a token meets, and the causal half
of attention. They agree with those that training counts (`dsv3.train.flops`), and parameters with those that a
checkpoint has (`dsv3.checkpoint.summary`); this module needs neither torch nor files.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3.config import ModelConfig
from dsv3.planner.pipeline import cut


@dataclass(frozen=True)
class Layer:
    """One block's parameters, by part."""

    attention: int
    dense: int
    """Of the feed-forward of a dense layer; 0 in a layer of experts."""
    shared: int
    gate: int
    experts: int
    """Of all routed experts."""
    chosen: int
    """Of the routed experts that a token goes through."""
    norms: int

    @property
    def replicated(self) -> int:
        """All but the routed experts: what every process of an expert group holds."""
        return self.attention + self.dense + self.shared + self.gate + self.norms

    @property
    def met(self) -> int:
        """Numbers of the matrices that a token is multiplied by."""
        return self.attention + self.dense + self.shared + self.gate + self.chosen


def layer(config: ModelConfig, index: int) -> Layer:
    """The layer of that number; blocks of MTP modules count on after the last."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    queries, norms = hidden * heads * config.qk_head_dim, 2 * hidden + config.kv_lora_rank
    if config.q_lora_rank is not None:
        queries = config.q_lora_rank * (hidden + heads * config.qk_head_dim)
        norms += config.q_lora_rank
    latents = hidden * config.latent_dim
    output = heads * config.v_head_dim * hidden
    attention = queries + latents + expansion(config) + output
    if config.attention_bias:
        attention += (config.q_lora_rank or 0) + config.latent_dim + hidden
    if not config.is_moe_layer(index):
        return Layer(attention, 3 * hidden * config.intermediate_size, 0, 0, 0, 0, norms)
    routed, expert = config.n_routed_experts or 0, 3 * hidden * config.moe_intermediate_size
    return Layer(
        attention=attention,
        dense=0,
        shared=expert * (config.n_shared_experts or 0),
        gate=hidden * routed,
        experts=expert * routed,
        chosen=expert * config.num_experts_per_tok,
        norms=norms,
    )


def expansion(config: ModelConfig) -> int:
    """Parameters of `kv_b_proj`, which makes keys and values of latents."""
    return config.kv_lora_rank * config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)


def vocabulary(config: ModelConfig) -> int:
    """Parameters of the embedding, and of the head."""
    return config.vocab_size * config.hidden_size


def junction(config: ModelConfig) -> int:
    """Parameters of an MTP module's `eh_proj`, which joins a hidden vector and an embedding."""
    return 2 * config.hidden_size**2


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part. A tied head counts as nothing; MTP modules share embedding and head. Experts' correction
    biases (V3: 15,104 numbers) count with the gate."""
    layers = [layer(config, i) for i in range(config.num_hidden_layers)]
    moe = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    return {
        "embedding": vocabulary(config),
        "attention": sum(each.attention for each in layers),
        "dense": sum(each.dense for each in layers),
        "routed experts": sum(each.experts for each in layers),
        "shared experts": sum(each.shared for each in layers),
        "gate": sum(each.gate for each in layers) + moe * _biases(config),
        "norms": sum(each.norms for each in layers) + config.hidden_size,
        "head": 0 if config.tie_word_embeddings else vocabulary(config),
        "MTP": sum(_module(config, k) for k in range(config.num_nextn_predict_layers)),
    }


def _biases(config: ModelConfig) -> int:
    return (config.n_routed_experts or 0) if config.topk_method == "noaux_tc" else 0


def _module(config: ModelConfig, k: int) -> int:
    """Of an MTP module: a block, its junction, norms of both inputs and of the output."""
    index = config.num_hidden_layers + k
    block = layer(config, index)
    biases = _biases(config) * config.is_moe_layer(index)
    return block.replicated + block.experts + biases + junction(config) + 3 * config.hidden_size


def active_parameters(config: ModelConfig) -> int:
    """Parameters of the main model that one token uses, embedding and head counted whole."""
    parts = parameters(config)
    unused = sum(
        each.experts - each.chosen for each in (layer(config, i) for i in range(config.num_hidden_layers))
    )
    return sum(parts.values()) - parts["MTP"] - unused


def cache_bytes(config: ModelConfig, mtp: bool = False, number: float = 2) -> float:
    """Bytes that the latent cache takes per token, in numbers of so many bytes; mtp: and the first MTP module's."""
    return (config.num_hidden_layers + mtp) * config.latent_dim * number


def attention_flops(config: ModelConfig, seq: float) -> float:
    """FLOPs per token of one layer's attention itself, forward, in rows of `seq`: the causal half."""
    return config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * (seq + 1)


def forward_flops(config: ModelConfig, seq: int, mtp: bool = False) -> dict[str, float]:
    """FLOPs forward per token of a row of `seq`, by part, logits for every token.

    MTP module k has seq - k of a row's places to work on, and counts as a whole, its logits included.
    """
    parts = dict.fromkeys(
        ("attention projections", "attention core", "dense", "routed experts", "shared experts", "gate"), 0.0
    )
    for index in range(config.num_hidden_layers):
        each = layer(config, index)
        parts["attention projections"] += 2 * _matrices(config, each)
        parts["attention core"] += attention_flops(config, seq)
        parts["dense"] += 2 * each.dense
        parts["routed experts"] += 2 * each.chosen
        parts["shared experts"] += 2 * each.shared
        parts["gate"] += 2 * each.gate
    parts["head"] = 2.0 * vocabulary(config)
    parts["MTP"] = 0.0
    for k in range(1, config.num_nextn_predict_layers + 1 if mtp else 1):
        each, places = layer(config, config.num_hidden_layers + k - 1), max(0, seq - k)
        products = _matrices(config, each) + each.met - each.attention + junction(config) + vocabulary(config)
        parts["MTP"] += (2 * products + attention_flops(config, places)) * places / seq
    return parts


def _matrices(config: ModelConfig, each: Layer) -> int:
    """Numbers of attention's matrices, biases left out."""
    biases = ((config.q_lora_rank or 0) + config.latent_dim + config.hidden_size) * config.attention_bias
    return each.attention - biases


def training_flops(config: ModelConfig, seq: int, mtp: bool = True) -> float:
    """FLOPs to train on one token: the backward pass multiplies twice where the forward pass does once."""
    return 3 * sum(forward_flops(config, seq, mtp).values())


@dataclass(frozen=True)
class Stage:
    """The layers of one stage of a pipeline, and what stands before and after them."""

    layers: tuple[int, ...]
    """Numbers of its layers, those of MTP modules included."""
    modules: int
    """MTP modules."""
    first: bool
    last: bool


def stages(config: ModelConfig, count: int, mtp: bool = True) -> list[Stage]:
    """A model cut into so many stages, as a training run cuts it. mtp: whether its MTP modules are run."""
    depth, modules = config.num_hidden_layers, config.num_nextn_predict_layers
    cut_up = []
    for s, piece in enumerate(cut(depth, modules, count)):
        last = s == count - 1
        run = modules if last and mtp else 0
        cut_up.append(Stage((*piece, *range(depth, depth + run)), run, s == 0, last))
    return cut_up
