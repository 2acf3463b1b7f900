"""Blocks in one native call: near the exact result, the same bits in any company, and only where they may be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dsv3.config import ModelConfig
from dsv3.engine.engine import Engine
from dsv3.engine.sampling import SamplingParams
from dsv3.kernels import native
from dsv3.model import FlatBatch, Piece, Transformer, fused
from dsv3.model.layers import FeedForward
from dsv3.model.moe import MoE
from tests.model.reference import random_ids, random_model

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native kernels on this machine")

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_nextn_predict_layers=1,
    num_attention_heads=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=32,
    v_head_dim=48,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    max_position_embeddings=512,
)
V2 = {"model_type": "deepseek_v2", "scoring_func": "softmax"}
VARIANTS = {
    "v3": CONFIG,
    "queries as they are": CONFIG.replace(q_lora_rank=None),
    "biases": CONFIG.replace(attention_bias=True),
    "pairs half a head apart": CONFIG.replace(rope_interleave=False),
    "two shared experts": CONFIG.replace(n_shared_experts=2),
    "no shared expert": CONFIG.replace(n_shared_experts=0),
    "weights as they are": CONFIG.replace(norm_topk_prob=False, routed_scaling_factor=1.5),
    "v2 greedy": CONFIG.replace(**V2, topk_method="greedy", norm_topk_prob=False, routed_scaling_factor=3.0),
    "v2 groups": CONFIG.replace(**V2, topk_method="group_limited_greedy", norm_topk_prob=True),
    "all experts": CONFIG.replace(num_experts_per_tok=16, topk_group=4),
}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def cache_for(config: ModelConfig, blocks: int = 12) -> list[Tensor]:
    """Full of what nobody may read."""
    layers = config.num_hidden_layers + 1
    return [torch.full((blocks, 64, config.latent_dim), float("nan")).bfloat16() for _ in range(layers)]


def bf16(config: ModelConfig) -> Transformer:
    return random_model(config).bfloat16()


def pieces_of(
    model: Transformer, ids: Tensor, cuts: list[int], table: list[int], cache: list[Tensor]
) -> Tensor:
    """Hidden states of one sequence that comes in pieces of these sizes."""
    out, past = [], 0
    for ids_of_piece in ids.split(cuts):
        batch = FlatBatch.lay([Piece(table, past, len(ids_of_piece))], cache)
        out.append(model.forward_flat(ids_of_piece, batch))
        past += len(ids_of_piece)
    return torch.cat(out)


@pytest.mark.parametrize("name", VARIANTS)
def test_as_near_as_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block on the same input: half of the tokens are at most 1.2 times as far off as by torch, and nearly all
    within rounding. (The rest chose another expert, for their input was rounded.)"""
    config = VARIANTS[name]
    model, exact = bf16(config), random_model(config)
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    batch = FlatBatch.lay([Piece([3, 1, 7], 0, 150)], cache_for(config))
    x = torch.randn(150, config.hidden_size, generator=torch.Generator().manual_seed(5)).bfloat16()
    angles = model.rope(batch.positions)
    for block, reference in zip(model.layers, exact.layers, strict=True):
        wanted = reference(x[None].float(), model.rope, angles)[0]

        def off(result: Tensor, wanted: Tensor = wanted) -> Tensor:
            return (result.float() - wanted).norm(dim=1) / (wanted - x.float()).norm(dim=1)

        ours = fused.forward(block, x, model.rope, angles, batch)
        assert ours is not None
        with monkeypatch.context() as patch:
            patch.setattr(fused, "forward", lambda *_: None)
            theirs = block(x, model.rope, angles, batch=batch)
        assert off(ours).median() <= 1.2 * off(theirs).median()
        assert off(ours).quantile(0.9) <= max(0.03, 1.2 * off(theirs).quantile(0.9).item())


@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_bits_however_a_prompt_is_cut(name: str) -> None:
    config = VARIANTS[name]
    model, ids = bf16(config), random_ids(config, 1, 140)[0]
    table = [3, 1, 7]
    whole = pieces_of(model, ids, [140], table, cache_for(config))
    assert whole.isfinite().all()
    for cuts in ([1] * 140, [64, 1, 70, 5], [17] * 8 + [4]):
        assert torch.equal(pieces_of(model, ids, cuts, table, cache_for(config)), whole)


