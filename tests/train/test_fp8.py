"""The FP8 layers against float64 on the same rounded operands, and a model trained in FP8 beside one in bfloat16."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dsv3.checkpoint.names import table
from dsv3.config import PRESETS
from dsv3.kernels.moe import swiglu
from dsv3.model import Transformer
from dsv3.model.layers import FeedForward
from dsv3.model.moe import Experts
from dsv3.train import fp8
from dsv3.train.fp8 import Fp8AfterAttention, Fp8Linear, _ExpertLinear, apply_fp8, fp8_linear
from dsv3.train.optimizer import MasterAdamW

# Rounded operands, written out on their own -------------------------------------------------------------


def rounded(x: Tensor, tall: int, power_of_two: bool = False) -> Tensor:
    """What tiles (1 tall) or blocks (128 tall) of x stand for: each scaled to 448, rounded to e4m3, scaled back."""
    out = torch.empty(x.shape, dtype=torch.float32)
    for i in range(0, x.shape[0], tall):
        for j in range(0, x.shape[1], 128):
            here = slice(i, i + tall), slice(j, j + 128)
            part = x[here].float()
            scale = part.abs().max() / 448
            if power_of_two and scale > 0:
                scale = torch.tensor(2.0 ** math.ceil(math.log2(scale)))
            scale = scale if scale > 0 else torch.tensor(1.0)
            out[here] = (part / scale).to(torch.float8_e4m3fn).float() * scale
    return out


def e5m6(x: Tensor) -> Tensor:
    """x rounded to seven significant bits: what E5M6 is for numbers not far below the largest of their tile."""
    mantissa, exponent = torch.frexp(x.float())
    return torch.ldexp((mantissa * 128).round() / 128, exponent)


def close(ours: Tensor, left: Tensor, right: Tensor, name: str) -> None:
    """`ours` is left @ right.T up to float32's sums, and the last rounding if it is bfloat16."""
    left, right = left.double(), right.double()
    exact, size = left @ right.T, left.abs() @ right.abs().T
    allowed = (left.shape[1] + 8) * 2.0**-24 * size
    if ours.dtype == torch.bfloat16:
        allowed += exact.abs() * 2.0**-8
    error = (ours.double() - exact).abs()
    assert ours.shape == exact.shape
    assert (error <= allowed).all(), (
        f"{name} is off by {(error / allowed).max():.2f} times what rounding explains"
    )


def inputs(
    tokens: int, wide: int, out: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, wide, generator=g) * torch.randn(wide, generator=g).exp()
    weight = torch.randn(out, wide, generator=g) * 0.02
    grad = torch.randn(tokens, out, generator=g) * 1e-6  # gradients are small: they need their scales
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), grad.to(dtype)


# Layers ------------------------------------------------------------------------------------------------


def check_linear(
    tokens: int, wide: int, out: int, dtype: torch.dtype, after_attention: bool, seed: int = 0
) -> None:
    x, weight, grad = inputs(tokens, wide, out, dtype, seed)
    y = fp8_linear(x, weight, after_attention)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    assert y.dtype == grad_x.dtype == grad_weight.dtype == dtype

    x, weight = x.detach(), weight.detach()
    blocks = rounded(weight, 128)
    close(y, rounded(x, 1, after_attention), blocks, "Fprop")
    close(grad_x, rounded(grad, 1), blocks.T, "Dgrad")
    kept = e5m6(x) if after_attention else rounded(x, 1)
    close(grad_weight, rounded(grad.T, 1), rounded(kept.T, 1, after_attention), "Wgrad")


@pytest.mark.parametrize("after_attention", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 128, 128), (70, 300, 200), (130, 96, 64), (1, 256, 5)], ids=str)
def test_linear(shape: tuple[int, int, int], dtype: torch.dtype, after_attention: bool) -> None:
    check_linear(*shape, dtype, after_attention)


@settings(max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300), st.booleans(), st.integers(0, 99))
def test_linear_of_ragged_shapes(tokens: int, wide: int, out: int, after: bool, seed: int) -> None:
    check_linear(tokens, wide, out, torch.float32, after, seed)


def whole_numbers(rows: int, cols: int, seed: int) -> Tensor:
    """Of three bits, 7 being the largest in every tile and block: e4m3 has them all, with powers of two as scales."""
    x = torch.randint(-7, 8, (rows, cols), generator=torch.Generator().manual_seed(seed)).float()
    x[:, ::128] = 7
    return x / 32


def swiglu_in_fp8(x: Tensor, gate_up: Tensor, down: Tensor, power_of_two: bool) -> Tensor:
    linear = _ExpertLinear(power_of_two)
    return linear(swiglu(linear(x, gate_up)), down)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(256, 128, 128), (70, 300, 200), (1, 64, 96)], ids=str)
