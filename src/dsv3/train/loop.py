"""The training loop: one step, and one after another until the tokens are read.

A step reads a batch, runs it through the model a microbatch at a time while gradients add up in float32, clips,
updates, and moves the experts' biases against the load of the whole batch. Every quantity that changes over a run
is read off its schedule at the tokens done so far.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dsv3.data.stream import Batch, ChatStream, TokenStream
from dsv3.errors import UserError
from dsv3.parallel.watch import doing, waiting
from dsv3.recipe import Stop
from dsv3.recipe.train import Plan
from dsv3.train.guard import SpikeGuard, dump, name_the_layer, stopped
from dsv3.train.loss import Losses, Targets, objective, update_biases
from dsv3.train.metrics import MetricsLog, Progress, StepMetrics
from dsv3.train.run import Run

Stream = TokenStream | ChatStream
FlopsShare = Callable[[float, bool], float]
"""What share of the machine's matmul rate so many tokens per second are, with the MTP modules running or not."""


@dataclass
class StepLosses:
    """The parts of one step's loss, in nats per token, over the whole batch."""

    main: float = 0.0
    mtp: float | None = None
    balance: float = 0.0
    loads: dict[int, Tensor] = field(default_factory=dict)
    """For each MoE layer [n_routed_experts]: how many tokens each expert was given."""
    choices: int = 0
    """How many experts all tokens chose, in all layers."""

    @property
    def busiest(self) -> dict[int, float]:
        """The busiest expert's load over the mean, for each MoE layer."""
        return {layer: float(load.max() / load.float().mean()) for layer, load in self.loads.items()}

    @property
    def dropped(self) -> int:
        """Choices that no expert was given. There is no capacity that could be exceeded, so there are none."""
        return self.choices - sum(int(load.sum()) for load in self.loads.values())


def microbatches(batch: Batch, rows: int, device: torch.device) -> Iterator[Batch]:
    """The batch in parts of at most so many rows, on a device."""
    for start in range(0, batch.tokens.shape[0], rows):
        parts = (
            None if t is None else t[start : start + rows].to(device, non_blocking=True)
            for t in (batch.tokens, batch.loss_mask, batch.segments)
        )
        yield Batch(*parts)  # type: ignore[arg-type]


def backward(run: Run, batch: Batch, rows: int, mtp_weight: float) -> StepLosses:
    """Add the gradients of a batch to the optimiser's, `rows` sequences at a time.

    On several processes `batch` is this one's share of the rows; what is returned is of all together.
    """
    return _summed(run, _gradients(run, batch, rows, mtp_weight, run.optimizer.accumulate), mtp_weight > 0)


def _gradients(
    run: Run, batch: Batch, rows: int, mtp_weight: float, accumulate: Callable[[], None] = lambda: None
) -> list[Losses]:
    """Forward and backward passes of a batch; `accumulate` is called whenever parameters have gradients.

    Gives the losses of each microbatch in each stage of this process.
    """
    team, config = run.team, run.model.config
    modules = config.num_nextn_predict_layers if mtp_weight else 0
    whole = Targets.of(batch, modules)
    if team is not None:
        whole = Targets(*team.counted(whole.rows, whole.counted))
    parts = list(microbatches(batch, rows, run.device))
    done: list[Losses] = []

    def forward(stage: int, microbatch: int, hidden: Tensor | None) -> tuple[Tensor | None, Tensor]:
        span, places = (None, None) if team is None else (team.spans[stage], team.places)
        losses = objective(run.model, parts[microbatch], mtp_weight, whole, span, hidden, places)
        done.append(replace(losses, total=losses.total.detach(), hidden=None))
        return losses.hidden, losses.total

    if team is not None and team.layout.pipeline > 1:
        shape = parts[0].tokens.shape[0], parts[0].tokens.shape[1] - 1
        team.pipeline(*shape, run.dtype).run(len(parts), forward, accumulate)
    else:
        for microbatch in range(len(parts)):
            forward(0, microbatch, None)[1].backward()
            accumulate()
    return done


def _summed(run: Run, parts: Sequence[Losses], mtp: bool) -> StepLosses:
    """The losses and loads of a step, of all microbatches, stages and processes."""
    config = run.model.config
    last = config.num_hidden_layers + config.num_nextn_predict_layers
    layers = [layer for layer in range(last) if config.is_moe_layer(layer)]
    losses = torch.zeros(3, dtype=torch.float64, device=run.device)
    counts = torch.zeros(len(layers) + 1, config.n_routed_experts or 1, dtype=torch.int64, device=run.device)
    for part in parts:
        for i, loss in enumerate((part.main, part.mtp, part.balance)):
            losses[i] += 0.0 if loss is None else loss
        for layer, load in part.loads.items():
            counts[layers.index(layer)] += load
        counts[-1, 0] += part.choices
    if run.team is not None:
        run.team.sum(losses, counts)
    main, ahead, balance = losses.tolist()
    loads = {layer: load for layer, load in zip(layers, counts, strict=False) if int(load.sum())}
    return StepLosses(main, ahead if mtp else None, balance, loads, int(counts[-1, 0]))


