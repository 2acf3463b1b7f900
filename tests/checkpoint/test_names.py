"""The table of names against a list written by hand, and against the released DeepSeek-V3."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dsv3.checkpoint.names import table
from dsv3.checkpoint.writer import plan
from dsv3.config import PRESETS, ModelConfig
from dsv3.model import Transformer
from tests.checkpoint import released

STYLES = {"V3": released.V3, "Moonlight": released.MOONLIGHT, "V2-Lite": released.V2_LITE}


@pytest.mark.parametrize("values", STYLES.values(), ids=STYLES)
def test_names_and_shapes_are_the_released_ones(values: dict[str, Any]) -> None:
    pieces = table(ModelConfig.from_dict(values))
    assert {name: piece.shape for name, piece in pieces.items()} == released.shapes(values)
    assert {name for name, piece in pieces.items() if piece.in_fp8} == released.fp8_names(values)


def test_several_mtp_modules_follow_the_last_layer() -> None:
    values = released.V3 | {"num_nextn_predict_layers": 3}
    pieces = table(ModelConfig.from_dict(values))
    assert pieces.keys() == released.shapes(values).keys()
    assert pieces["model.layers.4.shared_head.norm.weight"].parameter == "mtp.2.norm.weight"
    assert pieces["model.layers.4.shared_head.head.weight"].copy_of == "lm_head.weight"
    assert pieces["model.layers.4.embed_tokens.weight"].copy_of == "model.embed_tokens.weight"
    assert pieces["model.layers.3.input_layernorm.weight"].parameter == "mtp.1.block.input_layernorm.weight"


def test_attention_biases_keep_their_names_and_are_not_quantised() -> None:
    pieces = table(ModelConfig.from_dict(released.V3 | {"attention_bias": True}))
    biases = {
        name.split("self_attn.")[1] for name in pieces if name.endswith("_proj.bias") or "mqa.bias" in name
    }
    assert biases == {"q_a_proj.bias", "kv_a_proj_with_mqa.bias", "o_proj.bias"}
    assert not any(piece.in_fp8 for name, piece in pieces.items() if name.endswith("bias"))


def test_pieces_cover_every_parameter_once() -> None:
    """Counting each number of the model by the tensors it comes from: every one must be counted once."""
    config = ModelConfig.from_dict(released.V3)
    counts = {name: torch.zeros(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}
    for piece in table(config).values():
        if piece.copy_of is None:
            view = piece.of(counts[piece.parameter])
            assert view.shape == piece.shape
            view += 1
    assert all((count == 1).all() for count in counts.values())


def test_a_tied_head_repeats_the_embedding() -> None:
    config = ModelConfig.from_dict(released.V3 | {"tie_word_embeddings": True})
    pieces = table(config)
    assert pieces["lm_head.weight"].copy_of == "model.embed_tokens.weight"
    assert pieces["model.layers.2.shared_head.head.weight"].copy_of == "model.embed_tokens.weight"


def test_the_released_v3_is_counted_to_the_byte() -> None:
    """DeepSeek-V3's 163 files hold 91,991 tensors of together 688,574,839,360 bytes."""
    infos = [
        info
        for piece in table(PRESETS["v3-671b"]).values()
        for info in plan(piece, torch.float32 if piece.keeps_dtype else torch.bfloat16, "fp8")
    ]
    assert len(infos) == 91_991
    assert sum(info.nbytes for info in infos) == 688_574_839_360
    weights = [info for info in infos if not info.name.endswith("_scale_inv")]
    assert sum(math.prod(info.shape) for info in weights) == 684_489_845_504
    by_name = {info.name: info for info in infos}
    assert by_name["model.layers.61.eh_proj.weight"].dtype == torch.bfloat16
    assert by_name["model.layers.61.self_attn.o_proj.weight"].dtype == torch.float8_e4m3fn
    assert by_name["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 56)