def test_swiglu(shape: tuple[int, int, int], power_of_two: bool) -> None:
    """With operands whose first two products are exact, so that what is rounded after them is the same number."""
    tokens, wide, width = shape
    leaves = [
        whole_numbers(tokens, wide, 1).requires_grad_(),
        whole_numbers(2 * width, wide, 2).requires_grad_(),
        whole_numbers(wide, width, 3).requires_grad_(),
    ]
    grad = whole_numbers(tokens, wide, 4)
    out = swiglu_in_fp8(*leaves, power_of_two)
    grad_x, grad_gate_up, grad_down = torch.autograd.grad(out, leaves, grad)

    x, gate_up, down = (leaf.detach() for leaf in leaves)
    for exact in (x, grad):
        assert torch.equal(rounded(exact, 1), exact)
    for exact in (gate_up, down):
        assert torch.equal(rounded(exact, 128), exact)
    hidden = (x.double() @ gate_up.double().T).float()
    close(out, rounded(swiglu(hidden), 1), down, "the output")

    kept = rounded(hidden, 1).requires_grad_()  # SwiGLU's input, in FP8
    activated = swiglu(kept)  # its output, computed again
    (grad_hidden,) = torch.autograd.grad(activated, kept, (grad.double() @ down.double()).float())
    close(grad_x, rounded(grad_hidden, 1), gate_up.T, "the gradient of x")
    close(grad_gate_up, rounded(grad_hidden.T, 1), rounded(x.T, 1, power_of_two), "the gradient of gate_up")
    by_tokens = rounded(grad.T, 1, power_of_two)
    close(grad_down, by_tokens, rounded(activated.detach().T, 1), "the gradient of down")


def test_feed_forward_is_swiglu_of_flat_tokens() -> None:
    module = nn.Sequential(FeedForward(48, 40))
    apply_fp8(module)
    x = torch.randn(2, 5, 48)
    expected = swiglu_in_fp8(x.view(10, 48), module[0].gate_up_proj.weight, module[0].down_proj.weight, False)
    assert torch.equal(module(x), expected.view(2, 5, 48))


def test_experts_are_swiglu_of_the_rows_they_are_given() -> None:
    experts = Experts(PRESETS["tiny"], 4)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    apply_fp8(experts)
    x = torch.randn(40, 32).requires_grad_()
    indices = torch.stack([torch.randperm(3)[:2] for _ in range(40)])  # the last expert gets nothing
    weights = torch.rand(40, 2)
    out = experts(x, indices, weights)
    pull = torch.randn(out.shape)
    grads = torch.autograd.grad(out, (x, *experts.parameters()), pull)

    gate_up, down = (p.detach().clone().requires_grad_() for p in experts.parameters())
    expected = torch.zeros(40, 32)
    for expert in range(3):
        rows, choice = (indices == expert).nonzero(as_tuple=True)
        y = swiglu_in_fp8(x[rows], gate_up[expert], down[expert], True)
        expected = expected.index_add(0, rows, y * weights[rows, choice, None])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, (x, gate_up, down), pull), strict=True):
        # The gates' products round in another order here, which can move a gradient to e4m3's next number.
        assert (ours - theirs).norm() < 2e-3 * theirs.norm()
    assert not grads[1][3].any() and not grads[2][3].any()


def test_a_bias_is_added_and_trained() -> None:
    linear = nn.Linear(30, 20)
    linear.__class__ = Fp8Linear
    x = torch.randn(4, 30)
    out = linear(x)
    assert linear.bias is not None
    assert torch.equal(out, fp8_linear(x, linear.weight) + linear.bias)
    out.sum().backward()
    assert torch.equal(linear.bias.grad, torch.full((20,), 4.0))


# What is kept for the backward pass ----------------------------------------------------------------------


