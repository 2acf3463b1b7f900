"""The kernels as older processors run them (`older.h`): the same tests, built without the newer instructions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv3.kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native kernels on this machine")

KINDS = {"avx2": "x86-64-v3", "avx512": "x86-64-v4"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_older_processors(kind: str) -> None:
    """Results against float64, and the same bits in any company."""
    if kind == "avx512" and not torch.cpu._is_avx512_supported():
        pytest.skip("no AVX-512 here")
    here = Path(__file__).parent
    names = (
        ["inference", "older"]
        if kind == "avx512"
        else ["inference", "native", "sampling", "attention", "older"]
    )
    files = [str(here / f"test_{name}.py") for name in names]
    files += [str(here.parent / "model" / "test_fused.py")] if kind == "avx2" else []
    choice = ["-rs", "-p", "no:cacheprovider", "-k", "not no_warnings and not older_processors"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *files, *choice],
        env=os.environ | {"DSV3_NATIVE": kind},
        cwd=here.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "SKIPPED" not in run.stdout, run.stdout + run.stderr


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    for choice, target in (KINDS | {"0": None, "": "native", "1": "native"}).items():
        monkeypatch.setenv("DSV3_NATIVE", choice)
        assert native._target() == target
    monkeypatch.setenv("DSV3_NATIVE", "avx512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    assert native._target() is None
    monkeypatch.setenv("DSV3_NATIVE", "avx2")
    assert native._target() == "x86-64-v3"
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: False)
    assert native._target() is None


@pytest.mark.skipif(os.environ.get("DSV3_NATIVE") not in KINDS, reason="built for this machine")
def test_what_is_built_has_no_newer_instruction() -> None:
    """This machine may well have those, and would not complain."""
    library = native.library()
    assert library is not None
    code = subprocess.run(["objdump", "-d", library._name], check=True, capture_output=True, text=True).stdout
    assert "vfmadd" in code and not any(name in code for name in ("vdpbf16ps", "vpdpbusd", "vpermt2b"))
    assert ("%zmm" in code) == (os.environ["DSV3_NATIVE"] == "avx512")


def test_sums_are_rounded_to_the_nearest_bf16() -> None:
    """As torch does: of two to the even one, beyond the largest to infinity."""
    numbers = torch.arange(0, 1 << 16, 7, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[(numbers.abs() > 1e-30) | numbers.isnan() | (numbers == 0)]
    numbers = numbers[: len(numbers) // 16 * 16]
    least = torch.finfo(torch.bfloat16).eps * numbers / 2  # half a step, which makes a tie, or nearly one
    rows = torch.stack((numbers, least, 3 * least, least * 1.01, numbers.roll(1))).contiguous()
    places = torch.tensor([[0, 1], [0, 2], [0, 3], [0, 4]])
    ours = torch.empty(4, len(numbers), dtype=torch.bfloat16)
    native.call("combine_forward", rows, places, None, ours, 4, 2, len(numbers))
    exact: Tensor = (rows[:1].float() + rows[1:].float()).bfloat16()
    torch.testing.assert_close(ours, exact, rtol=0, atol=0, equal_nan=True)
