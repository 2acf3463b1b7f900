"""`dsv3 plan`: what a model costs to train or to serve, and what runs on the machine one has."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group

from dsv3.cli import plan_view as view
from dsv3.cli.plan_view import Shown
from dsv3.cli.units import number_or_word
from dsv3.config import PRESETS, ModelConfig
from dsv3.errors import UserError

if TYPE_CHECKING:  # --help does not wait for these
    from dsv3.planner.fit import Machine
    from dsv3.planner.hardware import Hardware
    from dsv3.planner.training import Candidate, TrainingPlan
    from dsv3.recipe import Layout, Recipe

_POWERS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_TRAINING, _SERVING = "Training", "Serving, with --serve"
_MACHINE, _BALANCE = "One machine, with --fit", "Laying experts over GPUs, with --experts"

# Flags that are for some questions only: the questions, in the words of `_question`.
_FOR = {
    "--layout": ("training",),
    "--microbatch": ("training",),
    "--precision": ("training", "--search"),
    "--tokens": ("training",),
    "--gpus": ("training", "--search", "--fit", "--experts"),
    "--sequence-length": ("training", "--search", "--serve"),
    "--batch": ("training", "--search", "--serve"),
    "--units": ("--serve",),
    "--redundant": ("--serve", "--experts"),
    "--ram": ("--fit",),
    "--ram-bandwidth": ("--fit",),
    "--nodes": ("--experts",),
    "--plot": ("training", "--serve", "--experts"),
}


def plan(
    config: Annotated[
        str,
        typer.Argument(
            help="A preset (v3-671b, v3-16b, nano, tiny), a config.json, a checkpoint's folder, or a recipe "
            "(.yaml), whose phases and layout are planned.",
            metavar="CONFIG",
        ),
    ],
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Kind of GPU, or how many of which: h800 (the default), '2x rtx4090'.", metavar="GPU"
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=0, help="How many. Default: the layout's; else 2048, 8 or 1 by the model's size."),
    ] = None,
    profiles: Annotated[
        Path | None, typer.Option(help="GPUs of your own, in the form of hardware.yaml.", metavar="FILE.yaml")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="The keys of `parallel` in recipes: pipeline=16,data=128,... Default: the recipe's, else the best "
            "that fits.",
            metavar="KEY=VALUE,...",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    search: Annotated[
        bool,
        typer.Option("--search", help="Compare layouts, and say why others fail.", rich_help_panel=_TRAINING),
    ] = False,
    sequence_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a sequence (4096); of a prompt.", rich_help_panel=_TRAINING),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Sequences per step (15360); with --serve answers under way per GPU (what fits).",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    microbatch: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences that go through a stage at once (1).", rich_help_panel=_TRAINING),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Of matrix products, fp8 or bf16 (what the GPU has).", rich_help_panel=_TRAINING),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="How long training goes on: 14.8T (1T).", metavar="N", rich_help_panel=_TRAINING),
    ] = None,
    serve: Annotated[
        bool,
        typer.Option("--serve", help="Plan prefill and decode units.", rich_help_panel=_SERVING),
    ] = False,
    units: Annotated[
        str | None,
        typer.Option(
            help="GPUs of each: 32,144 (as DeepSeek has them).", metavar="N,N", rich_help_panel=_SERVING
        ),
    ] = None,
    fit: Annotated[
        bool,
        typer.Option(
            "--fit", help="Tell which formats run on --gpu and --ram, and how fast.", rich_help_panel=_MACHINE
        ),
    ] = False,
    ram: Annotated[
        str | None,
        typer.Option(help="Main memory, 256GB (this machine's).", metavar="SIZE", rich_help_panel=_MACHINE),
    ] = None,
    ram_bandwidth: Annotated[
        str | None,
        typer.Option(
            help="Its bytes per second, 460GB (two channels of DDR5-5600).",
            metavar="SIZE",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    experts: Annotated[
        Path | None,
        typer.Option(
            help="Loads as `dsv3 eval` prints them: lay experts over --gpus by them.",
            metavar="LOADS.json",
            rich_help_panel=_BALANCE,
        ),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, help="Machines that the GPUs are in (1).", rich_help_panel=_BALANCE),
    ] = None,
    redundant: Annotated[
        int | None,
        typer.Option(
            min=0, help="Copies of busy experts (0; with --serve an eighth).", rich_help_panel=_BALANCE
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the schedule, and the memory as FILE-memory; with --serve the memory, with --experts the "
            "balance.",
            metavar="FILE.png",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The same as JSON: bytes, seconds, dollars.")
    ] = False,
) -> None:
    """Tell what a model costs before anything is bought: memory, time and money of training or serving it.

    All of it follows from the config, data sheets and a list of assumptions, which is printed with it.
    """
    asked = {"--search": search, "--serve": serve, "--fit": fit, "--experts": experts is not None}
    given = {
        "--layout": layout,
        "--microbatch": microbatch,
        "--precision": precision,
        "--tokens": tokens,
        "--gpus": gpus,
        "--sequence-length": sequence_length,
        "--batch": batch,
        "--units": units,
        "--redundant": redundant,
        "--ram": ram,
        "--ram-bandwidth": ram_bandwidth,
        "--nodes": nodes,
        "--plot": plot,
    }
    question = _question(asked, [flag for flag, value in given.items() if value is not None])
    from dsv3.figures import check_picture

    if plot is not None:
        check_picture(plot)
    many, kind = _kinds(gpu, gpus)
    model, recipe = _subject(config)
    if question == "--fit":
        shown, facts = _fit(config, model, _machine(gpu and kind, many, ram, ram_bandwidth, profiles))
    elif experts is not None:
        shown, facts = _experts(config, model, experts, many or 8, nodes or 1, redundant or 0, plot)
    elif question == "--serve":
        lengths = {"prompt": sequence_length, "context": sequence_length}
        options = lengths | {"batch": batch, "redundant": redundant}
        shown, facts = _serve(config, model, _hardware(kind, profiles), _pair(units), options, plot)
    elif recipe is not None and question == "training":
        fixed = {"--sequence-length": sequence_length, "--batch": batch, "--microbatch": microbatch}
        _none_of(fixed | {"--precision": precision, "--tokens": tokens}, "a recipe has its own")
        shown, facts = _recipe(config, recipe, _hardware(kind, profiles), many, _layout(layout), plot)
    else:
        run = _Run(model, _hardware(kind, profiles), many, sequence_length, batch, precision)
        if question == "--search":
            shown, facts = view.layouts(config, run.hardware, run.gpus, run.search())
        else:
            shown, facts = _train(config, run, _layout(layout), microbatch, _tokens(tokens), plot)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    Console(highlight=False).print(*(Group("", section) for section in shown))


# ---------------------------------------- what was asked


def _question(asked: dict[str, bool], given: Sequence[str]) -> str:
    """The one question: training, or a flag's. Raises BadParameter for two, and for flags of another question."""
    questions = [flag for flag, on in asked.items() if on]
    if len(questions) > 1:
        raise typer.BadParameter(f"{' and '.join(questions)} are different questions: ask one")
    question = questions[0] if questions else "training"
    for flag in given:
        if question not in _FOR[flag]:
            raise typer.BadParameter(
                f"{flag} is for {', '.join(_FOR[flag])}, not for {question}: leave it out"
            )
    return question


