"""dsv3 against transformers: the same random checkpoint, the same work, one after the other on one machine.

    python benchmarks/vs_transformers.py                         # the 135M model, bf16 and fp32
    python benchmarks/vs_transformers.py --size 3.7b --dtypes bf16 --depths 0 4096 --json result.json

Each library runs in a process of its own (so that peak memory is its own), `--rounds` times in turn; the
table gives medians over the rounds. What is measured:

- load: from the folder to the first token, imports not counted;
- memory: the process's peak (on a GPU the peak of allocated memory) after loading, prefill and decoding;
- prefill: prompts of `--prompt` tokens until the first new token of each, in prompt tokens per second;
- decode: one token per sequence and step, greedy, after prompts of `--depths` tokens, in tokens per second.

Ours goes through the engine as users get it, with scheduling, sampling and stop checks. transformers goes
through its bare forward pass and its own cache, without the overhead of `generate`, and with whichever of its
expert implementations is fastest for each number. Prompts are equally long, so that it need not pad.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from dsv3 import DeepseekV3, ModelConfig
from dsv3.config import PRESETS

_PLAIN: dict[str, Any] = {
    "num_nextn_predict_layers": 0,
    "eos_token_id": None,
    "max_position_embeddings": 8192,
}

SIZES = {
    "tiny": PRESETS["tiny"].replace(**_PLAIN),
    "nano": PRESETS["nano"].replace(**_PLAIN),
    # 135M parameters, about 48M of them read per token.
    "small": ModelConfig(
        vocab_size=19456,
        hidden_size=768,
        intermediate_size=2048,
        moe_intermediate_size=160,
        num_hidden_layers=8,
        num_attention_heads=12,
        q_lora_rank=384,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=32,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        initializer_range=0.02,
        **_PLAIN,
    ),
    # The 16B model of the report with 7 of its 27 layers and a smaller vocabulary.
    "3.7b": PRESETS["v3-16b"].replace(
        vocab_size=32000, num_hidden_layers=7, initializer_range=0.02, **_PLAIN
    ),
}

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EXPERTS = ("grouped_mm", "eager", "batched_mm")
WARM_UP = 3


# The two libraries, as the measurements see them ------------------------------------------------------


class Library(Protocol):
    def begin(self, prompts: list[list[int]]) -> None:
        """Take prompts through the model and choose the first new token of each."""

    def step(self) -> None:
        """One more token for each."""

    def top1(self, ids: list[int]) -> list[int]:
        """The likeliest next token after each of ids, to see that both run the same model."""


class Ours:
    def __init__(self, folder: Path, dtype: torch.dtype, device: str) -> None:
        self.model = DeepseekV3.from_pretrained(folder, dtype, device)

    def begin(self, prompts: list[list[int]]) -> None:
        from dsv3.engine.engine import Engine
        from dsv3.engine.sampling import SamplingParams

        self.engine = Engine(self.model, max_num_seqs=len(prompts))
        params = SamplingParams(temperature=0.0, max_tokens=None)
        sequences = [self.engine.sequence(prompt, params) for prompt in prompts]
        for sequence in sequences:
            self.engine.add(sequence)
        while not all(sequence.output_ids for sequence in sequences):
            self.engine.step()

    def step(self) -> None:
        self.engine.step()

    @torch.inference_mode()
    def top1(self, ids: list[int]) -> list[int]:
        logits = self.model(torch.tensor([ids], device=self.model.lm_head.weight.device)).logits
        return logits[0].argmax(dim=-1).tolist()


class Theirs:
    def __init__(self, folder: Path, dtype: torch.dtype, device: str) -> None:
        from transformers import DeepseekV3ForCausalLM, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        self.experts = EXPERTS[0]

    @torch.inference_mode()
    def begin(self, prompts: list[list[int]]) -> None:
        # batched_mm copies an expert for every token: good for a few, out of memory for a prompt.
        self.model.set_experts_implementation(EXPERTS[0] if self.experts == "batched_mm" else self.experts)
        out = self.model(torch.tensor(prompts, device=self.model.device), use_cache=True, logits_to_keep=1)
        self.cache, self.next = out.past_key_values, out.logits[:, -1:].argmax(dim=-1)
        self.next.tolist()
        self.model.set_experts_implementation(self.experts)

    @torch.inference_mode()
    def step(self) -> None:
        out = self.model(self.next, past_key_values=self.cache, use_cache=True)
        self.cache, self.next = out.past_key_values, out.logits[:, -1:].argmax(dim=-1)
        self.next.tolist()  # a user sees every token, and so does ours

    @torch.inference_mode()
    def top1(self, ids: list[int]) -> list[int]:
        return self.model(torch.tensor([ids], device=self.model.device)).logits[0].argmax(dim=-1).tolist()


LIBRARIES: dict[str, Callable[[Path, torch.dtype, str], Library]] = {"dsv3": Ours, "transformers": Theirs}


# The work of one process --------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one library and one dtype; numbers are seconds, MB, and tokens per second."""
    torch.set_num_threads(args.threads)
    vocab = SIZES[args.size].vocab_size
    generator = torch.Generator().manual_seed(0)

    def prompts(batch: int, length: int) -> list[list[int]]:
        return torch.randint(vocab, (batch, length), generator=generator).tolist()

    if args.worker == "transformers":
        import transformers  # noqa: F401 (not part of the load time)
    start = time.perf_counter()
    library = LIBRARIES[args.worker](args.folder, DTYPES[args.dtype], args.device)
    library.begin(prompts(1, 1))
    results: dict[str, Any] = {"load": time.perf_counter() - start}
    results["top1"] = library.top1(prompts(1, 64)[0])

    def speeds(work: str) -> dict[str, float]:
        found = {}
        for batch in args.batches:
            if work == "prefill":
                tokens = batch * args.prompt
                seconds = [
                    _timed(lambda b=batch: library.begin(prompts(b, args.prompt)))
                    for _ in range(1 + args.repeats)
                ]
                found[f"prefill {args.prompt}, batch {batch}"] = tokens / statistics.median(seconds[1:])
                continue
            for depth in args.depths:
                library.begin(prompts(batch, max(depth, 1)))
                for _ in range(WARM_UP):
                    library.step()
                seconds = [_timed(library.step) for _ in range(args.tokens)]
                at = f", depth {depth}" if depth else ""
                found[f"decode, batch {batch}{at}"] = batch / statistics.median(seconds)
        return found

    results["speed"] = speeds("prefill") | speeds("decode")
    results["memory"] = _peak_mb(args.device)
    if isinstance(library, Theirs):  # also with its other ways to compute the experts; the fastest counts
        for library.experts in EXPERTS[1:]:
            again = speeds("decode")
            if library.experts != "batched_mm":
                again |= speeds("prefill")
            results["speed"] = {
                work: max(again.get(work, 0), speed) for work, speed in results["speed"].items()
            }
    return results


