"""`dsv3 train`: a recipe's stages, from tokens to a model, and its data before them where that is not there yet."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe: recipes/nano.yaml, or your own.")],
    stage: Annotated[
        str | None, typer.Option(help="Only this stage: pretrain, extend or sft. By default all, in order.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; given again, it goes on. Default: runs/NAME.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="What `dsv3 data build` wrote. Default: OUT/data, built if it is not there."),
    ] = None,
    material: Annotated[
        Path | None, typer.Option(help="Where the recipe's corpora lie, if the data is to be built.")
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(help="Start the first stage that is run from the weights of this checkpoint."),
    ] = None,
    scale: Annotated[
        float, typer.Option(help="Shorten every phase, and its schedules with it: 0.01 for a quick try.")
    ] = 1.0,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value: --set stages.pretrain.lr=1e-3."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    compile: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Fuse operations (default: where a C++ compiler is)."),
    ] = None,
    save_every: Annotated[float, typer.Option(help="Seconds between saves.")] = 240.0,
) -> None:
    """Train a model by a recipe: pretraining, context extension, chat tuning, and a checkpoint at the end.

    Interrupted at any moment, the same command goes on from the last save.
    """
    import torch
    import yaml

    from dsv3.errors import UserError
    from dsv3.recipe import load_recipe
    from dsv3.train.stages import Options, check, run_recipe, say

    changes = {}
    for item in change or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise typer.BadParameter(f"{item!r} must be KEY=VALUE", param_hint="--set")
        try:
            changes[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):
            raise typer.BadParameter(f"{item!r} has no YAML value after the =", param_hint="--set") from None
    if not 0 < scale < math.inf:
        raise typer.BadParameter(f"{scale:g} must be above 0", param_hint="--scale")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    known = ["cpu"]
    if torch.cuda.is_available():
        known += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if device not in known:
        raise typer.BadParameter(
            f"{device!r} is not on this machine: it has {', '.join(known)}", param_hint="--device"
        )
    if compile is None:
        compile = device != "cpu" or any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    read = load_recipe(recipe, changes)
    out = out or Path("runs") / read.name
    data = data or out / "data"
    options = Options(device, compile, save_every, scale, init)
    check(read, out, stage, options)
    try:
        if not (data / "manifest.json").exists():
            try:
                from dsv3.data.build import build
            except ImportError as missing:
                raise UserError(f"{missing}: pip install 'dsv3[train]'") from None
            say(f"{data} holds no tokens yet: building them")
            build(read.data, material, data)
        run_recipe(read, data, out, stage, options)
    except KeyboardInterrupt:
        say("interrupted: the same command goes on from the last save")
        raise typer.Exit(130) from None
