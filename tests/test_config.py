"""Every key of a config.json is honoured, inert and seen to be so, or refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from transformers import DeepseekV2Config, DeepseekV3Config

from dsv3.config import _FIXED, _INERT, _REPEATED, PRESETS, ModelConfig, YarnConfig
from dsv3.errors import ConfigError
from dsv3.model import Transformer
from dsv3.model.rope import inverse_frequencies
from tests.model.reference import in_transformers, random_ids, random_model
from tests.model.strategies import v2_configs, v3_configs

TINY = PRESETS["tiny"].to_dict()
YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
THEIRS = {"v3": DeepseekV3Config, "v2": DeepseekV2Config}
FIELDS = {field.name for field in dataclasses.fields(ModelConfig)} - {"inert"}


def read(**changes: Any) -> ModelConfig:
    """The smallest config with some keys changed."""
    return ModelConfig.from_dict(TINY | changes)


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(**changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# transformers' own keys --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", THEIRS)
def test_every_key_that_transformers_writes_is_known(family: str) -> None:
    values = THEIRS[family]().to_dict()
    assert len(values) > 40
    kinds = [FIELDS, _INERT, _FIXED.keys(), _REPEATED.keys() - FIELDS, {"rope_parameters"}]
    for key in values:
        assert sum(key in kind for kind in kinds) == 1, f"{key} is of no kind, or of several"


@pytest.mark.parametrize("family", THEIRS)
def test_every_switch_that_transformers_declares_is_known(family: str) -> None:
    """Its declared fields, whether or not it writes them; aliases of ours must be refused or understood."""
    declared = {field.name for field in dataclasses.fields(THEIRS[family])}
    own = declared - {field.name for field in dataclasses.fields(THEIRS[family].__mro__[1])}
    assert {"kv_lora_rank", "attention_dropout"} <= own
    for key in own - FIELDS - _INERT - _FIXED.keys() - _REPEATED.keys() - {"rope_parameters"}:
        assert key == "num_mtp_layers", f"transformers has {key}"


@pytest.mark.parametrize("family", THEIRS)
def test_what_transformers_saves_is_read(family: str, tmp_path: Path) -> None:
    """`save_pretrained` leaves out what equals its base class's defaults, and adds sizes that follow."""
    sizes = {"num_experts_per_tok": 6, "qk_rope_head_dim": 32, "kv_lora_rank": 96, "num_hidden_layers": 4}
    rope = {"rope_theta": 5e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    theirs = THEIRS[family](**sizes, rope_parameters=rope, rms_norm_eps=1e-5, eos_token_id=[1, 7])
    theirs.save_pretrained(tmp_path)
    config = ModelConfig.from_json(tmp_path / "config.json")
    written = theirs.to_dict()
    for name in FIELDS & written.keys():
        expected = {"n_group": 1, "topk_group": 1}.get(name) if written[name] is None else written[name]
        ours = getattr(config, name)
        assert (list(ours) if isinstance(ours, tuple) else ours) == expected, name
    assert config.rope_theta == 5e4
    assert config.rope_scaling == YarnConfig(factor=4.0, original_max_position_embeddings=512)
    assert config.model_type == theirs.model_type
    again = THEIRS[family](**{k: v for k, v in config.to_dict().items() if k != "model_type"}).to_dict()
    for name in written.keys() - {"rope_parameters", "transformers_version", "architectures"}:
        if written[name] is not None:
            assert again[name] == written[name], name
    assert rope.items() <= again["rope_parameters"].items()


@pytest.mark.parametrize("family", THEIRS)
def test_keys_left_out_have_transformers_defaults(family: str) -> None:
    """For all that changes numbers. V2's are its own, not V3's; a missing MTP module is none."""
    theirs = THEIRS[family](num_experts_per_tok=8)
    config = ModelConfig.from_dict({"model_type": theirs.model_type})
    switches = [
        *("attention_bias", "first_k_dense_replace", "norm_topk_prob", "routed_scaling_factor"),
        *("rms_norm_eps", "tie_word_embeddings", "num_experts_per_tok"),
    ]
    assert [getattr(config, name) for name in switches] == [getattr(theirs, name) for name in switches]
    assert (config.rope_theta, config.rope_scaling, config.rope_interleave) == (10000.0, None, True)
    assert config.num_nextn_predict_layers == 0
    v3 = family == "v3"
    assert (config.n_group, config.topk_group) == ((8, 4) if v3 else (1, 1))
    expected = ("sigmoid", "noaux_tc") if v3 else ("softmax", theirs.topk_method)
    assert (config.scoring_func, config.topk_method) == expected


# Inert keys --------------------------------------------------------------------------------------------

OTHER_VALUES: dict[str, Any] = {
    "_name_or_path": "elsewhere",
    "architectures": ["DeepseekV3Model"],
    "bos_token_id": 5,
    "chunk_size_feed_forward": 3,
    "decoder_start_token_id": 3,
    "ep_size": 4,
    "finetuning_task": "poetry",
    "is_decoder": True,
    "is_encoder_decoder": True,
    "max_length": 3,
    "min_length": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_router_logits": True,
    "pad_token_id": 7,
    "prefix": "x",
    "problem_type": "regression",
    "router_aux_loss_coef": 0.5,
    "sep_token_id": 2,
    "task_specific_params": {"a": 1},
    "tf_legacy_loss": True,
    "tokenizer_class": "LlamaTokenizer",
    "use_bfloat16": True,
    "use_cache": False,
}


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2"])
def test_inert_keys_change_nothing_in_transformers_either(family: str) -> None:
    """All of them changed at once: the logits stay, bit by bit; and ours do, and the keys are carried along."""
    assert OTHER_VALUES.keys() < _INERT
    values = TINY | {"model_type": family, "num_nextn_predict_layers": 0, "pad_token_id": None}
    if family == "deepseek_v2":
        values |= {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
    changed = values | OTHER_VALUES
    model = random_model(ModelConfig.from_dict(values))
    other = Transformer(ModelConfig.from_dict(changed)).eval().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    ids = random_ids(model.config, 2, 9)
    ids[0, 3:5] = 7  # the padding token, where it is one
    expected = in_transformers(model, values)(ids).logits
    assert torch.equal(in_transformers(model, changed)(ids).logits, expected)
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert OTHER_VALUES.items() <= other.config.to_dict().items()


def test_no_field_is_listed_as_inert_or_fixed() -> None:
    assert not FIELDS & (_INERT | _FIXED.keys())
    assert not _INERT & (_FIXED.keys() | _REPEATED.keys())


# Refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("hidden_act", None),
        ("attention_dropout", 0.1),
        ("mlp_bias", True),
        ("pretraining_tp", 2),
        ("seq_aux", False),
        ("add_cross_attention", True),
        ("tie_encoder_decoder", True),
        ("cross_attention_hidden_size", 8),
        ("pruned_heads", {"0": [1]}),
        ("num_key_value_heads", 1),
        ("head_dim", 16),
        ("qk_head_dim", 24),
        ("model_type", "llama"),
        ("model_type", "deepseek_v32"),
        ("model_type", None),
        ("scoring_func", "sqrtsoftplus"),
        ("topk_method", "noaux"),
    ],
)
def test_switches_that_we_do_not_have_are_refused_by_name(key: str, value: Any) -> None:
    message = refusal(**{key: value})
    assert message.startswith(f"{key} is {value!r}"), message


