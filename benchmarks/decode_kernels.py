"""The native kernels of inference against torch and against what the machine can do.

    python benchmarks/decode_kernels.py                 # a minute or two, one thread
    python benchmarks/decode_kernels.py --threads 2

Times are the best of several runs in CPU time of the calling thread (wall time with more threads), so that others on
the machine disturb little. GB/s count each weight and each cached latent once, GFLOP/s two operations for each
multiplication that the form at hand needs. Printed first, to hold them against: memory larger than the caches summed
up, and torch's product of large matrices. (A Zen 4 core can do 64 operations a cycle: 235 GFLOP/s at 3.7 GHz.)
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor
from vs_transformers import machine

from dsv3.config import PRESETS
from dsv3.kernels import native
from dsv3.kernels.attention import paged_latent_attention
from dsv3.kernels.inference import linear
from dsv3.model import FlatBatch, Piece, Transformer


def best(function: Callable[[], object], runs: int) -> float:
    """Seconds of the quickest of `runs` runs, after one that does not count."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times = []
    for _ in range(runs + 1):
        start = clock()
        function()
        times.append(clock() - start)
    return min(times[1:])


def compare(name: str, function: Callable[[], object], operations: float, size: float, runs: int) -> None:
    ours = best(function, runs)
    with patch.object(native, "library", lambda: None):
        torchs = best(function, max(2, runs // 5))
    print(
        f"{name:44} {ours * 1e6:9.0f} {torchs * 1e6:9.0f} {torchs / ours:6.1f}x "
        f"{size / ours / 1e9:7.1f} {operations / ours / 1e9:8.0f}",
        flush=True,
    )


def random(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def products(rows: int, out: int, dim: int, runs: int) -> None:
    x, weight = random(rows, dim), random(out, dim)
    compare(
        f"{rows:3} rows x [{out}, {dim}]",
        lambda: linear(x, weight),
        2 * rows * out * dim,
        2 * out * dim,
        runs,
    )


def attention(tokens: int, heads: int, dim: int, rank: int, context: int, runs: int) -> None:
    each = -(-context // 64)
    cache = random(tokens * each, 64, dim)
    tables = torch.randperm(tokens * each, dtype=torch.int32).view(tokens, each)
    owners, positions = torch.arange(tokens, dtype=torch.int32), torch.full((tokens,), context - 1)
    q = random(tokens, heads, dim)
    compare(
        f"{tokens:3} tokens, {heads} heads of {dim}, context {context}",
        lambda: paged_latent_attention(q, cache, tables, owners, positions, rank, 1 / math.sqrt(dim)),
        2 * tokens * heads * context * (dim + rank),
        2 * tokens * context * dim,
        runs,
    )


def steps(model: Transformer, sequences: int, new: int, context: int, runs: int) -> None:
    """A whole step of `nano`: every sequence gets `new` tokens after `context`, and logits for the last."""
    config = model.config
    each = -(-(context + new) // 64)
    layers = config.num_hidden_layers
    cache = [random(sequences * each, 64, config.latent_dim) for _ in range(layers)]
    pieces = [Piece(range(i * each, (i + 1) * each), context, new) for i in range(sequences)]
    ids = torch.randint(config.vocab_size, (sequences * new,))

    def step() -> None:
        hidden = model.forward_flat(ids, FlatBatch.lay(pieces, cache))
        model.logits_flat(hidden[new - 1 :: new])

    active = sum(p.numel() for p in model.layers.parameters()) + model.lm_head.weight.numel()
    experts = sum(p.numel() for name, p in model.layers.named_parameters() if ".experts." in name)
    assert config.n_routed_experts is not None
    active -= experts * (1 - config.num_experts_per_tok / config.n_routed_experts)
    pairs = new * context + new * (new + 1) / 2
    operations = 2 * sequences * new * active
    operations += (
        2
        * sequences
        * pairs
        * layers
        * config.num_attention_heads
        * (config.latent_dim + config.kv_lora_rank)
    )
    size = (
        2 * active + 2 * sequences * context * layers * config.latent_dim
    )  # at least: more experts are read by many
    compare(f"nano: {sequences} x {new} tokens after {context}", step, operations, size, runs)


def limits() -> None:
    a, b = random(2048, 2048), random(2048, 2048)
    seconds = best(lambda: a @ b, 5)
    big = torch.ones(1 << 26)
    print(f"torch's product of large matrices: {2 * 2048**3 / seconds / 1e9:.0f} GFLOP/s")
    print(f"memory: {big.numel() * 4 / best(lambda: big.sum(), 5) / 1e9:.1f} GB/s")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    runs = arguments.runs
    print(machine(argparse.Namespace(device="cpu", threads=arguments.threads)))
    if native.library() is None:
        raise SystemExit("no native kernels on this machine")
    limits()
    print(f"{'':44} {'us':>9} {'torch us':>9} {'':>7} {'GB/s':>7} {'GFLOP/s':>8}")
    for out, dim in ((6144, 256), (256, 256), (4096, 1536)):
        for rows in (1, 4, 8, 32, 256):
            products(rows, out, dim, runs)
    for tokens in (1, 8, 32):
        attention(tokens, 4, 96, 64, 1000, runs)
    for tokens in (1, 4):
        attention(tokens, 128, 576, 512, 1000, runs)
    model = Transformer(PRESETS["nano"]).requires_grad_(False)
    model.init_weights()
    model.bfloat16()
    for sequences, new, context in (
        (1, 1, 16),
        (1, 1, 1000),
        (8, 1, 1000),
        (32, 1, 1000),
        (64, 1, 1000),
        (1, 512, 0),
    ):
        steps(model, sequences, new, context, runs)


if __name__ == "__main__":
    main()
