"""Every schedule, really run by as many processes, gives the loss and the gradients of one process."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from dsv3.config import PRESETS, ModelConfig
from dsv3.data.stream import Batch
from dsv3.model import Transformer
from dsv3.model.moe import MoE
from dsv3.parallel.deferred import apply_deferral
from dsv3.parallel.experts import apply_expert_parallel
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.part import Part, Span, spans
from dsv3.parallel.pipeline import Pipeline
from dsv3.planner.pipeline import Op, Slot, make_schedule
from dsv3.planner.simulate import Costs, peak_activations, simulate
from dsv3.recipe.layout import Layout
from dsv3.train.loss import Targets, objective
from dsv3.train.recompute import apply_recompute
from tests.parallel.processes import run

# 8 units: the embedding, one dense and four MoE layers, an MTP module, the head. On 8 stages the first has no layer,
# the one before the last nothing at all.
CONFIG = PRESETS["tiny"].replace(num_hidden_layers=5, num_nextn_predict_layers=1, aux_loss_alpha=0.3)
SEQ = 9


@dataclass(frozen=True)
class Case:
    """A layout and a batch of `microbatches` times `rows` sequences for each data place."""

    layout: Layout
    microbatches: int
    rows: int = 1
    tied: bool = False
    chats: bool = False
    recompute: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def config(self) -> ModelConfig:
        return CONFIG.replace(tie_word_embeddings=self.tied)

    @property
    def batch(self) -> Batch:
        generator = torch.Generator().manual_seed(7)
        shape = self.layout.data * self.microbatches * self.rows, SEQ + 1
        tokens = torch.randint(CONFIG.vocab_size, shape, generator=generator)
        if not self.chats:
            return Batch(tokens, None, None)
        starts = torch.rand(shape, generator=generator) < 0.3
        return Batch(tokens, torch.rand(shape, generator=generator) < 0.6, starts.cumsum(1))

    def part(self, microbatch: int, data: int = 0) -> Batch:
        start = (data * self.microbatches + microbatch) * self.rows
        rows = slice(start, start + self.rows)
        batch = self.batch
        return Batch(
            *(None if t is None else t[rows] for t in (batch.tokens, batch.loss_mask, batch.segments))
        )

    def model(self) -> Transformer:
        model = Transformer(self.config)
        model.init_weights()
        return model.to(self.dtype)


def layout(schedule: str, pipeline: int, **more: Any) -> Layout:
    return Layout(pipeline=pipeline, schedule=schedule, **more)  # type: ignore[arg-type]


CASES = {
    1: [Case(layout("1f1b", 1), 3, rows=2), Case(layout("dualpipe", 1), 3)],
    2: [
        Case(layout("1f1b", 2), 5, rows=2),
        Case(layout("1f1b", 2), 1, chats=True),
        Case(layout("interleaved", 2, chunks=3), 4, tied=True),
        Case(layout("zb1p", 2), 3, rows=2, chats=True),
        Case(layout("dualpipe", 2), 4, rows=2, tied=True),
        Case(layout("dualpipe", 2), 6, chats=True, recompute=True),
        Case(layout("dualpipev", 2), 5, rows=2, tied=True, recompute=True),
    ],
    4: [
        Case(layout("1f1b", 4), 6, tied=True),
        Case(layout("interleaved", 4, chunks=2), 4, chats=True),
        Case(layout("zb1p", 4), 6, tied=True, recompute=True),
        Case(layout("dualpipe", 4), 10),
        Case(layout("dualpipev", 4), 9, tied=True, chats=True),
        Case(layout("dualpipe", 2, data=2), 4, rows=2),
    ],
    8: [Case(layout("dualpipe", 8), 18, tied=True)],
}
WITH_EXPERTS = {
    4: [
        Case(layout("1f1b", 2, data=2, expert=2), 3, rows=2),
        Case(layout("dualpipev", 2, data=2, expert=2), 4, rows=2),
    ],
    8: [Case(layout("dualpipe", 2, data=4, expert=4, nodes=2), 4, rows=2, tied=True, recompute=True)],
}


# In the processes --------------------------------------------------------------------------------------


@dataclass
class Result:
    """What one process saw of one case."""

    loss: float
    gradients: dict[str, np.ndarray]
    """Added up in float32."""
    slots: list[Slot]
    """By the runtime's own account."""
    seen: list[Op]
    """Forward and backward passes in the order in which the model's code ran."""
    times: list[tuple[float, float]]
    graphs: int
    """The most that were alive at once."""
    passed: list[str]
    """F or B for each gate, and for each layer's experts, that were passed forward or backward."""


