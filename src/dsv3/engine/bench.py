"""How fast a model runs here, and how fast it could.

A step must read every weight that a token of it needs, and the cache, from memory; and it must multiply. Neither goes
faster than the machine does it with nothing else to do (`dsv3.engine.ceilings`), so the larger of (bytes / read bandwidth)
and (operations / rate of products) is a floor under its time: the roofline. What is measured goes through the engine as
users get it, with scheduling, sampling and stop checks.

What a step reads: all weights but the embedding, of which it looks up rows, in the bytes in which they are stored; of the
routed experts those that its tokens choose, which are counted in a step that is not timed. Tokens are drawn at temperature
1: a model without training draws all alike, as llama-bench has them, where greedy decoding would choose one again and again
and so the same experts. What a step multiplies: each token by the weights that it goes through, by the head only where a
token is to follow, and queries with keys and values in whichever form of attention is cheaper.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsv3.engine.ceilings import Ceilings
from dsv3.engine.engine import Engine, Speculation, drafts
from dsv3.engine.machine import fitting_tokens
from dsv3.engine.sampling import SamplingParams
from dsv3.engine.sequence import Sequence as Request
from dsv3.errors import UserError
from dsv3.kernels.inference import BLOCK
from dsv3.model import Transformer
from dsv3.model.layers import PackedLinear
from dsv3.model.moe import Gate, MoE

_WARM_UP = 3  # steps that are not counted
STEP = 2048
"""Tokens of prompts to a step of the engine, its own default."""


@dataclass(frozen=True)
class Cost:
    """What must be read and multiplied: bytes, and operations on bf16 weights and on integer ones."""

    read: float
    ops: float
    integer_ops: float

    def seconds(self, ceilings: Ceilings) -> float:
        """The floor under its time."""
        return max(self.reading(ceilings), self.multiplying(ceilings))

    def reading(self, ceilings: Ceilings) -> float:
        return self.read / ceilings.bandwidth

    def multiplying(self, ceilings: Ceilings) -> float:
        return self.ops / ceilings.products + self.integer_ops / ceilings.byte_products


@dataclass(frozen=True)
class Work:
    """One measurement."""

    name: str
    """ "prefill" or "decode"."""
    depth: int
    """Tokens of each sequence in the cache before; for prefill, the prompt's."""
    batch: int
    samples: list[float]
    """Tokens a second of each repetition."""
    tokens: int
    cost: Cost
    """Of so many tokens: the prompt's, or one more for each sequence without guesses."""

    @property
    def tokens_per_second(self) -> float:
        """The mean."""
        return statistics.mean(self.samples)

    @property
    def spread(self) -> float:
        """The standard deviation over the mean."""
        return statistics.stdev(self.samples) / self.tokens_per_second if len(self.samples) > 1 else 0.0

    def roofline(self, ceilings: Ceilings) -> float:
        """Tokens a second at which one of the ceilings is reached."""
        return self.tokens / self.cost.seconds(ceilings)

    def share(self, ceilings: Ceilings) -> float:
        return self.tokens_per_second / self.roofline(ceilings)

    def facts(self, ceilings: Ceilings) -> dict[str, Any]:
        """Everything, for JSON."""
        steps, cost = self.tokens_per_second / self.tokens, self.cost
        by = "memory" if cost.reading(ceilings) >= cost.multiplying(ceilings) else "arithmetic"
        return {
            "name": self.name,
            "depth": self.depth,
            "batch": self.batch,
            "tokens_per_second": self.tokens_per_second,
            "spread": self.spread,
            "samples": self.samples,
            "bytes_per_second": cost.read * steps,
            "ops_per_second": (cost.ops + cost.integer_ops) * steps,
            "roofline": self.roofline(ceilings),
            "share": self.share(ceilings),
            "bound_by": by,
        }