def test_prompts_longer_than_what_is_taken_at_once() -> None:
    """Attention takes 512 tokens at a time, the experts 1,024."""
    config = CONFIG.replace(max_position_embeddings=2048)
    model, ids = bf16(config), random_ids(config, 1, 1100)[0]
    table = list(range(18))
    whole = pieces_of(model, ids, [1100], table, cache_for(config, 18))
    assert whole.isfinite().all()
    assert torch.equal(pieces_of(model, ids, [400, 500, 200], table, cache_for(config, 18)), whole)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_in_any_company(threads: int) -> None:
    """Sequences of many lengths decoded alone and together, and beside prompts; with drafts and logits."""
    model, cache = bf16(CONFIG), cache_for(CONFIG, 82)
    assert model.batch_invariant
    cache[-1].normal_(generator=torch.Generator().manual_seed(3))  # as if the past had been drafted on, too
    ids = random_ids(CONFIG, 64, 100)
    tables = [[i, 79 - i] if i < 16 else [i] for i in range(64)]
    lengths = [7 * i % (90 if i < 16 else 60) + 1 for i in range(64)]
    alone = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for i, length in enumerate(lengths):
            pieces_of(model, ids[i, :length], [length], tables[i], cache)
            batch = FlatBatch.lay([Piece(tables[i], length, 1)], cache)
            hidden = model.forward_flat(ids[i, length : length + 1], batch)
            draft = model.draft_flat(ids[i, length + 1 : length + 2], hidden, batch)
            alone.append(torch.cat((hidden, draft, model.logits_flat(hidden)), dim=1))
        for n in (2, 3, 17, 64):
            pieces = [Piece(tables[i], lengths[i], 1) for i in range(n)]
            more = torch.tensor([], dtype=torch.int64)
            if n == 17:  # a prompt beside them
                pieces.append(Piece([80, 81], 0, 70))
                more = ids[60, :70]
            batch = FlatBatch.lay(pieces, cache)
            now, then = (torch.stack([ids[i, lengths[i] + k] for i in range(n)]) for k in (0, 1))
            hidden = model.forward_flat(torch.cat((now, more)), batch)
            draft = model.draft_flat(torch.cat((then, more)), hidden, batch)
            together = torch.cat((hidden, draft, model.logits_flat(hidden)), dim=1)[:n]
            assert together.isfinite().all() and torch.equal(together, torch.cat(alone[:n]))
    finally:
        torch.set_num_threads(before)


def test_of_equal_experts_the_first_are_chosen() -> None:
    """All scores alike: experts 0 .. 3 of group 0 answer, each with the same weight."""
    model = bf16(CONFIG)
    moe = model.layers[1].mlp
    assert isinstance(moe, MoE)
    moe.gate.weight.zero_()
    assert moe.gate.e_score_correction_bias is not None
    moe.gate.e_score_correction_bias.zero_()
    moe.experts.down_proj[4:] = float("nan")
    batch = FlatBatch.lay([Piece([0], 0, 3)], cache_for(CONFIG))
    x = torch.randn(3, CONFIG.hidden_size).bfloat16()
    out = fused.forward(model.layers[1], x, model.rope, model.rope(batch.positions), batch)
    assert out is not None and out.isfinite().all()


def test_what_is_not_a_number_stays_visible() -> None:
    model = bf16(CONFIG)
    x = torch.randn(3, CONFIG.hidden_size).bfloat16()
    x[1, 5] = float("nan")
    for block in model.layers:
        batch = FlatBatch.lay([Piece([i], 0, 1) for i in range(3)], cache_for(CONFIG))
        out = fused.forward(block, x, model.rope, model.rope(batch.positions), batch)
        assert out is not None
        assert out.isnan().any(1).tolist() == [False, True, False]


# Where it is taken, and where not ------------------------------------------------------------------------


def taken(model: Transformer, monkeypatch: pytest.MonkeyPatch, new: int = 1, size: int = 64) -> bool:
    """Whether a flat batch goes through the native call; whichever way, the result is finite."""
    calls = []
    with monkeypatch.context() as patch:
        original = fused.blocks_forward
        patch.setattr(fused, "blocks_forward", lambda *a: (calls.append(a[0].count), original(*a)))
        dtype = model.embed_tokens.weight.dtype
        cache = [torch.zeros(4, size, model.config.latent_dim, dtype=dtype) for _ in range(3)]
        batch = FlatBatch.lay([Piece([1, 2, 3], 0, new)], cache)
        assert model.forward_flat(torch.arange(new), batch).isfinite().all()
    assert calls in ([], [len(model.layers)])
    return bool(calls)