@pytest.mark.parametrize("key", _FIXED)
def test_fixed_switches_are_accepted_as_we_compute_them(key: str) -> None:
    for value in _FIXED[key]:
        assert read(**{key: value}).to_dict()[key] == value


@pytest.mark.parametrize(
    "key",
    ["sliding_window", "index_topk", "attn_logit_softcapping", "partial_rotary_factor", "inert", "qk_norm"],
)
def test_unknown_keys_are_refused_with_their_value(key: str) -> None:
    message = refusal(**{key: 4096})
    assert repr(key) in message and "4096" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((n, "7") for n in sorted(FIELDS - {"model_type", "rope_scaling", "scoring_func", "topk_method"})),
        *((name, 7) for name in ("scoring_func", "topk_method", "quantization_config")),
        *((name, True) for name in ("hidden_size", "q_lora_rank", "rope_theta", "rms_norm_eps")),
        *((name, True) for name in ("routed_scaling_factor", "eos_token_id", "aux_loss_alpha")),
        *((name, 1) for name in ("norm_topk_prob", "attention_bias", "rope_interleave")),
        *((name, 2.0) for name in ("num_hidden_layers", "num_experts_per_tok", "n_routed_experts")),
        *((name, None) for name in ("num_experts_per_tok", "norm_topk_prob", "v_head_dim", "rms_norm_eps")),
        ("eos_token_id", ["</s>"]),
        ("eos_token_id", [1, True]),
    ],
)
def test_wrong_types_are_refused(key: str, value: Any) -> None:
    message = refusal(**{key: value})
    assert message.startswith(f"{key} is ") and "must be" in message, message
    assert str(value).strip("[]") in message, message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((name, 0) for name in ("vocab_size", "hidden_size", "kv_lora_rank", "q_lora_rank", "v_head_dim")),
        *((name, 0) for name in ("moe_layer_freq", "moe_intermediate_size", "num_experts_per_tok")),
        *((name, 0) for name in ("n_routed_experts", "topk_group", "max_position_embeddings")),
        *((name, -1) for name in ("num_nextn_predict_layers", "n_shared_experts", "initializer_range")),
        *((name, -1) for name in ("first_k_dense_replace", "aux_loss_alpha")),
        *((name, 10**10) for name in ("hidden_size", "eos_token_id", "rope_theta")),
        ("rms_norm_eps", 0.0),
        ("rms_norm_eps", float("nan")),
        ("routed_scaling_factor", float("inf")),
        ("rope_theta", 0),
        ("rope_theta", 1),
        ("qk_rope_head_dim", 7),
        ("n_routed_experts", 10),  # not into 4 groups
        ("topk_group", 5),
        ("num_experts_per_tok", 5),  # two groups of two
    ],
)
def test_impossible_sizes_are_refused(key: str, value: Any) -> None:
    message = refusal(**{key: value})
    assert message.startswith(f"{key} is "), message


