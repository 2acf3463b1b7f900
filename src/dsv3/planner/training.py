"""What training a model costs: memory of each GPU, time of a step, GPU hours and dollars, from first principles.

A step is built up from its parts. Kernels of a layer take what their arithmetic or their bytes take
(`dsv3.planner.roofline`); the layers of a stage add up to its forward pass (F) and the two halves of its backward pass
(I, W). Tokens that travel to experts and back hold up whoever waits for them, unless the schedule runs a forward and a
backward interwoven: then nearly all of it is hidden behind computing, which goes slower, since some of the
multiprocessors move tokens. The schedule itself is simulated (`dsv3.planner.simulate`), so bubbles come out and are not
put in. At the end of a step gradients are added up, each GPU updates its share, and weights are given back.

Memory follows from what is held: weights and gradients of a GPU's stages and experts, its share of masters and moments,
and what microbatches under way have left for the backward pass, tensor by tensor. Experts' rows are counted at their
mean there, since loads even out over the many microbatches and layers that are held at once.

Not modelled: failures and restarts, evaluation, writing checkpoints, reading data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dsv3.config import ModelConfig
from dsv3.errors import size
from dsv3.planner.assumptions import Assumption, listed
from dsv3.planner.footprint import Held, footprint, held, standing
from dsv3.planner.hardware import Hardware
from dsv3.planner.model import Stage, stages, training_flops
from dsv3.planner.pipeline import Schedule, schedule_of
from dsv3.planner.roofline import SOURCES, UNITS, Assumptions, Roofline
from dsv3.planner.simulate import Costs, Timeline, simulate
from dsv3.recipe import Recipe, RecipeError
from dsv3.recipe.layout import Layout, ScheduleName
from dsv3.recipe.train import Plan, plan

__all__ = [
    "Assumptions",
    "Candidate",
    "PhasePlan",
    "RecipePlan",
    "TrainingPlan",
    "plan_recipe",
    "plan_training",
    "search",
]


@dataclass(frozen=True)
class TrainingPlan:
    """One optimiser step of a model on a cluster, and what follows from it. Seconds, bytes, dollars."""

    config: ModelConfig
    hardware: Hardware
    layout: Layout
    sequence_length: int
    batch: int
    """Sequences per step."""
    microbatch: int
    """Sequences of a microbatch."""
    precision: str
    recompute: bool
    mtp: bool
    microbatches: int
    """That go through each pipeline in one step."""
    memory: tuple[dict[str, float], ...]
    """Bytes by part, for each place of the pipeline."""
    host_memory: float
    """Bytes of main memory per GPU: the moving average of the weights."""
    flops_per_token: float
    """FLOPs of the model per token, forward and backward, recomputation not counted, attention causal."""
    traffic: dict[str, dict[str, float]]
    """Bytes that a GPU sends per token of its own, by what for and link ("nvlink", "network")."""
    forward_time: dict[str, float]
    """Seconds by part of one microbatch forward through a middle stage."""
    backward_time: dict[str, float]
    """The same backward, both halves."""
    pair_time: float
    """Seconds of a middle stage's forward and another's backward interwoven; 0 where the schedule has no pairs."""
    step_time: dict[str, float]
    """Seconds of a step by part: work, bubble, reduction, optimiser ..."""
    timeline: Timeline | None
    """The simulated schedule; None without a pipeline."""
    assumptions: tuple[Assumption, ...]

    @property
    def gpus(self) -> int:
        return self.layout.world

    @property
    def peak_memory(self) -> float:
        """Bytes of the fullest GPU."""
        return max(sum(parts.values()) for parts in self.memory)

    @property
    def fits(self) -> bool:
        return self.peak_memory <= self.hardware.memory

    @property
    def seconds_per_step(self) -> float:
        return sum(self.step_time.values())

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.sequence_length

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.tokens_per_step / self.seconds_per_step

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens_per_second / self.gpus

    @property
    def flops_per_second(self) -> float:
        """Model FLOP/s of one GPU."""
        return self.flops_per_token * self.tokens_per_second_per_gpu

    @property
    def mfu(self) -> float:
        """Model FLOP/s over the peak in bf16, as is usual also where products are in FP8."""
        return self.flops_per_second / self.hardware.bf16_flops

    def gpu_hours(self, tokens: float = 1e12) -> float:
        """GPU hours for so many tokens."""
        return tokens / self.tokens_per_second_per_gpu / 3600

    def dollars(self, tokens: float = 1e12) -> float:
        return self.gpu_hours(tokens) * self.hardware.dollars_per_hour


@dataclass(frozen=True)
class PhasePlan:
    """A phase of a recipe: its steady state and its totals."""

    name: str
    tokens: float
    gpu_hours: float
    dollars: float
    days: float
    plan: TrainingPlan
    """With the largest batch of the phase."""


@dataclass(frozen=True)
class RecipePlan:
    """All phases of a recipe."""

    phases: tuple[PhasePlan, ...]
    skipped: dict[str, str]
    """Phases that cannot be planned, with the reason."""

    @property
    def gpu_hours(self) -> float:
        return sum(phase.gpu_hours for phase in self.phases)

    @property
    def dollars(self) -> float:
        return sum(phase.dollars for phase in self.phases)

    @property
    def assumptions(self) -> tuple[Assumption, ...]:
        return self.phases[0].plan.assumptions


@dataclass(frozen=True)
class Candidate:
    """A layout that was looked at; `reason` says why it is no plan, and is empty for one that is."""

    layout: Layout
    microbatch: int
    plan: TrainingPlan | None
    reason: str


# A step ------------------------------------------------------------------------------------------------------


def plan_training(
    config: ModelConfig,
    hardware: Hardware,
    layout: Layout,
    *,
    sequence_length: int = 4096,
    batch: int,
    microbatch: int = 1,
    precision: str = "bf16",
    recompute: bool = True,
    mtp: bool = True,
    moments: str = "bf16",
    ema: bool = False,
    gpus_per_node: int | None = None,
    overlap: bool | None = None,
    assumed: Assumptions | None = None,
) -> TrainingPlan:
    """One step of so many sequences.

    mtp: whether the MTP modules are run. overlap: whether tokens travel while another microbatch computes; by
    default where the schedule runs pairs, as dsv3 does. (Megatron does so with its interleaved schedule too.)
    Raises RecipeError where the layout does not go with the model, the batch or the machines.
    """
    if gpus_per_node is not None:
        hardware = replace(hardware, gpus_per_node=gpus_per_node)
    size_of_work = sequence_length, microbatch, precision, recompute
    roof = Roofline(config, hardware, layout, assumed or Assumptions(), *size_of_work)
    microbatches = _microbatches(roof, batch)
    cut_up = stages(config, layout.stages, mtp)
    schedule = _schedule(layout, microbatches)
    memory = footprint(roof, cut_up, schedule, 4 if moments == "fp32" else 2)
    paired = schedule is not None and schedule.name.startswith("dualpipe")
    times = _Times(roof, cut_up, paired if overlap is None else overlap, paired)
    timeline = None
    if schedule is None:
        step = {"microbatches": microbatches * (times.forward[0] + times.input[0] + times.weight[0])}
    else:
        link = "nvlink" if layout.world <= hardware.gpus_per_node else "network"
        hop = roof.tokens * config.hidden_size * 2 / roof.link(link)
        pairs = times.pairs if paired else None
        timeline = simulate(schedule, Costs(times.forward, times.input, times.weight, pairs, hop))
        bubble = min(timeline.bubble)
        step = {"pipeline": timeline.makespan - bubble, "bubble": bubble}
    middle = len(cut_up) // 2
    work = times.works[middle]
    return TrainingPlan(
        config=config,
        hardware=hardware,
        layout=layout,
        sequence_length=sequence_length,
        batch=batch,
        microbatch=microbatch,
        precision=precision,
        recompute=recompute,
        mtp=mtp,
        microbatches=microbatches,
        memory=memory,
        host_memory=max(parts["masters"] for parts in memory) if ema else 0.0,
        flops_per_token=training_flops(config, sequence_length, mtp),
        traffic=_traffic(roof, cut_up),
        forward_time=work.forward | _named(work.travel[0]),
        backward_time=_added(work.input, work.weight) | _named(work.travel[1]),
        pair_time=times.pairs[middle] if paired else 0.0,
        step_time=step | _update(roof, cut_up, memory),
        timeline=timeline,
        assumptions=listed(roof.assumed, SOURCES, UNITS),
    )


def _microbatches(roof: Roofline, batch: int) -> int:
    """Check that a layout goes with a model and a batch; how many microbatches go through each pipeline."""
    layout, per_node = roof.layout, roof.hardware.gpus_per_node
    layout.check_model(roof.config)
    if layout.sharding == "fsdp":
        raise RecipeError("sharding is fsdp: its memory and traffic are not planned here; plan with zero1")
    if layout.expert // layout.nodes > per_node:
        raise RecipeError(
            f"parallel.nodes is {layout.nodes}: {layout.expert} GPUs of an expert group are on at least "
            f"{-(-layout.expert // per_node)} nodes of {per_node}"
        )
    granule = layout.granule(roof.microbatch)
    if layout.pipeline == 1:
        granule *= roof.microbatch
    if batch < 1 or batch % granule:
        raise RecipeError(f"batch is {batch}: with this layout it must be a multiple of {granule}")
    return batch // (layout.data * roof.microbatch)


def _schedule(layout: Layout, microbatches: int) -> Schedule | None:
    return schedule_of(layout, microbatches) if layout.pipeline > 1 else None


class _Times:
    """Seconds of each stage: alone, and as one of a pair."""

    def __init__(self, roof: Roofline, cut_up: list[Stage], overlap: bool, paired: bool) -> None:
        self.works = [roof.work(stage) for stage in cut_up]
        beside = replace(roof, shared=any(sum(work.travel) for work in self.works))
        both = [beside.work(stage) for stage in cut_up] if overlap else self.works
        visible = 1 - roof.assumed.hidden
        self.pairs = [max(w.computing + visible * sum(w.travel), sum(w.travel)) for w in both]
        # Without pairs of its own, a schedule whose neighbours overlap has every pass as part of one.
        alone, left = (both, visible) if overlap and not paired else (self.works, 1.0)
        self.forward = [sum(w.forward.values()) + left * w.travel[0] for w in alone]
        self.input = [sum(w.input.values()) + left * w.travel[1] for w in alone]
        self.weight = [sum(w.weight.values()) for w in alone]


def _named(travel: float) -> dict[str, float]:
    return {"dispatch, combine": travel} if travel else {}


def _added(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {part: one.get(part, 0.0) + other.get(part, 0.0) for part in dict.fromkeys([*one, *other])}


def _update(roof: Roofline, cut_up: list[Stage], memory: tuple[dict[str, float], ...]) -> dict[str, float]:
    """Seconds at the end of a step: gradients added up, shares updated, weights given back. Nothing is hidden, as
    gradients are whole only with the last microbatch."""
    sharding = roof.layout.sharding
    places = held(roof, cut_up)
    moving = [_exchange(roof, mine) for mine in places]
    # Without shares, float32 gradients go both ways; with them, they go one way and bf16 weights the other.
    back = 4.0 if sharding == "none" else 2.0
    touched = max(
        _optimiser_bytes(parts, mine.share(sharding), 4 if roof.precision == "fp32" else 2)
        for parts, mine in zip(memory, places, strict=True)
    )
    parts = {
        "gradients added up": 4.0 * max(moving),
        "weights given back": back * max(moving),
        "update": touched / (roof.hardware.bandwidth * roof.assumed.elementwise),
    }
    return {part: seconds for part, seconds in parts.items() if seconds}


def _optimiser_bytes(memory: dict[str, float], share: float, weight: int) -> float:
    """What a device's optimiser reads and writes in a step. memory: bytes that it holds, by part; share: numbers that
    it updates, whose masters and moments it has; weight: bytes of one in the model.

    Gradients are read once for their norm, and again, clipped by it, for the update, which reads and writes masters and
    moments and writes the weights. Then gradients are set to zero, those of others' shares as well.
    """
    return (4 + 4 + weight) * share + 2 * (memory["masters"] + memory["moments"]) + memory["gradients"]


def _exchange(roof: Roofline, mine: Held) -> float:
    """Seconds per byte of a number, to scatter or gather all numbers of a device among those that have the same.

    Devices of one node that do add up among themselves first, so that each sends but its part to other nodes.
    """
    per_node, layout = roof.hardware.gpus_per_node, roof.layout
    flat = layout.data * layout.context
    near_dense, near_experts = min(flat, per_node), min(layout.replicas, max(1, per_node // layout.expert))
    seconds = 0.0
    for numbers, copies, near in (
        (mine.dense, mine.dense_copies, near_dense),
        (mine.experts, mine.expert_copies, near_experts),
    ):
        seconds += numbers * (1 - 1 / near) / roof.link("nvlink")
        seconds += numbers / near * (1 - near / copies) / roof.link("network") if copies > near else 0.0
    return seconds


def _traffic(roof: Roofline, cut_up: list[Stage]) -> dict[str, dict[str, float]]:
    """Bytes that a GPU sends per token that goes through it, forward and backward."""
    config, layout = roof.config, roof.layout
    layers = [index for stage in cut_up for index in stage.layers]
    moe = sum(config.is_moe_layer(index) for index in layers) / layout.pipeline
    sent = {what: {link: 2 * moe * n for link, n in by.items() if n} for what, by in roof.sent().items()}
    if layout.pipeline > 1:
        link = "nvlink" if layout.world <= roof.hardware.gpus_per_node else "network"
        sent["between stages"] = {link: 2 * 2 * config.hidden_size * layout.stages / layout.pipeline}
    if layout.context > 1:
        times = (2 + roof.recompute) * len(layers) / layout.pipeline
        sent["latents"] = {link: times * n for link, n in roof.latents().items()}
    return {what: by for what, by in sent.items() if by}


# A recipe ----------------------------------------------------------------------------------------------------


def plan_recipe(
    recipe: Recipe, hardware: Hardware, layout: Layout | None = None, tokens_per_epoch: int | None = None
) -> RecipePlan:
    """Plan all phases of a recipe; `layout` in place of the recipe's for all phases."""
    phases, skipped = [], {}
    for name, phase in recipe.phases.items():
        laid = layout or recipe.layout(name)
        try:
            curves = plan(phase, tokens_per_epoch, granule=laid.granule(phase.microbatch))
            phases.append(_phase(recipe, name, curves, hardware, laid))
        except RecipeError as problem:
            skipped[name] = str(problem)
    if not phases:
        raise RecipeError(f"{recipe.name}: no phase can be planned: {next(iter(skipped.values()))}")
    return RecipePlan(tuple(phases), skipped)


