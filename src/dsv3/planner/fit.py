"""What one machine can run, and how fast: "I have two 4090s and 256 GB of RAM".

Of a mixture of experts a token uses little, so a model may be far larger than the fast memory. What every token
meets (attention, dense layers, shared experts, head, and the cache of latents) goes to the GPUs; routed experts fill
what is left there, then main memory, and what is beyond that is read from disk as it is needed, through the operating
system's cache. A token takes as long as each memory takes to give out what the token uses of it, one after the
other, since each layer waits for the one before; and each layer costs a fixed time for starting and handing over:

    seconds per token = bytes on GPUs / their bandwidth + bytes in RAM / its bandwidth + bytes on disk / its rate
                        + layers * overhead

Which of 256 experts a token chooses is as good as random here, so bytes are in proportion to where the experts lie.

A format is so many bits per weight, scales included, for three kinds of weights. Mixed ones ("UD", k-quants) are taken
from the sizes of published files of DeepSeek-V3 and R1, so for other models they are near, not exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.planner.assumptions import Assumption, listed
from dsv3.planner.hardware import Hardware
from dsv3.planner.serving import Matrices

PROMPT = 2048
"""Tokens of the prompt that is reckoned with."""
TOGETHER = "vLLM, SGLang"
"""Programs that split every layer over all GPUs; the others give each GPU whole layers, one after the other."""


@dataclass(frozen=True)
class Format:
    """A way to store weights; bits are per weight."""

    name: str
    experts: float
    """Bits of the routed experts."""
    layers: float
    """Bits of attention, dense layers and shared experts."""
    ends: float
    """Bits of embedding and head."""
    programs: tuple[str, ...]
    """What runs it today; see `_runs`."""


FORMATS = (
    Format("bf16", 16, 16, 16, ("dsv3", TOGETHER, "KTransformers", "SGLang on CPU", "llama.cpp")),
    Format("q8_0", 8.5, 8.5, 8.5, ("dsv3 int8", "llama.cpp", "KTransformers")),
    Format("fp8", 8.002, 8.002, 16, ("dsv3 fp8", TOGETHER, "KTransformers", "SGLang on CPU")),
    Format("int8", 8.01, 8.01, 16, (TOGETHER, "KTransformers", "SGLang on CPU")),
    Format("mixed", 4.5, 8.5, 12.25, ("dsv3 mixed",)),
    Format("q4_k_m", 4.82, 4.78, 5.53, ("llama.cpp", "KTransformers")),
    Format("int4", 4.25, 4.25, 16, (TOGETHER, "KTransformers")),
    Format("q3_k_xl", 3.476, 5.5, 5.5, ("llama.cpp",)),
    Format("q2_k_xl", 2.941, 5.0, 5.0, ("llama.cpp",)),
    Format("iq2_xxs", 2.27, 5.0, 5.0, ("llama.cpp",)),
    Format("iq1_s", 1.585, 5.0, 5.0, ("llama.cpp",)),
)


@dataclass(frozen=True)
class Assumptions:
    """What is assumed of programs; `SOURCES` says why."""

    ram_share: float = 0.57
    """Share of main memory's bandwidth that expert kernels reach."""
    gpu_share: float = 0.7
    """Share of a GPU's bandwidth that products of one token reach."""
    disk: float = 3e9
    """Bytes per second that mapped files give."""
    pcie: float = 2.5e10
    """Bytes per second from main memory to a GPU."""
    overhead: float = 5e-4
    """Seconds per layer where a CPU takes part."""
    overhead_gpu: float = 1.5e-4
    """Seconds per layer where only GPUs do."""
    cpu_compute: float = 0.3
    """Share of the CPU's peak that reading prompts reaches."""
    gpu_compute: float = 0.5
    """Share of the GPU's bf16 peak that reading prompts reaches."""
    gpu_reserve: float = 0.1
    """Share of a GPU's memory for buffers and activations."""
    ram_reserve: float = 0.05
    """Share of main memory for everybody else."""


SOURCES = {
    "ram_share": "KTransformers' R1 q4_k_m on one and two Xeon 6454S: two experts more cost 8.7 ms of 307 GB/s, "
    "4.5 ms of 614 GB/s",
    "gpu_share": "DeepGEMM's table: 1,509-2,604 of 3,350 GB/s for few tokens",
    "disk": "half of what an NVMe drive on PCIe 4 reads in sequence; not measured",
    "pcie": "PCIe 4 x16 gives 32 GB/s less its protocol; not measured",
    "overhead": "what is left of KTransformers' time per token when experts and the GPU's bytes are taken off: "
    "0.3 to 0.6 ms",
    "overhead_gpu": "ours: a dozen launches and two reductions",
    "cpu_compute": "KTransformers' AMX kernels: 21 TFLOP/s bf16 of 65 on a 32-core Xeon",
    "gpu_compute": "ours",
    "gpu_reserve": "ours",
    "ram_reserve": "ours",
}
UNITS = {"disk": "bytes/s", "pcie": "bytes/s", "overhead": "s", "overhead_gpu": "s"}


