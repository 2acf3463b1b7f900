"""When training goes wrong: what it began with, and a dump of the step for whoever looks into it.

A loss that is no number says nothing of where it came from, since a NaN anywhere is a NaN everywhere soon after. So
the step is done once more, with a hook on every module, and what is not finite is looked for where it comes first:

- weights that are not finite already are the cause, whatever follows from them;
- else the first module, in the order of the model, whose output is not finite: by its own doing if its input is, else
  by what happens between modules (a residual sum that overflows shows up as the input of the norm after it);
- else it is in the backward pass, which goes the other way: the last module whose gradient is not finite.

Under a pipeline each process looks through its own part, and all compare.

A loss may also jump and stay finite: a corrupted shard, a rate too high. `SpikeGuard` compares each step with the
median of those before it, in units of their spread; both are robust, so that a noisy stretch does not hide a jump. It
takes logarithms, in which losses and gradient norms of any size look alike.

While all is well this costs a median over a few dozen numbers per step, and the model has no hooks.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from dsv3.data.stream import Batch
from dsv3.errors import UserError
from dsv3.files import write_whole
from dsv3.parallel.fsdp import first_row, local

_SIGMA = 1.4826  # of a normal distribution, over its median absolute deviation
_LEAST = {"loss": 0.005, "norm": 0.25}  # spread below which a jump is not worth a stop, in logarithms
_BEYOND = 1 << 20  # more than any model's layers


class SpikeGuard:
    """Says whether a step's loss, or its gradient's norm, is far above those of the steps before it."""

    def __init__(self, sigmas: float, window: int, state: Mapping[str, list[float]] | None = None) -> None:
        """sigmas: how far above the median is too far; window: steps that are compared with, and the first of which
        are not judged; state: what `state()` gave, to go on from.
        """
        self.sigmas, self.window = sigmas, window
        self._past = {name: deque((state or {}).get(name, ()), window) for name in _LEAST}

    def state(self) -> dict[str, list[float]]:
        """The numbers it compares with, for JSON."""
        return {name: list(values) for name, values in self._past.items()}

    def check(self, name: Literal["loss", "norm"], value: float) -> str | None:
        """What is wrong with this step's value, or None, and then it is one of those to compare with."""
        past = self._past[name]
        if len(past) == self.window:
            logs = [_log(x) for x in past]
            middle = statistics.median(logs)
            spread = _SIGMA * statistics.median(abs(x - middle) for x in logs)
            far = (_log(value) - middle) / max(spread, _LEAST[name])
            if far > self.sigmas:
                return (
                    f"{'the loss' if name == 'loss' else 'the norm of the gradient'} jumped to {value:.4g} from "
                    f"{math.exp(middle):.4g} ({far:.0f} sigma over {self.window} steps)"
                )
        past.append(value)
        return None


def _log(x: float) -> float:
    return math.log(max(x, 1e-30))


# Where it began -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """Where numbers first were not finite."""

    what: Literal["weights", "output", "input", "gradient"]
    place: str
    """Module or parameter, by its name in the whole model; an expert's with its number."""
    when: int = 0
    """Order in which this process saw it."""

    @property
    def layer(self) -> int:
        """Place in the model: layers by number, the embedding before, the head and MTP modules after."""
        kind, *rest = self.place.split(".")
        if kind == "embed_tokens":
            return -1
        if kind == "layers":
            return int(rest[0])
        return _BEYOND + (1 + int(rest[0]) if kind == "mtp" else 0)

    def __str__(self) -> str:
        return {
            "weights": f"weights of {self.place} are not finite",
            "output": f"{self.place} makes numbers that are not finite",
            "input": f"what goes into {self.place} is not finite",
            "gradient": f"the gradient of {self.place} is not finite",
        }[self.what]


@dataclass(frozen=True)
class Examination:
    """What a step looks like from inside."""

    found: Finding | None
    activations: dict[str, float]
    """The largest magnitude in each layer's output."""
    gradients: dict[str, float]
    """The norm of each layer's gradient; of several processes' shares of it, the largest."""

    def __str__(self) -> str:
        if self.found is not None:
            return str(self.found)
        parts = [
            f"the largest {kind} is {max(values, key=values.__getitem__)}'s ({max(values.values()):.3g})"
            for kind, values in (("gradient", self.gradients), ("activation", self.activations))
            if values
        ]
        return ", ".join(parts) or "every layer looks well"


def name_the_layer(
    model: nn.Module,
    again: Callable[[], object],
    first_expert: int = 0,
) -> Examination:
    """Do a step once more, and find where it goes wrong. All processes call this together, and get the same.

    model: what this process holds, with the parameter names of the whole model; again: runs forward and backward over
    this process's share of the batch, and leaves the gradients in the parameters' `.grad`; first_expert: number of the
    first expert that this process holds.
    """
    found, activations, backward = (
        list(_sick_weights(model, first_expert)),
        dict[str, float](),
        list[Finding](),
    )
    with _hooked(model, found, backward, activations), torch.compiler.set_stance("force_eager"):
        again()
    norms: dict[str, float] = {}
    for name, grad in ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None):
        norm = float(torch.linalg.vector_norm(local(grad).float()))
        norms[_layer(name)] = math.hypot(norms.get(_layer(name), 0.0), norm)
        if not math.isfinite(norm) and not _finite(grad):
            backward.append(Finding("gradient", name, _BEYOND))
    first = min(found, key=lambda f: (f.layer, f.when), default=None)
    last = min(backward, key=lambda f: (-f.layer, f.when), default=None)
    return _together(first, last, activations, norms)