_SAMPLES = 24  # places in a phase at which the batch, and so the bubble, is looked at


def _phase(recipe: Recipe, name: str, curves: Plan, hardware: Hardware, layout: Layout) -> PhasePlan:
    phase = recipe.phases[name]

    def at(rows: int, mtp: bool) -> TrainingPlan:
        return plan_training(
            recipe.config(name),
            hardware,
            layout,
            sequence_length=phase.sequence_length,
            batch=rows,
            microbatch=phase.microbatch,
            precision=phase.precision or recipe.precision,
            recompute=recipe.recompute,
            mtp=mtp,
            moments=recipe.optimizer.moments,
            ema=recipe.optimizer.ema is not None,
        )

    places = [curves.tokens * (i + 0.5) / _SAMPLES for i in range(_SAMPLES)]
    kinds = Counter((curves.rows(tokens), curves.mtp(tokens) > 0) for tokens in places)
    plans = {kind: at(*kind) for kind in kinds}
    hours = sum(plans[kind].gpu_hours(curves.tokens * n / _SAMPLES) for kind, n in kinds.items())
    days = hours / layout.world / 24
    largest = plans[max(kinds)]
    return PhasePlan(name, curves.tokens, hours, hours * hardware.dollars_per_hour, days, largest)


# Search ------------------------------------------------------------------------------------------------------


