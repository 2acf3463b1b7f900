"""What serving a model costs: tokens per second of a node, and dollars per million of them.

Reading a prompt and writing an answer are different work, so they get different machines (report, section 3.4).
A *prefill unit* takes long runs of tokens: matrix products are large, and the arithmetic is what takes time. A
*decode unit* takes one token of each of many answers: it reads weights and everybody's latents for little
arithmetic, and needs many GPUs so that each holds few experts and each expert still sees many tokens. Within a unit
attention, dense layers, shared experts, embedding and head are on every GPU; the routed experts are spread over all of
them, some twice, so that none is overrun.

Time is added up from rooflines. A product of T tokens with a matrix takes as long as its arithmetic at the rate
that kernels reach, or as its bytes at the bandwidth that they reach, whichever is longer; attention likewise.
Dispatch and combine take their bytes over the network. A batch is run as two microbatches, so that the tokens of
one travel while the other computes; measured systems hide a part of the shorter of the two, not all of it
(`Assumptions.overlap`):

    time = compute + travel - overlap * min(compute, travel)

Every number that is not the hardware's or the model's own is in `Assumptions`, with where it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dsv3.config import ModelConfig
from dsv3.errors import UserError, size
from dsv3.planner.assumptions import Assumption, check_shares, listed
from dsv3.planner.hardware import Hardware

HOUR, MILLION = 3600, 1e6


@dataclass(frozen=True)
class Assumptions:
    """What is assumed of kernels, networks and users; `sources` says why."""

    compute: float = 0.58
    """Share of a GPU's peak that large matrix products reach."""
    bandwidth: float = 0.68
    """Share of the memory bandwidth that products of few tokens reach."""
    attention_prefill: float = 0.55
    """Share of the bf16 peak that attention over prompts reaches."""
    attention_decode: float = 0.62
    """Share of the bf16 peak that absorbed attention over the cache reaches where arithmetic is the limit."""
    attention_bandwidth: float = 0.9
    """Share of the memory bandwidth that it reaches where reading latents is."""
    nvlink: float = 0.77
    """Share of a GPU's links within a node that dispatch and combine reach."""
    network: float = 0.87
    """Share of a GPU's network bandwidth that dispatch and combine of long runs reach."""
    network_decode: float = 0.78
    """The same for the many small messages of decoding."""
    overlap: float = 0.6
    """Share of the shorter of compute and travel that two microbatches hide."""
    balance: float = 0.85
    """Mean over largest load of the GPUs of a unit, after the experts have been balanced."""
    kernels: int = 10
    """Small kernels per layer beside products and attention: norms, casts, rotation, gate, permutation."""
    kernel: float = 4e-6
    """Seconds that each takes at least."""
    accepted: float = 0.85
    """Share of guesses of the MTP module that are kept; 0 for serving without it."""
    hits: float = 0.56
    """Share of input tokens that are found in the cache of earlier prompts."""
    reserve: float = 0.1
    """Share of a GPU's memory that neither weights nor latents may take: buffers, activations, the driver."""

    def __post_init__(self) -> None:
        check_shares(self, UNITS)
        if self.balance == 0 or self.hits == 1:
            raise UserError("balance must be above 0 and hits below 1")


UNITS = {"kernels": "per layer", "kernel": "s"}
SOURCES = {
    "compute": "DeepGEMM's table for H800 (Feb 2025): 1,025-1,358 of 1,979 TFLOP/s at 4,096 tokens",
    "bandwidth": "the same table: 1,509-2,604 of 3,350 GB/s at 128 tokens, 2,050 at 4 x 256",
    "attention_prefill": "FlashAttention-3 (arXiv 2407.08608, figure 5): 638 of 989 TFLOP/s at 4K, head size 128, "
    "unmasked; causal reaches less",
    "attention_decode": "FlashMLA: 580 (Feb 2025) to 660 (Apr 2025) of 989 TFLOP/s on H800",
    "attention_bandwidth": "FlashMLA: 3,000 of 3,350 GB/s on H800",
    "nvlink": "DeepEP: 153 of 200 GB/s within a node of H800",
    "network": "DeepEP: 58 GB/s over 4 nodes, 51 over 8, counting what stays; of 50 that is 43 to 45",
    "network_decode": "DeepEP's low-latency kernels at EP128: 39 of 50 GB/s",
    "overlap": "SGLang's ablation on 96 H100: two batches give +27% to +35% in prefill, +25% to +35% in decode",
    "balance": "SGLang on 32 H100: 50,302 tokens/s with real routing, 59,337 with even routing",
    "kernels": "counted in a layer of the model; not measured",
    "kernel": "a launch in a CUDA graph and a kernel of 128 tokens; not measured",
    "accepted": "report, section 5.4.3: 85% to 90%",
    "hits": "DeepSeek, open-infra-index day 6: 56.3%",
    "reserve": "ours",
}


