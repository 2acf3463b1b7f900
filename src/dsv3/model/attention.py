"""Multi-head latent attention (report, section 2.1.1, equations 1-11).

Keys and values of all heads are linear functions of one small latent per token, `c` (equation 1), plus one
rotary key shared by the heads (equation 3). Only these `kv_lora_rank + qk_rope_head_dim` numbers are cached:
576 for DeepSeek-V3, against 128 heads * (192 + 128) = 40,960 for the keys and values they stand for.

Two forms compute the same thing (`dsv3.kernels.attention` explains them): `_plain` expands latents into keys
and values, `_absorbed` attends over the latents themselves. Without a cache (training) the form is plain.
With one, tokens come as a flat batch: those of sequences that are being decoded are attended together in absorbed
form, and each longer span of a prompt takes the form that needs fewer multiplications.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv3.config import ModelConfig
from dsv3.kernels.attention import (
    paged_latent_attention,
    per_head,
    prompt_attention,
    rotary_attention,
    span_latent_attention,
)
from dsv3.model.flat import FlatBatch, Span
from dsv3.model.layers import RMSNorm
from dsv3.model.rope import Rope

# DeepSeek's code gives the norms of the latents their own epsilon, whatever `rms_norm_eps` says.
LATENT_NORM_EPS = 1e-6


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
            cache.view(-1, latent.shape[-1]).index_copy_(0, batch.slots, latent)
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

    def _plain(self, q_nope: Tensor, q_rope: Tensor, context: Tensor) -> Tensor:
        """Attention of the last tokens of one sequence with keys and values expanded from its latents [context, latent_dim].

        Queries are [tokens, heads, ...]; returns [tokens, heads * v].
        """
        compressed, k_rope = context.split((self.rank, self.rotary), dim=-1)
        kv = self.kv_b_proj(compressed).unflatten(-1, (self.heads, self.nope + self.v_dim))
        return prompt_attention(torch.cat((q_nope, q_rope), dim=-1), kv, k_rope, self.scale).flatten(1)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, cache: Tensor, span: Span) -> Tensor:
        """The same over the latents themselves, wherever in the cache they lie."""
        q = self._absorb(q_nope, q_rope)
        return self._expand(span_latent_attention(q, cache, span.blocks, span.context, self.rank, self.scale))

    def _absorb(self, q_nope: Tensor, q_rope: Tensor) -> Tensor:
        """(W_k c) . q = c . (W_k^T q): the key's expansion moves over to the query, [tokens, heads, latent_dim]."""
        return torch.cat((per_head(q_nope, self._expansion, slice(0, self.nope)), q_rope), dim=-1)

    def _expand(self, out: Tensor) -> Tensor:
        """... and the value's expansion to the weighted sum of latents [tokens, heads, rank]; [tokens, heads * v]."""
        values = slice(self.nope, self.nope + self.v_dim)
        return per_head(out, self._expansion, values, transposed=True).flatten(1)

    @property
    def _expansion(self) -> Tensor:
        """[heads, nope + v, rank]"""
        return self.kv_b_proj.weight.view(self.heads, self.nope + self.v_dim, self.rank)

    def _over_cache(self, q_nope: Tensor, q_rope: Tensor, cache: Tensor, batch: FlatBatch) -> Tensor:
        parts: list[Tensor] = []
        if batch.short:
            few = slice(0, batch.short)
            q = self._absorb(q_nope[few], q_rope[few])
            tables = batch.tables[:, : batch.short_blocks]
            where = cache, tables, batch.owners[few], batch.positions[few]
            parts.append(self._expand(paged_latent_attention(q, *where, self.rank, self.scale)))
        for span in batch.spans:
            new = span.tokens.stop - span.tokens.start
            q_parts = q_nope[span.tokens], q_rope[span.tokens]
            if new < span.context and self._absorbed_is_cheaper(new):
                parts.append(self._absorbed(*q_parts, cache, span))
            else:
                past = cache[span.blocks].flatten(0, 1)[: span.context]
                parts.append(self._plain(*q_parts, past))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _absorbed_is_cheaper(self, new: int) -> bool:
        """Per context token: the extra width of absorbed pairs, against expanding keys and values once."""
        extra_per_pair = 2 * self.rank + self.rotary - (self.qk_dim + self.v_dim)
        return new * extra_per_pair < self.rank * (self.nope + self.v_dim)
