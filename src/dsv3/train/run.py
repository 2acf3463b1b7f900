"""A phase of training as it stands: the model, the optimiser, the data's place, and the folder it is saved in.

    RUN/recipe.json                what is being trained; another recipe is refused
    RUN/data/                      tokens, if the recipe's data was built here
    RUN/PHASE/state.safetensors    masters, moments, biases, moving average, and where the data stands
    RUN/PHASE/metrics.jsonl        a line per step
    RUN/PHASE/heldout.json, plots/ what came of it
    RUN/model/                     the checkpoint at the end

The state is one file that appears whole or not at all, so a run that is killed at any moment goes on from its last
save, and on a CPU ends in the same bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv3.checkpoint import DeepseekV3
from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.model import Transformer
from dsv3.recipe import OptimizerRecipe
from dsv3.train.ema import Ema
from dsv3.train.optimizer import MasterAdamW

MOMENTS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Position:
    """How far a phase is."""

    step: int = 0
    tokens: int = 0
    planned: int = 0
    """Tokens at which the phase ends."""
    seconds: float = 0.0
    stream: dict[str, Any] | None = None
    """Where the data stands."""

    @property
    def done(self) -> bool:
        return self.tokens >= self.planned


class Run:
    """A model in training."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        optimizer: OptimizerRecipe,
        seed: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
    ) -> None:
        self.folder = folder
        self.model = Transformer(config)
        self.model.init_weights(torch.Generator().manual_seed(seed))
        self.model.to(device=device, dtype=dtype)
        self.optimizer = MasterAdamW(
            self.model,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            weight_decay=optimizer.weight_decay,
            eps=optimizer.eps,
            moments=MOMENTS[optimizer.moments],
        )
        self.ema = None if optimizer.ema is None else Ema(self.optimizer.masters, optimizer.ema)
        self.position = Position()

    @property
    def checkpoint(self) -> Path:
        return state_file(self.folder)

    def save(self) -> None:
        """Write the state, in one file that appears whole or not at all."""
        tensors = {name: t.contiguous() for name, t in self.optimizer.state().items()}
        tensors |= {f"buffer.{name}": b for name, b in self.model.named_buffers()}
        if self.ema is not None:
            tensors |= self.ema.state()
        partial = self.checkpoint.with_suffix(f".{os.getpid()}.partial")
        try:
            save_file(tensors, partial, metadata={"position": json.dumps(vars(self.position))})
            os.replace(partial, self.checkpoint)
        finally:
            partial.unlink(missing_ok=True)

    def resume(self) -> None:
        """Go on from this phase's own state."""
        tensors, self.position = read_state(self.checkpoint)
        self._check(tensors)
        self.optimizer.load_state(tensors)
        self._load_rest(tensors)

    def follow(self, state: Path, fresh_moments: bool) -> None:
        """Start from the state in which the phase before ended. Raises UserError if it has not ended."""
        tensors, position = read_state(state)
        if not position.done:
            raise UserError(
                f"{state.parent} is at {position.tokens:,} of {position.planned:,} tokens: train that stage to its "
                "end first"
            )
        self._check(tensors)
        if fresh_moments:
            self.optimizer.load_masters(tensors)
        else:
            self.optimizer.load_state(tensors)
        self._load_rest(tensors)

    def start_from(self, folder: Path) -> None:
        """Start from the weights of a checkpoint folder, with fresh moments."""
        source = DeepseekV3.from_pretrained(folder, dtype=torch.float32)
        weights = source.state_dict()
        shapes = {name: t.shape for name, t in self.model.state_dict().items()}
        if {name: t.shape for name, t in weights.items()} != shapes:
            raise UserError(
                f"{folder} is a model of another shape than the recipe's: name a checkpoint of that"
            )
        self.model.load_state_dict(weights)
        self.optimizer.load_masters({f"master.{name}": weights[name] for name in self.optimizer.masters})
        if self.ema is not None:
            self.ema.load_state({f"ema.{name}": m for name, m in self.optimizer.masters.items()})

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        wanted = {f"master.{name}": m.shape for name, m in self.optimizer.masters.items()}
        wanted |= {f"buffer.{name}": b.shape for name, b in self.model.named_buffers()}
        if self.ema is not None:
            wanted |= {f"ema.{name}": m.shape for name, m in self.optimizer.masters.items()}
        for name, shape in wanted.items():
            if name not in tensors or tensors[name].shape != shape:
                raise UserError(
                    f"{self.folder.parent} is the run of another recipe ({name} differs): name another --out"
                )

    @torch.no_grad()
    def _load_rest(self, tensors: Mapping[str, Tensor]) -> None:
        for name, buffer in self.model.named_buffers():
            buffer.copy_(tensors[f"buffer.{name}"])
        if self.ema is not None:
            self.ema.load_state(tensors)


def state_file(folder: Path) -> Path:
    """The file of a phase's state."""
    return folder / "state.safetensors"


def read_state(path: Path) -> tuple[dict[str, Tensor], Position]:
    """The tensors of a saved phase, and how far it is. Raises UserError if there is none, or it is broken."""
    with _opened(path) as file:
        position = _position(file)
        return {name: file.get_tensor(name) for name in file.keys()}, position  # noqa: SIM118


def read_position(path: Path) -> Position:
    """How far a saved phase is, without its tensors; raises as `read_state`."""
    with _opened(path) as file:
        return _position(file)


def _position(file: Any) -> Position:
    return Position(**json.loads((file.metadata() or {})["position"]))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A state file; what is wrong with it while it is read is said in one line."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: train the stage before it first") from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is broken ({error}): remove it to start the phase anew") from None


def trained_model(config: ModelConfig, state: Path, average: bool = False) -> DeepseekV3:
    """The model that a phase has come to, in float32: its masters, or their moving average."""
    tensors, _ = read_state(state)
    kind = "ema" if average else "master"
    weights = {
        name.removeprefix(f"{start}."): t.float()
        for start in (kind, "buffer")
        for name, t in tensors.items()
        if name.startswith(f"{start}.")
    }
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    model = DeepseekV3(config)
    model.load_state_dict(weights)
    return model
