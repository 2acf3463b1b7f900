"""How fast a model runs here, and how fast it could.

A step must read every weight that a token of it needs, and the cache, from memory; and it must multiply. Neither goes
faster than the machine does it with nothing else to do, so the larger of (bytes / read bandwidth) and (operations /
rate of products) is a floor under its time: the roofline. What is measured goes through the engine as users get it,
with scheduling, sampling and stop checks; the two ceilings are measured beside it, on the same threads.

What a step reads: all weights but the embedding, of which it looks up rows, and of the routed experts as many as so
many tokens are expected to choose between them, if all are equally likely: E (1 - (1 - k / E)^tokens) of E.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from dsv3.engine.engine import Engine
from dsv3.engine.sampling import SamplingParams
from dsv3.errors import UserError
from dsv3.kernels.inference import linear
from dsv3.kernels.packed import Packed, pack
from dsv3.model import Transformer
from dsv3.model.layers import PackedLinear
from dsv3.model.moe import MoE

_WARM_UP = 3  # steps that are not counted


@dataclass(frozen=True)
class Ceilings:
    """What the machine does with nothing else to do."""

    bandwidth: float
    """Bytes read from memory a second."""
    products: float
    """Operations a second (a multiplication and an addition are two) of the best product of large bf16 matrices."""
    byte_products: float
    """The same of integer weights, where they are multiplied as such; else that of bf16."""


@dataclass(frozen=True)
class Work:
    """One measurement: tokens a second, and what the machine would allow."""

    name: str
    """ "prefill" or "decode"."""
    depth: int
    """Tokens of each sequence in the cache before; for prefill, the prompt's."""
    batch: int
    tokens_per_second: float
    """The median."""
    spread: float
    """Half of what lies between the slowest and the fastest, relative to the median."""
    bytes_per_second: float
    ops_per_second: float
    roofline: float
    """Tokens a second at which one of the ceilings is reached."""

    @property
    def share(self) -> float:
        return self.tokens_per_second / self.roofline


