"""What a machine does with nothing else to do: the ceilings that a model's speed is held against.

Reading: a sum over far more numbers than caches hold. Multiplying: on a CPU, products in registers, of bf16 and of bytes
(`kernels/ceilings.cpp`), and torch's own matrix products, which on some processors use what our kernels do not (AMX);
the fastest counts. On a GPU, torch's. Each is the best of several tries: a ceiling is what is possible, not what is
usual.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dsv3.kernels.native import call, library


@dataclass(frozen=True)
class Ceilings:
    """Of all threads together, a second."""

    bandwidth: float
    """Bytes read from memory."""
    products: float
    """Operations (a multiplication and an addition are two) of bf16 numbers."""
    byte_products: float
    """The same of bytes, where they are multiplied as such; else that of bf16."""
    torch_products: float
    """What torch's product of large bf16 matrices reaches, for comparison."""


def measure_ceilings(device: torch.device, nbytes: int = 2**30, seconds: float = 0.5) -> Ceilings:
    """nbytes: read to measure the bandwidth, several times what caches hold; seconds: given to each measurement."""
    data = torch.ones(nbytes // 8, dtype=torch.int64, device=device)
    native = device.type == "cpu" and library() is not None
    total = torch.empty(1, dtype=torch.int64)
    readers: list[Callable[[], Tensor | None]] = [data.sum]
    if native:
        readers.append(partial(call, "read_all", data, len(data), total))
    bandwidth = data.nbytes / min(_best(read, device, seconds) for read in readers)
    del data, readers
    of_torch = max(_matrices(n, device, seconds) for n in ((1024, 2048) if device.type == "cpu" else (8192,)))
    if not native:
        return Ceilings(bandwidth, of_torch, of_torch, of_torch)
    bf16, bytes_ = (_registers(name, device, seconds) for name in ("multiply_bf16", "multiply_int8"))
    products = max(bf16, of_torch)
    return Ceilings(bandwidth, products, max(bytes_, products), of_torch)


def _matrices(n: int, device: torch.device, seconds: float) -> float:
    x, w = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    with torch.inference_mode():
        return 2.0 * n**3 / _best(partial(torch.mm, x, w), device, seconds)


def _registers(name: str, device: torch.device, seconds: float, times: int = 50_000) -> float:
    """times: rounds of some 100 microseconds in all, which seldom are interrupted."""
    each = torch.empty(1, dtype=torch.float64)
    best = _best(partial(call, name, times, each), device, seconds)
    return 2.0 * each.item() * times * torch.get_num_threads() / best


def _best(run: Callable[[], Tensor | None], device: torch.device, seconds: float) -> float:
    """The shortest time of a run, of at least three."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
