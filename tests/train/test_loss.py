"""The objective equals the report's equations, and balancing balances."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsv3.config import PRESETS, ModelConfig
from dsv3.data.stream import Batch
from dsv3.model import Routing, Transformer
from dsv3.model.moe import MoE
from dsv3.model.rope import Rope
from dsv3.train.loss import Losses, Targets, expert_loads, objective, sequence_balance, update_biases
from tests.model.reference import random_ids, random_model

CONFIG = PRESETS["tiny"].replace(num_nextn_predict_layers=2, num_hidden_layers=2, aux_loss_alpha=0.5)
LAMBDA = 0.3


def trainable(config: ModelConfig = CONFIG, seed: int = 0) -> Transformer:
    return random_model(config, seed).requires_grad_(True)


def cross_entropy(logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Mean of -log p(target) over the counted positions; logits [batch, seq, vocab], the others [batch, seq]."""
    nats = -logits.log_softmax(dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return nats[counted].mean()


def balance_of_one_sequence(scores: Tensor, indices: Tensor) -> Tensor:
    """Equations 17-20 for one sequence and one layer, before alpha. scores [T, N_r], indices [T, K_r]."""
    (length, experts), chosen = scores.shape, indices.shape[1]
    loss = torch.zeros(())
    for i in range(experts):
        f = experts / (chosen * length) * sum(i in row for row in indices.tolist())  # 18
        p = sum(scores[t, i] / scores[t].sum() for t in range(length)) / length  # 19, 20
        loss = loss + f * p
    return loss


def naive(model: Transformer, tokens: Tensor, loss_mask: Tensor | None = None) -> dict[str, Tensor]:
    """The three terms and their sum, from whole logits and one sequence after the other."""
    counted = torch.ones_like(tokens, dtype=torch.bool) if loss_mask is None else loss_mask
    routing: list[Routing] = []
    out = model(tokens[:, :-1], routing=routing)
    main = cross_entropy(out.logits, tokens[:, 1:], counted[:, 1:])
    modules = [
        cross_entropy(logits, tokens[:, k + 1 :], counted[:, k + 1 :])
        for k, logits in enumerate(out.mtp_logits, start=1)
    ]
    mtp = sum(modules, torch.zeros(())) / len(modules)
    batch = tokens.shape[0]
    balance = sum(
        (
            balance_of_one_sequence(scores, indices) / batch
            for layer in routing
            for scores, indices in zip(layer.scores.chunk(batch), layer.indices.chunk(batch), strict=True)
        ),
        torch.zeros(()),
    )
    total = main + LAMBDA * mtp + model.config.aux_loss_alpha * balance
    return {"total": total, "main": main, "mtp": mtp, "balance": balance}


def terms(losses: Losses) -> dict[str, float]:
    assert losses.mtp is not None
    return {name: float(getattr(losses, name).detach()) for name in ("total", "main", "mtp", "balance")}


def some_mask(tokens: Tensor) -> Tensor:
    return torch.rand(tokens.shape, generator=torch.Generator().manual_seed(5)) < 0.4


# Against the equations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_objective_and_its_gradients_equal_the_naive_ones(masked: bool) -> None:
    model, tokens = trainable(), random_ids(CONFIG, batch=3, length=15)
    mask = some_mask(tokens) if masked else None
    expected = naive(model, tokens, mask)
    expected["total"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    losses = objective(model, Batch(tokens, mask), LAMBDA)
    assert terms(losses) == pytest.approx({k: float(v.detach()) for k, v in expected.items()}, rel=1e-5)
    losses.total.backward()
    for name, p in model.named_parameters():
        wanted = gradients[name]
        assert p.grad is not None and wanted is not None, name
        error = float((p.grad - wanted).norm() / wanted.norm())
        assert error < 1e-4, f"{name}: gradients differ by {error:.1e}"


def test_without_mtp_its_modules_are_not_run() -> None:
    model, tokens = trainable(), random_ids(CONFIG, batch=2, length=9)
    losses = objective(model, Batch(tokens), 0.0)
    assert losses.mtp is None and set(losses.loads) == {1}
    losses.total.backward()
    assert all(p.grad is None for p in model.mtp.parameters())
    assert float(losses.main) == pytest.approx(float(naive(model, tokens)["main"].detach()), rel=1e-5)


def test_only_the_masked_targets_count() -> None:
    """The mask belongs to the token that is predicted, not to the one that predicts."""
    model, tokens = random_model(CONFIG), random_ids(CONFIG, batch=1, length=10)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[0, 6] = True
    losses = objective(model, Batch(tokens, mask), LAMBDA)
    out = model(tokens[:, :-1])
    wanted = tokens[0, 6]
    assert float(losses.main) == pytest.approx(-float(out.logits[0, 5].log_softmax(-1)[wanted]), rel=1e-5)
    by_module = [-float(out.mtp_logits[k - 1][0, 5 - k].log_softmax(-1)[wanted]) for k in (1, 2)]
    assert losses.mtp is not None and float(losses.mtp) == pytest.approx(sum(by_module) / 2, rel=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_parts_of_a_batch_add_up_to_the_whole(masked: bool) -> None:
    """Loss and gradients of microbatches, uneven and with unevenly many targets, are the whole batch's."""
    model, tokens = trainable(), random_ids(CONFIG, batch=5, length=11)
    mask = some_mask(tokens) if masked else None
    whole = objective(model, Batch(tokens, mask), LAMBDA)
    whole.total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    targets = Targets.of(Batch(tokens, mask), len(model.mtp))
    parts = []
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        part = objective(model, Batch(tokens[rows], None if mask is None else mask[rows]), LAMBDA, targets)
        part.total.backward()
        parts.append(part)
    for name, value in terms(whole).items():
        assert sum(terms(part)[name] for part in parts) == pytest.approx(value, rel=1e-5), name
    for name, gradient in gradients.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, rtol=1e-4, atol=1e-6)
    assert (
        sum(part.choices for part in parts)
        == whole.choices
        == CONFIG.num_experts_per_tok * sum(5 * (10 - k) for k in (0, 1, 2))
    )


# Packed samples ----------------------------------------------------------------------------------------

LENGTHS = (7, 12, 4, 9)


def packed() -> tuple[Tensor, Tensor]:
    """One row of four samples, and the number of the sample that each token belongs to."""
    tokens = random_ids(CONFIG, batch=1, length=sum(LENGTHS))
    return tokens, torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)).unsqueeze(0)


