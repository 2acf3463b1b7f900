"""Train the bundled model, `nano`, on a laptop's CPU.

    python -m dsv3.data.nano MATERIAL DATA             # text to tokens
    python -m dsv3.train.nano pretrain DATA RUN        # about an hour and a half on two cores
    python -m dsv3.train.nano sft DATA RUN             # tune it to chat
    python -m dsv3.train.nano evaluate DATA RUN        # bits per byte on held-out text
    python -m dsv3.train.nano export DATA RUN FOLDER   # an FP8 checkpoint as DeepSeek ships them

A short version of the report's recipe (section 4.2): AdamW with float32 masters under a bf16 model; warm-up,
constant rate, decay; loss of the next token plus MTP plus the sequence-wise balance loss; expert biases moved
by gamma after every step and left alone at the end. Every schedule is a function of the share of tokens
done. A run is saved every few minutes and goes on from there when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv3.checkpoint import DeepseekV3
from dsv3.config import PRESETS
from dsv3.errors import UserError
from dsv3.model import Transformer
from dsv3.model.attention import LatentAttention
from dsv3.model.layers import FeedForward
from dsv3.model.moe import Gate
from dsv3.text.chat import DEEPSEEK_TEMPLATE
from dsv3.train.loss import objective, update_biases
from dsv3.train.optimizer import MasterAdamW


@dataclass(frozen=True)
class Stage:
    """What one stage of training does, as functions of the share of its tokens that is done."""

    tokens: int
    rows: int = 8
    seq: int = 512
    peak_lr: float = 2e-3
    final_lr: float = 1e-4
    warmup: float = 0.02
    decay: float = 0.3
    """The last share of the run, over which the rate falls from peak to final along a cosine."""
    mtp_from: float = 0.5
    """MTP starts here: it costs a fifth of a step, and teaches little while the model knows nothing."""
    mtp_weight: tuple[float, float] = (0.3, 0.1)
    """Before and after the decay begins, as the report lowers it."""
    gamma: float = 0.001
    gamma_until: float = 0.9

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.seq

    @property
    def steps(self) -> int:
        return max(1, self.tokens // self.tokens_per_step)

    def lr(self, done: float) -> float:
        if done < self.warmup:
            return self.peak_lr * (done / self.warmup)
        falling = max(0.0, (done - (1 - self.decay)) / self.decay)
        return self.final_lr + (self.peak_lr - self.final_lr) * 0.5 * (
            1 + math.cos(math.pi * min(1.0, falling))
        )

    def mtp(self, done: float) -> float:
        if done < self.mtp_from:
            return 0.0
        return self.mtp_weight[0] if done < 1 - self.decay else self.mtp_weight[1]


@dataclass(frozen=True)
class Batch:
    tokens: Tensor
    loss_mask: Tensor | None = None
    segments: Tensor | None = None


class PretrainData:
    """The token stream in its order, cut into rows of seq + 1 that overlap by the one token they share."""

    def __init__(self, folder: Path, skip: int = 0) -> None:
        """skip: tokens at the start of the stream that an earlier run has read."""
        self.stream = np.load(folder / "pretrain.npy", mmap_mode="r", allow_pickle=False)
        self.skip = skip

    def batch(self, step: int, stage: Stage) -> Batch:
        need = stage.tokens_per_step
        start = (self.skip + step * need) % (len(self.stream) - need - 1)
        flat = torch.from_numpy(self.stream[start : start + need + 1].astype(np.int64))
        rows = torch.arange(stage.rows).unsqueeze(1) * stage.seq + torch.arange(stage.seq + 1)
        return Batch(flat[rows])


class ChatData:
    """Packed chats with the mask of answers and the chat that each token belongs to."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        with np.load(folder / "sft.npz", allow_pickle=False) as arrays:
            self.arrays = {name: arrays[name] for name in ("tokens", "mask", "segment")}
        self.seed = seed

    def batch(self, step: int, stage: Stage) -> Batch:
        rows = len(self.arrays["tokens"])
        epoch, first = divmod(step * stage.rows, rows)
        order = np.random.default_rng((self.seed, epoch)).permutation(rows)
        pick = order[np.arange(first, first + stage.rows) % rows]
        tokens, mask, segment = (
            torch.from_numpy(self.arrays[name][pick].astype(np.int64))
            for name in ("tokens", "mask", "segment")
        )
        return Batch(tokens, mask.bool(), segment)


STAGES = {
    "pretrain": Stage(tokens=24_000_000),
    "sft": Stage(
        tokens=6_600_000,
        peak_lr=5e-4,
        final_lr=2e-5,
        decay=0.9,
        mtp_from=0.0,
        mtp_weight=(0.1, 0.1),
        gamma=0.0,
    ),
}


