"""Blocks of latents: who has them, what is in them, and which one goes first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.checkpoint.memory import CACHE_SHARE, token_bytes
from dsv3.config import PRESETS
from dsv3.engine.cache import BlockManager, allocate, chained_hash
from dsv3.engine.machine import choose_device, choose_dtype, computes_packed, cpu_has_bf16, fitting_tokens
from dsv3.errors import UserError
from dsv3.kernels.inference import BLOCK

TINY = PRESETS["tiny"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_cache_is_zeros(dtype: torch.dtype) -> None:
    layers = allocate(TINY, 5, dtype, CPU)
    assert [tuple(layer.shape) for layer in layers] == [(5, BLOCK, TINY.latent_dim)] * 3
    assert all(layer.dtype is dtype and not layer.any() for layer in layers)
    assert len(allocate(TINY, 5, dtype, CPU, mtp=True)) == 4
    layers[0][2] = 1.5
    assert layers[0].sum() == 1.5 * BLOCK * TINY.latent_dim, "it can be written to"


def test_memory_is_taken_only_as_blocks_are_written() -> None:
    import psutil

    process = psutil.Process()
    before = process.memory_info().rss
    layers = allocate(TINY, 100_000, torch.float32, CPU)  # 1.8 GB
    assert process.memory_info().rss - before < 50e6
    assert sum(layer.nbytes for layer in layers) > 1e9


def test_names_tell_every_beginning_apart() -> None:
    first = chained_hash(b"", range(64))
    assert first == chained_hash(b"", list(range(64)))
    others = [
        chained_hash(b"", range(1, 65)),
        chained_hash(b"", range(63)),
        chained_hash(first, range(64)),
        chained_hash(b"x", range(64)),
    ]
    assert len({first, *others}) == 5


def test_unused_blocks_are_remembered_until_their_memory_is_needed() -> None:
    manager = BlockManager(4)
    a, b = manager.take(), manager.take()
    manager.name(a, b"a")
    manager.name(b, b"b")
    manager.release([a, b])
    assert (manager.free, manager.used) == (4, 0)
    assert (manager.find(b"a"), manager.find(b"b"), manager.find(b"c")) == (a, b, None)
    manager.share(a)
    assert (manager.free, manager.used) == (3, 1)
    taken = [manager.take() for _ in range(3)]
    assert a not in taken and b in taken
    assert manager.find(b"a") == a and manager.find(b"b") is None


def test_the_least_recently_used_goes_first_and_of_one_text_the_end() -> None:
    manager = BlockManager(4)
    old, new = [manager.take(), manager.take()], [manager.take(), manager.take()]
    for block, name in zip(old + new, (b"1", b"2", b"3", b"4"), strict=True):
        manager.name(block, name)
    manager.release(new)
    manager.release(old)
    assert [manager.take() for _ in range(4)] == [new[1], new[0], old[1], old[0]]


def test_what_holds_nothing_worth_remembering_goes_before_all_else() -> None:
    manager = BlockManager(3)
    named, nameless = manager.take(), manager.take()
    manager.name(named, b"x")
    manager.release([named])
    manager.release([nameless])
    assert manager.take() == nameless


def test_shared_blocks_are_free_when_the_last_user_is_gone() -> None:
    manager = BlockManager(2)
    block = manager.take()
    manager.name(block, b"x")
    manager.share(block)
    manager.release([block])
    assert manager.used == 1
    manager.release([block])
    assert manager.used == 0


def test_two_blocks_with_the_same_text_have_one_name() -> None:
    manager = BlockManager(2)
    a, b = manager.take(), manager.take()
    manager.name(a, b"x")
    manager.name(b, b"x")
    assert manager.find(b"x") == a
    manager.release([a, b])
    assert manager.take() == b and manager.find(b"x") == a


def test_a_block_that_is_taken_anew_has_no_drafts() -> None:
    manager = BlockManager(1)
    manager.drafted[manager.take()] = True
    manager.release([0])
    assert not manager.drafted[manager.take()]


@settings(max_examples=60)
@given(st.data())
def test_no_block_is_lost_or_given_twice(data: st.DataObject) -> None:
    manager = BlockManager(6)
    holders: list[list[int]] = []
    names = 0
    for _ in range(40):
        action = data.draw(st.sampled_from(["take", "share", "release", "name"]))
        if action == "take" and manager.free:
            block = manager.take()
            assert all(block not in held for held in holders)
            holders.append([block])
        elif action == "share" and names:
            found = manager.find(str(data.draw(st.integers(0, names))).encode())
            if found is not None:
                manager.share(found)
                holders.append([found])
        elif action == "release" and holders:
            manager.release(holders.pop(data.draw(st.integers(0, len(holders) - 1))))
        elif action == "name" and holders:
            names += 1
            manager.name(holders[-1][0], str(names).encode())
        assert manager.used == len({block for held in holders for block in held})
        assert manager.used + manager.free == 6


def test_bytes_per_token() -> None:
    assert token_bytes(PRESETS["v3-671b"], torch.bfloat16) == 70_272  # 576 numbers in 61 layers
    assert token_bytes(TINY, torch.float32) == 3 * 24 * 4


# The machine ----------------------------------------------------------------------------------------------


def test_what_fits_follows_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 70_272 * 1000

    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory)
    assert fitting_tokens(PRESETS["v3-671b"], torch.bfloat16, CPU) == 1000 * CACHE_SHARE // BLOCK * BLOCK
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
    monkeypatch.setattr("dsv3.engine.machine.library", lambda: None)
    assert cpu_has_bf16() is expected
    assert choose_dtype("auto", CPU) is (torch.bfloat16 if expected else torch.float32)
    assert not computes_packed(torch.bfloat16, CPU)
    monkeypatch.setattr("dsv3.engine.machine.library", lambda: object())  # on AVX2 our kernels do
    assert choose_dtype("auto", CPU) is torch.bfloat16
    assert computes_packed(torch.bfloat16, CPU) and not computes_packed(torch.float32, CPU)


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