class Sums(dict[str, Tensor]):
    """Gradients in float32."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def add(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self[name] = self.get(name, torch.zeros(())) + parameter.grad.float()
                parameter.grad = None


def part_of(case: Case, mesh: Mesh) -> Part:
    pieces = spans(case.config, case.layout.stages)
    model = Part(case.model(), [pieces[s] for s in mesh.stages])
    if case.layout.expert > 1:
        apply_expert_parallel(model, mesh, "bf16")
    if case.recompute:
        apply_recompute(model)
    apply_deferral(model)
    return model


def run_case(case: Case) -> Result:
    mesh = Mesh.of(case.layout)
    model, pieces = part_of(case, mesh), spans(case.config, case.layout.stages)
    whole, sums = Targets.of(case.batch, 1), Sums(model)
    losses: list[Tensor] = []
    seen: list[Op] = []
    alive: list[weakref.ref[Tensor]] = []
    graphs, order = 0, []

    def passed(module: nn.Module, args: Any, out: Tensor | tuple[Tensor, ...]) -> None:
        order.append("F")
        first = out if isinstance(out, Tensor) else out[0]
        first.register_hook(lambda grad: order.append("B"))

    for module in model.modules():
        if isinstance(module, MoE):
            module.gate.register_forward_hook(passed)
            module.experts.register_forward_hook(passed)

    def forward(stage: int, microbatch: int, hidden: Tensor | None) -> tuple[Tensor | None, Tensor]:
        nonlocal graphs
        seen.append(Op("F", stage, microbatch))
        made = objective(model, case.part(microbatch, mesh.data), 0.3, whole, pieces[stage], hidden)
        losses.append(made.total.detach())
        end = made.total if made.hidden is None else made.hidden.clone()
        end.register_hook(lambda grad: seen.append(Op("B", stage, microbatch)))
        alive.append(weakref.ref(end))
        graphs = max(graphs, sum(ref() is not None for ref in alive))
        return (None, end) if made.hidden is None else (end, made.total)

    shape = case.rows, SEQ, case.config.hidden_size
    events = Pipeline(mesh, shape, case.dtype).run(case.microbatches, forward, sums.add)
    assert not any(ref() is not None for ref in alive)
    return Result(
        loss=float(sum(losses)),
        gradients={name: grad.numpy() for name, grad in sums.items()},
        slots=[event.slot for event in events],
        seen=seen,
        times=[(event.start, event.end) for event in events],
        graphs=graphs,
        passed=order,
    )


def run_cases(cases: list[Case]) -> list[Result]:
    return [run_case(case) for case in cases]


# Against one process -----------------------------------------------------------------------------------


def whole_batch(case: Case) -> tuple[float, dict[str, Tensor]]:
    model = case.model()
    sums = Sums(model)
    loss = objective(model, case.batch, 0.3).total
    loss.backward()
    sums.add()
    return loss.item(), sums


def check(case: Case, results: list[Result]) -> None:
    """Loss and gradients are one process's: 1e-5 of each tensor's largest number, in float32."""
    loss, expected = whole_batch(case)
    assert sum(r.loss for r in results) == pytest.approx(loss, rel=1e-5)
    found = added(case, results)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        worst = float((found[name] - grad).abs().max() / grad.abs().max())
        assert worst < 1e-5, (name, worst)


def added(case: Case, results: list[Result]) -> dict[str, Tensor]:
    """The gradients of all processes, each with its part of the experts."""
    found: dict[str, Tensor] = {}
    for rank, result in enumerate(results):
        for name, array in result.gradients.items():
            grad, parts = torch.from_numpy(array), case.layout.expert
            if ".experts." in name and parts > 1:
                whole = grad.new_zeros(parts, *grad.shape)
                whole[rank % parts] = grad
                grad = whole.flatten(0, 1)
            found[name] = found.get(name, torch.zeros(())) + grad
    return found


def check_order(case: Case, results: list[Result]) -> None:
    """What ran is what the simulator ran, in its order, and as many graphs were kept as it says."""
    schedule = make_schedule(
        case.layout.schedule if case.layout.pipeline > 1 else "1f1b",
        case.layout.pipeline,
        case.microbatches,
        case.layout.chunks,
    )
    simulated = simulate(schedule, Costs(1.0, 1.0, 1.0)).events
    peaks = peak_activations(schedule, "I")
    for rank, result in enumerate(results):
        device = rank // case.layout.data
        slots = [event.slot for event in simulated[device]]
        assert result.slots == slots
        flat = [t for times in result.times for t in times]
        assert flat == sorted(flat)
        # Without exchanges the two passes of a slot run one after the other.
        planned = [op if op.kind == "F" else replace(op, kind="B") for slot in slots for op in slot]
        weights = [op.kind == "W" for slot in slots for op in slot]
        assert result.seen == [op for op, w in zip(planned, weights, strict=True) if not w]
        assert result.graphs == peaks[device]


@pytest.mark.parametrize("world", CASES)
def test_equals_one_process(world: int) -> None:
    results = run(world, run_cases, CASES[world])
    for i, case in enumerate(CASES[world]):
        check(case, [r[i] for r in results])
        check_order(case, [r[i] for r in results])


@pytest.mark.parametrize("world", WITH_EXPERTS)
def test_with_experts_apart(world: int) -> None:
    """Pairs take turns at each exchange, all processes of an expert group alike."""
    results = run(world, run_cases, WITH_EXPERTS[world])
    for i, case in enumerate(WITH_EXPERTS[world]):
        found = [r[i] for r in results]
        check(case, found)
        check_order(case, found)
        pairs = any(len(slot) == 2 for slot in found[0].slots)
        # By itself a pass goes by a gate and its experts one after the other. Not every process has pairs with experts.
        assert any("FBFB" in "".join(result.passed) for result in found) == pairs
        for rank, result in enumerate(found):
            assert result.passed == found[rank - rank % case.layout.data].passed


def test_equal_to_the_bit_in_bfloat16() -> None:
    """Where each gradient is one process's alone, and each microbatch's is added up in float32 by itself."""
    cases = [
        Case(layout("1f1b", 2), 3, rows=2, dtype=torch.bfloat16),
        Case(layout("zb1p", 2), 5, dtype=torch.bfloat16, recompute=True),
    ]
    results = run(2, run_cases, cases)
    for i, case in enumerate(cases):
        model = case.model()
        expected = Sums(model)
        for microbatch in range(case.microbatches):
            whole = Targets.of(case.batch, 1)
            objective(model, case.part(microbatch), 0.3, whole).total.backward()
            expected.add()
        del expected["embed_tokens.weight"]  # which both stages hold
        found = added(case, [r[i] for r in results])
        for name, grad in expected.items():
            assert torch.equal(found[name], grad), name


# Against torch's runtime -------------------------------------------------------------------------------

TORCH = Case(layout("zb1p", 2), 4, rows=2)


class TorchStage(nn.Module):
    """A stage as torch wants it: the last one's output is its loss."""

    def __init__(self, model: Part, piece: Span, whole: Targets) -> None:
        super().__init__()
        self.model, self.piece, self.whole = model, piece, whole

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        hidden = None if self.piece.first else x
        made = objective(self.model, Batch(tokens, None, None), 0.3, self.whole, self.piece, hidden)
        return made.total.view(1) if made.hidden is None else made.hidden


