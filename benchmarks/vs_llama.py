"""dsv3 against llama.cpp: the same weights, the same work, in turn on one machine.

    python benchmarks/vs_llama.py --dir /tmp/models                                   # builds llama.cpp first, some minutes
    python benchmarks/vs_llama.py --dir /tmp/models --llama-bench PATH --sizes small,3.7b,v3-slice --bits bf16,8,4

Checkpoints have random weights and DeepSeek-V3's architecture: `small` (136M parameters) and `3.7b` as in
vs_transformers.py, and `v3-slice`, V3's own width with one dense layer and one of 256 experts (not in bf16, which
takes 23 GB). They are written a tensor at a time, in bf16, int8 with groups of 128 (8.1 bits a weight) or int4 with groups
of 32 (4.5 bits), and exported from there to GGUF's bf16, q8_0 (8.5 bits) and q4_0 (4.5). The tokenizer is nano's.

dsv3 is measured by `dsv3 bench`, llama.cpp by its own llama-bench (prefill, and decoding by depth) and
llama-batched-bench (several sequences), `--rounds` times in turn, each a process of its own. Both decode random tokens.
llama.cpp has the best of its settings for each number, chosen in a round before that does not count: flash attention
on and off, repacked weights and plain ones. Settings with which it fails are left out.

- load: from the file, which the system has in memory, to the first token. Of llama.cpp the whole process, of dsv3 without
  Python's imports.
- memory: the most that the process held, with one sequence.

The table gives medians and their ratio, and what share of this machine's roofline dsv3 reaches. What was measured is
kept in `--json` after each round and not measured again; neither are checkpoints written again.
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
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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


class Format(NamedTuple):
    """Of dsv3, and of llama.cpp."""

    ours: Target
    theirs: str

    def __str__(self) -> str:
        packing = self.ours
        ours = f"{packing.mix}-g{packing.group}" if isinstance(packing, Packing) else packing
        return ours if ours == self.theirs else f"{ours}-{self.theirs}"


FORMATS = {
    "bf16": Format("bf16", "bf16"),
    "8": Format(Packing("int8", group=128), "q8_0"),
    "4": Format(Packing("int4"), "q4_0"),
}
TOO_LARGE = {("v3-slice", "bf16")}
AT_ONCE = 8
LOAD, MEMORY = "load, s", "memory, MB"
LESS_IS_BETTER = {LOAD, MEMORY}


class Setting(NamedTuple):
    """Of llama.cpp."""

    flash: str
    repack: int

    def __str__(self) -> str:
        return f"-fa {self.flash} --repack {self.repack}"


SETTINGS = [Setting(flash, repack) for flash in ("on", "off") for repack in (1, 0)]
Numbers = dict[str, list[float]]
"""For each work what was found, tokens a second if its name says nothing else."""


# Checkpoints, and llama.cpp ---------------------------------------------------------------------------------


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
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python"]
    subprocess.run([*pip, "-d", folder, "llama-cpp-python"], check=True, stdout=sys.stderr)
    archive = max(folder.glob("llama_cpp_python-*.tar.gz"), key=lambda file: file.stat().st_mtime)
    shutil.unpack_archive(archive, folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
    options = [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DGGML_NATIVE=ON",
        "-DLLAMA_CURL=OFF",
        "-DLLAMA_BUILD_TESTS=OFF",
    ]
    subprocess.run(["cmake", "-S", source, "-B", folder / "build", *options], check=True, stdout=sys.stderr)
    make = ["cmake", "--build", folder / "build", "-j", str(os.cpu_count()), "--target"]
    subprocess.run([*make, "llama-bench", "llama-batched-bench"], check=True, stdout=sys.stderr)
    return programs


def prepared(size: str, bits: str, args: argparse.Namespace) -> tuple[Path, Path]:
    """The checkpoint's folder and its GGUF file, which are written if they are not there."""
    target, quant = FORMATS[bits]
    folder = args.dir / f"{size}-{FORMATS[bits]}"
    gguf = folder.with_name(f"{folder.name}.gguf")
    if not folder.is_dir():
        say(f"{folder}: writing")
        write(folder, size, target)
    if not gguf.is_file():
        say(f"{gguf}: writing")
        output([*DSV3, "convert", folder, gguf, "--to", "gguf", "--quant", quant])
    return folder, gguf


# One round of each -------------------------------------------------------------------------------------------

DSV3 = [sys.executable, "-m", "dsv3"]


class Failed(Exception):
    pass


