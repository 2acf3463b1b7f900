"""Multi-head latent attention (report, section 2.1.1, equations 1-11).

Keys and values of all heads are linear functions of one small latent per token, `c` (equation 1), plus one
rotary key shared by the heads (equation 3). Only these `kv_lora_rank + qk_rope_head_dim` numbers are cached:
576 for DeepSeek-V3, against 128 heads * (192 + 128) = 40,960 for the keys and values they stand for.

Two forms compute the same thing (`dsv3.kernels.attention` explains them): `_plain` expands latents into keys
and values, `_absorbed` attends over the latents themselves. Without a cache (training) the form is plain.
With one, tokens come as a flat batch of spans: the single tokens of sequences that are being decoded are
attended together in absorbed form, and each longer span takes the form that needs fewer multiplications.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv3.config import ModelConfig
from dsv3.kernels.attention import causal_attention, latent_attention, per_head, rotary_attention
from dsv3.model.layers import RMSNorm
from dsv3.model.rope import Rope

# DeepSeek's code gives the norms of the latents their own epsilon, whatever `rms_norm_eps` says.
LATENT_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Span:
    """Consecutive new tokens of one sequence inside a flat batch."""

    tokens: slice
    """Where they stand in the flat batch."""
    row: int
    """The sequence's row in the cache."""
    context: int
    """Tokens of the sequence once these are in: its length so far plus the span's."""


@dataclass(frozen=True)
class FlatBatch:
    """New tokens of several sequences, one after the other, and the cache that holds their past.

    The first `decoding` tokens each belong to one sequence, in cache rows 0 .. decoding - 1; the spans
    follow. Nothing is padded, except that decoding rows are masked up to the longest of them.
    """

    positions: Tensor
    """[tokens] int64: each token's position in its sequence."""
    rows: Tensor
    """[tokens] int64: each token's row in the cache."""
    cache: Sequence[Tensor]
    """For each layer [rows, capacity, latent_dim], written in place."""
    decoding: int
    spans: tuple[Span, ...]
    decoding_context: int
    """The longest context among the decoding sequences, their new tokens included."""
    decoding_mask: Tensor | None
    """[decoding, 1, decoding_context] bool, True where a sequence has a token; None if all are equally long."""


