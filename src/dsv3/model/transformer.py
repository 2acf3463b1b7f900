"""The whole network: embedding, blocks, head, and the multi-token prediction modules after it.

Multi-token prediction (report, section 2.2, equations 21-23): module k predicts token i + k + 1 from the
representation that module k - 1 (the main model, for k = 1) has at position i, and from the embedding of
token i + k, which by then is known:

    h'_i = W [norm(Emb(t_{i+k})) ; norm(h_i)]      h = Block(h')      P(t_{i+k+1}) = Head(norm(h_i))

Embedding and head are the main model's own. The halves of what W reads are in the order of the released weights
(equation 21 has them the other way round), and `h` is what the head reads, that is, after the final norm, which
the report leaves open.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv3.config import ModelConfig
from dsv3.kernels.inference import is_native, linear
from dsv3.model import fused
from dsv3.model.attention import LatentAttention
from dsv3.model.flat import FlatBatch
from dsv3.model.layers import FeedForward, RMSNorm, weight_of
from dsv3.model.moe import Experts, MoE, Routing
from dsv3.model.rope import Rope


@dataclass(frozen=True)
class ModelOutput:
    """What a forward pass over whole sequences gives."""

    logits: Tensor
    """[batch, seq, vocab]: at position i, for token i + 1."""
    mtp_logits: tuple[Tensor, ...]
    """For module k = 1, 2, ...: [batch, seq - k, vocab]; at position i, for token i + k + 1."""
    hidden_states: Tensor
    """[batch, seq, hidden]: what the head reads."""


class Block(nn.Module):
    """Attention, then experts (or one dense feed-forward), each on the normed stream and added back to it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MoE | FeedForward
        if config.is_moe_layer(layer):
            self.mlp = MoE(config, layer)
        else:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        batch: FlatBatch | None = None,
        routing: list[Routing] | None = None,
    ) -> Tensor:
        if batch is not None and routing is None:
            done = fused.forward(self, x, rope, angles, batch)
            if done is not None:
                return done
        x = x + self.self_attn(self.input_layernorm(x), rope, angles, mask, batch)
        normed = self.post_attention_layernorm(x)
        update: Tensor = self.mlp(normed, routing) if isinstance(self.mlp, MoE) else self.mlp(normed)
        return x + update


class MTPModule(nn.Module):
    """One multi-token prediction module: two norms, a projection, a block, and the norm before the shared head."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = Block(config, layer)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        embedded: Tensor,
        hidden: Tensor,
        rope: Rope,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        batch: FlatBatch | None = None,
        routing: list[Routing] | None = None,
    ) -> Tensor:
        """embedded: the next tokens' embeddings, hidden: the representations so far, both [..., hidden]."""
        x = linear(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1), self.eh_proj.weight)
        out: Tensor = self.norm(self.block(x, rope, angles, mask, batch, routing))
        return out


