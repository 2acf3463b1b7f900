"""How a model is trained, stage by stage, with every schedule a function of the tokens read so far.

Steps mean different things when the batch grows, and a recipe in steps cannot be scaled; tokens can. So a
`Schedule` is a list of pieces over tokens, each constant, linear or along a cosine, as the report tells them
(section 4.2): "kept constant until the model consumes 10T training tokens, then decays in 4.3T tokens
following a cosine curve":

    lr:
      - {for: 2000 steps, linear: [0, 2.2e-4]}
      - {until: 10T, constant: 2.2e-4}
      - {for: 4.3T, cosine: [2.2e-4, 2.2e-5]}
      - {for: 333B, constant: 2.2e-5}
      - {constant: 7.3e-6}

Where the report speaks of steps, so may a recipe; they become tokens when the recipe is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dsv3.recipe.fields import RecipeError, number
from dsv3.recipe.layout import Layout

Shape = Literal["constant", "linear", "cosine"]
Precision = Literal["bf16", "fp8", "fp32"]
"""Of the matrix products; masters are float32 always."""


@dataclass(frozen=True)
class Count:
    """A length of training: so many tokens, optimiser steps, or epochs of the stage's data."""

    value: float
    unit: Literal["tokens", "steps", "epochs"] = "tokens"

    @classmethod
    def parse(cls, value: Any, where: str) -> Count:
        """14.8T, 2000 steps, 2 epochs."""
        unit: Literal["tokens", "steps", "epochs"] = "tokens"
        match = (
            re.fullmatch(r"(\S+)\s+(token|step|epoch)s?", value.strip()) if isinstance(value, str) else None
        )
        if match:
            value = match[1]
            unit = "steps" if match[2] == "step" else "epochs" if match[2] == "epoch" else "tokens"
        count = number(value, where)
        if count <= 0:
            raise RecipeError(f"{where} is {value!r}: it must be above 0")
        return cls(count, unit)


@dataclass(frozen=True)
class Piece:
    """A stretch of a schedule that ends `length` after it starts, or at `until`, or with the stage."""

    shape: Shape
    start: float
    end: float
    length: Count | None = None
    until: Count | None = None

    @classmethod
    def parse(cls, value: Any, where: str) -> Piece:
        """{for: 469B, linear: [3072, 15360]} or {until: 10T, constant: 2.2e-4}."""
        if not isinstance(value, Mapping):
            raise RecipeError(f"{where} is {value!r}: it must be like {{until: 10T, constant: 2.2e-4}}")
        shapes = [key for key in ("constant", "linear", "cosine") if key in value]
        unknown = sorted(map(str, value.keys() - {"constant", "linear", "cosine", "for", "until"}))
        if unknown or len(shapes) != 1 or ("for" in value and "until" in value):
            raise RecipeError(
                f"{where} is {dict(value)!r}: it must have one of constant, linear, cosine, and may have one of "
                "for, until"
            )
        shape: Shape = shapes[0]  # type: ignore[assignment]
        ends = value[shape] if shape != "constant" else [value[shape], value[shape]]
        if not isinstance(ends, list) or len(ends) != 2:
            raise RecipeError(f"{where}.{shape} is {ends!r}: it must be [from, to]")
        start, end = (float(number(e, f"{where}.{shape}")) for e in ends)
        length = Count.parse(value["for"], f"{where}.for") if "for" in value else None
        until = Count.parse(value["until"], f"{where}.until") if "until" in value else None
        return cls(shape, start, end, length, until)


@dataclass(frozen=True)
class Schedule:
    """A number as a function of tokens read: `schedule(tokens)`. The last piece's end value goes on for ever."""

    pieces: tuple[Piece, ...]

    @classmethod
    def parse(cls, value: Any, where: str) -> Schedule:
        """A number, for a constant, or a list of pieces."""
        if not isinstance(value, list):
            constant = float(number(value, where))
            return cls((Piece("constant", constant, constant),))
        pieces = tuple(Piece.parse(item, f"{where}[{i}]") for i, item in enumerate(value))
        for i, piece in enumerate(pieces[:-1]):
            if piece.length is None and piece.until is None:
                raise RecipeError(f"{where}[{i}] has no end, but a piece follows: give it `for` or `until`")
        if not pieces:
            raise RecipeError(f"{where} is empty: give a number or a list of pieces")
        return cls(pieces)

    @classmethod
    def constant(cls, value: float) -> Schedule:
        return cls((Piece("constant", value, value),))

    def ends(self, total: float) -> Iterator[tuple[Piece, float, float]]:
        """Each piece with the tokens at which it starts and ends; counts must have become tokens."""
        at = 0.0
        for piece in self.pieces:
            start = at
            if piece.until is not None:
                at = piece.until.value
            elif piece.length is not None:
                at = start + piece.length.value
            else:
                at = max(start, total)
            yield piece, start, at

    def in_tokens(self, of: Any) -> Schedule:
        """The same with every count turned into tokens by `of(count) -> float`."""

        def turned(count: Count | None) -> Count | None:
            return None if count is None else Count(of(count))

        return Schedule(
            tuple(replace(p, length=turned(p.length), until=turned(p.until)) for p in self.pieces)
        )


class Curve:
    """A schedule whose counts are tokens, ready to be read at any point."""

    def __init__(self, schedule: Schedule, total: float) -> None:
        self.pieces = list(schedule.ends(total))
        for i, (_, start, end) in enumerate(self.pieces):
            if end < start:
                raise RecipeError(
                    f"piece {i + 1} of a schedule ends at {end:g} tokens, before it starts at {start:g}"
                )

    def __call__(self, tokens: float) -> float:
        for piece, start, end in self.pieces:
            if tokens < end:
                if piece.shape == "constant":
                    return piece.start
                done = (tokens - start) / (end - start)
                if piece.shape == "cosine":
                    done = 0.5 * (1 - math.cos(math.pi * done))
                return piece.start + (piece.end - piece.start) * done
        return self.pieces[-1][0].end