@dataclass(frozen=True)
class _Sizes:
    """What steps of a model read and multiply by. Numbers of weights: bf16 (or FP8, multiplied as such), integers."""

    fixed: int
    """Bytes of weights that every step reads."""
    routed: int
    """Bytes of all routed experts."""
    body: tuple[int, int]
    """Weights that a token goes through, of routed experts those of its own; without the head."""
    head: tuple[int, int]
    token: int
    """Bytes of a token in the cache."""
    absorbed: int
    """Multiplications for a token that looks at another, in all layers, over latents."""
    plain: int
    """The same over keys and values."""

    def cost(
        self, tokens: int, logits: int, context: int, pairs: int, touched: float, absorbed: bool
    ) -> Cost:
        """tokens: new ones; logits: how many of them have a successor drawn; context: tokens in the cache that they look
        at; pairs: who looks at whom; touched: the share of the routed experts that they choose between them."""
        ops, integer_ops = (
            2.0 * (body * tokens + head * logits) for body, head in zip(self.body, self.head, strict=True)
        )
        pair = self.absorbed if absorbed else min(self.absorbed, self.plain)
        read = self.fixed + self.routed * touched + self.token * context
        return Cost(read, ops + 2.0 * pair * pairs, integer_ops)


def sizes_of(model: Transformer) -> _Sizes:
    config = model.config
    layers = config.num_hidden_layers
    of_experts = {
        id(m) for moe in model.layers.modules() if isinstance(moe, MoE) for m in moe.experts.modules()
    }
    fixed = routed = 0
    body, head = [0, 0], [0, 0]
    n = config.n_routed_experts or 1
    for part in (*model.layers, model.norm, model.lm_head):
        for module in part.modules():
            held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            nbytes, kind = sum(t.nbytes for t in held), 0
            count = sum(t.numel() for t in module.parameters(recurse=False))
            if isinstance(module, PackedLinear):
                count += module.packed.shape.numel()
                kind = int(module.kind != "fp8")
            if id(module) in of_experts:
                routed += nbytes
                count = count * config.num_experts_per_tok // n
            else:
                fixed += nbytes
            (head if part is model.lm_head else body)[kind] += count
    return _Sizes(
        fixed=fixed,
        routed=routed,
        body=(body[0], body[1]),
        head=(head[0], head[1]),
        token=config.latent_dim * model.embed_tokens.weight.element_size() * layers,
        absorbed=config.num_attention_heads * (config.latent_dim + config.kv_lora_rank) * layers,
        plain=config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * layers,
    )


def bench(
    model: Transformer,
    prompt: int = 512,
    depths: Sequence[int] = (0, 1024, 4096),
    batches: Sequence[int] = (1, 8),
    tokens: int = 32,
    repeats: int = 3,
    speculation: Speculation = "off",
    reading_threads: int | None = None,
) -> Iterator[Work]:
    """Prefill of a prompt, then decoding of `batches` sequences at once behind contexts of `depths` tokens.

    Prompts are random. Prefill is timed `repeats` times, decoding for `repeats` times `tokens` steps in a row, so that the
    context grows by as many. speculation: guesses are what `Engine` makes of it; rooflines are those without.
    reading_threads: as in `Engine`. Raises UserError, before anything is measured, for work that the model's context or the
    memory has no room for.
    """
    return _Bench(model, tokens, repeats, speculation, reading_threads).all(prompt, depths, batches)