def run_both(case: Case) -> list[dict[str, np.ndarray]]:
    """torch's gradients and ours, of one process. Without balance losses, for which torch has no place."""
    mesh = Mesh.of(case.layout)
    (stage,) = mesh.stages
    piece, whole, tokens = spans(case.config, 2)[stage], Targets.of(case.batch, 1), case.batch.tokens
    found = []
    for theirs in (True, False):
        model = Part(case.model(), [piece])
        model.config = model.config.replace(aux_loss_alpha=0.0)
        sums = Sums(model)
        module = TorchStage(model, piece, whole)
        if theirs:
            pipe = PipelineStage(
                module, stage, 2, torch.device("cpu"), group=mesh.places.get_group("pipeline")
            )
            schedule = Schedule1F1B(
                pipe, case.microbatches, loss_fn=lambda out, target: out.sum(), scale_grads=False
            )
            schedule.step(*([] if stage else [tokens]), target=tokens if stage else None, tokens=tokens)
        else:
            apply_deferral(model)

            def forward(
                stage: int, microbatch: int, hidden: Tensor | None, module: TorchStage = module
            ) -> tuple[Tensor | None, Tensor]:
                mine = case.part(microbatch).tokens
                out = module(mine if hidden is None else hidden, mine)
                return (None, out.sum()) if stage else (out, torch.zeros(()))

            shape = case.rows, SEQ, case.config.hidden_size
            Pipeline(mesh, shape, case.dtype).run(case.microbatches, forward)
        sums.add()
        found.append({name: grad.numpy() for name, grad in sums.items()})
    return found


