"""Context parallelism: split over processes, a row gives the same loss and the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.config import PRESETS, ModelConfig, YarnConfig
from dsv3.data.stream import Batch
from dsv3.errors import UserError
from dsv3.model import Transformer
from dsv3.model.attention import LatentAttention
from dsv3.model.layers import RMSNorm
from dsv3.model.moe import Gate
from dsv3.parallel import context
from dsv3.parallel.context import ContextAttention, apply_context_parallel, zigzag
from dsv3.parallel.deferred import apply_deferral
from dsv3.parallel.experts import apply_expert_parallel
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.part import Part, spans
from dsv3.parallel.pipeline import Pipeline
from dsv3.recipe import Layout
from dsv3.train.fp8 import apply_fp8
from dsv3.train.loss import Targets, objective
from dsv3.train.recompute import RecomputedAttention, apply_recompute
from tests.parallel.processes import run

CONFIG = PRESETS["tiny"].replace(num_hidden_layers=2, num_nextn_predict_layers=1, aux_loss_alpha=0.5)
CONFIGS = {
    "tiny": CONFIG,
    "two modules, yarn": CONFIG.replace(
        num_nextn_predict_layers=2,
        rope_scaling=YarnConfig(4.0, 64, mscale=0.8, mscale_all_dim=1.0),
        rope_interleave=False,
    ),
    "no query latent, biases": CONFIG.replace(
        q_lora_rank=None, attention_bias=True, tie_word_embeddings=True
    ),
}
# config, kind of batch, length of rows, weight of MTP, whether attention is recomputed
Case = tuple[str, str, int, float, bool]
CASES: list[Case] = [
    ("tiny", "stream", 13, 0.3, False),
    ("two modules, yarn", "stream", 17, 0.3, False),
    ("two modules, yarn", "chats", 16, 0.3, True),
    ("no query latent, biases", "chats", 29, 0.3, False),
    ("tiny", "chats", 19, 0.0, True),
]
Array = npt.NDArray[np.float32]
Result = tuple[dict[str, float], dict[str, Array]]


def model(config: ModelConfig) -> Transformer:
    """Weights in which everything matters, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    made = Transformer(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
        made.embed_tokens.weight.normal_(0.0, 1.0, generator=generator)
        for module in made.modules():
            if isinstance(module, RMSNorm):
                module.weight.normal_(1.0, 0.3, generator=generator)
            elif isinstance(module, Gate):  # wide scores: a tie within rounding would choose another expert
                module.weight.normal_(0.0, 0.4, generator=generator)
    return made


def batch(config: ModelConfig, kind: str, seq: int, rows: int = 2) -> Batch:
    """A stream; or chats, whose answers count, padded at the end."""
    generator = torch.Generator().manual_seed(seq)
    tokens = torch.randint(0, config.vocab_size, (rows, seq + 1), generator=generator)
    if kind == "stream":
        return Batch(tokens)
    segments = (torch.rand(tokens.shape, generator=generator) < 0.2).cumsum(dim=1) + 1
    segments[-1, -4:] = 0
    mask = (torch.rand(tokens.shape, generator=generator) < 0.4) & (segments > 0)
    mask[:, :3] = False
    return Batch(tokens, mask, segments)


def step(made: Transformer, data: Batch, mtp: float, places: Any = None, rows: slice = slice(None)) -> Result:
    """Losses and gradients of one process."""
    whole = Targets.of(data, len(made.mtp) if mtp else 0)
    parts = (None if t is None else t[rows] for t in (data.tokens, data.loss_mask, data.segments))
    losses = objective(made, Batch(*parts), mtp, whole, places=places)  # type: ignore[arg-type]
    losses.total.backward()
    values = {name: getattr(losses, name) for name in ("total", "main", "mtp", "balance")}
    loads = {f"load {layer}.{e}": n for layer, load in losses.loads.items() for e, n in enumerate(load)}
    gradients = {name: p.grad.float().numpy() for name, p in made.named_parameters() if p.grad is not None}
    return {name: float(v.detach()) for name, v in (values | loads).items() if v is not None}, gradients


def summed(results: list[Result]) -> Result:
    """Of all processes."""
    values = {name: sum(values[name] for values, _ in results) for name in results[0][0]}
    return values, {name: np.sum([g[name] for _, g in results], axis=0) for name in results[0][1]}


def same(ours: Result, theirs: Result) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        error = np.linalg.norm(ours[1][name] - gradient) / np.linalg.norm(gradient)
        assert error < 1e-5, f"{name}: gradients differ by {error:.1e}"


# Whole steps -------------------------------------------------------------------------------------------


def _steps(layout: Layout, cases: list[Case]) -> list[Result]:
    mesh = Mesh.of(layout)
    results = []
    for name, kind, seq, mtp, recompute in cases:
        made = model(CONFIGS[name])
        if recompute:
            apply_recompute(made)
        data = batch(made.config, kind, seq, rows=2 * layout.data)
        mine = slice(2 * mesh.data, 2 * mesh.data + 2)
        results.append(step(made, data, mtp, apply_context_parallel(made, mesh), mine))
    return results


@pytest.mark.parametrize(
    "layout", [Layout(context=2), Layout(context=3), Layout(context=4)], ids=("2", "3", "4")
)
def test_losses_and_gradients_are_the_single_process_ones(layout: Layout) -> None:
    ranks = run(layout.world, _steps, layout, CASES)
    for case, results in zip(CASES, zip(*ranks, strict=True), strict=True):
        name, kind, seq, mtp, _ = case
        made = model(CONFIGS[name])
        same(summed(list(results)), step(made, batch(made.config, kind, seq), mtp))


def test_rows_and_places_are_split_together() -> None:
    cases = CASES[:1]
    ranks = run(4, _steps, Layout(data=2, context=2), cases)
    made = model(CONFIG)
    same(summed([results[0] for results in ranks]), step(made, batch(CONFIG, "stream", 13, rows=4), 0.3))


def _two_stages(seq: int) -> Result:
    """The two stages of a pipeline, one after the other."""
    made = model(CONFIG)
    places = apply_context_parallel(made, Mesh.of(Layout(context=2)))
    data = batch(CONFIG, "chats", seq)
    whole = Targets.of(data, 1)
    first, last = spans(CONFIG, 2)
    before = objective(Part(made, [first]), data, 0.3, whole, first, places=places)
    assert before.hidden is not None and before.hidden.shape[1] == len(places.of(seq))
    after = objective(Part(made, [last]), data, 0.3, whole, last, before.hidden, places)
    (before.total + after.total).backward()
    total = float((before.total + after.total).detach())
    return {"total": total}, {n: p.grad.numpy() for n, p in made.named_parameters() if p.grad is not None}


def test_stages_of_a_pipeline_have_places_too() -> None:
    values, gradients = step(model(CONFIG), batch(CONFIG, "chats", 15), 0.3)
    same(summed(run(2, _two_stages, 15)), ({"total": values["total"]}, gradients))


def _pipelined(layout: Layout, microbatches: int, seq: int, recompute: bool) -> Result:
    mesh = Mesh.of(layout)
    cuts = spans(CONFIG, layout.stages)
    made = Part(model(CONFIG), [cuts[stage] for stage in mesh.stages])
    if recompute:
        apply_recompute(made)
    places = apply_context_parallel(made, mesh)
    apply_deferral(made)
    data = batch(CONFIG, "chats", seq, rows=microbatches)
    whole = Targets.of(data, 1)
    assert data.loss_mask is not None and data.segments is not None
    total = 0.0

    def forward(stage: int, microbatch: int, hidden: Tensor | None) -> tuple[Tensor | None, Tensor]:
        nonlocal total
        row = slice(microbatch, microbatch + 1)
        part = Batch(data.tokens[row], data.loss_mask[row], data.segments[row])
        losses = objective(made, part, 0.3, whole, cuts[stage], hidden, places)
        total += float(losses.total.detach())
        return losses.hidden, losses.total

    shape = 1, len(places.of(seq)), CONFIG.hidden_size
    Pipeline(mesh, shape, torch.float32).run(microbatches, forward)
    return {"total": total}, {n: p.grad.numpy() for n, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True])
