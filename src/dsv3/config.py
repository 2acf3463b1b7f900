"""The shape of a model, in Hugging Face's own words.

A `ModelConfig` is `config.json` of a `deepseek_v3` checkpoint as a frozen, checked dataclass: the same
field names, so that any released model of this architecture loads from its own file, and what we write
is read by others. Every key of such a file is one of three things here:

- a field below, and then it does what it says;
- listed in `_INERT`: it changes nothing that is computed, and is carried along so that it is written back
  (`_FIXED` and `_REPEATED` keys too, once they are seen to say what we compute anyway);
- refused by name. A switch we do not know may change the numbers, and a model that runs but answers
  differently is worse than one that does not start.

DeepSeek-V2 (softmax scores, greedy or group-limited choice), Moonlight (no query compression, one group)
and Kimi-K2 (384 experts, one group) are points in the same space, not other code paths.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3.errors import ConfigError, UserError

MODEL_TYPES = ("deepseek_v3", "deepseek_v2", "kimi_k2")

# Keys of released files and of transformers' base class that do not change what the model computes.
_INERT = frozenset(
    [
        "_name_or_path",
        "architectures",
        "auto_map",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "bos_token_id",
        "pad_token_id",
        "ep_size",
        "output_router_logits",
        "router_aux_loss_coef",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "return_dict_in_generate",
        "use_return_dict",
        "tokenizer_class",
        "task_specific_params",
        "problem_type",
        "id2label",
        "label2id",
        "finetuning_task",
        "is_encoder_decoder",
        "is_decoder",
        "chunk_size_feed_forward",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "torchscript",
        "tf_legacy_loss",
        "use_bfloat16",
        "prefix",
        "sep_token_id",
        "decoder_start_token_id",
        "max_length",
        "min_length",
    ]
)

# Keys that repeat another of our sizes: transformers writes them, and reads `head_dim` as the rotary size.
_REPEATED = {
    "num_key_value_heads": "num_attention_heads",
    "head_dim": "qk_rope_head_dim",
    "qk_head_dim": "qk_head_dim",
}

# Switches with one value that we compute; any other is refused.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0, None),
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),
    "cross_attention_hidden_size": (None,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "seq_aux": (True,),  # the balance loss is that of each sequence
}

_LARGEST = 2**31  # no size, count or id comes near it, and beyond it torch's own arithmetic may overflow


@dataclass(frozen=True)
class YarnConfig:
    """YaRN as DeepSeek applies it (arXiv 2309.00071; technical report section 4.3).

    Dimensions that turn fewer than `beta_slow` times over the original length are interpolated by
    `factor`, those that turn more than `beta_fast` times are left alone, with a linear ramp between.
    `mscale_all_dim` scales the softmax temperature; `mscale / mscale_all_dim` scales the rotary vectors.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _check_range(f"rope_scaling.{f.name}", getattr(self, f.name))
        if self.factor < 1:
            raise ConfigError(
                f"rope_scaling.factor is {self.factor}: YaRN stretches, so it must be at least 1"
            )
        if self.original_max_position_embeddings < 1:
            raise ConfigError(
                "rope_scaling.original_max_position_embeddings is "
                f"{self.original_max_position_embeddings}: it must be the pretraining length in tokens"
            )
        for name in ("beta_fast", "beta_slow"):
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"rope_scaling.{name} is {getattr(self, name)}: it counts turns, so it must be positive"
                )
        for name in ("mscale", "mscale_all_dim"):
            if getattr(self, name) < 0:
                raise ConfigError(f"rope_scaling.{name} is {getattr(self, name)}: it must not be negative")
        if self.attention_factor is not None and self.attention_factor <= 0:
            raise ConfigError(
                f"rope_scaling.attention_factor is {self.attention_factor}: it must be positive"
            )

    def magnitude(self, mscale: float) -> float:
        """sqrt(t) = 0.1 * mscale * ln(factor) + 1: YaRN's attention magnitude for this stretch."""
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @property
    def rotary_scale(self) -> float:
        """What the rotated vectors are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)

    @property
    def softmax_scale(self) -> float:
        """What the scores are multiplied by, on top of 1/sqrt(head size)."""
        magnitude = self.magnitude(self.mscale_all_dim)
        return magnitude * magnitude


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of a DeepSeek-V3 model.

    The defaults are DeepSeek-V3's (report, section 4.2) but for YaRN, since a file without `rope_scaling` has
    plain rotary positions; the preset `v3-671b` has it, and is DeepSeek-V3 itself.
    """

    model_type: str = "deepseek_v3"
    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_nextn_predict_layers: int = 1
    # attention
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    attention_bias: bool = False
    # experts
    n_routed_experts: int | None = 256
    n_shared_experts: int | None = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    first_k_dense_replace: int = 3
    moe_layer_freq: int = 1
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    aux_loss_alpha: float = 1e-4
    # positions
    max_position_embeddings: int = 163840
    rope_theta: float = 10000.0
    rope_scaling: YarnConfig | None = None
    rope_interleave: bool = True
    # the rest
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    tie_word_embeddings: bool = False
    eos_token_id: int | tuple[int, ...] | None = 1
    quantization_config: dict[str, Any] | None = None
    inert: dict[str, Any] = field(default_factory=dict)
    """Keys that change nothing here, kept so that a checkpoint is written back as it was read."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            _check_type(f.name, value, str(f.type))
            _check_range(f.name, value)
        _check_model_type(self.model_type)
        for name in [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "max_position_embeddings",
            "moe_layer_freq",
        ]:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ConfigError(f"q_lora_rank is {self.q_lora_rank}: give a rank, or null for no compression")
        if self.num_nextn_predict_layers < 0:
            raise ConfigError(
                f"num_nextn_predict_layers is {self.num_nextn_predict_layers}: it counts modules"
            )
        if self.qk_rope_head_dim % 2:
            raise ConfigError(
                f"qk_rope_head_dim is {self.qk_rope_head_dim}: rotary pairs need an even number"
            )
        if self.rms_norm_eps <= 0:
            raise ConfigError(f"rms_norm_eps is {self.rms_norm_eps}: it must be positive")
        if self.rope_theta <= 1:
            raise ConfigError(f"rope_theta is {self.rope_theta}: it is a base, so it must be more than 1")
        for name in ("initializer_range", "n_shared_experts", "first_k_dense_replace", "aux_loss_alpha"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must not be negative")
        if self.n_routed_experts is not None:
            self._check_experts(self.n_routed_experts)

    def _check_experts(self, n_routed_experts: int) -> None:
        if self.scoring_func not in ("sigmoid", "softmax"):
            raise ConfigError(f"scoring_func is {self.scoring_func!r}: dsv3 knows 'sigmoid' and 'softmax'")
        if self.topk_method not in ("noaux_tc", "greedy", "group_limited_greedy"):
            raise ConfigError(
                f"topk_method is {self.topk_method!r}: dsv3 knows 'noaux_tc' (DeepSeek-V3), 'greedy' and "
                "'group_limited_greedy' (DeepSeek-V2)"
            )
        if self.routed_scaling_factor <= 0:
            raise ConfigError(f"routed_scaling_factor is {self.routed_scaling_factor}: it must be positive")
        if self.moe_intermediate_size < 1:
            raise ConfigError(f"moe_intermediate_size is {self.moe_intermediate_size}: it must be at least 1")
        if n_routed_experts < 1 or self.n_group < 1 or n_routed_experts % self.n_group:
            raise ConfigError(
                f"n_routed_experts is {n_routed_experts}: it must divide into n_group={self.n_group}"
            )
        if not 1 <= self.topk_group <= self.n_group:
            raise ConfigError(
                f"topk_group is {self.topk_group}: it must be between 1 and n_group={self.n_group}"
            )
        choosable = (
            n_routed_experts // self.n_group * (self.topk_group if self.limits_groups else self.n_group)
        )
        if not 1 <= self.num_experts_per_tok <= choosable:
            raise ConfigError(
                f"num_experts_per_tok is {self.num_experts_per_tok}: between 1 and the {choosable} experts of the "
                "groups a token may use"
            )
        if self.topk_method == "noaux_tc" and self.limits_groups and n_routed_experts // self.n_group < 2:
            raise ConfigError(
                f"n_group is {self.n_group}: groups are ranked by their best two experts, so each needs at least two"
            )

    # Derived -------------------------------------------------------------------------------------------

    @property
    def qk_head_dim(self) -> int:
        """Size of one query or key head: the part without position and the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers cached per token and layer: the compressed keys and values, and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        return float(self.qk_head_dim**-0.5) * (self.rope_scaling.softmax_scale if self.rope_scaling else 1.0)

    @property
    def limits_groups(self) -> bool:
        """Whether a token may choose only from `topk_group` of the `n_group` groups (nodes)."""
        return self.topk_method != "greedy" and self.n_group > 1

    @property
    def routing_factor(self) -> float:
        """What the weights of a token's experts are multiplied by. DeepSeek-V2 normalises or scales them, never both."""
        either = self.model_type == "deepseek_v2" and self.norm_topk_prob
        return 1.0 if either else self.routed_scaling_factor

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    def is_moe_layer(self, layer: int) -> bool:
        return (
            self.n_routed_experts is not None
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )

    # In and out ----------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Read the contents of a `config.json`. Raises ConfigError naming the key, its value and the fix."""
        values = dict(values)
        model_type = values.get("model_type", cls.model_type)
        _check_model_type(model_type)  # first: another architecture's other keys would only mislead
        for name, allowed in _FIXED.items():
            if name in values and values[name] not in allowed:
                raise ConfigError(f"{name} is {values[name]!r}: dsv3 supports only {allowed[0]!r}")
        older, newer = values.pop("rope_scaling", None), values.pop("rope_parameters", None)
        rope = newer if older in (None, {}) else older  # as in transformers, should a file have both
        if rope is not None:
            values["rope_scaling"] = _read_yarn(rope)
            if rope.get("rope_theta") is not None:
                values["rope_theta"] = rope["rope_theta"]
        if model_type == "deepseek_v2":  # transformers' defaults where older files leave them out
            v2: dict[str, Any] = {
                "scoring_func": "softmax",
                "topk_method": "greedy",
                "norm_topk_prob": False,
                "routed_scaling_factor": 1.0,
                "n_group": None,
                "topk_group": None,
                "first_k_dense_replace": 0,
            }
            values = v2 | values
        for name in ("n_group", "topk_group"):  # null means that groups are not used
            if name in values and values[name] is None:
                values[name] = 1
        # Released V2 and Moonlight files lack the key; V3's has it. Without it there is no module to load.
        values.setdefault("num_nextn_predict_layers", values.pop("num_mtp_layers", 0))
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])

        known = {f.name for f in dataclasses.fields(cls)} - {"inert"}
        inert = {k: v for k, v in values.items() if k in _INERT or k in _FIXED or k in _REPEATED}
        unknown = sorted(values.keys() - known - inert.keys())
        if unknown:
            raise ConfigError(
                f"unknown config key {unknown[0]!r} = {values[unknown[0]]!r}: dsv3 does not know what it changes; "
                "remove it from config.json if it changes nothing that is computed"
            )
        fields = {k: v for k, v in values.items() if k in known}
        for name in (
            "rope_theta",
            "routed_scaling_factor",
            "rms_norm_eps",
            "initializer_range",
            "aux_loss_alpha",
        ):
            if type(fields.get(name)) is int and abs(fields[name]) < _LARGEST:
                fields[name] = float(fields[name])
        config = cls(**fields, inert=inert)
        for name, size in _REPEATED.items():
            if inert.get(name) not in (None, getattr(config, size)):
                raise ConfigError(
                    f"{name} is {inert[name]!r}: in latent attention the other sizes make it {getattr(config, size)}"
                )
        return config

    def to_dict(self) -> dict[str, Any]:
        """The contents of a `config.json` that transformers, vLLM, SGLang and `from_dict` read."""
        values: dict[str, Any] = {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "num_key_value_heads": self.num_attention_heads,
        } | self.inert
        values |= {name: getattr(self, size) for name, size in _REPEATED.items() if name in values}
        for f in dataclasses.fields(self):
            if f.name in ("inert", "rope_scaling"):
                continue
            value = getattr(self, f.name)
            if f.name == "quantization_config" and value is None:
                continue
            values[f.name] = list(value) if isinstance(value, tuple) else value
        values["rope_scaling"] = None
        if self.rope_scaling is not None:
            yarn = {k: v for k, v in dataclasses.asdict(self.rope_scaling).items() if v is not None}
            values["rope_scaling"] = {"type": "yarn"} | yarn
        return values

    @classmethod
    def from_json(cls, path: str | Path) -> ModelConfig:
        """Read a `config.json`; raises ConfigError if it is missing or not JSON."""
        return cls.from_dict(read_json(path, ConfigError))

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


