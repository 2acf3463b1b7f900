"""A phase of training as it stands: the model, the optimiser, the data's place, and the folder it is saved in.

    RUN/recipe.json                what is being trained; another recipe is refused
    RUN/data/                      tokens, if the recipe's data was built here
    RUN/PHASE/state-*/             masters, moments, biases, moving average, and where the data stands
    RUN/PHASE/metrics.jsonl        a line per step
    RUN/PHASE/heldout.json, plots/ what came of it
    RUN/model/                     the checkpoint at the end

A state appears whole or not at all (`dsv3.train.state`), so a run that is killed at any moment goes on from its last
save, and on a CPU ends in the same bits. Among several processes each has its part of the model, and of the state; all
of them save and load at the same time.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dsv3.checkpoint import DeepseekV3
from dsv3.checkpoint.names import table
from dsv3.checkpoint.reader import open_checkpoint
from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.kernels.packed import Packed, dequantize
from dsv3.parallel.fsdp import local
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.sharding import Held, build, holdings
from dsv3.recipe import OptimizerRecipe
from dsv3.train.ema import Ema
from dsv3.train.optimizer import MasterAdamW
from dsv3.train.state import Piece, Position, Saver, latest, read_position, read_state
from dsv3.train.team import Team

MOMENTS = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Run:
    """A model in training, or this process's part of it."""

    team: Team | None = None
    """The other processes, if there are any."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        optimizer: OptimizerRecipe,
        seed: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
        mesh: Mesh | None = None,
    ) -> None:
        self.folder, self.dtype, self.device = folder, dtype, torch.device(device)
        self.model = build(config, mesh, seed, dtype, self.device)
        self.held = holdings(self.model, mesh)
        self.optimizer = MasterAdamW(
            self.model,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            weight_decay=optimizer.weight_decay,
            eps=optimizer.eps,
            moments=MOMENTS[optimizer.moments],
            held=None if mesh is None else self.held,
            share=mesh is not None and mesh.layout.sharding != "none",
        )
        self.ema = None if optimizer.ema is None else Ema(self.optimizer.masters, optimizer.ema)
        self.position = Position()
        self._saver = Saver(folder, mesh is not None)

    def saved(self) -> bool:
        """Whether there is a state to go on from."""
        return latest(self.folder) is not None

    def save(self, wait: bool = False) -> None:
        """Write the state, in the background unless asked to `wait`. All processes call this."""
        self.position.updates = self.optimizer.steps
        self._saver.save(self.tensors(), self.position)
        if wait:
            self._saver.wait()

    def resume(self) -> None:
        """Go on from this phase's own state."""
        self.position = read_state(self.folder, self.tensors())
        self.optimizer.steps = self.position.updates
        self.optimizer.write_weights()

    def follow(self, before: Path, fresh_moments: bool) -> None:
        """Start from the state in which the phase before ended. Raises UserError if it has not ended."""
        position = read_position(before)
        if not position.done:
            raise UserError(
                f"{before} is at {position.tokens:,} of {position.planned:,} tokens: train that stage to its end first"
            )
        tensors = self.tensors()
        if fresh_moments:
            tensors = {name: t for name, t in tensors.items() if not name.startswith("exp_avg")}
        read_state(before, tensors)
        self.optimizer.steps = 0 if fresh_moments else position.updates
        self.optimizer.write_weights()

    @torch.no_grad()
    def start_from(self, folder: Path) -> None:
        """Start from the weights of a checkpoint folder, with fresh moments; reads no more than is held here."""
        checkpoint, wanted = open_checkpoint(folder), table(self.model.config)
        if {name: piece.shape for name, piece in checkpoint.pieces.items()} != {
            name: piece.shape for name, piece in wanted.items()
        }:
            raise UserError(
                f"{folder} is a model of another shape than the recipe's: name a checkpoint of that"
            )
        weights = {name: torch.empty(local(p).shape) for name, p in self.model.named_parameters()}
        buffers = dict(self.model.named_buffers())
        for piece, stored in checkpoint.stream():
            target = buffers.get(piece.parameter, weights.get(piece.parameter))
            if piece.copy_of is not None or target is None:
                continue
            _copy_rows(target, self.held.get(piece.parameter), piece.index, stored)
        self.optimizer.begin_from(weights)
        if self.ema is not None:
            self.ema.begin()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a state holds of this process, to be written, or read into: `Piece`s, and biases."""
        tensors: dict[str, Tensor] = {f"buffer.{name}": b for name, b in self.model.named_buffers()}
        for key, tensor in (self.optimizer.state() | ({} if self.ema is None else self.ema.state())).items():
            name = key.partition(".")[2]
            held = self.held[name]
            tensors[key] = Piece.of(tensor, held.start + self.optimizer.starts[name], held.shape.numel())
        return tensors


def _copy_rows(
    target: Tensor, held: Held | None, index: tuple[int | slice, ...], stored: Tensor | Packed
) -> None:
    """Copy `stored`, which is `whole[index]`, into those rows of the whole that are here."""
    first = 0 if held is None else held.start // held.shape[1:].numel()
    end = first + len(target)
    if index and isinstance(index[0], int):  # one expert of a stack
        if first <= index[0] < end:
            target[(index[0] - first, *index[1:])].copy_(_plain(stored))
        return
    begin = index[0].start if index and isinstance(index[0], slice) else 0
    low, high = max(begin, first), min(begin + stored.shape[0], end)
    if low < high:
        target[low - first : high - first].copy_(_plain(stored)[low - begin : high - begin])


def _plain(stored: Tensor | Packed) -> Tensor:
    return dequantize(stored) if isinstance(stored, Packed) else stored


def trained_model(config: ModelConfig, folder: Path, average: bool = False) -> DeepseekV3:
    """The model that a phase has come to, in float32, in one process: its masters, or their moving average.

    Whatever layout it was trained in. Takes four bytes of memory for each parameter of the whole model.
    """
    model = DeepseekV3(config)
    kind = "ema" if average else "master"
    tensors: dict[str, Tensor] = {
        f"{kind}.{name}": Piece.of(p.detach(), 0, p.numel()) for name, p in model.named_parameters()
    }
    read_state(folder, tensors | {f"buffer.{name}": b for name, b in model.named_buffers()})
    return model