class LatentAttention(nn.Module):
    """One layer's attention. Parameters are named as in the checkpoint."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.num_attention_heads
        self.nope, self.rotary, self.v_dim = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        self.rank, self.qk_dim = config.kv_lora_rank, config.qk_head_dim
        self.scale = config.softmax_scale

        hidden, bias = config.hidden_size, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, self.heads * self.qk_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, self.heads * self.qk_dim, bias=False)
        self.compresses_q = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.latent_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.rank, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.v_dim), bias=False)
        self.o_proj = nn.Linear(self.heads * self.v_dim, hidden, bias=bias)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        batch: FlatBatch | None = None,
    ) -> Tensor:
        """x: [batch, seq, hidden], or [tokens, hidden] with a flat `batch`. Returns the same shape.

        angles: cos and sin of the tokens' positions; mask: bool [batch, 1, seq, seq] instead of the causal one.
        """
        if batch is None:
            q, compressed, k_rope = self._compress(x)
            kv = self.kv_b_proj(compressed).unflatten(-1, (self.heads, self.nope + self.v_dim))
            out = rotary_attention(q, kv, k_rope, angles, self.scale, rope.interleave, mask).flatten(-2)
        else:
            q_nope, q_rope, latent = self._project(x, rope, angles)
            cache = batch.cache[self.layer]
            cache.index_put_((batch.rows, batch.positions), latent)
            out = self._over_cache(q_nope, q_rope, cache, batch)
        projected: Tensor = self.o_proj(out)
        return projected

    def _compress(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [..., heads, qk_dim], normed latents [..., rank] and the shared key [..., rotary], not turned yet."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.compresses_q else self.q_proj(x)
        compressed, k_rope = self.kv_a_proj_with_mqa(x).split((self.rank, self.rotary), dim=-1)
        return q.unflatten(-1, (self.heads, self.qk_dim)), self.kv_a_layernorm(compressed), k_rope

    def _project(self, x: Tensor, rope: Rope, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [..., heads, nope] and [..., heads, rope], and the latent row to cache [..., latent_dim]."""
        q, compressed, k_rope = self._compress(x)
        q_nope, q_rope = q.split((self.nope, self.rotary), dim=-1)
        cos, sin = angles
        q_rope = rope.rotate(q_rope, cos.unsqueeze(-2), sin.unsqueeze(-2))
        latent = torch.cat((compressed, rope.rotate(k_rope, cos, sin)), dim=-1)
        return q_nope, q_rope, latent

    def _plain(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, mask: Tensor | None) -> Tensor:
        """Attention with keys and values expanded from latents [batch, context, latent_dim].

        Queries are [batch, seq, heads, ...]; returns [batch, seq, heads * v].
        """
        compressed, k_rope = latent.split((self.rank, self.rotary), dim=-1)
        kv = self.kv_b_proj(compressed).unflatten(-1, (self.heads, self.nope + self.v_dim))
        k_nope, v = kv.split((self.nope, self.v_dim), dim=-1)
        k = torch.cat((k_nope, k_rope.unsqueeze(-2).expand(*k_nope.shape[:-1], -1)), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        out = causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.scale, mask)
        return out.transpose(1, 2).flatten(-2)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
        """The same over the latents themselves.

        Queries are [batch, seq, heads, ...], mask [batch, seq or 1, context]; returns [batch, seq, heads * v].
        """
        expand = self.kv_b_proj.weight.view(self.heads, self.nope + self.v_dim, self.rank)
        keys, values = slice(0, self.nope), slice(self.nope, self.nope + self.v_dim)
        batch, seq = q_nope.shape[:2]
        # (W_k c) . q = c . (W_k^T q): the key's expansion moves over to the query ...
        absorbed = per_head(q_nope.flatten(0, 1), expand, keys)
        q = torch.cat((absorbed.unflatten(0, (batch, seq)), q_rope), dim=-1).flatten(1, 2)
        if mask is not None and mask.shape[1] > 1:
            mask = mask.repeat_interleave(self.heads, dim=1)
        out = latent_attention(q, latents, self.rank, self.scale, mask)
        # ... and the value's expansion to the weighted sum of latents.
        out = per_head(out.reshape(batch * seq, self.heads, self.rank), expand, values, transposed=True)
        return out.reshape(batch, seq, -1)

    def _over_cache(self, q_nope: Tensor, q_rope: Tensor, cache: Tensor, batch: FlatBatch) -> Tensor:
        parts: list[Tensor] = []
        if batch.decoding:
            rows, past = slice(0, batch.decoding), cache[: batch.decoding, : batch.decoding_context]
            q = q_nope[rows].unsqueeze(1), q_rope[rows].unsqueeze(1)
            parts.append(self._absorbed(*q, past, batch.decoding_mask).squeeze(1))
        for span in batch.spans:
            new = span.tokens.stop - span.tokens.start
            past = cache[span.row, : span.context].unsqueeze(0)
            mask = None
            if new < span.context:  # the queries are the last rows of the causal triangle
                mask = (
                    past.new_ones(new, span.context, dtype=torch.bool).tril(span.context - new).unsqueeze(0)
                )
            q = q_nope[span.tokens].unsqueeze(0), q_rope[span.tokens].unsqueeze(0)
            if mask is not None and self._absorbed_is_cheaper(new):
                parts.append(self._absorbed(*q, past, mask).squeeze(0))
            else:
                parts.append(self._plain(*q, past, None if mask is None else mask.unsqueeze(1)).squeeze(0))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _absorbed_is_cheaper(self, new: int) -> bool:
        """Per context token: the extra width of absorbed pairs, against expanding keys and values once."""
        extra_per_pair = 2 * self.rank + self.rotary - (self.qk_dim + self.v_dim)
        return new * extra_per_pair < self.rank * (self.nope + self.v_dim)