def test_forward_and_backward_woven_by_dualpipe(recompute: bool) -> None:
    """Two microbatches at a time gather, each while the other computes; the order is the same in all processes."""
    layout = Layout(pipeline=2, context=2, schedule="dualpipe")
    ranks = run(4, _pipelined, layout, 4, 14, recompute)
    gradients: dict[str, Array] = {}
    for _, part in ranks:
        for name, gradient in part.items():
            gradients[name] = gradients.get(name, 0) + gradient
    values, expected = step(model(CONFIG), batch(CONFIG, "chats", 14, rows=4), 0.3)
    same(({"total": sum(v["total"] for v, _ in ranks)}, gradients), ({"total": values["total"]}, expected))


def _with_experts(seq: int) -> Result:
    mesh = Mesh.of(Layout(context=2, expert=2))
    made = model(CONFIG)
    apply_expert_parallel(made, mesh, "bf16")
    return step(made, batch(CONFIG, "chats", seq), 0.3, apply_context_parallel(made, mesh))


def test_experts_lie_over_the_same_processes() -> None:
    results = run(2, _with_experts, 15)
    expected = step(model(CONFIG), batch(CONFIG, "chats", 15), 0.3)
    for values, gradients in results:  # each has half of the experts; zeros for the others
        for name in [name for name in gradients if ".experts." in name]:
            half = len(expected[1][name]) // 2
            assert len(gradients[name]) == half
            before = half if values is results[1][0] else 0
            gradients[name] = np.pad(gradients[name], ((before, half - before), (0, 0), (0, 0)))
    same(summed(results), expected)


def _no_targets_in_one_process(seq: int) -> Result:
    made = model(CONFIG)
    places = apply_context_parallel(made, Mesh.of(Layout(context=2)))
    return step(made, _late(seq), 0.3, places)


