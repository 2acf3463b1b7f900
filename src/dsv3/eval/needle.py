"""A needle in a haystack: does a model find one sentence in a long text, wherever it stands?

Somewhere in a text about nothing (`dsv3.eval.haystack`) stands

    The secret number of the lighthouse is 4812.

and at its end the question for that number. One measures it over the length of the text and the depth of the needle,
0 where the text begins and 1 right before the question: the report's figure 8, after the context was extended to
128K. Two numbers are taken from each text:

- exact: the answer that the model writes, taking the likeliest token each time, has the number in it. Guessing
  succeeds once in 9,000 times.
- first: of ten numbers, the right one and nine others, the model holds the right one for the likeliest. Guessing succeeds one time in ten. This says something even of a model that is too small to answer: it need
  only prefer what it has read.

and a third that is finer still: the margin, by how many nats per token the right number is likelier than the others.

`length` is all that the model sees, in tokens: what begins a text, the chat format, haystack, needle, question, and
the room for the answer. So a model for 2,048 tokens can be measured at 2,048. Texts are put together from tokens:
the haystack is a window cut out of an endless text, so that it has exactly the tokens that are wanted on either side
of the needle, which stands between two sentences.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from dsv3.errors import UserError
from dsv3.eval.haystack import Filler, built_in
from dsv3.eval.prefix import Prefix

if TYPE_CHECKING:
    from dsv3.engine.llm import LLM
    from dsv3.text import Tokenizer

PLACES = (
    "lighthouse",
    "castle",
    "harbour",
    "library",
    "theatre",
    "museum",
    "station",
    "island",
    "palace",
    "bakery",
    "mountain",
    "temple",
)
NUMBERS = range(1000, 10000)
_ASIDE = "dsv3-needle-question"  # stands where the user's message will be, and is no part of any chat format


@dataclass(frozen=True)
class Case:
    """One text with its question, as token ids."""

    prompt_ids: list[int]
    needle: slice
    """Where the needle's sentence stands in them."""
    depth: float
    """The share of the haystack's tokens that stand before it."""
    number: str
    lead: list[int]
    """How the answer that is weighed begins: "The secret number of the lighthouse is"."""
    candidates: list[list[int]]
    """How it may end: the right number first, then others, all of as many tokens where there are such."""


@dataclass(frozen=True)
class Cell:
    """What came of the texts of one length and depth."""

    length: int
    depth: float
    exact: float
    """Share of answers with the number in them."""
    first: float
    """Share of texts after which the right number was the likeliest."""
    margin: float
    """Mean log-probability per token of the right number, less that of the others."""


@dataclass(frozen=True)
class NeedleResult:
    """A sweep over lengths and depths."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    distractors: int
    seed: int
    raw: bool
    """Whether the model continued plain text, instead of answering in its chat format."""
    cells: tuple[Cell, ...]
    """Length by length, each depth after depth."""

    @property
    def chance(self) -> float:
        """What a guesser reaches in `first`."""
        return 1 / (1 + self.distractors)

    def mean(self, measure: str) -> float:
        """Of "exact", "first" or "margin" over all cells."""
        return fmean(getattr(cell, measure) for cell in self.cells)

    def table(self, measure: str) -> list[list[float]]:
        """[depth][length]."""
        columns = len(self.lengths)
        values = {(cell.length, cell.depth): getattr(cell, measure) for cell in self.cells}
        return [[values[self.lengths[i], depth] for i in range(columns)] for depth in self.depths]

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": "raw" if self.raw else "chat",
            "lengths": list(self.lengths),
            "depths": list(self.depths),
            "samples": self.samples,
            "distractors": self.distractors,
            "seed": self.seed,
            "exact": self.mean("exact"),
            "first": self.mean("first"),
            "margin": self.mean("margin"),
            "chance": {"exact": 1 / len(NUMBERS), "first": self.chance, "margin": 0.0},
            "cells": [asdict(cell) for cell in self.cells],
        }


def even_depths(count: int) -> tuple[float, ...]:
    """From the text's beginning to its end: 0, 0.1, ... 1 for 11. One alone is the middle."""
    return tuple(i / (count - 1) for i in range(count)) if count > 1 else (0.5,)


def usual_lengths(longest: int) -> tuple[int, ...]:
    """512 and its doubles, as far as the model goes; a shorter model at its longest."""
    return tuple(512 << i for i in range(32) if 512 << i <= longest) or (longest,)


