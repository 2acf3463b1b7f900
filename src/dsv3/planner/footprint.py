"""What each device of a training run holds in its memory, part by part.

Weights are in bf16, gradients and masters in float32, moments as the recipe says. Weights, gradients and what is left
for the backward pass belong to the stages and experts that a device holds; masters and moments are divided over all
that hold the same numbers (ZeRO-1), which for experts are few: V3's lie on 2 groups of 64, twice each with DualPipe.

What a microbatch leaves behind is counted tensor by tensor, as `dsv3.train` keeps it: with recomputation (report,
section 3.2.3) neither norms' outputs nor queries, keys and values; with FP8 (3.3.3) inputs of products in one byte,
those after attention in E5M6, and of SwiGLU its input alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3.planner.model import Stage, junction, layer, vocabulary
from dsv3.planner.pipeline import Schedule
from dsv3.planner.pipeline import held as stages_of
from dsv3.planner.roofline import Roofline
from dsv3.planner.simulate import peak_activations

_LOGITS = 2**31  # bytes: the loss makes logits a piece at a time, of no more than that


@dataclass(frozen=True)
class Held:
    """Parameters that a device has, and how many others have the same ones, itself included."""

    dense: float
    experts: float
    dense_copies: int
    expert_copies: int

    @property
    def all(self) -> float:
        return self.dense + self.experts

    def share(self, sharding: str) -> float:
        """Parameters whose masters and moments it keeps."""
        if sharding == "none":
            return self.all
        return self.dense / self.dense_copies + self.experts / self.expert_copies


def held(roof: Roofline, cut_up: Sequence[Stage]) -> list[Held]:
    """What a device at each place of the pipeline holds."""
    config, layout = roof.config, roof.layout
    mirrored = 2 if layout.schedule == "dualpipe" and layout.pipeline > 1 else 1
    places = []
    for mine in _stages(roof, cut_up):
        dense = experts = 0.0
        for stage in mine:
            for index in stage.layers:
                each = layer(config, index)
                dense += each.replicated
                experts += each.experts / layout.expert
            dense += stage.modules * junction(config)
        # MTP modules look tokens up too; who has both ends has the embedding once, and one matrix where it is tied.
        embedding, head = any(s.first or s.modules for s in mine), any(s.last for s in mine)
        dense += vocabulary(config) * (
            (embedding or head) if config.tie_word_embeddings else embedding + head
        )
        flat = layout.data * layout.context
        places.append(Held(dense, experts, flat * mirrored, layout.replicas * mirrored))
    return places


def _stages(roof: Roofline, cut_up: Sequence[Stage]) -> list[list[Stage]]:
    """The stages of each place of the pipeline."""
    devices, schedule = roof.layout.pipeline, roof.layout.schedule
    return [[cut_up[s] for s in stages_of(schedule, d, devices, len(cut_up))] for d in range(devices)]


def kept(roof: Roofline, moe: bool) -> float:
    """Bytes that a token leaves in a layer for the backward pass."""
    config, number, context = roof.config, roof.number, roof.layout.context
    heads, hidden = config.num_attention_heads, config.hidden_size
    wide = 4 if roof.precision == "fp32" else 2
    latents = (config.q_lora_rank or 0) + config.latent_dim
    out = heads * config.v_head_dim
    # Both residual sums, the input of the down-projections and what comes out, attention's output and its log-sums.
    total = (2 * wide + number) * hidden + wide * latents + (1.5 if roof.fp8 else wide) * out + 4 * heads
    if not roof.recompute:
        norms = hidden + latents
        keys = heads * (config.qk_head_dim + config.v_head_dim)
        total += wide * (norms + heads * config.qk_head_dim + context * keys)
    rows, width, gate = 1, config.intermediate_size, 0
    if moe:
        rows, width = (
            config.num_experts_per_tok + (config.n_shared_experts or 0),
            config.moe_intermediate_size,
        )
        gate = 4 * (config.n_routed_experts or 0)
    # A feed-forward's input, SwiGLU's input, and its output, which FP8 layers compute again.
    return total + rows * number * (hidden + (2 if roof.fp8 else 3) * width) + gate


def standing(roof: Roofline, cut_up: Sequence[Stage], moment: int) -> list[dict[str, float]]:
    """Bytes by part of each place of the pipeline, but for what microbatches leave behind.

    moment: bytes of a number of the optimiser's two moments.
    """
    layout, weight = roof.layout, 4 if roof.precision == "fp32" else 2
    places = []
    for mine, stages_here in zip(held(roof, cut_up), _stages(roof, cut_up), strict=True):
        share = mine.share(layout.sharding)
        logits = roof.tokens * roof.config.vocab_size * 4 if any(s.last for s in stages_here) else 0.0
        places.append(
            {
                "weights": weight * mine.all,
                "gradients": 4.0 * mine.all,
                "masters": 4.0 * share,
                "moments": 2.0 * moment * share,
                "logits": min(logits, _LOGITS),
                "buffers": roof.assumed.buffers * roof.hardware.memory,
            }
        )
    return places


def footprint(
    roof: Roofline, cut_up: Sequence[Stage], schedule: Schedule | None, moment: int
) -> tuple[dict[str, float], ...]:
    """Bytes by part of each place of the pipeline; moment: as `standing` takes it."""
    each = {moe: roof.tokens * kept(roof, moe) for moe in (False, True)}
    sizes = [sum(each[roof.config.is_moe_layer(i)] for i in stage.layers) for stage in cut_up]
    peaks = [float(sizes[0])] if schedule is None else peak_activations(schedule, "W", sizes)
    places = zip(standing(roof, cut_up, moment), peaks, strict=True)
    return tuple(parts | {"activations": peak} for parts, peak in places)
