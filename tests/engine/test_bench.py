"""`dsv3.engine.bench`: what it counts, and that it measures what it says."""

from __future__ import annotations

import math

import pytest
import torch

from dsv3.config import PRESETS
from dsv3.engine.bench import Cost, Work, _counting, bench, sizes_of
from dsv3.engine.ceilings import Ceilings, measure_ceilings
from dsv3.errors import UserError
from dsv3.kernels import native
from dsv3.kernels.packed import empty
from dsv3.model import Transformer
from dsv3.model.layers import put_packed

CONFIG = PRESETS["tiny"].replace(num_nextn_predict_layers=0, max_position_embeddings=512)
CEILINGS = Ceilings(bandwidth=1e9, products=1e12, byte_products=2e12, torch_products=5e11)


def model() -> Transformer:
    made = Transformer(CONFIG)
    made.init_weights()
    return made.bfloat16().eval()


def test_what_a_step_reads_and_multiplies() -> None:
    whole = model()
    sizes = sizes_of(whole)
    head = whole.lm_head.weight.numel()
    routed = sum(p.numel() for name, p in whole.named_parameters() if ".experts." in name)
    rest = sum(p.numel() for p in whole.parameters()) - routed - head - whole.embed_tokens.weight.numel()
    buffers = sum(b.nbytes for b in whole.buffers())
    assert (sizes.routed, sizes.fixed) == (2 * routed, 2 * (rest + head) + buffers)
    body = rest + routed * CONFIG.num_experts_per_tok // (CONFIG.n_routed_experts or 1)
    assert (sizes.body, sizes.head) == ((body, 0), (head, 0))
    assert sizes.token == 2 * CONFIG.latent_dim * CONFIG.num_hidden_layers

    read, ops, integer_ops = vars(sizes.cost(3, 1, 10, 20, touched=0.25, absorbed=True)).values()
    assert read == sizes.fixed + sizes.routed / 4 + 10 * sizes.token and integer_ops == 0
    assert ops == 2 * (3 * body + head + 20 * sizes.absorbed), "the head for one of three tokens"
    prompt = sizes.cost(3, 1, 10, 20, touched=0.25, absorbed=False)
    assert prompt.ops == 2 * (3 * body + head + 20 * min(sizes.absorbed, sizes.plain))


def test_packed_weights_count_as_they_are_stored() -> None:
    plain, packed = model(), model()
    name = "layers.1.mlp.experts.down_proj"
    stack = plain.get_parameter(name)
    small = empty("int4", stack.shape, 32, False, torch.device("cpu"))
    put_packed(packed, name, small)
    a, b = sizes_of(plain), sizes_of(packed)
    assert a.routed - b.routed == stack.nbytes - small.nbytes and a.fixed == b.fixed
    moved = stack.numel() * CONFIG.num_experts_per_tok // (CONFIG.n_routed_experts or 1)
    assert b.body == (a.body[0] - moved, moved), "multiplied as integers"


def test_the_floor_is_the_higher_of_two() -> None:
    bound_by_memory = Work("decode", 0, 2, [50.0, 70.0], 2, Cost(read=1e9, ops=1e11, integer_ops=1e11))
    assert bound_by_memory.roofline(CEILINGS) == 2.0, "two tokens in a second for a billion bytes"
    assert (bound_by_memory.tokens_per_second, bound_by_memory.share(CEILINGS)) == (60.0, 30.0)
    assert bound_by_memory.spread == pytest.approx(math.sqrt(200) / 60)
    by_arithmetic = Work("prefill", 8, 1, [4.0], 8, Cost(read=1e9, ops=3e12, integer_ops=2e12))
    facts = by_arithmetic.facts(CEILINGS)
    assert facts["roofline"] == 2.0 and facts["bound_by"] == "arithmetic" and facts["spread"] == 0.0
    assert (facts["bytes_per_second"], facts["ops_per_second"]) == (5e8, 2.5e12)