class Run:
    """A model in training and the folder it is saved in."""

    def __init__(self, folder: Path, stage: str, seed: int = 0) -> None:
        self.path = folder / stage
        self.path.mkdir(parents=True, exist_ok=True)
        self.model = Transformer(PRESETS["nano"])
        self.model.init_weights(torch.Generator().manual_seed(seed))
        self.model.bfloat16()
        self.optimizer = MasterAdamW(self.model)
        self.step = 0
        self.seconds = 0.0

    @property
    def checkpoint(self) -> Path:
        return self.path / "state.safetensors"

    def save(self) -> None:
        """Masters, moments and biases with the step, in one file that appears whole or not at all."""
        tensors = {name: t.contiguous() for name, t in self.optimizer.state().items()}
        tensors |= {f"buffer.{name}": b for name, b in self.model.named_buffers()}
        partial = self.checkpoint.with_suffix(".partial")
        save_file(tensors, partial, metadata={"step": str(self.step), "seconds": str(self.seconds)})
        os.replace(partial, self.checkpoint)

    def load(self, path: Path, weights_only: bool = False) -> None:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        buffers = dict(self.model.named_buffers())
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(tensors[f"buffer.{name}"])
        if weights_only:
            self.optimizer.load_masters(tensors)
            return
        self.optimizer.load_state(tensors)
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])

    def start_from(self, folder: Path) -> None:
        """Take the weights of a checkpoint folder, with fresh moments."""
        source = DeepseekV3.from_pretrained(folder, dtype=torch.float32)
        if source.config.replace(quantization_config=None, inert={}) != self.model.config.replace(inert={}):
            raise UserError(f"{folder} is a model of another shape than nano: give a checkpoint of nano")
        weights = source.state_dict()
        self.model.load_state_dict(weights)
        self.optimizer.load_masters({f"master.{name}": weights[name] for name in self.optimizer.masters})


def compile_pieces(model: Transformer) -> None:
    """Let torch's compiler fuse the small operations of attention, gates and feed-forwards.

    On a CPU they take longer than the matrix products; fused, a step takes two thirds of the time. Experts
    stay as they are: their shapes change with every batch. Needs a C++ compiler.
    """
    for module in model.modules():
        if isinstance(module, LatentAttention | Gate | FeedForward):
            module.compile()


def train(run: Run, stage: Stage, data: PretrainData | ChatData, save_every: float = 240.0) -> None:
    """Run the stage from where it stands to its end."""
    log = (run.path / "log.jsonl").open("a", encoding="utf-8")
    last_save = started = time.monotonic()
    before, first_step = run.seconds, run.step
    while run.step < stage.steps:
        done = run.step / stage.steps
        batch = data.batch(run.step, stage)
        losses = objective(run.model, batch.tokens, stage.mtp(done), batch.loss_mask, batch.segments)
        losses.total.backward()
        run.optimizer.accumulate()
        norm = run.optimizer.step(stage.lr(done))
        if done < stage.gamma_until and stage.gamma:
            update_biases(run.model, losses.loads, stage.gamma)
        run.step += 1
        now = time.monotonic()
        run.seconds = before + now - started

        imbalance = max(float(load.max() / load.float().mean()) for load in losses.loads.values())
        record = {
            "step": run.step,
            "tokens": run.step * stage.tokens_per_step,
            "loss": round(float(losses.main), 4),
            "mtp": None if losses.mtp is None else round(float(losses.mtp), 4),
            "balance": round(float(losses.balance), 4),
            "busiest_expert": round(imbalance, 2),
            "norm": round(norm, 3),
            "lr": stage.lr(done),
            "seconds": round(run.seconds, 1),
        }
        log.write(json.dumps(record) + "\n")
        if run.step % 20 == 0 or run.step == stage.steps:
            log.flush()
            rate = (run.step - first_step) / (now - started)
            left = (stage.steps - run.step) / rate
            print(
                f"step {run.step}/{stage.steps}  loss {record['loss']:.3f}  norm {norm:.2f}  "
                f"{rate * stage.tokens_per_step:,.0f} tokens/s  {left / 60:.1f} min left",
                flush=True,
            )
        if now - last_save > save_every:
            run.save()
            last_save = now
    run.save()
    log.close()


