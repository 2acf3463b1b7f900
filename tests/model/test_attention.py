"""The two forms of latent attention agree, and a cache changes nothing, whatever is in its empty places."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.config import PRESETS, ModelConfig, YarnConfig
from dsv3.model import FlatBatch, Piece
from dsv3.model.attention import LatentAttention
from dsv3.model.flat import Span
from dsv3.model.rope import Rope
from tests.model.reference import TOLERANCE, LatentCache, assert_close, random_ids, random_model
from tests.model.strategies import v3_configs, yarns

SEEDS = st.integers(0, 10_000)


def layer_of(config: ModelConfig, seed: int = 0) -> LatentAttention:
    model = random_model(config.replace(num_hidden_layers=1), seed)
    layer = model.layers[0].self_attn
    assert isinstance(layer, LatentAttention)
    return layer


def inputs(config: ModelConfig, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, config.hidden_size, generator=torch.Generator().manual_seed(seed))


def whole(layer: LatentAttention, config: ModelConfig, x: Tensor) -> Tensor:
    """Plain attention over a sequence [seq, hidden], no cache."""
    rope = Rope(config)
    out: Tensor = layer(x[None], rope, rope(torch.arange(len(x))))[0]
    return out


def over_cache(
    layer: LatentAttention,
    config: ModelConfig,
    pieces: list[Tensor],
    cache: Tensor,
    table: list[int],
    short: int = 0,
) -> Tensor:
    """The same in pieces over a cache [blocks, size, latent]; those of up to `short` tokens read blocks."""
    rope, past, outs = Rope(config), 0, []
    for piece in pieces:
        batch = FlatBatch.lay([Piece(table, past, len(piece))], [cache], short)
        past += len(piece)
        outs.append(layer(piece, rope, rope(batch.positions), batch=batch))
    return torch.cat(outs)


# Two forms ---------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(
    config=v3_configs(),
    compressed=st.booleans(),
    yarn=st.none() | yarns(),
    context=st.integers(1, 40),
    last=st.integers(1, 40),
    seed=SEEDS,
)
def test_absorbed_equals_plain(
    config: ModelConfig,
    compressed: bool,
    yarn: YarnConfig | None,
    context: int,
    last: int,
    seed: int,
) -> None:
    """The last few queries of a context, over random sizes, with and without query compression and YaRN."""
    config = config.replace(q_lora_rank=10 if compressed else None, rope_scaling=yarn)
    layer, rope = layer_of(config, seed), Rope(config)
    queries = min(last, context)
    x = inputs(config, context, seed=seed)
    q_nope, q_rope, latents = layer._project(x, rope, rope(torch.arange(context)))
    q = q_nope[-queries:], q_rope[-queries:]
    plain = layer._plain(*q, latents)
    absorbed = layer._absorbed(*q, *in_blocks(latents))
    assert_close(absorbed, plain, what=config)


def in_blocks(latents: Tensor) -> tuple[Tensor, Span]:
    """A cache of blocks of 64 that holds these latents, and where."""
    context, dim = latents.shape
    blocks = torch.arange(-(-context // 64)).flip(0)
    cache = latents.new_zeros(len(blocks), 64, dim)
    cache[blocks] = torch.nn.functional.pad(latents, (0, 0, 0, len(blocks) * 64 - context)).view(-1, 64, dim)
    return cache, Span(slice(0, context), blocks, context)


def test_both_forms_in_bfloat16_are_near_float32() -> None:
    config = PRESETS["tiny"]
    layer, rope = layer_of(config), Rope(config)
    x, angles = inputs(config, 12), rope(torch.arange(12))
    exact = layer._plain(*layer._project(x, rope, angles))
    half = layer.to(torch.bfloat16)
    *q, latents = half._project(x.bfloat16(), rope, angles)
    for out in (half._plain(*q, latents), half._absorbed(*q, *in_blocks(latents))):
        assert out.dtype == torch.bfloat16
        assert ((out.float() - exact).norm() / exact.norm()).item() < 0.03


# Which form --------------------------------------------------------------------------------------------


def test_the_cheaper_form_of_the_released_model() -> None:
    """512 * 256 multiplications to expand one token's keys and values pay off from 171 queries on."""
    with torch.device("meta"):
        layer = LatentAttention(PRESETS["v3-671b"], layer=0)
    assert [layer._absorbed_is_cheaper(n) for n in (1, 170, 171, 4096)] == [True, True, False, False]


@settings(max_examples=60)
@given(config=v3_configs(), new=st.integers(1, 300))
def test_the_cheaper_form_has_fewer_multiplications(config: ModelConfig, new: int) -> None:
    layer = layer_of(config)
    plain = new * (config.qk_head_dim + config.v_head_dim)
    plain += config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
    absorbed = new * (config.latent_dim + config.kv_lora_rank)
    assert layer._absorbed_is_cheaper(new) == (absorbed < plain)