def test_experts_are_counted_where_the_gates_choose() -> None:
    whole = model()
    ids = torch.randint(CONFIG.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    with _counting(whole) as shares, torch.inference_mode():
        whole(ids[:, :1])
    assert shares == [CONFIG.num_experts_per_tok / (CONFIG.n_routed_experts or 1)] * len(shares)
    with _counting(whole) as shares, torch.inference_mode():
        routing: list = []
        whole(ids, routing=routing)
    assert shares == [len(set(r.indices.flatten().tolist())) / CONFIG.n_routed_experts for r in routing]
    assert shares and not any(m._forward_hooks for m in whole.modules()), "hooks are taken away again"


def test_measurements() -> None:
    whole = model()
    works = list(bench(whole, prompt=64, depths=[0, 100], batches=[1, 3], tokens=2, repeats=2))
    found = [(work.name, work.depth, work.batch, len(work.samples)) for work in works]
    assert found == [("prefill", 64, 1, 2), *(("decode", d, b, 2) for d in (0, 100) for b in (1, 3))]
    sizes = sizes_of(whole)
    assert works[0].cost.ops == sizes.cost(64, 1, 64, 64 * 65 // 2, 1.0, absorbed=False).ops
    for work in works[1:]:  # 4 tokens before the two stretches, which end after 6 and 8
        context = work.batch * (max(work.depth, 1) + 6)
        assert work.cost.ops == sizes.cost(work.batch, work.batch, context, context, 1.0, absorbed=True).ops
        assert work.tokens == work.batch and min(work.samples) > 0
    least = sizes.routed * CONFIG.num_experts_per_tok // (CONFIG.n_routed_experts or 1)
    assert works[1].cost.read == sizes.fixed + least + 7 * sizes.token, "one token's own experts"
    with pytest.raises(UserError, match="context is 512: lower --depths"):
        next(bench(whole, depths=[600]))


def test_ceilings() -> None:
    found = measure_ceilings(torch.device("cpu"), nbytes=2**24, seconds=0.01)
    assert found.bandwidth > 1e8 and found.byte_products >= found.products >= found.torch_products > 1e9


@pytest.mark.skipif(native.library() is None, reason="no native kernels on this machine")
def test_reading_reads_all_of_it() -> None:
    for n in (5, 32768, 100_000):
        numbers = torch.randint(-1000, 1000, (n,), generator=torch.Generator().manual_seed(n))
        total = torch.empty(1, dtype=torch.int64)
        native.call("read_all", numbers, n, total)
        assert total.item() == numbers.sum().item(), n


def test_experts_count_when_layers_go_the_native_way_and_with_many_who_read() -> None:
    """Gates are asked in a step that goes the modules' way; no sequence ends while others still read their prompts."""
    config = CONFIG.replace(
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=32,
        v_head_dim=32,
        n_routed_experts=16,
    )
    whole = Transformer(config)
    whole.init_weights()
    whole = whole.bfloat16().eval()
    sizes = sizes_of(whole)
    if native.library() is not None:
        assert whole.batch_invariant
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv3.engine.bench.STEP", 64)
        (work,) = bench(whole, prompt=0, depths=[100], batches=[5], tokens=2, repeats=2)
    least = sizes.fixed + sizes.routed * config.num_experts_per_tok / (config.n_routed_experts or 1)
    assert work.cost.read > least, "some of the experts and the cache"


def test_what_memory_has_no_room_for_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3.engine.bench.fitting_tokens", lambda *a, **k: 1000)
    with pytest.raises(
        UserError, match=r"8 sequences of 1.. tokens take 1024 of the cache, but .* room for 1000"
    ):
        next(bench(model(), prompt=5, depths=[0], batches=[1, 8], tokens=32, repeats=3))
    with pytest.raises(UserError, match="speculation is 'foo'"):
        bench(model(), speculation="foo")  # type: ignore[arg-type]
