"""Integer weights: as good as trying everything, exact where exact is possible, and refused where nothing is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.errors import UserError
from dsv3.kernels.packed import Packed, dequantize, pack, panel, unpack
from dsv3.quant import integers, quantize_blocks
from dsv3.quant.integers import feedback, quantize

BITS = [(4, False), (4, True), (8, False), (8, True)]


def error(weight: Tensor, packed: Packed, importance: Tensor | None = None) -> Tensor:
    """Squared error of each group, [out, groups]."""
    each = (weight.double() - dequantize(packed, torch.float64)).square()
    if importance is not None:
        each = each * importance.double()
    return each.unflatten(1, (-1, packed.group)).sum(-1)


def least_error(weight: Tensor, group: int, zeros: range, importance: Tensor) -> Tensor:
    """By trying scales of both signs and zeros with 4 bits, each scale then fitted to the codes."""
    w = weight.double().unflatten(1, (-1, group))
    h = importance.double().unflatten(0, (-1, group))
    largest = w.abs().amax(-1, keepdim=True)
    least = torch.full(w.shape[:2], torch.inf, dtype=torch.float64)
    for reach in torch.linspace(3, 20, 400):
        for zero in zeros:
            for scale in (largest / reach, -largest / reach):
                q = (w / scale).round().clamp(-zero, 15 - zero)
                fit = (h * w * q).sum(-1) / (h * q * q).sum(-1).clamp(min=1e-30)
                least = torch.minimum(least, (h * (w - fit.unsqueeze(-1) * q).square()).sum(-1))
    return least


@pytest.mark.parametrize("important", [False, True])
@pytest.mark.parametrize(
    ("zero_points", "zeros", "near"), [(False, range(8, 9), 1.03), (True, range(3, 13), 1.05)]
)
def test_nearly_the_best_there_is(zero_points: bool, zeros: range, near: float, important: bool) -> None:
    weight = torch.randn(64, 96)
    importance = torch.randn(96).exp() if important else torch.ones(96)
    packed = quantize(weight, 4, 32, zero_points, importance if important else None)
    got, best = error(weight, packed, importance), least_error(weight, 32, zeros, importance)
    assert best.mean() * 0.999 < got.mean() < best.mean() * near
    assert (got / best).max() < 2.5


def test_better_than_the_largest_weight_made_minus_eight() -> None:
    """What llama.cpp's q4_0 does, and with 127 its q8_0."""
    weight = torch.randn(128, 512)
    groups = weight.unflatten(1, (-1, 32))
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    for bits, reach, gain in ((4, -8, 0.89), (8, 127, 0.999)):
        scale = (extreme / reach).half().double()
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        simple = (groups - scale * (groups / scale).round().clamp(low, high)).square().sum()
        assert error(weight, quantize(weight, bits, 32)).sum() < gain * simple


def test_zero_points_follow_what_is_not_centred() -> None:
    weight = torch.randn(32, 128) + 1.5
    with_zeros, without = quantize(weight, 4, 32, True), quantize(weight, 4, 32)
    assert error(weight, with_zeros).sum() < 0.5 * error(weight, without).sum()
    centred = torch.randn(32, 128)
    better = (
        error(centred, quantize(centred, 4, 32, True)).sum() < error(centred, quantize(centred, 4, 32)).sum()
    )
    assert better, "the symmetric way is one of those tried"


def test_importance_moves_the_error_to_where_it_does_not_matter() -> None:
    weight, importance = torch.randn(64, 256), torch.randn(256).mul(2).exp()
    with_it, without = quantize(weight, 4, 64, importance=importance), quantize(weight, 4, 64)
    assert error(weight, with_it, importance).sum() < 0.8 * error(weight, without, importance).sum()
    assert error(weight, with_it).sum() > error(weight, without).sum()
    for nothing in (torch.zeros(256), torch.full((256,), 7.0)):
        same = quantize(weight, 4, 64, importance=nothing)
        assert torch.equal(dequantize(same), dequantize(without)), "all alike: as without"