def _read_yarn(rope: Any) -> YarnConfig | None:
    """Read `rope_scaling` (released files) or `rope_parameters` (transformers 5); None means plain RoPE."""
    if not isinstance(rope, dict):
        raise ConfigError(f"rope_scaling is {rope!r}: it must be an object or null")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ConfigError(f"partial_rotary_factor is {rope['partial_rotary_factor']}: dsv3 supports only 1.0")
    if kind not in ("default", "yarn"):
        raise ConfigError(f"rope_scaling type is {kind!r}: dsv3 supports 'yarn' and plain rotary positions")
    if rope.get("truncate", True) is not True:
        raise ConfigError(
            "rope_scaling.truncate is false: DeepSeek's YaRN rounds its correction range; remove it"
        )
    fields = {f.name for f in dataclasses.fields(YarnConfig)}
    known = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
    if kind == "yarn":
        known |= fields | {"truncate"}
    unknown = sorted(rope.keys() - known)
    if unknown:
        raise ConfigError(
            f"unknown rope_scaling key {unknown[0]!r} with type {kind!r}: dsv3 does not know what it changes"
        )
    if kind == "default":
        return None
    values = {k: v for k, v in rope.items() if k in fields and v is not None}
    missing = sorted({"factor", "original_max_position_embeddings"} - values.keys())
    if missing:
        raise ConfigError(f"rope_scaling lacks {missing[0]!r}: YaRN needs it")
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"rope_scaling.{name} is {value!r}: it must be a number")
    return YarnConfig(**values)