def assumptions(assumed: Assumptions | None = None) -> tuple[Assumption, ...]:
    """What is assumed, with its sources."""
    return listed(assumed or Assumptions(), SOURCES, UNITS)


@dataclass(frozen=True)
class Machine:
    """One computer."""

    gpu: Hardware | None
    gpus: int
    ram: float
    """Bytes."""
    ram_bandwidth: float
    """Bytes per second, the data sheet's."""
    cpu_flops: float
    """bf16, the data sheet's."""

    def __post_init__(self) -> None:
        if self.gpus < 0 or (self.gpus and self.gpu is None):
            raise UserError(f"gpus is {self.gpus}: name their kind, or give 0")
        if self.ram <= 0 or self.ram_bandwidth <= 0 or self.cpu_flops <= 0:
            raise UserError("RAM, its bandwidth and the CPU's rate must be above 0")


@dataclass(frozen=True)
class Option:
    """A model in one format on one machine. Bytes are bytes."""

    format: str
    size: float
    on_gpu: float
    in_ram: float
    on_disk: float
    context: int
    """Tokens whose latents fit beside that; 0 where the model cannot run at all."""
    tokens_per_second: float
    """Of one answer with 2,048 tokens behind it."""
    prompt_tokens_per_second: float
    """At most, in a prompt of 2,048 tokens."""
    programs: tuple[str, ...]
    """That can do this, as their documents say."""

    @property
    def runs(self) -> bool:
        """Whether all of it lies in fast memory, and a program runs it."""
        return self.context > 0 and not self.on_disk and bool(self.programs)


def fit(
    config: ModelConfig, machine: Machine, context: int = 32768, assumed: Assumptions | None = None
) -> list[Option]:
    """Every format, the largest first: where its parts go on a machine, and what comes of it.

    context: tokens to make room for; less where that does not fit, and never more than the model knows.
    """
    assumed = assumed or Assumptions()
    options = [_option(config, machine, kind, context, assumed) for kind in FORMATS]
    return sorted(options, key=lambda option: -option.size)


def best(options: Sequence[Option]) -> Option | None:
    """The largest format that a program runs from fast memory alone."""
    return next((option for option in options if option.runs), None)


@dataclass(frozen=True)
class _Weights:
    """Bytes of a model in one format: all of them, and what one token reads."""

    experts: float
    chosen: float
    rest: float
    """Attention, dense layers, shared experts and head: every token reads them."""
    embedding: float

    @classmethod
    def of(cls, config: ModelConfig, kind: Format) -> _Weights:
        model = Matrices(config, 0)
        routed = model.moe_layers * sum(m.numel for m in model.expert)
        attention = sum(m.numel for m in model.attention(absorbed=False))
        dense = sum(m.numel for m in model.feed_forward(config.intermediate_size))
        shared = sum(m.numel for m in model.shared)
        layers = len(model.layers) * attention + model.dense_layers * dense + model.moe_layers * shared
        head = model.head.numel * kind.ends / 8
        return cls(
            experts=routed * (config.n_routed_experts or 0) * kind.experts / 8,
            chosen=routed * config.num_experts_per_tok * kind.experts / 8 if config.n_routed_experts else 0.0,
            rest=layers * kind.layers / 8 + head,
            embedding=0.0 if config.tie_word_embeddings else head,
        )

    @property
    def size(self) -> float:
        return self.experts + self.rest + self.embedding


@dataclass(frozen=True)
class _Places:
    """Where things are, as shares."""

    rest: float
    """Of what every token reads, and of the cache, the share on GPUs; the rest of it is in RAM."""
    gpu: float
    ram: float
    disk: float
    """Of the routed experts."""
    together: int
    """GPUs that each hold a part of every layer, and read at once."""