def search(
    config: ModelConfig,
    hardware: Hardware,
    gpus: int,
    *,
    sequence_length: int = 4096,
    batch: int,
    precision: str = "bf16",
    recompute: bool = True,
    mtp: bool = True,
    assumed: Assumptions | None = None,
) -> list[Candidate]:
    """Layouts of so many GPUs, the fastest that fit first, then those that do not, with the reason.

    Degrees of pipeline and expert parallelism, the schedule and the microbatch are tried; masters and moments are
    divided (ZeRO-1), sequences whole. Takes seconds.
    """
    assumed = assumed or Assumptions()
    found = []
    for layout in _layouts(config, hardware, gpus, precision):
        for microbatch in (1, 2, 4):
            size_of_work = sequence_length, microbatch, precision, recompute
            reason = _refusal(Roofline(config, hardware, layout, assumed, *size_of_work), batch, mtp)
            planned = None
            if not reason:
                planned = plan_training(
                    config,
                    hardware,
                    layout,
                    sequence_length=sequence_length,
                    batch=batch,
                    microbatch=microbatch,
                    precision=precision,
                    recompute=recompute,
                    mtp=mtp,
                    assumed=assumed,
                )
            found.append(Candidate(layout, microbatch, planned, reason))
            if reason:
                break  # larger microbatches take more memory, and divide the batch no better
    return sorted(found, key=lambda c: -c.plan.tokens_per_second if c.plan is not None else 0.0)


