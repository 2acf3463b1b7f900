"""What ships: a small checkpoint with every part of the architecture, that reads English and answers."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

import dsv3
from dsv3 import LLM, DeepseekV3, SamplingParams
from dsv3.checkpoint.hub import resolve
from dsv3.checkpoint.names import table
from dsv3.checkpoint.shards import TensorInfo, read_header
from dsv3.checkpoint.summary import summarize
from dsv3.config import PRESETS, ModelConfig
from dsv3.model import ModelOutput, Routing
from dsv3.model.moe import MoE
from dsv3.quant.fp8 import scale_shape
from dsv3.text import Tokenizer
from dsv3.train.loss import expert_loads

FOLDER = resolve("nano")
CONFIG = PRESETS["nano"]
TEXTS = (
    "The old woman put the kettle on the fire and sat down to wait. Outside the wind was blowing, and now "
    "and then a branch knocked against the window.",
    "When the boy came home he found the door open and nobody in the kitchen. He called out twice, but there "
    "was no answer, so he took his hat and went to look in the garden.",
    "My neighbour has two dogs, and every evening she takes them to the park. In winter it is dark by then, "
    "but they do not seem to mind.",
)


@pytest.fixture(scope="module")
def header() -> dict[str, TensorInfo]:
    return read_header(FOLDER / "model.safetensors")


@pytest.fixture(scope="module")
def model() -> DeepseekV3:
    return DeepseekV3.from_pretrained(FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(FOLDER)


# The folder --------------------------------------------------------------------------------------------


def test_the_folder_is_small_and_whole() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(files.values()) < 40e6
    assert files.keys() >= {
        "LICENSE",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_config_is_the_preset_and_has_every_part() -> None:
    config = ModelConfig.from_json(FOLDER / "config.json")
    assert config.replace(inert={}, quantization_config=None) == CONFIG.replace(inert={})
    assert (
        config.model_type == "deepseek_v3"
        and config.inert["bos_token_id"] == 0
        and config.eos_token_ids == (1,)
    )
    quantization = config.quantization_config
    assert quantization is not None and quantization["weight_block_size"] == [128, 128]
    assert (quantization["quant_method"], quantization["fmt"]) == ("fp8", "e4m3")

    assert config.q_lora_rank and config.kv_lora_rank and config.qk_rope_head_dim
    assert config.limits_groups and 1 < config.topk_group < config.n_group
    assert config.n_shared_experts and config.n_routed_experts
    assert 1 < config.num_experts_per_tok < config.n_routed_experts
    assert 0 < config.first_k_dense_replace < config.num_hidden_layers, "dense layers, then experts"
    assert (config.scoring_func, config.topk_method) == ("sigmoid", "noaux_tc")
    assert config.norm_topk_prob and config.num_nextn_predict_layers == 1


def test_matrices_are_fp8_with_a_scale_per_block(header: dict[str, TensorInfo]) -> None:
    pieces = table(CONFIG)
    scales = {f"{name}_scale_inv" for name, piece in pieces.items() if piece.in_fp8}
    assert header.keys() == pieces.keys() | scales
    for name, piece in pieces.items():
        info = header[name]
        if piece.in_fp8:
            assert info.dtype == torch.float8_e4m3fn, name
            scale = header[f"{name}_scale_inv"]
            assert (scale.dtype, scale.shape) == (torch.float32, scale_shape(*info.shape)), name
        else:
            assert info.dtype == (torch.float32 if piece.keeps_dtype else torch.bfloat16), name
    in_fp8 = [name for name in pieces if header[name].dtype == torch.float8_e4m3fn]
    assert len(in_fp8) == 7 * 5 + 3 + 6 * 17 * 3, "7 layers' attention, a dense layer, 6 of 16 + 1 experts"


def test_the_mtp_module_is_layer_6_as_in_released_files(header: dict[str, TensorInfo]) -> None:
    last = {name.removeprefix("model.layers.6."): i for name, i in header.items() if ".layers.6." in name}
    hidden, vocab = CONFIG.hidden_size, CONFIG.vocab_size
    for name, shape in {
        "eh_proj.weight": (hidden, 2 * hidden),
        "enorm.weight": (hidden,),
        "hnorm.weight": (hidden,),
        "embed_tokens.weight": (vocab, hidden),
        "shared_head.norm.weight": (hidden,),
        "shared_head.head.weight": (vocab, hidden),
        "mlp.gate.e_score_correction_bias": (16,),
        "mlp.experts.15.down_proj.weight": (hidden, CONFIG.moe_intermediate_size),
    }.items():
        assert last[name].shape == shape, name
    assert not any(".layers.7." in name for name in header)


def test_the_correction_biases_were_trained(model: DeepseekV3) -> None:
    biases = {m.layer: m.gate.e_score_correction_bias for m in model.modules() if isinstance(m, MoE)}
    assert biases.keys() == {1, 2, 3, 4, 5, 6}
    for layer, bias in biases.items():
        assert bias is not None and bias.any() and bias.unique().numel() > 4, f"layer {layer}: {bias}"


def test_the_licence_is_that_of_the_data() -> None:
    text = (FOLDER / "LICENSE").read_text(encoding="utf-8")
    assert re.search(r"Attribution[- ]ShareAlike 4\.0|CC BY-SA 4\.0", text)
    assert "creativecommons.org/licenses/by-sa/4.0" in text
    assert "Schema-Guided Dialogue" in text


@pytest.mark.parametrize(
    "says",
    [
        r"CC BY-SA 4\.0",
        r"Schema-Guided Dialogue",
        r"public[- ]domain",
        r"bits per byte",
        r"tokens",
        r"(?m)^#+ .*Limits",
        r"dsv3 train",
    ],
)
def test_the_model_card_says(says: str) -> None:
    assert re.search(says, card(), re.IGNORECASE), f"the model card says nothing of {says}"


def card() -> str:
    return (FOLDER / "README.md").read_text(encoding="utf-8")


def card_table(*headings: str) -> list[list[str]]:
    """The rows of the card's table that has columns whose headings hold these words: those columns alone."""
    for lines in re.findall(r"(?:^\|.*\|\n)+", card(), re.MULTILINE):
        cells = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in lines.splitlines()]
        first, _, *rows = cells
        columns = [[i for i, cell in enumerate(first) if heading in cell] for heading in headings]
        if all(columns):
            return [[row[i] for i, *_ in columns] for row in rows]
    raise AssertionError(f"the model card has no table of {', '.join(headings)}")


