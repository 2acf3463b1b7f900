"""How much arithmetic training is, and how much this machine can do: together, how well a run uses it.

What counts is the model's own arithmetic, not what a program spends on it (recomputed activations, padding):
the multiplications and additions of its matrix products, two for each number of a matrix that a token meets.
A token meets all of attention, norms aside, but only the experts chosen for it, the shared ones and the gate:

    attention   2 * (queries + latent + expansion + output)  +  2 * heads * (qk + v) * (seq + 1) / 2
    dense       2 * 3 * hidden * width
    experts     2 * (3 * hidden * width * (chosen + shared)  +  hidden * experts)
    head        2 * hidden * vocabulary
    MTP         2 * 2 * hidden * hidden  +  a block  +  the head once more; module k at seq - k of seq places

Token i sees i tokens, so on average (seq + 1) / 2: the causal half. The embedding is a look-up. The backward
pass multiplies twice where the forward pass does once, by the matrix for the input's gradient and by the input
for the matrix's; hence training is three times the forward pass. For DeepSeek-V3 in rows of 4,096 tokens this gives
250.5 GFLOP per token without MTP, for DeepSeek-V2 155.3; DeepSeek says 250 and 155 (arXiv 2505.09343, table 2).

The machine's rate is measured, not looked up: a data sheet's number holds for no laptop, and a GPU's clock follows
its power. The share of the rate that a run reaches is what others call MFU, against what a matrix product
reaches here and now instead of against the data sheet; it is the higher number of the two.
"""

from __future__ import annotations

import time

import torch

from dsv3.config import ModelConfig

_LARGEST = 8192
_LONG_ENOUGH = 0.01  # seconds: a product that takes this long is timed without a mistake that matters


def model_flops_per_token(config: ModelConfig, seq: int, mtp: bool) -> float:
    """FLOPs to train on one token in rows of `seq` inputs, forward and backward, with the MTP modules or without."""
    return 3 * forward_flops_per_token(config, seq, mtp)


def forward_flops_per_token(config: ModelConfig, seq: int, mtp: bool = False) -> float:
    """FLOPs of the forward pass per token of a row of `seq`, attention in plain form, logits for every token."""
    layers = range(config.num_hidden_layers)
    head = 2 * config.hidden_size * config.vocab_size
    total = head + sum(_block(config, layer, seq) for layer in layers)
    for k in range(1, config.num_nextn_predict_layers + 1 if mtp else 1):
        places = max(0, seq - k)
        module = 2 * 2 * config.hidden_size**2 + _block(config, len(layers) + k - 1, places) + head
        total += module * places / seq
    return total


def _block(config: ModelConfig, layer: int, seq: int) -> float:
    hidden, heads = config.hidden_size, config.num_attention_heads
    if config.q_lora_rank is None:
        queries = hidden * heads * config.qk_head_dim
    else:
        queries = config.q_lora_rank * (hidden + heads * config.qk_head_dim)
    latent = hidden * config.latent_dim
    expansion = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    output = heads * config.v_head_dim * hidden
    pairs = heads * (config.qk_head_dim + config.v_head_dim) * (seq + 1) / 2
    if config.is_moe_layer(layer):
        experts = config.num_experts_per_tok + (config.n_shared_experts or 0)
        gate = hidden * (config.n_routed_experts or 0)
        feed_forward = 3 * hidden * config.moe_intermediate_size * experts + gate
    else:
        feed_forward = 3 * hidden * config.intermediate_size
    return 2 * (queries + latent + expansion + output + pairs + feed_forward)


def measure_matmul_rate(device: torch.device | str, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """FLOP/s of the best square matrix product here, in about twice `seconds`.

    The matrices grow until one product takes long enough to be timed; then the best of those that `seconds` hold
    counts, as others may be using the machine. They hold random numbers: a GPU multiplies zeros faster, on less power.
    """
    device = torch.device(device)
    deadline = time.perf_counter() + seconds  # for growing alone
    size = 256
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        _multiply(a, b)  # the first of a shape may compile or choose its kernel
        took = _multiply(a, b)
        if took >= _LONG_ENOUGH or size >= _LARGEST or time.perf_counter() > deadline:
            break
        size *= 2
    best, deadline = took, time.perf_counter() + seconds
    while time.perf_counter() + best < deadline:
        best = min(best, _multiply(a, b))
    return 2 * size**3 / best


def _multiply(a: torch.Tensor, b: torch.Tensor) -> float:
    """Seconds that one product takes."""
    started = time.perf_counter()
    torch.mm(a, b)
    if a.device.type != "cpu":
        torch.accelerator.synchronize(a.device)
    return time.perf_counter() - started
