"""The training loop: one step, and one after another until the tokens are read.

A step reads a batch, runs it through the model a microbatch at a time while gradients add up in float32, clips,
updates, and moves the experts' biases against the load of the whole batch. Every quantity that changes over a run
is read off its schedule at the tokens done so far.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv3.data.stream import Batch, ChatStream, TokenStream
from dsv3.errors import UserError
from dsv3.recipe.train import Plan
from dsv3.train.loss import Targets, objective, update_biases
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
    """Add the gradients of a whole batch to the optimiser's, `rows` sequences at a time."""
    whole = Targets.of(batch, len(run.model.mtp) if mtp_weight else 0)
    result = StepLosses(mtp=0.0 if mtp_weight and len(run.model.mtp) else None)
    for part in microbatches(batch, rows, run.model.lm_head.weight.device):
        losses = objective(run.model, part, mtp_weight, whole)
        losses.total.backward()
        run.optimizer.accumulate()
        result.main += 0.0 if losses.main is None else float(losses.main)
        result.balance += float(losses.balance)
        if result.mtp is not None and losses.mtp is not None:
            result.mtp += float(losses.mtp)
        for layer, load in losses.loads.items():
            result.loads[layer] = result.loads.get(layer, 0) + load
        result.choices += losses.choices
    return result


def train(
    run: Run,
    plan: Plan,
    stream: Stream,
    log: MetricsLog,
    microbatch: int,
    clip: float = 1.0,
    save_every: float = 240.0,
    flops_share: FlopsShare | None = None,
) -> None:
    """Run a phase from where it stands to its end, and save it.

    save_every: seconds between saves. Raises UserError when the loss or the gradient is no number.
    """
    position = run.position
    position.planned = plan.tokens
    if position.stream is not None:
        stream.load_state(position.stream)
    last_save = time.monotonic()
    with closing(Progress(plan.tokens)) as shown:
        while not position.done:
            metrics = take_step(run, plan, stream, microbatch, clip, flops_share)
            log.write(metrics)
            shown.show(metrics, position.step + plan.steps_left(position.tokens))
            if time.monotonic() - last_save > save_every:
                save(run, stream)
                last_save = time.monotonic()
    save(run, stream)


def take_step(
    run: Run, plan: Plan, stream: Stream, microbatch: int, clip: float, flops_share: FlopsShare | None
) -> StepMetrics:
    """One optimiser step, by the schedules' values at the tokens done before it."""
    started, position = time.monotonic(), run.position
    at, rows = position.tokens, plan.rows(position.tokens)
    lr, mtp_weight, gamma = plan.lr(at), plan.mtp(at), plan.gamma(at)
    losses = backward(run, stream.next(rows), microbatch, mtp_weight)
    norm = run.optimizer.step(lr, clip) if math.isfinite(losses.main) else math.nan
    if not math.isfinite(norm):
        raise UserError(
            f"at step {position.step + 1} the loss is {losses.main:.4g} and the gradient's norm {norm:.4g}: "
            "try a lower lr; the run stands at its last save"
        )
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
        flops_share=None if flops_share is None else flops_share(rate, mtp_weight > 0),
        seconds=position.seconds,
    )


@torch.no_grad()
def save(run: Run, stream: Stream) -> None:
    """Save the run with the data's place."""
    run.position.stream = stream.state()
    run.save()