class Transformer(nn.Module):
    """DeepSeek-V3 (and its relatives) of any size, with random weights until they are loaded or initialised."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.rope = Rope(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        first = config.num_hidden_layers
        self.mtp = nn.ModuleList(
            MTPModule(config, layer) for layer in range(first, first + config.num_nextn_predict_layers)
        )

    @torch.no_grad()
    def init_weights(self, seed: int = 0, first_expert: int = 0, within: str = "") -> None:
        """Normal(0, `initializer_range`) for every matrix (report, section 4.2); norms one, biases zero.

        Each matrix, and each expert of a stack, has random numbers of its own, by seed and name: a process that holds
        a part of the model gives it the same ones. first_expert: number of the first one in the stacks here; within:
        the module to do this for, by name, by default all.
        """

        def draw(matrix: Tensor, name: str) -> None:
            digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
            matrix.copy_(
                torch.empty(matrix.shape).normal_(0.0, self.config.initializer_range, generator=generator)
            )

        top = self.get_submodule(within)
        for name, parameter in top.named_parameters(within):
            module = self.get_submodule(name.rpartition(".")[0])
            if isinstance(module, Experts):
                for i, matrix in enumerate(parameter, start=first_expert):
                    draw(matrix, f"{name} {i}")
            elif isinstance(module, RMSNorm):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                draw(parameter, name)
        for buffer in top.buffers():  # correction biases
            buffer.zero_()

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        routing: list[Routing] | None = None,
    ) -> ModelOutput:
        """Logits of whole sequences; `features` says what the arguments are."""
        hidden, mtp_hidden = self.features(input_ids, positions, mask, routing)
        logits: Tensor = self.lm_head(hidden)
        return ModelOutput(logits, tuple(self.lm_head(h) for h in mtp_hidden), hidden)

    def features(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        routing: list[Routing] | None = None,
        mtp: bool = True,
    ) -> tuple[Tensor, list[Tensor]]:
        """Everything below the head, so that training can apply the head and the loss in pieces.

        input_ids: [batch, seq] int64; positions: [seq] or [batch, seq], by default 0, 1, ...; mask: bool
        [batch, 1, seq, seq], True where a query may look, by default causal; routing: a list to which each
        MoE layer appends what its gate decided; mtp: whether to run the MTP modules. Returns hidden
        [batch, seq, hidden] and, for MTP module k, [batch, seq - k, hidden].
        """
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        angles = self.rope(positions)
        hidden = self.through(self.embed_tokens(input_ids), angles, mask, routing)
        ahead = [input_ids[:, k:] for k in range(1, len(self.mtp) + 1 if mtp else 1)]
        return self.finish(hidden, ahead, angles, mask, routing)

    def through(
        self,
        hidden: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        routing: list[Routing] | None = None,
        layers: Iterable[int] | None = None,
    ) -> Tensor:
        """hidden [batch, seq, hidden] through these layers, by default all."""
        for layer in range(self.config.num_hidden_layers) if layers is None else layers:
            hidden = self.block(layer)(hidden, self.rope, angles, mask, routing=routing)
        return hidden

    def block(self, layer: int) -> Block:
        """One of the main model's layers."""
        found: Block = self.layers[layer]  # type: ignore[assignment]
        return found

    def finish(
        self,
        hidden: Tensor,
        ahead: Sequence[Tensor],
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        routing: list[Routing] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """What the head reads: the last layer's output normed, and each MTP module's.

        ahead: for module k the ids [batch, n] of the tokens that stand k after the first n places.
        """
        hidden = self.norm(hidden)
        previous, mtp_hidden = hidden, []
        for k, (module, ids) in enumerate(zip(self.mtp, ahead, strict=False), start=1):
            n = ids.shape[1]
            if not n:
                break
            near = (angles[0][..., :n, :], angles[1][..., :n, :])
            near_mask = None if mask is None else mask[..., :n, :-k]
            embedded = self.embed_tokens(ids)
            previous = module(embedded, previous[:, :n], self.rope, near, near_mask, routing=routing)
            mtp_hidden.append(previous)
        return hidden, mtp_hidden

    def forward_flat(self, input_ids: Tensor, batch: FlatBatch) -> Tensor:
        """New tokens of several sequences against their cache: input_ids [tokens], returns hidden [tokens, hidden].

        Apply `logits_flat` to the rows that are wanted; most prompt tokens' are not.
        """
        angles = self.rope(batch.positions)
        hidden = self.embed_tokens(input_ids)
        network = batch.network or fused.Network(self.layers, batch.cache)
        done = network.forward(hidden, self.rope, angles, batch)
        if done is None:
            done = hidden
            for block in self.layers:
                done = block(done, self.rope, angles, batch=batch)
        normed: Tensor = self.norm(done)
        return normed

    def logits_flat(self, hidden: Tensor) -> Tensor:
        """The head on rows that a flat forward pass gave: [rows, hidden] to [rows, vocab]."""
        return linear(hidden, weight_of(self.lm_head))

    @property
    def batch_invariant(self) -> bool:
        """Whether what a flat forward pass gives for a token follows from its sequence alone, to the bit."""
        head = weight_of(self.lm_head)
        return is_native(head) and all(
            fused.invariant(module) for module in self.modules() if isinstance(module, Block)
        )

    def draft_flat(self, next_ids: Tensor, hidden: Tensor, batch: FlatBatch) -> Tensor:
        """The first MTP module over a flat batch: at each token's place, what it expects after the token that follows.

        next_ids: [tokens], each token's successor; hidden: [tokens, hidden], what the main model (or, to look further
        ahead, this function) gave at the same place. The module has a layer of its own in the cache, the last one.
        Returns [tokens, hidden]; `lm_head` makes logits of it.
        """
        embedded = self.embed_tokens(next_ids)
        out: Tensor = self.mtp[0](embedded, hidden, self.rope, self.rope(batch.positions), batch=batch)
        return out
