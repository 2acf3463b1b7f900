"""What every test stands on: the same numbers on every run, one thread, and no GPU test without a GPU.

One thread, because for models this small waking a second one costs more than all of their arithmetic, and where
another program uses the machine, two that wait for each other are a hundred times slower.
"""

from __future__ import annotations

import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
if not torch.cuda.is_available():  # for tests/kernels/test_triton.py, before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

# derandomize: examples depend on the test alone, so a red run is red again when repeated.
# deadline: off, since the first call of an operator is slow and a shared machine is slow at times.
settings.register_profile("dsv3", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("dsv3")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where torch sees no CUDA device."""
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)
