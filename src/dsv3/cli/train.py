"""`dsv3 train`: a recipe's stages, from tokens to a model, and its data before them where that is not there yet."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import shutil
import sys
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
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes on this machine, laid out by the recipe's `parallel`; without one, data parallel.",
        ),
    ] = None,
    restarts: Annotated[
        int, typer.Option(min=0, help="How often they start again after one was killed, died or hung.")
    ] = 3,
    timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds after which a process that does not move is given up.")
    ] = 300.0,
) -> None:
    """Train a model by a recipe: pretraining, context extension, chat tuning, and a checkpoint at the end.

    Interrupted at any moment, the same command goes on from the last save.
    """
    import torch
    import yaml

    from dsv3.errors import UserError
    from dsv3.parallel.launch import in_torchrun, launch, worker
    from dsv3.parallel.watch import agree, code_facts
    from dsv3.recipe import Layout, load_recipe
    from dsv3.train.stages import Options, check, run_recipe, say

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def data_digest(folder: Path) -> str:
        """Of the data's table of contents, which has a checksum of every file."""
        try:
            return digest((folder / "manifest.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{folder} holds no tokens: build them first, with dsv3 data build") from None

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
    inside = in_torchrun()
    processes = int(os.environ["WORLD_SIZE"]) if inside else nproc or 1
    if read.parallel == Layout() and processes > 1:
        read = dataclasses.replace(read, parallel=Layout(data=processes))
    if read.parallel.world != processes:
        raise UserError(
            f"{recipe} is laid out for {read.parallel.world} processes, and there are {processes}: give --nproc "
            f"{read.parallel.world}, start it with torchrun, or change `parallel`"
        )
    out = out or Path("runs") / read.name
    data = data or out / "data"
    options = Options(device, compile, save_every, scale, init)
    try:
        if inside:
            with worker(device, timeout) as (own, _):
                facts = code_facts() | {"the recipe": digest(repr(read)), "the data": data_digest(data)}
                agree(facts | {"the options": f"--stage {stage} --scale {scale} --init {init}"})
                run_recipe(read, data, out, stage, dataclasses.replace(options, device=own))
            return
        check(read, out, stage, options)
        if not (data / "manifest.json").exists():
            try:
                from dsv3.data.build import build
            except ImportError as missing:
                raise UserError(f"{missing}: pip install 'dsv3[train]'") from None
            say(f"{data} holds no tokens yet: building them")
            build(read.data, material, data)
        if processes == 1:
            run_recipe(read, data, out, stage, options)
            return
    except KeyboardInterrupt:
        say("interrupted: the same command goes on from the last save")
        raise typer.Exit(130) from None
    raise typer.Exit(launch(processes, ["-m", "dsv3", *sys.argv[1:]], restarts))
