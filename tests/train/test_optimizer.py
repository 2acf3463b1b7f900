"""AdamW with masters: torch's own in float32, and one that loses nothing under bfloat16."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsv3.parallel.sharding import Held
from dsv3.train.optimizer import MasterAdamW
from tests.parallel.processes import run


def small(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 4)).to(dtype)


def loss_of(model: nn.Module, step: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=generator).to(next(model.parameters()).dtype)
    return scale * model(x).float().pow(2).mean()


def step(model: nn.Module, optimizer: MasterAdamW, number: int, lr: float = 1e-2) -> float:
    loss_of(model, number).backward()
    optimizer.accumulate()
    return optimizer.step(lr)


def test_float32_equals_torchs_adamw() -> None:
    ours, theirs = small(), small()
    optimizer = MasterAdamW(ours, betas=(0.8, 0.95), weight_decay=0.2, moments=torch.float32)
    decayed = [p for p in theirs.parameters() if p.dim() > 1]
    plain = [p for p in theirs.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.2}, {"params": plain, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-8, foreach=False)
    for number in range(8):
        lr = 1e-2 / (number + 1)
        norm = step(ours, optimizer, number, lr)
        loss_of(theirs, number).backward()
        wanted = nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        reference.zero_grad()
        assert norm == pytest.approx(float(wanted), rel=1e-5)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_moments_in_bfloat16_are_rounded_once_a_step() -> None:
    """The report's AdamW, by hand: moments stored in bf16, every sum in float32."""
    model = small()
    optimizer = MasterAdamW(model, weight_decay=0.0)
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in masters.items()}
    for number in range(1, 6):
        loss_of(model, number).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.accumulate()
        optimizer.step(1e-2, clip=1e9)
        for name, gradient in gradients.items():
            first = 0.9 * moments[name][0] + 0.1 * gradient
            second = 0.95 * moments[name][1] + 0.05 * gradient**2
            step = (first / (1 - 0.9**number)) / ((second / (1 - 0.95**number)).sqrt() + 1e-8)
            masters[name] -= 1e-2 * step
            moments[name] = first.bfloat16().float(), second.bfloat16().float()
    state = optimizer.state()
    for name, master in masters.items():
        torch.testing.assert_close(optimizer.masters[name], master, rtol=1e-4, atol=1e-5)
        assert state[f"exp_avg.{name}"].dtype == state[f"exp_avg_sq.{name}"].dtype == torch.bfloat16
        torch.testing.assert_close(state[f"exp_avg.{name}"].float(), moments[name][0], rtol=1e-2, atol=1e-6)


def test_a_gradient_that_is_no_number_changes_nothing() -> None:
    model = small()
    before = copy.deepcopy(model.state_dict())
    optimizer = MasterAdamW(model)
    loss_of(model, 0, math.nan).backward()
    optimizer.accumulate()
    assert math.isnan(optimizer.step(1e-2))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_updates_too_small_for_bfloat16_are_kept() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    assert model.weight - 1e-4 == 1.0, "one step alone rounds to nothing"
    optimizer = MasterAdamW(model, weight_decay=0.0)
    for _ in range(200):
        model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        optimizer.accumulate()
        optimizer.step(1e-4)
    assert float(optimizer.masters["weight"]) == pytest.approx(0.98, abs=1e-4)
    assert model.weight.dtype == torch.bfloat16
    assert torch.equal(model.weight, optimizer.masters["weight"].bfloat16())


def test_gradients_add_up_in_float32() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    optimizer = MasterAdamW(model)
    for gradient in (1.0, 2.0**-10, 2.0**-10):  # in bfloat16 their sum is 1
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.accumulate()
        assert model.weight.grad is None
    assert optimizer.step(1e-3, clip=10.0) == 1 + 2.0**-9
    assert optimizer.step(1e-3) == 0.0, "the next step starts from nothing"


