"""Recomputation changes no bit of any gradient, and keeps fewer bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dsv3.config import PRESETS, ModelConfig
from dsv3.kernels import native
from dsv3.model import Routing, Transformer
from dsv3.model.attention import LatentAttention
from dsv3.model.moe import Gate
from dsv3.train.fp8 import apply_fp8
from dsv3.train.recompute import apply_recompute

CONFIGS = {
    "tiny": PRESETS["tiny"],
    "no query latent": ModelConfig(**{**PRESETS["tiny"].__dict__, "q_lora_rank": None}),
    "biases": ModelConfig(**{**PRESETS["tiny"].__dict__, "attention_bias": True}),
}


def model(config: ModelConfig, dtype: torch.dtype, in_fp8: bool, again: bool) -> Transformer:
    m = Transformer(config)
    m.init_weights()
    m.to(dtype)
    if in_fp8:
        apply_fp8(m)
    if again:
        apply_recompute(m)
    return m


def loss_of(m: Transformer, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    routing: list[Routing] = []
    out = m(tokens[:, :-1], mask=mask, routing=routing)
    main = F.cross_entropy(out.logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    mtp = F.cross_entropy(out.mtp_logits[0].flatten(0, 1).float(), tokens[:, 2:].flatten())
    return main + 0.3 * mtp + sum(r.scores.square().mean() for r in routing)


def gradients(m: Transformer, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    loss = loss_of(m, tokens, mask)
    loss.backward()
    return loss, {name: p.grad for name, p in m.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
def test_gradients_are_equal_to_the_bit(config: str, dtype: torch.dtype, in_fp8: bool, masked: bool) -> None:
    tokens = torch.randint(0, 256, (3, 41))
    mask = torch.rand(3, 1, 40, 40).lt(0.7).tril() | torch.eye(40, dtype=torch.bool) if masked else None
    loss, expected = gradients(model(CONFIGS[config], dtype, in_fp8, again=False), tokens, mask)
    again, grads = gradients(model(CONFIGS[config], dtype, in_fp8, again=True), tokens, mask)
    assert torch.equal(loss, again)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert torch.equal(grad, expected[name]), name


def test_two_microbatches_before_their_backward_passes() -> None:
    """As in a pipeline: what is kept belongs to a microbatch, not to the module."""
    tokens = torch.randint(0, 256, (2, 2, 41))
    plain, again = (model(CONFIGS["tiny"], torch.bfloat16, False, again) for again in (False, True))
    for m in (plain, again):
        first, second = loss_of(m, tokens[0]), loss_of(m, tokens[1])
        first.backward()
        second.backward()
    for ours, theirs in zip(again.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


# What is kept --------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """All memory that operators allocate, and how much is still in use: what is kept, whoever holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given:
                storage = t.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self) -> int:
        return sum(size for ref, size in self.made.values() if not ref.expired())


def kept_by(layer: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes per token that a layer keeps, without its input and output."""
    with Allocations() as allocations:
        out = layer(x)
    assert out.requires_grad
    return (allocations.alive() - out.untyped_storage().nbytes()) // x.shape[1]


def block(preset: str, index: int, in_fp8: bool, again: bool) -> Callable[[Tensor], Tensor]:
    m = model(PRESETS[preset], torch.bfloat16, in_fp8, again)
    angles = m.rope(torch.arange(256))
    return lambda x: m.layers[index](x, m.rope, angles)


@pytest.mark.parametrize("in_fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("index", [0, 1], ids=["dense", "moe"])
def test_fewer_bytes_are_kept(index: int, in_fp8: bool) -> None:
    x = torch.randn(1, 256, 256, dtype=torch.bfloat16).requires_grad_()
    before, after = (kept_by(block("nano", index, in_fp8, again), x) for again in (False, True))
    config = PRESETS["nano"]
    assert config.q_lora_rank is not None
    heads = config.num_attention_heads
    # In bf16: queries and keys of all heads (their values are part of kv_b_proj's output), that output, and the
    # normed latents. In FP8 the linears keep a byte a number of their input instead.
    queries_and_keys = heads * (2 * config.qk_head_dim + config.qk_nope_head_dim + config.v_head_dim) * 2
    assert before - after > queries_and_keys, f"{before} bytes per token before, {after} after"


def test_nothing_of_the_up_projections_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides its input, attention keeps the down-projections' results, its own, and a sum per head."""
    monkeypatch.setattr(native, "library", lambda: None)  # native attention is done again instead
    config = PRESETS["nano"]
    m = model(config, torch.bfloat16, False, True)
    angles = m.rope(torch.arange(256))
    x = torch.randn(1, 256, 256, dtype=torch.bfloat16).requires_grad_()
    kept = kept_by(lambda x: m.layers[0].self_attn(x, m.rope, angles), x)
    assert config.q_lora_rank is not None
    down = config.q_lora_rank + config.latent_dim
    # The flash kernel of a CPU wants values as wide as keys; here they are.
    assert config.qk_head_dim == config.v_head_dim
    heads = config.num_attention_heads
    assert kept == 2 * down + 2 * heads * config.v_head_dim + 4 * heads


def test_up_projections_are_done_again_and_attention_is_not() -> None:
    m = model(PRESETS["tiny"], torch.float32, False, True)
    runs: dict[str, int] = {}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func)
            runs[name] = runs.get(name, 0) + 1
            return func(*args, **(kwargs or {}))

    layer, angles = m.layers[0].self_attn, m.rope(torch.arange(40))
    x = torch.randn(2, 40, 32).requires_grad_()
    out = layer(x, m.rope, angles)
    grad = torch.ones_like(out)
    with Count():
        out.backward(grad)
    assert not any("scaled_dot_product" in name and "backward" not in name for name in runs), runs
    products_of_backward = 2 * 5
    assert runs["aten.mm.default"] == products_of_backward + 2, "q_b_proj and kv_b_proj"


def test_without_gradients_it_is_the_model_itself() -> None:
    m = model(PRESETS["tiny"], torch.float32, False, False)
    tokens = torch.randint(0, 256, (2, 30))
    with torch.no_grad():
        expected = m(tokens).logits
        apply_recompute(m)
        assert torch.equal(m(tokens).logits, expected)


def test_a_compiler_stays_out() -> None:
    """Its backend would be asked for a graph of attention or of a gate, and is not."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    tokens = torch.randint(0, 256, (2, 30))
    plain, again = (model(PRESETS["tiny"], torch.float32, False, again) for again in (False, True))
    for module in again.modules():
        if isinstance(module, LatentAttention | Gate):
            module.compile(backend=backend)
    loss, grads = gradients(again, tokens)
    expected, expected_grads = gradients(plain, tokens)
    assert torch.equal(loss, expected)
    assert all(torch.equal(grads[name], expected_grads[name]) for name in expected_grads)
    assert not any("linear" in target for graph in graphs for target in graph)


def test_a_copy_recomputes_with_its_own_weights() -> None:
    m = model(PRESETS["tiny"], torch.float32, False, True)
    copied = copy.deepcopy(m)
    with torch.no_grad():
        for p in copied.parameters():
            p.mul_(1.1)
    tokens = torch.randint(0, 256, (2, 30))
    loss, grads = gradients(copied, tokens)
    other = model(PRESETS["tiny"], torch.float32, False, False)
    other.load_state_dict(copied.state_dict())
    expected, expected_grads = gradients(other, tokens)
    assert torch.equal(loss, expected)
    assert all(torch.equal(grads[name], expected_grads[name]) for name in expected_grads)
