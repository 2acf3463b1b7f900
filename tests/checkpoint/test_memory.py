"""How much memory loading and converting take, measured in a fresh process by the kernel's own high-water mark."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv3.checkpoint import convert
from tests.checkpoint import released

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to reset the high-water mark"
)

MB = 1 << 20
CONFIG = released.V3 | {
    "hidden_size": 512,
    "moe_intermediate_size": 512,
    "n_routed_experts": 40,
    "num_hidden_layers": 3,
}
# What the interpreter, the allocator and pages mapped ahead may take besides the tensors.
SLACK = 16 * MB

SCRIPT = """
import sys
from pathlib import Path
import torch
from dsv3.checkpoint import DeepseekV3, convert

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
big, small, out = map(Path, sys.argv[2:])
work = {
    "load": DeepseekV3.from_pretrained,
    "packed": lambda folder: DeepseekV3.from_pretrained(folder, packed=True),
    "bf16": lambda folder: convert(folder, out / folder.name, "bf16"),
    "int4": lambda folder: convert(folder, out / folder.name, "int4", zero_points=True),
}
kept = work[sys.argv[1]](small)  # everything is imported and warm
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
kept = work[sys.argv[1]](big)
print(status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 110 MB in FP8, in shards of about 9 MB."""
    weights: dict[str, Tensor] = {}
    fp8 = released.fp8_names(CONFIG)
    for name, shape in released.shapes(CONFIG).items():
        if name in fp8:
            weights[name] = torch.randint(0, 120, shape, dtype=torch.uint8).view(released.FP8)
            weights[f"{name}_scale_inv"] = torch.full((-(-shape[0] // 128), -(-shape[1] // 128)), 1e-3)
        else:
            weights[name] = torch.zeros(
                shape, dtype=torch.float32 if name.endswith("_bias") else torch.bfloat16
            )
    return released.write(tmp_path_factory.mktemp("memory") / "big", CONFIG, weights, shards=12)


def peak(work: str, big: Path, small: Path, out: Path) -> int:
    """Bytes by which the resident memory grew at most."""
    command = [sys.executable, "-c", SCRIPT, work, str(big), str(small), str(out)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def two_shards(folder: Path) -> int:
    return sum(sorted(file.stat().st_size for file in folder.glob("*.safetensors"))[-2:])


@pytest.mark.parametrize("work", ["load", "packed"])
def test_loading_takes_little_more_than_the_model(work: str, big: Path, fp8: Path, tmp_path: Path) -> None:
    stored = sum(file.stat().st_size for file in big.glob("*.safetensors"))
    model = stored * (2 if work == "load" else 1)
    used, allowed = peak(work, big, fp8, tmp_path), model + SLACK
    assert allowed < model + stored / 2, "too loose to tell reading in place from reading everything"
    assert model * 0.9 < used < allowed, f"{used / MB:.0f} MB, allowed {allowed / MB:.0f}"


def test_loading_a_file_that_is_mapped_takes_nothing(big: Path, fp8: Path, tmp_path: Path) -> None:
    convert(big, tmp_path / "int8", "int8")
    used = peak("packed", tmp_path / "int8", fp8, tmp_path)
    assert used < SLACK, f"{used / MB:.0f} MB"


@pytest.mark.parametrize("to", ["bf16", "int4"])
def test_converting_takes_two_shards_at_most(to: str, big: Path, fp8: Path, tmp_path: Path) -> None:
    stored = sum(file.stat().st_size for file in big.glob("*.safetensors"))
    used, allowed = peak(to, big, fp8, tmp_path), two_shards(big) + SLACK
    assert allowed < stored / 2, "too loose to tell streaming from reading everything"
    assert used < allowed, f"{used / MB:.0f} MB, allowed {allowed / MB:.0f}"