def sweep(
    llm: LLM,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = even_depths(11),
    samples: int = 10,
    seed: int = 0,
    *,
    raw: bool = False,
    filler: Filler = built_in,
    distractors: int = 9,
    answer_tokens: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> NeedleResult:
    """Ask `samples` times at every length and depth; the same seed asks the same questions.

    lengths: in tokens, by default `usual_lengths`; raw: continue plain text (for base models), else answer in the
    chat format; answer_tokens: how many the model may write; progress: told how many texts of how many are done.
    Raises UserError for lengths that the model cannot take, or that have no room for the question.
    """
    lengths = tuple(dict.fromkeys(usual_lengths(llm.max_model_len) if lengths is None else lengths))
    depths = tuple(dict.fromkeys(depths))
    _check(llm, lengths, depths, samples, distractors, answer_tokens)
    texts = Texts(llm.tokenizer, raw, filler, distractors, answer_tokens)
    texts.case(min(lengths), 0.5, random.Random(seed))  # what has no room is refused before anything is read

    cells, done, total = [], 0, len(lengths) * len(depths) * samples
    for length in lengths:
        for depth in depths:
            scores = []
            for sample in range(samples):
                case = texts.case(length, depth, random.Random(f"{seed}/{length}/{depth:.6f}/{sample}"))
                scores.append(_ask(llm, case, raw, answer_tokens))
                done += 1
                if progress is not None:
                    progress(done, total)
            exact, first, margin = (fmean(values) for values in zip(*scores, strict=True))
            cells.append(Cell(length, depth, exact, first, margin))
    return NeedleResult(lengths, depths, samples, distractors, seed, raw, tuple(cells))


def _check(
    llm: LLM,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    distractors: int,
    answer_tokens: int,
) -> None:
    if not lengths or not depths:
        raise UserError("there is no length or no depth: give at least one of each")
    if max(lengths) > llm.max_model_len:
        raise UserError(
            f"length {max(lengths)} is too long: the model takes {llm.max_model_len} tokens, answer included"
        )
    wrong = next((depth for depth in depths if not 0 <= depth <= 1), None)
    if wrong is not None:
        raise UserError(f"depth {wrong} is out of range: 0 is the text's beginning, 1 its end")
    for name, value in (("samples", samples), ("distractors", distractors), ("answer_tokens", answer_tokens)):
        if value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")


def _ask(llm: LLM, case: Case, raw: bool, answer_tokens: int) -> tuple[float, float, float]:
    """Exact, first and margin of one text."""
    weighed = len(case.lead) + max(map(len, case.candidates))
    prefix = Prefix(llm.model, case.prompt_ids, max(answer_tokens, weighed))
    answer = llm.tokenizer.decode(prefix.greedy(answer_tokens, llm.engine.end_ids))
    if raw:  # what a base model writes after a line's end is another text
        answer = answer.lstrip().partition("\n")[0]
    prefix.extend(case.lead)
    right, *others = (fmean(prefix.logprobs(ids)) for ids in case.candidates)
    return float(has_number(answer, case.number)), rank_first(right, others), right - fmean(others)


def has_number(answer: str, number: str) -> bool:
    """Whether the number stands in the answer by itself: 4812, or 4,812, but not within 14812."""
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer)
    return re.search(rf"(?<![\d.]){number}(?!\d)", plain) is not None


def rank_first(right: float, others: Sequence[float]) -> float:
    """1 if the right answer is the likeliest, 0 if another is; of several that are equally likely, its share."""
    if right < max(others):
        return 0.0
    return 1 / (1 + sum(other == right for other in others))


