"""From a recipe to a model: its phases one after the other, each from where the one before ended.

A phase that stretches the context (YaRN, report section 4.3) changes the position encoding, and nothing else of the
model; so each phase builds the model by its own config and takes over the weights.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import sys
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsv3.checkpoint.writer import staged
from dsv3.config import read_json
from dsv3.data.stream import open_stream
from dsv3.errors import UserError
from dsv3.files import only_writer, write_whole
from dsv3.model import Transformer
from dsv3.parallel.mesh import Mesh, leads, on_lead
from dsv3.parallel.watch import waiting
from dsv3.planner.pipeline import schedule_of
from dsv3.recipe import Phase, Recipe, RecipeError
from dsv3.recipe.train import plan
from dsv3.train.compile import compile_model
from dsv3.train.flops import measure_matmul_rate, model_flops_per_token
from dsv3.train.fp8 import apply_fp8
from dsv3.train.heldout import bits_per_byte
from dsv3.train.loop import FlopsShare, Loop, train
from dsv3.train.metrics import FILE, MetricsLog
from dsv3.train.plots import plot_run
from dsv3.train.recompute import apply_recompute
from dsv3.train.run import Run, trained_model
from dsv3.train.state import read_position
from dsv3.train.team import Team


@dataclass(frozen=True)
class Options:
    """How a recipe is run here."""

    device: str = "cpu"
    compile: bool = False
    save_every: float = 240.0
    """Seconds between saves."""
    scale: float = 1.0
    """Shortens every phase, and its schedules with it."""
    init: Path | None = None
    """Start the first phase that is run from the weights of this checkpoint."""


def check(recipe: Recipe, out: Path, stage: str | None, options: Options) -> None:
    """Raise UserError for what can be told before hours of work: another recipe's folder, no such stage."""
    _chosen(recipe, stage)
    for name, phase in recipe.phases.items():
        try:
            layout = recipe.layout(name)
            curves = plan(phase, 10**12, options.scale, layout.granule(phase.microbatch))
            if layout.pipeline > 1:
                for tokens in (0, curves.tokens):
                    schedule_of(layout, curves.rows(tokens) // (layout.data * phase.microbatch))
        except RecipeError as problem:
            raise RecipeError(f"stages.{name}: {problem}") from None
    if options.init is not None and not (options.init / "config.json").exists():
        raise UserError(f"{options.init} is no checkpoint's folder: name one with a config.json")
    path = out / "recipe.json"
    if path.exists():
        theirs = read_json(path, UserError)
        mine = json.loads(json.dumps(_essence(recipe, options), default=str))
        differs = [key for key, value in mine.items() if theirs.get(key) != value]
        if differs:
            raise UserError(f"{path} was started with another {differs[0]}: name another --out")


def run_recipe(
    recipe: Recipe, data: Path, out: Path, stage: str | None = None, options: Options | None = None
) -> Path:
    """Run a recipe's phases, or those of one stage, on the tokens in `data`; returns where the model is.

    Given again, it goes on where it was. In several processes (`dsv3.parallel.launch`) all call this, and the first
    one alone writes what is not sharded. Raises UserError for what a person can mend.
    """
    options = options or Options()
    chosen = _chosen(recipe, stage)
    with ExitStack() as held:

        def begin() -> None:
            check(recipe, out, stage, options)
            held.enter_context(_locked(out))
            _write_json(out / "recipe.json", _essence(recipe, options))

        waiting("starting")
        on_lead(begin)
        before: str | None = None
        for name in recipe.phases:
            if name in chosen:
                first = name == chosen[0] and options.init is not None
                _run_phase(recipe, name, None if first else before, data, out, options)
            before = name
        folder = out / ("model" if stage is None else f"model-{stage}")
        waiting("writing the model")
        return on_lead(lambda: export(recipe, chosen[-1], data, out, folder))


def _chosen(recipe: Recipe, stage: str | None) -> list[str]:
    return list(recipe.phases if stage is None else recipe.stage(stage))


def _essence(recipe: Recipe, options: Options) -> dict[str, Any]:
    """What makes a run this run and no other."""
    return {
        "model": recipe.model.to_dict(),
        "seed": recipe.seed,
        "precision": recipe.precision,
        "scale": options.scale,
        "init": options.init,
        "optimizer": dataclasses.asdict(recipe.optimizer),
        "data": dataclasses.asdict(dataclasses.replace(recipe.data, slurm={}, ray={})),
        "stages": {
            name: dataclasses.asdict(dataclasses.replace(phase, parallel=None))
            for name, phase in recipe.phases.items()
        },
    }


def _locked(out: Path) -> AbstractContextManager[None]:
    """Hold a folder for this process alone."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"{out} cannot be written to ({problem.strerror}): name another --out") from None
    busy = f"{out} is being trained by another process: wait for it, or name another --out"
    return only_writer(out, UserError(busy))


def make_run(recipe: Recipe, name: str, out: Path, device: str = "cpu") -> Run:
    """The model and optimiser of a phase, with random weights; in several processes, this one's part of them."""
    phase = recipe.phases[name]
    precision = phase.precision or recipe.precision
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    mesh = Mesh.of(recipe.layout(name), device) if dist.is_initialized() else None
    run = Run(out / name, recipe.config(name), recipe.optimizer, recipe.seed, dtype, device, mesh)
    if precision == "fp8":
        apply_fp8(run.model)
    if recipe.recompute:
        apply_recompute(run.model)
    if mesh is not None:
        run.team = Team(mesh, run.model, run.device)
    return run


def _run_phase(
    recipe: Recipe, name: str, before: str | None, data: Path, out: Path, options: Options
) -> None:
    phase, folder = recipe.phases[name], out / name
    if on_lead(lambda: (folder / "heldout.json").exists() and read_position(folder).done):
        return
    stream = open_stream(
        data, phase.mixture, recipe.seed + list(recipe.phases).index(name), phase.sequence_length
    )
    run = make_run(recipe, name, out, options.device)
    if stream.vocab_size > run.model.config.vocab_size:
        raise UserError(
            f"{data} has {stream.vocab_size:,} words, but the model knows {run.model.config.vocab_size:,}: build the "
            "data by this recipe"
        )
    granule = recipe.layout(name).granule(phase.microbatch)
    schedule = plan(phase, stream.tokens_per_epoch, options.scale, granule)
    if on_lead(run.saved):
        run.resume()
    elif before is not None:
        run.follow(out / before, phase.fresh_moments)
    elif options.init is not None:
        run.start_from(options.init)
    if run.position.tokens < schedule.tokens:
        say(
            f"{name}: {schedule.tokens - run.position.tokens:,} of {schedule.tokens:,} tokens to go, "
            f"{run.model.config.num_hidden_layers} layers, sequences of {phase.sequence_length}"
            + ("" if run.team is None else f", {run.team.layout}")
        )
        if options.compile:
            compile_model(run.model)
        with MetricsLog(folder, run.position.step) if leads() else nullcontext() as log:
            loop = Loop(
                run,
                schedule,
                stream,
                phase.microbatch,
                recipe.optimizer.clip,
                options.save_every,
                _flops_share(run, phase),
                recipe.stop,
            )
            train(loop, log)
    waiting("pictures and held-out text")
    on_lead(lambda: _report(recipe, name, run, data, out))


def _report(recipe: Recipe, name: str, run: Run, data: Path, out: Path) -> None:
    """Pictures of a phase, and how well its model reads what it has not seen."""
    phase, folder = recipe.phases[name], out / name
    if importlib.util.find_spec("matplotlib") is None:
        say("no pictures: matplotlib is not installed (pip install 'dsv3[train]')")
    else:
        plot_run(folder / FILE, folder / "plots")
    model: Transformer = run.model
    if run.team is not None:  # of which this process has a part
        model = trained_model(run.model.config, folder).to(device=run.device, dtype=run.dtype)
    windows = sorted({min(512, phase.sequence_length), phase.sequence_length})
    report = {str(window): bits_per_byte(model, data, window) for window in windows}
    _write_json(folder / "heldout.json", report)
    for window, kinds in report.items():
        said = ", ".join(f"{kind} {bits:.3f}" for kind, bits in kinds.items())
        if said:
            say(f"{name}: bits per byte of held-out text, {window} tokens at a time: {said}")


def _flops_share(run: Run, phase: Phase) -> FlopsShare:
    peak = measure_matmul_rate(run.device, run.dtype) * (1 if run.team is None else run.team.layout.world)
    flops = [model_flops_per_token(run.model.config, phase.sequence_length, mtp) for mtp in (False, True)]
    return lambda rate, mtp: rate * flops[mtp] / peak


def export(recipe: Recipe, phase: str, data: Path, out: Path, folder: Path) -> Path:
    """Write what a phase ended with as a checkpoint folder: weights, tokenizer, and how to sample from it."""
    config = recipe.config(phase)
    model = trained_model(config, out / phase, recipe.export.average)
    with staged(folder) as new:
        model.save_pretrained(new, recipe.export.format)
        shutil.copyfile(data / "tokenizer.json", new / "tokenizer.json")
        tokenizer = read_json(data / "tokenizer_config.json", UserError)
        _write_json(
            new / "tokenizer_config.json", tokenizer | {"model_max_length": config.max_position_embeddings}
        )
        sampling = {
            "bos_token_id": config.inert.get("bos_token_id", 0),
            "eos_token_id": config.eos_token_id,
            "do_sample": True,
            "temperature": recipe.export.temperature,
            "top_p": recipe.export.top_p,
        }
        _write_json(new / "generation_config.json", sampling)
    say(f"the model is in {folder}: dsv3 chat {folder}")
    return folder


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_whole(path, json.dumps(values, ensure_ascii=False, indent=2, default=str) + "\n")


def say(text: str) -> None:
    """Tell whoever watches; one process speaks for all."""
    if leads():
        print(text, file=sys.stderr, flush=True)