def test_groups_of_one_expert_have_no_best_two() -> None:
    assert refusal(n_group=8, topk_group=4).startswith("n_group is 8")
    read(n_group=8, topk_group=4, topk_method="group_limited_greedy")  # ranked by their best one


def test_dense_models_need_no_sensible_experts() -> None:
    config = read(n_routed_experts=None, n_group=3, topk_group=9)
    assert not any(config.is_moe_layer(layer) for layer in range(10))


def test_replace_checks_again() -> None:
    with pytest.raises(ConfigError, match="topk_group is 9"):
        PRESETS["tiny"].replace(topk_group=9)
    with pytest.raises(ConfigError, match="model_type is 'llama': dsv3 loads deepseek_v3, deepseek_v2"):
        PRESETS["tiny"].replace(model_type="llama")


def test_the_family_is_not_among_what_changes_nothing() -> None:
    """DeepSeek-V2's gate normalises or scales, never both: a config without its inert keys is the same model."""
    values = TINY | {"model_type": "deepseek_v2", "num_nextn_predict_layers": 0}
    model = random_model(ModelConfig.from_dict(values))
    assert model.config.norm_topk_prob and model.config.routed_scaling_factor != 1
    bare = Transformer(model.config.replace(inert={})).eval().requires_grad_(False)
    bare.load_state_dict(model.state_dict())
    ids = random_ids(model.config, 2, 9)
    assert torch.equal(bare(ids).logits, model(ids).logits)
    assert bare.config.to_dict()["model_type"] == "deepseek_v2"
    v3 = Transformer(model.config.replace(model_type="deepseek_v3")).eval().requires_grad_(False)
    v3.load_state_dict(model.state_dict())
    assert not torch.allclose(v3(ids).logits, model(ids).logits, atol=1e-2)


# Quirks of released files ------------------------------------------------------------------------------


@pytest.mark.parametrize("nulls", [{"n_group": None, "topk_group": None}, {"n_group": 1, "topk_group": None}])
def test_null_groups_are_no_groups(nulls: dict[str, Any]) -> None:
    config = read(**nulls)
    assert (config.n_group, config.topk_group, config.limits_groups) == (1, 1, False)


def test_whole_numbers_stand_for_floats() -> None:
    config = read(rope_theta=10000, routed_scaling_factor=2, rms_norm_eps=1, rope_scaling=YARN)
    assert config == read(
        rope_theta=10000.0, routed_scaling_factor=2.0, rms_norm_eps=1.0, rope_scaling=YARN | {"factor": 40.0}
    )
    assert isinstance(config.rope_theta, float) and isinstance(config.routed_scaling_factor, float)


def test_mtp_modules_are_those_that_the_file_names() -> None:
    values = dict(TINY)
    assert ModelConfig.from_dict(values).num_nextn_predict_layers == 1
    del values["num_nextn_predict_layers"]
    assert ModelConfig.from_dict(values).num_nextn_predict_layers == 0
    assert ModelConfig.from_dict(values | {"num_mtp_layers": 2}).num_nextn_predict_layers == 2
    assert read(num_mtp_layers=2).num_nextn_predict_layers == 1  # as in transformers