_TYPES: dict[str, type | tuple[type, ...]] = {
    "int": int,
    "float": (int, float),
    "bool": bool,
    "str": str,
    "None": type(None),
    "YarnConfig": YarnConfig,
    "tuple[int, ...]": tuple,
    "dict[str, Any]": dict,
}


def _check_model_type(value: Any) -> None:
    if value not in MODEL_TYPES:
        raise ConfigError(f"model_type is {value!r}: dsv3 loads {', '.join(MODEL_TYPES)}")


def _check_range(name: str, value: Any) -> None:
    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers:
        if isinstance(number, float) and not math.isfinite(number):
            raise ConfigError(f"{name} is {number}: it must be finite")
        if isinstance(number, int) and abs(number) >= _LARGEST:
            raise ConfigError(f"{name} is {number}: it must be below {_LARGEST:,}")


def _check_type(name: str, value: Any, annotation: str) -> None:
    parts = [part.strip() for part in annotation.split("|")]
    for part in parts:
        if isinstance(value, bool) and part != "bool":
            continue
        if isinstance(value, tuple) and not all(type(item) is int for item in value):
            continue
        if isinstance(value, _TYPES[part]):
            return
    wanted = " or ".join(part.replace("None", "null") for part in parts)
    raise ConfigError(f"{name} is {value!r}: it must be {wanted}")


