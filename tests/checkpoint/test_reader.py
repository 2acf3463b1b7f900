"""What is broken is said in one line, before a weight is read or memory is allocated."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3.checkpoint import DeepseekV3, open_checkpoint
from dsv3.errors import CheckpointError, ConfigError
from dsv3.kernels.packed import Packed
from tests.checkpoint import released

INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def _nothing_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making room for the weights fails every test here."""

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a broken checkpoint must be refused before anything is loaded")

    monkeypatch.setattr("dsv3.checkpoint.pretrained._load", forbidden)


def refused(folder: Path, *parts: str, error: type[Exception] = CheckpointError) -> None:
    """Loading is refused in one line that holds all of `parts`."""
    with pytest.raises(error) as caught:
        DeepseekV3.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"


def changed(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], fp8: bool = False, **config: Any
) -> Path:
    """A released folder whose tensors went through `change`, which works in place."""
    weights = released.tensors(released.V3, fp8=fp8)
    change(weights)
    return released.write(tmp_path / "model", released.V3 | config, weights)


def edit_config(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(released.config_of(folder) | changes))
    return folder


# Folders and files ---------------------------------------------------------------------------------------


def test_folder_that_does_not_exist(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "does not exist")


def test_folder_without_config(bf16: Path, tmp_path: Path) -> None:
    folder = released.copy(bf16, tmp_path / "model")
    (folder / "config.json").unlink()
    refused(folder, str(folder), "no config.json")


def test_config_that_is_refused(bf16: Path, tmp_path: Path) -> None:
    folder = edit_config(released.copy(bf16, tmp_path / "model"), hidden_act="gelu")
    refused(folder, "hidden_act", "gelu", error=ConfigError)


def test_folder_without_weights(tmp_path: Path) -> None:
    folder = released.write(tmp_path / "model", released.V3, released.tensors(released.V3), shards=1)
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights", "model.safetensors", "only safetensors are downloaded, never pickles")


def test_shards_without_their_index(bf16: Path, tmp_path: Path) -> None:
    folder = released.copy(bf16, tmp_path / "model")
    (folder / INDEX).unlink()
    refused(folder, "model-00001-of-000003.safetensors", f"no {INDEX}")


def test_a_file_in_the_place_of_a_folder(bf16: Path) -> None:
    refused(bf16 / "model-00001-of-000003.safetensors", "is a file", "give the folder")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_refused_by_name(name: str, tmp_path: Path) -> None:
    folder = released.write(tmp_path / "model", released.V3, released.tensors(released.V3), shards=1)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x04.")
    refused(folder, name, "is a pickle", "convert it to safetensors")
    refused(folder / name, name, "is a pickle")


def test_pickles_in_the_index_are_refused(bf16: Path, tmp_path: Path) -> None:
    folder = released.copy(bf16, tmp_path / "model")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "pytorch_model-00001.bin"
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "pytorch_model-00001.bin", "is a pickle")


def test_pickles_beside_safetensors_are_not_touched(bf16: Path, tmp_path: Path) -> None:
    folder = released.copy(bf16, tmp_path / "model")
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")
    assert open_checkpoint(folder).config.num_hidden_layers == 2


def test_missing_shard(bf16: Path, tmp_path: Path) -> None:
    folder = released.copy(bf16, tmp_path / "model")
    (folder / "model-00002-of-000003.safetensors").unlink()
    refused(folder, "shard model-00002-of-000003.safetensors is missing", INDEX)


@pytest.mark.parametrize("keep", [0, 5, 100, -1, -5000])
def test_truncated_shard(keep: int, bf16: Path, tmp_path: Path) -> None:
    folder = released.copy(bf16, tmp_path / "model")
    shard = folder / "model-00002-of-000003.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(folder, shard.name, "is cut off", f"{shard.stat().st_size:,}")


def test_shard_with_bytes_too_many(bf16: Path, tmp_path: Path) -> None:
    folder = released.copy(bf16, tmp_path / "model")
    with (folder / "model-00001-of-000003.safetensors").open("ab") as file:
        file.write(b"1234567")
    refused(folder, "model-00001-of-000003.safetensors", "7 bytes too many")


def with_header(tmp_path: Path, header: bytes, data: bytes = b"") -> Path:
    folder = released.write(tmp_path / "model", released.V3, released.tensors(released.V3), shards=1)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    return folder


@pytest.mark.parametrize(
    "header",
    [
        b"{ this is not json",
        b"[" * 200_000,
        b"[1, 2]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": null}}',
        b"\xff\xfe",
    ],
)
def test_corrupt_header(header: bytes, tmp_path: Path) -> None:
    refused(with_header(tmp_path, header, b"12345678"), "model.safetensors", "corrupt header")


