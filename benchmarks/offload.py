"""More model than memory: a slice of DeepSeek-V3 at full width, twice as large as what it may take.

    python benchmarks/offload.py --dir /tmp/slice               # writes 12.4 GB, runs within 6 GB, some minutes
    python benchmarks/offload.py --dir /tmp/slice --memory 4GB  # again with what is there

The slice has V3's sizes in FP8, but two layers (one dense, one of 256 experts), nano's vocabulary and random weights:
its gate has no favourites, so of what is asked for the slots hold just their share. It is written a tensor at a time. The
page cache is told to let go of what was read, so that bytes come from the disk. Peak memory is what the process
takes beyond Python, torch and the checkpoint's headers.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dsv3 import LLM, SamplingParams
from dsv3.checkpoint.hub import resolve
from dsv3.checkpoint.names import table
from dsv3.checkpoint.reader import QUANTIZATION, open_checkpoint
from dsv3.checkpoint.shards import TensorInfo
from dsv3.checkpoint.writer import plan, staged, write_config, write_weights
from dsv3.config import PRESETS
from dsv3.engine.offload import Reads
from dsv3.errors import size
from dsv3.kernels.native import library
from dsv3.text import Tokenizer


def write_slice(folder: Path, layers: int, experts: int) -> None:
    """Random FP8 weights of about the size that trained ones have."""
    nano = resolve("nano")
    config = PRESETS["v3-671b"].replace(
        num_hidden_layers=1 + layers,
        first_k_dense_replace=1,
        n_routed_experts=experts,
        num_nextn_predict_layers=0,
        vocab_size=6144,
    )
    pool = torch.randn(1 << 26, generator=torch.Generator().manual_seed(0))
    codes, numbers = pool.mul(100).to(torch.float8_e4m3fn).view(torch.uint8), pool.mul(0.02).bfloat16()

    def random(info: TensorInfo, start: int) -> Tensor:
        if info.name.endswith("_scale_inv"):
            return torch.full(info.shape, 0.0002)
        if info.name.endswith(("norm.weight", "correction_bias")):
            return torch.full(info.shape, float("norm" in info.name), dtype=info.dtype)
        source = (codes if info.dtype.itemsize == 1 else numbers).view(-1)
        n = info.nbytes // info.dtype.itemsize
        source = source.roll(start)
        source = source.repeat(-(-n // len(source)))[:n] if n > len(source) else source[:n]
        return source.view(info.dtype).view(info.shape)

    pieces = [piece for piece in table(config).values() if piece.copy_of is None]
    infos = [
        info
        for piece in pieces
        for info in plan(piece, torch.float32 if piece.keeps_dtype else torch.bfloat16, "fp8")
    ]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number, info in enumerate(infos):
            yield info.name, random(info, 7919 * number)

    with staged(folder) as new:
        write_config(new, config.to_dict(), torch.bfloat16, QUANTIZATION)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(nano / file, new)
        write_weights(new, infos, tensors(), 1_000_000_000)


def status(name: str) -> int:
    """Bytes, by a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="where the slice is, or will be")
    parser.add_argument("--layers", type=int, default=1, help="with experts, beside a dense one")
    parser.add_argument("--experts", type=int, default=256, help="in each of these")
    parser.add_argument("--memory", default="6GB")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of the answer")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    print(f"{cpu.partition(': ')[2]}, {args.threads} threads", flush=True)
    if not args.dir.exists():
        began = time.perf_counter()
        write_slice(args.dir, args.layers, args.experts)
        print(f"written in {time.perf_counter() - began:.0f} s", flush=True)
    print(f"checkpoint: {size(open_checkpoint(args.dir).nbytes)}, memory: {args.memory}")
    library(), Tokenizer.from_pretrained(args.dir)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on

    began = time.perf_counter()
    llm = LLM(args.dir, memory=args.memory, max_num_seqs=1)
    assert llm.experts is not None
    print(
        f"loaded in {time.perf_counter() - began:.1f} s: {llm.experts.slots} slots, {llm.max_model_len:,} tokens of context"
    )
    ids = [1 + 31 * i % 6000 for i in range(args.prompt)]
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=args.tokens, ignore_eos=True)
    sequence = llm.engine.sequence(ids, params)
    llm.engine.add(sequence)
    for what, new in (("prompt", 1), ("answer", args.tokens - 1)):
        reads = llm.experts.reads = Reads()
        began, length = time.perf_counter(), len(sequence.tokens)
        while not sequence.finished and len(sequence.tokens) < length + new:
            llm.engine.step()
        seconds = time.perf_counter() - began
        tokens = args.prompt if what == "prompt" else new
        print(f"{what}: {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.2f} tokens/s")
        print(
            f"  {reads}; {size(reads.nbytes / tokens)} a token, {size(reads.nbytes / seconds)} a second",
            flush=True,
        )
    print(f"peak memory: {size(status('VmHWM') - before)} of {args.memory}")


if __name__ == "__main__":
    main()
