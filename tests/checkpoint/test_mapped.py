"""Weights that stay in their file, and those that cannot."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3.checkpoint import DeepseekV3, convert, open_checkpoint
from dsv3.checkpoint.convert import To
from dsv3.checkpoint.mapped import MappedFiles, mapped_bytes
from dsv3.checkpoint.memory import free_memory
from dsv3.checkpoint.shards import TensorInfo, read_header
from dsv3.checkpoint.writer import write_weights
from tests.checkpoint import released
from tests.checkpoint.test_convert import FITTING

# All matrices are whole panels, groups and blocks, and experts more than have one digit.
WHOLE = FITTING | {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "n_routed_experts": 12,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("whole") / "bf16")


def source(folder: Path, shards: int = 1, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """As transformers writes it: names in the order of the alphabet, `experts.10` before `experts.2`."""
    config = WHOLE | changes
    return released.write(folder, config, released.tensors(config, dtype=dtype), shards)


def in_file(tensor: Tensor, folder: Path) -> bool:
    """Whether its memory is one of the folder's files, mapped."""
    sizes = {file.stat().st_size for file in folder.glob("*.safetensors")}
    return tensor.untyped_storage().nbytes() in sizes


def read_copy(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Tensor]:
    """The same weights, all of them read."""
    with monkeypatch.context() as patched:
        patched.setattr(MappedFiles, "view", lambda *_: None)
        state = DeepseekV3.from_pretrained(folder, **options).state_dict()
    assert not any(in_file(tensor, folder) for tensor in state.values())
    return state


def all_bytes(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))


