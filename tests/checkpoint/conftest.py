"""One folder in the released layout for BF16 and one for FP8, made once and never written to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint import released


@pytest.fixture(scope="session")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return released.write(
        tmp_path_factory.mktemp("released") / "bf16", released.V3, released.tensors(released.V3)
    )


@pytest.fixture(scope="session")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = released.tensors(released.V3, fp8=True)
    return released.write(tmp_path_factory.mktemp("released") / "fp8", released.V3, weights)
