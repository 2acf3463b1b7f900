"""Training with dsv3 against a plain transformers loop: one process, the same random weights, the same batches.

    python benchmarks/train.py                          # nano and the 135M model, a few minutes
    python benchmarks/train.py --sizes small --json result.json
    python benchmarks/train.py --quick                  # one round of nano, under a minute
    python benchmarks/train.py --threads 1 --cpu-time   # where others use the machine at the same time

A round gives each loop one step on one batch, in turn, so that whatever else the machine does hits all of them; the
table has medians over `--rounds`, of the speeds and of the ratios within each round. The loops:

- dsv3: what `dsv3 train` does, a bf16 model under float32 masters with bf16 moments; MTP off, for transformers has none;
- dsv3, torch alone: the same without the native kernels, as on a machine that has no compiler;
- transformers: `DeepseekV3ForCausalLM` in float32 under bf16 autocast, labels in, loss out, gradients clipped,
  `torch.optim.AdamW`; with its default implementation of the experts, and with the one that is a loop.

TFLOP/s count the model's own arithmetic (`dsv3.train.flops`), and are held against the best bf16 matrix product that
this machine did between the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from vs_transformers import SIZES, machine

from dsv3 import DeepseekV3, ModelConfig
from dsv3.data.stream import Batch
from dsv3.kernels import native
from dsv3.model import Transformer
from dsv3.train.flops import model_flops_per_token
from dsv3.train.loss import objective, update_biases
from dsv3.train.optimizer import MasterAdamW

Step = Callable[[Tensor], float]
"""One step on a batch [rows, seq + 1]; the loss before it."""

LR = 1e-4
OURS, TORCH, DEFAULT, EAGER = "dsv3", "dsv3, torch alone", "transformers", "transformers, eager experts"


def ours(folder: Path, config: ModelConfig) -> Step:
    model = Transformer(config)
    model.load_state_dict(DeepseekV3.from_pretrained(folder, torch.float32).state_dict())
    model.bfloat16()
    optimizer = MasterAdamW(model)

    def step(tokens: Tensor) -> float:
        losses = objective(model, Batch(tokens), mtp_weight=0.0)
        losses.total.backward()
        optimizer.accumulate()
        optimizer.step(LR)
        update_biases(model, losses.loads, gamma=0.001)
        return float(losses.main)

    return step


def torch_alone(folder: Path, config: ModelConfig) -> Step:
    step = ours(folder, config)

    def without_native(tokens: Tensor) -> float:
        with patch.object(native, "library", lambda: None):
            return step(tokens)

    return without_native


def theirs(folder: Path, experts: str | None) -> Step:
    from transformers import DeepseekV3ForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    if experts is not None:
        model.set_experts_implementation(experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)

    def step(tokens: Tensor) -> float:
        # By default transformers shifts the labels itself and so loses a row's last target; these are dsv3's.
        inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(inputs, labels=inputs, shift_labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def matmul_rate(clock: Callable[[], float]) -> float:
    """FLOP/s of a large bf16 product, the best of ten, by the clock that the loops are timed with."""
    a, b = (torch.randn(2048, 2048).bfloat16() for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = clock()
        torch.mm(a, b)
        best = min(best, clock() - start)
    return 2 * 2048**3 / best


def compare(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds, of every loop."""
    config = SIZES[size]
    clock = time.process_time if args.cpu_time else time.perf_counter
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoint"
        source = DeepseekV3(config)
        source.init_weights()
        source.save_pretrained(folder)
        parameters = sum(p.numel() for p in source.parameters())
        del source
        loops: dict[str, Step] = {OURS: ours(folder, config), TORCH: torch_alone(folder, config)}
        loops |= {DEFAULT: theirs(folder, None), EAGER: theirs(folder, "eager")}
    loops = {name: loop for name, loop in loops.items() if name not in args.without}

    def batch() -> Tensor:
        return torch.randint(config.vocab_size, (args.rows, args.seq + 1), generator=generator)

    same = batch()  # also the warm-up
    losses = {name: loop(same) for name, loop in loops.items()}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    rates = []
    for number in range(args.rounds):
        rates.append(matmul_rate(clock))
        tokens = batch()
        first = number % len(loops)  # nobody always comes after the same one
        order = list(loops.items())
        for name, loop in order[first:] + order[:first]:
            start = clock()
            loop(tokens)
            seconds[name].append(clock() - start)
        shown = ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items())
        print(f"{size}, round {number + 1}: {shown}", file=sys.stderr, flush=True)

    flops = model_flops_per_token(config, args.seq, mtp=False)
    peak, tokens_per_step = max(rates), args.rows * args.seq
    results = {}
    for name, times in seconds.items():
        speed = tokens_per_step / statistics.median(times)
        results[name] = {
            "tokens/s": speed,
            "ratio": statistics.median(t / o for t, o in zip(times, seconds[OURS], strict=True)),
            "TFLOP/s": speed * flops / 1e12,
            "share": speed * flops / peak,
            "loss": losses[name],
            "seconds": times,
        }
    return {"parameters": parameters, "flops_per_token": flops, "matmul": peak, "loops": results}


def table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['rows']} rows of {report['seq']} tokens a step. {report['machine']}.",
        "",
        "| | loop | tokens/s | dsv3 is faster by | TFLOP/s | of the matmul rate | first loss |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for size, found in report["sizes"].items():
        label = f"{size}, {found['parameters'] / 1e6:,.0f}M, matmul {found['matmul'] / 1e12:.2f} TFLOP/s"
        for name, r in found["loops"].items():
            ratio = "" if name == OURS else f"{r['ratio']:.2f}x"
            lines.append(
                f"| {label} | {name} | {r['tokens/s']:,.0f} | {ratio} | {r['TFLOP/s']:.3f} | {r['share']:.0%} "
                f"| {r['loss']:.4f} |"
            )
            label = ""
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=["nano", "small"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time; for --threads 1")
    parser.add_argument("--without", choices=(TORCH, DEFAULT, EAGER), nargs="+", default=[])
    parser.add_argument("--quick", action="store_true", help="one round of nano")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.rounds = ["nano"], 1
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time needs --threads 1: threads that wait for each other count as busy")
    args.device = "cpu"
    torch.set_num_threads(args.threads)
    report = {
        "machine": machine(args),
        "rows": args.rows,
        "seq": args.seq,
        "sizes": {size: compare(size, args) for size in args.sizes},
    }
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