@pytest.mark.parametrize(
    ("to", "zero_points", "max_shard_size"),
    [
        ("bf16", False, 1 << 40),
        ("fp8", False, 1 << 40),
        ("int8", True, 1 << 40),
        ("int4", True, 1 << 20),
        ("mixed", False, 1 << 40),
    ],
)
def test_of_our_files_nothing_is_read(
    to: To,
    zero_points: bool,
    max_shard_size: int,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "ours"
    convert(whole, folder, to, zero_points=zero_points, max_shard_size=max_shard_size)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (max_shard_size == 1 << 20)
    expected = read_copy(folder, monkeypatch, packed=True)
    state = DeepseekV3.from_pretrained(folder, packed=True).state_dict()
    read = [name for name, tensor in state.items() if not in_file(tensor, folder)]
    # But what has to be dequantised: nobody multiplies by these as they are in FP8.
    assert read == [name for name in state if to == "fp8" and name.endswith(".kv_b_proj.weight")]
    released.assert_same(state, expected)


def test_numbers_of_our_files_begin_at_lines_of_the_cache(whole: Path, tmp_path: Path) -> None:
    convert(whole, tmp_path / "ours", "int4", zero_points=True, max_shard_size=1 << 20)
    found = [
        info for file in (tmp_path / "ours").glob("*.safetensors") for info in read_header(file).values()
    ]
    ragged = [info for info in found if info.nbytes % 64]
    assert ragged and all(info.offset % info.dtype.itemsize == 0 for info in ragged)
    assert [info.name for info in found if info.offset % 64 and info.nbytes % 64 == 0] == []


def test_stacks_may_have_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this order the three matrices of an expert follow each other, and so do the experts."""
    folder = source(tmp_path / "few", n_routed_experts=8)
    expected = read_copy(folder, monkeypatch)
    state = DeepseekV3.from_pretrained(folder).state_dict()
    assert all(in_file(tensor, folder) for tensor in state.values())
    gate_up, down = (state[f"layers.1.mlp.experts.{name}_proj"] for name in ("gate_up", "down"))
    assert not gate_up.is_contiguous() and all(matrix.is_contiguous() for matrix in (*gate_up, *down))
    released.assert_same(state, expected)


@pytest.mark.parametrize("shards", [1, 5])
def test_what_lies_in_no_order_is_read(shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source(tmp_path / "many", shards)
    expected = read_copy(folder, monkeypatch)
    state = DeepseekV3.from_pretrained(folder).state_dict()
    assert not in_file(state["layers.1.mlp.experts.gate_up_proj"], folder)
    assert in_file(state["layers.1.self_attn.o_proj.weight"], folder)
    released.assert_same(state, expected)


def test_another_dtype_is_read(whole: Path) -> None:
    model = DeepseekV3.from_pretrained(whole, torch.float32)
    stored = released.read(whole)
    found = {name for name, tensor in model.state_dict().items() if in_file(tensor, whole)}
    assert found == {name for name in model.state_dict() if name.endswith("e_score_correction_bias")}
    assert torch.equal(model.embed_tokens.weight, stored["model.embed_tokens.weight"].float())


def test_what_is_dequantised_is_read(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(whole, tmp_path / "ours", "int8")
    expected = read_copy(tmp_path / "ours", monkeypatch)
    state = DeepseekV3.from_pretrained(tmp_path / "ours").state_dict()
    assert not in_file(state["layers.1.mlp.experts.down_proj"], tmp_path / "ours")
    released.assert_same(state, expected)


def test_biases_of_packed_matrices_have_the_models_dtype(whole: Path, tmp_path: Path) -> None:
    config = open_checkpoint(whole).config.replace(attention_bias=True)
    model = DeepseekV3(config).bfloat16()
    model.init_weights()
    bias = torch.arange(config.q_lora_rank or 0).bfloat16()
    model.layers[0].self_attn.q_a_proj.bias = torch.nn.Parameter(bias)
    model.save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "ours", "int8")
    for dtype in (torch.bfloat16, torch.float32):
        loaded = DeepseekV3.from_pretrained(tmp_path / "ours", dtype, packed=True)
        linear = loaded.layers[0].self_attn.q_a_proj
        assert linear.codes.dtype == torch.uint8 and linear.bias.dtype == dtype
        assert torch.equal(linear.bias, bias.to(dtype))
        assert in_file(linear.bias, tmp_path / "ours") == (dtype == torch.bfloat16)


def test_tensors_that_are_not_aligned_are_read(tmp_path: Path) -> None:
    """The format allows any place; processors and torch do not."""
    folder = source(tmp_path / "odd")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    file.write_bytes((length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :])
    state = DeepseekV3.from_pretrained(folder).state_dict()
    assert not any(in_file(tensor, folder) for tensor in state.values())
    assert torch.equal(state["embed_tokens.weight"], released.read(folder)["model.embed_tokens.weight"])


def test_training_leaves_the_file_alone(tmp_path: Path) -> None:
    folder = source(tmp_path / "mine", n_routed_experts=4)
    before = all_bytes(folder)
    model = DeepseekV3.from_pretrained(folder)
    assert in_file(model.layers[1].mlp.experts.gate_up_proj, folder)
    ids = torch.arange(24).view(1, 24)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(ids).logits.float().square().mean().backward()
    optimizer.step()
    fresh = DeepseekV3.from_pretrained(folder)
    assert not torch.equal(model.lm_head.weight, fresh.lm_head.weight)
    with torch.no_grad():
        model.load_state_dict(fresh.state_dict())
        released.assert_same(model.state_dict(), fresh.state_dict())
        for parameter in model.to(torch.float32).parameters():
            parameter.zero_()
    assert all_bytes(folder) == before


def test_saving_over_the_folder_that_it_was_loaded_from(tmp_path: Path) -> None:
    folder = source(tmp_path / "mine", n_routed_experts=4)
    model = DeepseekV3.from_pretrained(folder)
    ids = torch.arange(24).view(1, 24)
    with torch.no_grad():
        model.norm.weight.mul_(2.0)
        logits = model(ids).logits
        model.save_pretrained(folder)
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(DeepseekV3.from_pretrained(folder)(ids).logits, logits)
        shutil.rmtree(folder)
        assert torch.equal(model(ids).logits, logits)


def test_mapped_weights_are_not_free_memory(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system says that their pages are available. What was read of the same files, it knows to be in memory."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1 << 40}))
    before, free = mapped_bytes(), free_memory(torch.device("cpu"))
    model = DeepseekV3.from_pretrained(whole)
    state = model.state_dict()
    mapped = sum(tensor.nbytes for tensor in state.values() if in_file(tensor, whole))
    assert 0 < mapped < sum(tensor.nbytes for tensor in state.values())
    assert mapped_bytes() - before == mapped
    less = free_memory(torch.device("cpu"))
    assert free is not None and less is not None and free - less == mapped_bytes() - before
    del model, state
    assert mapped_bytes() == before


def test_what_the_system_does_not_map_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source(tmp_path / "few", n_routed_experts=8)

    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap: Cannot allocate memory (12)")

    expected = DeepseekV3.from_pretrained(folder).state_dict()
    monkeypatch.setattr(torch.UntypedStorage, "from_file", refused)
    state = DeepseekV3.from_pretrained(folder).state_dict()
    assert not any(in_file(tensor, folder) for tensor in state.values())
    released.assert_same(state, expected)


def test_only_files_that_are_read_are_opened(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(whole, tmp_path / "ours", "bf16")
    opened: list[str] = []

    def recorded(path: Path, flags: int, open_: Any = os.open) -> int:
        opened.append(Path(path).name)
        return int(open_(path, flags))

    monkeypatch.setattr("dsv3.checkpoint.direct.os.open", recorded)
    DeepseekV3.from_pretrained(tmp_path / "ours")
    assert opened == []
    DeepseekV3.from_pretrained(whole)
    assert opened == ["model.safetensors"]


def test_the_system_keeps_what_was_read(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: forgotten.append(1), raising=False)
    DeepseekV3.from_pretrained(whole, torch.float32)
    assert not forgotten


# Layout -------------------------------------------------------------------------------------------------


def infos(*parameters: tuple[str, int, int]) -> list[TensorInfo]:
    """For each parameter its name, how many tensors it has, and their bytes."""
    return [
        TensorInfo(f"{name}.{i}", torch.uint8, (nbytes,), parameter=name)
        for name, count, nbytes in parameters
        for i in range(count)
    ]


def test_shards_end_between_parameters(tmp_path: Path) -> None:
    """One that is too large for a shard is one of its own, or its matrices could not be mapped as a stack."""
    planned = infos(("a", 3, 20), ("b", 4, 20), ("huge", 6, 30), ("c", 2, 20))
    given = [(info.name, torch.full(info.shape, i, dtype=torch.uint8)) for i, info in enumerate(planned)]
    write_weights(tmp_path, planned, reversed(given), 100)  # in whatever order they come
    files = [list(read_header(file)) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert files == [
        ["a.0", "a.1", "a.2"],
        ["b.0", "b.1", "b.2", "b.3"],
        [f"huge.{i}" for i in range(6)],
        ["c.0", "c.1"],
    ]
    released.assert_same(released.read(tmp_path), dict(given))


def test_a_tensor_that_was_announced_and_did_not_come_is_a_defect(tmp_path: Path) -> None:
    planned = infos(("a", 2, 4))
    with pytest.raises(AssertionError, match=r"a\.1"):
        write_weights(tmp_path, planned, [("a.0", torch.zeros(4, dtype=torch.uint8))], 100)


def test_files_are_in_the_models_order_whatever_the_source_is_in(whole: Path, tmp_path: Path) -> None:
    convert(whole, tmp_path / "ours", "bf16")
    order = list(open_checkpoint(tmp_path / "ours").tensors)
    experts = [name for name in order if ".1.mlp.experts." in name and "down" not in name]
    assert experts == [
        f"model.layers.1.mlp.experts.{e}.{half}_proj.weight" for e in range(12) for half in ("gate", "up")
    ]