@dataclass(frozen=True)
class Phase:
    """One run over some tokens: what it reads, how long, and each quantity's schedule."""

    tokens: Count
    """How long it goes on."""
    sequence_length: int
    batch: Schedule
    """Sequences per optimiser step."""
    lr: Schedule
    mixture: dict[str, float]
    """Weights of the corpora it reads. Chats are packed with sample masks and loss on answers only."""
    mtp: Schedule = field(default_factory=lambda: Schedule.constant(0.0))
    """lambda, the weight of the MTP loss; at 0 the MTP modules are not run."""
    gamma: Schedule = field(default_factory=lambda: Schedule.constant(0.0))
    """Speed at which expert biases move against their load (0 leaves them alone)."""
    microbatch: int = 8
    """Sequences that go through the model at once; a batch of more is accumulated."""
    rope_scaling: dict[str, Any] | None = None
    """YaRN's numbers, from this phase on, as config.json has them."""
    max_position_embeddings: int | None = None
    """The context length that the config says from this phase on."""
    fresh_moments: bool = False
    """Forget the optimiser's moments of the phase before."""
    precision: Precision | None = None
    """Of the matrix products; by default the recipe's."""
    parallel: Layout | None = None
    """How it is laid over processes; by default the recipe's, and as many processes."""

    def __post_init__(self) -> None:
        if self.sequence_length < 2 or self.microbatch < 1:
            raise RecipeError("sequence_length must be at least 2 and microbatch at least 1")
        if not self.mixture or min(self.mixture.values()) < 0 or sum(self.mixture.values()) <= 0:
            raise RecipeError(f"mixture is {self.mixture!r}: it must give corpora weights above 0")
        for name, least in (("batch", 1), ("lr", 0), ("mtp", 0), ("gamma", 0)):
            for piece in getattr(self, name).pieces:
                if min(piece.start, piece.end) < least:
                    raise RecipeError(
                        f"{name} falls to {min(piece.start, piece.end):g}: it must be at least {least}"
                    )


@dataclass(frozen=True)
class Plan:
    """A phase with every count in tokens: the schedules as curves, and the steps one after the other."""

    tokens: int
    sequence_length: int
    batch: Curve
    lr: Curve
    mtp: Curve
    gamma: Curve
    granule: int = 1
    """Sequences of which a step has a whole number, so that every process has the same share."""

    def rows(self, tokens: float) -> int:
        """Sequences in the step that starts after so many tokens."""
        return max(1, round(self.batch(tokens) / self.granule)) * self.granule

    def steps_left(self, tokens: int) -> int:
        """Steps from here to the end; exact where the batch is constant, by the mean batch on a ramp."""
        left = max(0, self.tokens - tokens)
        samples = 64
        rows = [self.rows(tokens + left * (i + 0.5) / samples) for i in range(samples)]
        return math.ceil(left * sum(1 / r for r in rows) / samples / self.sequence_length - 1e-6)


def plan(phase: Phase, tokens_per_epoch: int | None = None, scale: float = 1.0, granule: int = 1) -> Plan:
    """Turn steps and epochs into tokens. `scale` shortens or lengthens the phase, its schedules with it.

    Raises RecipeError where epochs are asked for and `tokens_per_epoch` is not known.
    """
    row = phase.sequence_length
    pieces = tuple(_batch_piece(piece, row) for piece in phase.batch.pieces)
    batch = Schedule(pieces)
    by_step = Curve(batch, 0.0)

    def of(count: Count) -> float:
        if count.unit == "steps":
            if pieces[-1].shape != "constant" and pieces[-1].length is None and pieces[-1].until is None:
                raise RecipeError(
                    "batch changes to the end of the phase, so steps cannot be counted: give it `for`"
                )
            return _tokens_of_steps(by_step, row, int(count.value))
        if count.unit == "epochs":
            if tokens_per_epoch is None:
                raise RecipeError("epochs are asked for, but how long one is shows only with the data built")
            return count.value * tokens_per_epoch
        return count.value

    total = of(phase.tokens) * scale
    if total < 1:
        raise RecipeError(f"a phase of {total:g} tokens has no step: make it longer")

    def curve(schedule: Schedule) -> Curve:
        return Curve(schedule.in_tokens(lambda count: of(count) * scale), total)

    return Plan(
        round(total), row, curve(batch), curve(phase.lr), curve(phase.mtp), curve(phase.gamma), granule
    )


def _batch_piece(piece: Piece, sequence_length: int) -> Piece:
    """A piece of the batch's own schedule whose length, if in steps, is in the tokens that these steps read."""
    if piece.until is not None and piece.until.unit == "steps":
        raise RecipeError(
            "batch has a piece `until` so many steps: say `for` how many, or `until` how many tokens"
        )
    if piece.length is None or piece.length.unit != "steps":
        return piece
    steps = int(piece.length.value)
    by_step = Curve(Schedule((replace(piece, length=Count(steps)),)), steps)
    rows = sum(max(1, round(by_step(step))) for step in range(steps))
    return replace(piece, length=Count(rows * sequence_length))


def _tokens_of_steps(batch: Curve, sequence_length: int, steps: int) -> float:
    tokens = 0
    for _ in range(steps):
        tokens += max(1, round(batch(tokens))) * sequence_length
    return float(tokens)
