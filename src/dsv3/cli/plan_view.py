"""How `dsv3 plan` shows what it found: sections for a terminal, and the same facts for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dsv3.cli.tables import grid, noted, table
from dsv3.errors import size
from dsv3.figures import amount

if TYPE_CHECKING:
    from dsv3.planner.assumptions import Assumption
    from dsv3.planner.experts import Placement
    from dsv3.planner.fit import Machine, Option
    from dsv3.planner.hardware import Hardware
    from dsv3.planner.serving import ServingPlan, Unit
    from dsv3.planner.training import Candidate, RecipePlan, TrainingPlan
    from dsv3.recipe import Layout

Shown = tuple[Sequence[RenderableType], dict[str, Any]]
"""Sections, and facts."""


# ---------------------------------------- training


def training(name: str, planned: TrainingPlan, how: str, tokens: float) -> Shown:
    """One step and its bill; how: where the layout is from."""
    facts = {"config": name} | _training_facts(planned) | {"tokens": tokens}
    facts |= {"gpu_hours": planned.gpu_hours(tokens), "dollars": planned.dollars(tokens)}
    return [*_step(name, planned, how), _bill(planned, tokens), _assumed(planned.assumptions)], facts


def recipe(name: str, whole: RecipePlan, how: str) -> Shown:
    """All phases, and the first in detail."""
    first = whole.phases[0]
    facts = {
        "config": name,
        "phases": [
            {
                "name": p.name,
                "tokens": p.tokens,
                "gpu_hours": p.gpu_hours,
                "dollars": p.dollars,
                "days": p.days,
            }
            | _training_facts(p.plan)
            for p in whole.phases
        ],
        "skipped": whole.skipped,
        "gpu_hours": whole.gpu_hours,
        "dollars": whole.dollars,
    }
    shown = [*_step(f"{name}, {first.name}", first.plan, how), _phases(whole), _assumed(whole.assumptions)]
    return shown, facts


def layouts(name: str, hardware: Hardware, gpus: int, candidates: Sequence[Candidate]) -> Shown:
    """The best layouts, and why the others fail."""
    facts = {
        "config": name,
        "hardware": dataclasses.asdict(hardware),
        "gpus": gpus,
        "layouts": [
            {"layout": dataclasses.asdict(c.layout), "microbatch": c.microbatch, "reason": c.reason}
            | ({} if c.plan is None else _numbers(c.plan))
            for c in candidates
        ],
    }
    good = [(_described(c.layout, c.microbatch), c.plan) for c in candidates if c.plan and not c.reason]
    failed = [c for c in candidates if c.reason]
    shown: list[RenderableType] = []
    made = table(f"Layouts of {name} on {gpus:,} {hardware.name}", "", "tokens/s/GPU", "MFU", "memory")
    for layout, planned in good[:10]:
        speed = f"{planned.tokens_per_second_per_gpu:,.0f}"
        made.add_row(layout, speed, f"{planned.mfu:.1%}", size(planned.peak_memory))
    note = f"{len(good):,} of {len(candidates):,} fit." + (f" {_batch(good[0][1])}." if good else "")
    shown.append(noted(made, note))
    if failed:
        others = table("Some that do not", "", "why")
        others.columns[1].justify = "left"
        rows = dict.fromkeys((_described(c.layout, c.microbatch), c.reason) for c in failed)
        for row in list(rows)[:5]:
            others.add_row(*row)
        shown.append(others)
    if good:
        shown.append(_assumed(good[0][1].assumptions))
    return shown, facts


def _training_facts(planned: TrainingPlan) -> dict[str, Any]:
    same = (
        "sequence_length", "batch", "microbatch", "microbatches", "precision", "memory", "host_memory",
        "flops_per_token", "traffic", "forward_time", "backward_time", "pair_time", "step_time",
    )  # fmt: skip
    return {
        "hardware": dataclasses.asdict(planned.hardware),
        "layout": dataclasses.asdict(planned.layout),
        **{name: getattr(planned, name) for name in same},
        "bubble": None if planned.timeline is None else planned.timeline.idle,
        **_numbers(planned),
        "assumptions": _listed(planned.assumptions),
    }


def _numbers(planned: TrainingPlan) -> dict[str, Any]:
    return {
        "fits": planned.fits,
        "peak_memory": planned.peak_memory,
        "seconds_per_step": planned.seconds_per_step,
        "tokens_per_second": planned.tokens_per_second,
        "tokens_per_second_per_gpu": planned.tokens_per_second_per_gpu,
        "flops_per_second_per_gpu": planned.flops_per_second,
        "mfu": planned.mfu,
        "gpu_hours_per_trillion": planned.gpu_hours(1e12),
    }


def _listed(assumptions: Iterable[Assumption]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(assumption) for assumption in assumptions]


def _step(name: str, planned: TrainingPlan, how: str) -> list[RenderableType]:
    return [_setting(name, planned, how), _memory(planned), *_times(planned), _traffic(planned)]


def _batch(planned: TrainingPlan) -> str:
    return f"{planned.batch:,} sequences of {planned.sequence_length:,} tokens, {planned.precision}"


def _described(layout: Layout, microbatch: int = 1) -> str:
    """A layout as `--layout` reads it, what differs from a single process; and the microbatch unless it is 1."""
    fields = [f for f in dataclasses.fields(layout) if getattr(layout, f.name) != f.default]
    text = ", ".join(f"{f.name}={getattr(layout, f.name)}" for f in fields) or "data=1"
    return text if microbatch == 1 else f"{text}; microbatch {microbatch}"


def _setting(name: str, planned: TrainingPlan, how: str) -> Table:
    rows = {
        "hardware": f"{planned.gpus:,} x {planned.hardware.title}",
        "layout": f"{_described(planned.layout)} ({how})",
        "step": _batch(planned),
    }
    if planned.microbatches > 1:
        each = "1 sequence" if planned.microbatch == 1 else f"{planned.microbatch} sequences"
        rows["microbatches"] = f"{planned.microbatches:,} of {each} on each GPU"
    return grid(f"Training {name}", rows)


def _memory(planned: TrainingPlan) -> RenderableType:
    """Of the fullest and the emptiest place of the pipeline."""
    order = sorted(range(len(planned.memory)), key=lambda i: -sum(planned.memory[i].values()))
    places = {"fullest": order[0], "emptiest": order[-1]} if len(order) > 1 else {"": 0}
    heads = [f"{which}, place {place}" if which else "" for which, place in places.items()]
    made = table("Memory of a GPU", "", *heads)
    for part in dict.fromkeys(part for place in places.values() for part in planned.memory[place]):
        made.add_row(part, *(_size(planned.memory[place].get(part, 0.0)) for place in places.values()))
    together = (size(sum(planned.memory[place].values())) for place in places.values())
    _total(made, *together)
    room = planned.hardware.memory
    verdict = "it fits" if planned.fits else f"{size(planned.peak_memory - room)} too much"
    note = f"{planned.hardware.name} has {size(room)}: {verdict}."
    if planned.host_memory:
        note += f" And {size(planned.host_memory)} of main memory per GPU for the moving average."
    return noted(made, note)


def _total(made: Table, *cells: str) -> None:
    if made.rows:
        made.rows[-1].end_section = True
    made.add_row("together", *cells, style="bold")


def _times(planned: TrainingPlan) -> Iterable[RenderableType]:
    forward, backward = planned.forward_time, planned.backward_time
    if forward:
        made = table("Time of a microbatch in a stage, ms", "", "forward", "backward")
        for part in dict.fromkeys([*forward, *backward]):
            made.add_row(part, *(f"{1e3 * times.get(part, 0.0):,.2f}" for times in (forward, backward)))
        _total(made, *(f"{1e3 * sum(times.values()):,.2f}" for times in (forward, backward)))
        pair = f"One forward and another's backward interwoven: {1e3 * planned.pair_time:,.2f} ms."
        yield noted(made, pair if planned.pair_time else "")
    made = table("Time of a step", "", "seconds", "share")
    for part, seconds in planned.step_time.items():
        made.add_row(part, f"{seconds:,.3f}", f"{seconds / planned.seconds_per_step:.1%}")
    _total(made, f"{planned.seconds_per_step:,.3f}", "")
    idle = 0.0 if planned.timeline is None else planned.timeline.idle
    yield noted(
        made, f"While the pipeline runs, GPUs are idle for {idle:.1%} of the time on average." if idle else ""
    )


def _traffic(planned: TrainingPlan) -> Table:
    links = list(dict.fromkeys(link for by_link in planned.traffic.values() for link in by_link))
    made = table("Sent by a GPU, per token of its own", "", *links)
    for what, by_link in planned.traffic.items():
        made.add_row(what, *(_size(by_link.get(link, 0.0)) for link in links))
    return made


def _size(value: float) -> str:
    return size(value) if value else "-"


def _bill(planned: TrainingPlan, tokens: float) -> Table:
    per_gpu = f"{planned.tokens_per_second_per_gpu:,.0f} per GPU"
    days = tokens / planned.tokens_per_second / 86400
    rows = {
        "tokens per second": f"{planned.tokens_per_second:,.0f}, {per_gpu}",
        "FLOP/s per GPU": f"{planned.flops_per_second / 1e12:,.0f}T of the model's own, {planned.mfu:.1%} of the "
        "bf16 peak (MFU)",
        f"{amount(tokens)} tokens": f"{planned.gpu_hours(tokens):,.0f} GPU hours, {days:,.1f} days",
        "price": f"${planned.dollars(tokens):,.0f} at ${planned.hardware.dollars_per_hour:g} per GPU hour",
    }
    return grid("The bill", rows)


def _phases(whole: RecipePlan) -> RenderableType:
    made = table("All phases", "", "tokens", "tokens/s/GPU", "memory", "days", "GPU hours", "price")
    for phase in whole.phases:
        made.add_row(
            phase.name,
            amount(phase.tokens),
            f"{phase.plan.tokens_per_second_per_gpu:,.0f}",
            size(phase.plan.peak_memory) + ("" if phase.plan.fits else ", too much"),
            f"{phase.days:,.1f}",
            f"{phase.gpu_hours / 1e3:,.1f}K",
            f"${phase.dollars:,.0f}",
        )
    days = sum(phase.days for phase in whole.phases)
    _total(made, "", "", "", f"{days:,.1f}", f"{whole.gpu_hours / 1e3:,.1f}K", f"${whole.dollars:,.0f}")
    return noted(made, "\n".join(f"{phase} is left out: {why}" for phase, why in whole.skipped.items()))


def _assumed(assumptions: Iterable[Assumption]) -> Table:
    made = table("Assumed", "", "", "from")
    made.columns[2].justify = "left"
    for a in assumptions:
        made.add_row(a.name, _figure(a.value, a.unit), a.source)
    return made


def _figure(value: float, unit: str) -> str:
    """A number of any size as one reads it: 0.58, 4 us, 3.0 GB/s."""
    if unit == "bytes/s":
        return f"{size(value)}/s"
    if unit == "s" and value < 1:
        return f"{1e6 * value:,.3g} us" if value < 1e-4 else f"{1e3 * value:,.3g} ms"
    plain = f"{value:,.4g}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.3g}"
    return f"{plain} {unit}".strip()


# ---------------------------------------- serving


def serving(name: str, planned: ServingPlan) -> Shown:
    """Units, their memory and time, and what they give."""
    facts = {
        "config": name,
        "hardware": dataclasses.asdict(planned.hardware),
        **{unit.work: _unit_facts(unit) for unit in planned.units},
        "input_tokens_per_second_with_hits": planned.input_per_second,
        "dollars_per_million_input": planned.dollars_per_million_input,
        "dollars_per_million_output": planned.dollars_per_million_output,
        "assumptions": _listed(planned.assumptions),
    }
    shown = [_units(name, planned), _unit_memory(planned), _unit_time(planned), _served(planned)]
    return [*shown, _assumed(planned.assumptions)], facts


def _unit_facts(unit: Unit) -> dict[str, Any]:
    own = {f.name: getattr(unit, f.name) for f in dataclasses.fields(unit) if f.name != "hardware"}
    return own | {
        "seconds_per_step": unit.step,
        "tokens_per_second_per_node": unit.tokens_per_second,
        "tokens_per_second_per_user": unit.tokens_per_user,
        "dollars_per_million": unit.dollars_per_million,
    }


def _units(name: str, planned: ServingPlan) -> Table:
    rows = {"hardware": planned.hardware.title}
    for unit in planned.units:
        nodes = f" on {unit.nodes} nodes" if unit.nodes > 1 else ""
        experts = f", {unit.experts} routed experts of a layer on each" if unit.experts else ""
        copies = f" ({unit.redundant} are copies)" if unit.redundant else ""
        rows[f"{unit.work} unit"] = f"{unit.gpus} GPU{'s' * (unit.gpus > 1)}{nodes}{experts}{copies}"
    return grid(f"Serving {name}", rows)


def _unit_memory(planned: ServingPlan) -> Table:
    made = table("Memory of a GPU", "", *(unit.work for unit in planned.units))
    for part in planned.prefill.memory:
        made.add_row(part, *(size(unit.memory[part]) for unit in planned.units))
    made.rows[-1].end_section = True
    made.add_row("cache", *(size(unit.cache) for unit in planned.units))
    made.add_row("in tokens", *(f"{unit.cache_tokens:,}" for unit in planned.units), style="bold")
    return made


def _unit_time(planned: ServingPlan) -> RenderableType:
    made = table("Time of a step, ms", "", *(unit.work for unit in planned.units))
    for part in planned.prefill.time:
        made.add_row(part, *(f"{1e3 * unit.time[part]:,.1f}" for unit in planned.units))
    _total(made, *(f"{1e3 * unit.step:,.1f}" for unit in planned.units))
    prefill, decode = planned.units
    return noted(
        made,
        f"Prefill: {prefill.batch:,} tokens on each GPU, of prompts of {prefill.length:,}.\nDecode: {decode.batch:,} "
        f"answers under way on each GPU, {decode.length:,} tokens of cache each.",
    )


def _served(planned: ServingPlan) -> RenderableType:
    decode, hits = planned.decode, planned.assumed.hits
    found = f" ({planned.input_per_second:,.0f} with the {hits:.0%} found in the cache)" if hits else ""
    rows = {
        "input": f"{planned.prefill.tokens_per_second:,.0f} tokens/s per node{found}",
        "output": f"{decode.tokens_per_second:,.0f} tokens/s per node; {decode.tokens_per_user:,.1f} per user, one in "
        f"{1e3 / decode.tokens_per_user:,.3g} ms",
        "price of input": f"${planned.dollars_per_million_input:.3f} per million tokens",
        "price of output": f"${planned.dollars_per_million_output:.3f} per million tokens",
    }
    made = grid("At full load", rows)
    hardware = planned.hardware
    gpus = f"{hardware.gpus_per_node} GPUs" if hardware.gpus_per_node > 1 else "1 GPU"
    return noted(made, f"A node is {gpus} at ${hardware.dollars_per_hour:g} an hour each.")


# ---------------------------------------- one machine


def fitting(name: str, machine: Machine, options: Sequence[Option]) -> Shown:
    """Formats, where their parts go, how fast they are, and what runs them."""
    from dsv3.planner.fit import assumptions, best

    chosen = best(options)
    gpus = "no GPU" if machine.gpu is None else f"{machine.gpus} x {machine.gpu.title}"
    about = f"{name} on {gpus}, {size(machine.ram)} of RAM at {size(machine.ram_bandwidth)}/s"
    made = table(about, "", "size", "GPU", "RAM", "disk", "context", "tokens/s", "prompt/s")
    programs = table("What runs it today", "", "program")
    programs.columns[1].justify = "left"
    scale, unit = (1e9, "GB") if options[0].size > 1e9 else (1e6, "MB")
    for option in options:
        made.add_row(option.format, *_cells(option, scale), style="bold" if option is chosen else "")
        names = ", ".join(option.programs) or "none that we know splits it so"
        programs.add_row(option.format, names if option.context else "it does not fit")
    sizes = noted(
        made, f"Sizes in {unit}. prompt/s: tokens per second of reading a prompt of 2,048, at most."
    )
    runs = noted(
        programs,
        "dsv3: bf16 in RAM or on one GPU; packed as `dsv3 convert` does it without a GPU, with --memory from disk, too.",
    )
    verdict = "Nothing stays in memory: what is read from disk for each token is slow."
    if chosen is not None:
        verdict = (
            f"The largest that stays in memory is {chosen.format}: about {_speed(chosen.tokens_per_second)} tokens/s "
            f"with {chosen.context:,} tokens of context, in {chosen.programs[0]}."
        )
    facts = {
        "config": name,
        "machine": dataclasses.asdict(machine),
        "options": [dataclasses.asdict(option) | {"stays_in_memory": option.runs} for option in options],
        "best": None if chosen is None else chosen.format,
        "assumptions": _listed(assumptions()),
    }
    return [sizes, Text(verdict), runs, _assumed(assumptions())], facts


def _cells(option: Option, scale: float) -> Iterable[str]:
    for part in (option.size, option.on_gpu, option.in_ram, option.on_disk):
        yield f"{part / scale:,.1f}" if part else "-"
    yield f"{option.context:,}" if option.context else "-"
    for speed in (option.tokens_per_second, option.prompt_tokens_per_second):
        yield _speed(speed) if speed else "-"


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}" if value >= 1 else f"{value:.2f}"


# ---------------------------------------- experts


def experts(name: str, layers: Sequence[int], placed: Placement) -> Shown:
    """How loaded the busiest GPU is, before and after."""
    gpus, slots = placed.slots.shape[1:]
    facts = {"config": name, "gpus": gpus, "nodes": placed.nodes, "layers": list(layers)} | placed.to_dict()
    made = table(f"Experts of {name} on {gpus} GPUs", "layer", "in order", "balanced", "replicas")
    for i, layer in enumerate(layers):
        before, after, most = placed.balance_before[i], placed.balance[i], placed.replicas[i].max()
        made.add_row(str(layer), f"{before:.2f}", f"{after:.2f}", f"{most}")
    made.rows[-1].end_section = True
    means = placed.balance_before.mean(), placed.balance.mean()
    made.add_row("mean", *(f"{value:.2f}" for value in means), "", style="bold")
    where = "whole groups of experts on each node" if placed.hierarchical else "over all GPUs alike"
    note = (
        "The busiest GPU's load over the mean; 1 is perfect. replicas: of the expert that has most.\n"
        f"Each GPU holds {slots} of a layer, laid {where}."
    )
    return [noted(made, note)], facts
