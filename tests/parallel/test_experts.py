"""A layer whose experts lie on several processes, against the same layer in one process on all their tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsv3.config import PRESETS, ModelConfig
from dsv3.data.stream import Batch
from dsv3.model import Transformer
from dsv3.model.moe import MoE
from dsv3.parallel.deferred import apply_deferral, put_off
from dsv3.parallel.experts import ParallelMoE, apply_expert_parallel, own_experts
from dsv3.parallel.mesh import Mesh
from dsv3.recipe.layout import Layout
from dsv3.train.fp8 import apply_fp8
from dsv3.train.loss import Targets, objective
from dsv3.train.recompute import apply_recompute
from tests.parallel.processes import run
from tests.parallel.test_exchange import rounded

TINY = PRESETS["tiny"]  # 8 experts in 4 groups; 3 chosen from 2 groups
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """A layer, its layout, how many tokens each process has, and where they go."""

    layout: Layout
    rows: tuple[int, ...]
    experts: tuple[int, ...] = ()
    """The only ones that are chosen; by default it is the gate that chooses."""
    config: ModelConfig = TINY
    dispatch: Literal["fp8", "bf16"] = "bf16"
    dtype: torch.dtype = torch.float32
    changes: tuple[str, ...] = ("parallel",)
    """What is applied, in this order: parallel, fp8, recompute, deferral."""
    frozen: tuple[str, ...] = ()
    """What requires no gradient on process 0: x, gate, experts."""
    again: bool = False
    """Whether all of the layer is computed again in the backward pass."""

    @property
    def layer(self) -> MoE:
        """The whole layer, with the same weights whenever it is asked for."""
        torch.manual_seed(0)
        layer = MoE(self.config, 1)
        for p in layer.parameters():
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
        if self.experts:
            layer.gate.choose = lambda scores: self.forced(len(scores), self.config.num_experts_per_tok)
        return layer.to(self.dtype)

    def forced(self, tokens: int, k: int | None) -> Tensor:
        """For each token other ones of those that may be chosen."""
        assert k is not None and k <= len(self.experts)
        scores = torch.rand(tokens, len(self.experts), generator=torch.Generator().manual_seed(tokens))
        return torch.tensor(self.experts)[scores.argsort(1)[:, :k]]

    def inputs(self, rank: int) -> tuple[Tensor, Tensor]:
        """A process's tokens, and the gradient of what the layer makes of them, [rows, hidden]."""
        generator = torch.Generator().manual_seed(100 + rank)
        x, grad = torch.randn(2, self.rows[rank], self.config.hidden_size, generator=generator)
        return x.to(self.dtype), grad.to(self.dtype)


Made = dict[str, Array | None]


def step(case: Case, layer: MoE, x: Tensor, grad: Tensor) -> Made:
    """One forward and backward pass: the output, and all gradients."""
    with put_off() as work:
        out = checkpoint(layer, x, use_reentrant=False) if case.again else layer(x)
        out.backward(grad)
    for piece in work:
        piece()
    made = {"out": out.detach(), "x": x.grad} | {n: p.grad for n, p in layer.named_parameters()}
    return {n: None if t is None else t.float().numpy() for n, t in made.items()}


def apply(case: Case, layer: MoE, mesh: Mesh | None) -> None:
    changes: dict[str, Callable[[], None]] = {
        "fp8": lambda: apply_fp8(layer),
        "recompute": lambda: apply_recompute(layer),
        "deferral": lambda: apply_deferral(layer),
        "parallel": lambda: None if mesh is None else apply_expert_parallel(layer, mesh, case.dispatch),
    }
    for name in case.changes:
        changes[name]()


def run_cases(cases: list[Case]) -> list[tuple[Made, list[list[int]]]]:
    """Of each case what this process made, and how many members each of its rows went to over each hop."""
    found, meshes = [], dict[Layout, Mesh]()
    for case in cases:
        if case.layout not in meshes:
            meshes[case.layout] = Mesh.of(case.layout)
        layer = case.layer
        apply(case, layer, meshes[case.layout])
        assert isinstance(layer, ParallelMoE)
        if dist.get_rank() == 0:
            layer.gate.weight.requires_grad_("gate" not in case.frozen)
            layer.experts.requires_grad_("experts" not in case.frozen)
        x, grad = case.inputs(dist.get_rank())
        made = step(case, layer, x.requires_grad_("x" not in case.frozen or dist.get_rank() != 0), grad)
        found.append((made, [route.reached.tolist() for route in layer.routes]))
    return found


