"""How long one layer takes on one accelerator, from what its kernels compute and move.

Every kernel is one of five kinds:

- a *matrix product* takes the time of its arithmetic, or of reading its operands if that is longer, and after it
  the time of writing the result, which block-scaled kernels of one tile per block do not overlap with computing. The
  gradient of a weight is added to float32 numbers in memory, which are read and written for each microbatch; FP8's
  kernels do that themselves, torch's write the gradient in the weight's dtype, and it is read to be added.
- *routed experts* are products of few rows, the fewer the more experts there are: the same arithmetic, but weights
  of all experts that any token chose are read, and gradients of all that are held are added up, chosen or not. A GPU
  multiplies for all experts in one launch; elsewhere each expert's product is a call of its own, which takes its time.
- *attention itself* takes the time of its arithmetic, at a rate that grows with the length of the rows.
- what lies between (norms, casts to FP8 and transposes of what was cast, rotation, SwiGLU, moving rows to experts and
  adding them up again) takes the time of the bytes that it reads and writes. They are counted here tensor by tensor.
- *dispatch and combine* take the time of their bytes on the slower of two links: across nodes, where a token goes once
  to each node with an expert of its, and within them.

FP8 products are those of the report's figure 6: all matrices of attention and experts, in the forward pass and in both
halves of the backward pass; head, gates and `eh_proj` are in bf16. Rates are shares of the data sheet's, listed in
`Assumptions` with their sources. None of these numbers is made from the cost of a whole training.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.planner.assumptions import check_shares
from dsv3.planner.hardware import Hardware
from dsv3.planner.model import Stage, attention_flops
from dsv3.recipe.layout import Layout


@dataclass(frozen=True)
class Assumptions:
    """What is assumed of kernels, networks and routing; `SOURCES` says why."""

    products_fp8: float = 0.58
    """Share of the FP8 peak that block-scaled products reach between reading and writing."""
    products_bf16: float = 0.70
    """Share of the bf16 peak that products reach."""
    memory: float = 0.78
    """Share of the memory bandwidth that products reach where they read and write."""
    attention_forward: float = 0.64
    """Share of the bf16 peak that attention reaches in long rows, forward."""
    attention_backward: float = 0.58
    """The same backward, where five products are done for the forward pass's two."""
    attention_length: float = 360.0
    """Length of rows at which attention reaches half of that."""
    elementwise: float = 0.51
    """Share of the memory bandwidth that kernels between products reach."""
    kernels: float = 56.0
    """Kernels of a layer and pass too small for that."""
    kernel: float = 4.8e-6
    """Seconds that each of them takes."""
    call: float = 11e-6
    """Seconds that an expert's product takes beside its arithmetic and bytes, where it is a call of its own."""
    gradient_passes: float = 2.0
    """How often a microbatch's gradient of a weight is written or read in the products' dtype before it is in the
    float32 sum; never in FP8, whose kernels add to that themselves."""
    stacked_passes: float = 2.0
    """How often it is besides, for experts whose products are calls of their own."""
    network: float = 0.87
    """Share of the network's bandwidth that dispatch, combine and collectives reach."""
    nvlink: float = 0.77
    """Share of the bandwidth within a node that they reach."""
    multiprocessors: float = 20 / 132
    """Share of the multiprocessors that move tokens, and do not compute, where both go on at once."""
    hidden: float = 0.91
    """Share of dispatch and combine that is hidden where another microbatch computes meanwhile."""
    balance: float = 0.85
    """Mean over largest load of the devices of an expert group; 1 for forced balance."""
    buffers: float = 0.06
    """Share of the memory for communication buffers, workspaces and fragmentation."""

    def __post_init__(self) -> None:
        check_shares(self, UNITS)
        if min(self.products_fp8, self.products_bf16, self.memory, self.elementwise, self.balance) == 0:
            raise UserError("shares that products, kernels and balance reach must be above 0")