def correlated(rows: int, width: int) -> Tensor:
    """Inputs that mostly lie in a few directions, as a network's do."""
    return torch.randn(rows, width // 8) @ torch.randn(width // 8, width) + 0.3 * torch.randn(rows, width)


def test_columns_make_up_for_each_other() -> None:
    weight, x = torch.randn(64, 256), correlated(2000, 256)
    new = x[1000:]
    products = x[:1000].T @ x[:1000] / 1000

    def output_error(importance: Tensor | None) -> float:
        missing = weight - dequantize(quantize(weight, 4, 64, importance=importance))
        return float((new @ missing.T).square().sum())

    alone = output_error(None)
    assert output_error(feedback(products)) < 0.5 * alone
    assert output_error(products.diagonal()) > 0.8 * alone, "squares alone do not do that"


@pytest.mark.parametrize("zero_points", [False, True])
def test_each_column_is_followed_by_the_best_of_the_rest(zero_points: bool) -> None:
    """Against least squares solved anew after each column, in float64, with the scales that were chosen."""
    weight, x = torch.randn(16, 64), correlated(500, 64)
    products = x.T @ x / 500
    packed = quantize(weight, 4, 32, zero_points, feedback(products))
    h = products.double() + 0.01 * products.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    scale = panel_rows(packed.scale).double().repeat_interleave(32, 1)
    zero = (
        torch.full_like(scale, 8)
        if packed.zero is None
        else panel_rows(packed.zero).double().repeat_interleave(32, 1)
    )
    got = unpack(packed.codes, 4).double() - zero
    w, near = weight.double(), 0
    for j in range(64):
        expected = (w[:, j] / scale[:, j]).round().clamp(-zero[:, j], 15 - zero[:, j])
        near += int((expected == got[:, j]).sum())
        error = w[:, j] - got[:, j] * scale[:, j]
        w = w.clone()
        w[:, j + 1 :] += error.unsqueeze(1) * torch.linalg.solve(h[j + 1 :, j + 1 :], h[j + 1 :, j])
    assert near > 0.99 * weight.numel(), "all but ties"


def test_inputs_that_tell_nothing_change_nothing() -> None:
    weight = torch.randn(32, 128)
    for products in (torch.eye(128), torch.zeros(128, 128)):
        got = quantize(weight, 4, 32, importance=feedback(products))
        assert torch.equal(dequantize(got), dequantize(quantize(weight, 4, 32)))
    few = torch.randn(3, 128)  # fewer tokens than columns
    quantize(weight, 4, 32, importance=feedback(few.T @ few))
    with pytest.raises(UserError, match="calibration text"):
        feedback(torch.full((32, 32), torch.nan))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("bits", "zero_points"), BITS)