def test_not_safetensors_at_all(tmp_path: Path) -> None:
    folder = with_header(tmp_path, b"{}")
    (folder / "model.safetensors").write_bytes(b"\x89PNG\r\n\x1a\n" * 20)
    refused(folder, "model.safetensors", "corrupt header, or is not safetensors")


def test_git_lfs_pointer(bf16: Path, tmp_path: Path) -> None:
    folder = released.copy(bf16, tmp_path / "model")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5234139343\n"
    (folder / "model-00001-of-000003.safetensors").write_text(pointer)
    refused(folder, "model-00001-of-000003.safetensors", "Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ("[" * 200_000, "not valid JSON"),
        ("[]", "holds a list"),
        ("{}", "is corrupt"),
        ('{"weight_map": []}', "is corrupt"),
        ('{"weight_map": {}}', "is empty"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "is corrupt"),
    ],
)
def test_corrupt_index(text: str, says: str, bf16: Path, tmp_path: Path) -> None:
    folder = released.copy(bf16, tmp_path / "model")
    (folder / INDEX).write_text(text)
    refused(folder, INDEX, says)


def test_index_that_places_a_tensor_wrongly(bf16: Path, tmp_path: Path) -> None:
    folder = released.copy(bf16, tmp_path / "model")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-000003.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "lm_head.weight", "model-00001-of-000003.safetensors", "does not hold it")


# Tensors -------------------------------------------------------------------------------------------------


def test_wrong_shape(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    folder = changed(tmp_path, lambda w: w.update({name: torch.zeros(136, 161)}))
    refused(folder, name, "[136, 161]", "[136, 160]")


def test_missing_tensors(tmp_path: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        for name in [n for n in weights if ".layers.1.mlp.experts.2." in n]:
            del weights[name]

    refused(
        changed(tmp_path, change), "model.layers.1.mlp.experts.2.gate_proj.weight is missing (and 2 others)"
    )


def test_unexpected_tensors(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda w: w.update({"model.layers.0.lora_A.weight": torch.zeros(2, 2)}))
    refused(folder, "unexpected tensor model.layers.0.lora_A.weight", "config.json")


def test_a_layer_more_than_the_config_says(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda w: None, num_nextn_predict_layers=0)
    refused(folder, "unexpected tensor model.layers.2.", "others)", "num_nextn_predict_layers")


def test_some_mtp_tensors_are_not_enough(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda w: w.pop("model.layers.2.eh_proj.weight"))
    refused(folder, "tensor model.layers.2.eh_proj.weight is missing")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e5m2])
def test_unsupported_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda w: w.update({"lm_head.weight": w["lm_head.weight"].to(dtype)}))
    refused(folder, "lm_head.weight", "unsupported dtype", str(dtype).removeprefix("torch."))


def test_dtype_that_torch_does_not_have(tmp_path: Path) -> None:
    header = b'{"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}'
    refused(with_header(tmp_path, header, b"12"), "x has unsupported dtype F4")


