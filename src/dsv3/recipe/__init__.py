"""Recipes: one YAML file that says all of a model's life, from text to chat.

    name, model, seed      what is trained
    data                   corpora and what is done to them (`dsv3.recipe.data`)
    optimizer, precision   how a step is taken
    parallel               how it is laid over processes (`dsv3.recipe.layout`)
    stop                   what it stops for
    stages                 pretrain, extend, sft: one phase each, or several (`dsv3.recipe.train`)
    export                 what is written at the end

`recipes/nano.yaml` makes the model that ships; `recipes/v3-671b.yaml` is the technical report's own run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dsv3.config import PRESETS, ModelConfig
from dsv3.errors import ConfigError
from dsv3.recipe.data import DataRecipe
from dsv3.recipe.fields import RecipeError, build, read_yaml
from dsv3.recipe.layout import Layout
from dsv3.recipe.train import Phase, Precision

__all__ = ["Export", "Layout", "OptimizerRecipe", "Phase", "Recipe", "RecipeError", "Stop", "load_recipe"]

STAGES = ("pretrain", "extend", "sft")


@dataclass(frozen=True)
class OptimizerRecipe:
    """AdamW as the report has it (sections 3.3.3 and 4.2)."""

    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    moments: Literal["bf16", "fp32"] = "bf16"
    ema: float | None = None
    """Decay of a moving average of the weights, kept beside the masters; None for none."""

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise RecipeError(f"betas is {list(self.betas)}: it must be two numbers from 0 to below 1")
        if not (self.eps > 0 and self.clip > 0 and self.weight_decay >= 0):
            raise RecipeError("eps and clip must be above 0, and weight_decay not below")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise RecipeError(f"ema is {self.ema}: it must be from 0 to below 1")


@dataclass(frozen=True)
class Export:
    """The checkpoint that is written when the last stage ends."""

    format: Literal["fp8", "bf16"] = "bf16"
    average: bool = False
    """Write the moving average of the weights instead of the weights."""
    temperature: float = 0.6
    top_p: float = 0.9

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise RecipeError("temperature must be at least 0, and top_p above 0 and at most 1")


@dataclass(frozen=True)
class Stop:
    """When a run stops by itself, besides where the loss is no number."""

    spike: float | None = None
    """How many sigma the loss, or its gradient's norm, may be above the median of the steps before; None for any."""
    window: int = 64
    """Steps that are compared with."""

    def __post_init__(self) -> None:
        if self.window < 4 or (self.spike is not None and self.spike <= 0):
            raise RecipeError("spike must be above 0, and window at least 4")


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """The keys of a recipe that read themselves."""

    seed: int = 0
    precision: Precision = "bf16"
    recompute: bool = False
    """Compute norms and MLA up-projections again in backward instead of keeping them (section 3.2.3)."""
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    export: Export = field(default_factory=Export)
    parallel: Layout = field(default_factory=Layout)
    stop: Stop = field(default_factory=Stop)


