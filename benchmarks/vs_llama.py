"""dsv3 against llama.cpp: the same weights, the same work, in turn on one machine.

    python benchmarks/vs_llama.py --dir /tmp/models                      # builds llama.cpp first, some minutes
    python benchmarks/vs_llama.py --dir /tmp/models --llama PATH --sizes small,3.7b,v3-slice --bits bf16,8,4

Checkpoints have random weights and DeepSeek-V3's architecture: `small` (136M parameters) and `3.7b` as in
vs_transformers.py, and `v3-slice`, V3's own width with one dense layer and one of 256 experts. They are written a tensor
at a time, in bf16, int8 or int4 with groups of 32, and exported from there to GGUF's bf16, q8_0 and q4_0, which moves
the same integers into another order. What is there already is used again.

dsv3 is measured by `dsv3 bench`, llama.cpp by its own llama-bench (prefill, and decoding by depth) and
llama-batched-bench (several sequences), each a process of its own, `--rounds` times in turn. llama.cpp has the better of
its settings for each number: flash attention on and off, repacked weights and plain ones. The table gives medians and
their ratio, and what share of this machine's roofline dsv3 reaches.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vs_transformers import SIZES

from dsv3.checkpoint.hub import resolve
from dsv3.checkpoint.names import table
from dsv3.checkpoint.reader import INTEGERS
from dsv3.checkpoint.writer import Packing, Target, encode, plan, staged, write_config, write_weights
from dsv3.config import PRESETS

SIZES["v3-slice"] = PRESETS["v3-671b"].replace(
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_nextn_predict_layers=0,
    vocab_size=6144,
    max_position_embeddings=8192,
    rope_scaling=None,
    eos_token_id=None,
)
FORMATS: dict[str, tuple[Target, str]] = {
    "bf16": ("bf16", "bf16"),
    "8": (Packing("int8"), "q8_0"),
    "4": (Packing("int4"), "q4_0"),
}
SETTINGS = [(flash, repack) for flash in ("0", "1") for repack in ("0", "1")]


def write(folder: Path, size: str, target: Target) -> None:
    config = SIZES[size]
    pool = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    pieces = [piece for piece in table(config).values() if piece.copy_of is None]

    def random(shape: tuple[int, ...], start: int) -> Tensor:
        n = torch.Size(shape).numel()
        source = pool.roll(start)
        return (source.repeat(-(-n // len(source)))[:n] if n > len(source) else source[:n]).view(shape)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for i, piece in enumerate(pieces):
            if piece.keeps_dtype:
                weight = torch.zeros(piece.shape)
            elif len(piece.shape) == 1:
                weight = torch.ones(piece.shape, dtype=torch.bfloat16)
            else:
                weight = random(piece.shape, 4099 * i)
            yield from encode(piece, weight, target)

    infos = [
        info
        for piece in pieces
        for info in plan(piece, torch.float32 if piece.keeps_dtype else torch.bfloat16, target)
    ]
    with staged(folder) as new:
        write_config(new, config.to_dict(), torch.bfloat16, None if target == "bf16" else INTEGERS)
        write_weights(new, infos, tensors(), 5_000_000_000)
        for file in resolve("nano").glob("token*.json"):
            shutil.copy(file, new)


def build(folder: Path) -> Path:
    """llama.cpp out of llama-cpp-python's source distribution; returns the folder of its programs."""
    programs = folder / "build" / "bin"
    if (programs / "llama-batched-bench").is_file():
        return programs
    folder.mkdir(parents=True, exist_ok=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--no-build-isolation",
    ]
    subprocess.run([*pip, "-d", folder, "llama-cpp-python"], check=True)
    archive = next(folder.glob("llama_cpp_python-*.tar.gz"))
    shutil.unpack_archive(archive, folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
    options = [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DGGML_NATIVE=ON",
        "-DLLAMA_CURL=OFF",
        "-DLLAMA_BUILD_TESTS=OFF",
    ]
    subprocess.run(["cmake", "-S", source, "-B", folder / "build", *options], check=True)
    targets = ["llama-bench", "llama-batched-bench"]
    subprocess.run(["cmake", "--build", folder / "build", "-j", "2", "--target", *targets], check=True)
    return programs


def output(command: list[Any], **more: Any) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **more)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def ours(model: Path, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """For each work: tokens a second, and the share of the roofline."""
    command = [sys.executable, "-m", "dsv3", "bench", model, "--prompt", 512, "--threads", args.threads]
    command += [
        "--depths",
        ",".join(map(str, args.depths)),
        "--batch",
        "1,8",
        "--tokens",
        args.tokens,
        "--json",
    ]
    facts = json.loads(output(command))
    found = {}
    for r in facts["results"]:
        if r["name"] == "prefill" or r["batch"] == 1 or r["depth"] == 0:
            found[_work(r["name"], r["depth"], r["batch"])] = (r["tokens_per_second"], r["share"])
    return found


def theirs(gguf: Path, programs: Path, args: argparse.Namespace) -> dict[str, float]:
    """For each work the best of llama.cpp's settings."""
    best: dict[str, float] = {}

    def note(work: str, speed: float) -> None:
        best[work] = max(speed, best.get(work, 0.0))

    for flash, repack in SETTINGS:
        common = ["-m", gguf, "-t", args.threads, "-fa", flash]
        command = [
            programs / "llama-bench",
            *common,
            "--repack",
            repack,
            "-p",
            512,
            "-n",
            args.tokens,
            "-r",
            3,
        ]
        for row in json.loads(output([*command, "-o", "json", "-d", ",".join(map(str, args.depths))])):
            if row["n_prompt"] and not row["n_depth"]:
                note(_work("prefill", 512, 1), row["avg_ts"])
            elif row["n_gen"]:
                note(_work("decode", row["n_depth"], 1), row["avg_ts"])
        work = [
            "-c",
            4096,
            "-npp",
            16,
            "-ntg",
            args.tokens,
            "-npl",
            8,
            *(["--no-repack"] if repack == "0" else []),
        ]
        batched = [programs / "llama-batched-bench", *common, *work]
        for line in output([*batched, "--output-format", "jsonl"]).splitlines():
            if line.startswith("{"):
                note(_work("decode", 0, 8), json.loads(line)["speed_tg"])
    return best


def _work(name: str, depth: int, batch: int) -> str:
    if name == "prefill":
        return f"prefill {depth}"
    return f"decode, {batch} at once" if batch > 1 else f"decode at {depth:,}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="for checkpoints and llama.cpp: up to 60 GB")
    parser.add_argument("--llama", type=Path, help="the folder of a llama-bench that is built already")
    parser.add_argument("--sizes", default="small,3.7b")
    parser.add_argument("--bits", default="bf16,8,4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--depths", type=lambda text: [int(n) for n in text.split(",")], default=[0, 4096])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    programs = args.llama or build(args.dir / "llama.cpp")
    rows = []
    print(
        f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}; medians of {args.rounds} rounds\n"
    )
    print(
        "| model | bits | | dsv3 | of its roofline | llama.cpp | dsv3 is faster by |\n|---|---|---|---:|---:|---:|---:|"
    )
    for size in args.sizes.split(","):
        for bits in args.bits.split(","):
            target, quant = FORMATS[bits]
            folder = args.dir / f"{size}-{bits}"
            gguf = folder.with_suffix(folder.suffix + ".gguf")
            if not folder.is_dir():
                write(folder, size, target)
            if not gguf.is_file():
                output(
                    [sys.executable, "-m", "dsv3", "convert", folder, gguf, "--to", "gguf", "--quant", quant]
                )
            a, b = [], []
            for _ in range(args.rounds):
                a.append(ours(folder, args))
                b.append(theirs(gguf, programs, args))
            for work in b[0]:
                mine = statistics.median(run[work][0] for run in a)
                share = statistics.median(run[work][1] for run in a)
                other = statistics.median(run[work] for run in b)
                rows.append(
                    {
                        "size": size,
                        "bits": bits,
                        "work": work,
                        "dsv3": mine,
                        "llama.cpp": other,
                        "share": share,
                    }
                )
                print(
                    f"| {size} | {bits} | {work} | {mine:,.1f} | {share:.0%} | {other:,.1f} | {mine / other:.2f}x |",
                    flush=True,
                )
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