class Texts:
    """Makes texts for one tokenizer and one form of asking."""

    def __init__(
        self, tokenizer: Tokenizer, raw: bool, filler: Filler, distractors: int, answer_tokens: int
    ) -> None:
        self.raw, self.filler = raw, filler
        self.distractors, self.answer_tokens = distractors, answer_tokens
        self._tokenizer = tokenizer
        self._head: list[int] = []
        self._tail: list[int] = []
        if raw:
            self._head = tokenizer.encode("", add_bos=tokenizer.add_bos_token)
        else:
            self._head, self._tail = _chat_frame(tokenizer)
            self._head += self._encode("Read this text, and remember the secret number in it.\n\n")

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, allow_special=False)

    def case(self, length: int, depth: float, rng: random.Random) -> Case:
        """A text of `length` tokens, the room for the answer included, with its needle at `depth`."""
        place = rng.choice(PLACES)
        number = rng.choice(NUMBERS)
        fact = f"The secret number of the {place} is"
        needle = self._encode(f" {fact} {number}.")
        question, lead = self._question(place, fact)
        fixed = len(self._head) + len(needle) + len(question) + len(self._tail)
        hay = length - self.answer_tokens - fixed
        if hay < len(needle):
            least = self.answer_tokens + fixed + len(needle)
            raise UserError(
                f"length {length} is too short: question and answer take it, give {least} at least"
            )
        before = round(depth * hay)
        ahead, behind = self._hay(before, hay - before, rng)
        start = len(self._head) + before
        return Case(
            prompt_ids=[*self._head, *ahead, *needle, *behind, *question, *self._tail],
            needle=slice(start, start + len(needle)),
            depth=before / hay,
            number=str(number),
            lead=lead,
            candidates=[self._encode(f" {n}") for n in (number, *self._others(number, rng))],
        )

    def _question(self, place: str, fact: str) -> tuple[list[int], list[int]]:
        """The question, and how the answer begins that follows it when numbers are weighed."""
        asked = f"What is the secret number of the {place}?"
        if self.raw:
            return self._encode(f"\n\nQuestion: {asked}\nAnswer: {fact}"), []
        return self._encode(f"\n\n{asked}"), self._encode(fact)

    def _hay(self, before: int, after: int, rng: random.Random) -> tuple[list[int], list[int]]:
        """So many tokens up to a sentence's end, and so many from there on."""
        sentences = self.filler(rng)
        ahead, behind = self._gather(sentences, before), self._gather(sentences, after)
        return ahead[len(ahead) - before :], behind[:after]

    def _gather(self, sentences: Iterator[str], least: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < least:
            ids += self._encode(next(sentences))
        return ids

    def _others(self, number: int, rng: random.Random) -> list[int]:
        """Wrong numbers, of as many tokens as the right one: a mean over fewer tokens is another measure."""
        tokens = len(self._encode(f" {number}"))
        drawn = rng.sample(NUMBERS, min(len(NUMBERS), 10 * self.distractors + 1))
        drawn = [n for n in drawn if n != number]
        return sorted(drawn, key=lambda n: len(self._encode(f" {n}")) != tokens)[: self.distractors]


def _chat_frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What the chat format puts before and after one message of a user's."""
    try:
        text = tokenizer.render_chat([{"role": "user", "content": _ASIDE}])
    except UserError as error:
        raise UserError(f"{error}; ask it so with --raw (in Python: raw=True)") from None
    head, found, tail = text.partition(_ASIDE)
    if not found or _ASIDE in tail:
        raise UserError("the chat template does not show a user's message as it is: try --raw (raw=True)")
    return tokenizer.encode(head), tokenizer.encode(tail)


def plot(result: NeedleResult, path: Path, name: str = "") -> None:
    """A heat map for each of the two rates: depth downwards, length to the right. name: the model's."""
    from dsv3.figures import FAINT, INK, figure

    columns, rows = len(result.lengths), len(result.depths)
    numbers = columns <= 14 and rows <= 25
    width = min(13.0, max(6.6, 2.0 + 2 * 0.62 * columns))
    panels = (
        ("exact", "The answer has the number", f"chance {1 / len(NUMBERS):.2%}"),
        ("first", f"The number ranks first of {1 + result.distractors}", f"chance {result.chance:.0%}"),
    )
    with figure(path, width, 1.9 + 0.27 * max(rows, 4)) as canvas:
        each = canvas.subplots(1, 2, sharey=True)
        for axes, (measure, label, chance) in zip(each, panels, strict=True):
            table = result.table(measure)
            axes.imshow(table, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
            axes.set_title(label, fontsize=9.5, pad=18)
            axes.annotate(
                f"mean {result.mean(measure):.1%}, {chance}",
                (0, 1),
                (0, 6),
                xycoords="axes fraction",
                textcoords="offset points",
                color=FAINT,
                fontsize=8,
            )
            axes.grid(False)
            axes.spines[:].set_visible(False)
            axes.set_xticks(range(columns), [_length(n) for n in result.lengths])
            axes.set_xlabel("Length, tokens")
            axes.set_xticks([i - 0.5 for i in range(1, columns)], minor=True)
            axes.set_yticks([i - 0.5 for i in range(1, rows)], minor=True)
            axes.grid(which="minor", color="white", linewidth=1.5)
            axes.tick_params(which="both", length=0)
            for i, row in enumerate(table if numbers else ()):
                for j, value in enumerate(row):
                    color = "white" if value > 0.55 else INK
                    axes.text(j, i, f"{value:.0%}", ha="center", va="center", fontsize=7, color=color)
        every = max(1, rows // 11)
        shown = range(0, rows, every)
        each[0].set_yticks(list(shown), [f"{result.depths[i]:.0%}" for i in shown])
        each[0].set_ylabel("Depth of the needle")
        bar = canvas.colorbar(each[0].images[0], ax=list(each), pad=0.02, aspect=28)
        ticks = {0.0: "0%", 0.25: "25%", 0.5: "50%", 0.75: "75%", 1.0: "100%", result.chance: "chance"}
        bar.set_ticks(list(ticks), labels=list(ticks.values()))
        bar.ax.axhline(result.chance, color=INK, linewidth=1)
        bar.outline.set_visible(False)
        form = "plain text" if result.raw else "chat format"
        heading = f"Needle in a haystack: {name}" if name else "Needle in a haystack"
        canvas.suptitle(heading, x=0.012, ha="left", fontsize=11.5, fontweight="bold")
        canvas.supxlabel(
            f"{form}, {result.samples} texts per cell, seed {result.seed}",
            x=0.012,
            ha="left",
            fontsize=8,
            color=FAINT,
        )


def _length(tokens: int) -> str:
    """512, 1K, 128K: contexts are counted in powers of two."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"
