"""Arithmetic per token: against what torch counts while a model runs, and against what DeepSeek says of its own."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dsv3.config import PRESETS, ModelConfig
from dsv3.model import Transformer
from dsv3.train.flops import forward_flops_per_token, measure_matmul_rate, model_flops_per_token

ROWS, SEQ = 2, 12


def full_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attention in two plain products, all pairs of tokens: what torch's counter sees of it is what it is."""
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    return torch.matmul(scores.masked_fill(~causal, float("-inf")).softmax(dim=-1), v)


def beyond(config: ModelConfig, places: list[int]) -> float:
    """What the counter sees per row and our formula leaves out, for blocks over so many places each.

    The pairs above the causal diagonal; and the sum of a token's experts, which here is a product with their weights.
    """
    wide = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    total = 0.0
    for layer, seq in enumerate(places):
        total += 2 * wide * (seq * seq - seq * (seq + 1) / 2)
        if config.is_moe_layer(layer):
            total += 2 * config.num_experts_per_tok * config.hidden_size * seq
    return total


@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None, "n_shared_experts": 2, "num_hidden_layers": 2},
        {"n_shared_experts": None, "num_nextn_predict_layers": 2},
        {"n_routed_experts": None},
    ],
)
def test_it_is_what_torch_counts(mtp: bool, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3.kernels.attention.causal_attention", full_attention)
    config = PRESETS["tiny"].replace(**changes)
    model = Transformer(config)
    model.init_weights()
    ids = torch.randint(0, config.vocab_size, (ROWS, SEQ))
    with FlopCounterMode(display=False) as counter:
        hidden, mtp_hidden = model.features(ids, mtp=mtp)
        logits = [model.lm_head(h).sum() for h in (hidden, *mtp_hidden)]
        forward = counter.get_total_flops()
        torch.stack(logits).sum().backward()
    modules = config.num_nextn_predict_layers if mtp else 0
    places = [SEQ] * config.num_hidden_layers + [SEQ - k for k in range(1, modules + 1)]
    counted = forward / ROWS - beyond(config, places)
    assert forward_flops_per_token(config, SEQ, mtp) * SEQ == pytest.approx(counted, rel=1e-12)
    counted = counter.get_total_flops() / ROWS - 3 * beyond(config, places)
    assert model_flops_per_token(config, SEQ, mtp) * SEQ == pytest.approx(counted, rel=1e-12)


def test_deepseek_says_the_same_of_its_models() -> None:
    """arXiv 2505.09343, table 2: 250 GFLOP per token for V3 and 155 for V2, training in rows of 4,096 tokens."""
    v3 = PRESETS["v3-671b"]
    v2 = v3.replace(
        vocab_size=102_400,
        hidden_size=5120,
        intermediate_size=12_288,
        moe_intermediate_size=1536,
        num_hidden_layers=60,
        n_routed_experts=160,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        topk_group=3,
    )
    assert round(model_flops_per_token(v3, 4096, mtp=False) / 1e9) == 250
    assert round(model_flops_per_token(v2, 4096, mtp=False) / 1e9) == 155


def test_a_matmul_rate_is_one_that_a_matmul_reaches() -> None:
    started = time.perf_counter()
    rate = measure_matmul_rate("cpu", torch.float32, seconds=0.1)
    took = time.perf_counter() - started
    assert 1e8 < rate < 1e14 and took < 5, f"{rate:.3g} FLOP/s, measured in {took:.1f} s"
    a = torch.randn(512, 512)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - started)
    # Loose on purpose: other programs use the machine, and what is measured here must not be what they leave.
    assert 0.1 < rate * min(times) / (2 * 512**3) < 30
