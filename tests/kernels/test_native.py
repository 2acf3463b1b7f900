"""The native kernels against torch's ways, which their callers fall back on, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dsv3.kernels import attention, cross_entropy, moe, native, norm
from dsv3.train.optimizer import MasterAdamW

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native kernels on this machine")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def check(function: Callable[..., Tensor], inputs: list[Tensor], node: str, tolerance: float = 5e-3) -> None:
    """The result and all gradients, relative to their norms, against the same function in float64.

    node: the autograd node that shows that the native way was taken.
    """
    ours = [t.clone().requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    out, wanted = function(*ours), function(*exact)
    assert node in str(out.grad_fn)
    assert out.dtype in (torch.bfloat16, torch.float32)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    out.backward(pull)
    wanted.backward(pull.double())
    pairs = [(out.detach(), wanted.detach())] + [(a.grad, b.grad) for a, b in zip(ours, exact, strict=True)]
    for a, b in pairs:
        assert a is not None and b is not None and a.shape == b.shape
        assert (a.double() - b).norm() <= tolerance * b.norm(), (a, b)


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize(
    "batch, heads, seq, nope, rotary, v_dim",
    [(2, 3, 1, 16, 32, 16), (1, 2, 64, 32, 32, 64), (2, 2, 130, 48, 64, 32), (1, 1, 511, 128, 64, 128)],
)
def test_rotary_attention(
    batch: int, heads: int, seq: int, nope: int, rotary: int, v_dim: int, interleave: bool
) -> None:
    angle = torch.rand(batch, seq, rotary // 2, generator=torch.Generator().manual_seed(7)) * 6

    def attend(q: Tensor, kv: Tensor, latent: Tensor) -> Tensor:
        angles = angle.cos().to(q.dtype), angle.sin().to(q.dtype)
        if q.dtype == torch.bfloat16:
            angles = angle.cos(), angle.sin()
        k_rope = latent[..., 8:]  # a slice, as in the model
        return attention.rotary_attention(q, kv, k_rope, angles, 1 / math.sqrt(nope + rotary), interleave)

    q, kv = random(batch, seq, heads, nope + rotary), random(batch, seq, heads, nope + v_dim, seed=1)
    if seq > 1:
        check(attend, [q, kv, random(batch, seq, 8 + rotary, seed=2)], "_RotaryAttention")
        return
    out = attend(q.requires_grad_(), kv, random(batch, seq, 8 + rotary, seed=2))
    assert torch.equal(out, kv[..., nope:])  # one token sees itself alone


def test_angles_for_all_rows_or_for_each() -> None:
    q, kv, k_rope = (
        random(2, 9, 2, 48).requires_grad_(),
        random(2, 9, 2, 48, seed=1),
        random(2, 9, 32, seed=2),
    )
    angle = torch.arange(9).unsqueeze(1) * torch.rand(16)
    shared = attention.rotary_attention(q, kv, k_rope, (angle.cos(), angle.sin()), 0.2)
    each = angle.expand(2, -1, -1)
    assert torch.equal(attention.rotary_attention(q, kv, k_rope, (each.cos(), each.sin()), 0.2), shared)


@pytest.mark.parametrize("rows, width", [(1, 16), (37, 48), (300, 128)])
def test_swiglu(rows: int, width: int) -> None:
    check(moe.swiglu, [3 * random(rows, 2 * width)], "_SwiGLU")


@pytest.mark.parametrize("shape", [(1, 16), (3, 7, 48), (200, 256)])
@pytest.mark.parametrize("gap", [0, 24])
def test_rms_norm(shape: tuple[int, ...], gap: int) -> None:
    def normed(x: Tensor, weight: Tensor) -> Tensor:
        x = x[..., : shape[-1]]  # rows with a gap between them, as the latents have
        if x.dtype == torch.float64:
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        return norm.rms_norm(x, weight, 1e-6)

    inputs = [random(*shape[:-1], shape[-1] + gap), 1 + random(shape[-1], seed=1)]
    check(normed, inputs, "_NativeRMSNorm")


@pytest.mark.parametrize("tokens, experts, chosen", [(1, 4, 2), (300, 5, 3)])
def test_routed_experts(tokens: int, experts: int, chosen: int) -> None:
    hidden, width = 32, 16
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(5))
    indices = scores.topk(chosen).indices
    inputs = [random(tokens, hidden), random(tokens, chosen, seed=1)]
    inputs += [random(experts, 2 * width, hidden, seed=2) / 4, random(experts, hidden, width, seed=3) / 4]
    check(lambda x, w, up, down: moe.routed_experts(x, indices, w, up, down), inputs, "_Combine", 0.02)


def test_cross_entropy() -> None:
    targets = torch.randint(48, (70,), generator=torch.Generator().manual_seed(3))
    targets[::7] = cross_entropy.IGNORE
    inputs = [random(70, 16), random(48, 16, seed=1)]
    check(
        lambda h, w: cross_entropy.linear_cross_entropy(h, w, targets), inputs, "_LinearCrossEntropy", 0.01
    )  # logits are bf16


def test_a_target_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(IndexError, match="target 48 of a vocabulary of 48"):
        cross_entropy.linear_cross_entropy(random(3, 16), random(48, 16), torch.tensor([1, 48, 2]))


def test_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> dict[str, Tensor]:
        model = nn.Linear(16, 64)
        with torch.no_grad():
            model.weight.copy_(random(64, 16))
            model.bias.copy_(random(64, seed=1))
        optimizer = MasterAdamW(model.bfloat16())
        for step in range(3):
            model.weight.grad, model.bias.grad = random(64, 16, seed=step), random(64, seed=9 + step)
            optimizer.accumulate()
            optimizer.step(0.01)
        return optimizer.state()

    ours = trained()
    monkeypatch.setattr("dsv3.train.optimizer.usable", lambda *tensors: False)
    for name, exact in trained().items():  # a moment may be rounded the other way, half a percent
        torch.testing.assert_close(ours[name], exact, rtol=0.0 if name == "steps" else 0.008, atol=1e-6)


def test_threads_do_not_change_a_bit() -> None:
    def results() -> list[Tensor]:
        x, weight = random(300, 64).requires_grad_(), random(64, seed=1).requires_grad_()
        q, kv = random(2, 70, 2, 48).requires_grad_(), random(2, 70, 2, 48, seed=1).requires_grad_()
        k_rope = random(2, 70, 32, seed=2).requires_grad_()
        out = attention.rotary_attention(q, kv, k_rope, (torch.ones(70, 16), torch.zeros(70, 16)), 0.2)
        (norm.rms_norm(x, weight, 1e-6).square().sum() + out.square().sum()).backward()
        return [t.grad for t in (x, weight, q, kv, k_rope) if t.grad is not None]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        torch.set_num_threads(2)
        assert all(torch.equal(a, b) for a, b in zip(alone, results(), strict=True))
    finally:
        torch.set_num_threads(before)


def test_without_gradients_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "call", lambda *arguments: pytest.fail("called"))
    for module in (attention, moe, norm):
        monkeypatch.setattr(module, "call", native.call)
    with torch.no_grad():
        moe.swiglu(random(4, 32))
        norm.rms_norm(random(40, 32), random(32), 1e-6)


def test_a_compiler_that_fails_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.library.__wrapped__() is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.library.__wrapped__() is None