def _none_of(values: dict[str, Any], why: str) -> None:
    for flag, value in values.items():
        if value is not None:
            raise typer.BadParameter(f"{flag} is {value}, but {why}: leave it out")


def _subject(name: str) -> tuple[ModelConfig, Recipe | None]:
    """The model that a preset, a config.json, a folder or a recipe is about, and the recipe if it is one."""
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        from dsv3.recipe import load_recipe

        recipe = load_recipe(path)
        return recipe.model, recipe
    if path.is_file() and path.suffix == ".json":
        return ModelConfig.from_json(path), None
    if (path / "config.json").is_file():
        return ModelConfig.from_json(path / "config.json"), None
    if name in PRESETS and not path.exists():
        return PRESETS[name], None
    raise UserError(
        f"{name!r} is no preset ({', '.join(PRESETS)}), config.json, folder with one, or recipe: name one of these"
    )


def _kinds(gpu: str | None, gpus: int | None) -> tuple[int | None, str]:
    """How many GPUs of which kind: "2x rtx4090" says both."""
    match = re.fullmatch(r"\s*(\d+)\s*[xX]\s+(\S.*?)\s*|\s*(\d+)[xX](\S.*?)\s*", gpu or "h800")
    if match is None:
        return gpus, (gpu or "h800").strip()
    number, kind = int(match[1] or match[3]), match[2] or match[4]
    if gpus not in (None, number):
        raise typer.BadParameter(f"{gpu!r} and --gpus {gpus} differ: give one", param_hint="--gpu")
    return number, kind


