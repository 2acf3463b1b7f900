"""Both attention kernels, and the products that absorption needs, against themselves written out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.kernels import attention
from dsv3.kernels.attention import (
    causal_attention,
    latent_attention,
    per_head,
    prompt_attention,
    span_latent_attention,
)


def naive(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:
    """One query at a time: q [..., rows, dim] over k, v [..., context, dim] where mask [..., rows, context]."""
    q, k, v = q.double(), k.double(), v.double()
    out = []
    for row in range(q.shape[-2]):
        scores = (q[..., row : row + 1, :] * k).sum(-1) * scale
        weights = scores.masked_fill(~mask[..., row, :], float("-inf")).softmax(-1)
        out.append((weights.unsqueeze(-1) * v).sum(-2))
    return torch.stack(out, dim=-2)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: Tensor, exact: Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == exact.shape
    assert exact.abs().max() > 0.1
    torch.testing.assert_close(ours.double(), exact.double(), rtol=0, atol=tolerance)


def causal(seq: int) -> Tensor:
    return torch.tensor([[j <= i for j in range(seq)] for i in range(seq)])


@pytest.mark.parametrize("native", [True, False])
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 150) | st.sampled_from([64, 128, 129]),
    before=st.integers(0, 150) | st.just(64),
    heads=st.integers(1, 3),
    nope=st.sampled_from([16, 48, 128]),
    rotary=st.sampled_from([16, 64]),
    v_dim=st.sampled_from([32, 64, 96]),
)
def test_prompt_attention(
    native: bool, tokens: int, before: int, heads: int, nope: int, rotary: int, v_dim: int
) -> None:
    """The last tokens of a context, in bf16; and the same bits whatever there is after them."""
    context = before + tokens
    q = random(tokens, heads, nope + rotary).bfloat16()
    kv = random(context, heads, nope + v_dim, seed=1).bfloat16()
    k_rope = random(context, rotary + 16, seed=2).bfloat16()[:, 16:]
    k = torch.cat((kv[..., :nope], k_rope[:, None].expand(-1, heads, -1)), dim=-1)
    mask = causal(context)[before:]
    exact = naive(*(t.transpose(0, 1) for t in (q, k, kv[..., nope:])), 0.1, mask.expand(heads, -1, -1))
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        if native:
            patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        else:
            patch.setattr(attention, "usable", lambda *tensors: False)
        ours = prompt_attention(q, kv, k_rope, 0.1)
        assert_close(ours, exact.transpose(0, 1), 0.03)
        if native and attention.usable(q):
            few = tokens // 2 + 1
            shorter = prompt_attention(q[:few], kv[: before + few], k_rope[: before + few], 0.1)
            assert torch.equal(shorter, ours[:few])


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("tokens", "context"), [(17, 18), (40, 200), (70, 1100)])
def test_span_latent_attention(
    native: bool, tokens: int, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks in any order; segments of a long context are merged."""
    heads, rank, rotary = 3, 64, 32
    blocks = torch.tensor([5 * i % 19 for i in range(-(-context // 64))])
    cache = random(19, 64, rank + rotary).bfloat16()
    q = random(tokens, heads, rank + rotary, seed=1).bfloat16()
    latents = cache[blocks].flatten(0, 1)[:context]
    rows = causal(context)[context - tokens :]
    exact = naive(q.transpose(0, 1), latents, latents[:, :rank], 0.1, rows)
    if native:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    else:
        monkeypatch.setattr(attention, "usable", lambda *tensors: False)
    ours = span_latent_attention(q, cache, blocks, context, rank, 0.1)
    assert_close(ours, exact.transpose(0, 1), 0.03)


@settings(max_examples=50)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    seq=st.integers(1, 40),
    qk_dim=st.integers(1, 40),
    v_dim=st.integers(1, 40),
    scale=st.sampled_from([0.1, 1.0]),
    masked=st.booleans(),
)
def test_causal_attention(
    batch: int, heads: int, seq: int, qk_dim: int, v_dim: int, scale: float, masked: bool
) -> None:
    """Values narrower than keys, as wide, and wider; causal, or by a random mask in which each row sees itself."""
    q, k = random(batch, heads, seq, qk_dim), random(batch, heads, seq, qk_dim, seed=1)
    v = random(batch, heads, seq, v_dim, seed=2)
    mask = None
    if masked:
        mask = (random(batch, 1, seq, seq, seed=3) > 0) | torch.eye(seq, dtype=torch.bool)
    exact = naive(q, k, v, scale, causal(seq) if mask is None else mask.expand(-1, heads, -1, -1))
    ours = causal_attention(q, k, v, scale, mask)
    assert ours.shape == exact.shape
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("v_dim", [5, 12, 20])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(v_dim: int, masked: bool) -> None:
    tensors = [random(2, 3, 7, 12), random(2, 3, 7, 12, seed=1), random(2, 3, 7, v_dim, seed=2)]
    mask = causal(7) if not masked else (random(7, 7) > 0) | torch.eye(7, dtype=torch.bool)
    pull = random(2, 3, 7, v_dim, seed=4)
    ours = [t.clone().requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    causal_attention(*ours, 0.3, mask if masked else None).backward(pull)
    naive(*exact, 0.3, mask).backward(pull.double())
    for a, b in zip(ours, exact, strict=True):
        assert a.grad is not None and b.grad is not None
        assert_close(a.grad, b.grad)


def test_fewer_queries_than_keys_with_a_mask() -> None:
    """A span of a longer context: the queries are the last rows of the triangle."""
    q, k, v = random(1, 2, 3, 8), random(1, 2, 9, 8, seed=1), random(1, 2, 9, 5, seed=2)
    mask = causal(9)[-3:]
    assert_close(causal_attention(q, k, v, 0.5, mask[None, None]), naive(q, k, v, 0.5, mask))


def test_tokens_after_a_position_do_not_reach_it() -> None:
    q, k, v = random(1, 2, 6, 8), random(1, 2, 6, 8, seed=1), random(1, 2, 6, 5, seed=2)
    before = causal_attention(q, k, v, 0.5)
    k[:, :, 4:], v[:, :, 4:] = 30.0, 30.0
    after = causal_attention(q, k, v, 0.5)
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.equal(before[:, :, 4:], after[:, :, 4:])


@settings(max_examples=50)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 9),
    context=st.integers(1, 40),
    rank=st.integers(1, 40),
    rope=st.integers(1, 9).map(lambda n: 2 * n),
    scale=st.sampled_from([0.1, 1.0]),
    masked=st.sampled_from(["no", "each", "shared"]),
)
def test_latent_attention(
    batch: int, rows: int, context: int, rank: int, rope: int, scale: float, masked: str
) -> None:
    """All columns of a latent are the key, its first `rank` the value; a mask for each row, or one for all."""
    q, latents = random(batch, rows, rank + rope), random(batch, context, rank + rope, seed=1)
    mask = None
    if masked != "no":
        mask = random(batch, rows if masked == "each" else 1, context, seed=2) > 0
        mask[..., 0] = True
    everything = torch.ones(batch, rows, context, dtype=torch.bool)
    exact = naive(
        q, latents, latents[..., :rank], scale, everything if mask is None else mask.expand(-1, rows, -1)
    )
    ours = latent_attention(q, latents, rank, scale, mask)
    assert ours.shape == exact.shape == (batch, rows, rank)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5)


def test_latents_behind_the_mask_do_not_count_however_large() -> None:
    q, latents = random(2, 4, 12), random(2, 9, 12, seed=1)
    mask = torch.arange(9) < torch.tensor([[[5]], [[9]]])
    clean = latent_attention(q, latents, 8, 0.3, mask)
    latents[0, 5:] = 1e4
    assert torch.equal(latent_attention(q, latents, 8, 0.3, mask), clean)
    assert_close(clean[:1], latent_attention(q[:1], latents[:1, :5], 8, 0.3))


def test_bfloat16() -> None:
    q, k, v = (random(1, 2, 9, d, seed=d).bfloat16() for d in (16, 16, 8))
    out = causal_attention(q, k, v, 0.25)
    assert out.dtype == torch.bfloat16
    assert_close(out, naive(q, k, v, 0.25, causal(9)), 0.03)
    latents = random(1, 9, 16, seed=7).bfloat16()
    everything = torch.ones(2, 9, dtype=torch.bool)
    ours = latent_attention(q[:, :, 0], latents, 12, 0.25)
    assert_close(ours, naive(q[:, :, 0], latents, latents[..., :12], 0.25, everything), 0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 150])  # up to 128 in bfloat16 the whole matrix is read