@dataclass(frozen=True)
class Unit:
    """GPUs that hold a model together and do one kind of work."""

    work: str
    """prefill or decode."""
    hardware: Hardware
    gpus: int
    nodes: int
    experts: int
    """Routed experts that each GPU holds of a layer, copies included."""
    redundant: int
    """Copies beyond one of each expert, in the unit."""
    memory: dict[str, float]
    """Bytes of each GPU by part, but for the cache."""
    cache: float
    """Bytes that are left for latents."""
    cache_tokens: int
    """The same in tokens."""
    batch: int
    """Tokens (prefill) or answers under way (decode) per GPU."""
    length: int
    """Tokens of a prompt (prefill), or that are in the cache for each answer (decode)."""
    time: dict[str, float]
    """Seconds of one step by part: compute by kind, dispatch and combine, and (negative) what overlap hides."""
    tokens_per_step: float
    """Tokens that a GPU reads (prefill) or gives out (decode) in a step."""

    @property
    def step(self) -> float:
        """Seconds of one step."""
        return sum(self.time.values())

    @property
    def tokens_per_second(self) -> float:
        """Of one node."""
        return self.tokens_per_step * self.hardware.gpus_per_node / self.step

    @property
    def tokens_per_user(self) -> float:
        """Tokens per second that one answer gains; of a prefill unit, that one GPU reads."""
        return self.tokens_per_step / self.step / (self.batch if self.work == "decode" else 1)

    @property
    def dollars_per_million(self) -> float:
        """Dollars for a million tokens."""
        hourly = self.hardware.dollars_per_hour * self.hardware.gpus_per_node
        return hourly / HOUR / self.tokens_per_second * MILLION


@dataclass(frozen=True)
class ServingPlan:
    """A prefill and a decode unit, and what they give."""

    hardware: Hardware
    prefill: Unit
    decode: Unit
    assumed: Assumptions

    @property
    def units(self) -> tuple[Unit, Unit]:
        return self.prefill, self.decode

    @property
    def input_per_second(self) -> float:
        """Input tokens per second of a prefill node, those found in the cache included."""
        return self.prefill.tokens_per_second / (1 - self.assumed.hits)

    @property
    def dollars_per_million_input(self) -> float:
        return self.prefill.dollars_per_million * (1 - self.assumed.hits)

    @property
    def dollars_per_million_output(self) -> float:
        return self.decode.dollars_per_million

    @property
    def assumptions(self) -> tuple[Assumption, ...]:
        """What is assumed, with its sources."""
        return listed(self.assumed, SOURCES, UNITS)


@dataclass(frozen=True)
class Matrix:
    """A weight that tokens are multiplied by: [outputs, inputs], `copies` times side by side (one per head)."""

    inputs: int
    outputs: int
    copies: int = 1
    wide: bool = False
    """Kept in bf16 where others are in FP8."""

    @property
    def numel(self) -> int:
        return self.inputs * self.outputs * self.copies

    @property
    def traffic(self) -> int:
        """Bytes that kernels between products move for one token: they read what came out, write what goes in."""
        return self.copies * (2 * self.outputs + self.inputs)