def _hardware(kind: str, profiles: Path | None) -> Hardware:
    """The profile of that name, however it is spelt: RTX-4090, rtx 4090."""
    from dsv3.planner.hardware import find_profile, load_profiles

    for name, hardware in load_profiles(profiles).items():
        if _plain(kind) == _plain(name):
            return hardware
    return find_profile(kind, profiles)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())


def _bytes(text: str, flag: str) -> float:
    """256GB, 1.5TB, 256G: powers of a thousand, as memory is sold."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?(?:/s)?\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise typer.BadParameter(f"{text!r} must be a size, such as 256GB", param_hint=flag)
    nbytes = float(match[1]) * _POWERS[match[2].upper()]
    if nbytes < 1e6:
        raise typer.BadParameter(
            f"{text!r} is {nbytes:,.0f} bytes: give a size such as 256GB", param_hint=flag
        )
    return nbytes


def _pair(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if match is None or not int(match[1]) or not int(match[2]):
        raise typer.BadParameter(
            f"{text!r} must be two numbers of GPUs, such as 32,144", param_hint="--units"
        )
    return int(match[1]), int(match[2])


def _tokens(text: str | None) -> float:
    from dsv3.recipe.fields import number

    tokens = 1e12 if text is None else float(number(text, "--tokens"))
    if tokens <= 0:
        raise typer.BadParameter(f"{text!r} must be above 0", param_hint="--tokens")
    return tokens


def _layout(text: str | None) -> Layout | None:
    from dsv3.recipe import Layout
    from dsv3.recipe.fields import RecipeError, build

    if text is None:
        return None
    values: dict[str, Any] = {}
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals and value):
            raise typer.BadParameter(f"{item!r} must be KEY=VALUE", param_hint="--layout")
        values[key] = number_or_word(value)
    try:
        return build(Layout, values, "--layout")
    except RecipeError as problem:
        raise typer.BadParameter(str(problem)) from None


# ---------------------------------------- training


class _Run:
    """A model on so many GPUs, with what is usual for whatever was not said."""

    def __init__(
        self,
        config: ModelConfig,
        hardware: Hardware,
        gpus: int | None,
        length: int | None,
        batch: int | None,
        precision: str | None,
    ) -> None:
        if precision not in (None, "fp8", "bf16"):
            raise typer.BadParameter(f"{precision!r} must be fp8 or bf16", param_hint="--precision")
        if gpus == 0:
            raise typer.BadParameter("0 must be at least 1 to train", param_hint="--gpus")
        self.config, self.hardware = config, hardware
        self.given_gpus, self.gpus = gpus, gpus or _usual(config)
        self.options: dict[str, Any] = {
            "sequence_length": length or min(4096, config.max_position_embeddings),
            "batch": batch or 15360,
            "precision": precision or ("fp8" if hardware.fp8_flops else "bf16"),
        }

    def search(self) -> list[Candidate]:
        from dsv3.planner.training import search

        if not sys.stderr.isatty():
            return search(self.config, self.hardware, self.gpus, **self.options)
        with Console(stderr=True).status(f"Looking for layouts on {self.gpus:,} {self.hardware.name}"):
            return search(self.config, self.hardware, self.gpus, **self.options)

    def best(self) -> tuple[TrainingPlan, int]:
        """The fastest layout that fits, and how many were looked at."""
        candidates = self.search()
        for candidate in candidates:
            if candidate.plan is not None and not candidate.reason:
                return candidate.plan, len(candidates)
        raise UserError(
            f"none of {len(candidates):,} layouts fits on {self.gpus:,} {self.hardware.name}: give more GPUs, or larger "
            "ones (--search says why)"
        )


def _usual(config: ModelConfig) -> int:
    """GPUs that a model of this size is trained on: DeepSeek's number for theirs."""
    from dsv3.planner.serving import Matrices

    parameters = Matrices(config, 0).total
    return 2048 if parameters > 100e9 else 8 if parameters > 1e9 else 1


