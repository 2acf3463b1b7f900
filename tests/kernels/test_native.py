"""The native kernels against torch's ways, which their callers fall back on, in float64."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dsv3.kernels import attention, cross_entropy, moe, native, norm
from dsv3.train.optimizer import MasterAdamW

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native kernels on this machine")


@pytest.fixture(autouse=True)
def no_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is AMX attention is torch's; here it is ours everywhere."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


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


@pytest.mark.parametrize("target", [48, -1, -99, -101])
def test_a_target_outside_the_vocabulary_is_refused(target: int) -> None:
    with pytest.raises(IndexError, match=f"target {target} of a vocabulary of 48"):
        cross_entropy.linear_cross_entropy(random(3, 16), random(48, 16), torch.tensor([1, target, 2]))


def test_there_must_be_a_target_for_each_token() -> None:
    with pytest.raises(ValueError, match="for 3 tokens"):
        cross_entropy.linear_cross_entropy(random(3, 16), random(48, 16), torch.tensor([1, 2]))


def test_a_weight_of_another_width_is_left_to_torch() -> None:
    with pytest.raises(RuntimeError):
        norm.rms_norm(random(4, 64).requires_grad_(), random(32), 1e-6)


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
        torch.manual_seed(0)
        x, weight = random(300, 64).requires_grad_(), random(64, seed=1).requires_grad_()
        q, kv = random(2, 70, 2, 48).requires_grad_(), random(2, 70, 2, 48, seed=1).requires_grad_()
        k_rope = random(2, 70, 32, seed=2).requires_grad_()
        out = attention.rotary_attention(q, kv, k_rope, (torch.ones(70, 16), torch.zeros(70, 16)), 0.2)
        rows, gates = random(300, 64, seed=3).requires_grad_(), torch.rand(100, 2).requires_grad_()
        places = torch.arange(200).flip(0) + 50
        combined = moe._Combine.apply(rows, places, gates)
        gate_up = random(300, 64, seed=4).requires_grad_()
        outs = [out, norm.rms_norm(x, weight, 1e-6), combined, moe.swiglu(gate_up)]
        torch.stack([t.square().sum() for t in outs]).sum().backward()
        loss, grad = cross_entropy._cross_entropy(random(300, 64), torch.arange(300) % 64, 0.1)
        master, first, second = torch.ones(4096), *torch.zeros(2, 4096, dtype=torch.bfloat16)
        update = random(4096).float()
        native.call("adamw", master, first, second, update, 4096, 0.9, 0.95, 1e-8, 0.1, 1.0, 1.0)
        leaves = [t.grad for t in (x, weight, q, kv, k_rope, rows, gates, gate_up) if t.grad is not None]
        return [t.detach() for t in outs] + leaves + [loss, grad, master, first, second]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        torch.set_num_threads(2)
        assert all(torch.equal(a, b) for a, b in zip(alone, results(), strict=True))
    finally:
        torch.set_num_threads(before)


def test_without_gradients_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "call", lambda *arguments: pytest.fail("called"))
    with torch.no_grad():
        moe.swiglu(random(4, 32))


def test_a_norm_without_gradients_does_not_depend_on_other_rows() -> None:
    x, weight = random(40, 32), random(32, seed=1)
    with torch.no_grad():
        rows = [norm.rms_norm(row, weight, 1e-6) for row in x.split(1)]
        assert torch.equal(norm.rms_norm(x, weight, 1e-6), torch.cat(rows))
    assert torch.equal(norm.rms_norm(x.requires_grad_(), weight, 1e-6), torch.cat(rows))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Gives an empty cache, and a compiler that is a shell script; returns the folder of the cache."""

    def install(script: str) -> Path:
        compiler = tmp_path / "compiler"
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        return tmp_path / "dsv3"

    return install


def copy_of(library: object) -> str:
    """A script that compiles by copying what is loaded already, and counts how often in the file `$0.log`."""
    return f'echo "$@" >> "$0.log"; for to; do :; done; cp "{library._name}" "$to"'  # type: ignore[attr-defined]


def builds(tmp_path: Path) -> int:
    return len((tmp_path / "compiler.log").read_text().splitlines())


