"""Weight gradients that are put off come out the same to the bit, and not before they are asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dsv3.config import PRESETS, ModelConfig
from dsv3.data.stream import Batch
from dsv3.kernels import moe, native
from dsv3.model import Transformer
from dsv3.parallel.deferred import DeferredProducts, apply_deferral, later, put_off
from dsv3.train.fp8 import apply_fp8
from dsv3.train.loss import objective
from dsv3.train.recompute import apply_recompute

# Sizes that the native kernels take, and biases, which stay with the input's gradients.
CONFIG = PRESETS["tiny"].replace(
    hidden_size=64, moe_intermediate_size=32, intermediate_size=96, attention_bias=True
)
WAYS = ["plain", "recompute", "fp8", "fp8 recompute", "recompute fp8"]


def model(config: ModelConfig, dtype: torch.dtype, way: str, deferral: bool | None) -> Transformer:
    """deferral: before or after what else changes the model, if at all."""
    m = Transformer(config)
    m.init_weights()
    m.to(dtype)
    if deferral is False:
        apply_deferral(m)
    for change in way.split():
        {"plain": lambda m: None, "recompute": apply_recompute, "fp8": apply_fp8}[change](m)
    if deferral is True:
        apply_deferral(m)
    return m


def batch(seed: int) -> Batch:
    tokens = torch.randint(0, 256, (3, 42), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, None, None)


def gradients(m: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in m.named_parameters()}


def check(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    for name, grad in theirs.items():
        assert grad is not None and ours[name] is not None, name
        assert torch.equal(ours[name], grad), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_equal_to_the_bit(dtype: torch.dtype, way: str) -> None:
    """Two microbatches in flight, their weights' gradients in the order of the backward passes."""
    plain = model(CONFIG, dtype, way, None)
    for seed in (1, 2):
        objective(plain, batch(seed), 0.3).total.backward()
    expected = gradients(plain)

    for after in (False, True):
        ours = model(CONFIG, dtype, way, after)
        losses = [objective(ours, batch(seed), 0.3).total for seed in (1, 2)]
        works = []
        for loss in losses:
            with put_off() as work:
                loss.backward()
            works.append(work)
        big = {name for name, p in ours.named_parameters() if p.grad is None}
        assert big == {name for name, _ in ours.named_parameters() if is_put_off(name)}
        for work in works:
            for piece in work:
                piece()
        check(gradients(ours), expected)

        ours.zero_grad()  # and without being put off
        for seed in (1, 2):
            objective(ours, batch(seed), 0.3).total.backward()
        check(gradients(ours), expected)


def is_put_off(name: str) -> bool:
    kinds = ("norm", "gate.weight", "embed_tokens", "lm_head", "eh_proj", "bias")
    return not any(kind in name for kind in kinds)


def test_without_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    test_equal_to_the_bit(torch.bfloat16, "recompute")


def test_recomputation_does_no_more_products() -> None:
    """The output matrix of attention, and what has been kept, are not multiplied by again."""
    counts = []
    for deferral in (None, True):
        m = model(CONFIG, torch.float32, "recompute", deferral)
        loss = objective(m, batch(1), 0.3).total
        with torch.profiler.profile() as profile:
            loss.backward()
        counts.append(
            sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm"))
        )
    assert counts[0] == counts[1]


def test_parts_of_a_parameter() -> None:
    """A part's gradient goes where the part lies, and `.grad` is added to."""
    whole = nn.Parameter(torch.zeros(3, 2, 4))
    whole.grad = torch.ones(3, 2, 4)
    grad = torch.randn(2, 4)
    with put_off() as work:
        assert later(whole.unbind()[1], lambda: grad) is None
    work[0]()
    assert torch.equal(whole.grad[1], 1 + grad) and torch.equal(whole.grad[::2], torch.ones(2, 2, 4))
    assert later(whole, lambda: grad) is grad  # outside of put_off
    with put_off() as work:  # a matrix that is computed has no place of its own
        assert later(whole * 2, lambda: grad) is grad and not work


def test_a_failure_ends_it() -> None:
    with pytest.raises(ZeroDivisionError), put_off():
        raise ZeroDivisionError
    assert later(nn.Parameter(torch.zeros(1)), lambda: torch.ones(1)) is not None


def test_experts_in_one_launch() -> None:
    """The way for CUDA, here on the CPU: an expert without tokens has a gradient of zero."""
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down = (
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((40, 32), (4, 64, 32), (4, 32, 32))
    )
    weights = torch.rand(40, 2, generator=generator)
    indices = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(40)])
    found = []
    for product in (moe._grouped_mm, DeferredProducts().grouped):
        leaves = [t.clone().requires_grad_() for t in (x, gate_up, down)]
        with put_off() as work:
            out = moe._grouped(leaves[0], indices, weights, *leaves[1:], product)
            out.square().sum().backward()
        assert len(work) == (0 if product is moe._grouped_mm else 2)
        for piece in work:
            piece()
        found.append([out, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_compiled() -> None:
    """torch's compiler leaves the products alone."""
    plain, ours = (model(CONFIG, torch.float32, "plain", deferral) for deferral in (None, True))
    objective(plain, batch(1), 0.3).total.backward()
    ours.layers[0].mlp.compile(backend="eager")
    with put_off() as work:
        objective(ours, batch(1), 0.3).total.backward()
    for piece in work:
        piece()
    check(gradients(ours), gradients(plain))