def test_clipping() -> None:
    """Moments are those of the gradient cut to the clip; the norm is reported as it was; a small one stays."""
    for scale in (1.0, 1e-3):
        model, reference = small(), small()
        optimizer = MasterAdamW(model, moments=torch.float32)
        loss_of(model, 0, scale).backward()
        loss_of(reference, 0, scale).backward()
        gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
        norm = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
        optimizer.accumulate()
        assert optimizer.step(1e-3, clip=0.1) == pytest.approx(norm, rel=1e-5)
        assert (norm > 0.1) == (scale == 1.0)
        state = optimizer.state()
        for name, gradient in gradients.items():
            wanted = 0.1 * gradient * min(1.0, 0.1 / norm)  # (1 - beta1) * g
            torch.testing.assert_close(state[f"exp_avg.{name}"], wanted, rtol=1e-4, atol=1e-9)


def test_decay_is_on_matrices_only() -> None:
    model = small()
    before = copy.deepcopy(model.state_dict())
    optimizer = MasterAdamW(model, weight_decay=0.5)
    optimizer.step(0.1)  # no gradient at all
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.dim() > 1 else 1.0))


def test_a_stage_goes_on_from_a_file(tmp_path: Path) -> None:
    model = small(torch.bfloat16)
    optimizer = MasterAdamW(model)
    for number in range(3):
        step(model, optimizer, number)
    save_file(optimizer.state(), tmp_path / "state.safetensors")

    other = small(torch.bfloat16)
    resumed = MasterAdamW(other)
    step(other, resumed, 99)  # what it held before is forgotten
    for name, saved in load_file(tmp_path / "state.safetensors").items():
        resumed.state()[name].copy_(saved)
    resumed.steps = optimizer.steps
    resumed.write_weights()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    for number in range(3, 6):
        assert step(model, optimizer, number) == step(other, resumed, number)
    one, two = optimizer.state(), resumed.state()
    assert one.keys() == two.keys() and len(one) == 3 * 6, "a master and two moments per parameter"
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_new_stage_starts_with_fresh_moments() -> None:
    model, fresh = small(), small()
    optimizer = MasterAdamW(model)
    for number in range(3):
        step(model, optimizer, number)
    optimizer.begin_from({name: p.detach().clone() for name, p in fresh.named_parameters()})
    step(model, optimizer, 7)
    step(fresh, MasterAdamW(fresh), 7)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


# Several processes -------------------------------------------------------------------------------------

ODD = {"wide": (7, 5), "gain": (3,), "own": (2, 3, 3), "bias": (11,)}
"""Of these `own` are experts: even ranks hold one stack, odd ones another."""


class Odd(nn.Module):
    """Parameters of odd sizes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__()
        for name, shape in shapes.items():
            seed = sum(name.encode())
            weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            self.register_parameter(name, nn.Parameter(weight.to(dtype)))


def gradient(name: str, shape: tuple[int, ...], number: int, rank: int, dtype: torch.dtype) -> Tensor:
    seed = sum(name.encode()) + 1000 * number + 100_000 * rank
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole_name(name: str, rank: int) -> str:
    return f"own{rank % 2}" if name == "own" else name


def sharded_steps(
    dtype: torch.dtype, share: bool, moments: torch.dtype, steps: int, spoilt: int | None = None
) -> dict[str, Any]:
    """What a process ends with after some steps; in step `spoilt` the last process has a gradient of NaN."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model = Odd({whole_name(n, rank): s for n, s in ODD.items()}, dtype)
    everyone = tuple(range(world))
    held = {
        name: Held(p.shape, 0, tuple(r for r in everyone if not name.startswith("own") or r % 2 == rank % 2))
        for name, p in model.named_parameters()
    }
    optimizer = MasterAdamW(model, weight_decay=0.3, moments=moments, held=held, share=share)
    norms = []
    for number in range(steps):
        for half in range(2):  # microbatches
            for name, p in model.named_parameters():
                p.grad = gradient(name, tuple(p.shape), 2 * number + half, rank, dtype)
                if number == spoilt and rank == world - 1 and name == "bias":
                    p.grad[0] = math.nan
            optimizer.accumulate()
        norms.append(optimizer.step(0.01, clip=1.0))
    state = optimizer.state()
    return {
        "norms": norms,
        "weights": {name: p.detach().float().numpy() for name, p in model.named_parameters()},
        "masters": {
            name: (optimizer.starts[name], master.flatten().numpy())
            for name, master in optimizer.masters.items()
        },
        "kept": sum(t.numel() for t in state.values()),
    }


