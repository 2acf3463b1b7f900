"""llama.cpp runs what we wrote, and says the same: tokens, and log-probabilities within what float32 leaves.

Weights of random models are large enough that attention, experts and their groups matter to the answer. Positions go
beyond YaRN's original length. llama.cpp adds in another order than torch, so numbers differ in their last digits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from dsv3.checkpoint import DeepseekV3, export_gguf, resolve
from dsv3.checkpoint.gguf import FILE_TYPES, Quant
from dsv3.config import PRESETS
from dsv3.gguf import read_header
from dsv3.text import Tokenizer
from tests.checkpoint import llama, released

pytestmark = pytest.mark.llama

V3 = released.V3 | {"vocab_size": llama.VOCAB}
YARN = V3["rope_scaling"]
SHAPES: dict[str, dict[str, Any]] = {
    "V3": V3,
    "no YaRN": V3 | {"rope_scaling": None},
    # What the next nano has, and another factor, with betas that llama.cpp is told on its command line.
    "YaRN of nano": V3 | {"rope_scaling": YARN | {"factor": 4, "original_max_position_embeddings": 512}},
    "YaRN with betas": V3
    | {"rope_scaling": YARN | {"factor": 10, "beta_fast": 8, "beta_slow": 2}, "qk_rope_head_dim": 16},
    "YaRN with mscale 0.707": V3 | {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "more groups": V3 | {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 5},
    "all groups": V3 | {"n_routed_experts": 16, "n_group": 4, "topk_group": 4, "n_shared_experts": 2},
    "Moonlight": released.MOONLIGHT | {"vocab_size": llama.VOCAB},
    "V2 Lite": released.V2_LITE | {"vocab_size": llama.VOCAB},
    "four heads": V3
    | {"num_attention_heads": 4, "num_key_value_heads": 4, "v_head_dim": 24, "kv_lora_rank": 64},
}
FLAGS = {"YaRN with betas": ["--yarn-beta-fast", "8", "--yarn-beta-slow", "2"]}


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Iterator[llama.Server]:
    llama.binary()
    path = tmp_path_factory.mktemp("llama") / "nano.gguf"
    export_gguf(resolve("nano"), path, "f32")
    with llama.serve(path) as server:
        yield server


def compare(server: llama.Server, model: DeepseekV3, prompt: list[int], new: int) -> float:
    """The largest difference of a log-probability over `new` tokens; the likeliest token must always be the same."""
    forbidden = llama.parts_of_characters() if model.config.vocab_size == llama.VOCAB else []
    ids, answer = server.next_tokens(prompt, new, forbidden)
    assert len(ids) == len(answer) == new
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == [max(place, key=place.__getitem__) for place in answer]
    return max(llama.worst(ours, theirs) for ours, theirs in zip(logits, answer, strict=True))


def prompts() -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(0)
    for length in (3, 300, 900):
        yield torch.randint(llama.VOCAB, (length,), generator=generator).tolist()


def exported(shape: str, folder: Path) -> tuple[Path, DeepseekV3]:
    config = SHAPES[shape]
    weights = llama.spread(released.tensors(config, dtype=torch.float32))
    source = llama.write(folder / "model", config | {"torch_dtype": "float32"}, weights)
    export_gguf(source, folder / "model.gguf", "f32")
    return folder / "model.gguf", DeepseekV3.from_pretrained(source, dtype=torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_log_probabilities_are_ours(shape: str, tmp_path: Path) -> None:
    llama.binary()
    path, model = exported(shape, tmp_path)
    with llama.serve(path, *FLAGS.get(shape, [])) as server:
        assert max(compare(server, model, prompt, 16) for prompt in prompts()) < 1e-4


def test_betas_must_be_told(tmp_path: Path) -> None:
    """The reason for the note: should llama.cpp come to read the keys, this fails, and the note can go."""
    llama.binary()
    path, model = exported("YaRN with betas", tmp_path)
    prompt = list(prompts())[-1]
    with llama.serve(path) as server:
        _, (place,) = server.next_tokens(prompt, 1, llama.parts_of_characters())
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    assert llama.worst(logits, place) > 1e-2


@pytest.mark.parametrize(
    "text", ["Once upon a time", "<｜User｜>Tell me a story about a fox.<｜Assistant｜>"]
)
def test_nano_says_the_same(nano: llama.Server, text: str) -> None:
    model = DeepseekV3.from_pretrained(resolve("nano"), dtype=torch.float32)
    prompt = Tokenizer.from_pretrained(resolve("nano")).encode(text, add_bos=True)
    assert compare(nano, model, prompt, 48) < 1e-3


@pytest.mark.parametrize("text", llama.TEXTS)
def test_nano_cuts_text_the_same(nano: llama.Server, text: str) -> None:
    tokenizer = Tokenizer.from_pretrained(resolve("nano"))
    assert nano.tokenize(text) == tokenizer.encode(text)


def test_nano_has_the_chat_format(nano: llama.Server) -> None:
    messages = [
        {"role": "system", "content": "You are a fox."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "How are you?"},
    ]
    tokenizer = Tokenizer.from_pretrained(resolve("nano"))
    prompt = nano.post("/apply-template", messages=messages)["prompt"]
    bos = tokenizer.special_tokens["bos_token"]
    assert prompt.removeprefix(bos) == tokenizer.render_chat(messages).removeprefix(bos)  # type: ignore[arg-type]


def test_the_module_drafts(tmp_path: Path) -> None:
    """Multi-token prediction in llama.cpp: the same tokens, of which the module guessed a good part."""
    path = tmp_path / "nano.gguf"
    export_gguf(resolve("nano"), path, "f32")
    prompt = Tokenizer.from_pretrained(resolve("nano")).encode("Once upon a time", add_bos=True)
    with llama.serve(path) as server:
        plain = server.post("/completion", prompt=prompt, n_predict=64, temperature=0.0, return_tokens=True)
    with llama.serve(path, "--spec-type", "draft-mtp", "--spec-draft-n-max", "1") as server:
        drafted = server.post("/completion", prompt=prompt, n_predict=64, temperature=0.0, return_tokens=True)
    assert drafted["tokens"] == plain["tokens"]
    timings = drafted["timings"]
    assert timings["draft_n_accepted"] > 0.4 * timings["draft_n"] > 0


# Smaller formats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quant", "mean"),
    [("f16", 0.005), ("bf16", 0.03), ("q8_0", 0.2), ("q4_0", 0.25), ("q5_1", 0.25), ("q4_k_m", 0.35)],
)
def test_nano_in_smaller_formats(quant: Quant, mean: float, tmp_path: Path) -> None:
    """llama.cpp against us, both with the same file: what differs is that it rounds what is multiplied by a matrix to
    the matrix's own format, or to eight bits. mean: of the worst log-probability in each place."""
    path = tmp_path / "nano.gguf"
    export_gguf(resolve("nano"), path, quant)
    model = DeepseekV3.from_pretrained(path, dtype=torch.float32)
    prompt = Tokenizer.from_pretrained(path).encode("Once upon a time", add_bos=True)
    with llama.serve(path) as server:
        ids, places = server.next_tokens(prompt, 48)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    found = [llama.worst(ours, theirs) for ours, theirs in zip(logits, places, strict=True)]
    assert sum(found) / len(found) < mean
    same = [int(ours.argmax()) == max(p, key=p.__getitem__) for ours, p in zip(logits, places, strict=True)]
    assert sum(same) >= 44


