"""The moving average against its formula in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv3.train.ema import Ema

SHAPES = {"layers.0.weight": (5, 3), "norm.weight": (7,)}


def weights(step: int, device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator).to(device) for name, shape in SHAPES.items()}


def run(masters: dict[str, Tensor], ema: Ema, steps: range) -> None:
    for step in steps:
        for name, new in weights(step).items():
            masters[name].copy_(new)
        ema.update()


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_average_is_the_formula(decay: float, device: str) -> None:
    masters = weights(0, device)
    ema = Ema(masters, decay)
    run(masters, ema, range(1, 9))
    for name, average in ema.state().items():
        expected = weights(0)[name.removeprefix("ema.")].double()
        for step in range(1, 9):
            expected = decay * expected + (1 - decay) * weights(step)[name.removeprefix("ema.")].double()
        assert average.is_cpu and average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected, rtol=0, atol=1e-6)


def test_masters_are_read_and_not_changed() -> None:
    masters = weights(0)
    ema = Ema(masters, 0.5)
    ema.update()
    for name, master in masters.items():
        assert torch.equal(master, weights(0)[name])
        assert torch.equal(ema.state()[f"ema.{name}"], master), "an average of equal things is that thing"
        assert ema.state()[f"ema.{name}"].data_ptr() != master.data_ptr()


def test_a_loaded_average_goes_on_to_the_bit(tmp_path: Path) -> None:
    masters = weights(0)
    whole = Ema(masters, 0.9)
    run(masters, whole, range(1, 4))
    save_file(whole.state(), tmp_path / "ema.safetensors")
    run(masters, whole, range(4, 7))

    resumed_masters = weights(100)
    resumed = Ema(resumed_masters, 0.9)
    for name, average in load_file(tmp_path / "ema.safetensors").items():
        resumed.state()[name].copy_(average)
    run(resumed_masters, resumed, range(4, 7))
    for name, average in whole.state().items():
        assert torch.equal(resumed.state()[name], average)
