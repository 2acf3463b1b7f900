"""The technical report's equations 1-16 and 21-23, written down again as plainly as possible.

One sequence, one token at a time, one head at a time, in float64, with the rotation of section 2.1.1 as
explicit 2 x 2 matrices. Nothing here is shared with `dsv3.model` but the weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv3.config import ModelConfig
from dsv3.model import Transformer
from dsv3.model.attention import LatentAttention
from dsv3.model.layers import FeedForward
from dsv3.model.moe import MoE
from dsv3.model.transformer import Block


def logits(model: Transformer, ids: list[int]) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The main model's logits at each position, and each MTP module's."""
    config = model.config
    emb = model.embed_tokens.weight.double()
    head = model.lm_head.weight.double()

    h = [emb[t] for t in ids]
    for layer in model.layers:
        h = block(layer, h, config)
    h = [norm(x, model.norm.weight, config.rms_norm_eps) for x in h]
    main = [head @ x for x in h]

    modules = []
    for k, module in enumerate(model.mtp, start=1):
        positions = range(len(ids) - k)  # 1 : T-k in the report, which counts tokens from one
        eps = config.rms_norm_eps
        # 21: the projection of the two norms, [embedding; hidden] as the released weights have it
        inputs = [
            module.eh_proj.weight.double()
            @ torch.cat(
                [norm(emb[ids[i + k]], module.enorm.weight, eps), norm(h[i], module.hnorm.weight, eps)]
            )
            for i in positions
        ]
        # 22: one block over all of them
        h = [norm(x, module.norm.weight, eps) for x in block(module.block, inputs, config)]
        # 23: the shared head
        modules.append([head @ x for x in h])
    return main, modules


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x**2).mean() + eps) * weight.double()


def block(layer: Block, h: list[Tensor], config: ModelConfig) -> list[Tensor]:
    eps = config.rms_norm_eps
    u = attention(layer.self_attn, [norm(x, layer.input_layernorm.weight, eps) for x in h], config)
    h = [a + b for a, b in zip(h, u, strict=True)]
    f = [feed_forward(layer.mlp, norm(x, layer.post_attention_layernorm.weight, eps), config) for x in h]
    return [a + b for a, b in zip(h, f, strict=True)]


def attention(layer: LatentAttention, h: list[Tensor], config: ModelConfig) -> list[Tensor]:
    nope, rope, v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    per_head = layer.kv_b_proj.weight.double().view(config.num_attention_heads, nope + v_dim, -1)
    w_uk, w_uv = per_head[:, :nope], per_head[:, nope:]

    c_kv, k_rope, queries = [], [], []
    for position, x in enumerate(h):
        down = layer.kv_a_proj_with_mqa.weight.double() @ x  # 1, and inside 3
        c_kv.append(norm(down[: config.kv_lora_rank], layer.kv_a_layernorm.weight, 1e-6))
        k_rope.append(rotation(position, config) @ down[config.kv_lora_rank :])  # 3
        c_q = norm(layer.q_a_proj.weight.double() @ x, layer.q_a_layernorm.weight, 1e-6)  # 6
        queries.append((layer.q_b_proj.weight.double() @ c_q).view(-1, nope + rope))  # 7, and inside 8

    outputs = []
    for t in range(len(h)):
        heads = []
        for i in range(config.num_attention_heads):
            q_c, q_r = queries[t][i, :nope], rotation(t, config) @ queries[t][i, nope:]  # 7, 8
            scores = [
                (q_c @ (w_uk[i] @ c_kv[j]) + q_r @ k_rope[j]) * softmax_scale(config)  # 2, 4, 9
                for j in range(t + 1)
            ]
            weights = torch.stack(scores).softmax(0)
            heads.append(sum(weights[j] * (w_uv[i] @ c_kv[j]) for j in range(t + 1)))  # 5, 10
        outputs.append(layer.o_proj.weight.double() @ torch.cat(heads))  # 11
    return outputs


def rotation(position: int, config: ModelConfig) -> Tensor:
    """The matrix of RoPE for one position: each neighbouring pair turned by its own angle, times YaRN's scale."""
    matrix = torch.zeros(config.qk_rope_head_dim, config.qk_rope_head_dim, dtype=torch.float64)
    for pair in range(config.qk_rope_head_dim // 2):
        angle = position * frequency(pair, config)
        turn = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        matrix[2 * pair : 2 * pair + 2, 2 * pair : 2 * pair + 2] = torch.tensor(turn, dtype=torch.float64)
    yarn = config.rope_scaling
    if yarn is None:
        return matrix
    log = math.log(yarn.factor)
    return matrix * (0.1 * yarn.mscale * log + 1) / (0.1 * yarn.mscale_all_dim * log + 1)


def frequency(pair: int, config: ModelConfig) -> float:
    """Angle per position of one pair; YaRN's mixture of it and its `factor`-th part (arXiv 2309.00071, 3.2)."""
    dim, base, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    plain = float(base ** (-2 * pair / dim))
    if yarn is None:
        return plain

    def turning(times: float) -> float:
        wavelength = yarn.original_max_position_embeddings / times
        return dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(turning(yarn.beta_fast)), 0)
    high = min(math.ceil(turning(yarn.beta_slow)), dim - 1)
    ramp = float(pair > low) if low == high else min(max((pair - low) / (high - low), 0.0), 1.0)
    return plain * (1 - ramp) + plain / yarn.factor * ramp


def softmax_scale(config: ModelConfig) -> float:
    """1 / sqrt(d_h + d_h^R) of equation 10, and YaRN's temperature."""
    scale = 1 / math.sqrt(config.qk_nope_head_dim + config.qk_rope_head_dim)
    yarn = config.rope_scaling
    return scale if yarn is None else scale * (0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1) ** 2


def feed_forward(layer: MoE | FeedForward, u: Tensor, config: ModelConfig) -> Tensor:
    if isinstance(layer, FeedForward):
        return swiglu(u, layer.gate_up_proj.weight, layer.down_proj.weight)
    experts = config.n_routed_experts or 0
    size = experts // config.n_group
    s = [torch.sigmoid(u @ e) for e in layer.gate.weight.double()]  # 15
    bias = layer.gate.e_score_correction_bias
    assert bias is not None
    biased = [float(s[i]) + float(bias[i]) for i in range(experts)]
    rank = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(config.n_group)]
    groups = sorted(range(config.n_group), key=lambda g: rank[g])[-config.topk_group :]
    allowed = [i for i in range(experts) if i // size in groups]
    chosen = sorted(allowed, key=lambda i: biased[i])[-config.num_experts_per_tok :]  # 16
    total = sum(s[i] for i in chosen)
    out = torch.zeros_like(u)
    for i in chosen:  # 12, 13 and 14, with the released weights' scale
        gate = s[i] / total * config.routed_scaling_factor
        out += gate * swiglu(u, layer.experts.gate_up_proj[i], layer.experts.down_proj[i])
    shared = layer.shared_experts
    assert shared is not None
    return out + swiglu(u, shared.gate_up_proj.weight, shared.down_proj.weight)


def swiglu(u: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (gate_up.double() @ u).chunk(2)
    return down.double() @ (gate / (1 + torch.exp(-gate)) * up)
