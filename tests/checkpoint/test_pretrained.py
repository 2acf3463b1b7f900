"""Loading and saving: bit-equal there and back, and the same model in transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from dsv3.checkpoint import DeepseekV3, convert, open_checkpoint
from dsv3.checkpoint.experts import ExpertFiles
from dsv3.checkpoint.memory import free_memory, weight_bytes
from dsv3.checkpoint.names import table
from dsv3.config import PRESETS, ModelConfig
from dsv3.engine.offload import ExpertCache
from dsv3.errors import CheckpointError, UserError, size
from tests.checkpoint import released

STYLES = {"V3": released.V3, "Moonlight": released.MOONLIGHT, "V2-Lite": released.V2_LITE}
NO_MTP = released.V3 | {"num_nextn_predict_layers": 0}


def ids(vocab: int = 130, batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(3))


def logits_of(folder: Path, inputs: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return DeepseekV3.from_pretrained(folder, torch.float32)(ids() if inputs is None else inputs).logits


def logits_in_transformers(folder: Path) -> Tensor:
    theirs, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    theirs.set_experts_implementation("eager")
    with torch.no_grad():
        logits: Tensor = theirs.eval()(ids()).logits
    return logits


def relative_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def agreement(one: Tensor, other: Tensor) -> float:
    """How often both find the same token the likeliest."""
    return float((one.argmax(-1) == other.argmax(-1)).float().mean())


# There and back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("values", STYLES.values(), ids=STYLES)
def test_bf16_there_and_back_is_bit_equal(values: dict[str, Any], shards: int, tmp_path: Path) -> None:
    weights = released.tensors(values)
    folder = released.write(tmp_path / "released", values, weights, shards)
    model = DeepseekV3.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    model.save_pretrained(tmp_path / "saved", max_shard_size=200_000)
    assert len(list((tmp_path / "saved").glob("model-*-of-*.safetensors"))) > 2
    released.assert_same(released.read(tmp_path / "saved"), weights)
    assert (
        ModelConfig.from_json(tmp_path / "saved" / "config.json")
        == model.config
        == ModelConfig.from_dict(values)
    )


def test_float32_there_and_back_is_bit_equal(tmp_path: Path) -> None:
    weights = released.tensors(released.V3, dtype=torch.float32)
    folder = released.write(tmp_path / "released", released.V3, weights)
    model = DeepseekV3.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "saved", format="fp32")
    released.assert_same(released.read(tmp_path / "saved"), weights)
    assert released.config_of(tmp_path / "saved")["torch_dtype"] == "float32"


def test_transformers_there_and_back_is_bit_equal(tmp_path: Path) -> None:
    """transformers drops the MTP module and keeps its number in the config: we load what there is."""
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**released.V3)).bfloat16()
    theirs.save_pretrained(tmp_path / "theirs")
    assert released.config_of(tmp_path / "theirs")["num_nextn_predict_layers"] == 1
    model = DeepseekV3.from_pretrained(tmp_path / "theirs")
    assert model.config.num_nextn_predict_layers == 0 and len(model.mtp) == 0
    model.save_pretrained(tmp_path / "ours")
    released.assert_same(released.read(tmp_path / "ours"), released.read(tmp_path / "theirs"))


def test_copies_of_embedding_and_head_are_optional(tmp_path: Path, bf16: Path) -> None:
    model = DeepseekV3.from_pretrained(bf16)
    model.save_pretrained(tmp_path / "small", mtp_copies=False)
    names = released.shapes(released.V3).keys()
    left_out = {n for n in names if ".2.embed_tokens." in n or ".2.shared_head.head." in n}
    assert len(left_out) == 2
    assert released.read(tmp_path / "small").keys() == names - left_out
    again = DeepseekV3.from_pretrained(tmp_path / "small")
    released.assert_same(again.state_dict(), model.state_dict())
    again.save_pretrained(tmp_path / "whole")
    released.assert_same(released.read(tmp_path / "whole"), released.read(bf16))


def test_tied_embeddings_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    values = NO_MTP | {"tie_word_embeddings": True}
    weights = released.tensors(values)
    del weights["lm_head.weight"]
    model = DeepseekV3.from_pretrained(released.write(tmp_path / "released", values, weights))
    assert model.lm_head.weight is model.embed_tokens.weight
    model.save_pretrained(tmp_path / "saved")
    released.assert_same(released.read(tmp_path / "saved"), weights)


# Dtypes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_cast_and_correction_biases_never(dtype: torch.dtype, bf16: Path, tmp_path: Path) -> None:
    stored = released.read(bf16)
    model = DeepseekV3.from_pretrained(bf16, dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    bias = model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, stored["model.layers.1.mlp.gate.e_score_correction_bias"])
    gate = stored["model.layers.0.mlp.gate_proj.weight"]
    assert torch.equal(model.layers[0].mlp.gate_up_proj.weight[: len(gate)], gate.to(dtype))
    model.save_pretrained(tmp_path / "saved", format="bf16")
    saved = released.read(tmp_path / "saved")
    assert torch.equal(
        saved["model.layers.2.mlp.gate.e_score_correction_bias"],
        model.mtp[0].block.mlp.gate.e_score_correction_bias,
    )


def test_a_bias_stored_as_bfloat16_stays_so(tmp_path: Path) -> None:
    weights = {
        name: tensor.bfloat16() if name.endswith("_bias") else tensor
        for name, tensor in released.tensors(released.V3).items()
    }
    model = DeepseekV3.from_pretrained(
        released.write(tmp_path / "released", released.V3, weights), torch.float32
    )
    assert model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "saved")
    released.assert_same(released.read(tmp_path / "saved"), weights)


def test_weights_load_as_floats_only(bf16: Path) -> None:
    for wrong in (torch.int8, "int8", "auto", "", 32):
        with pytest.raises(CheckpointError, match=f"dtype is {wrong}: load weights as float32, bfloat16 or"):
            DeepseekV3.from_pretrained(bf16, wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_have_names(dtype: torch.dtype, bf16: Path) -> None:
    name = str(dtype).removeprefix("torch.")
    short = name.replace("bfloat", "bf").replace("float", "fp")
    for wanted in (dtype, str(dtype), name, short):
        model = DeepseekV3.from_pretrained(bf16, wanted)
        assert {p.dtype for p in model.parameters()} == {dtype}, wanted


# What is not loaded --------------------------------------------------------------------------------------


def test_without_mtp_the_rest_is_the_same(fp8: Path, tmp_path: Path) -> None:
    whole = DeepseekV3.from_pretrained(fp8)
    model = DeepseekV3.from_pretrained(fp8, mtp=False)
    assert model.config == whole.config.replace(num_nextn_predict_layers=0) and len(model.mtp) == 0
    main = {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith("mtp.")}
    released.assert_same(model.state_dict(), main)
    model.save_pretrained(tmp_path / "saved")
    assert not any(".layers.2." in name for name in released.read(tmp_path / "saved"))


def test_without_mtp_its_copies_need_not_agree(tmp_path: Path) -> None:
    weights = released.tensors(released.V3)
    weights["model.layers.2.embed_tokens.weight"] += 1
    folder = released.write(tmp_path / "model", released.V3, weights)
    with pytest.raises(CheckpointError, match="differs"):
        DeepseekV3.from_pretrained(folder)
    DeepseekV3.from_pretrained(folder, mtp=False)


# Memory --------------------------------------------------------------------------------------------------


def bytes_of(folder: Path, dtype: torch.dtype) -> int:
    return sum(tensor.nbytes for tensor in DeepseekV3.from_pretrained(folder, dtype).state_dict().values())


def test_a_model_that_does_not_fit_is_refused_before_anything_is_read(
    bf16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, half, free = bytes_of(bf16, torch.float32), bytes_of(bf16, torch.bfloat16), 0

    def forbidden(*args: object) -> None:
        raise AssertionError("nothing may be read or allocated")

    def refusal(dtype: torch.dtype) -> str:
        with pytest.raises(CheckpointError) as caught:
            DeepseekV3.from_pretrained(bf16, dtype)
        return str(caught.value)

    monkeypatch.setattr("dsv3.checkpoint.memory.free_memory", lambda device: free)
    monkeypatch.setattr("dsv3.checkpoint.pretrained._load", forbidden)
    monkeypatch.setattr("dsv3.checkpoint.reader.Checkpoint.get_tensor", forbidden)
    free = half
    assert refusal(torch.float32) == (
        f"the model needs {size(whole)} as float32, but {size(half)} are free on cpu: "
        f"load it as bfloat16 ({size(half)})"
    )
    free = half - 1
    for dtype in (torch.float32, torch.bfloat16):
        assert refusal(dtype).endswith("are free on cpu: it takes a machine with more memory")


def test_a_model_that_just_fits_is_loaded(bf16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free: int | None = bytes_of(bf16, torch.bfloat16)
    monkeypatch.setattr("dsv3.checkpoint.memory.free_memory", lambda device: free)
    DeepseekV3.from_pretrained(bf16)
    free = None  # of a device that does not tell
    DeepseekV3.from_pretrained(bf16, torch.float32)


def test_tied_weights_are_counted_once() -> None:
    tiny = PRESETS["tiny"]
    saved = weight_bytes(tiny, torch.float32) - weight_bytes(
        tiny.replace(tie_word_embeddings=True), torch.float32
    )
    assert saved == 4 * tiny.vocab_size * tiny.hidden_size


def test_free_memory_of_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 50)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 20)
    assert free_memory(torch.device("cuda")) == 130
    assert free_memory(torch.device("meta")) is None
    ram = free_memory(torch.device("cpu"))
    assert ram is not None and ram > 1 << 20


# FP8 -----------------------------------------------------------------------------------------------------


def test_fp8_loads_as_weight_times_scale(fp8: Path) -> None:
    stored = released.read(fp8)
    for dtype in (None, torch.float32):
        model = DeepseekV3.from_pretrained(fp8, dtype)
        assert model.config.quantization_config is None  # in memory it is not quantised
        state = model.state_dict()
        for name, piece in table(model.config).items():
            expected = stored[name]
            if expected.dtype == released.FP8:
                scale = stored[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
                expected = expected.float() * scale[: expected.shape[0], : expected.shape[1]]
            if not piece.keeps_dtype:
                expected = expected.to(dtype or torch.bfloat16)
            assert torch.equal(piece.of(state[piece.parameter]), expected), name


def test_saved_fp8_has_the_released_layout(bf16: Path, fp8: Path, tmp_path: Path) -> None:
    model = DeepseekV3.from_pretrained(bf16)
    model.save_pretrained(tmp_path / "saved", format="fp8")
    ours, theirs = released.read(tmp_path / "saved"), released.read(fp8)
    assert {name: (t.dtype, t.shape) for name, t in ours.items()} == {
        name: (t.dtype, t.shape) for name, t in theirs.items()
    }
    config = released.config_of(tmp_path / "saved")
    assert config["quantization_config"] == released.QUANTIZATION
    assert config["torch_dtype"] == "bfloat16"


def test_fp8_leaves_what_goes_around_the_layers_alone(bf16: Path, tmp_path: Path) -> None:
    """Here the stream mostly carries its tokens from embedding to head, and neither is quantised.

    So this shows that they are not, and that no scale is far off; what FP8 costs where layers matter, the next
    test measures.
    """
    DeepseekV3.from_pretrained(bf16).save_pretrained(tmp_path / "fp8", format="fp8")
    difference = relative_difference(logits_of(tmp_path / "fp8"), logits_of(bf16))
    assert 1e-5 < difference < 1e-2


def test_what_fp8_costs_where_the_layers_decide(tmp_path: Path) -> None:
    """Each weight is off by 2.6% (root mean square), and without the layers most answers would be others.

    Routing is spread by biases, as in a trained model: where all scores are nearly equal, any rounding chooses
    other experts.
    """
    generator = torch.Generator().manual_seed(0)
    model = DeepseekV3(PRESETS["nano"]).eval().requires_grad_(False)
    model.init_weights()
    model.embed_tokens.weight.normal_(0, 0.15, generator=generator)
    for name, bias in model.named_buffers():
        assert name.endswith("e_score_correction_bias")
        bias.normal_(0, 0.5, generator=generator)
    inputs = ids(model.config.vocab_size, batch=4, length=64)
    model.save_pretrained(tmp_path / "fp32", "fp32")
    model.save_pretrained(tmp_path / "fp8", "fp8")
    exact, quantised = logits_of(tmp_path / "fp32", inputs), logits_of(tmp_path / "fp8", inputs)
    without_layers = model.lm_head(model.norm(model.embed_tokens(inputs)))
    assert relative_difference(without_layers, exact) > 0.3 and agreement(without_layers, exact) < 0.6
    error, agreed = relative_difference(quantised, exact), agreement(quantised, exact)
    assert 1e-3 < error < 5e-2, f"relative error {error:.2%}"
    assert agreed > 0.9, f"the likeliest token stays the same {agreed:.1%} of the time"


def test_infinite_weights_are_named_and_nothing_is_left(bf16: Path, tmp_path: Path) -> None:
    model = DeepseekV3.from_pretrained(bf16)
    with torch.no_grad():
        model.layers[1].mlp.experts.down_proj[2, 5, 5] = float("inf")
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.experts.2.down_proj.weight .*infinite"):
        model.save_pretrained(tmp_path / "saved", format="fp8")
    assert list(tmp_path.iterdir()) == []


# transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", STYLES.values(), ids=STYLES)
def test_transformers_gives_the_same_logits(values: dict[str, Any], tmp_path: Path) -> None:
    folder = released.write(tmp_path / "released", values, released.tensors(values))
    DeepseekV3.from_pretrained(folder).save_pretrained(tmp_path / "saved", max_shard_size=300_000)
    theirs = logits_in_transformers(tmp_path / "saved")
    assert theirs.abs().max() > 0.1
    assert (logits_of(tmp_path / "saved") - theirs).abs().max() < 1e-4


def test_mtp_logits_come_with_the_checkpoint(bf16: Path) -> None:
    with torch.no_grad():
        output = DeepseekV3.from_pretrained(bf16, torch.float32)(ids())
    assert [tuple(logits.shape) for logits in output.mtp_logits] == [(2, 23, 130)]


# The folder ----------------------------------------------------------------------------------------------


def test_a_saved_checkpoint_replaces_another_but_not_its_tokenizer(bf16: Path, tmp_path: Path) -> None:
    folder = released.copy(bf16, tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    DeepseekV3.from_pretrained(bf16).save_pretrained(folder)
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    DeepseekV3.from_pretrained(folder)


def test_any_other_folder_is_left_alone(bf16: Path, tmp_path: Path) -> None:
    model = DeepseekV3.from_pretrained(bf16)
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1.tex").write_text("It was a dark and stormy night.")
    with pytest.raises(CheckpointError, match="neither empty nor a checkpoint"):
        model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="is a file"):
        model.save_pretrained(folder / "chapter1.tex")
    assert [file.name for file in folder.iterdir()] == ["chapter1.tex"]


def test_an_interrupted_save_leaves_the_old_checkpoint(
    bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = released.copy(bf16, tmp_path / "model")
    model = DeepseekV3.from_pretrained(folder)
    written = []

    def fail(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(folder, max_shard_size=200_000)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    released.assert_same(released.read(folder), released.read(bf16))


def test_a_full_disk_is_noticed_before_writing(
    bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = DeepseekV3.from_pretrained(bf16)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match=r"1\.0 kB free, but the weights take [\d.]+ MB"):
        model.save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_all_files_are_on_the_disk_before_the_folder_is_there(
    bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, synced = DeepseekV3.from_pretrained(bf16), set()
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    model.save_pretrained(tmp_path / "saved", max_shard_size=200_000)
    files = list((tmp_path / "saved").iterdir())
    assert len(files) > 4 and synced >= {file.stat().st_ino for file in files}


def test_what_is_packed_or_on_disk_is_not_saved(bf16: Path, tmp_path: Path) -> None:
    convert(bf16, tmp_path / "fp8", "fp8")
    packed = DeepseekV3.from_pretrained(tmp_path / "fp8", packed=True)
    outside = DeepseekV3.from_pretrained(
        bf16, experts=ExpertCache(ExpertFiles(open_checkpoint(bf16), torch.bfloat16), slots=4)
    )
    for model in (packed, outside):
        with pytest.raises(CheckpointError, match=r"_proj.* is packed, or stays on disk"):
            model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_unknown_formats_are_refused(bf16: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="format is 'int4': dsv3 writes bf16, fp8, fp32"):
        DeepseekV3.from_pretrained(bf16).save_pretrained(tmp_path / "saved", format="int4")  # type: ignore[arg-type]


def test_the_safetensors_library_accepts_our_files(tmp_path: Path) -> None:
    """Dtypes of 1, 2 and 4 bytes in one file, and odd numbers of bytes: every tensor must be aligned."""
    values = released.V3 | {"hidden_size": 161, "moe_intermediate_size": 137, "intermediate_size": 201}
    source = released.write(tmp_path / "source", values, released.tensors(values))
    DeepseekV3.from_pretrained(source).save_pretrained(tmp_path / "saved", format="fp8")
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as shard:
        assert shard.metadata() == {"format": "pt"}
        tensors = [shard.get_tensor(name) for name in released.shapes(values)]
    assert {tensor.itemsize for tensor in tensors} == {1, 2, 4}
    assert any(tensor.nbytes % 2 for tensor in tensors)
    assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in tensors)