def _option(
    config: ModelConfig, machine: Machine, kind: Format, context: int, assumed: Assumptions
) -> Option:
    weights = _Weights.of(config, kind)
    per_token = config.num_hidden_layers * config.latent_dim * 2
    one_gpu = 0.0 if machine.gpu is None else machine.gpu.memory * (1 - assumed.gpu_reserve)
    gpu_room = machine.gpus * one_gpu
    ram_room = machine.ram * (1 - assumed.ram_reserve)
    context = min(context, config.max_position_embeddings)
    always = weights.rest + weights.embedding
    while context > 512 and always + context * per_token > gpu_room + ram_room:
        context //= 2
    every = weights.rest + context * per_token
    # Whole layers go to the GPUs with their latents, as many as there is room for; the others stay in RAM.
    share = min(1.0, gpu_room / every)
    on_gpu = min(weights.experts, gpu_room - share * every)
    ram_room -= (1 - share) * every + weights.embedding
    if ram_room < 0:
        return Option(kind.name, weights.size, 0.0, 0.0, 0.0, 0, 0.0, 0.0, ())
    in_ram = min(weights.experts - on_gpu, ram_room)
    on_disk = weights.experts - on_gpu - in_ram
    whole = share == 1 and on_gpu == weights.experts
    fits_one = weights.size + context * per_token <= one_gpu
    alone = fits_one if machine.gpus else not on_disk
    programs = _runs(kind, machine, share == 1, whole, alone, bool(on_disk))
    together = machine.gpus if TOGETHER in programs else 1
    all_of_it = weights.experts or 1.0
    places = _Places(share, on_gpu / all_of_it, in_ram / all_of_it, on_disk / all_of_it, together)
    at_gpu = share * weights.rest + on_gpu + (weights.embedding if whole else 0.0)
    return Option(
        format=kind.name,
        size=weights.size,
        on_gpu=at_gpu,
        in_ram=weights.size - at_gpu - on_disk,
        on_disk=on_disk,
        context=context,
        tokens_per_second=1 / _seconds(config, machine, weights, places, assumed),
        prompt_tokens_per_second=PROMPT / _prompt_seconds(config, machine, weights, places, assumed),
        programs=programs,
    )


def _seconds(
    config: ModelConfig, machine: Machine, weights: _Weights, places: _Places, assumed: Assumptions
) -> float:
    """Of one token that has a prompt behind it."""
    every = weights.rest + PROMPT * config.num_hidden_layers * config.latent_dim * 2
    gpu = 0.0
    if machine.gpu is not None:
        read = places.rest * every + places.gpu * weights.chosen
        gpu = read / (machine.gpu.bandwidth * assumed.gpu_share) / places.together
    read = (1 - places.rest) * every + places.ram * weights.chosen
    ram = read / (machine.ram_bandwidth * assumed.ram_share)
    disk = places.disk * weights.chosen / assumed.disk
    overhead = assumed.overhead if ram or disk else assumed.overhead_gpu
    return gpu + ram + disk + config.num_hidden_layers * overhead


def _prompt_seconds(
    config: ModelConfig, machine: Machine, weights: _Weights, places: _Places, assumed: Assumptions
) -> float:
    """Of a whole prompt: everything is read once, and multiplied by every token that meets it.

    What lies in RAM is multiplied by the CPU, or copied to a GPU and multiplied there, whichever is quicker.
    """
    model = Matrices(config, 0)
    experts = 2 * model.moe_layers * config.num_experts_per_tok * sum(m.numel for m in model.expert)
    rest = 2 * model.active - experts
    on_gpu = PROMPT * (places.rest * rest + places.gpu * experts)
    on_cpu = PROMPT * (rest + experts) - on_gpu
    read = (1 - places.rest) * weights.rest + (places.ram + places.disk) * weights.experts
    disk = places.disk * weights.experts / assumed.disk
    by_cpu = on_cpu / (machine.cpu_flops * assumed.cpu_compute)
    by_cpu += read / (machine.ram_bandwidth * assumed.ram_share)
    if machine.gpu is None:
        return by_cpu + disk
    rate = machine.gpu.bf16_flops * assumed.gpu_compute
    return on_gpu / rate / places.together + min(by_cpu, on_cpu / rate + read / assumed.pcie) + disk


def _runs(
    kind: Format, machine: Machine, rest: bool, whole: bool, alone: bool, disk: bool
) -> tuple[str, ...]:
    """The format's programs that can lay it out so.

    rest: all but the experts is on GPUs; whole: everything is; alone: one GPU, or main memory, holds everything.
    """
    packed = not machine.gpus  # and with --memory whatever main memory does not hold
    able = {
        "dsv3": alone,
        "dsv3 int8": packed,
        "dsv3 fp8": packed,
        "dsv3 mixed": packed,
        TOGETHER: whole,
        "KTransformers": rest and not whole and not disk,
        "SGLang on CPU": not machine.gpus and not disk,
        "llama.cpp": True,
    }
    return tuple(program for program in kind.programs if able[program])
