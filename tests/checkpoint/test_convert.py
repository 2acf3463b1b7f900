"""From BF16 to FP8 and back, and what travels along."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dsv3.checkpoint import DeepseekV3, convert, open_checkpoint
from dsv3.errors import CheckpointError
from dsv3.quant import quantize_blocks
from tests.checkpoint import released


def test_fp8_to_fp8_copies_every_bit(fp8: Path, tmp_path: Path) -> None:
    convert(fp8, tmp_path / "out", "hf-fp8", max_shard_size=100_000)
    released.assert_same(released.read(tmp_path / "out"), released.read(fp8))
    assert released.config_of(tmp_path / "out") == released.config_of(fp8)


def test_bf16_to_bf16_copies_every_bit(bf16: Path, tmp_path: Path) -> None:
    convert(bf16, tmp_path / "out", "hf-bf16")
    released.assert_same(released.read(tmp_path / "out"), released.read(bf16))
    assert released.config_of(tmp_path / "out") == released.config_of(bf16)


def test_fp8_to_bf16_is_what_loading_gives(fp8: Path, tmp_path: Path) -> None:
    convert(fp8, tmp_path / "out", "hf-bf16")
    config = released.config_of(tmp_path / "out")
    assert "quantization_config" not in config and config["torch_dtype"] == "bfloat16"
    released.assert_same(
        DeepseekV3.from_pretrained(tmp_path / "out").state_dict(),
        DeepseekV3.from_pretrained(fp8).state_dict(),
    )


def test_bf16_to_fp8_quantises_what_released_files_quantise(bf16: Path, tmp_path: Path) -> None:
    convert(bf16, tmp_path / "out", "hf-fp8")
    source, result = released.read(bf16), released.read(tmp_path / "out")
    quantised = released.fp8_names(released.V3)
    assert result.keys() == source.keys() | {f"{name}_scale_inv" for name in quantised}
    for name, tensor in source.items():
        if name in quantised:
            expected, scale = quantize_blocks(tensor)
            assert torch.equal(result[name].view(torch.uint8), expected.view(torch.uint8))
            assert torch.equal(result[f"{name}_scale_inv"], scale)
        else:
            released.assert_same({name: result[name]}, {name: tensor})
    assert released.config_of(tmp_path / "out")["quantization_config"] == released.QUANTIZATION


def test_saving_and_converting_agree(bf16: Path, tmp_path: Path) -> None:
    convert(bf16, tmp_path / "converted", "hf-fp8")
    DeepseekV3.from_pretrained(bf16).save_pretrained(tmp_path / "saved", format="fp8")
    released.assert_same(released.read(tmp_path / "converted"), released.read(tmp_path / "saved"))


def test_float32_becomes_bf16_but_for_the_correction_biases(tmp_path: Path) -> None:
    weights = released.tensors(released.V3, dtype=torch.float32)
    source = released.write(tmp_path / "source", released.V3 | {"torch_dtype": "float32"}, weights)
    convert(source, tmp_path / "out", "hf-bf16")
    result = released.read(tmp_path / "out")
    assert {t.dtype for n, t in result.items() if not n.endswith("_bias")} == {torch.bfloat16}
    assert {t.dtype for n, t in result.items() if n.endswith("_bias")} == {torch.float32}
    assert released.config_of(tmp_path / "out")["torch_dtype"] == "bfloat16"


def test_power_of_two_scales_keep_their_mark_only_while_they_are_copied(
    fp8: Path, bf16: Path, tmp_path: Path
) -> None:
    """V3.1 says `scale_fmt: ue8m0`. It holds of scales that are copied, not of those that we compute."""
    stated = released.QUANTIZATION | {"scale_fmt": "ue8m0"}
    for source, kept in ((fp8, stated), (bf16, released.QUANTIZATION)):
        folder = released.copy(source, tmp_path / source.name)
        config = released.config_of(folder) | {"quantization_config": stated}
        (folder / "config.json").write_text(json.dumps(config))
        convert(folder, tmp_path / f"{source.name} out", "hf-fp8")
        assert released.config_of(tmp_path / f"{source.name} out")["quantization_config"] == kept


def test_what_fp8_files_leave_in_bf16_stays_so(tmp_path: Path) -> None:
    weights = released.tensors(released.V3, fp8=True)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    weights[name] = torch.randn(weights[name].shape).bfloat16()
    del weights[f"{name}_scale_inv"]
    convert(released.write(tmp_path / "source", released.V3, weights), tmp_path / "out", "hf-fp8")
    released.assert_same(released.read(tmp_path / "out"), weights)


def test_tokenizer_template_and_licence_travel_and_the_rest_does_not(bf16: Path, tmp_path: Path) -> None:
    source = released.copy(bf16, tmp_path / "source")
    along = [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "LICENSE",
    ]
    left = ["optimizer.pt", "pytorch_model.bin", ".gitattributes", "modeling_deepseek.py"]
    for name in along + left:
        (source / name).write_text(f"this is {name}")
    (source / "runs").mkdir()
    convert(source, tmp_path / "out", "hf-fp8")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        *along,
    }
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "this is chat_template.jinja"


def test_config_of_a_folder_without_mtp_tensors_is_put_right(tmp_path: Path) -> None:
    weights = {n: t for n, t in released.tensors(released.V3).items() if ".layers.2." not in n}
    source = released.write(tmp_path / "source", released.V3, weights)
    convert(source, tmp_path / "out", "hf-bf16")
    assert released.config_of(tmp_path / "out")["num_nextn_predict_layers"] == 0
    released.assert_same(released.read(tmp_path / "out"), weights)


def test_a_checkpoint_is_not_converted_onto_itself(bf16: Path, tmp_path: Path) -> None:
    folder = released.copy(bf16, tmp_path / "model")
    with pytest.raises(CheckpointError, match="name another folder"):
        convert(folder, tmp_path / "." / "model", "hf-fp8")
    released.assert_same(released.read(folder), released.read(bf16))


def test_nothing_of_another_checkpoint_is_mixed_in(bf16: Path, fp8: Path, tmp_path: Path) -> None:
    source, out = released.copy(fp8, tmp_path / "source"), released.copy(bf16, tmp_path / "out")
    (source / "tokenizer.json").write_text("new")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE", "notes.pdf"):
        (out / name).write_text("old")
    (out / "runs").mkdir()
    convert(source, out, "hf-fp8")
    assert {file.name for file in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "notes.pdf",
        "runs",
    }
    assert (out / "tokenizer.json").read_text() == "new"
    released.assert_same(released.read(out), released.read(fp8))
    assert {file.name for file in tmp_path.iterdir()} == {"source", "out"}


def test_config_does_not_name_code_that_stays_behind(bf16: Path, tmp_path: Path) -> None:
    source = released.copy(bf16, tmp_path / "source")
    auto_map = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}
    (source / "config.json").write_text(json.dumps(released.config_of(source) | {"auto_map": auto_map}))
    convert(source, tmp_path / "out", "hf-bf16")
    assert released.config_of(tmp_path / "out") == released.config_of(bf16)


def test_a_tilde_is_the_home_folder(bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    released.copy(bf16, tmp_path / "model")
    with pytest.raises(CheckpointError, match="name another folder"):
        convert(tmp_path / "model", "~/model", "hf-bf16")
    convert("~/model", "~/out", "hf-bf16")
    released.assert_same(released.read(tmp_path / "out"), released.read(bf16))


def test_unknown_targets_and_broken_sources_write_nothing(bf16: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot convert to 'gguf': choose hf-bf16 or hf-fp8"):
        convert(bf16, tmp_path / "out", "gguf")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "out", "hf-fp8")
    assert list(tmp_path.iterdir()) == []


def test_progress_is_shown_on_standard_error(
    bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich: take this for a terminal
    convert(bf16, tmp_path / "out", "hf-fp8", progress=True)
    captured = capsys.readouterr()
    assert "Converting to hf-fp8" in captured.err and captured.out == ""
    assert open_checkpoint(tmp_path / "out").quantized