@dataclass(frozen=True)
class Matrices:
    """The matrices that a token meets."""

    config: ModelConfig
    modules: int
    """MTP modules that are run."""

    def attention(self, absorbed: bool) -> list[Matrix]:
        """Of one layer: queries, latent, expansion or its absorbed halves, output."""
        c = self.config
        heads, nope, v = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim
        if c.q_lora_rank is None:
            queries = [Matrix(c.hidden_size, heads * c.qk_head_dim + c.latent_dim)]
        else:
            first = Matrix(c.hidden_size, c.q_lora_rank + c.latent_dim)
            queries = [first, Matrix(c.q_lora_rank, heads * c.qk_head_dim)]
        if absorbed:
            middle = [
                Matrix(nope, c.kv_lora_rank, heads, wide=True),
                Matrix(c.kv_lora_rank, v, heads, wide=True),
            ]
        else:
            middle = [Matrix(c.kv_lora_rank, heads * (nope + v))]
        return [*queries, *middle, Matrix(heads * v, c.hidden_size)]

    def feed_forward(self, width: int) -> list[Matrix]:
        hidden = self.config.hidden_size
        return [Matrix(hidden, 2 * width), Matrix(width, hidden)] if width else []

    @property
    def expert(self) -> list[Matrix]:
        return self.feed_forward(self.config.moe_intermediate_size)

    @property
    def shared(self) -> list[Matrix]:
        """Shared experts and gate of one layer."""
        c = self.config
        gate = Matrix(c.hidden_size, c.n_routed_experts or 0, wide=True)
        return [*self.feed_forward((c.n_shared_experts or 0) * c.moe_intermediate_size), gate]

    @property
    def head(self) -> Matrix:
        return Matrix(self.config.hidden_size, self.config.vocab_size, wide=True)

    @property
    def layers(self) -> range:
        return range(self.config.num_hidden_layers + self.modules)

    @property
    def moe_layers(self) -> int:
        return sum(self.config.is_moe_layer(layer) for layer in self.layers)

    @property
    def dense_layers(self) -> int:
        return len(self.layers) - self.moe_layers

    @property
    def active(self) -> int:
        """Numbers of all matrices that one token is multiplied by, head included."""
        c = self.config
        attention = sum(m.numel for m in self.attention(absorbed=False))
        dense = sum(m.numel for m in self.feed_forward(c.intermediate_size))
        routed = c.num_experts_per_tok * sum(m.numel for m in self.expert)
        moe = routed + sum(m.numel for m in self.shared)
        return (
            len(self.layers) * attention + self.dense_layers * dense + self.moe_layers * moe + self.head.numel
        )

    @property
    def total(self) -> int:
        """Numbers of all matrices, with the embedding."""
        experts = self.config.n_routed_experts or 0
        idle = self.moe_layers * (experts - self.config.num_experts_per_tok) if experts else 0
        embedding = 0 if self.config.tie_word_embeddings else self.head.numel
        return self.active + idle * sum(m.numel for m in self.expert) + embedding

    def token_bytes(self) -> int:
        """Of one token's latents in all layers, in bf16."""
        return len(self.layers) * self.config.latent_dim * 2


class _Gpu:
    """How long a GPU takes for things."""

    def __init__(self, hardware: Hardware, assumed: Assumptions, gpus: int) -> None:
        self.hardware, self.assumed = hardware, assumed
        self.nodes = math.ceil(gpus / hardware.gpus_per_node)
        self.gpus = gpus

    def weight_bytes(self, matrix: Matrix) -> float:
        """With the scale of each 128 x 128 block, where it is in FP8."""
        wide = matrix.wide or not self.hardware.fp8_flops
        return matrix.numel * (2 if wide else 1 + 4 / 128**2)

    def product(self, matrix: Matrix, tokens: float, sets: float = 1) -> float:
        """Seconds to multiply so many tokens by each of `sets` matrices of this shape."""
        wide = matrix.wide or not self.hardware.fp8_flops
        rate = (self.hardware.bf16_flops if wide else self.hardware.fp8_flops) * self.assumed.compute
        moved = tokens * matrix.copies * (matrix.inputs * (2 if wide else 1) + matrix.outputs * 2)
        read = self.hardware.bandwidth * self.assumed.bandwidth
        return sets * max(2 * tokens * matrix.numel / rate, (self.weight_bytes(matrix) + moved) / read)

    def products(self, matrices: Iterable[Matrix], tokens: float, sets: float = 1) -> float:
        return sum(self.product(matrix, tokens, sets) for matrix in matrices)

    def travel(self, config: ModelConfig, tokens: float) -> float:
        """Seconds that `tokens` of every GPU take to their experts in fp8 and back in bf16, in one layer of a prefill
        unit: once to each node that holds an expert of theirs, from there to each GPU that does."""
        k, hidden = config.num_experts_per_tok, config.hidden_size
        if self.gpus == 1:
            return 0.0
        there_and_back = tokens * hidden * (1 + 4 / 128 + 2) / self.assumed.balance
        nodes = _distinct(self.nodes, _groups(config))
        outside = nodes * (1 - 1 / self.nodes)
        inside = _distinct(self.gpus, k) * (1 - 1 / self.hardware.gpus_per_node)
        return there_and_back * max(
            outside / (self.hardware.network * self.assumed.network),
            inside / (self.hardware.nvlink * self.assumed.nvlink),
        )

    def travel_decode(self, config: ModelConfig, tokens: float) -> float:
        """The same in a decode unit, where each token goes to each of its experts directly."""
        bytes_ = tokens * config.num_experts_per_tok * config.hidden_size * (1 + 4 / 128 + 2)
        away = (1 - 1 / self.gpus) / self.assumed.balance
        if self.nodes == 1:
            return bytes_ * away / (self.hardware.nvlink * self.assumed.nvlink)
        return bytes_ * away / (self.hardware.network * self.assumed.network_decode)