def test_sizes_that_repeat_others_follow_them() -> None:
    config = read(num_key_value_heads=None, head_dim=8, qk_head_dim=16)
    assert config.to_dict()["num_key_value_heads"] == 2
    written = config.replace(num_attention_heads=3, qk_rope_head_dim=4).to_dict()
    assert [written[name] for name in _REPEATED] == [3, 4, 12]
    assert ModelConfig.from_dict(written).qk_head_dim == 12
    assert "head_dim" not in TINY  # and are not added to files that lack them


def test_end_tokens_may_be_several_or_none() -> None:
    assert read(eos_token_id=3).eos_token_ids == (3,)
    assert read(eos_token_id=[3, 5]).eos_token_ids == (3, 5)
    assert read(eos_token_id=None).eos_token_ids == ()
    assert read(eos_token_id=[3, 5]).to_dict()["eos_token_id"] == [3, 5]


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_yarn_under_either_name(key: str) -> None:
    rope = YARN if key == "rope_scaling" else {k: v for k, v in YARN.items() if k != "type"}
    config = read(**{key: rope | {"rope_type": "yarn", "rope_theta": 5e4, "partial_rotary_factor": 1.0}})
    assert config.rope_theta == 5e4
    assert config.rope_scaling == YarnConfig(
        factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
    )


@pytest.mark.parametrize(
    ("rope", "theta", "yarn"),
    [
        ({}, 10000.0, False),
        ({"rope_parameters": None}, 10000.0, False),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 7}, 7.0, False),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 9}, "rope_theta": 7}, 9.0, False),
        ({"rope_scaling": {"rope_type": "default", "type": "default"}, "rope_theta": 7}, 7.0, False),
        ({"rope_scaling": {}, "rope_theta": 7}, 7.0, False),
        ({"rope_scaling": YARN | {"rope_theta": 9}, "rope_theta": 7}, 9.0, True),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 9}}, 10000.0, True),
        ({"rope_scaling": {}, "rope_parameters": YARN | {"rope_theta": 9}}, 9.0, True),
    ],
)
def test_rotary_keys_have_transformers_precedence(rope: dict[str, Any], theta: float, yarn: bool) -> None:
    values = {k: v for k, v in TINY.items() if k not in ("rope_theta", "rope_scaling")} | rope
    config = ModelConfig.from_dict(values)
    assert (config.rope_theta, config.rope_scaling is not None) == (theta, yarn)
    theirs = DeepseekV3Config(**{k: dict(v) if isinstance(v, dict) else v for k, v in rope.items()})
    assert theirs.rope_parameters["rope_theta"] == theta
    assert (theirs.rope_parameters["rope_type"] == "yarn") == yarn


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        ([1], "rope_scaling is [1]"),
        ({"type": "linear", "factor": 2.0}, "type is 'linear'"),
        ({"rope_type": "longrope"}, "type is 'longrope'"),
        ({"type": "default", "factor": 4.0, "nonsense": 1}, "key 'factor' with type 'default'"),
        ({"rope_type": "default", "rope_theta": 5e4, "nonsense": 1}, "key 'nonsense' with type 'default'"),
        ({"factor": 4.0}, "key 'factor' with type 'default'"),
        ({"type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (YARN | {"truncate": False}, "rope_scaling.truncate is false"),
        (YARN | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (YARN | {"short_factor": [1.0]}, "'short_factor'"),
        (YARN | {"factor": None}, "'factor'"),
        ({"type": "yarn", "factor": 2.0}, "'original_max_position_embeddings'"),
        (YARN | {"factor": "40"}, "rope_scaling.factor is '40'"),
        (YARN | {"mscale": True}, "rope_scaling.mscale is True"),
        (YARN | {"factor": 0.5}, "rope_scaling.factor is 0.5"),
        (
            YARN | {"original_max_position_embeddings": 0},
            "rope_scaling.original_max_position_embeddings is 0",
        ),
        (YARN | {"beta_fast": 0}, "rope_scaling.beta_fast is 0"),
        (YARN | {"beta_slow": -1}, "rope_scaling.beta_slow is -1"),
        (YARN | {"rope_theta": "1e4"}, "rope_theta is '1e4'"),
        (YARN | {"rope_theta": True}, "rope_theta is True"),
    ],
)
def test_rotary_switches_that_we_do_not_have_are_refused(rope: Any, says: str) -> None:
    assert says in refusal(rope_scaling=rope)


def test_what_yarn_accepts_can_be_computed() -> None:
    """The extremes of what passes the checks give finite, positive frequencies."""
    for extreme in [
        {"factor": 1},
        {"beta_fast": 1e-9, "beta_slow": 1e9},
        {"original_max_position_embeddings": 1},
        {"original_max_position_embeddings": 10**9, "beta_fast": 1, "beta_slow": 1},
    ]:
        frequencies = inverse_frequencies(read(rope_theta=1.01, rope_scaling=YARN | extreme))
        assert frequencies.isfinite().all() and (frequencies > 0).all()


# In and out --------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(v3_configs() | v2_configs())
def test_there_and_back_is_the_same(config: ModelConfig) -> None:
    values = json.loads(json.dumps(config.to_dict()))
    again = ModelConfig.from_dict(values)
    assert again.replace(inert={}) == config.replace(inert={})
    assert again.to_dict() == config.to_dict()
    assert ModelConfig.from_dict(again.to_dict()) == again


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_there_and_back(preset: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRESETS[preset].to_dict()))
    again = ModelConfig.from_json(tmp_path / "config.json")
    assert again.replace(inert={}) == PRESETS[preset].replace(inert={})
    assert again.inert.get("bos_token_id") == PRESETS[preset].inert.get("bos_token_id")


