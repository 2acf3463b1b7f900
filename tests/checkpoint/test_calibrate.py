"""What calibration measures, against the layers' inputs recomputed by hand."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.checkpoint import calibrate as module
from dsv3.checkpoint.calibrate import _PRIOR, _Products, calibrate
from dsv3.checkpoint.names import table
from dsv3.config import PRESETS
from dsv3.model import Routing, Transformer
from dsv3.quant.integers import feedback

TINY = PRESETS["tiny"]


def model_of(config=TINY) -> Transformer:  # type: ignore[no-untyped-def]
    model = Transformer(config)
    model.init_weights()
    return model


def products(x: Tensor) -> Tensor:
    rows = x.flatten(0, -2)
    return rows.T @ rows / len(rows)


@torch.no_grad()
def test_each_matrix_has_the_products_of_its_inputs() -> None:
    model, ids = model_of(), torch.randint(0, TINY.vocab_size, (3, 20))
    seen: list[tuple[int, int]] = []
    got = calibrate(model, ids, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    packed = {n for n, p in table(TINY).items() if p.packs and p.copy_of is None}
    assert got.keys() == packed
    widths = {name: table(TINY)[name].shape[1] for name in packed}
    assert {name: tuple(factor.shape) for name, factor in got.items()} == {
        n: (w, w) for n, w in widths.items()
    }

    block = model.block(0)  # dense
    x = model.embed_tokens(ids)
    normed = block.input_layernorm(x)
    q = block.self_attn.q_a_layernorm(block.self_attn.q_a_proj(normed))
    x = x + block.self_attn(normed, model.rope, model.rope(torch.arange(20)))
    mlp = block.post_attention_layernorm(x)
    gate, up = block.mlp.gate_up_proj(mlp).chunk(2, dim=-1)
    for name, inputs in {
        "self_attn.q_a_proj": normed,
        "self_attn.kv_a_proj_with_mqa": normed,
        "self_attn.q_b_proj": q,
        "mlp.gate_proj": mlp,
        "mlp.up_proj": mlp,
        "mlp.down_proj": F.silu(gate) * up,
    }.items():
        same(got[f"model.layers.0.{name}.weight"], products(inputs))
    same(got["lm_head.weight"], products(model.features(ids)[0]))


def same(factor: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(factor, feedback(expected), rtol=1e-3, atol=1e-3 * float(factor.max()))


@torch.no_grad()
def test_an_expert_counts_the_tokens_that_chose_it() -> None:
    model, ids = model_of(), torch.randint(0, TINY.vocab_size, (1, 160))
    got = calibrate(model, ids)
    moe = model.block(1).mlp
    inputs: list[Tensor] = []
    routing: list[Routing] = []
    hook = moe.register_forward_pre_hook(lambda module, given: inputs.append(given[0].flatten(0, -2)))
    model.features(ids, routing=routing)
    hook.remove()
    chosen = next(r.indices for r in routing if r.layer == 1)
    hidden = [
        F.silu(x @ w[: len(w) // 2].T) * (x @ w[len(w) // 2 :].T)
        for x, w in zip(
            [inputs[0][(chosen == e).any(1)] for e in range(TINY.n_routed_experts or 0)],
            moe.experts.gate_up_proj,
            strict=True,
        )
    ]
    every = torch.cat(hidden).square().mean(0).diag()
    for e, mine in enumerate(hidden):
        name = f"model.layers.1.mlp.experts.{e}"
        same(got[f"{name}.gate_proj.weight"], products(inputs[0]))
        same(got[f"{name}.up_proj.weight"], products(inputs[0]))
        same(got[f"{name}.down_proj.weight"], (mine.T @ mine + _PRIOR * every) / (len(mine) + _PRIOR))


def test_products_go_as_what_is_made_of_them_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory has room for one or the other, but not for both."""
    products: weakref.WeakSet[_Products] = weakref.WeakSet()
    left: list[int] = []

    class Known(_Products):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            products.add(self)

    def counted(total: Tensor) -> Tensor:
        left.append(len(products))
        return feedback(total)

    monkeypatch.setattr(module, "_Products", Known)
    monkeypatch.setattr(module, "feedback", counted)
    calibrate(model_of(), torch.randint(0, TINY.vocab_size, (1, 8)))
    assert len(left) > 20 and all(a - b <= 2 for a, b in zip(left, left[1:], strict=False))
    assert left[-1] <= 3 and left == sorted(left, reverse=True)


def test_nothing_stays_behind_in_the_model() -> None:
    model, ids = model_of(), torch.randint(0, TINY.vocab_size, (1, 8))
    calibrate(model, ids)
    assert not any(module._forward_pre_hooks for module in model.modules())