def output(command: list[Any], threads: int = 0, wanted: str = "") -> tuple[str, float, float]:
    """What a command prints, the seconds it takes, and the most memory that it held, in MB. Failed without `wanted`."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=out, stderr=errors, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        out.seek(0)
        errors.seek(0)
        text = out.read()
        if process.returncode or wanted not in text:
            raise Failed(f"{' '.join(map(str, command))}: {process.returncode}\n{errors.read()[-2000:]}")
        return text, seconds, usage.ru_maxrss * 1024 / 1e6


def ours(model: Path, args: argparse.Namespace) -> tuple[Numbers, Numbers]:
    """What was found, and the shares of the rooflines."""
    found: Numbers = {}
    shares: Numbers = {}
    common = [*DSV3, "bench", model, "--threads", args.threads, "--tokens", args.tokens, "--json"]
    depths = ",".join(map(str, args.depths))
    alone = [*common, "--prompt", args.prompt, "--batch", 1, "--depths", depths]
    several = [*common, "--prompt", 0, "--batch", AT_ONCE, "--depths", 0]
    for command in (alone, several):
        facts = json.loads(output(command, args.threads)[0])
        for r in facts["results"]:
            name = work(r["name"], r["depth"], r["batch"])
            found[name], shares[name] = r["samples"], [r["share"]]
        if command is alone:
            found |= {LOAD: [facts["load_seconds"]], MEMORY: [facts["peak_bytes"] / 1e6]}
    return found, shares


def theirs(gguf: Path, setting: Setting, args: argparse.Namespace, wanted: Iterable[str] = ()) -> Numbers:
    """What llama.cpp does of the work that is wanted, by default all. Raises Failed."""
    found: Numbers = {}
    model = ["-m", gguf, "-t", args.threads, "-fa", setting.flash]
    bench = [args.programs / "llama-bench", *model, "--repack", setting.repack, "-o", "json"]
    prefill, several = work("prefill", args.prompt, 1), work("decode", 0, AT_ONCE)
    alone = {work("decode", depth, 1): depth for depth in args.depths}
    wanted = set(wanted) or {prefill, several, *alone, LOAD, MEMORY}
    runs: list[list[Any]] = []
    if wanted & {prefill, MEMORY}:
        runs.append(["-p", args.prompt, "-n", 0])
    if depths := [str(depth) for name, depth in alone.items() if name in wanted or MEMORY in wanted]:
        runs.append(["-p", 0, "-n", args.tokens, "-d", ",".join(depths)])
    for what in runs:
        text, _, memory = output([*bench, *what, "-r", 3], wanted="samples_ts")
        found[MEMORY] = [max([memory, *found.get(MEMORY, [])])]
        for row in json.loads(text):
            name = ("prefill", row["n_prompt"]) if row["n_prompt"] else ("decode", row["n_depth"])
            found[work(*name, 1)] = row["samples_ts"]
    if LOAD in wanted:
        found[LOAD] = [output([*bench, "-p", 1, "-n", 0, "-r", 1, "--no-warmup"])[1]]
    if several in wanted:
        batched = [args.programs / "llama-batched-bench", *model, "--output-format", "jsonl"]
        batched += ["-c", 4096, "-npp", 1, "-ntg", args.tokens, "-npl", AT_ONCE]
        text, _, _ = output([*batched, *(["--no-repack"] if not setting.repack else [])], wanted="speed_tg")
        rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        found[several] = [row["speed_tg"] for row in rows]
    if missing := [name for name in wanted if not found.get(name)]:
        raise Failed(f"llama.cpp gave no numbers for {', '.join(missing)} with {setting}: {text}")
    return {name: found[name] for name in wanted}


def work(name: str, depth: int, batch: int) -> str:
    if name == "prefill":
        return f"prefill {depth}"
    return f"decode, {batch} at once" if batch > 1 else f"decode at {depth:,}"


def choose(gguf: Path, args: argparse.Namespace) -> dict[str, Setting]:
    """For each work the setting with which llama.cpp did best, once."""
    tried: dict[Setting, Numbers] = {}
    for setting in SETTINGS:
        say(f"{gguf.name}: llama.cpp {setting}")
        try:
            tried[setting] = theirs(gguf, setting, args)
        except Failed as error:
            say(f"left out: {error}")
    if not tried:
        raise SystemExit(f"llama.cpp runs {gguf} with none of its settings")

    def quality(setting: Setting, name: str) -> float:
        number = statistics.median(tried[setting][name])
        return -number if name in LESS_IS_BETTER else number

    return {name: max(tried, key=lambda s: quality(s, name)) for name in next(iter(tried.values()))}


# All rounds, and the table -----------------------------------------------------------------------------------


def into_cache(path: Path) -> None:
    """Read a model's files, so that the system has them in memory if there is room: both are loaded warm."""
    for file in path.iterdir() if path.is_dir() else [path]:
        with file.open("rb") as opened:
            while opened.read(1 << 26):
                pass