def _distinct(places: float, choices: float) -> float:
    """How many different ones of so many places so many independent choices meet."""
    return float(places * (1 - (1 - 1 / places) ** choices))


def _groups(config: ModelConfig) -> float:
    """How many groups of experts a token meets; where groups are not limited, each expert counts."""
    if not config.limits_groups:
        return config.num_experts_per_tok
    return _distinct(config.topk_group, config.num_experts_per_tok)


def plan_serving(
    config: ModelConfig,
    hardware: Hardware,
    *,
    prefill_gpus: int | None = None,
    decode_gpus: int | None = None,
    redundant: int | None = None,
    prompt: int = 4096,
    context: int = 4989,
    chunk: int = 16384,
    batch: int | None = None,
    speed: float = 20.0,
    assumed: Assumptions | None = None,
) -> ServingPlan:
    """Prefill and decode units of a model on some hardware.

    prefill_gpus, decode_gpus: GPUs of each unit; by default what DeepSeek's rule gives (`default_gpus`). redundant:
    copies of routed experts in each unit; by default an eighth of them, as DeepSeek has. prompt: tokens of a prompt.
    context: tokens in the cache for each answer under way, on average (DeepSeek: 4,989). chunk: tokens that a GPU
    reads in one step of prefill. batch: answers under way per GPU; by default as many as fit into the
    cache while each gains `speed` tokens per second (DeepSeek: 20 to 22).
    Raises UserError where the weights do not fit, or experts do not come out even.
    """
    assumed = assumed or Assumptions()
    model = Matrices(config, min(1, config.num_nextn_predict_layers) if assumed.accepted else 0)
    default = default_gpus(config, hardware, assumed, redundant)
    first = _Gpu(hardware, assumed, prefill_gpus or default[0])
    second = _Gpu(hardware, assumed, decode_gpus or default[1])
    return ServingPlan(
        hardware,
        _prefill_unit(model, first, _room(model, first, "prefill", redundant), prompt, chunk),
        _decode_unit(model, second, _room(model, second, "decode", redundant), context, batch, speed),
        assumed,
    )


@dataclass(frozen=True)
class _Room:
    """What a GPU of a unit holds, and what is left."""

    experts: int
    redundant: int
    memory: dict[str, float]
    cache: float
    cache_tokens: int


