"""One step of training under each layout, in one process and in two, and as the model grows.

    python benchmarks/scaling.py                       # both tables, about ten minutes
    python benchmarks/scaling.py --only growth --rounds 3 --json result.json

`layouts`: the same batch, in one process with one thread, in one with two, and in two processes with one each, by every
kind of parallelism. A round takes one step of each in turn, so that whatever else the machine does hits all alike; the
table has medians of the speeds and of the ratios to the first within a round. Losses are compared, too: the layouts
compute the same.

`growth`: one process; the number of experts, of layers and the length of sequences grow one at a time, and the step time
with them, held against what the planner says (`dsv3.planner.training`, whose rates are those of its own CPU profile: growth counts, not seconds).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsv3.config import PRESETS, ModelConfig
from dsv3.data.stream import Batch
from dsv3.parallel.mesh import Mesh
from dsv3.recipe import Layout, OptimizerRecipe
from dsv3.train.loop import backward
from dsv3.train.loss import update_biases
from dsv3.train.run import Run
from dsv3.train.team import Team

SEQ, ROWS, MICROBATCH = 512, 8, 1
LAYOUTS: dict[str, tuple[Layout, int]] = {  # with the threads of each process
    "1 process, 1 thread": (Layout(), 1),
    "1 process, 2 threads": (Layout(), 2),
    "data 2": (Layout(data=2), 1),
    "data 2, expert 2": (Layout(data=2, expert=2), 1),
    "context 2": (Layout(context=2), 1),
    "pipeline 2, 1F1B": (Layout(pipeline=2), 1),
    "pipeline 2, interleaved": (Layout(pipeline=2, schedule="interleaved", chunks=2), 1),
    "pipeline 2, ZB1P": (Layout(pipeline=2, schedule="zb1p"), 1),
    "pipeline 2, DualPipe": (Layout(pipeline=2, schedule="dualpipe"), 1),
    "pipeline 2, DualPipeV": (Layout(pipeline=2, schedule="dualpipev"), 1),
}


def stepper(config: ModelConfig, layout: Layout, rows: int, seq: int) -> Callable[[], float]:
    """What takes one step on random tokens and gives the loss before it."""
    mesh = Mesh.of(layout) if layout.world > 1 else None
    run = Run(Path(), config, OptimizerRecipe(), 0, torch.bfloat16, "cpu", mesh)
    if mesh is not None:
        run.team = Team(mesh, run.model, run.device)
    tokens = torch.randint(config.vocab_size, (rows, seq + 1), generator=torch.Generator().manual_seed(0))

    def step() -> float:
        mine = slice(None) if run.team is None else run.team.rows(rows)
        losses = backward(run, Batch(tokens[mine]), MICROBATCH, 0.3)
        run.optimizer.step(1e-4, 1.0)
        update_biases(run.model, losses.loads, 0.001)
        return losses.main

    return step


def worker(end: Connection, rank: int, name: str, store: str) -> None:
    """A process that takes a step whenever it is told to, and says how long it took."""
    layout, threads = LAYOUTS[name]
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(threads)
    if layout.world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=layout.world)
    step = stepper(PRESETS["nano"], layout, ROWS, SEQ)
    for _ in range(2):
        step()
    end.send(None)
    while end.recv():
        started = time.perf_counter()
        loss = step()
        end.send((time.perf_counter() - started, loss))
    if layout.world > 1:
        dist.destroy_process_group()


def layouts(rounds: int) -> list[dict[str, Any]]:
    """Step times of each layout, in turn."""
    context = get_context("spawn")
    teams: dict[str, list[Connection]] = {}
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, (layout, _)) in enumerate(LAYOUTS.items()):
            ends = []
            for rank in range(layout.world):
                ours, theirs = context.Pipe()
                process = context.Process(target=worker, args=(theirs, rank, name, f"{folder}/{i}"))
                process.start()
                theirs.close()
                ends.append(ours)
                processes.append(process)
            for end in ends:  # one layout warms up at a time
                end.recv()
            teams[name] = ends
            print(f"  {name} is ready", file=sys.stderr)
        seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
        losses: dict[str, float] = {}
        for _ in range(rounds):
            for name, ends in teams.items():
                for end in ends:
                    end.send(True)
                said = [end.recv() for end in ends]
                seconds[name].append(max(took for took, _ in said))
                losses[name] = said[0][1]
        for end in (end for ends in teams.values() for end in ends):
            end.send(False)
        for process in processes:
            process.join()
    first = seconds[next(iter(LAYOUTS))]
    return [
        {
            "layout": name,
            "processes": LAYOUTS[name][0].world,
            "tokens_per_second": ROWS * SEQ / statistics.median(took),
            "ratio": statistics.median(a / b for a, b in zip(first, took, strict=True)),
            "loss": losses[name],
        }
        for name, took in seconds.items()
    ]


def grown() -> dict[str, list[tuple[int, ModelConfig, int]]]:
    """For each thing that grows: its value, the model, and the length of a sequence."""
    base = PRESETS["nano"]
    return {
        "experts": [(n, base.replace(n_routed_experts=n), SEQ) for n in (16, 32, 64, 128)],
        "layers": [(n, base.replace(num_hidden_layers=n), SEQ) for n in (3, 6, 12, 24)],
        "sequence": [(n, base, n) for n in (256, 512, 1024, 2048)],
    }


def growth(rounds: int) -> list[dict[str, Any]]:
    """Step times as one thing grows, and the planner's."""
    from dsv3.planner.hardware import load_profiles
    from dsv3.planner.training import plan_training

    hardware = load_profiles(None)["cpu"]  # of which only the growth counts
    rows = []
    for thing, cases in grown().items():
        steps = [stepper(config, Layout(), max(1, ROWS * SEQ // seq), seq) for _, config, seq in cases]
        took: list[list[float]] = [[] for _ in steps]
        for turn in range(rounds + 1):
            for times, step in zip(took, steps, strict=True):
                started = time.perf_counter()
                step()
                if turn:
                    times.append(time.perf_counter() - started)
        for (value, config, seq), times in zip(cases, took, strict=True):
            plan = plan_training(
                config,
                hardware,
                Layout(),
                sequence_length=seq,
                batch=max(1, ROWS * SEQ // seq),
                microbatch=MICROBATCH,
                precision="bf16",
                recompute=False,
                mtp=True,
            )
            rows.append(
                {
                    "grows": thing,
                    "value": value,
                    "seconds": statistics.median(times),
                    "planned": plan.seconds_per_step,
                }
            )
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table."""
    columns = list(rows[0])
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    for line in [columns, *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("layouts", "growth"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the tables here as well")
    args = parser.parse_args()
    tables = {}
    for name, make in {"layouts": layouts, "growth": growth}.items():
        if args.only in (None, name):
            tables[name] = make(args.rounds)
            print(f"\n{name}")
            show(tables[name])
    if args.json:
        args.json.write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