@pytest.mark.parametrize("masked", [False, True])
def test_packed_samples_equal_the_samples_alone(masked: bool) -> None:
    model = random_model(CONFIG)
    tokens, segments = packed()
    mask = some_mask(tokens) if masked else torch.ones_like(tokens, dtype=torch.bool)
    together = objective(model, Batch(tokens, mask, segments), LAMBDA)

    main, mtp = [0.0, 0], [[0.0, 0], [0.0, 0]]  # sums of nats, and of how many tokens
    for sample, counted in zip(tokens.split(LENGTHS, dim=1), mask.split(LENGTHS, dim=1), strict=True):
        out = model(sample[:, :-1])
        for ahead, (logits, sums) in enumerate(zip((out.logits, *out.mtp_logits), (main, *mtp), strict=True)):
            here = counted[:, ahead + 1 :]
            if here.any():
                sums[0] += float(cross_entropy(logits, sample[:, ahead + 1 :], here)) * int(here.sum())
                sums[1] += int(here.sum())
    assert float(together.main) == pytest.approx(main[0] / main[1], rel=1e-5)
    assert together.mtp is not None
    assert float(together.mtp) == pytest.approx(sum(nats / n for nats, n in mtp) / 2, rel=1e-5)


def test_a_sample_knows_nothing_of_its_neighbours() -> None:
    """With all samples but one replaced by other text, the loss on that one stays."""
    model = random_model(CONFIG)
    tokens, segments = packed()
    others = random_ids(CONFIG, batch=1, length=tokens.shape[1], seed=9)
    for number in range(len(LENGTHS)):
        mine = segments == number
        changed = torch.where(mine, tokens, others)
        one, other = (objective(model, Batch(t, mine, segments), LAMBDA) for t in (tokens, changed))
        assert one.mtp is not None and other.mtp is not None
        assert float(one.main) == pytest.approx(float(other.main), rel=1e-5), f"sample {number} sees another"
        assert float(one.mtp) == pytest.approx(float(other.mtp), rel=1e-5), f"MTP of sample {number} does"
        blurred = objective(model, Batch(changed, mine), LAMBDA)
        alike = float(one.main) == pytest.approx(float(blurred.main), rel=1e-3)
        assert alike == (number == 0), (
            "without segments a row is one stream, of which the first sees no other"
        )