@dataclass
class Loop:
    """What a phase is trained with."""

    run: Run
    plan: Plan
    stream: Stream
    microbatch: int
    clip: float = 1.0
    save_every: float = 240.0
    """Seconds between saves."""
    flops_share: FlopsShare | None = None
    stop: Stop = field(default_factory=Stop)


def train(loop: Loop, log: MetricsLog | None) -> None:
    """Run a phase from where it stands to its end, and save it.

    log: None for a process that does not speak for all. Raises UserError when the loss or the gradient is no number,
    or jumps further than the recipe bears.
    """
    run, plan, stream = loop.run, loop.plan, loop.stream
    position, team = run.position, run.team
    position.planned = plan.tokens
    if position.stream is not None:
        stream.load_state(position.stream)
    spikes = None
    if loop.stop.spike is not None:
        spikes = SpikeGuard(loop.stop.spike, loop.stop.window, position.past)
    last_save = time.monotonic()
    with closing(Progress(plan.tokens)) as shown:
        while not position.done:
            metrics = take_step(loop, spikes)
            if log is not None:
                log.write(metrics)
                shown.show(metrics, position.step + plan.steps_left(position.tokens))
            due = time.monotonic() - last_save > loop.save_every
            if due if team is None else team.first_says(due):
                waiting("saving")
                save(run, stream)
                last_save = time.monotonic()
    waiting("saving")
    save(run, stream, wait=True)


def take_step(loop: Loop, spikes: SpikeGuard | None = None) -> StepMetrics:
    """One optimiser step, by the schedules' values at the tokens done before it."""
    run, plan = loop.run, loop.plan
    started, position = time.monotonic(), run.position
    at, rows = position.tokens, plan.rows(position.tokens)
    lr, mtp_weight, gamma = plan.lr(at), plan.mtp(at), plan.gamma(at)
    doing("reading", position.step + 1)
    batch = loop.stream.next(rows, slice(None) if run.team is None else run.team.rows(rows))
    doing("training")
    losses = backward(run, batch, loop.microbatch, mtp_weight)
    norm = run.optimizer.norm()
    why = None
    if not (math.isfinite(losses.main) and math.isfinite(norm)):
        why = f"the loss is {losses.main:.4g} and the gradient's norm {norm:.4g}"
    elif spikes is not None:
        why = spikes.check("loss", losses.main) or spikes.check("norm", norm)
        position.past = spikes.state()
    if why is not None:
        raise look_into(loop, batch, mtp_weight, why)
    run.optimizer.step(lr, loop.clip)
    if gamma:
        update_biases(run.model, losses.loads, gamma)
    if run.ema is not None:
        run.ema.update()

    seconds = time.monotonic() - started
    position.step += 1
    position.tokens += rows * plan.sequence_length
    position.seconds += seconds
    busiest, rate = losses.busiest, rows * plan.sequence_length / seconds
    return StepMetrics(
        step=position.step,
        tokens=position.tokens,
        loss=losses.main,
        mtp=losses.mtp,
        balance=losses.balance,
        norm=norm,
        lr=lr,
        batch=rows,
        gamma=gamma,
        mtp_weight=mtp_weight,
        load=max(busiest.values(), default=1.0),
        loads=busiest,
        dropped=losses.dropped,
        tokens_per_second=rate,
        flops_share=None if loop.flops_share is None else loop.flops_share(rate, mtp_weight > 0),
        seconds=position.seconds,
    )


def look_into(loop: Loop, batch: Batch, mtp_weight: float, why: str) -> UserError:
    """Do a step that went wrong once more, find out where, and write down what it was; gives what to say of it."""
    run, step = loop.run, loop.run.position.step + 1
    doing("looking into what went wrong")
    mine = run.team is None or run.team.reads
    seen = name_the_layer(
        run.model,
        lambda: _gradients(run, batch, loop.microbatch, mtp_weight),
        0 if run.team is None else run.team.first_expert,
    )
    return stopped(step, why, seen, dump(run.folder, step, why, seen, batch if mine else None))


@torch.no_grad()
def save(run: Run, stream: Stream, wait: bool = False) -> None:
    """Save the run with the data's place; `wait` until it is on the disk."""
    run.position.stream = stream.state()
    run.save(wait)