def test_from_dict_leaves_its_argument_alone() -> None:
    values = TINY | {"n_group": None, "topk_group": None, "rope_parameters": dict(YARN), "eos_token_id": [1]}
    before = json.dumps(values)
    ModelConfig.from_dict(values)
    assert json.dumps(values) == before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "does not exist"),
        ("{", "not valid JSON"),
        ("[1]", "holds a list"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_files_that_are_no_config(text: str | bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=says) as caught:
        ModelConfig.from_json(path)
    assert str(path) in str(caught.value)


def test_layers_with_experts() -> None:
    config = read(num_hidden_layers=6, first_k_dense_replace=2, moe_layer_freq=2)
    assert [config.is_moe_layer(layer) for layer in range(6)] == [False, False, True, False, True, False]


def test_softmax_scale_of_the_released_model() -> None:
    """1/sqrt(192) times YaRN's temperature (0.1 ln 40 + 1)^2, and no scale on the rotary vectors."""
    config = PRESETS["v3-671b"]
    assert config.softmax_scale == pytest.approx(192**-0.5 * 1.3688879454113936**2)
    assert config.rope_scaling is not None and config.rope_scaling.rotary_scale == 1.0
    assert config.latent_dim == 576


# Hostile files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        *(({name: 10**30}, f"{name} is 1000") for name in ("vocab_size", "q_lora_rank", "num_hidden_layers")),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),  # too large for a float
        ({"rope_theta": float("nan")}, "rope_theta is nan: it must be finite"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf: it must be finite"),
        ({"routed_scaling_factor": -1.0}, "routed_scaling_factor is -1.0"),
        ({"eos_token_id": [1, 2**31]}, "eos_token_id is 2147483648: it must be below"),
        *(
            ({"rope_scaling": YARN | {name: float("nan")}}, f"rope_scaling.{name} is nan: it must be finite")
            for name in ("factor", "beta_fast", "mscale", "attention_factor")
        ),
        ({"rope_scaling": YARN | {"factor": 10**400}}, "it must be below 2,147,483,648"),
        ({"rope_scaling": YARN | {"mscale_all_dim": -2.7}}, "rope_scaling.mscale_all_dim is -2.7"),
        ({"rope_scaling": YARN | {"attention_factor": 0}}, "rope_scaling.attention_factor is 0"),
    ],
)
def test_numbers_that_nothing_can_be_computed_with_are_refused(changes: dict[str, Any], says: str) -> None:
    assert says in refusal(**changes)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"vocab_size": 1' + "0" * 5000 + "}"])
def test_json_that_python_does_not_read_is_said_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON") as caught:
        ModelConfig.from_json(tmp_path / "config.json")
    assert "\n" not in str(caught.value)


def test_a_folder_in_the_place_of_a_config_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory$"):
        ModelConfig.from_json(tmp_path)


def test_the_defaults_are_deepseek_v3_but_for_yarn() -> None:
    assert PRESETS["v3-671b"].replace(rope_scaling=None) == ModelConfig()
    assert PRESETS["v3-671b"].rope_scaling is not None
