"""Triton's kernels on a CUDA card, against torch's ways and against what the card can do.

    python benchmarks/gpu_kernels.py                # V3's shapes, some minutes, 20 GB of the card's memory
    python benchmarks/gpu_kernels.py --only attention --json results.json

First the ceilings: how quickly memory is copied (bytes read and written), and the rates of torch's bf16 and FP8 products
of large matrices. Then each operation in each way, the median of many runs with caches emptied before each, as in a
model whose weights do not fit there. GB/s count each weight, latent, input and result once and stand beside their
share of the copy's; TFLOP/s count two operations for each multiplication that the result needs, beside their share of
the rate of the type that the way multiplies in. A way that a library lacks or a card cannot do is left out.

Ways: `dsv3` is what the package does on this card; `triton` its kernel, if that is something else; `bf16` is torch's
product with weights that were bf16 all along, `unpacked` with weights that are made bf16 for each product; `loop` is one
product per expert, `gathered` scaled_dot_product_attention over latents copied together, `torch` the gate's operations
one by one.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.config import PRESETS
from dsv3.files import write_whole
from dsv3.kernels import fp8, inference, moe, triton
from dsv3.kernels.attention import latent_attention, paged_latent_attention
from dsv3.kernels.packed import Packed, dequantize
from dsv3.model.moe import Gate

Work = Callable[[], Any]
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    """One operation: what must move, what must be computed, and the ways to do it with the type each multiplies in."""

    name: str
    bytes: float
    operations: float
    ways: dict[str, tuple[str, Work]]


@dataclass(frozen=True)
class Result:
    case: str
    way: str
    microseconds: float
    gigabytes: float
    """per second"""
    teraflops: float
    of_copy: float
    of_rate: float | None


def median(work: Work, runs: int = 30) -> float:
    """Seconds on the card, launches included, with nothing of the operands in its caches."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    work()
    times = []
    for _ in range(runs):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def ceilings(size: int = 8192) -> dict[str, float]:
    """GB/s of a copy, TFLOP/s of products of square matrices by type."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found = {"copy": 2 * source.numel() / median(functools.partial(target.copy_, source)) / 1e9}
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    found["bf16"] = 2 * size**3 / median(lambda: a @ b.T) / 1e12
    x, y, one = a.to(E4M3), b.to(E4M3), torch.ones((), device="cuda")
    try:
        product = functools.partial(torch._scaled_mm, x, y.T, one, one, out_dtype=torch.bfloat16)
        found["fp8"] = 2 * size**3 / median(product) / 1e12
    except RuntimeError as error:
        print(f"no FP8 products: {str(error).splitlines()[0]}", file=sys.stderr)
    return found


def fp8_weights(*shape: int) -> Packed:
    codes = torch.empty(shape, dtype=E4M3, device="cuda")
    for matrix in codes.view(-1, *shape[-2:]):
        matrix.copy_(torch.randn(shape[-2:], device="cuda") * 60)
    scale = torch.rand(*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128), device="cuda") / 1e4 + 1e-5
    return Packed("fp8", codes, scale)


def products() -> Iterator[Case]:
    """`inference.linear` with FP8 weights: V3's latent projections, shared experts and attention's output."""
    from dsv3.kernels.triton import matmul

    for n, k in ((2112, 7168), (4096, 7168), (7168, 16384)):
        weight = fp8_weights(n, k)
        wide = dequantize(weight, torch.bfloat16)
        for rows in (1, 16, 64, 128, 512, 4096):
            x = torch.randn(rows, k, device="cuda").bfloat16()
            ways: dict[str, tuple[str, Work]] = {
                "dsv3": ("bf16" if rows <= 64 else "fp8", functools.partial(inference.linear, x, weight)),
                "bf16": ("bf16", functools.partial(F.linear, x, wide)),
                "unpacked": ("bf16", lambda x=x, w=weight: F.linear(x, dequantize(w, torch.bfloat16))),
            }
            operands = (*matmul.quantize_tiles(x), weight.codes, weight.scale, torch.bfloat16)
            ways["triton, quantised x"] = "fp8", functools.partial(matmul.fp8_matmul, *operands)
            if fp8._is_hopper(x.device):
                ways["scaled_mm, quantised x"] = "fp8", functools.partial(fp8._scaled_mm, *operands)
            if fp8._deep_gemm_is_installed():
                ways["deep_gemm, quantised x"] = "fp8", functools.partial(fp8._deep_gemm, *operands)
            size = weight.codes.numel() + 2 * rows * (n + k)
            yield Case(f"{rows} x [{n}, {k}]", size, 2 * rows * n * k, ways)


def experts() -> Iterator[Case]:
    """`routed_experts` with half of a V3 layer's experts, for what they take in bf16; 8 for each token, evenly."""
    count, chosen, width, hidden = 128, 8, 2048, 7168
    packs = fp8_weights(count, 2 * width, hidden), fp8_weights(count, hidden, width)
    wide = [dequantize(pack, torch.bfloat16) for pack in packs]
    for tokens in (1, 16, 128, 1024, 4096):
        x = torch.randn(tokens, hidden, device="cuda").bfloat16()
        indices = torch.rand(tokens, count, device="cuda").topk(chosen).indices
        weights = torch.rand(tokens, chosen, device="cuda")
        work = functools.partial(moe.routed_experts, x, indices, weights)
        used = indices.unique().numel()
        one = 3 * width * hidden
        rows = tokens * chosen
        ways: dict[str, tuple[str, Work]] = {
            "dsv3": ("bf16" if rows <= 64 * count else "fp8", functools.partial(work, *packs)),
            "bf16": ("bf16", functools.partial(work, *wide)),
            "loop": ("bf16", functools.partial(work, *wide, F.linear)),
        }
        yield Case(f"{tokens} tokens, {used} experts", used * one + 4 * rows * hidden, 2 * rows * one, ways)