@dataclass(frozen=True, kw_only=True)
class Recipe(_Settings):
    """A whole recipe; `phases` are its stages in order."""

    name: str
    model: ModelConfig
    data: DataRecipe
    phases: dict[str, Phase]
    """By name: `pretrain`, or `extend-1`, `extend-2` where a stage has several."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise RecipeError(f"seed is {self.seed}: it must be at least 0")
        if self.export.average and self.optimizer.ema is None:
            raise RecipeError("export.average is true, but optimizer.ema gives no decay")
        for name, phase in self.phases.items():
            config, layout = self.config(name), self.layout(name)
            layout.check_model(config)
            if layout.world != self.parallel.world:
                raise RecipeError(
                    f"stages.{name}.parallel is for {layout.world} processes, but the recipe's for "
                    f"{self.parallel.world}: all stages run on as many"
                )
            if phase.sequence_length > config.max_position_embeddings:
                raise RecipeError(
                    f"stages.{name}.sequence_length is {phase.sequence_length}, but the model's context is "
                    f"{config.max_position_embeddings} there: set max_position_embeddings"
                )
            kinds = set()
            for corpus in phase.mixture:
                if corpus not in self.data.corpora:
                    raise RecipeError(
                        f"stages.{name}.mixture names {corpus!r}: data.corpora has {', '.join(self.data.corpora)}"
                    )
                kinds.add(self.data.corpora[corpus].kind)
            if len(kinds) > 1:
                raise RecipeError(f"stages.{name}.mixture has text and chats: a phase reads one kind")

    def config(self, phase: str) -> ModelConfig:
        """The model's config in a phase: the recipe's, with the context as stretched up to there.

        Below the original length positions are left as they are until the first phase that stretches them
        (report, section 4.3).
        """
        values = self.model.to_dict()
        for name, p in self.phases.items():
            if p.rope_scaling is not None:
                values["rope_scaling"] = {"type": "yarn"} | p.rope_scaling
            if p.max_position_embeddings is not None:
                values["max_position_embeddings"] = p.max_position_embeddings
            if name == phase:
                break
        try:
            return ModelConfig.from_dict(values)
        except ConfigError as problem:
            raise RecipeError(f"stages.{phase}: {problem}") from None

    def layout(self, phase: str) -> Layout:
        """How a phase is laid over processes."""
        return self.phases[phase].parallel or self.parallel

    def stage(self, name: str) -> dict[str, Phase]:
        """The phases of one stage; raises RecipeError if the recipe has none of that name."""
        found = {key: phase for key, phase in self.phases.items() if key.split("-")[0] == name or key == name}
        if not found:
            raise RecipeError(f"{self.name} has no stage {name!r}: it has {', '.join(self.phases)}")
        return found


def load_recipe(path: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read and check a recipe.

    changes: values to put in place of the file's, by path of keys, such as {"stages.pretrain.lr": 1e-3}.
    Raises RecipeError, in one line that names the file and the key.
    """
    values = read_yaml(path)
    try:
        for key, value in (changes or {}).items():
            _put(values, key.split("."), value)
        return _recipe(values)
    except RecipeError as problem:
        raise RecipeError(f"{path}: {problem}") from None


def _put(values: Any, keys: list[str], value: Any) -> None:
    for i, key in enumerate(keys):
        place: Any = int(key) if isinstance(values, list) and key.isdecimal() else key
        if i == len(keys) - 1 and isinstance(values, dict):
            values[place] = value
            return
        try:
            values = values[place]
        except (KeyError, IndexError, TypeError):
            raise RecipeError(f"there is no {'.'.join(keys[: i + 1])} to change") from None
    raise RecipeError(f"{'.'.join(keys)} cannot be changed: name a key of a mapping")


def _recipe(values: dict[str, Any]) -> Recipe:
    known = {f.name for f in dataclasses.fields(Recipe)} - {"phases"} | {"stages"}
    unknown = sorted(str(key) for key in values.keys() - known)
    if unknown:
        raise RecipeError(f"unknown key {unknown[0]!r}: there are {', '.join(sorted(known))}")
    for name in ("name", "model", "data", "stages"):
        if name not in values:
            raise RecipeError(f"{name!r} is missing")
    own = {f.name: values[f.name] for f in dataclasses.fields(_Settings) if f.name in values}
    settings = build(_Settings, own, "recipe")
    return Recipe(
        name=str(values["name"]),
        model=_model(values["model"]),
        data=build(DataRecipe, values["data"], "data"),
        phases=_phases(values["stages"]),
        **{f.name: getattr(settings, f.name) for f in dataclasses.fields(_Settings)},
    )


def _model(value: Any) -> ModelConfig:
    """A preset's name, or a mapping with `preset` and what differs, in config.json's names."""
    changes: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {"preset": value}
    preset = changes.pop("preset", None)
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise RecipeError(f"model is {preset!r}: there are {', '.join(PRESETS)}; or give config.json's keys")
    try:
        base = {} if preset is None else PRESETS[preset].to_dict()
        return ModelConfig.from_dict(base | changes)
    except ConfigError as problem:
        raise RecipeError(f"model: {problem}") from None


def _phases(stages: Any) -> dict[str, Phase]:
    if not isinstance(stages, Mapping) or not stages:
        raise RecipeError(f"stages is {stages!r}: it must map {', '.join(STAGES)} to what they do")
    phases: dict[str, Phase] = {}
    for name, value in stages.items():
        if name not in STAGES:
            raise RecipeError(f"stages has {name!r}: there are {', '.join(STAGES)}")
        several = value if isinstance(value, list) else [value]
        if not several:
            raise RecipeError(f"stages.{name} is empty: leave it out, or say what it does")
        for i, item in enumerate(several, start=1):
            key = name if len(several) == 1 else f"{name}-{i}"
            phases[key] = build(Phase, item, f"stages.{key}")
    return dict(sorted(phases.items(), key=lambda pair: STAGES.index(pair[0].split("-")[0])))