def test_what_is_representable_stays_exactly_so(bits: int, zero_points: bool, group: int) -> None:
    """Also q4_0 and q8_0, whose largest code is -8 or 8 - 1, and 127 or -127."""
    codes = torch.randint(0, 2**bits, (48, 256), dtype=torch.uint8)
    grouped = codes.unflatten(1, (-1, group))
    zero, zeros = torch.full((48, 256 // group), 2 ** (bits - 1), dtype=torch.uint8), None
    if zero_points:
        zero = torch.randint(0, 2**bits, zero.shape, dtype=torch.uint8)
        zeros = panel(zero)
        grouped[..., 0], grouped[..., 1] = 0, 2**bits - 1
    else:
        grouped[..., 0] = 0 if bits == 4 else 255
        if bits == 8:
            grouped[..., 1:] = grouped[..., 1:].clamp(1)
    scale = (torch.rand(zero.shape) * 0.1 + 0.01).half() * (1 - 2 * torch.randint(0, 2, zero.shape))
    kind = "int4" if bits == 4 else "int8"
    weight = dequantize(Packed(kind, pack(codes, bits), panel(scale), zeros))  # type: ignore[arg-type]
    x = correlated(100, 256)
    for importance in (None, feedback(x.T @ x)):
        assert torch.equal(dequantize(quantize(weight, bits, group, zero_points, importance)), weight)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    group=st.sampled_from([32, 64, 128]),
    panels=st.integers(1, 5),
    groups=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_every_weight_is_within_half_a_step(bits, group, panels, groups, dtype, size, seed) -> None:  # type: ignore[no-untyped-def]
    """Of its scale, or cut off beyond the last code; and no other code would be nearer."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(panels * 16, groups * group, generator=generator) * size).to(dtype)
    packed = quantize(weight, bits[0], group, bits[1])
    assert packed.shape == weight.shape and packed.group == group
    assert packed.kind == f"int{bits[0]}" and (packed.zero is not None) == bits[1]
    got = dequantize(packed).unflatten(1, (-1, group))
    step = panel_rows(packed.scale).double().abs().unsqueeze(-1)
    zero = 2.0 ** (bits[0] - 1) if packed.zero is None else panel_rows(packed.zero).double().unsqueeze(-1)
    sign = panel_rows(packed.scale).double().sign().unsqueeze(-1)
    ends = torch.stack((-zero * step * sign, (2 ** bits[0] - 1 - zero) * step * sign))
    wanted = torch.minimum(
        torch.maximum(weight.double().unflatten(1, (-1, group)), ends.amin(0)), ends.amax(0)
    )
    assert ((got.double() - wanted).abs() <= step * 0.5001 + 1e-9).all()


def panel_rows(scale: Tensor) -> Tensor:
    """[panels, groups, 16] as [rows, groups]."""
    return scale.movedim(2, 1).flatten(0, 1)


@pytest.mark.parametrize(("bits", "zero_points"), BITS)
def test_groups_of_zeros_and_of_next_to_nothing(bits: int, zero_points: bool) -> None:
    weight = torch.zeros(32, 128)
    weight[3, 40], weight[5, 64:96] = 2.0, 1e-38
    packed = quantize(weight, bits, 32, zero_points)
    got = dequantize(packed)
    assert got[3, 40] == 2.0 and got.count_nonzero() == 1
    assert all(tensor.float().isfinite().all() for tensor in packed.tensors)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e9])
def test_what_no_scale_can_bring_back_is_refused(bad: float) -> None:
    weight = torch.randn(32, 64)
    weight[31, 63] = bad
    for bits, zero_points in BITS:
        with pytest.raises(
            UserError, match=f"cannot be quantised to {bits} bits: it holds infinite, undefined"
        ):
            quantize(weight, bits, 32, zero_points)


def test_broken_importance_is_refused() -> None:
    for bad in (torch.nan, torch.inf, -1.0):
        importance = torch.ones(64)
        importance[5] = bad
        with pytest.raises(UserError, match="calibration text"):
            quantize(torch.randn(16, 64), 4, 32, importance=importance)


@pytest.mark.parametrize(
    ("bits", "group", "shape"), [(4, 32, (24, 64)), (4, 64, (16, 96)), (5, 32, (16, 64)), (8, 16, (16, 64))]
)
def test_what_does_not_fit_is_refused(bits: int, group: int, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no way of packing"):
        quantize(torch.zeros(shape), bits, group)


def test_chunks_and_packed_sources_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(400, 256)
    fp8 = Packed("fp8", *quantize_blocks(weight))
    int8 = quantize(weight, 8, 64)
    sources = (weight, weight.bfloat16(), fp8, int8)
    whole = [quantize(source, 4, 32, True) for source in sources]
    assert torch.equal(whole[2].codes, quantize(dequantize(fp8), 4, 32, True).codes)
    assert torch.equal(whole[3].codes, quantize(dequantize(int8), 4, 32, True).codes)
    x = correlated(1000, 256)
    factor = feedback(x.T @ x)
    fed = float(error(weight, quantize(weight, 4, 32, True, factor)).mean())
    monkeypatch.setattr(integers, "_CHUNK", 1)
    monkeypatch.setattr(integers, "_BLOCK", 1)
    for source, expected in zip(sources, whole, strict=True):
        got = quantize(source, 4, 32, True)
        assert all(torch.equal(a, b) for a, b in zip(got.tensors, expected.tensors, strict=True))
    assert error(weight, quantize(weight, 4, 32, True, factor)).mean() == pytest.approx(fed, rel=0.01)
