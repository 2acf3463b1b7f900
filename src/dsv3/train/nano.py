"""Train the bundled model, `nano`, on a laptop's CPU.

    python -m dsv3.data.nano MATERIAL DATA             # text to tokens
    python -m dsv3.train.nano pretrain DATA RUN        # about three hours on two cores
    python -m dsv3.train.nano sft DATA RUN             # tune it to chat, half an hour
    python -m dsv3.train.nano evaluate DATA RUN        # bits per byte on held-out text
    python -m dsv3.train.nano export DATA RUN FOLDER   # an FP8 checkpoint as DeepSeek ships them

A short version of the report's recipe (section 4.2): AdamW with float32 masters under a bf16 model; warm-up,
constant rate, decay; loss of the next token plus MTP plus the sequence-wise balance loss; expert biases moved
by gamma after every step and left alone at the end. Every schedule is a function of the share of tokens
done. A run is saved every few minutes and goes on from there when the same command is given again, to the
same end: on a CPU with the same number of threads, to the same bits.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv3.checkpoint import DeepseekV3
from dsv3.checkpoint.writer import Format
from dsv3.config import PRESETS
from dsv3.data.nano_sources import SPECIALS
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
        self.path = folder / "pretrain.npy"
        self.tokens = _load(self.path)
        self.skip = skip

    def batch(self, step: int, stage: Stage) -> Batch:
        need = stage.tokens_per_step
        if len(self.tokens) <= need:
            raise UserError(f"{self.path} has {len(self.tokens)} tokens: one step reads {need + 1}")
        start = (self.skip + step * need) % (len(self.tokens) - need)
        flat = torch.from_numpy(self.tokens[start : start + need + 1].astype(np.int64))
        rows = torch.arange(stage.rows).unsqueeze(1) * stage.seq + torch.arange(stage.seq + 1)
        return Batch(flat[rows])


class ChatData:
    """Packed chats with the mask of answers and the chat that each token belongs to.

    Every epoch reads all rows, in an order of its own; a batch may hold the end of one and the start of the next.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.path = folder / "sft.npz"
        arrays = _load(self.path)
        try:
            self.tokens, self.mask, self.segment = (arrays[name] for name in ("tokens", "mask", "segment"))
        except KeyError as error:
            raise UserError(f"{self.path} has no array {error}: {_REMAKE}") from None
        if not len(self.tokens):
            raise UserError(f"{self.path} has no rows: {_REMAKE}")
        self.seed = seed

    def batch(self, step: int, stage: Stage) -> Batch:
        rows = len(self.tokens)
        wanted = range(step * stage.rows, (step + 1) * stage.rows)
        orders = {
            epoch: np.random.default_rng((self.seed, epoch)).permutation(rows)
            for epoch in {n // rows for n in wanted}
        }
        pick = [orders[n // rows][n % rows] for n in wanted]
        tokens, mask, segment = (
            torch.from_numpy(array[pick].astype(np.int64)) for array in (self.tokens, self.mask, self.segment)
        )
        return Batch(tokens, mask.bool(), segment)


_REMAKE = "make it with `python -m dsv3.data.nano MATERIAL DATA`"


def _load(path: Path) -> Any:
    """The array of an .npy file, mapped, or a dict of those of an .npz. Raises UserError if it is not whole."""
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {_REMAKE}") from None
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is broken ({error}): {_REMAKE}") from None


def _check_vocabulary(path: Path, tokens: Any, model: Transformer) -> None:
    known, largest = model.config.vocab_size, int(tokens.max(initial=0))
    if largest >= known:
        raise UserError(
            f"{path} has the token {largest}, but the model knows {known}: it is of another model"
        )


STAGES = {
    "pretrain": Stage(tokens=45_000_000),
    "sft": Stage(
        tokens=7_000_000,
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

    def __init__(self, folder: Path, stage: str, preset: str = "nano", seed: int = 0) -> None:
        self.path = folder / stage
        self.preset = preset
        self.model = Transformer(PRESETS[preset])
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
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is broken ({error}): remove it to start anew") from None
        buffers = dict(self.model.named_buffers())
        for name, master in self.optimizer.masters.items():
            stored = tensors.get(f"master.{name}")
            if stored is None or stored.shape != master.shape:
                raise UserError(f"{path} is a model of another shape than {self.preset}: give its --preset")
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
            raise UserError(
                f"{folder} is a model of another shape than {self.preset}: give a checkpoint of {self.preset}"
            )
        weights = source.state_dict()
        self.model.load_state_dict(weights)
        self.optimizer.load_masters({f"master.{name}": weights[name] for name in self.optimizer.masters})

    def weights(self) -> dict[str, Tensor]:
        """The model's state dict in float32: the masters, which have digits that the model has not."""
        return self.model.state_dict() | self.optimizer.masters

    def open_log(self) -> TextIO:
        """The log up to this step: what a killed run wrote after its last save will be written again."""
        path = self.path / "log.jsonl"
        partial = path.with_suffix(".partial")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
            kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= self.step]
            partial.write_text("".join(kept), encoding="utf-8")
            os.replace(partial, path)
            return path.open("a", encoding="utf-8")
        except OSError as error:
            problem = error.strerror or str(error)
            raise UserError(f"{self.path} cannot be written to ({problem}): name another folder") from None


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
    log = run.open_log()
    last_save = started = time.monotonic()
    before, first_step = run.seconds, run.step
    while run.step < stage.steps:
        done = run.step / stage.steps
        batch = data.batch(run.step, stage)
        losses = objective(run.model, batch.tokens, stage.mtp(done), batch.loss_mask, batch.segments)
        if not losses.total.isfinite():
            log.close()
            raise UserError(f"the loss is {losses.total.item()} at step {run.step}: try a lower peak_lr")
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
            log.flush()  # first: a log may run ahead of its checkpoint, never fall behind
            run.save()
            last_save = now
    log.close()
    run.save()


@torch.inference_mode()
def bits_per_byte(model: Transformer, data: Path, seq: int = 512) -> dict[str, float]:
    """Bits that the model needs per byte of held-out text, for each kind of text.

    Text is read in windows of `seq` tokens, each token predicted from those before it in its window. Special
    tokens are read but not counted, on either side: they are no bytes of the text.
    """
    path, result = data / "heldout.npz", {}
    arrays = _load(path)
    for kind in sorted(name.removesuffix("_tokens") for name in arrays if name.endswith("_tokens")):
        tokens = arrays[f"{kind}_tokens"]
        _check_vocabulary(path, tokens, model)
        windows = _windows(torch.from_numpy(tokens.astype(np.int64)), seq)
        nats = sum(_window_nats(model, window) for window in windows)
        result[kind] = nats / math.log(2) / int(arrays[f"{kind}_bytes"])
    return result


def _windows(tokens: Tensor, seq: int) -> Iterator[Tensor]:
    for start in range(0, len(tokens) - 1, seq):
        yield tokens[start : start + seq + 1]


def _window_nats(model: Transformer, window: Tensor) -> float:
    hidden, _ = model.features(window[:-1].unsqueeze(0), mtp=False)
    logits = model.lm_head(hidden[0]).float()
    each = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
    return float(each[window[1:] >= len(SPECIALS)].sum())


def main(argv: list[str] | None = None) -> int:
    """The command line of this module; see its docstring."""
    parser = argparse.ArgumentParser(prog="python -m dsv3.train.nano", description="Train the bundled model.")
    parser.add_argument("command", choices=["pretrain", "sft", "evaluate", "export"])
    parser.add_argument("data", type=Path, help="what `python -m dsv3.data.nano` wrote")
    parser.add_argument(
        "run", type=Path, help="folder of the run; given again, it goes on (evaluate: or of a checkpoint)"
    )
    parser.add_argument("out", type=Path, nargs="?", help="export: the folder to write")
    parser.add_argument(
        "--stage", choices=list(STAGES), default="sft", help="evaluate, export: which weights"
    )
    parser.add_argument("--format", choices=get_args(Format), default="fp8", help="export: of the weights")
    parser.add_argument("--tokens", type=float, help="train on this many instead of the recipe's")
    parser.add_argument("--init", type=Path, help="start from the weights of this checkpoint folder")
    parser.add_argument("--skip", type=float, default=0, help="pretrain: tokens of the stream to leave out")
    parser.add_argument("--compile", action="store_true", help="fuse operations with torch.compile")
    parser.add_argument("--save-every", type=float, default=240, metavar="SECONDS", help="default: 240")
    parser.add_argument("--preset", choices=["nano", "tiny"], default="nano", help="tiny is for a quick try")
    args = parser.parse_args(argv)
    try:
        _dispatch(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last save", file=sys.stderr)
        return 130
    return 0


def _dispatch(args: argparse.Namespace) -> None:
    if args.command == "evaluate":
        _evaluate(args)
    elif args.command == "export":
        if args.out is None:
            raise UserError("export needs the folder to write as its last argument")
        _export(_trained(args), args.data, args.out, args.format)
    else:
        _train(args)


def _trained(args: argparse.Namespace) -> Run:
    run = Run(args.run, args.stage, args.preset)
    if not run.checkpoint.exists():
        raise UserError(f"{run.checkpoint} does not exist: train the stage {args.stage!r} first")
    run.load(run.checkpoint)
    return run


def _evaluate(args: argparse.Namespace) -> None:
    is_checkpoint = (args.run / "config.json").exists()
    model = DeepseekV3.from_pretrained(args.run, torch.float32) if is_checkpoint else _trained(args).model
    found = {kind: round(bits, 4) for kind, bits in bits_per_byte(model, args.data).items()}
    print(json.dumps(found, indent=2))


def _train(args: argparse.Namespace) -> None:
    stage = STAGES[args.command]
    if args.tokens is not None:
        stage = replace(stage, tokens=_whole("--tokens", args.tokens, 1))
    skip = _whole("--skip", args.skip, 0)
    data = PretrainData(args.data, skip) if args.command == "pretrain" else ChatData(args.data)
    run = Run(args.run, args.command, args.preset)
    _check_vocabulary(data.path, data.tokens, run.model)
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
    train(run, stage, data, args.save_every)


def _whole(option: str, value: float, least: int) -> int:
    if not least <= value < math.inf:
        raise UserError(f"{option} is {value:g}: it must be at least {least}")
    return int(value)


def _export(run: Run, data: Path, out: Path, format: Format) -> None:
    """Write a checkpoint as it ships: weights (in FP8 blocks), tokenizer, and how to sample from it."""
    if not (data / "tokenizer.json").exists():
        raise UserError(f"{data / 'tokenizer.json'} does not exist: {_REMAKE}")
    shipped = DeepseekV3(run.model.config)
    shipped.load_state_dict(run.weights())
    shipped.save_pretrained(out, format)
    shutil.copyfile(data / "tokenizer.json", out / "tokenizer.json")
    special = {
        "bos_token": "<｜begin▁of▁sentence｜>",
        "eos_token": "<｜end▁of▁sentence｜>",
        "pad_token": "<｜▁pad▁｜>",
        "add_bos_token": True,
        "model_max_length": run.model.config.max_position_embeddings,
        "chat_template": DEEPSEEK_TEMPLATE,
    }
    sampling = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    for name, values in (("tokenizer_config.json", special), ("generation_config.json", sampling)):
        text = json.dumps(values, ensure_ascii=False, indent=2) + "\n"
        (out / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
