"""From BF16 to FP8, to integers and back, and what travels along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3.checkpoint import DeepseekV3, convert, open_checkpoint
from dsv3.errors import CheckpointError
from dsv3.kernels.packed import Packed, dequantize
from dsv3.quant import quantize, quantize_blocks
from tests.checkpoint import released

# Matrices fit panels of 16 rows and groups of 32 columns, but for the experts' `down_proj`, which have 80 columns.
FITTING = released.V3 | {
    "intermediate_size": 192,
    "moe_intermediate_size": 80,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "vocab_size": 144,
}


def test_fp8_to_fp8_copies_every_bit(fp8: Path, tmp_path: Path) -> None:
    convert(fp8, tmp_path / "out", "fp8", max_shard_size=100_000)
    released.assert_same(released.read(tmp_path / "out"), released.read(fp8))
    assert released.config_of(tmp_path / "out") == released.config_of(fp8)


def test_bf16_to_bf16_copies_every_bit(bf16: Path, tmp_path: Path) -> None:
    convert(bf16, tmp_path / "out", "bf16")
    released.assert_same(released.read(tmp_path / "out"), released.read(bf16))
    assert released.config_of(tmp_path / "out") == released.config_of(bf16)


def test_fp8_to_bf16_is_what_loading_gives(fp8: Path, tmp_path: Path) -> None:
    convert(fp8, tmp_path / "out", "bf16")
    config = released.config_of(tmp_path / "out")
    assert "quantization_config" not in config and config["torch_dtype"] == "bfloat16"
    released.assert_same(
        DeepseekV3.from_pretrained(tmp_path / "out").state_dict(),
        DeepseekV3.from_pretrained(fp8).state_dict(),
    )


def test_bf16_to_fp8_quantises_what_released_files_quantise(bf16: Path, tmp_path: Path) -> None:
    convert(bf16, tmp_path / "out", "fp8")
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
    convert(bf16, tmp_path / "converted", "fp8")
    DeepseekV3.from_pretrained(bf16).save_pretrained(tmp_path / "saved", format="fp8")
    released.assert_same(released.read(tmp_path / "converted"), released.read(tmp_path / "saved"))


def test_float32_becomes_bf16_but_for_the_correction_biases(tmp_path: Path) -> None:
    weights = released.tensors(released.V3, dtype=torch.float32)
    source = released.write(tmp_path / "source", released.V3 | {"torch_dtype": "float32"}, weights)
    convert(source, tmp_path / "out", "bf16")
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
        convert(folder, tmp_path / f"{source.name} out", "fp8")
        assert released.config_of(tmp_path / f"{source.name} out")["quantization_config"] == kept


def test_what_fp8_files_leave_in_bf16_stays_so(tmp_path: Path) -> None:
    weights = released.tensors(released.V3, fp8=True)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    weights[name] = torch.randn(weights[name].shape).bfloat16()
    del weights[f"{name}_scale_inv"]
    convert(released.write(tmp_path / "source", released.V3, weights), tmp_path / "out", "fp8")
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
    convert(source, tmp_path / "out", "fp8")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        *along,
    }
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "this is chat_template.jinja"


def test_config_of_a_folder_without_mtp_tensors_is_put_right(tmp_path: Path) -> None:
    weights = {n: t for n, t in released.tensors(released.V3).items() if ".layers.2." not in n}
    source = released.write(tmp_path / "source", released.V3, weights)
    convert(source, tmp_path / "out", "bf16")
    assert released.config_of(tmp_path / "out")["num_nextn_predict_layers"] == 0
    released.assert_same(released.read(tmp_path / "out"), weights)


# Integers ------------------------------------------------------------------------------------------------


def bits_of(name: str, mix: str) -> int | None:
    """What the table in docs/quantisation.md says, for a model of FITTING; None: stays in bf16."""
    if name == "lm_head.weight":
        return 8
    if ".self_attn." not in name and ".mlp." not in name:
        return None
    if not name.endswith("_proj.weight") and not name.endswith("_with_mqa.weight"):
        return None
    if "kv_b_proj" in name or ("experts" in name and "down_proj" in name):
        return None
    if ".experts." in name:
        return 8 if mix == "int8" else 4
    return 4 if mix == "int4" else 8


def numbers(folder: Path, name: str) -> Tensor:
    """A tensor of a folder in float32, whatever it is packed into."""
    for piece, stored in open_checkpoint(folder).stream():
        if piece.name == name:
            return dequantize(stored) if isinstance(stored, Packed) else stored.float()
    raise AssertionError(name)


@pytest.fixture(scope="module")
def fitting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return released.write(tmp_path_factory.mktemp("fitting") / "bf16", FITTING, released.tensors(FITTING))


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("mix", ["int8", "int4", "mixed"])
def test_integers_pack_what_the_table_says(
    mix: Any, zero_points: bool, fitting: Path, tmp_path: Path
) -> None:
    notes = convert(fitting, tmp_path / "out", mix, zero_points=zero_points)
    source, result = released.read(fitting), released.read(tmp_path / "out")
    copies = {n for n in source if n.endswith((".embed_tokens.weight", "shared_head.head.weight"))}
    copies.remove("model.embed_tokens.weight")
    assert not copies & result.keys(), "dsv3 shares them, and nobody else reads these files"
    for name in source.keys() - copies:
        bits = bits_of(name, mix)
        if bits is None:
            released.assert_same({name: result.pop(name)}, {name: source[name]})
            continue
        made = quantize(source[name], bits, 32, zero_points)
        expected = {name: made.codes, f"{name}_scale": made.scale}
        if made.zero is not None:
            expected[f"{name}_zero"] = made.zero
        released.assert_same({n: result.pop(n) for n in expected}, expected)
    assert not result
    assert released.config_of(tmp_path / "out")["quantization_config"] == {
        "quant_method": "dsv3",
        "layout": "panels16",
    }
    (note,) = notes
    assert note == (
        "model.layers.1.mlp.experts.0.down_proj.weight (160 x 80) and 9 others stay in bf16: only matrices of 16 n rows "
        "and 32 m columns are packed"
    )


@pytest.mark.parametrize("to", ["int8", "int4", "mixed"])
def test_integers_of_the_same_kind_are_copied_and_others_made_anew(
    to: Any, fitting: Path, tmp_path: Path
) -> None:
    convert(fitting, tmp_path / "first", to)
    convert(tmp_path / "first", tmp_path / "again", to, max_shard_size=100_000)
    released.assert_same(released.read(tmp_path / "again"), released.read(tmp_path / "first"))
    config = released.config_of(tmp_path / "again")
    assert config == released.config_of(tmp_path / "first")
    convert(tmp_path / "first", tmp_path / "zeros", to, zero_points=True)
    name = "model.layers.0.mlp.gate_proj.weight"
    assert f"{name}_zero" in released.read(tmp_path / "zeros")
    kind = open_checkpoint(tmp_path / "first").kinds[name]
    expected = quantize(numbers(tmp_path / "first", name), 4 if kind == "int4" else 8, 32, True)
    assert torch.equal(numbers(tmp_path / "zeros", name), dequantize(expected))


def test_from_any_format_to_any_other(fitting: Path, tmp_path: Path) -> None:
    """Each step from the numbers that the one before stands for, in float32."""
    formats: list[Any] = ["bf16", "fp8", "int8", "int4", "mixed"]
    for one in formats:
        convert(fitting, tmp_path / one, one)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    for one in formats:
        before = numbers(tmp_path / one, name)
        expected = {
            "bf16": before.bfloat16().float(),
            "fp8": dequantize(Packed("fp8", *quantize_blocks(before))),
            "int8": dequantize(quantize(before, 8, 32)),
            "int4": dequantize(quantize(before, 4, 32)),
        }
        kinds = {"mixed": "int4"}
        for other in formats:
            out = tmp_path / f"{one} to {other}"
            convert(tmp_path / one, out, other)
            wanted = (
                before
                if kinds.get(one, one) == kinds.get(other, other)
                else expected[kinds.get(other, other)]
            )
            assert torch.equal(numbers(out, name), wanted), f"{one} to {other}"
            assert torch.equal(numbers(out, bias), numbers(fitting, bias))
            stated = released.config_of(out).get("quantization_config", {}).get("quant_method")
            assert stated == {"bf16": None, "fp8": "fp8"}.get(other, "dsv3")
            DeepseekV3.from_pretrained(out)


def test_groups_are_as_wanted(fitting: Path, tmp_path: Path) -> None:
    notes = convert(fitting, tmp_path / "out", "int4", group=64)
    name = "model.layers.0.mlp.down_proj.weight"  # 160 x 192; most others have 160 columns, no multiple of 64
    assert torch.equal(
        numbers(tmp_path / "out", name), dequantize(quantize(released.read(fitting)[name], 4, 64))
    )
    assert "and 64 m columns" in notes[0]
    with pytest.raises(CheckpointError, match="group is 48: choose 32, 64, 128"):
        convert(fitting, tmp_path / "other", "int4", group=48)


def test_importance_is_by_name(fitting: Path, tmp_path: Path) -> None:
    name, other = (f"model.layers.1.mlp.experts.{e}.gate_proj.weight" for e in (0, 1))
    importance = torch.randn(160).exp()
    convert(fitting, tmp_path / "out", "int4", importance={name: importance})
    weights = released.read(fitting)
    for which, counts in ((name, importance), (other, None)):
        expected = dequantize(quantize(weights[which], 4, 32, importance=counts))
        assert torch.equal(numbers(tmp_path / "out", which), expected)


def test_saying_what_cannot_be_quantised(fitting: Path, tmp_path: Path) -> None:
    weights = released.tensors(FITTING)
    name = "model.layers.0.self_attn.o_proj.weight"
    weights[name][3, 5] = torch.nan
    source = released.write(tmp_path / "source", FITTING, weights)
    with pytest.raises(CheckpointError, match=f"{name} cannot be quantised to 4 bits"):
        convert(source, tmp_path / "out", "int4")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_copies_that_differ_are_not_left_out(fitting: Path, tmp_path: Path) -> None:
    weights = released.tensors(FITTING)
    weights["model.layers.2.shared_head.head.weight"][0, 0] += 1
    source = released.write(tmp_path / "source", FITTING, weights)
    with pytest.raises(CheckpointError, match=r"shared_head.head.weight differs from lm_head.weight"):
        convert(source, tmp_path / "out", "int4")


def test_a_tied_head_stays_with_the_embedding(tmp_path: Path) -> None:
    config = FITTING | {"tie_word_embeddings": True, "num_nextn_predict_layers": 0}
    weights = released.tensors(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    source = released.write(tmp_path / "source", config, weights)
    convert(source, tmp_path / "out", "int4")
    result = released.read(tmp_path / "out")
    assert "lm_head.weight" not in result and "lm_head.weight_scale" not in result
    assert torch.equal(result["model.embed_tokens.weight"], weights["lm_head.weight"])
    DeepseekV3.from_pretrained(tmp_path / "out")


# What travels along --------------------------------------------------------------------------------------


def test_a_checkpoint_is_not_converted_onto_itself(bf16: Path, tmp_path: Path) -> None:
    folder = released.copy(bf16, tmp_path / "model")
    with pytest.raises(CheckpointError, match="name another folder"):
        convert(folder, tmp_path / "." / "model", "fp8")
    released.assert_same(released.read(folder), released.read(bf16))


def test_nothing_of_another_checkpoint_is_mixed_in(bf16: Path, fp8: Path, tmp_path: Path) -> None:
    source, out = released.copy(fp8, tmp_path / "source"), released.copy(bf16, tmp_path / "out")
    (source / "tokenizer.json").write_text("new")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE", "notes.pdf"):
        (out / name).write_text("old")
    (out / "runs").mkdir()
    convert(source, out, "fp8")
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
    convert(source, tmp_path / "out", "bf16")
    assert released.config_of(tmp_path / "out") == released.config_of(bf16)


def test_a_tilde_is_the_home_folder(bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    released.copy(bf16, tmp_path / "model")
    with pytest.raises(CheckpointError, match="name another folder"):
        convert(tmp_path / "model", "~/model", "bf16")
    convert("~/model", "~/out", "bf16")
    released.assert_same(released.read(tmp_path / "out"), released.read(bf16))


def test_unknown_targets_and_broken_sources_write_nothing(bf16: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="cannot convert to 'gguf': choose bf16, fp8, int8, int4, mixed"
    ):
        convert(bf16, tmp_path / "out", "gguf")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "out", "fp8")
    assert list(tmp_path.iterdir()) == []


def test_progress_is_shown_on_standard_error(
    bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich: take this for a terminal
    convert(bf16, tmp_path / "out", "fp8", progress=True)
    captured = capsys.readouterr()
    assert "Converting to fp8" in captured.err and captured.out == ""
    assert open_checkpoint(tmp_path / "out").quantized


def test_what_is_somebodys_own_stays_in_a_folder_that_is_replaced(bf16: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(bf16, out, "int8")
    for name in ("notes.txt", "log.json"):
        (out / name).write_text("mine")
    (out / "merges.txt").write_text("of another tokenizer")
    convert(bf16, out, "fp8")
    for name in ("notes.txt", "log.json"):
        assert (out / name).read_text() == "mine"
    assert not (out / "merges.txt").exists()