class _Bench:
    def __init__(
        self, model: Transformer, tokens: int, repeats: int, speculation: Speculation, threads: int | None
    ) -> None:
        self.model, self.tokens, self.repeats = model, tokens, repeats
        self.speculation, self.threads = speculation, threads
        self.guesses = drafts(speculation, model)
        self.sizes = sizes_of(model)
        self.generator = torch.Generator().manual_seed(0)
        self.device = model.embed_tokens.weight.device

    def all(self, prompt: int, depths: Sequence[int], batches: Sequence[int]) -> Iterator[Work]:
        most = self.model.config.max_position_embeddings
        longest = max([prompt + 1, *(max(depth, 1) + self._new(depth, max(batches)) for depth in depths)])
        if longest > most:
            raise UserError(
                f"{longest} tokens are asked for (the deepest of depths and what is decoded after it, or prompt), but "
                f"the model's context is {most}: lower --depths, --tokens or --prompt"
            )
        self._check_room(max(batches, default=1), longest)
        if prompt:
            yield self._prefill(prompt)
        for depth in depths:
            for batch in batches:
                yield self._decode(depth, batch)

    def _check_room(self, batch: int, longest: int) -> None:
        weight = self.model.embed_tokens.weight
        room = fitting_tokens(self.model.config, weight.dtype, weight.device, mtp=self.guesses > 0)
        wanted = batch * -(-(longest + 2 * self.guesses) // BLOCK) * BLOCK
        if room is not None and room < wanted:
            raise UserError(
                f"{batch} sequences of {longest} tokens take {wanted} of the cache, but memory has room for {room}: lower "
                "--batch, --depths or --tokens"
            )

    def _new(self, depth: int, batch: int) -> int:
        """Tokens that a sequence may have after its prompt, all guesses right; the first ones come while others still read."""
        reading = batch + -(-batch * max(depth, 1) // STEP)
        return (1 + reading + _WARM_UP + self.repeats * self.tokens + 1) * (1 + self.guesses)

    def _begin(self, batch: int, length: int, new: int) -> tuple[Engine, list[Request]]:
        engine = Engine(
            self.model,
            max_num_seqs=batch,
            max_batched_tokens=STEP,
            max_model_len=length + new,
            speculation=self.speculation,
            prefix_caching=False,
        )
        engine.reading_threads = self.threads
        params = SamplingParams(temperature=1.0, max_tokens=None, ignore_eos=True)
        shape = batch, length
        prompts = torch.randint(self.model.config.vocab_size, shape, generator=self.generator).tolist()
        requests = [engine.sequence(ids, params) for ids in prompts]
        for request in requests:
            engine.add(request)
        return engine, requests

    def _read(self, engine: Engine, requests: list[Request]) -> float:
        """Take the prompts through the model and draw a first token for each; the seconds that it took."""
        start = time.perf_counter()
        while not all(request.output_ids for request in requests):
            engine.step()
        self._wait()
        return time.perf_counter() - start

    def _prefill(self, prompt: int) -> Work:
        with _counting(self.model) as touched:  # which warms up as well
            self._read(*self._begin(1, prompt, 1))
        times = [self._read(*self._begin(1, prompt, 1)) for _ in range(1 + self.repeats)][1:]
        pairs = prompt * (prompt + 1) // 2
        cost = self.sizes.cost(prompt, 1, prompt, pairs, _mean(touched), absorbed=False)
        return Work("prefill", prompt, 1, [prompt / seconds for seconds in times], prompt, cost)

    def _decode(self, depth: int, batch: int) -> Work:
        engine, requests = self._begin(batch, max(depth, 1), self._new(depth, batch))
        self._read(engine, requests)
        for _ in range(_WARM_UP):
            engine.step()
        contexts, samples = [], []
        for _ in range(self.repeats):
            before = sum(len(request.output_ids) for request in requests)
            start = time.perf_counter()
            for _ in range(self.tokens):
                engine.step()
            self._wait()
            seconds = time.perf_counter() - start
            after = sum(len(request.output_ids) for request in requests)
            samples.append((after - before) / seconds)
            contexts.append(max(depth, 1) * batch + (before + after) // 2)
        with _counting(self.model) as touched:
            engine.runner.look_again()
            engine.step()
        if any(request.finished for request in requests):
            raise AssertionError("a sequence came to its end while it was measured")
        context = round(statistics.mean(contexts))
        cost = self.sizes.cost(batch, batch, context, context, _mean(touched), absorbed=True)
        return Work("decode", depth, batch, samples, batch, cost)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def _counting(model: Transformer) -> Iterator[list[float]]:
    """Have the gates of all layers say which share of their experts was chosen, a number for each step and layer.

    Layers with hooks go their slow way, through the modules.
    """
    shares: list[float] = []

    def count(_gate: nn.Module, _x: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        scores, indices, _ = outputs
        shares.append(len(indices.unique()) / scores.shape[1])

    hooks = [m.register_forward_hook(count) for m in model.layers.modules() if isinstance(m, Gate)]
    try:
        yield shares
    finally:
        for hook in hooks:
            hook.remove()


def _mean(shares: list[float]) -> float:
    """0 for a model without gates."""
    return statistics.mean(shares) if shares else 0.0


def first_token(model: Transformer) -> None:
    """Ask for one, as somebody does who waits for the model to be loaded: mapped files are read only now."""
    asked = _Bench(model, 1, 1, "off", None)
    asked._read(*asked._begin(1, 1, 1))


def peak_memory(device: torch.device) -> int:
    """Bytes that the process has held at most: on a GPU the tensors', else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024