class Rounded(torch.autograd.Function):
    """What fp8 dispatch does to a token, and to the gradient of what the experts made of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: bool) -> Tensor:
        ctx.forwards = forward
        return rounded(x) if forward else x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] if ctx.forwards else rounded(grads[0]), None


def alone(case: Case) -> Made:
    """One process, all tokens. Choices that are forced are each process's own."""
    layer = case.layer
    apply(case, layer, None)
    if case.experts:
        k = case.config.num_experts_per_tok
        choices = torch.cat([case.forced(n, k) for n in case.rows])
        layer.gate.choose = lambda scores: choices
    if case.dispatch == "fp8":
        experts = layer.experts
        plain = experts.forward

        def through(x: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
            return Rounded.apply(plain(Rounded.apply(x, True), numbers, weights), False)

        experts.forward = through
    x, grad = (torch.cat(parts) for parts in zip(*map(case.inputs, range(len(case.rows))), strict=True))
    return step(case, layer, x.requires_grad_(), grad)


def joined(case: Case, results: list[Made]) -> Made:
    """What all processes made, as one would have: rows one after the other, gradients added up."""
    layout, total = case.layout, case.config.n_routed_experts or 0
    found: Made = {}
    for name in results[0]:
        parts = [r[name] for r in results]
        if any(part is None for part in parts):
            found[name] = None
        elif name in ("out", "x"):
            found[name] = np.concatenate(parts)
        elif name.startswith("experts."):
            replicas = np.array(parts).reshape(layout.replicas, total, *parts[0].shape[1:])
            found[name] = replicas.sum(0)
        else:
            found[name] = np.sum(parts, axis=0)
    return found


def check(case: Case, results: list[tuple[Made, list[list[int]]]], tolerance: float = 1e-5) -> None:
    found, expected = joined(case, [made for made, _ in results]), alone(case)
    for name, wanted in expected.items():
        got = found[name]
        if got is None:
            assert case.frozen
            continue
        assert wanted is not None and got.shape == wanted.shape
        off = np.abs(got - wanted).max(initial=0.0)
        assert off <= tolerance * np.abs(wanted).max(initial=1e-6), (case, name, off)


# Exactness ---------------------------------------------------------------------------------------------


def ep(expert: int, nodes: int = 1, data: int = 0) -> Layout:
    return Layout(data=data or expert, expert=expert, nodes=nodes)


def rows(world: int, seed: int = 0) -> tuple[int, ...]:
    """Unlike and odd."""
    return tuple(3 + 2 * ((5 * rank + seed) % 7) for rank in range(world))


def empty_but(world: int, rank: int, tokens: int) -> tuple[int, ...]:
    return tuple(tokens if r == rank else 0 for r in range(world))


ONE = TINY.replace(num_experts_per_tok=1, topk_group=1, norm_topk_prob=False)  # of 8 experts one
ODD = TINY.replace(hidden_size=40, moe_intermediate_size=12, n_shared_experts=None)
MANY = TINY.replace(n_routed_experts=24, num_experts_per_tok=6, n_group=8, topk_group=3)


def extremes(layout: Layout) -> list[Case]:
    """Where tokens go, and who has any."""
    world, each = layout.world, 8 // layout.expert
    last = layout.expert - 1
    elsewhere = tuple(e for e in range(8) if e // each != last)
    return [
        Case(layout, rows(world)),
        Case(layout, rows(world, 3), config=ODD),
        Case(layout, rows(world, 1), config=MANY),
        Case(layout, rows(world), (0, 1, 2)),  # as few processes as can be
        Case(layout, rows(world), (5,), ONE),  # all to one expert
        Case(layout, rows(world), elsewhere, TINY),  # none to the last process
        Case(layout, (0, *rows(world)[1:])),  # a process without tokens
        Case(layout, empty_but(world, world - 1, 1)),  # one token in all
        Case(layout, empty_but(world, 0, 1), (7,), ONE),  # and one expert
        Case(layout, (0,) * world),  # none
    ]


def mixed(layout: Layout, seed: int) -> Case:
    """Anything."""
    pick = torch.Generator().manual_seed(seed)

    def number(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=pick))

    k = number(1, 8)
    chosen = tuple(torch.randperm(8, generator=pick)[: number(k, 8)].tolist())
    tokens = tuple(max(0, number(-3, 12)) for _ in range(layout.world))
    normal = k > 1 and number(0, 1) == 1
    config = TINY.replace(num_experts_per_tok=k, norm_topk_prob=normal, n_group=1, topk_group=1)
    return Case(layout, tokens, chosen, config)


LAYOUTS = {
    2: [ep(2), ep(2, nodes=2)],
    4: [ep(4), ep(4, nodes=2), ep(4, nodes=4), ep(2, data=4), ep(2, nodes=2, data=4)],
    8: [ep(8), ep(8, nodes=2), ep(8, nodes=4), ep(4, nodes=2, data=8)],
}


@pytest.mark.parametrize("world", LAYOUTS)
def test_equals_one_process(world: int) -> None:
    """Outputs, and gradients of tokens, gates, shared and routed experts; with tokens and choices of all kinds."""
    cases = [case for layout in LAYOUTS[world] for case in extremes(layout)]
    cases += [mixed(LAYOUTS[world][seed % len(LAYOUTS[world])], seed) for seed in range(16)]
    results = run(world, run_cases, cases)
    for i, case in enumerate(cases):
        check(case, [r[i] for r in results])


# With what else is done to a layer ---------------------------------------------------------------------

# Without shared experts, whose gradients in FP8 are tiled along tokens, of which a process has its own only.
TWO_TILES = TINY.replace(hidden_size=200, moe_intermediate_size=72, n_shared_experts=None)


def changed(layout: Layout) -> list[Case]:
    """Orders of what is applied, and computing again."""
    world = rows(layout.world)
    return [
        Case(layout, world, changes=("recompute", "parallel", "deferral")),
        Case(layout, world, changes=("deferral", "parallel", "recompute")),
        Case(layout, (0, *world[1:]), config=ODD, changes=("recompute", "parallel", "deferral")),
        Case(layout, world, again=True),
        Case(layout, (0, *world[1:]), (4, 5, 6, 7), again=True),
        Case(layout, world, changes=("parallel", "parallel")),
        Case(layout, world, frozen=("x",)),
        Case(layout, world, frozen=("x", "gate", "experts")),
        Case(layout, (0, *world[1:]), (4, 5, 6, 7), frozen=("x", "gate", "experts")),
    ]


def in_fp8(layout: Layout) -> list[Case]:
    """Tokens that travel in FP8, to experts in float32 and in FP8."""
    world = rows(layout.world)
    common: dict[str, Any] = {"layout": layout, "config": TWO_TILES, "dispatch": "fp8"}
    return [
        Case(rows=world, **common),
        Case(rows=(0, *world[1:]), **common),
        Case(rows=world, changes=("fp8", "parallel"), **common),
        Case(rows=world, changes=("parallel", "fp8"), **common),
        Case(rows=world, changes=("parallel", "fp8", "deferral", "recompute"), **common),
        Case(rows=empty_but(layout.world, 0, 1), changes=("fp8", "parallel"), **common),
    ]


def test_with_other_changes() -> None:
    """Recomputation, put off gradients, FP8, and what requires no gradient on one process alone."""
    cases = [case for layout in LAYOUTS[4][1:4] for case in changed(layout)]
    cases += [case for layout in LAYOUTS[4][:3] for case in in_fp8(layout)]
    results = run(4, run_cases, cases)
    for i, case in enumerate(cases):
        check(case, [r[i] for r in results])


def test_fp8_experts_see_the_same_tiles() -> None:
    """What tokens are rounded to on their way is what FP8 experts round them to: dispatch in FP8 changes nothing."""
    layout = ep(4, nodes=2)
    cases = [
        Case(layout, rows(4), config=TWO_TILES, dispatch=dispatch, changes=("fp8", "parallel"))
        for dispatch in ("fp8", "bf16")
    ]
    results = run(4, run_cases, cases)
    for (in_fp8, _), (plain, _) in results:
        assert np.array_equal(in_fp8["out"], plain["out"])
        assert not np.array_equal(in_fp8["x"], plain["x"])  # but gradients are rounded on their way


def test_bfloat16_is_as_good_as_one_process() -> None:
    layout = ep(4, nodes=2)
    cases = [
        Case(layout, (40, 33, 0, 57), config=TWO_TILES, dtype=dtype)
        for dtype in (torch.bfloat16, torch.float32)
    ]
    results = run(4, run_cases, cases)
    ours = joined(cases[0], [made for (made, _), _ in results])
    one, exact = alone(cases[0]), joined(cases[1], [made for _, (made, _) in results])
    for name, wanted in exact.items():
        if name == "gate.weight":
            continue  # which in bfloat16 is another one: other experts are chosen here and there
        rounding = np.linalg.norm(one[name] - wanted)
        assert np.linalg.norm(ours[name] - wanted) <= 1.1 * rounding, name


# Crossings ---------------------------------------------------------------------------------------------


def nodes_of(case: Case) -> list[list[int]]:
    """On how many nodes the experts of each process's tokens lie, by the gate of one process."""
    found, gate, nodes = [], case.layer.gate, case.layout.nodes
    for rank in range(case.layout.world):
        _, numbers, _ = gate(case.inputs(rank)[0])
        per_node = (case.config.n_routed_experts or 0) // nodes
        found.append([len({e // per_node for e in row}) for row in numbers.tolist()])
    return found


def test_a_token_crosses_to_few_nodes() -> None:
    """Once to each on which it has an expert, which node-limited routing bounds, however many experts that are."""
    groups = TINY.replace(n_routed_experts=24, num_experts_per_tok=6)
    cases = [
        Case(ep(8, nodes=4), (30,) * 8, config=groups.replace(n_group=4, topk_group=2)),
        Case(ep(8, nodes=4), (30,) * 8, config=groups.replace(n_group=8, topk_group=3)),
        Case(ep(8, nodes=2), (30,) * 8, config=groups.replace(n_group=4, topk_group=1)),
    ]
    results = run(8, run_cases, cases)
    for i, case in enumerate(cases):
        for rank, nodes in enumerate(nodes_of(case)):
            across, within = results[rank][i][1]
            assert across == nodes
            assert max(across) <= (case.config.topk_group or 0)
            # Within a node, a row goes to each process that has an expert of it, not to more than there are.
            assert all(1 <= n <= case.layout.expert // case.layout.nodes for n in within)
        sent, handed_on = (sum(sum(r[i][1][hop]) for r in results) for hop in range(2))
        assert sum(len(r[i][1][1]) for r in results) == sent  # what crossed is what is handed on
        assert sent < handed_on < 8 * 30 * 6


# A whole model -----------------------------------------------------------------------------------------

MODEL = TINY.replace(num_nextn_predict_layers=1, aux_loss_alpha=0.3)


def batch(rows: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(MODEL.vocab_size, (rows, 12), generator=generator)
    return Batch(tokens, torch.rand(rows, 12, generator=generator) < 0.7)


def model() -> Transformer:
    made = Transformer(MODEL)
    made.init_weights()
    return made


def train(layout: Layout) -> tuple[float, dict[str, Array]]:
    """Loss and gradients of two of the batch's rows."""
    made, mesh, whole = model(), Mesh.of(layout), batch(2 * layout.data)
    apply_recompute(made)
    apply_expert_parallel(made, mesh)
    assert whole.loss_mask is not None
    mine = slice(2 * mesh.data, 2 * mesh.data + 2)
    part = Batch(whole.tokens[mine], whole.loss_mask[mine])
    loss = objective(made, part, 0.3, Targets.of(whole, 1)).total
    loss.backward()
    return loss.item(), {n: p.grad.numpy() for n, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", [ep(4, nodes=2), ep(2, data=4)], ids=["nodes", "replicas"])
def test_objective_of_a_whole_model(layout: Layout) -> None:
    """With MTP and balance losses: losses and gradients of all processes add up to one's."""
    results = run(4, train, layout)
    made = model()
    loss = objective(made, batch(2 * layout.data), 0.3).total
    loss.backward()
    assert sum(r for r, _ in results) == pytest.approx(loss.item(), rel=1e-5)
    for name, p in made.named_parameters():
        parts = [gradients[name] for _, gradients in results]
        if ".experts." in name:
            found = np.array(parts).reshape(layout.replicas, *p.shape).sum(0)
        else:
            found = np.sum(parts, axis=0)
        wanted = p.grad.numpy()
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max(), name


# What a process holds ----------------------------------------------------------------------------------


def hold() -> list[Any]:
    """Stacks that were whole, and that were cut already."""
    mesh = Mesh.of(ep(2))
    mine, whole = own_experts(mesh, 8), Case(ep(2), (1, 1)).layer
    stack = whole.experts.down_proj
    apply_expert_parallel(whole, mesh)
    held = whole.experts.down_proj
    assert torch.equal(held, stack[mine]) and held.untyped_storage().nbytes() == stack.nbytes // 2
    apply_expert_parallel(whole, mesh)
    assert whole.experts.down_proj is held
    assert [n for n, _ in whole.named_parameters()] == [
        n for n, _ in Case(ep(2), (1, 1)).layer.named_parameters()
    ]
    return [mine.start, mine.stop]


def test_a_process_holds_its_own_experts_only() -> None:
    assert run(2, hold) == [[0, 4], [4, 8]]