def _timed(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _peak_mb(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


# All processes, and the table ---------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict[str, Any]:
    config = SIZES[args.size]
    report: dict[str, Any] = {"machine": machine(args), "size": args.size, "results": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoint"
        model = DeepseekV3(config)
        model.init_weights()
        report["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        model.to(torch.bfloat16).save_pretrained(folder)
        del model
        for dtype in args.dtypes:
            rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in LIBRARIES}
            for _ in range(args.rounds):
                for name in LIBRARIES:
                    print(f"{dtype}: {name} ...", file=sys.stderr, flush=True)
                    rounds[name].append(_in_a_process(name, dtype, folder, args))
            report["results"][dtype] = {name: _median(results) for name, results in rounds.items()}
            ours, theirs = (rounds[name][0]["top1"] for name in LIBRARIES)
            report["results"][dtype]["same top-1"] = statistics.mean(
                a == b for a, b in zip(ours, theirs, strict=True)
            )
    return report


def _in_a_process(name: str, dtype: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", name, "--dtype", dtype, "--folder", str(folder)]
    command += ["--size", args.size, "--device", args.device, "--threads", str(args.threads)]
    command += ["--prompt", str(args.prompt), "--tokens", str(args.tokens), "--repeats", str(args.repeats)]
    command += ["--batches", *map(str, args.batches), "--depths", *map(str, args.depths)]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


def _median(rounds: list[dict[str, Any]]) -> dict[str, float]:
    flat = [{"load": r["load"], "memory": r["memory"]} | r["speed"] for r in rounds]
    return {key: statistics.median(r[key] for r in flat) for key in flat[0]}


def machine(args: argparse.Namespace) -> str:
    import transformers

    if args.device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor()}, {args.threads} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{name}, {versions}, Python {platform.python_version()}"


def table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['size']}: {report['parameters'] / 1e6:,.0f}M parameters, random. {report['machine']}.",
        "",
        "| | | dsv3 | transformers | dsv3 is better by |",
        "|---|---|---:|---:|---:|",
    ]
    for dtype, results in report["results"].items():
        ours, theirs = results["dsv3"], results["transformers"]
        for key in ours:
            less_is_better = key in ("load", "memory")
            ratio = theirs[key] / ours[key] if less_is_better else ours[key] / theirs[key]
            work, unit, digits = {
                "load": ("load to first token", "s", 2),
                "memory": ("peak memory", "MB", 0),
            }.get(key, (key, "tokens/s", 0 if ours[key] > 100 else 1))
            numbers = f"{ours[key]:,.{digits}f} | {theirs[key]:,.{digits}f} | {ratio:.2f}x"
            lines.append(f"| {dtype} | {work}, {unit} | {numbers} |")
        lines.append(f"| {dtype} | same likeliest token | {results['same top-1']:.0%} | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--depths", type=int, nargs="+", default=[0], help="tokens of context before decoding"
    )
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt in prefill")
    parser.add_argument("--tokens", type=int, default=64, help="timed steps of decoding")
    parser.add_argument("--repeats", type=int, default=3, help="timed prefills in each round")
    parser.add_argument("--rounds", type=int, default=3, help="times that each library runs, in turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    parser.add_argument("--worker", choices=LIBRARIES, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=DTYPES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args)))
        return
    report = run(args)
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