def test_equals_torchs_runtime() -> None:
    for theirs, ours in run(2, run_both, TORCH):
        assert theirs.keys() == ours.keys()
        for name, grad in theirs.items():
            assert np.abs(ours[name] - grad).max() <= 1e-5 * np.abs(grad).max(), name


# What goes wrong ---------------------------------------------------------------------------------------


def run_and_fail(case: Case, place: int) -> str:
    """One process fails in its third forward pass, and goes. What did this one see?"""
    mesh = Mesh.of(case.layout)
    model, pieces = part_of(case, mesh), spans(case.config, case.layout.stages)
    whole = Targets.of(case.batch, 1)
    calls = 0

    def forward(stage: int, microbatch: int, hidden: Tensor | None) -> tuple[Tensor | None, Tensor]:
        nonlocal calls
        calls += 1
        if mesh.pipeline == place and calls == 9:
            raise ZeroDivisionError
        made = objective(model, case.part(microbatch), 0.3, whole, pieces[stage], hidden)
        return made.hidden, made.total

    shape = case.rows, SEQ, case.config.hidden_size
    try:
        Pipeline(mesh, shape, case.dtype).run(case.microbatches, forward)
    except Exception as error:
        dist.destroy_process_group()
        return type(error).__name__
    return "nothing"


@pytest.mark.parametrize("schedule", ["zb1p", "dualpipe"])
def test_a_failure_ends_all(schedule: str) -> None:
    """In a pair of DualPipe's, too. The others see that who should send is gone."""
    seen = run(4, run_and_fail, Case(layout(schedule, 4), 12), 1, timeout=60.0)
    assert seen[1] == "ZeroDivisionError"
    assert [name for i, name in enumerate(seen) if i != 1] == ["RuntimeError"] * 3


def send_wrong_shape() -> str:
    mesh = Mesh.of(layout("1f1b", 2))
    pipeline = Pipeline(mesh, (1, 2, 3), torch.float32)
    if mesh.pipeline:
        return ""
    with pytest.raises(ValueError) as error:
        pipeline.run(1, lambda stage, microbatch, hidden: (torch.zeros(1, 2, 4), torch.zeros(())))
    return str(error.value)


def test_a_wrong_shape_is_not_sent() -> None:
    assert run(2, send_wrong_shape)[0] == "stages send torch.float32 (1, 2, 3), not torch.float32 (1, 2, 4)"


def run_twice() -> list[float]:
    """Two stages, w * x and the sum of it: what w's gradient is after runs of 4 and of 6 microbatches."""
    mesh = Mesh.of(layout("dualpipe", 2))
    pipeline = Pipeline(mesh, (1, 2, 3), torch.float32)
    w = torch.tensor(2.0, requires_grad=True)

    def forward(stage: int, microbatch: int, hidden: Tensor | None) -> tuple[Tensor | None, Tensor]:
        if hidden is None:
            return w * torch.full((1, 2, 3), float(microbatch)), torch.zeros(())
        return None, hidden.sum()

    found = []
    for microbatches in (4, 6):
        w.grad = None
        pipeline.run(microbatches, forward)
        assert w.grad is not None
        found.append(w.grad.item())
    return found


def test_runs_one_after_the_other() -> None:
    """The first half of the microbatches goes in at the first device, the second at the last."""
    half = [(0 + 1) * 6, (0 + 1 + 2) * 6], [(2 + 3) * 6, (3 + 4 + 5) * 6]
    assert run(2, run_twice) == [list(map(float, h)) for h in half]