_TRACE = "DeepSeek's trace of 4 layers of V3's training (profile-data, train.json): "
UNITS = {
    "attention_length": "tokens",
    "kernels": "per layer and pass",
    "kernel": "s",
    "call": "s",
    "gradient_passes": "times",
    "stacked_passes": "times",
}
SOURCES = {
    "products_fp8": "DeepGEMM's first table (Feb 2025, H800, 4,096 rows and 4 x 8,192) over its speed-up over the kernels "
    "before it, which V3 was trained with: 1,060 to 1,270 of 1,979 TFLOP/s once writing is taken off",
    "products_bf16": "ours: cuBLAS on a H100 at its power limit, 600 to 750 of 989 TFLOP/s; in V3 only head and gates",
    "memory": "DeepGEMM's first table: up to 2,604 of 3,350 GB/s",
    "attention_forward": "FlashAttention-3 on H100 (figure in its repository), causal, head size 128: 579 TFLOP/s at 4K, "
    "616 at 16K of 989",
    "attention_backward": _TRACE
    + "452 TFLOP/s at 4K, five products, causal half, on 112 of 132 multiprocessors",
    "attention_length": "FlashAttention-3, as above: 521, 579, 602, 616 TFLOP/s at 2K, 4K, 8K, 16K",
    "elementwise": _TRACE + "8.1 ms per layer, for 13.8 GB as counted here",
    "kernels": _TRACE + "112 kernels of less than 15 us per layer, forward and backward",
    "kernel": _TRACE + "0.54 ms for these 112",
    "call": "docs/log.md: a bf16 product of one row in oneDNN, however small, on a core of an AMD EPYC; CPUs only",
    "gradient_passes": "counted in dsv3.train.optimizer: the product writes it, `accumulate` reads it; DeepGEMM's weight "
    "gradients, which FP8 runs are taken to have, are added to float32 by the product",
    "stacked_passes": "counted in dsv3.kernels.moe: gradients made one by one are read and written into one tensor",
    "network": "DeepEP's table for H800: 58 GB/s over 4 nodes, 51 over 8, counting what stays; of 50 that is 43 to 45",
    "nvlink": "DeepEP's table: 153 of 200 GB/s within a node of H800",
    "multiprocessors": "report, section 3.2.2: 20 of 132",
    "hidden": _TRACE + "1.1 ms per layer without computing, of 12.8 ms that DeepEP's rates give for travel",
    "balance": "SGLang on 32 H100: 50,302 tokens/s with real routing, 59,337 with even routing",
    "buffers": "ours",
}


@dataclass(frozen=True)
class Work:
    """One microbatch in one stage, in seconds by part."""

    forward: dict[str, float]
    input: dict[str, float]
    """The backward pass's half for the gradients of inputs."""
    weight: dict[str, float]
    """Its half for the gradients of weights."""
    travel: tuple[float, float]
    """Of what goes over links meanwhile, forward and backward."""

    @property
    def computing(self) -> float:
        return sum(sum(times.values()) for times in (self.forward, self.input, self.weight))