def single_steps(
    world: int, dtype: torch.dtype, moments: torch.dtype, steps: int
) -> tuple[MasterAdamW, Odd, list[float]]:
    """The same in one process, which holds both stacks and has all gradients."""
    model = Odd({whole_name(n, r): s for r in range(2) for n, s in ODD.items()}, dtype)
    optimizer = MasterAdamW(model, weight_decay=0.3, moments=moments)
    norms = []
    for number in range(steps):
        for half in range(2):
            for rank in range(world):
                for name, p in model.named_parameters():
                    if not name.startswith("own") or name == f"own{rank % 2}":
                        p.grad = gradient(name, tuple(p.shape), 2 * number + half, rank, dtype)
                optimizer.accumulate()
        norms.append(optimizer.step(0.01, clip=1.0))
    return optimizer, model, norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("world", "share"), [(2, True), (4, True), (3, True), (4, False)])
def test_shares_make_the_same_step(world: int, share: bool, dtype: torch.dtype) -> None:
    """Weights, masters and norm of several steps, all clipped, are those of one process with all gradients."""
    optimizer, model, norms = single_steps(world, dtype, torch.float32, 4)
    assert min(norms) > 1.0, "clipped"
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    seen = {name: torch.zeros(size) for name, size in sizes.items()}
    for rank, result in enumerate(run(world, sharded_steps, dtype, share, torch.float32, 4)):
        assert result["norms"] == pytest.approx(norms, rel=1e-6)
        for name, (start, part) in result["masters"].items():
            master = optimizer.masters[name].flatten()[start : start + part.size]
            torch.testing.assert_close(torch.from_numpy(part), master, rtol=1e-5, atol=1e-6)
            seen[name][start : start + part.size] += 1
        for name, weight in result["weights"].items():
            rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
            wanted = model.get_parameter(name).detach().float()
            torch.testing.assert_close(torch.from_numpy(weight), wanted, rtol=rounding, atol=1e-6)
        own = [r for r in range(world) if r % 2 == rank % 2]
        mine, ours = sizes[f"own{rank % 2}"], sum(s for n, s in sizes.items() if not n.startswith("own"))
        members, sharers = (len(own), world) if share else (1, 1)
        # A parameter's last share may be padding, which is nobody's.
        most = 3 * (-(-mine // members) + -(-ours // sharers))
        assert result["kept"] <= most and (share or result["kept"] == most)
    # Without shares everyone has everything; with them each number has one master.
    copies = {
        n: 1 if share else sum(r % 2 == int(n[-1]) for r in range(world)) if "own" in n else world
        for n in sizes
    }
    for name, count in seen.items():
        assert (count == copies[name]).all(), name


def test_weights_are_the_masters_rounded_everywhere() -> None:
    results = run(4, sharded_steps, torch.bfloat16, True, torch.bfloat16, 3)
    masters: dict[str, Tensor] = {}
    for result in results:
        for name, (start, part) in result["masters"].items():
            size = result["weights"][name].size if name in result["weights"] else part.size
            whole = masters.setdefault(name, torch.full((size,), math.nan))
            whole[start : start + part.size] = torch.from_numpy(part)
    for result in results:
        for name, weight in result["weights"].items():
            assert torch.equal(torch.from_numpy(weight).flatten(), masters[name].bfloat16().float()), name


def test_shares_are_the_same_bits_each_time() -> None:
    one, two = (run(4, sharded_steps, torch.bfloat16, True, torch.bfloat16, 3) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert a["norms"] == b["norms"]
        for name, (_, master) in a["masters"].items():
            assert (master == b["masters"][name][1]).all(), name


def test_one_process_without_a_number_stops_all() -> None:
    before = run(2, sharded_steps, torch.float32, True, torch.float32, 2)
    after = run(2, sharded_steps, torch.float32, True, torch.float32, 3, 2)
    for a, b in zip(before, after, strict=True):
        assert math.isnan(b["norms"][-1])
        assert all((b["weights"][name] == weight).all() for name, weight in a["weights"].items())