def measure(
    size: str, bits: str, known: dict[str, Any], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """What is known of this size and format, after each round that is still to be done."""
    if len(known.get("rounds", [])) >= args.rounds:
        return
    folder, gguf = prepared(size, bits, args)
    if not known:
        chosen = choose(gguf, args)
        settings = {name: list(setting) for name, setting in chosen.items()}
        known = {"size": size, "bits": bits, "format": str(FORMATS[bits])}
        known |= {"settings": settings, "rounds": []}
    chosen = {name: Setting(*setting) for name, setting in known["settings"].items()}
    while len(known["rounds"]) < args.rounds:
        number = len(known["rounds"]) + 1
        done: dict[str, Any] = {"llama.cpp": {}}
        for who in ("dsv3", "llama.cpp") if number % 2 else ("llama.cpp", "dsv3"):
            say(f"{size}, {bits}: {who}, round {number} of {args.rounds}")
            into_cache(folder if who == "dsv3" else gguf)
            if who == "dsv3":
                done["dsv3"], done["shares"] = ours(folder, args)
                continue
            for setting in sorted(set(chosen.values())):
                done[who] |= theirs(gguf, setting, args, [name for name in chosen if chosen[name] == setting])
        known["rounds"].append(done)
        yield known


def rows(known: dict[str, Any]) -> Iterator[str]:
    def median(who: str, name: str) -> float:
        return statistics.median(x for one in known["rounds"] for x in one[who][name])

    for name in known["rounds"][0]["dsv3"]:
        if name not in known["settings"]:
            continue
        mine, other = median("dsv3", name), median("llama.cpp", name)
        ratio = other / mine if name in LESS_IS_BETTER else mine / other
        share = f"{median('shares', name):.0%}" if name not in LESS_IS_BETTER else ""
        a, b = (f"{number:,.0f}" if number >= 100 else f"{number:.1f}" for number in (mine, other))
        setting = Setting(*known["settings"][name])
        yield f"| {known['size']} | {known['format']} | {name} | {a} | {share} | {b} | {setting} | {ratio:.2f}x |"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def machine(args: argparse.Namespace) -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    llama = subprocess.run([args.programs / "llama-bench", "--version"], capture_output=True, text=True)
    version = next((x for x in (llama.stderr + llama.stdout).splitlines() if "version" in x), "").strip()
    return f"{name}, {args.threads} threads, torch {torch.__version__}, llama.cpp {version}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="for checkpoints and llama.cpp: up to 60 GB")
    parser.add_argument("--llama-bench", type=Path, help="one that is built, llama-batched-bench beside it")
    parser.add_argument("--sizes", default="small,3.7b")
    parser.add_argument("--bits", default="bf16,8,4")
    parser.add_argument("--rounds", type=int, default=3, help="0: show what is known")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--depths", type=lambda text: [int(n) for n in text.split(",")], default=[0, 4096])
    parser.add_argument("--json", type=Path, help="by default DIR/vs_llama.json")
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    args.json = args.json or args.dir / "vs_llama.json"
    args.programs = args.llama_bench.parent if args.llama_bench else build(args.dir / "llama.cpp")
    work_ = {"threads": args.threads, "prompt": args.prompt, "tokens": args.tokens, "depths": args.depths}
    work_ |= {"formats": {bits: str(form) for bits, form in FORMATS.items()}}
    report = json.loads(args.json.read_text()) if args.json.exists() else {"work": work_, "results": {}}
    if report["work"] != work_:
        raise SystemExit(f"{args.json} holds numbers of other work, {report['work']}: name another file")
    report["machine"] = machine(args)
    print(f"{report['machine']}; medians of all rounds.\n")
    print("| model | format | | dsv3 | of its roofline | llama.cpp | with | dsv3 is better by |")
    print("|---|---|---|---:|---:|---:|---|---:|", flush=True)
    for size in args.sizes.split(","):
        for bits in args.bits.split(","):
            if (size, bits) in TOO_LARGE:
                continue
            key = f"{size} {FORMATS[bits]}"
            for known in measure(size, bits, report["results"].get(key, {}), args):
                report["results"][key] = known
                partial = args.json.with_name(f".{args.json.name}.partial")
                partial.write_text(json.dumps(report, indent=1) + "\n")
                partial.replace(args.json)
            if key in report["results"]:
                print("\n".join(rows(report["results"][key])), flush=True)


if __name__ == "__main__":
    try:
        main()
    except Failed as error:
        raise SystemExit(f"{error}\nWhat was measured is kept: run it again to go on.") from None