def _together(
    first: Finding | None, last: Finding | None, activations: dict[str, float], norms: dict[str, float]
) -> Examination:
    mine = (first, last, activations, norms)
    told = [mine]
    if dist.is_initialized():
        told *= dist.get_world_size()
        dist.all_gather_object(told, mine)
    firsts = [found for found, _, _, _ in told if found is not None]
    lasts = [found for _, found, _, _ in told if found is not None]
    chosen = min(firsts, key=lambda f: (f.layer, f.what != "weights"), default=None)
    if chosen is None:
        chosen = max(lasts, key=lambda f: f.layer, default=None)
    return Examination(chosen, _largest([a for _, _, a, _ in told]), _largest([n for _, _, _, n in told]))


def _largest(several: list[dict[str, float]]) -> dict[str, float]:
    result: dict[str, float] = {}
    for values in several:
        for name, value in values.items():
            before = result.get(name, 0.0)
            result[name] = value if not value <= before else before  # what is no number stays
    return result


def _sick_weights(model: nn.Module, first_expert: int) -> Iterator[Finding]:
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if not _finite(weight):
            place = name
            if ".experts." in name and weight.dim() == 3:
                bad = [not _finite(expert) for expert in local(weight)].index(True)
                place = f"{name}[{first_expert + first_row(weight) + bad}]"
            yield Finding("weights", place, -1)


@contextmanager
def _hooked(
    model: nn.Module, found: list[Finding], backward: list[Finding], activations: dict[str, float]
) -> Iterator[None]:
    """While this lasts, modules note what is not finite, and layers how large their output is."""

    def after(name: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        outputs = list(_tensors(out))
        if name == _layer(name):
            sizes = [float(t.detach().abs().max()) for t in outputs if t.numel()]
            activations.update(_largest([activations, {name: max(sizes, default=0.0)}]))
        if not all(map(_finite, outputs)):
            healthy = all(map(_finite, _tensors((args, kwargs))))
            found.append(Finding("output" if healthy else "input", name, len(found)))
        for t in outputs:
            if t.requires_grad:
                t.register_hook(partial(comes_back, name))

    def comes_back(name: str, grad: Tensor) -> None:
        if not _finite(grad):
            backward.append(Finding("gradient", name, len(backward)))

    handles = [
        module.register_forward_hook(partial(after, name), with_kwargs=True)
        for name, module in model.named_modules()
        if name and not isinstance(module, nn.ModuleList | nn.ModuleDict)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those of floating point in a module's arguments or results."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _finite(t: Tensor) -> bool:
    return bool(torch.isfinite(local(t).detach()).all())


def _layer(name: str) -> str:
    """The layer that a module or parameter belongs to: `layers.3`, `mtp.0`, `embed_tokens`, `norm`, `lm_head`."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] in ("layers", "mtp") else parts[0]


# What is left of it ---------------------------------------------------------------------------------------


def dump(
    folder: Path,
    step: int,
    why: str,
    seen: Examination,
    batch: Batch | None,
    values: Mapping[str, Any] | None = None,
) -> Path:
    """Write what is needed to look into a step; returns the folder `stopped-STEP`. All processes call this together.

        report.json               why, what was found, activations and gradients by layer, and `values`
        batch-RANK.safetensors    tokens [rows, seq + 1], loss_mask and segments where there are any

    batch: this process's rows, or None where another writes them. The report comes last: where it is, all is whole.
    """
    place = folder / f"stopped-{step}"
    place.mkdir(parents=True, exist_ok=True)
    rank = dist.get_rank() if dist.is_initialized() else 0
    if batch is not None:
        tensors = {name: t.contiguous() for name, t in vars(batch).items() if t is not None}
        partial_file = place / f".batch-{rank}.{os.getpid()}.partial"
        try:
            save_file(tensors, partial_file, metadata={"step": str(step)})
            os.replace(partial_file, place / f"batch-{rank}.safetensors")
        finally:
            partial_file.unlink(missing_ok=True)
    if dist.is_initialized():
        dist.barrier()
    if rank == 0:
        found = None if seen.found is None else {"what": seen.found.what, "place": seen.found.place}
        report = {"step": step, "why": why, **(values or {}), **asdict(seen), "found": found}
        write_whole(place / "report.json", json.dumps(_plain(report), indent=2) + "\n")
    return place


def _plain(value: Any) -> Any:
    """JSON has no word for what is no finite number: a string."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def stopped(step: int, why: str, seen: Examination, place: Path) -> UserError:
    """What to tell whoever started the run."""
    return UserError(
        f"at step {step} {why}: {seen}; the batch and what each layer made of it are in {place}; the run stands at its "
        "last save: try a lower lr, or leave that text out"
    )