def _late(seq: int) -> Batch:
    """Only targets of the middle of the row count, where the second process is."""
    data = batch(CONFIG, "stream", seq)
    mask = torch.zeros_like(data.tokens, dtype=torch.bool)
    mask[:, seq // 2] = True
    return Batch(data.tokens, mask)


def test_a_process_without_targets_still_takes_part() -> None:
    results = run(2, _no_targets_in_one_process, 12)
    assert results[0][0]["main"] == 0
    same(summed(results), step(model(CONFIG), _late(12), 0.3))


# With what else is done to attention -------------------------------------------------------------------


def _orders() -> list[tuple[str, float, Array]]:
    """In bfloat16 and FP8, whichever is applied first; what attention is then."""
    mesh = Mesh.of(Layout(context=2))
    orders: list[tuple[Callable[..., Any], ...]] = [
        (apply_fp8, apply_recompute, _context),
        (apply_recompute, _context, apply_fp8),
        (_context, apply_fp8),
    ]
    results = []
    for order in orders:
        made = model(CONFIG).bfloat16()
        places = None
        for apply in order:
            places = apply(made, mesh) if apply is _context else apply(made) or places
        values, gradients = step(made, batch(CONFIG, "stream", 32), 0.3, places)
        kinds = {type(m).__mro__ for m in made.modules() if isinstance(m, LatentAttention)}
        name = " ".join(sorted({kind.__name__ for mro in kinds for kind in mro if kind is not object}))
        results.append((name, values["total"], np.concatenate([g.ravel() for g in gradients.values()])))
    return results


def _context(made: Transformer, mesh: Mesh) -> Any:
    return apply_context_parallel(made, mesh)


def test_fp8_and_recomputation_go_with_it() -> None:
    ranks = run(2, _orders)
    made = model(CONFIG).bfloat16()
    apply_fp8(made)
    values, gradients = step(made, batch(CONFIG, "stream", 32), 0.3)
    expected = np.concatenate([g.ravel() for g in gradients.values()])
    for i, (name, _, gradient) in enumerate(ranks[0]):
        assert ContextAttention.__name__ in name
        assert (RecomputedAttention.__name__ in name) == (i < 2)
        assert (gradient == ranks[0][0][2]).all(), "the same to the bit in any order"
        total = sum(results[i][1] for results in ranks)
        assert total == pytest.approx(values["total"], rel=0.01)
        everyones = np.sum([results[i][2] for results in ranks], axis=0)
        norms = np.linalg.norm(everyones) * np.linalg.norm(expected)
        assert float(everyones @ expected / norms) > 0.98


def _whole_rows() -> Array | None:
    made = model(CONFIG)
    apply_context_parallel(made, Mesh.of(Layout(context=2)))
    if dist.get_rank():
        return None  # and nobody waits for it
    tokens = batch(CONFIG, "stream", 12).tokens
    with torch.no_grad():
        square = made(tokens, mask=torch.ones(13, 13, dtype=torch.bool).tril()).logits
        logits: Tensor = made(tokens).logits
    torch.testing.assert_close(square, logits)
    whole: Array = logits.numpy()
    return whole


def test_whole_rows_need_nobody() -> None:
    """As held-out text is read, by one process."""
    with torch.no_grad():
        expected = model(CONFIG)(batch(CONFIG, "stream", 12).tokens).logits
    torch.testing.assert_close(torch.from_numpy(run(2, _whole_rows)[0]), expected)


# What is split, and what travels -----------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_zigzag_balances_a_causal_mask(parts: int) -> None:
    for seq in range(2 * parts, 6 * parts):
        places = zigzag(seq, parts)
        assert sorted(torch.cat(places).tolist()) == list(range(seq))
        assert all((own.diff() > 0).all() for own in places)
        assert max(map(len, places)) - min(map(len, places)) <= 2
    pairs = {int((own + 1).sum()) for own in zigzag(12 * parts, parts)}
    assert len(pairs) == 1, "all look at as many"


def _sent() -> list[int]:
    """Numbers that this process sends in the forward pass."""
    made = model(CONFIG.replace(num_nextn_predict_layers=0))
    places = apply_context_parallel(made, Mesh.of(Layout(context=2)))
    sizes, gather = [], context.all_gather

    def spy(out: Tensor, x: Tensor, **kwargs: Any) -> Any:
        sizes.append(x.numel())
        return gather(out, x, **kwargs)

    context.all_gather = spy  # in this process, which ends here
    objective(made, batch(CONFIG, "stream", 16), 0.0, places=places)
    return sizes


def test_only_latents_travel() -> None:
    rows, local = 2, 8
    assert run(2, _sent) == [[rows * local * (CONFIG.kv_lora_rank + CONFIG.qk_rope_head_dim)] * 2] * 2


def _too_short() -> list[str]:
    places = apply_context_parallel(model(CONFIG), Mesh.of(Layout(context=2)))
    assert len(places.of(4)) == 2
    with pytest.raises(UserError) as problem:
        places.of(3)
    return str(problem.value).splitlines()


def test_rows_that_leave_somebody_without_work_are_refused() -> None:
    for lines in run(2, _too_short):
        (line,) = lines
        assert "sequence_length is 3" in line and "at least 4" in line