def _train(
    name: str, run: _Run, layout: Layout | None, microbatch: int | None, tokens: float, plot: Path | None
) -> Shown:
    from dsv3.planner.training import plan_training

    if layout is None:
        _none_of({"--microbatch": microbatch}, "without --layout it is searched for")
        planned, looked_at = run.best()
        how = f"best of {looked_at:,} looked at"
    else:
        _same(run.given_gpus, layout.world)
        planned = plan_training(run.config, run.hardware, layout, microbatch=microbatch or 1, **run.options)
        how = "as given"
    if plot is not None:
        _draw(planned, plot)
    return view.training(name, planned, how, tokens)


def _same(gpus: int | None, world: int) -> None:
    if gpus not in (None, world):
        raise typer.BadParameter(f"{gpus}, but the layout is for {world} GPUs", param_hint="--gpus")


def _recipe(
    name: str, recipe: Recipe, hardware: Hardware, gpus: int | None, layout: Layout | None, plot: Path | None
) -> Shown:
    """All phases of a recipe, and the first in detail."""
    from dsv3.planner.training import plan_recipe

    _same(gpus, (layout or recipe.parallel).world)
    whole = plan_recipe(recipe, hardware, layout)
    if not whole.phases:
        raise UserError(f"no phase of {name} can be planned: {'; '.join(whole.skipped.values())}")
    if plot is not None:
        _draw(whole.phases[0].plan, plot)
    return view.recipe(name, whole, "the recipe's" if layout is None else "as given")


def _draw(planned: TrainingPlan, path: Path) -> None:
    """The schedule, and the memory in a second file."""
    from dsv3.planner.pictures import draw_memory, draw_timeline

    if planned.timeline is None:
        raise UserError(
            "there is no schedule to draw, as the layout has one stage: give --layout pipeline=4,... for a pipeline"
        )
    draw_timeline(planned.timeline, path)
    draw_memory(planned.memory, path.with_stem(f"{path.stem}-memory"), planned.hardware.memory)


# ---------------------------------------- the other questions


def _serve(
    name: str,
    config: ModelConfig,
    hardware: Hardware,
    sizes: tuple[int | None, int | None],
    options: dict[str, int | None],
    plot: Path | None,
) -> Shown:
    from dsv3.planner.pictures import draw_memory
    from dsv3.planner.serving import plan_serving

    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    planned = plan_serving(config, hardware, prefill_gpus=sizes[0], decode_gpus=sizes[1], **given)
    if plot is not None:
        parts = [unit.memory | {"cache": unit.cache} for unit in planned.units]
        draw_memory(parts, plot, hardware.memory, [unit.work for unit in planned.units])
    return view.serving(name, planned)


def _machine(
    kind: str | None, gpus: int | None, ram: str | None, bandwidth: str | None, profiles: Path | None
) -> Machine:
    """What was said of a machine; main memory by default this one's."""
    from dsv3.planner.fit import Machine

    if kind is None and gpus:
        raise typer.BadParameter(f"{gpus} of which kind? Give --gpu too", param_hint="--gpus")
    number = 0 if kind is None else 1 if gpus is None else gpus
    if ram is None:
        import psutil

        total = float(psutil.virtual_memory().total)
    else:
        total = _bytes(ram, "--ram")
    cpu = _hardware("cpu", profiles)
    return Machine(
        gpu=_hardware(kind, profiles) if kind is not None and number else None,
        gpus=number,
        ram=total,
        ram_bandwidth=cpu.bandwidth if bandwidth is None else _bytes(bandwidth, "--ram-bandwidth"),
        cpu_flops=cpu.bf16_flops,
    )


def _fit(name: str, config: ModelConfig, machine: Machine) -> Shown:
    from dsv3.planner.fit import fit

    return view.fitting(name, machine, fit(config, machine))


def _experts(
    name: str, config: ModelConfig, loads: Path, gpus: int, nodes: int, redundant: int, plot: Path | None
) -> Shown:
    from dsv3.planner.experts import balance, draw_balance, read_loads

    observed = read_loads(loads)
    experts = observed.counts.shape[1]
    if experts != config.n_routed_experts:
        raise UserError(
            f"{loads} has loads of {experts} experts, but {name} has {config.n_routed_experts or 0}: give the loads "
            "of this model"
        )
    placed = balance(observed.counts, gpus, nodes, redundant, config.n_group if config.limits_groups else 1)
    if plot is not None:
        draw_balance(placed, plot, name)
    return view.experts(name, observed.layers, placed)
