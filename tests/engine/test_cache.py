"""Rows of latents: they grow, move, and lose nothing."""

from __future__ import annotations

import pytest
import torch

from dsv3.checkpoint.memory import CACHE_SHARE, token_bytes
from dsv3.config import PRESETS
from dsv3.engine.cache import FIRST_CAPACITY, LatentCache
from dsv3.engine.machine import choose_device, choose_dtype, cpu_has_bf16, fitting_tokens
from dsv3.errors import UserError

TINY = PRESETS["tiny"]
CPU = torch.device("cpu")


def cache(max_rows: int = 6, max_length: int = 1500) -> LatentCache:
    return LatentCache(TINY, max_rows, max_length, torch.float32, CPU)


def test_nothing_is_allocated_before_it_is_needed() -> None:
    c = cache()
    assert (c.rows, c.capacity, sum(layer.numel() for layer in c.layers)) == (0, 0, 0)
    c.reserve(1, 5)
    assert (c.rows, c.capacity) == (1, FIRST_CAPACITY)
    assert [tuple(layer.shape) for layer in c.layers] == [(1, FIRST_CAPACITY, TINY.latent_dim)] * 3


def test_growing_keeps_what_is_there() -> None:
    c = cache()
    c.reserve(2, 10)
    for i, layer in enumerate(c.layers):
        layer.normal_(i + 1.0)
    before = [layer.clone() for layer in c.layers]
    c.reserve(3, 300)
    assert (c.rows, c.capacity) == (4, 2 * FIRST_CAPACITY), "both grow by doubling"
    for old, new in zip(before, c.layers, strict=True):
        assert torch.equal(new[:2, :FIRST_CAPACITY], old)
        assert not new[2:].any() and not new[:, FIRST_CAPACITY:].any()


def test_growth_ends_at_the_limits() -> None:
    c = cache(max_rows=3, max_length=400)
    c.reserve(2, 10)
    c.reserve(3, 257)
    assert (c.rows, c.capacity) == (3, 400)
    small = cache(max_length=20)
    small.reserve(1, 2)
    assert small.capacity == 20


def test_enough_room_is_left_alone() -> None:
    c = cache()
    c.reserve(2, 10)
    layers = list(c.layers)
    c.reserve(1, FIRST_CAPACITY)
    assert all(new is old for new, old in zip(c.layers, layers, strict=True))


def test_a_growth_that_fails_can_be_tried_again() -> None:
    class Full(torch.Tensor):
        def new_zeros(self, *_: object) -> torch.Tensor:  # type: ignore[override]
            raise MemoryError

    c = cache()
    c.reserve(1, 10)
    for layer in c.layers:
        layer.normal_()
    before = [layer.clone() for layer in c.layers]
    last = c.layers[-1]
    c.layers[-1] = last.as_subclass(Full)
    with pytest.raises(MemoryError):
        c.reserve(4, 1000)
    assert (c.rows, c.capacity) == (1, FIRST_CAPACITY)
    c.layers[-1] = last
    c.reserve(2, 300)  # less than was tried before
    for old, new in zip(before, c.layers, strict=True):
        assert new.shape[:2] == (2, 2 * FIRST_CAPACITY)
        assert torch.equal(new[:1, :FIRST_CAPACITY], old)


def test_move() -> None:
    c = cache()
    c.reserve(3, 10)
    for layer in c.layers:
        layer.normal_()
    before = [layer.clone() for layer in c.layers]
    c.move(2, 0, 7)
    for old, new in zip(before, c.layers, strict=True):
        assert torch.equal(new[0, :7], old[2, :7])
        assert torch.equal(new[0, 7:], old[0, 7:])
        assert torch.equal(new[1:], old[1:])


def test_bytes_per_token() -> None:
    assert token_bytes(PRESETS["v3-671b"], torch.bfloat16) == 70_272  # 576 numbers in 61 layers
    assert token_bytes(TINY, torch.float32) == 3 * 24 * 4


# The machine ----------------------------------------------------------------------------------------------


def test_what_fits_follows_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 70_272 * 1000

    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory)
    assert fitting_tokens(PRESETS["v3-671b"], torch.bfloat16, CPU) == 1000 * CACHE_SHARE
    assert fitting_tokens(PRESETS["v3-671b"], torch.bfloat16, torch.device("meta")) is None


def test_dtype() -> None:
    assert choose_dtype("bfloat16", CPU) is choose_dtype("bf16", CPU) is torch.bfloat16
    assert choose_dtype("float32", CPU) is torch.float32
    assert choose_dtype("auto", torch.device("cuda")) is torch.bfloat16
    with pytest.raises(UserError, match="dtype is 'int8'"):
        choose_dtype("int8", CPU)


@pytest.mark.parametrize(("flag", "expected"), [("avx512_bf16", True), ("amx_bf16", True), ("avx2", False)])
def test_auto_dtype_is_what_the_cpu_multiplies(
    flag: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {flag: True}, raising=False)
    assert cpu_has_bf16() is expected
    assert choose_dtype("auto", CPU) is (torch.bfloat16 if expected else torch.float32)


def test_auto_dtype_on_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.cpu.get_capabilities", raising=False)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True, raising=False)
    assert cpu_has_bf16()
    monkeypatch.delattr("torch.cpu._is_amx_tile_supported")
    assert not cpu_has_bf16()


def test_device() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("gpu", "meta", "cuda:99", "mps"):
        with pytest.raises(UserError, match=f"device is '{wrong}'"):
            choose_device(wrong)