def test_rotary_frequencies_of_old_files_are_ignored(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = changed(tmp_path, lambda w: w.update({name: torch.zeros(4)}))
    assert name not in open_checkpoint(folder).pieces


@pytest.mark.parametrize("copy", ["embed_tokens", "shared_head.head"])
def test_copies_that_differ(copy: str, tmp_path: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights[f"model.layers.2.{copy}.weight"][129, 159] += 1

    original = "lm_head" if "head" in copy else "model.embed_tokens"
    refused(changed(tmp_path, change), f"model.layers.2.{copy}.weight differs from {original}.weight")


# FP8 -----------------------------------------------------------------------------------------------------

QUANTIZED = "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "'compressed-tensors'"),
        ({"fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"weight_block_size": [64, 64]}, "weight_block_size is [64, 64]"),
        ({"activation_scheme": "static"}, "activation_scheme is 'static'"),
        ({"scale_fmt": "e5m6"}, "scale_fmt is 'e5m6'"),
        ({"rotation": "hadamard"}, "rotation is 'hadamard'"),
    ],
)
def test_unknown_quantisation(changes: dict[str, Any], named: str, fp8: Path, tmp_path: Path) -> None:
    folder = released.copy(fp8, tmp_path / "model")
    refused(
        edit_config(folder, quantization_config=released.QUANTIZATION | changes),
        "unknown quantisation",
        named,
    )


@pytest.mark.parametrize("key", ["quant_method", "weight_block_size"])
def test_quantisation_that_says_too_little(key: str, fp8: Path, tmp_path: Path) -> None:
    stated = {k: v for k, v in released.QUANTIZATION.items() if k != key}
    refused(
        edit_config(released.copy(fp8, tmp_path / "m"), quantization_config=stated),
        "unknown quantisation",
        key,
    )


@pytest.mark.parametrize(
    "extra", [{"scale_fmt": "ue8m0"}, {"modules_to_not_convert": None, "dequantize": False}]
)
def test_what_v31_and_transformers_add_is_known(extra: dict[str, Any], fp8: Path, tmp_path: Path) -> None:
    folder = released.copy(fp8, tmp_path / "model")
    edit_config(folder, quantization_config=released.QUANTIZATION | extra)
    assert open_checkpoint(folder).quantized


def test_fp8_that_the_config_does_not_mention(fp8: Path, tmp_path: Path) -> None:
    folder = edit_config(released.copy(fp8, tmp_path / "model"), quantization_config=None)
    refused(folder, "is FP8", "no quantization_config")


def test_fp8_without_its_scale(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda w: w.pop(f"{QUANTIZED}_scale_inv"), fp8=True)
    refused(folder, f"{QUANTIZED} is FP8", f"{QUANTIZED}_scale_inv is missing")


def test_wrong_scale_shape(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda w: w.update({f"{QUANTIZED}_scale_inv": torch.ones(1, 1)}), fp8=True)
    refused(folder, f"{QUANTIZED}_scale_inv", "[1, 1]", "[2, 1] blocks")


def test_scale_of_a_tensor_that_is_not_fp8(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda w: w.update({f"{QUANTIZED}_scale_inv": torch.ones(2, 1)}))
    refused(folder, f"{QUANTIZED}_scale_inv scales a tensor that is bfloat16")


def test_scale_of_unsupported_dtype(tmp_path: Path) -> None:
    scale = torch.ones(2, 1, dtype=torch.int32)
    folder = changed(tmp_path, lambda w: w.update({f"{QUANTIZED}_scale_inv": scale}), fp8=True)
    refused(folder, f"{QUANTIZED}_scale_inv has unsupported dtype int32")


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.norm.weight", "model.layers.2.embed_tokens.weight"]
)
def test_fp8_where_it_cannot_be(name: str, tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda w: w.update({name: w[name].to(released.FP8)}), fp8=True)
    refused(folder, name, "unsupported dtype float8_e4m3fn")


# What is whole -------------------------------------------------------------------------------------------


def test_a_whole_checkpoint_tells_what_it_holds(bf16: Path, fp8: Path) -> None:
    plain, quantized = open_checkpoint(bf16), open_checkpoint(fp8)
    assert plain.pieces.keys() == quantized.pieces.keys() == released.shapes(released.V3).keys()
    assert (plain.quantized, quantized.quantized) == (False, True)
    assert plain.dtype == quantized.dtype == torch.bfloat16
    stored = released.read(fp8)
    assert quantized.nbytes == sum(tensor.nbytes for tensor in stored.values())
    assert {name: info.dtype for name, info in quantized.tensors.items()} == {
        name: tensor.dtype for name, tensor in stored.items()
    }


def test_streaming_gives_every_tensor_once_with_its_scale(fp8: Path) -> None:
    stored, seen = released.read(fp8), []
    for piece, tensor in open_checkpoint(fp8).stream():
        seen.append(piece.name)
        wanted = stored[piece.name]
        assert isinstance(tensor, Packed) == (wanted.dtype == released.FP8)
        codes = tensor.codes if isinstance(tensor, Packed) else tensor
        assert torch.equal(codes.view(torch.uint8), wanted.view(torch.uint8))
        if isinstance(tensor, Packed):
            assert torch.equal(tensor.scale, stored[f"{piece.name}_scale_inv"])
    assert sorted(seen) == sorted(released.shapes(released.V3))
    index = json.loads((fp8 / INDEX).read_text())["weight_map"]
    parted = [
        n for n in index if n.endswith("_scale_inv") and index[n] != index[re.sub("_scale_inv$", "", n)]
    ]
    assert parted, "the fixture should have a scale in another shard than its weight"


def test_a_leftover_that_the_index_does_not_place_is_passed_over(bf16: Path, tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda w: w.update({"zzz.leftover": torch.zeros(2)}))
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["zzz.leftover"]
    (folder / INDEX).write_text(json.dumps(index))
    assert open_checkpoint(folder).pieces.keys() == open_checkpoint(bf16).pieces.keys()