def test_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bf16(CONFIG)
    assert taken(model, monkeypatch) and taken(model, monkeypatch, new=20)
    assert not taken(model, monkeypatch, size=32)
    assert not taken(random_model(CONFIG), monkeypatch)
    assert not random_model(CONFIG).batch_invariant
    odd = bf16(CONFIG.replace(v_head_dim=24))
    assert not taken(odd, monkeypatch) and not odd.batch_invariant
    with torch.enable_grad():
        assert not taken(model, monkeypatch)
    monkeypatch.setattr(native, "library", lambda: None)
    assert not taken(model, monkeypatch) and not model.batch_invariant


def test_long_pieces_of_a_shape_to_which_absorption_is_dear_take_the_plain_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = bf16(CONFIG.replace(kv_lora_rank=128))
    assert taken(model, monkeypatch) and not taken(model, monkeypatch, new=20)
    assert not model.batch_invariant


def test_new_weights_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written in place, assigned, moved, or in a module put in another's place."""
    model, other = bf16(CONFIG), random_model(CONFIG, seed=1).bfloat16()

    def run(model: Transformer) -> Tensor:
        batch = FlatBatch.lay([Piece([0], 0, 5)], cache_for(CONFIG))
        return model.forward_flat(torch.arange(5), batch)

    first, wanted = run(model), run(other)
    assert not torch.equal(first, wanted)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    for assign in (False, True):
        changed = bf16(CONFIG)
        assert torch.equal(run(changed), first)
        changed.load_state_dict(state, assign=assign)
        assert torch.equal(run(changed), wanted)
    model.float()
    assert not taken(model, monkeypatch)
    model.bfloat16()
    assert taken(model, monkeypatch) and torch.equal(run(model), first)

    mlp, theirs = model.layers[0].mlp, other.layers[0].mlp
    assert isinstance(mlp, FeedForward) and isinstance(theirs, FeedForward)
    mlp.down_proj = theirs.down_proj
    assert not torch.equal(run(model), first)
    attention = model.layers[1].self_attn
    attention.o_proj = nn.Sequential(attention.o_proj)
    assert fused.forward(model.layers[1], torch.zeros(5, 64).bfloat16(), *_where(model)) is None


def test_an_engine_sees_new_weights_with_the_next_request() -> None:
    """It looks at the model once for many steps; weights that are moved meanwhile stay where it knows them."""
    prompt, params = [5, 6, 7], SamplingParams(temperature=0.0, max_tokens=8)

    def answer(engine: Engine, model: Transformer | None = None) -> list[int]:
        request = engine.sequence(prompt, params)
        engine.add(request)
        while not request.finished:
            engine.step()
            if model is not None:
                model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        return request.output_ids

    model, other = bf16(CONFIG), random_model(CONFIG, seed=1).bfloat16()
    first, wanted = answer(Engine(model)), answer(Engine(other))
    assert first != wanted
    engine = Engine(model, prefix_caching=False)
    assert answer(engine, model) == first
    model.load_state_dict(other.state_dict(), assign=True)
    assert answer(engine) == wanted


def test_experts_that_multiply_in_their_own_way_do_so() -> None:
    model = bf16(CONFIG)
    x = torch.zeros(5, CONFIG.hidden_size).bfloat16()
    moe = model.layers[1].mlp
    assert isinstance(moe, MoE)
    assert fused.forward(model.layers[1], x, *_where(model)) is not None
    moe.experts.linear = nn.functional.linear
    assert fused.forward(model.layers[1], x, *_where(model)) is None
    moe.experts.linear = None
    assert fused.forward(model.layers[1], x, *_where(model)) is not None


def _where(model: Transformer) -> tuple:  # type: ignore[type-arg]
    batch = FlatBatch.lay([Piece([0], 0, 5)], cache_for(CONFIG))
    return model.rope, model.rope(batch.positions), batch


def test_a_block_with_hooks_goes_the_way_of_its_modules() -> None:
    model = random_model(CONFIG, 0).to(torch.bfloat16)
    block = model.layers[1]
    assert fused.invariant(block)
    seen: list[int] = []
    handle = block.mlp.register_forward_hook(lambda *_: seen.append(1))
    assert not fused.invariant(block)
    cache = [torch.zeros(1, 64, CONFIG.latent_dim, dtype=torch.bfloat16) for _ in range(3)]
    model.forward_flat(torch.tensor([5]), FlatBatch.lay([Piece([0], 0, 1)], cache))
    assert seen == [1]
    handle.remove()
    assert fused.invariant(block)