def attention() -> Iterator[Case]:
    """Absorbed attention over the cache, V3's sizes with all heads on one card."""
    from dsv3.kernels.triton import attention as ours

    heads, rank, dim = 128, 512, 576
    for tokens, context in ((1, 4096), (1, 65536), (16, 4096), (128, 4096)):
        each = context // 64
        cache = torch.randn(tokens * each, 64, dim, device="cuda").bfloat16()
        tables = torch.randperm(tokens * each, device="cuda").int().view(tokens, each)
        owners = torch.arange(tokens, device="cuda").int()
        positions = torch.full((tokens,), context - 1, device="cuda")
        q = torch.randn(tokens, heads, dim, device="cuda").bfloat16()
        given = q, cache, tables, owners, positions, rank, dim**-0.5

        def gathered(q: Tensor = q, cache: Tensor = cache, tables: Tensor = tables) -> Tensor:
            return latent_attention(q, cache[tables].flatten(1, 2), rank, dim**-0.5)

        ways: dict[str, tuple[str, Work]] = {
            "dsv3": ("bf16", functools.partial(paged_latent_attention, *given)),
            "gathered": ("bf16", gathered),
        }
        if ours._flash_mla_takes(q, cache, rank):
            ways["triton"] = "bf16", functools.partial(ours._in_parts, *given)
        pairs = tokens * context
        size = 2 * dim * pairs + 2 * tokens * heads * (dim + rank)
        yield Case(f"{tokens} tokens, context {context}", size, 2 * pairs * heads * (dim + rank), ways)


def gate() -> Iterator[Case]:
    """A V3 gate, its product included."""
    config = replace(PRESETS["v3-671b"], hidden_size=7168)
    assert config.n_routed_experts is not None
    made = Gate(config, config.n_routed_experts).cuda()
    torch.nn.init.normal_(made.weight, std=0.02)
    for tokens in (1, 128, 4096):
        x = torch.randn(tokens, config.hidden_size, device="cuda").bfloat16()

        def unfused(x: Tensor = x) -> Tensor:
            scores = F.linear(x.float(), made.weight.float()).sigmoid()
            weights = scores.gather(1, made.choose(scores))
            return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * config.routed_scaling_factor

        ways: dict[str, tuple[str, Work]] = {
            "dsv3": ("float32", functools.partial(made, x)),
            "torch": ("float32", unfused),
        }
        size = made.weight.numel() * 4 + x.numel() * 2
        yield Case(f"{tokens} tokens", size, 2 * tokens * made.weight.numel(), ways)


PARTS = {"products": products, "experts": experts, "attention": attention, "gate": gate}


def measure(case: Case, limits: dict[str, float]) -> Iterator[Result]:
    for way, (type_, work) in case.ways.items():
        try:
            seconds = median(work)
        except (RuntimeError, ImportError, AttributeError, TypeError) as error:
            print(f"{case.name}, {way}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        rate, speed = case.operations / seconds / 1e12, case.bytes / seconds / 1e9
        share = rate / limits[type_] if type_ in limits else None
        yield Result(case.name, way, seconds * 1e6, speed, rate, speed / limits["copy"], share)


def show(result: Result) -> str:
    of_rate = "    -" if result.of_rate is None else f"{result.of_rate:5.0%}"
    return (
        f"{result.case:32} {result.way:24} {result.microseconds:10.1f} {result.gigabytes:8.0f} {result.of_copy:5.0%} "
        f"{result.teraflops:8.1f} {of_rate}"
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="measure these")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_kernels: torch sees no CUDA card, and there is nothing else here to measure")
    if not triton.usable():
        sys.exit("gpu_kernels: triton is not installed; torch's CUDA builds bring it")
    torch.manual_seed(0)
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    limits = ceilings()
    rates = ", ".join(f"{name} {rate:,.0f} TFLOP/s" for name, rate in limits.items() if name != "copy")
    print(f"{machine}\ncopy {limits['copy']:,.0f} GB/s, products: {rates}")
    results: dict[str, list[Result]] = {}
    for part in args.only:
        print(f"\n{part:32} {'way':24} {'us':>10} {'GB/s':>8} {'':5} {'TFLOP/s':>8}", flush=True)
        for case in PARTS[part]():
            for result in measure(case, limits):
                results.setdefault(part, []).append(result)
                print(show(result), flush=True)
        torch.cuda.empty_cache()
    if args.json is not None:
        parts = {part: [asdict(result) for result in some] for part, some in results.items()}
        write_whole(args.json, json.dumps({"machine": machine, "ceilings": limits, **parts}, indent=1))


if __name__ == "__main__":
    main()