def _room(model: Matrices, gpu: _Gpu, work: str, redundant: int | None) -> _Room:
    """Raises UserError where experts do not come out even, or weights do not fit."""
    copies = _redundant(model.config, gpu.gpus) if redundant is None else redundant
    experts = _experts(model.config, work, gpu.gpus, copies)
    memory = _memory(model, gpu, experts)
    hardware, taken = gpu.hardware, sum(memory.values())
    if taken >= hardware.memory:
        least = taken - memory["routed experts"] * (1 - 1 / max(1, experts))  # with one expert of each layer
        advice = (
            "take GPUs with more memory" if least >= hardware.memory else f"give the {work} unit more GPUs"
        )
        raise UserError(
            f"each of {gpu.gpus} {hardware.name} would hold {size(taken)}, but has {size(hardware.memory)}: {advice}"
        )
    cache = hardware.memory - taken
    return _Room(experts, copies, memory, cache, int(cache // model.token_bytes()))


def _prefill_unit(model: Matrices, gpu: _Gpu, room: _Room, prompt: int, chunk: int) -> Unit:
    time = _prefill(model, gpu, room.experts, prompt, chunk)
    return _unit("prefill", gpu, room, chunk, prompt, time, chunk)


def _decode_unit(
    model: Matrices, gpu: _Gpu, room: _Room, context: int, batch: int | None, speed: float
) -> Unit:
    fits = room.cache_tokens // context
    if not 1 <= (batch or fits) <= fits:
        raise UserError(
            f"batch is {batch or 1}, but the cache of a {gpu.hardware.name} holds {room.cache_tokens:,} tokens, {fits} answers of "
            f"{context:,}: take fewer, or shorter ones"
        )
    answers = batch or _quick_enough(model, gpu, room.experts, context, fits, speed)
    time = _decode(model, gpu, room.experts, context, answers)
    gained = answers * (1 + model.modules * gpu.assumed.accepted)
    return _unit("decode", gpu, room, answers, context, time, gained)


def _unit(
    work: str, gpu: _Gpu, room: _Room, batch: int, length: int, time: dict[str, float], tokens_per_step: float
) -> Unit:
    return Unit(
        work=work,
        hardware=gpu.hardware,
        gpus=gpu.gpus,
        nodes=gpu.nodes,
        experts=room.experts,
        redundant=room.redundant,
        memory=room.memory,
        cache=room.cache,
        cache_tokens=room.cache_tokens,
        batch=batch,
        length=length,
        time=time,
        tokens_per_step=tokens_per_step,
    )


def default_gpus(
    config: ModelConfig, hardware: Hardware, assumed: Assumptions, redundant: int | None = None
) -> tuple[int, int]:
    """GPUs of a prefill and of a decode unit: one, where the model takes no more than 60% of one.

    Else for prefill the fewest, a power of two, on which weights leave 40% of the memory free (V3 on H800: 32, as
    DeepSeek), and for decoding so many that each holds two routed experts of a layer (V3: 144, as DeepSeek).
    """
    model = Matrices(config, min(1, config.num_nextn_predict_layers))
    routed = config.n_routed_experts or 0

    def share(gpus: int) -> float:
        experts = -(-(routed + _redundant(config, gpus)) // gpus)
        parts = _memory(model, _Gpu(hardware, assumed, gpus), experts)
        return (sum(parts.values()) - parts["reserve"]) / hardware.memory

    prefill = 1
    while share(prefill) > 0.6 and 2 * prefill <= routed:
        prefill *= 2
    if prefill == 1:
        return 1, 1
    slots = routed + (routed // 8 if redundant is None else redundant)
    return prefill, slots if slots % 2 else slots // 2


def _redundant(config: ModelConfig, gpus: int) -> int:
    """An eighth of the experts once more, where there are several GPUs (DeepSeek: 32 of 256), and what fills them."""
    routed = config.n_routed_experts or 0
    eighth = routed // 8 if gpus > 1 else 0
    return eighth + -(routed + eighth) % gpus


def _experts(config: ModelConfig, work: str, gpus: int, redundant: int) -> int:
    """Experts per GPU and layer."""
    slots = (config.n_routed_experts or 0) + redundant
    if slots % gpus:
        raise UserError(
            f"{config.n_routed_experts or 0} experts and {redundant} redundant ones do not fill {gpus} GPUs of a {work} unit "
            f"evenly: take a number of GPUs that divides {slots}, or other redundancy"
        )
    return slots // gpus


def _memory(model: Matrices, gpu: _Gpu, experts: int) -> dict[str, float]:
    """Bytes of each GPU but for the cache."""

    def held(matrices: Iterable[Matrix]) -> float:
        return sum(map(gpu.weight_bytes, matrices))

    config = model.config
    # An MTP module has a projection of two hidden vectors, and shares embedding and head.
    joined = model.modules * 2 * config.hidden_size**2 * 2
    return {
        "attention": len(model.layers) * held(model.attention(absorbed=False)),
        "dense layers": model.dense_layers * held(model.feed_forward(config.intermediate_size)),
        "shared experts, gates": model.moe_layers * held(model.shared),
        "routed experts": model.moe_layers * experts * held(model.expert),
        "embedding, head": 2 * gpu.weight_bytes(model.head) + joined,
        "reserve": gpu.hardware.memory * gpu.assumed.reserve,
    }


def _prefill(model: Matrices, gpu: _Gpu, experts: int, prompt: int, chunk: int) -> dict[str, float]:
    """Seconds of a step that reads `chunk` tokens on each GPU."""
    config, assumed = model.config, gpu.assumed
    pieces = 2 if gpu.gpus > 1 else 1
    tokens = chunk / pieces
    heads = config.num_attention_heads
    # Those computed come after the share that was found, so they look back on more than half of the prompt.
    seen = prompt * (1 + assumed.hits) / 2
    flops = 2 * heads * (config.qk_head_dim + config.v_head_dim) * seen * tokens
    core = flops / (gpu.hardware.bf16_flops * assumed.attention_prefill)
    travel = gpu.travel(config, tokens)
    return _time(model, gpu, experts, pieces, tokens, core, travel, absorbed=False, headed=tokens / prompt)


def _decode(model: Matrices, gpu: _Gpu, experts: int, context: int, batch: int) -> dict[str, float]:
    """Seconds of a step that gives each of `batch` answers its next token, and the next guess."""
    config, assumed = model.config, gpu.assumed
    pieces = 2 if gpu.gpus > 1 and batch > 1 else 1
    answers = batch / pieces
    tokens = answers * (1 + model.modules)
    flops = 2 * config.num_attention_heads * (config.latent_dim + config.kv_lora_rank) * context * tokens
    read = answers * context * config.latent_dim * 2
    core = max(
        flops / (gpu.hardware.bf16_flops * assumed.attention_decode),
        read / (gpu.hardware.bandwidth * assumed.attention_bandwidth),
    )
    travel = gpu.travel_decode(config, tokens)
    return _time(model, gpu, experts, pieces, tokens, core, travel, absorbed=True, headed=tokens)


def _time(
    model: Matrices,
    gpu: _Gpu,
    experts: int,
    pieces: int,
    tokens: float,
    core: float,
    travel: float,
    absorbed: bool,
    headed: float,
) -> dict[str, float]:
    """A step in `pieces` microbatches: seconds by part. core, travel: of one layer and microbatch; headed: the
    tokens of a microbatch that get logits."""
    config, assumed = model.config, gpu.assumed
    attention = model.attention(absorbed)
    pairs = tokens * config.num_experts_per_tok / assumed.balance
    sets = min(experts, pairs)  # few tokens do not meet every expert
    dense = model.feed_forward(config.intermediate_size)
    moved = 4 * config.hidden_size + sum(matrix.traffic for matrix in attention)
    moved_moe = config.num_experts_per_tok * sum(matrix.traffic for matrix in model.expert)
    read = gpu.hardware.bandwidth * assumed.bandwidth
    least = assumed.kernels * assumed.kernel
    small = (
        len(model.layers) * max(least, tokens * moved / read) + model.moe_layers * tokens * moved_moe / read
    )
    other = model.moe_layers * gpu.products(model.shared, tokens) + model.dense_layers * gpu.products(
        dense, tokens
    )
    parts = {
        "attention projections": len(model.layers) * gpu.products(attention, tokens),
        "attention core": len(model.layers) * core,
        "routed experts": model.moe_layers * gpu.products(model.expert, pairs / sets, sets) if sets else 0.0,
        "shared experts, dense": other,
        "head": (1 + model.modules) * gpu.product(model.head, headed),
        "small kernels": small,
    }
    compute, away = pieces * sum(parts.values()), pieces * model.moe_layers * travel
    hidden = assumed.overlap * min(compute, away) if pieces == 2 else 0.0
    timed = {name: pieces * seconds for name, seconds in parts.items()}
    return timed | {"dispatch, combine": away, "hidden by overlap": 0.0 - hidden}


def _quick_enough(model: Matrices, gpu: _Gpu, experts: int, context: int, most: int, speed: float) -> int:
    """The largest batch up to `most` in which each answer gains `speed` tokens a second; 1 if there is none."""
    gain = 1 + model.modules * gpu.assumed.accepted
    low, high = 1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        step = sum(_decode(model, gpu, experts, context, middle).values())
        low, high = (middle, high) if gain / step >= speed else (low, middle)
    return low