def test_spans_take_either_form_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the smallest config spans of 15 tokens are absorbed, and of 16 plain, unless they are the beginning."""
    config = PRESETS["tiny"]
    layer = layer_of(config)
    taken: list[str] = []
    for name in ("_plain", "_absorbed"):
        form = getattr(layer, name)
        monkeypatch.setattr(layer, name, lambda *a, name=name, form=form: (taken.append(name), form(*a))[1])
    x = inputs(config, 70)
    cache = torch.full((7, 10, config.latent_dim), 1e4)
    table = [4, 2, 6, 0, 1, 5, 3]
    ours = over_cache(layer, config, list(x.split([5, 15, 16, 1, 33])), cache, table)
    assert taken == ["_plain", "_absorbed", "_plain", "_absorbed", "_plain"]
    assert_close(ours, whole(layer, config, x))
    taken.clear()
    decoded = over_cache(layer, config, list(x.split(1)), cache, table, short=1)
    assert not taken, "single tokens read the blocks as they lie"
    assert_close(decoded, ours)


# Over a cache ------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(config=v3_configs(), cuts=st.sets(st.integers(1, 39)), form=st.booleans() | st.none(), seed=SEEDS)
def test_chunks_equal_the_whole(config: ModelConfig, cuts: set[int], form: bool | None, seed: int) -> None:
    """Wherever a prompt is cut, whichever form its spans take, in whichever blocks of a cache full of garbage."""
    layer = layer_of(config, seed)
    x = inputs(config, 40, seed=seed)
    edges = [0, *sorted(cuts), 40]
    pieces = [x[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    cache = torch.full((18, 7, config.latent_dim), 1e4)
    table = random.Random(seed).sample(range(18), 6)
    with pytest.MonkeyPatch.context() as patch:
        if form is not None:
            patch.setattr(layer, "_absorbed_is_cheaper", lambda new: form)
        ours = over_cache(layer, config, pieces, cache, table, short=seed % 4)
    assert_close(ours, whole(layer, config, x), what=config)
    others = [block for block in range(18) if block not in table]
    assert (cache[others] == 1e4).all() and (cache[table[-1], 40 - 42 :] == 1e4).all()


@settings(max_examples=40)
@given(config=v3_configs(), lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4), seed=SEEDS)
def test_decoding_sequences_of_unequal_length(config: ModelConfig, lengths: list[int], seed: int) -> None:
    """One more token for each of several sequences, masked up to the longest; garbage behind every one."""
    layer, rope = layer_of(config, seed), Rope(config)
    blocks = list(range(4 * len(lengths)))
    random.Random(seed).shuffle(blocks)
    tables = [blocks[4 * i : 4 * i + 4] for i in range(len(lengths))]
    cache = torch.full((len(blocks), 6, config.latent_dim), 1e4)
    xs = [inputs(config, n + 1, seed=seed + i) for i, n in enumerate(lengths)]
    for table, x in zip(tables, xs, strict=True):
        if len(x) > 1:
            over_cache(layer, config, [x[:-1]], cache, table)
    batch = FlatBatch.lay([Piece(t, n, 1) for t, n in zip(tables, lengths, strict=True)], [cache])
    ours = layer(torch.stack([x[-1] for x in xs]), rope, rope(batch.positions), batch=batch)
    for row, x in enumerate(xs):
        alone = whole(layer, config, x)[-1]
        torch.testing.assert_close(ours[row], alone, rtol=0, atol=TOLERANCE)


def test_garbage_in_empty_places_changes_not_a_bit() -> None:
    config = PRESETS["tiny"]
    layer, rope = layer_of(config), Rope(config)
    outs = []
    for garbage in (0.0, -1e30, 1e30):
        cache = torch.full((9, 4, config.latent_dim), garbage)
        over_cache(layer, config, [inputs(config, 3)], cache, [7])
        over_cache(layer, config, [inputs(config, 8)], cache, [3, 0, 5])
        batch = FlatBatch.lay([Piece([7], 3, 1), Piece([3, 0, 5], 8, 1), Piece([2], 0, 2)], [cache], short=1)
        outs.append(layer(inputs(config, 4, seed=5), rope, rope(batch.positions), batch=batch))
    assert outs[0].isfinite().all()
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@settings(max_examples=25)
@given(config=v3_configs(), seed=SEEDS)
def test_any_mixture_of_decoding_and_spans_equals_sequences_alone(config: ModelConfig, seed: int) -> None:
    """Whole models: four sequences that grow by random numbers of tokens, some not at all in a step."""
    model = random_model(config, seed)
    rng = random.Random(seed)
    ids = random_ids(config, 4, 24, seed)
    cache = LatentCache(model, rows=4, capacity=26)
    ours: list[list[Tensor]] = [[], [], [], []]
    mixed = 0
    while min(cache.lengths) < 24:
        left = [row for row in range(4) if cache.lengths[row] < 24 and rng.random() < 0.8]
        counts = {row: min(rng.choice([1, 1, 1, 2, 7]), 24 - cache.lengths[row]) for row in left}
        if not counts:
            continue
        mixed += counts.get(0) == 1 and max(counts.values()) > 1
        new = {row: ids[row, cache.lengths[row] : cache.lengths[row] + n] for row, n in counts.items()}
        for row, logits in cache.step(new).items():
            ours[row].append(logits)
    assert mixed, "no step had decoding rows and spans together"
    assert_close(torch.stack([torch.cat(row) for row in ours]), model(ids).logits, what=config)


def test_biases_are_where_attention_bias_puts_them() -> None:
    names = {name for name, _ in layer_of(PRESETS["tiny"].replace(attention_bias=True)).named_parameters()}
    assert {n for n in names if n.endswith("bias")} == {
        "q_a_proj.bias",
        "kv_a_proj_with_mqa.bias",
        "o_proj.bias",
    }
    plain = layer_of(PRESETS["tiny"].replace(attention_bias=True, q_lora_rank=None))
    assert plain.q_proj.bias is None