def kept_bytes(f: Callable[[], Tensor], parameters: Iterator[nn.Parameter]) -> int:
    """Of all tensors that autograd keeps, without parameters and their views."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            sizes[t.untyped_storage().data_ptr()] = t.numel() * t.element_size()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        out = f()
    assert out.requires_grad
    return sum(sizes.values())


def test_activations_are_kept_in_eight_bits_and_after_attention_in_twelve() -> None:
    linear = nn.Linear(256, 384, bias=False)
    x = torch.randn(100, 256, dtype=torch.bfloat16)
    scales = 100 * 2 * 4
    for kind, number in ((Fp8Linear, 8), (Fp8AfterAttention, 12)):
        linear.__class__ = kind
        kept = kept_bytes(lambda: linear(x), linear.parameters())
        assert kept == 100 * 256 * number // 8 + scales


def test_of_swiglu_its_input_is_kept_in_eight_bits_and_its_output_not() -> None:
    module = nn.Sequential(FeedForward(256, 128)).bfloat16()
    apply_fp8(module)
    x = torch.randn(100, 256, dtype=torch.bfloat16)
    kept = kept_bytes(lambda: module(x), module.parameters())
    assert kept == 2 * (100 * 256 + 100 * 2 * 4)  # its own input, and SwiGLU's, 2 * 128 wide


# A model -----------------------------------------------------------------------------------------------


def model(preset: str = "tiny", dtype: torch.dtype = torch.bfloat16) -> Transformer:
    model = Transformer(PRESETS[preset])
    model.init_weights()
    return model.to(dtype)


@contextmanager
def weights_multiplied(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """The addresses of all matrices that are quantised to blocks meanwhile."""
    seen: set[int] = set()
    original = fp8.quantize_blocks

    def spy(weight: Tensor, check: bool = True) -> tuple[Tensor, Tensor]:
        seen.add(weight.data_ptr())
        return original(weight, check)

    with monkeypatch.context() as patch:
        patch.setattr(fp8, "quantize_blocks", spy)
        yield seen


def test_in_fp8_is_what_the_released_weights_have_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model()
    apply_fp8(m)
    tokens = torch.randint(0, 256, (4, 80))
    with weights_multiplied(monkeypatch) as seen:
        m(tokens)
    parameters = dict(m.named_parameters())
    expected = set()
    for piece in table(m.config).values():
        if piece.in_fp8 and not piece.name.endswith(".up_proj.weight"):  # of gate and up, which lie together
            expected.add(parameters[piece.parameter][piece.index].data_ptr())
    assert seen == expected


def test_parameters_stay_the_same_objects_and_so_do_their_names() -> None:
    m = model()
    before = dict(m.named_parameters())
    apply_fp8(m)
    after = dict(m.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    copied = copy.deepcopy(m)
    tokens = torch.randint(0, 256, (1, 9))
    assert torch.equal(copied(tokens).logits, m(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_gets_a_gradient_close_to_the_unrounded_one(dtype: torch.dtype) -> None:
    """Coarse on purpose: that the parts fit. What each part does exactly is above."""
    tokens = torch.randint(0, 256, (4, 65))
    grads = []
    for in_fp8 in (False, True):
        m = model(dtype=dtype)
        if in_fp8:
            apply_fp8(m)
        loss_of(m, tokens).backward()
        grads.append({name: p.grad.float() for name, p in m.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() == dict(m.named_parameters()).keys()
    a, b = (torch.cat([g.flatten() for g in grad.values()]) for grad in grads)
    assert F.cosine_similarity(a, b, dim=0) > 0.9


def loss_of(m: Transformer, tokens: Tensor) -> Tensor:
    out = m(tokens[:, :-1])
    main = F.cross_entropy(out.logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    mtp = F.cross_entropy(out.mtp_logits[0].flatten(0, 1).float(), tokens[:, 2:].flatten())
    return main + 0.3 * mtp


def test_a_model_learns_in_fp8_as_in_bfloat16() -> None:
    tokens = torch.randint(0, 256, (4, 65))
    curves = []
    for in_fp8 in (False, True):
        m = model()
        if in_fp8:
            apply_fp8(m)
        optimizer = MasterAdamW(m)
        curve = []
        for _ in range(20):
            loss = loss_of(m, tokens)
            loss.backward()
            optimizer.accumulate()
            optimizer.step(3e-3)
            curve.append(loss.item())
        assert all(master.dtype == torch.float32 for master in optimizer.masters.values())
        curves.append(curve)
    plain, rounded_curve = curves
    assert plain[-1] < plain[0] * 0.6, "so there was something to learn"
    worst = max(abs(a - b) / a for a, b in zip(plain, rounded_curve, strict=True))
    assert worst < 0.03, f"losses differ by {worst:.1%}"


def test_without_gradients_the_numbers_are_the_same() -> None:
    m = model(dtype=torch.float32)
    apply_fp8(m)
    attention = m.layers[0].self_attn
    for layer, width in ((attention.q_a_proj, 32), (attention.o_proj, 16), (m.layers[0].mlp, 32)):
        x = torch.randn(2, 5, width)
        with torch.no_grad():
            silent = layer(x)
        assert torch.equal(silent, layer(x)) and not silent.requires_grad


@pytest.mark.gpu
def test_on_a_gpu_a_step_is_that_of_the_cpu() -> None:
    tokens = torch.randint(0, 256, (4, 65))
    losses = []
    for device in ("cpu", "cuda"):
        m = model().to(device)
        apply_fp8(m)
        losses.append(loss_of(m, tokens.to(device)))
        losses[-1].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.01)