@dataclass(frozen=True)
class Roofline:
    """The time of stages on one kind of accelerator in one layout."""

    config: ModelConfig
    hardware: Hardware
    layout: Layout
    assumed: Assumptions
    seq: int
    """Tokens of a row."""
    microbatch: int
    """Rows of a microbatch."""
    precision: str
    recompute: bool
    shared: bool = False
    """Whether some multiprocessors move tokens meanwhile."""

    @property
    def tokens(self) -> float:
        """Of a microbatch, on one device."""
        return self.microbatch * self.seq / self.layout.context

    @property
    def _computing(self) -> float:
        """Share of the multiprocessors that compute."""
        return 1 - self.assumed.multiprocessors if self.shared else 1.0

    @property
    def fp8(self) -> bool:
        """Whether the layers' products are in FP8, which takes hardware that has it."""
        return self.precision == "fp8" and self.hardware.fp8_flops > 0

    @property
    def number(self) -> int:
        """Bytes of a number that the layers' products read."""
        return 1 if self.fp8 else 4 if self.precision == "fp32" else 2

    # Stages and layers ------------------------------------------------------------------------------------

    def work(self, stage: Stage) -> Work:
        """All layers of a stage, and the ends of the model where it has them."""
        times: tuple[dict[str, float], ...] = tuple(defaultdict(float) for _ in range(3))
        there = back = 0.0
        for index in stage.layers:
            moe = self.config.is_moe_layer(index)
            for total, layer in zip(times, self._moe if moe else self._dense, strict=True):
                for part, seconds in layer.items():
                    total[part] += seconds
            there += self._travel * moe + self._gathering
            # Gradients of latents are summed; where attention is done again, latents are gathered again.
            back += self._travel * moe + self._gathering * (1 + self.recompute)
        heads = (1 + stage.modules) * stage.last
        if heads:
            for total, seconds in zip(times, self._head, strict=True):
                total["head"] += heads * seconds
        for _ in range(stage.modules):
            joined = self._product(
                self.tokens, 2 * self.config.hidden_size, self.config.hidden_size, wide=True
            )
            for total, seconds in zip(times, joined, strict=True):
                total["MTP's junction"] += seconds
        return Work(dict(times[0]), dict(times[1]), dict(times[2]), (there, back))

    @cached_property
    def _moe(self) -> tuple[dict[str, float], ...]:
        return self._layer(moe=True)

    @cached_property
    def _dense(self) -> tuple[dict[str, float], ...]:
        return self._layer(moe=False)

    def _layer(self, moe: bool) -> tuple[dict[str, float], ...]:
        c, tokens, product = self.config, self.tokens, self._product
        heads, hidden = c.num_attention_heads, c.hidden_size
        up = self._expansions()
        projections = [*self._down(), *up, product(tokens, heads * c.v_head_dim, hidden)]
        width = c.moe_intermediate_size * (c.n_shared_experts or 0) if moe else c.intermediate_size
        dense = [product(tokens, hidden, 2 * width), product(tokens, width, hidden)] if width else []
        routed = []
        if moe:
            m = c.moe_intermediate_size
            routed = [self._routed(hidden, 2 * m), self._routed(m, hidden)]
            dense.append(product(tokens, hidden, c.n_routed_experts or 0, wide=True))
        core = tokens * attention_flops(c, self.seq) / (self.hardware.bf16_flops * self._computing)
        core *= 1 + self.assumed.attention_length / self.seq  # a share of max * seq / (seq + length)
        moved = [n / (self.hardware.bandwidth * self.assumed.elementwise) for n in self._moved(width, moe)]
        # Where experts are called one by one, so is SwiGLU between their two products.
        small = (self.assumed.kernels + (self._calls if moe else 0.0)) * self.assumed.kernel
        passes: tuple[dict[str, float], ...] = ({}, {}, {})
        for i, times in enumerate(passes):
            times["attention projections"] = sum(each[i] for each in projections)
            times["attention core"] = 0.0
            if routed:
                times["routed experts"] = sum(each[i] for each in routed)
            times["shared experts, dense"] = sum(each[i] for each in dense)
            times["between products"] = moved[i]
        forward, inputs, weights = passes
        forward["attention core"] = core / self.assumed.attention_forward
        inputs["attention core"] = 2.5 * core / self.assumed.attention_backward
        for times in (forward, inputs):
            times["small kernels"] = small
        if self.recompute:
            inputs["recomputation"] = sum(each[0] for each in up)
        del weights["attention core"]
        return passes

    def _down(self) -> list[tuple[float, float, float]]:
        """Attention's projections of a token's hidden vector."""
        c = self.config
        if c.q_lora_rank is None:
            queries = c.num_attention_heads * c.qk_head_dim
            return [self._product(self.tokens, c.hidden_size, queries + c.latent_dim)]
        return [self._product(self.tokens, c.hidden_size, c.q_lora_rank + c.latent_dim)]

    def _expansions(self) -> list[tuple[float, float, float]]:
        """Its up-projections. Each process makes keys and values of the latents of whole rows."""
        c, heads = self.config, self.config.num_attention_heads
        made = heads * (c.qk_nope_head_dim + c.v_head_dim)
        products = [self._product(self.tokens * self.layout.context, c.kv_lora_rank, made)]
        if c.q_lora_rank is not None:
            products.append(self._product(self.tokens, c.q_lora_rank, heads * c.qk_head_dim))
        return products

    def _routed(self, inputs: int, outputs: int) -> tuple[float, float, float]:
        """One of the routed experts' products, on the busiest device of a group."""
        c, spread = self.config, self.layout.expert > 1
        held = (c.n_routed_experts or 0) / self.layout.expert
        rows = self.tokens * c.num_experts_per_tok / (self.assumed.balance if spread else 1.0)
        calling = self._calls * self.assumed.call
        forward, inward, weight = self._product(rows, inputs, outputs, held, self._chosen)
        if not self.hardware.grouped and not self.fp8:
            numbers = held * inputs * outputs * self.assumed.stacked_passes
            weight += numbers * self.number / (self.hardware.bandwidth * self.assumed.memory)
        return forward + calling, inward + calling, weight + calling

    @property
    def _chosen(self) -> float:
        """Routed experts of a device that at least one token of a microbatch chose, on average, if choices are even."""
        c, layout = self.config, self.layout
        experts = c.n_routed_experts or 1
        missed: float = (1 - c.num_experts_per_tok / experts) ** (self.tokens * layout.expert)
        return experts / layout.expert * (1 - missed)

    @property
    def _calls(self) -> float:
        """Calls that make up a product of routed experts, each with its own cost; a grouped kernel has none."""
        return 0.0 if self.hardware.grouped else self._chosen

    @cached_property
    def _head(self) -> tuple[float, ...]:
        """Logits and loss."""
        c = self.config
        products = self._product(self.tokens, c.hidden_size, c.vocab_size, wide=True)
        loss = self.tokens * c.vocab_size * 4 / (self.hardware.bandwidth * self.assumed.elementwise)
        return products[0] + loss, products[1], products[2]

    # Kernels ----------------------------------------------------------------------------------------------

    def _product(
        self,
        rows: float,
        inputs: float,
        outputs: float,
        sets: float = 1,
        met: float | None = None,
        wide: bool = False,
    ) -> tuple[float, float, float]:
        """Seconds of rows [rows, inputs] through `sets` matrices [outputs, inputs]: forward, and both gradients.

        met: how many of the matrices have any rows, all by default; only these are read.
        """
        assumed, hardware = self.assumed, self.hardware
        fp8 = self.fp8 and not wide
        share = assumed.products_fp8 if fp8 else assumed.products_bf16
        rate = share * self._computing * hardware.flops("bf16" if wide else self.precision)
        bandwidth = hardware.bandwidth * assumed.memory
        number = 2 if wide else self.number
        held = sets * inputs * outputs
        read = held if met is None else met * inputs * outputs
        added = 8 + (0 if self.fp8 else assumed.gradient_passes * number)  # bytes of each weight's gradient

        def loop(operands: float) -> float:
            return max(2 * rows * inputs * outputs / rate, operands * number / bandwidth)

        return (
            loop(rows * inputs + read) + 2 * rows * outputs / bandwidth,
            loop(rows * outputs + read) + 2 * rows * inputs / bandwidth,
            loop(rows * (inputs + outputs)) + added * held / bandwidth,
        )

    def _moved(self, width: int, moe: bool) -> tuple[float, float, float]:
        """Bytes that kernels between products read and write for a microbatch in one layer: forward, gradients of
        inputs, gradients of weights. width: of the dense feed-forward, or of the shared experts together."""
        c, heads = self.config, self.config.num_attention_heads
        h, m, latent = c.hidden_size, c.moe_intermediate_size, c.kv_lora_rank
        latents = (c.q_lora_rank or 0) + c.latent_dim
        queries, out = heads * c.qk_head_dim, heads * c.v_head_dim
        made = heads * (c.qk_nope_head_dim + c.v_head_dim)
        # Bytes per number: cast from bf16; tiles turned for the weights' gradients, of FP8 and of bf16; kept as E5M6.
        cast, turn, turn_wide, e5m6 = (3.0, 2.0, 3.0, 3.5) if self.fp8 else (0.0, 0.0, 0.0, 0.0)
        norms = 2 * 4 * h + 4 * latents + cast * (2 * h + latents)
        rotation = 4 * heads * c.qk_rope_head_dim
        assembly = 2 * made + 2 * (queries + out)  # keys and values out of the expansion and the rotary key
        forward = norms + rotation + (cast + e5m6) * out + 2 * 6 * h  # and two sums of the residual stream
        inputs = 2 * 8 * h + 2 * 4 * latents + rotation + cast * (queries + latents + h)
        inputs += 4 * out + 6 * queries  # attention's kernels before and after its gradient
        inputs += (norms + rotation) * self.recompute
        weights = turn * (latents + h) + turn_wide * (queries + latents + h) + (e5m6 - 1) * out * self.fp8
        # Of each token of whole rows: keys and values are made again, their gradients cast and turned.
        keys = assembly * (2 + self.recompute) + (cast + turn_wide) * made + turn * latent
        keys_forward, keys_weights = assembly, turn_wide * made + turn * latent
        forward += self.layout.context * keys_forward
        inputs += self.layout.context * (keys - keys_forward - keys_weights)
        weights += self.layout.context * keys_weights
        # Feed-forwards: SwiGLU, its input cast to be kept; backward it is done again.
        number = self.number
        activation = (4 + number) + cast * 2
        gradient = (2 + 2 * number + 4 + 2) + cast * 2
        turned = turn * h + turn_wide * 3 * m + turn * h
        forward += width * activation
        inputs += width * gradient
        weights += (turn * h + turn_wide * h) * (width > 0) + turn_wide * 3 * width
        if moe:
            rows = c.num_experts_per_tok / (self.assumed.balance if self.layout.expert > 1 else 1.0)
            reached = min(rows, visited(c, self.layout.expert)) if self.layout.expert > 1 else 1.0
            sent = 1 if self.layout.dispatch == "fp8" else 2
            spread = (sent + 2) * h * (rows + reached)  # out to the experts' rows, and summed again
            forward += spread + rows * m * activation
            inputs += spread + rows * m * gradient + cast * h
            weights += rows * turned
        return self.tokens * forward, self.tokens * inputs, self.tokens * weights

    # Links ------------------------------------------------------------------------------------------------

    def sent(self) -> dict[str, dict[str, float]]:
        """Bytes that a device sends for each of its tokens in one MoE layer, one way: dispatch and combine by link."""
        c, layout = self.config, self.layout
        if c.n_routed_experts is None or layout.expert == 1:
            return {}
        across = visited(c, layout.nodes) * (1 - 1 / layout.nodes)
        within = visited(c, layout.expert) * (1 - layout.nodes / layout.expert)
        there = c.hidden_size * (1 + 4 / 128 if layout.dispatch == "fp8" else 2)
        back = c.hidden_size * 2
        return {
            "dispatch": {"nvlink": within * there, "network": across * there},
            "combine": {"nvlink": within * back, "network": across * back},
        }

    def latents(self) -> dict[str, float]:
        """Bytes that a device receives for each of its tokens in one layer, so that they see all of their row."""
        context, per_node = self.layout.context, self.hardware.gpus_per_node
        if context == 1:
            return {}
        received = 2.0 * self.config.latent_dim
        inside = min(context, per_node)
        nodes = context / inside
        links = {"nvlink": received * (context - nodes), "network": received * (nodes - 1)}
        return {link: n for link, n in links.items() if n}

    def link(self, name: str) -> float:
        """Bytes per second that "nvlink" or "network" give."""
        if name == "nvlink":
            return self.hardware.nvlink * self.assumed.nvlink
        return self.hardware.network * self.assumed.network

    @cached_property
    def _travel(self) -> float:
        """Seconds of dispatch and combine of a microbatch in one layer, one way; both links work at once."""
        tokens = self.tokens / self.assumed.balance
        return sum(tokens * self._slower(by) for by in self.sent().values())

    @cached_property
    def _gathering(self) -> float:
        """Seconds of gathering a row's latents in one layer, one way."""
        return self.tokens * self._slower(self.latents())

    def _slower(self, sent: dict[str, float]) -> float:
        """Seconds of so many bytes by link, where both work at once."""
        return max((n / self.link(name) for name, n in sent.items()), default=0.0)


def visited(config: ModelConfig, parts: int) -> float:
    """How many of so many equal parts of the experts (devices, nodes) a token's choices lie in, on average.

    Choices are taken to be even over the experts of the groups that it may choose from.
    """
    experts, chosen = config.n_routed_experts or 1, config.num_experts_per_tok
    admitted = config.topk_group / config.n_group if config.limits_groups else 1.0
    within = experts * admitted  # experts that are chosen from
    reached = parts * admitted if parts >= config.n_group else min(parts, config.topk_group)
    each = within / reached
    none = math.prod(max(0.0, 1 - each / (within - i)) for i in range(chosen))
    return reached * (1 - none)