def measure_ceilings(device: torch.device, size: int = 2**29) -> Ceilings:
    """size: bytes read to measure the bandwidth, several times what caches hold."""
    data = torch.ones(size // 8, dtype=torch.int64, device=device)
    bandwidth = data.nbytes / _best(data.sum, device)
    n = 1024 if device.type == "cpu" else 8192
    x, w = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    ops = 2.0 * n**3
    with torch.inference_mode():
        products = ops / min(_best(partial(torch.mm, x, w), device), _best(partial(linear, x, w), device))
        rate = products
        if device.type == "cpu":
            codes = pack(torch.randint(0, 256, (n, n), dtype=torch.uint8), 8)
            integers = Packed("int8", codes, torch.ones(n // 16, n // 128, 16, dtype=torch.float16))
            rate = max(rate, ops / _best(partial(linear, x, integers), device))
    return Ceilings(bandwidth, products, rate)


def _best(run: Callable[[], object], device: torch.device, times: int = 5) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@dataclass(frozen=True)
class _Cost:
    """What steps of a model read and multiply."""

    fixed: int
    """Bytes of weights that every step reads."""
    routed: int
    """Bytes of all routed experts."""
    experts: int
    chosen: int
    active: int
    """Weights that a token is multiplied by."""
    token: int
    """Bytes of a token in the cache."""
    pair: int
    """Multiplications for a token that looks at another, in all layers."""
    integers: bool
    """Whether most weights are integers."""

    def bytes(self, tokens: int, context: int) -> float:
        touched = 1 - (1 - self.chosen / self.experts) ** tokens if self.experts else 0.0
        return self.fixed + self.routed * touched + self.token * context

    def ops(self, tokens: int, pairs: int) -> float:
        return 2.0 * (self.active * tokens + self.pair * pairs)


def _cost(model: Transformer) -> _Cost:
    config = model.config
    sizes = {True: [0, 0], False: [0, 0]}  # routed or not: bytes, weights
    integers = 0
    parts: list[nn.Module] = [*model.layers, model.norm, model.lm_head]
    for top in parts:
        experts = {id(m) for moe in top.modules() if isinstance(moe, MoE) for m in moe.experts.modules()}
        for module in top.modules():
            held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            count = sum(t.numel() for t in module.parameters(recurse=False))
            if isinstance(module, PackedLinear):
                count = module.packed.shape.numel()
                integers += count * (module.kind != "fp8")
            sizes[id(module) in experts][0] += sum(t.nbytes for t in held)
            sizes[id(module) in experts][1] += count
    (routed, routed_count), (fixed, fixed_count) = sizes[True], sizes[False]
    n, k = config.n_routed_experts or 0, config.num_experts_per_tok if config.n_routed_experts else 0
    absorbed = config.latent_dim + config.kv_lora_rank
    return _Cost(
        fixed=fixed,
        routed=routed,
        experts=n,
        chosen=k,
        active=fixed_count + (routed_count * k // n if n else 0),
        token=config.latent_dim * model.embed_tokens.weight.element_size() * config.num_hidden_layers,
        pair=config.num_attention_heads * absorbed * config.num_hidden_layers,
        integers=2 * integers > fixed_count + routed_count,
    )


def bench(
    model: Transformer,
    ceilings: Ceilings,
    prompt: int = 512,
    depths: Sequence[int] = (0, 1024, 4096),
    batches: Sequence[int] = (1, 8),
    tokens: int = 32,
    repeats: int = 3,
) -> Iterator[Work]:
    """Prefill of a prompt, then decoding of `batches` sequences at once behind contexts of `depths` tokens.

    Prompts are random; decoding gives the median of `tokens` steps, prefill of `repeats` prompts. Raises UserError,
    before anything is measured, for work that the model's context or the memory has no room for.
    """
    longest = max([prompt, *(depth + tokens + _WARM_UP + 1 for depth in depths)])
    if longest > model.config.max_position_embeddings:
        raise UserError(
            f"{longest} tokens are asked for (the deepest of depths and what is decoded after it, or prompt), but the "
            f"model's context is {model.config.max_position_embeddings}: lower --depths or --prompt"
        )
    cost, generator = _cost(model), torch.Generator().manual_seed(0)
    device = model.embed_tokens.weight.device

    def begin(batch: int, length: int) -> tuple[Engine, float]:
        engine = Engine(model, max_num_seqs=batch, speculation="off", prefix_caching=False)
        params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
        vocab = model.config.vocab_size
        sequences = [
            engine.sequence(torch.randint(vocab, (length,), generator=generator).tolist(), params)
            for _ in range(batch)
        ]
        for sequence in sequences:
            engine.add(sequence)
        start = time.perf_counter()
        while not all(sequence.output_ids for sequence in sequences):
            engine.step()
        _wait(device)
        return engine, time.perf_counter() - start

    def work(
        name: str, depth: int, batch: int, seconds: list[float], new: int, context: int, pairs: int
    ) -> Work:
        median = statistics.median(seconds)
        read, ops = cost.bytes(new, context), cost.ops(new, pairs)
        rate = ceilings.byte_products if cost.integers else ceilings.products
        floor = max(read / ceilings.bandwidth, ops / rate)
        spread = (max(seconds) - min(seconds)) / 2 / median
        return Work(name, depth, batch, new / median, spread, read / median, ops / median, new / floor)

    if prompt:
        seconds = [begin(1, prompt)[1] for _ in range(1 + repeats)][1:]
        yield work("prefill", prompt, 1, seconds, prompt, prompt, prompt * (prompt + 1) // 2)
    for depth in depths:
        for batch in batches:
            engine, _ = begin(batch, max(depth, 1))
            seconds = []
            for _ in range(_WARM_UP + tokens):
                start = time.perf_counter()
                engine.step()
                _wait(device)
                seconds.append(time.perf_counter() - start)
            context = batch * (max(depth, 1) + _WARM_UP + tokens // 2)
            yield work("decode", depth, batch, seconds[_WARM_UP:], batch, context, context)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory() -> int:
    """Bytes that the process has held at most in main memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
