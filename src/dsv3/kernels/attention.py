"""Attention over keys and values, and over the latents they come from.

Latent attention (MLA) can be computed in two ways that give the same numbers:

- plain: expand every latent into a key and a value for each head, then attend as usual. Expansion costs
  `kv_lora_rank * heads * (nope + v)` per context token, but each pair of tokens then costs only
  `heads * (qk + v)`: right for training and for long prompts.
- absorbed: fold the expansion into the query and the output, so that all heads share one key (the latent
  with the rotary part) and one value (the latent): multi-query attention straight from the cache. No
  expansion, but each pair costs `heads * (2 * rank + rope)`: right when few tokens meet a long context,
  which is what decoding is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3.kernels import triton
from dsv3.kernels.native import View, call, pointer, trains, usable

_GATHERED = 2**28  # numbers that are copied from blocks at once: half a gigabyte in bf16
_FEW = 128  # tokens for which it is cheaper to multiply by a whole matrix than to copy half of it


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Softmax attention in which token i sees tokens 0..i, or what `mask` allows instead.

    q: [batch, heads, queries, qk_dim]; k: [batch, heads, seq, qk_dim]; v: [batch, heads, seq, v_dim]; mask: bool,
    broadcastable to [batch, heads, queries, seq], True where a query may look. Without one queries = seq; with one
    they may be fewer, such as the last tokens of a context. Returns [batch, heads, queries, v_dim].
    """
    narrow = v.shape[-1]
    if q.device.type == "cpu" and narrow != q.shape[-1]:
        # The CPU's flash kernel takes one head size only; without it the scores are materialised (14x slower).
        width = max(narrow, q.shape[-1])
        q, k, v = (F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[..., :narrow]


def prompt_attention(q: Tensor, kv: Tensor, k_rope: Tensor, scale: float) -> Tensor:
    """Attention in the plain form of the last tokens of a sequence, each of which sees all up to itself.

    q: [tokens, heads, nope + rotary]; kv: [context, heads, nope + v_dim], of all tokens of the sequence each head's key
    without position and its value; k_rope: [context, rotary], the rest of the key, the same for all heads; queries and
    keys turned already. Returns [tokens, heads, v_dim].
    """
    tokens, heads, dim = q.shape
    context, rotary = k_rope.shape
    nope = dim - rotary
    v_dim = kv.shape[-1] - nope
    if kv.shape[:2] != (context, heads) or tokens > context or nope < 0 or v_dim < 1:
        raise ValueError(
            f"q {tuple(q.shape)}, kv {tuple(kv.shape)} and k_rope {tuple(k_rope.shape)} do not fit"
        )
    whole = nope % 16 == 0 and rotary % 16 == 0 and v_dim % 32 == 0
    # torch's kernel is good where it has AMX; without, it is several times slower than ours.
    if whole and usable(q, kv) and not torch.is_grad_enabled() and not torch.cpu._is_amx_tile_supported():
        out = q.new_empty(tokens, heads, v_dim)
        k_rope = k_rope if k_rope.stride(1) == 1 else k_rope.contiguous()
        keys = kv.contiguous(), pointer(k_rope), k_rope.stride(0)
        call(
            "plain_attention", q.contiguous(), *keys, out, tokens, context, heads, nope, rotary, v_dim, scale
        )
        return out
    mask = None
    if tokens < context:  # the queries are the last rows of the causal triangle
        mask = q.new_ones(tokens, context, dtype=torch.bool).tril(context - tokens)
    k_nope, v = kv.split((nope, v_dim), dim=-1)
    k = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, heads, -1)), dim=-1)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return causal_attention(q, k, v, scale, None if mask is None else mask[None, None])[0].transpose(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> Tensor:
    """Turn the pairs of x [..., rotary] by angles whose cos and sin broadcast to [..., rotary / 2].

    Pairs are neighbours (2i, 2i + 1) as DeepSeek lays them out, or (i, i + rotary / 2) if not `interleave`. The
    result holds all first members, then all second ones: queries and keys are permuted alike, so scores do not
    change.
    """
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if interleave else x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rotary_attention(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    angles: tuple[Tensor, Tensor],
    scale: float,
    interleave: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """Latent attention over whole sequences in the plain form, from its turn to its weighted sum of values.

    q: [batch, seq, heads, nope + rotary], not yet turned; kv: [batch, seq, heads, nope + v_dim], a head's key without
    position and its value; k_rope: [batch, seq, rotary], the key all heads share, not yet turned; angles: cos and
    sin, [seq, rotary / 2] or with a batch before; mask: as in `causal_attention`. Returns [batch, seq, heads, v_dim].
    """
    rotary = k_rope.shape[-1]
    nope = q.shape[-1] - rotary
    fits = rotary % 32 == 0 and rotary <= 256 and nope % 16 == 0
    # torch's kernel is good where it has AMX; without, it is three times slower than ours.
    if mask is None and fits and trains(q, kv, k_rope) and not torch.cpu._is_amx_tile_supported():
        result: Tensor = _RotaryAttention.apply(  # type: ignore[no-untyped-call]
            q, kv, k_rope, *angles, scale, interleave
        )
        return result
    cos, sin = angles
    q_nope, q_rope = q.split((nope, rotary), dim=-1)
    k_nope, v = kv.split((nope, kv.shape[-1] - nope), dim=-1)
    k_rope = rotate(k_rope, cos, sin, interleave)
    q = torch.cat((q_nope, rotate(q_rope, cos.unsqueeze(-2), sin.unsqueeze(-2), interleave)), dim=-1)
    k = torch.cat((k_nope, k_rope.unsqueeze(-2).expand(*k_nope.shape[:-1], -1)), dim=-1)
    return causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale, mask).transpose(
        1, 2
    )


class _RotaryAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        k_rope: Tensor,
        cos: Tensor,
        sin: Tensor,
        scale: float,
        interleave: bool,
    ) -> Tensor:
        batch, seq, heads, dim = q.shape
        rotary = k_rope.shape[-1]
        nope = dim - rotary
        fit = kv.shape[:3] == q.shape[:3] and k_rope.shape[:2] == q.shape[:2] and cos.shape == sin.shape
        if not fit or cos.shape not in [(*rows, seq, rotary // 2) for rows in ((), (1,), (batch,))]:
            shapes = [tuple(t.shape) for t in (q, kv, k_rope, cos, sin)]
            raise ValueError(f"q, kv, k_rope, cos and sin of shapes {shapes} do not fit")
        q, kv, cos, sin = (t.contiguous() for t in (q, kv, cos.float(), sin.float()))
        shared = k_rope.flatten(0, 1)
        shared = shared if shared.stride(1) == 1 else shared.contiguous()
        v = kv[..., nope:]
        turned, k, out = torch.empty_like(q), torch.empty_like(q), q.new_empty(v.shape)
        lse = torch.empty(batch, heads, seq, dtype=torch.float32)
        sizes = (batch * seq, heads, nope, rotary, int(interleave))
        positions = cos.numel() // cos.shape[-1]
        key = (pointer(shared), shared.stride(0))
        call("rope_forward", q, kv, kv.shape[-1], *key, cos, sin, positions, turned, k, *sizes)
        views = [View.of(t.transpose(1, 2)) for t in (turned, k, v, out)]
        call("attention_forward", *views, lse, batch, heads, seq, dim, v.shape[-1], scale)
        ctx.save_for_backward(turned, k, kv, out, lse, cos, sin)
        ctx.scale, ctx.sizes, ctx.positions = scale, sizes, positions
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, kv, out, lse, cos, sin = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        batch, seq, heads, dim = q.shape
        nope, rotary = ctx.sizes[2:4]
        v_dim = kv.shape[-1] - nope
        grad_q, grad_k, grad_kv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(kv)
        inputs = [View.of(t.transpose(1, 2)) for t in (q, k, kv[..., nope:], out)]
        results = [View.of(t.transpose(1, 2)) for t in (grad, grad_q, grad_k, grad_kv[..., nope:])]
        call("attention_backward", *inputs, lse, *results, batch, heads, seq, dim, v_dim, ctx.scale)
        grad_shared = q.new_empty(batch, seq, rotary)
        turned = (grad_q, grad_k, cos, sin, ctx.positions)
        call("rope_backward", *turned, grad_kv, kv.shape[-1], grad_shared, *ctx.sizes)
        return grad_q, grad_kv, grad_shared, None, None, None, None


def latent_attention(
    q: Tensor, latents: Tensor, rank: int, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Attention of all heads over one shared row of latents per context token (absorbed form).

    q: [batch, rows, latent_dim], where rows are heads, or heads of several tokens; latents:
    [batch, context, latent_dim], whose first `rank` numbers are also the values; mask: bool,
    [batch, rows or 1, context], True where a row may look. Returns [batch, rows, rank].
    """
    kv = latents[:, None]
    # The values are the keys without their rotary tail; asking for the tail as well keeps one head size,
    # and with it the flash kernel, for the price of a few columns.
    out = F.scaled_dot_product_attention(
        q[:, None], kv, kv, attn_mask=None if mask is None else mask[:, None], scale=scale
    )
    return out[:, 0, :, :rank]


def paged_latent_attention(
    q: Tensor, cache: Tensor, tables: Tensor, owners: Tensor, positions: Tensor, rank: int, scale: float
) -> Tensor:
    """`latent_attention` of single tokens over latents that lie in blocks.

    q: [tokens, heads, latent_dim]; cache: [blocks, size, latent_dim]; tables: [sequences, most] int32, each sequence's
    blocks in order; owners: [tokens] int32, each token's row in tables; positions: [tokens] int64: a token sees what
    its sequence has up to this position. Returns [tokens, heads, rank].

    Where it is native a token's result is the same bits whatever other tokens there are.
    """
    if not len(q):
        return q.new_empty(*q.shape[:2], rank)
    if _pages(q, cache, rank):
        out = q.new_empty(*q.shape[:2], rank)
        sizes = (*q.shape, rank, tables.shape[1])
        where = tables.contiguous(), owners, positions
        call("paged_attention", q.contiguous(), cache, *where, out, *sizes, scale)
        return out
    if triton.usable(q, cache) and not torch.is_grad_enabled():
        from dsv3.kernels.triton import attention as on_gpu

        if on_gpu.fits(q, cache):
            return on_gpu.paged_latent_attention(q, cache, tables, owners, positions, rank, scale)
    per_token = tables.shape[1] * cache.shape[1] * cache.shape[2]
    if (
        len(q) > 1 and len(q) * per_token > _GATHERED
    ):  # in parts of like lengths, each as wide as its longest needs
        out = q.new_empty(*q.shape[:2], rank)
        for part in positions.argsort(descending=True).split(max(1, _GATHERED // per_token)):
            blocks = int(positions[part[0]]) // cache.shape[1] + 1
            where = tables[:, :blocks], owners[part], positions[part]
            out[part] = paged_latent_attention(q[part], cache, *where, rank, scale)
        return out
    latents = cache[tables[owners]].flatten(1, 2)
    seen = torch.arange(latents.shape[1], device=q.device) <= positions.unsqueeze(1)
    return latent_attention(q, latents, rank, scale, seen.unsqueeze(1))


def _pages(q: Tensor, cache: Tensor, rank: int) -> bool:
    """Whether attention over blocks is native."""
    return cache.shape[1] == 64 and rank % 32 == 0 and usable(q, cache) and not torch.is_grad_enabled()


def span_latent_attention(
    q: Tensor, cache: Tensor, blocks: Tensor, context: int, rank: int, scale: float
) -> Tensor:
    """The same of the last tokens of one sequence that has `context` of them, in these blocks [blocks] int64.

    q: [tokens, heads, latent_dim]; returns [tokens, heads, rank].
    """
    tokens, heads, dim = q.shape
    if _pages(q, cache, rank) and not torch.cpu._is_amx_tile_supported():
        owners = blocks.new_zeros(tokens, dtype=torch.int32)
        positions = torch.arange(context - tokens, context, device=blocks.device)
        return paged_latent_attention(q, cache, blocks.int()[None], owners, positions, rank, scale)
    mask = q.new_ones(tokens, context, dtype=torch.bool).tril(context - tokens)
    rows = mask.repeat_interleave(heads, dim=0)[None]
    latents = cache[blocks].flatten(0, 1)[None, :context]
    return latent_attention(q.view(1, -1, dim), latents, rank, scale, rows).view(tokens, heads, rank)


def per_head(x: Tensor, weight: Tensor, part: slice, transposed: bool = False) -> Tensor:
    """Each head's x times a part of that head's matrix: how absorption moves an expansion from context to token.

    x: [tokens, heads, in]; weight: [heads, rows, cols], of which only the rows in `part` count. Returns
    x @ weight[:, part] for in = rows of the part, [tokens, heads, cols]; or if `transposed`, for in = cols,
    x @ weight[:, part].T, [tokens, heads, rows of the part].
    """
    x = x.transpose(0, 1)
    if not transposed:
        out = torch.bmm(x, weight[:, part])
    elif weight.is_cpu and weight.dtype == torch.bfloat16 and x.shape[1] <= _FEW:
        # oneDNN copies transposed matrices with gaps between them. With 16 heads of 128 + 128 rows of 512, one thread,
        # to read all rows is 7 times as fast for one token, 2.7 for 32, 1.1 for 128, and slower from 192 on.
        out = torch.bmm(x, weight.transpose(1, 2))[..., part]
    else:
        out = torch.bmm(x, weight[:, part].transpose(1, 2))
    return out.transpose(0, 1)