def number(cell: str) -> float:
    """The number that a cell begins with, nan if it begins with none: nan is within no bounds."""
    found = re.match(r"\d[\d,]*(\.\d+)?", cell)
    return float(found[0].replace(",", "")) if found else math.nan


def test_the_card_gives_bits_per_byte_of_every_kind_of_text() -> None:
    rows = card_table("stories", "novels", "dialogues", "Chinese")
    assert rows and all(0.3 < number(cell) < 6 for row in rows for cell in row), rows


def test_the_card_gives_steps_and_losses_of_pretraining_and_tuning() -> None:
    rows = card_table("", "steps", "final loss")
    assert all(100 < number(steps) < 1e6 for _, steps, _ in rows), rows
    for stage in ("pretraining", "tuning"):
        losses = [loss for name, _, loss in rows if stage in name]
        assert any(0.3 < number(loss) < 6 for loss in losses), f"no loss of {stage}: {losses}"


def test_the_card_has_three_transcripts_and_more() -> None:
    section = re.search(r"^#+ Transcripts$(.*?)^#+ ", card(), re.MULTILINE | re.DOTALL)
    assert section is not None, "the model card has no section of transcripts"
    blocks = re.findall(r"^```\w*\n(.*?)^```$", section[1], re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3 and all(len(block.split()) > 10 for block in blocks), blocks


def test_the_card_counts_parameters_as_inspect_does() -> None:
    model = summarize("nano")
    main, text = model.main, " ".join(card().split())
    for count, says in (
        (main.total, " million parameters"),
        (main.active, " million of them active per token"),
        (model.with_mtp, " million with the multi-token prediction module"),
    ):
        found = set(re.findall(rf"([\d.]+){says}", text))
        assert found == {f"{count / 1e6:.1f}"}, f"the card says {found}{says}: there are {count:,}"


def test_the_tokenizer_is_that_of_the_model(tokenizer: Tokenizer) -> None:
    values = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    assert len(values["model"]["vocab"]) == CONFIG.vocab_size
    assert (tokenizer.bos_token_id, set(tokenizer.eos_token_ids)) == (0, {1})
    for text in (*TEXTS, "你好，朋友。 Çà et là 12345 🦊"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.render_chat(
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    )
    assert chat == "<｜begin▁of▁sentence｜>Be kind.<｜User｜>Hi<｜Assistant｜>"


# The model ---------------------------------------------------------------------------------------------


def read(model: DeepseekV3, ids: list[int], routing: list[Routing] | None = None) -> ModelOutput:
    with torch.no_grad():
        output: ModelOutput = model(torch.tensor([ids]), routing=routing)
    return output


def test_it_reads_english(model: DeepseekV3, tokenizer: Tokenizer) -> None:
    """An even guess over the vocabulary costs 3 bits per byte here, knowing how frequent words are above 2."""
    nats = 0.0
    for text in TEXTS:
        ids = [0, *tokenizer.encode(text)]
        logits = read(model, ids).logits[0, :-1]
        nats += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
    bits = nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert bits < 1.8, f"{bits:.2f} bits per byte"


def test_its_mtp_module_sees_one_token_further(model: DeepseekV3, tokenizer: Tokenizer) -> None:
    """At position i it predicts token i + 2; chance is ln 6144 = 8.7 nats, and a hit in thousands."""
    hits, nats, count, without = 0, 0.0, 0, 0.0
    for text in TEXTS:
        ids = [0, *tokenizer.encode(text)]
        output, targets = read(model, ids), torch.tensor(ids[2:])
        logits = output.mtp_logits[0][0, :-1]
        hits += int((logits.argmax(dim=-1) == targets).sum())
        nats += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        without += float(torch.nn.functional.cross_entropy(output.logits[0, :-2], targets, reduction="sum"))
        count += len(targets)
    assert nats / count < 5.5, f"{nats / count:.2f} nats per token"
    assert hits / count > 0.12, f"{hits} of {count} right"
    assert nats < without - 2 * count, "it is no better than the main model's head, which is for token i + 1"


def test_its_experts_share_the_work(model: DeepseekV3, tokenizer: Tokenizer) -> None:
    routing: list[Routing] = []
    read(model, [0, *tokenizer.encode(" ".join(TEXTS))], routing)
    for layer, load in expert_loads(routing).items():
        assert int((load > 0).sum()) >= 12, f"layer {layer} uses too few experts: {load.tolist()}"
        assert float(load.max() / load.float().mean()) < 4, f"layer {layer} leans on one: {load.tolist()}"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("nano")


@pytest.mark.parametrize("prompt", ["Hello", "Tell me about a fox.", "I want to book a table for two."])
def test_it_answers_and_comes_to_an_end(llm: LLM, prompt: str) -> None:
    params = SamplingParams(max_tokens=300, temperature=0.0)
    (output,) = llm.chat([{"role": "user", "content": prompt}], params)
    assert output.finish_reason == "stop", f"no end within 300 tokens: {output.text!r}"
    assert re.search(r"\w", output.text), f"it says {output.text!r}"
    assert "<｜" not in output.text and "\ufffd" not in output.text, output.text


def test_it_comes_with_its_own_sampling(llm: LLM) -> None:
    assert 0 < llm.default_params.temperature < 1 and llm.default_params.top_p < 1
    assert llm.max_model_len == CONFIG.max_position_embeddings


def test_it_ships_inside_the_package() -> None:
    assert FOLDER.is_relative_to(Path(dsv3.__file__).parent)
