"""The model equals the report's equations, and its multi-token prediction equations 21-23."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers.modeling_layers
from torch import Tensor, nn

from dsv3.config import PRESETS, ModelConfig, YarnConfig
from dsv3.model import Transformer
from tests.model import equations
from tests.model.reference import (
    assert_close,
    in_transformers,
    random_ids,
    random_model,
    transformers_weights,
)

YARN = YarnConfig(factor=8.0, original_max_position_embeddings=8, mscale=1.0, mscale_all_dim=0.7)
CONFIGS = {
    "tiny": PRESETS["tiny"],
    "yarn": PRESETS["tiny"].replace(qk_rope_head_dim=12, v_head_dim=6, rope_scaling=YARN),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("depth", [1, 2])
def test_main_and_mtp_logits_equal_the_equations(name: str, depth: int) -> None:
    config = CONFIGS[name].replace(num_nextn_predict_layers=depth, num_hidden_layers=2)
    model = random_model(config, seed=depth)
    ids = random_ids(config, batch=1, length=14)
    main, modules = equations.logits(model, ids[0].tolist())
    out = model(ids)
    assert_close(out.logits[0], torch.stack(main))
    assert len(out.mtp_logits) == len(modules) == depth
    for k, (ours, by_hand) in enumerate(zip(out.mtp_logits, modules, strict=True), start=1):
        assert ours.shape == (1, 14 - k, config.vocab_size)
        assert_close(ours[0], torch.stack(by_hand), what=f"module {k}")


def mtp_in_transformers(model: Transformer) -> nn.Module:
    """transformers' own MTP model (5.23 and later), with our weights."""
    mtp_model = getattr(transformers.modeling_layers, "MtpModel", None)
    if mtp_model is None:
        pytest.skip("this transformers has no MTP")
    theirs = mtp_model(in_transformers(model), len(model.mtp)).eval()
    theirs.set_experts_implementation("eager")
    for ours, layer in zip(model.mtp, theirs.layers, strict=True):
        layer.enorm.load_state_dict(ours.enorm.state_dict())
        layer.hnorm.load_state_dict(ours.hnorm.state_dict())
        layer.eh_proj.load_state_dict(ours.eh_proj.state_dict())
        layer.post_norm.load_state_dict(ours.norm.state_dict())
        shell = copy.deepcopy(model)  # a model whose first layer is the module's block, for its names
        shell.layers[0] = ours.block
        block = {
            name.removeprefix("model.layers.0."): tensor
            for name, tensor in transformers_weights(shell).items()
            if name.startswith("model.layers.0.")
        }
        layer.mtp_block.load_state_dict(block)
    return theirs


@pytest.mark.parametrize("depth", [1, 2])
def test_mtp_equals_transformers(depth: int) -> None:
    """It reads [embedding; hidden], `hidden` after the norm, as we do; positions are those of the tokens ahead."""
    model = random_model(CONFIGS["yarn"].replace(num_nextn_predict_layers=depth))
    ids = random_ids(model.config, batch=2, length=12)
    theirs = mtp_in_transformers(model)
    out = model(ids)
    hidden = out.hidden_states
    for k in range(1, depth + 1):
        positions = torch.arange(k, 12)[None].expand(2, -1)
        hidden = theirs.forward_layer(k - 1, hidden[:, :-1], positions, None, input_ids=ids[:, k:])
        assert_close(out.mtp_logits[k - 1], theirs._project_to_logits(hidden), what=f"module {k}")


def test_mtp_sees_no_token_that_it_predicts() -> None:
    config = PRESETS["tiny"].replace(num_nextn_predict_layers=2)
    model = random_model(config)
    ids = random_ids(config, batch=1, length=10)
    changed = ids.clone()
    changed[0, 7] = (changed[0, 7] + 1) % config.vocab_size
    before, after = model(ids), model(changed)
    for k in (1, 2):  # position i has read tokens up to i + k
        same = [
            bool((a == b).all())
            for a, b in zip(before.mtp_logits[k - 1][0], after.mtp_logits[k - 1][0], strict=True)
        ]
        assert same == [i + k < 7 for i in range(10 - k)]


def test_mtp_of_a_sequence_too_short_for_it() -> None:
    model = random_model(PRESETS["tiny"].replace(num_nextn_predict_layers=2))
    for length, modules in [(1, 0), (2, 1), (3, 2)]:
        assert len(model(random_ids(model.config, 1, length)).mtp_logits) == modules


def test_features_without_mtp() -> None:
    model = random_model(PRESETS["tiny"])
    ids = random_ids(model.config, 2, 6)
    hidden, mtp = model.features(ids, mtp=False)
    assert mtp == []
    assert torch.equal(hidden, model(ids).hidden_states)


def packed(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Positions and mask of documents laid end to end that must not see each other."""
    positions = torch.cat([torch.arange(n) for n in lengths])
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (document[:, None] == document) & torch.ones(sum(lengths), sum(lengths)).tril().bool()
    return positions, mask[None, None]


def test_packed_documents_equal_documents_alone() -> None:
    config: ModelConfig = CONFIGS["yarn"]
    model = random_model(config)
    lengths = [5, 9, 3]
    ids = random_ids(config, 1, sum(lengths))
    out = model(ids, *packed(lengths))
    start = 0
    for n in lengths:
        alone = model(ids[:, start : start + n])
        assert_close(out.logits[:, start : start + n], alone.logits)
        # The last of a document's MTP positions reads the next document's first token: training masks it.
        assert_close(out.mtp_logits[0][:, start : start + n - 1], alone.mtp_logits[0])
        start += n


def test_positions_may_differ_by_row() -> None:
    """Only distances count, so rows shifted by any offset keep their logits."""
    model = random_model(CONFIGS["yarn"])
    ids = random_ids(model.config, 2, 8)
    shifted = torch.arange(8) + torch.tensor([[0], [1000]])
    assert_close(model(ids, shifted).logits, model(ids).logits)
    assert_close(model(ids, shifted).mtp_logits[0], model(ids).mtp_logits[0])