class _Params(ctypes.Structure):
    """`llama_model_quantize_params`, from llama.h."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        *(
            (name, ctypes.c_bool)
            for name in ("requantize", "output", "only_copy", "pure", "keep_split", "dry_run")
        ),
        *((name, ctypes.c_void_p) for name in ("imatrix", "kv_overrides", "tt_overrides", "prune_layers")),
        ("max_buf_size", ctypes.c_size_t),
    )


def quantised_by_llama(source: Path, out: Path, quant: Quant) -> None:
    library = ctypes.CDLL(str(Path(llama.binary()).with_name("libllama.so")))
    library.llama_model_quantize_default_params.restype = _Params
    params = library.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[quant], 1
    assert library.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)) == 0


@pytest.mark.parametrize("shape", ["wide", "tied", "narrow"])
def test_every_tensor_has_the_format_that_llama_cpp_gives_it(shape: str, tmp_path: Path) -> None:
    llama.binary()
    sizes = {"narrow": (160, 136, 32)}.get(shape, (256, 256, 256))
    hidden, moe, rank = sizes
    config = PRESETS["tiny"].replace(
        vocab_size=llama.VOCAB,
        num_hidden_layers=17,
        num_attention_heads=2,
        hidden_size=hidden,
        intermediate_size=2 * moe,
        moe_intermediate_size=moe,
        kv_lora_rank=rank,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        tie_word_embeddings=shape == "tied",
    )
    model = DeepseekV3(config)
    model.init_weights()
    model.save_pretrained(tmp_path / "model")
    llama.save_tokenizer(tmp_path / "model", llama.tokenizer())
    export_gguf(tmp_path / "model", tmp_path / "f32.gguf", "f32")
    for quant in ("q8_0", "q4_k_m") if shape == "tied" else get_args(Quant):
        export_gguf(tmp_path / "model", tmp_path / "ours.gguf", quant)
        quantised_by_llama(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", quant)
        ours, theirs = read_header(tmp_path / "ours.gguf"), read_header(tmp_path / "theirs.gguf")
        for name, entry in ours.tensors.items():
            assert entry.type == theirs.tensors[name].type, (quant, name)
        for key in ("general.file_type", "general.quantization_version"):
            assert ours.keys[key] == theirs.keys.get(key, 2), (quant, key)


@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m", "q2_k"])
def test_we_are_no_further_from_nano_than_llama_cpp(quant: Quant, tmp_path: Path) -> None:
    """Of the weights, all together."""
    export_gguf(resolve("nano"), tmp_path / "f32.gguf", "f32")
    export_gguf(resolve("nano"), tmp_path / "ours.gguf", quant)
    quantised_by_llama(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", quant)
    exact, ours, theirs = (
        DeepseekV3.from_pretrained(tmp_path / f"{name}.gguf", dtype=torch.float32).state_dict()
        for name in ("f32", "ours", "theirs")
    )
    errors = [sum(float((made[n] - exact[n]).square().sum()) for n in exact) for made in (ours, theirs)]
    assert errors[0] < 1.01 * errors[1]