def test_per_head_multiplies_by_the_part_alone(tokens: int, dtype: torch.dtype) -> None:
    weight = torch.randn(3, 12, 8).to(dtype)
    for part in (slice(0, 7), slice(7, 12), slice(2, 9)):
        rows = weight[:, part].double()
        x = torch.randn(tokens, 3, rows.shape[1]).to(dtype)
        wanted = torch.einsum("thr,hrc->thc", x.double(), rows)
        torch.testing.assert_close(per_head(x, weight, part).double(), wanted, atol=5e-2, rtol=2e-2)
        y = torch.randn(tokens, 3, 8).to(dtype)
        wanted = torch.einsum("thc,hrc->thr", y.double(), rows)
        found = per_head(y, weight, part, transposed=True)
        torch.testing.assert_close(found.double(), wanted, atol=5e-2, rtol=2e-2)


def test_long_and_short_contexts_are_gathered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(12, 64, 24, generator=generator)
    tables = torch.randperm(12, generator=generator).view(3, 4).int()
    owners = torch.tensor([0, 1, 1, 2, 2], dtype=torch.int32)
    positions = torch.tensor([250, 3, 4, 64, 100])
    q = torch.randn(5, 2, 24, generator=generator)
    where = cache, tables, owners, positions
    whole = attention.paged_latent_attention(q, *where, rank=16, scale=0.2)
    monkeypatch.setattr(attention, "_GATHERED", 2 * 4 * 64 * 24)
    torch.testing.assert_close(attention.paged_latent_attention(q, *where, rank=16, scale=0.2), whole)