@torch.inference_mode()
def bits_per_byte(model: Transformer, data: Path, seq: int = 512) -> dict[str, float]:
    """Bits that the model needs per byte of held-out text, for each kind of text.

    Text is read in windows of `seq` tokens, each token predicted from those before it in its window.
    """
    result = {}
    with np.load(data / "heldout.npz", allow_pickle=False) as arrays:
        kinds = sorted(name.removesuffix("_tokens") for name in arrays.files if name.endswith("_tokens"))
        for kind in kinds:
            tokens = torch.from_numpy(arrays[f"{kind}_tokens"].astype(np.int64))
            nats = sum(_window_nats(model, window) for window in _windows(tokens, seq))
            result[kind] = nats / math.log(2) / int(arrays[f"{kind}_bytes"])
    return result


def _windows(tokens: Tensor, seq: int) -> Iterator[Tensor]:
    for start in range(0, len(tokens) - 1, seq):
        yield tokens[start : start + seq + 1]


def _window_nats(model: Transformer, window: Tensor) -> float:
    hidden, _ = model.features(window[:-1].unsqueeze(0), mtp=False)
    logits = model.lm_head(hidden[0]).float()
    return float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))


def main(argv: list[str] | None = None) -> int:
    """The command line of this module; see its docstring."""
    parser = argparse.ArgumentParser(prog="python -m dsv3.train.nano", description="Train the bundled model.")
    parser.add_argument("command", choices=["pretrain", "sft", "evaluate", "export"])
    parser.add_argument("data", type=Path, help="what `python -m dsv3.data.nano` wrote")
    parser.add_argument("run", type=Path, help="folder of the run; given again, it goes on")
    parser.add_argument("out", type=Path, nargs="?", help="export: the folder to write")
    parser.add_argument(
        "--stage", choices=list(STAGES), default="sft", help="evaluate, export: which weights"
    )
    parser.add_argument("--tokens", type=float, help="train on this many instead of the recipe's")
    parser.add_argument("--init", type=Path, help="start from the weights of this checkpoint folder")
    parser.add_argument("--skip", type=float, default=0, help="pretrain: tokens of the stream to leave out")
    parser.add_argument("--compile", action="store_true", help="fuse operations with torch.compile")
    args = parser.parse_args(argv)
    try:
        _dispatch(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _dispatch(args: argparse.Namespace) -> None:
    if args.command in ("evaluate", "export"):
        run = Run(args.run, args.stage)
        if not run.checkpoint.exists():
            raise UserError(f"{run.checkpoint} does not exist: train the stage {args.stage!r} first")
        run.load(run.checkpoint)
        if args.command == "evaluate":
            print(
                json.dumps({k: round(v, 4) for k, v in bits_per_byte(run.model, args.data).items()}, indent=2)
            )
        elif args.out is None:
            raise UserError("export needs the folder to write as its last argument")
        else:
            _export(run.model, args.data, args.out)
        return

    stage = STAGES[args.command]
    if args.tokens:
        stage = Stage(**(asdict(stage) | {"tokens": int(args.tokens)}))
    needed = args.data / ("pretrain.npy" if args.command == "pretrain" else "sft.npz")
    if not needed.exists():
        raise UserError(
            f"{needed} does not exist: make it with `python -m dsv3.data.nano MATERIAL {args.data}`"
        )
    data = PretrainData(args.data, int(args.skip)) if args.command == "pretrain" else ChatData(args.data)
    run = Run(args.run, args.command)
    if run.checkpoint.exists():
        run.load(run.checkpoint)
        print(f"going on from step {run.step}", flush=True)
    elif args.init is not None:
        run.start_from(args.init)
    elif args.command == "sft":
        base = args.run / "pretrain" / "state.safetensors"
        if not base.exists():
            raise UserError(f"{base} does not exist: run `pretrain` first")
        run.load(base, weights_only=True)
    if args.compile:
        compile_pieces(run.model)
    train(run, stage, data)


def _export(model: Transformer, data: Path, out: Path) -> None:
    """Write the checkpoint that ships: FP8 blocks, tokenizer, and how to sample from it."""
    shipped = DeepseekV3(model.config)
    shipped.load_state_dict(model.state_dict())
    shipped.bfloat16().save_pretrained(out, format="fp8")
    shutil.copyfile(data / "tokenizer.json", out / "tokenizer.json")
    special = {
        "bos_token": "<｜begin▁of▁sentence｜>",
        "eos_token": "<｜end▁of▁sentence｜>",
        "pad_token": "<｜▁pad▁｜>",
        "model_max_length": model.config.max_position_embeddings,
        "chat_template": DEEPSEEK_TEMPLATE,
    }
    sampling = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    for name, values in (("tokenizer_config.json", special), ("generation_config.json", sampling)):
        text = json.dumps(values, ensure_ascii=False, indent=2) + "\n"
        (out / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
