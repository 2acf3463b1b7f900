"""What `dsv3 inspect` counts, held to the model, to what lies on disk, and to DeepSeek's own numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dsv3 import LLM
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.memory import CACHE_SHARE, weight_bytes
from dsv3.checkpoint.pretrained import DeepseekV3
from dsv3.checkpoint.summary import Pool, Summary, Weights, memory_pools, summarize
from dsv3.config import PRESETS, ModelConfig
from dsv3.errors import CheckpointError, UserError
from dsv3.model import Transformer
from tests.text import toy

TINY = PRESETS["tiny"]
V2_LIKE = TINY.replace(
    q_lora_rank=None,
    topk_method="greedy",
    scoring_func="softmax",
    n_shared_experts=2,
    num_nextn_predict_layers=0,
)
DENSE = TINY.replace(n_routed_experts=None, tie_word_embeddings=True)


def test_v3_has_deepseeks_own_numbers() -> None:
    v3 = summarize("v3-671b")
    assert v3.main.total == 671_026_419_200
    assert v3.in_files == 684_489_845_504
    assert v3.main.active == 37_552_297_472  # "37B" in the report
    assert v3.cache_per_token() == 70_272
    assert {part.name: part.active for part in v3.parts}["routed experts"] == 58 * 8 * 3 * 7168 * 2048
    fp8 = next(weights for weights in v3.weights if weights.format == "fp8")
    assert fp8.disk == pytest.approx(688.6e9, rel=1e-3)


@pytest.mark.parametrize("config", [TINY, V2_LIKE, DENSE, TINY.replace(num_nextn_predict_layers=2)])
def test_every_parameter_of_the_model_is_counted_once(config) -> None:  # type: ignore[no-untyped-def]
    with torch.device("meta"):
        model = Transformer(config)
    tensors = {tensor.data_ptr() or id(tensor): tensor for tensor in model.parameters()}
    biases = sum(buffer.numel() for buffer in model.buffers())
    assert Summary(config).with_mtp == sum(t.numel() for t in tensors.values()) + biases


@pytest.mark.parametrize("config", [TINY, V2_LIKE])
def test_active_parameters_are_those_that_a_token_touches(config) -> None:  # type: ignore[no-untyped-def]
    """Run one token: the routed experts whose weights get a gradient are the chosen ones, in each layer."""
    model = Transformer(config.replace(num_nextn_predict_layers=0))
    model.init_weights()
    model(torch.tensor([[3]])).logits.sum().backward()
    touched = 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if ".experts." in name:
            touched += int((parameter.grad.flatten(1).abs().sum(1) > 0).sum()) * parameter[0].numel()
        else:
            touched += parameter.numel()
    touched += sum(buffer.numel() for buffer in model.buffers())
    assert Summary(config).main.active == touched


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("config", [TINY, V2_LIKE, DENSE])
def test_disk_is_what_saving_takes(format, config, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = DeepseekV3(config)
    model.init_weights()
    model.save_pretrained(tmp_path / "model", format)
    summary = summarize(str(tmp_path / "model"))
    assert summary.files is not None
    weights = next(weights for weights in summary.weights if weights.format == format)
    assert summary.files.nbytes == weights.disk
    file = tmp_path / "model" / "model.safetensors"
    assert 0 < file.stat().st_size - summary.files.nbytes < 64_000, "the header is all that comes on top"
    assert format.replace("fp8", "float8_e4m3fn").replace("bf16", "bfloat16").replace("fp32", "float32") in (
        summary.files.format
    )


@pytest.mark.parametrize("to", ["int8", "int4", "mixed"])
@pytest.mark.parametrize("config", [TINY, V2_LIKE, DENSE])
def test_disk_is_what_converting_takes(to, config, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = DeepseekV3(config)
    model.init_weights()
    model.save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "packed", to)
    summary = summarize(str(tmp_path / "packed"))
    weights = next(weights for weights in summary.weights if weights.format == to)
    assert summary.files is not None and summary.files.nbytes == weights.disk
    assert "uint8" in summary.files.format


def test_v3_in_integers() -> None:
    """Counted by hand: bits of codes and half a bit of scale for each weight that is packed."""
    v3 = summarize("v3-671b")
    parts = {part.name: part.total for part in v3.parts}
    kv_b = 61 * 128 * (128 + 128) * 512  # layers, heads, what keys and values add per head, latent
    rest = parts["attention"] - kv_b + parts["dense feed-forward"] + parts["shared experts"]
    biases = 58 * 256
    stays = kv_b + parts["embedding"] + parts["norms"] + parts["router"] - biases
    for weights in v3.weights[3:]:
        routed, other = {"int8": (8.5, 8.5), "mixed": (4.5, 8.5), "int4": (4.5, 4.5)}[weights.format]
        bits = parts["routed experts"] * routed + rest * other + parts["head"] * 8.5
        assert weights.memory == bits / 8 + 2 * stays + 4 * biases, weights.format
    sizes = [weights.memory for weights in v3.weights]
    assert sizes[0] > sizes[1] > sizes[3] > sizes[2] > sizes[4] > sizes[5] > 671e9 / 2


def test_what_fits_is_the_context_beside_the_weights() -> None:
    summary = Summary(TINY)  # 144 bytes of bf16 cache per token, at most 512 tokens
    weights = Weights("bf16", 1000, None)
    assert summary.context_in(Pool("RAM", 9999, 999), weights) is None
    assert summary.context_in(Pool("RAM", 9999, 1000), weights) == 0
    room = 1000 + int(144 * 130 / CACHE_SHARE)
    assert summary.context_in(Pool("RAM", 9999, room), weights) == 128, "whole blocks"
    assert summary.context_in(Pool("RAM", 9999, room), Weights("fp32", 1000, None)) == 64
    assert summary.context_in(Pool("RAM", 10**9, 10**9), weights) == 512


@pytest.mark.parametrize("config", [TINY, V2_LIKE, DENSE, TINY.replace(num_nextn_predict_layers=2)])
def test_memory_is_what_generating_loads(config) -> None:  # type: ignore[no-untyped-def]
    """That is the main model: `weight_bytes` and the table of names agree on it."""
    main = Summary(config.replace(num_nextn_predict_layers=0))
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    for weights, alone in zip(Summary(config).weights, main.weights, strict=True):
        assert weights.memory == alone.memory, "MTP modules are not loaded"
        if weights.format != "fp8":  # of which `kv_b_proj` is bf16 in memory
            assert alone.disk == alone.memory, "without them there are no copies"
        if not weights.packed:
            assert weights.memory == weight_bytes(main.config, dtypes[weights.format])


@pytest.mark.parametrize("config", [TINY, V2_LIKE])
def test_memory_of_packed_weights(config: ModelConfig, tmp_path: Path) -> None:
    """Where halves of a matrix are whole blocks and panels, as in every released model."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "kv_lora_rank": 32}
    heads = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
    heads["q_lora_rank"] = config.q_lora_rank and 32
    model = DeepseekV3(config.replace(**sizes, **heads, num_nextn_predict_layers=0))
    model.init_weights()
    model.save_pretrained(tmp_path / "fp8", "fp8")
    convert(tmp_path / "fp8", tmp_path / "int4", "int4")
    foretold = {w.format: w.memory for w in Summary(model.config).weights}
    for format in ("fp8", "int4"):
        loaded = DeepseekV3.from_pretrained(tmp_path / format, torch.bfloat16, packed=True)
        assert foretold[format] == sum(t.nbytes for t in (*loaded.parameters(), *loaded.buffers()))