def read_json(path: str | Path, error: type[UserError]) -> dict[str, Any]:
    """The object in one of a checkpoint's JSON files; raises `error`, in one line, if there is none to be had."""
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} does not exist: download it, or name another folder") from None
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}") from None
    except RecursionError:
        raise error(f"{path} is not valid JSON (nested too deep): download it again") from None
    except ValueError as problem:  # also what is not UTF-8, and whole numbers of thousands of digits
        raise error(f"{path} is not valid JSON ({problem}): download it again") from None
    if not isinstance(values, dict):
        raise error(f"{path} holds a {type(values).__name__}, not an object: download it again")
    return values


def read_optional_json(path: str | Path, error: type[UserError]) -> dict[str, Any]:
    """The same of a file that need not be there: empty if it is not."""
    return read_json(path, error) if Path(path).exists() else {}


# Presets -----------------------------------------------------------------------------------------------

_V3_YARN = YarnConfig(
    factor=40.0,
    original_max_position_embeddings=4096,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
)

PRESETS: dict[str, ModelConfig] = {
    # DeepSeek-V3 as released (report, section 4.2): 671B parameters, 37B of them active per token.
    "v3-671b": ModelConfig(rope_scaling=_V3_YARN),
    # The report's small ablation model: 15.7B parameters, the shape of DeepSeek-V2-Lite with V3's routing.
    "v3-16b": ModelConfig(
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        q_lora_rank=None,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        max_position_embeddings=4096,
    ),
    # The model that ships: every part of the architecture, small enough to train and run on a laptop's CPU.
    "nano": ModelConfig(
        vocab_size=6144,
        hidden_size=256,
        intermediate_size=768,
        moe_intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        routed_scaling_factor=2.0,
        max_position_embeddings=2048,
        initializer_range=0.02,
        inert={"bos_token_id": 0},
    ),
    # For tests: the smallest model with every part.
    "tiny": ModelConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        max_position_embeddings=512,
        initializer_range=0.1,
        inert={"bos_token_id": 0},
    ),
}