def test_positions_start_anew_with_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary scores depend on distances alone, so no loss would tell."""
    model = random_model(CONFIG)
    tokens, segments = packed()
    seen: list[Tensor] = []
    turn = Rope.__call__

    def remember(rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(positions)
        return turn(rope, positions)

    monkeypatch.setattr(Rope, "__call__", remember)
    objective(model, Batch(tokens, None, segments), LAMBDA)
    wanted = [i for length in LENGTHS for i in range(length)]
    assert seen[0].tolist() == [wanted[:-1]], "the last token is a target only"


def test_nothing_is_predicted_across_a_border() -> None:
    model = random_model(CONFIG)
    tokens, segments = packed()
    mask = torch.zeros_like(segments, dtype=torch.bool)
    mask[:, 1:] = segments[:, 1:] != segments[:, :-1]  # the first token of each sample is all that counts
    losses = objective(model, Batch(tokens, mask, segments), LAMBDA)
    assert losses.mtp is not None and float(losses.main) == 0 and float(losses.mtp) == 0


# Balance -----------------------------------------------------------------------------------------------


def random_routing(tokens: int, experts: int, chosen: int) -> Routing:
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(tokens, experts, generator=generator).requires_grad_(True)
    return Routing(1, scores, scores.detach().topk(chosen).indices)


def test_balance_reaches_the_router_through_the_scores_alone() -> None:
    """The gradient is that of sum f_i P_i with f held: how often an expert is chosen has none."""
    routing = random_routing(tokens=12, experts=6, chosen=2)
    (got,) = torch.autograd.grad(sequence_balance([routing], batch=2), routing.scores)
    wanted = torch.zeros_like(got)
    for rows in (slice(0, 6), slice(6, 12)):
        s = routing.scores.detach()[rows]
        f = torch.bincount(routing.indices[rows].flatten(), minlength=6) * 6 / (2 * 6)
        total = s.sum(dim=1, keepdim=True)
        wanted[rows] = (f - (f * s).sum(dim=1, keepdim=True) / total) / total / 6 / 2
    torch.testing.assert_close(got, wanted)

    model = trainable()
    out: list[Routing] = []
    model.features(random_ids(CONFIG, batch=2, length=8), routing=out)
    sequence_balance(out, batch=2).backward()
    gates = [m.gate for m in model.modules() if isinstance(m, MoE)]
    assert len(gates) == 3, "one main layer and two modules"
    for gate in gates:
        assert gate.weight.grad is not None and gate.weight.grad.abs().sum() > 0
        assert gate.e_score_correction_bias is not None and not gate.e_score_correction_bias.requires_grad


def test_balance_is_least_when_even_and_counts_each_sequence_apart() -> None:
    even = torch.arange(8).view(4, 2)  # each of 8 experts once
    scores = torch.full((4, 8), 0.5)
    assert float(sequence_balance([Routing(1, scores, even)], batch=1)) == pytest.approx(1.0)
    # Two sequences that use different halves are even together, and uneven each.
    halves = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    tilted = torch.full((4, 8), 0.1)
    tilted[:2, :4] = tilted[2:, 4:] = 0.9
    assert float(sequence_balance([Routing(1, tilted, halves)], batch=1)) == pytest.approx(1.0)
    assert float(sequence_balance([Routing(1, tilted, halves)], batch=2)) == pytest.approx(1.8)


def biases(model: Transformer) -> dict[int, Tensor]:
    moes = [m for m in model.modules() if isinstance(m, MoE)]
    return {m.layer: m.gate.e_score_correction_bias.clone() for m in moes}  # type: ignore[operator]


def test_biases_move_by_gamma_against_the_load_of_the_batch() -> None:
    model, tokens = random_model(CONFIG), random_ids(CONFIG, batch=3, length=15)
    routing: list[Routing] = []
    model.features(tokens[:, :-1], routing=routing)
    losses = objective(model, Batch(tokens), LAMBDA)
    before = biases(model)
    update_biases(model, losses.loads, gamma=0.01)
    after = biases(model)
    assert set(after) == {1, 2, 3}, "layer 1, and the modules that count on from the last layer"
    for layer in routing:
        flat = layer.indices.flatten().tolist()
        load = [flat.count(e) for e in range(8)]
        assert losses.loads[layer.layer].tolist() == load
        for e in range(8):
            share = len(flat) / 8
            step = -0.01 if load[e] > share else 0.01 if load[e] < share else 0.0
            moved = float(after[layer.layer][e] - before[layer.layer][e])
            assert moved == pytest.approx(step, abs=1e-6), f"layer {layer.layer}, expert {e}, load {load[e]}"


def test_an_expert_with_its_share_is_left_alone() -> None:
    model = random_model(CONFIG)
    before = biases(model)[1]
    update_biases(model, {1: torch.tensor([4, 4, 4, 4, 5, 3, 4, 4])}, gamma=0.5)
    moved = biases(model)[1] - before
    assert moved.tolist() == pytest.approx([0, 0, 0, 0, -0.5, 0.5, 0, 0], abs=1e-6)


def test_biases_balance_an_unbalanced_router() -> None:
    model, tokens = trainable(), random_ids(CONFIG, batch=4, length=65)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MoE) and module.gate.e_score_correction_bias is not None:
                module.gate.e_score_correction_bias.copy_(torch.tensor([2.0, 2.0, 1.5, 1.5, 0, 0, -1, -2]))

    @torch.no_grad()
    def loads() -> dict[int, Tensor]:
        routing: list[Routing] = []
        model.features(tokens[:, :-1], routing=routing)
        return expert_loads(routing)

    def busiest(loads: dict[int, Tensor]) -> float:
        return max(float(load.max() / load.float().mean()) for load in loads.values())

    assert busiest(loads()) > 2.5 and any(0 in load for load in loads().values())
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(150):
        update_biases(model, loads(), gamma=0.1 * math.exp(-step / 50))
    assert busiest(loads()) < 1.25
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