@pytest.mark.parametrize(("format", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_inspect_foretells_what_the_engine_does(
    format: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the model fits, to the byte, and how many tokens of context it then has."""
    model = DeepseekV3(TINY.replace(vocab_size=toy.train().get_vocab_size()))
    model.init_weights()
    model.save_pretrained(tmp_path / "model")
    folder = toy.save(tmp_path / "model")
    summary = summarize(str(folder))
    weights = next(weights for weights in summary.weights if weights.format == format)
    free, loaded = [0], weights.memory  # the engine looks when the weights are in their place
    for module in ("checkpoint.memory", "checkpoint.summary"):
        monkeypatch.setattr(f"dsv3.{module}.free_memory", lambda device: free[0])
    monkeypatch.setattr("dsv3.engine.machine.free_memory", lambda device: free[0] - loaded)
    for free[0] in (loaded - 1, loaded + 10_000, loaded + 100_001, loaded + 10**9):
        foretold = summary.context_in(memory_pools()[0], weights)
        if foretold is None:
            with pytest.raises(CheckpointError, match="the model needs"):
                LLM(folder, dtype=dtype, device="cpu", speculation="off")
        elif foretold == 0:
            with pytest.raises(UserError, match="the memory's room is 0"):
                LLM(folder, dtype=dtype, device="cpu", speculation="off")
        else:
            assert LLM(folder, dtype=dtype, device="cpu", speculation="off").max_model_len == foretold
    assert foretold == TINY.max_position_embeddings


def test_this_machine_has_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    ram = memory_pools()[0]
    assert ram.name == "RAM" and 0 < ram.free <= ram.total
    monkeypatch.setattr("dsv3.checkpoint.summary.free_memory", lambda device: 1234)
    assert memory_pools()[0].free == 1234, "inspect measures as loading does"


def test_whatever_names_a_model(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY.to_dict()))
    for name in ("tiny", str(config), str(tmp_path)):
        summary = summarize(name)
        assert summary.main == Summary(TINY).main and summary.files is None
    for name in ("no-such-model", str(tmp_path / "config.jsn"), str(tmp_path / "no" / "config.json")):
        with pytest.raises(UserError):
            summarize(name)


def test_a_folder_with_broken_weights_is_not_a_model_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="cut off"):
        summarize(str(tmp_path))


def test_a_hub_model_is_looked_at_without_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The download gets a filter that lets no weights through; the index names shards that are not there."""
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-1.safetensors"}}')
    asked = {}

    def snapshot_download(repo: str, **kwargs: object) -> str:
        asked.update(kwargs, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    summary = summarize("some/model@main")
    assert summary.main == Summary(TINY).main and summary.files is None
    assert (asked["repo"], asked["revision"]) == ("some/model", "main")
    assert "*.safetensors" in asked["ignore_patterns"]


def test_a_name_that_is_nothing_is_told_the_presets() -> None:
    with pytest.raises(CheckpointError, match=r"v3 does not exist: .*preset: v3-671b, v3-16b, nano, tiny"):
        summarize("v3")