def test_a_compiler_that_fails_is_done_without_and_told(
    fake: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("echo the disk is full >&2; exit 1")
    with pytest.warns(UserWarning, match="the disk is full"):
        assert native.library.__wrapped__() is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.library.__wrapped__() is None


def test_builds_are_kept_and_one_that_is_cut_off_or_open_to_others_is_replaced(
    fake: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = fake(copy_of(native.library()))
    for _ in range(2):
        assert native.library.__wrapped__() is not None
    assert builds(tmp_path) == 1
    (built,) = folder.iterdir()
    assert (folder.stat().st_mode & 0o777, built.stat().st_mode & 0o777) == (0o700, 0o700)
    built.chmod(0o722)
    assert native.library.__wrapped__() is not None
    assert builds(tmp_path) == 2
    # In another folder, for what is loaded already is not opened again.
    other = tmp_path / "other" / "dsv3"
    other.mkdir(mode=0o700, parents=True)
    (other / built.name).write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(other.parent))
    assert native.library.__wrapped__() is not None
    assert builds(tmp_path) == 3
    assert native.library.__wrapped__() is not None
    assert builds(tmp_path) == 3


def test_nothing_is_kept_where_others_can_write(
    fake: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = fake(copy_of(native.library()))
    folder.mkdir()
    folder.chmod(0o777)
    for _ in range(2):
        assert native.library.__wrapped__() is not None
    assert builds(tmp_path) == 2 and not list(folder.iterdir())

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nobody)
    assert native.library.__wrapped__() is not None
    assert builds(tmp_path) == 3


def test_the_compiler_may_have_another_in_front(
    fake: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(copy_of(native.library()))
    monkeypatch.setenv("CXX", "env " + os.environ["CXX"])
    assert native.library.__wrapped__() is not None


@pytest.mark.parametrize("target", ["native", "x86-64-v4", "x86-64-v3"])
def test_the_source_has_no_warnings(target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_FLAGS", [*native._FLAGS, "-O0", "-Werror", "-fsyntax-only"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_open", lambda path: path)
    monkeypatch.setattr(Path, "chmod", lambda *arguments: None)
    with pytest.raises(FileNotFoundError):  # compiled without a word, and without a result
        native._load(["g++", f"-march={target}"])


WAYS: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "rms_norm": (lambda x, w: norm.rms_norm(x, w, 1e-6), [random(40, 32), random(32, seed=1)]),
    "swiglu": (moe.swiglu, [random(9, 64)]),
    "rotary_attention": (
        lambda q, kv, k: attention.rotary_attention(q, kv, k, (torch.ones(9, 16), torch.zeros(9, 16)), 0.2),
        [random(1, 9, 2, 48), random(1, 9, 2, 48, seed=1), random(1, 9, 32, seed=2)],
    ),
    "routed_experts": (
        lambda x, w, up, down: moe.routed_experts(x, torch.arange(18).view(9, 2) % 3, w, up, down),
        [random(9, 16), random(9, 2), random(3, 32, 16, seed=2), random(3, 16, 16, seed=3)],
    ),
    "linear_cross_entropy": (
        lambda h, w: cross_entropy.linear_cross_entropy(h, w, torch.arange(9)),
        [random(9, 16), random(48, 16, seed=1)],
    ),
}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", WAYS)
def test_what_is_not_finite_stays_visible(name: str, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever torch's way has a number that is not finite, ours has; a diverged run must not look healthy."""
    function, inputs = WAYS[name]

    def results(which: int) -> list[Tensor]:
        leaves = [t.clone() for t in inputs]
        leaves[which].view(-1)[17] = bad
        leaves = [t.requires_grad_() for t in leaves]
        out = function(*leaves)
        out.backward(torch.ones_like(out))
        return [out.detach(), *(t.grad for t in leaves if t.grad is not None)]

    for which in range(len(inputs)):
        ours = results(which)
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            for a, b in zip(ours, results(which), strict=True):
                assert not (a.isfinite() & ~b.isfinite()).any(), which


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 5, 47])
def test_a_bad_logit_spoils_its_row_and_no_other(bad: float, place: int) -> None:
    logits = random(3, 48)
    logits[1, place] = bad
    loss, grad = cross_entropy._cross_entropy(logits, torch.tensor([1, 2, 3]), 1.0)
    assert not loss.isfinite()
    assert grad.isnan().all(1).tolist() == [False, True, False] == (~grad.isfinite()).any(1).tolist()


def test_swiglu_of_a_gate_that_is_far_from_zero() -> None:
    gate_up = torch.full((1, 32), 2.0, dtype=torch.bfloat16)
    gate_up[0, :4] = torch.tensor([-1e30, -1e4, 1e4, 1e30])
    out = moe.swiglu(gate_up.requires_grad_())
    torch.testing.assert_close(out[0, :4].float(), torch.tensor([0.0, 0, 2e4, 2e30]), rtol=0.01, atol=0)


def test_adamw_keeps_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    master, first, second = torch.ones(32), *torch.zeros(2, 32, dtype=torch.bfloat16)
    grad = torch.ones(32)
    grad[3] = math.nan
    native.call("adamw", master, first, second, grad, 32, 0.9, 0.95, 1e-8, 0.1, 1.0, 1.0)
    for t in (master, first, second):
        assert t.isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("name", WAYS)
def test_other_default_dtypes_do_not_matter(name: str) -> None:
    """Buffers that the C++ code fills with float32 are float32."""
    function, inputs = WAYS[name]

    def results() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    expected = results()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = results()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", WAYS)
def test_second_derivatives_are_refused(name: str) -> None:
    function, inputs = WAYS[name]
    leaves = [t.clone().requires_grad_() for t in inputs]
    (grad,) = torch.autograd.grad(function(*leaves).float().square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_kernels_refuse_types_they_would_misread() -> None:
    logits, losses = random(3, 48), torch.empty(3)
    targets = torch.tensor([1, 2, 3])
    native.call("cross_entropy", logits, targets, losses, 3, 48, 1.0)
    for wrong in [
        (logits, targets.int(), losses, 3, 48, 1.0),
        (logits, targets, losses.double(), 3, 48, 1.0),
        (logits.float(), targets, losses, 3, 48, 1.0),
        (logits.T, targets, losses, 3, 48, 1.0),
    ]:
        with pytest.raises(TypeError):
            native.call("cross_entropy", *wrong)
    for function in (native.pointer, native.View.of):
        with pytest.raises(TypeError):
            function(torch.zeros(1, 1, 2, 16))
    with pytest.raises(ValueError, match="longer"):
        native.call("cross_entropy", logits, targets, losses)


def test_angles_are_read_in_float32_and_must_fit() -> None:
    def attend(cos: Tensor, sin: Tensor) -> Tensor:
        q, kv = random(2, 9, 2, 48).requires_grad_(), random(2, 9, 2, 48, seed=1)
        return attention.rotary_attention(q, kv, random(2, 9, 32, seed=2), (cos, sin), 0.2)

    cos, sin = random(9, 16).cos(), random(9, 16).sin()
    assert torch.equal(attend(cos, sin), attend(cos.float(), sin.float()))
    for shape in [(8, 16), (3, 16), (9, 32), (3, 9, 16), (18, 16)]:
        with pytest.raises(ValueError, match="do not fit"):
            attend(torch.ones(shape), torch.zeros(shape))
