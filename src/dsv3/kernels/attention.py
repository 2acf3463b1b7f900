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

import torch
import torch.nn.functional as F
from torch import Tensor

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