def _refusal(roof: Roofline, batch: int, mtp: bool) -> str:
    """Why a layout is none, which is known before its schedule is simulated; empty where nothing is against it."""
    cut_up, room = stages(roof.config, roof.layout.stages, mtp), roof.hardware.memory
    least = max(sum(parts.values()) for parts in standing(roof, cut_up, 2)) - room
    if least > 0:
        return (
            f"takes {size(least)} more memory than {roof.hardware.name} has, for weights and optimiser alone"
        )
    try:
        schedule = _schedule(roof.layout, _microbatches(roof, batch))
    except RecipeError as problem:
        return str(problem)
    over = max(sum(parts.values()) for parts in footprint(roof, cut_up, schedule, 2)) - room
    return f"takes {size(over)} more memory than {roof.hardware.name} has" if over > 0 else ""


_SCHEDULES: tuple[ScheduleName, ...] = ("zb1p", "dualpipev", "dualpipe")


def _layouts(config: ModelConfig, hardware: Hardware, gpus: int, precision: str) -> Iterator[Layout]:
    experts, per_node = config.n_routed_experts or 1, hardware.gpus_per_node
    for pipeline in _divisors(gpus):
        flat = gpus // pipeline
        for expert in _divisors(flat):
            whole_node = flat % per_node == 0 and experts % per_node == 0
            if experts % expert or (whole_node and 1 < expert < per_node):
                continue  # a part of a node gains nothing over all of it
            for schedule in _SCHEDULES[: None if pipeline > 1 else 1]:
                if schedule == "dualpipe" and pipeline % 2:
                    continue
                layout = Layout(
                    pipeline=pipeline,
                    data=flat,
                    expert=expert,
                    nodes=_nodes(expert, per_node),
                    schedule=schedule,
                    dispatch="fp8" if precision == "fp8" and expert > 1 else "bf16",
                )
                if layout.stages <= 2 + config.num_hidden_layers + config.num_nextn_predict_layers:
                    yield layout


def _nodes(expert: int, per_node: int) -> int:
    """The fewest nodes that hold so many devices, all alike."""
    return next(n for n in range(-(-expert // per_node), expert + 1) if expert % n == 0)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
