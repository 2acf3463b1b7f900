"""From logits to the next token.

A model gives one number (logit) per word of the vocabulary; softmax makes them probabilities. What happens
between is the request's choice, and always in this order:

1. what ends the text is ruled out until there are min_tokens, then come penalties on what was said before:
   repetition (prompt and output), frequency and presence (output);
2. temperature 0 takes the largest logit and stops here; any other divides the logits;
3. top_k keeps the k likeliest, top_p the fewest of those that together hold that share of the probability,
   min_p those at least that fraction as likely as the likeliest (the order of transformers);
4. one random number picks among what is left, in proportion to its probability.

Each request draws from its own random numbers, one per token, so what it gets does not depend on who else is
in the batch (up to rounding in the model, whose sums may be ordered differently in another batch shape).
Log-probabilities are reported from the logits as the model gave them, before any of these steps.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsv3.errors import UserError

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them overflows and changes nothing."""

PREFIX = 256
"""How many of the likeliest words are looked at before all of a large vocabulary is sorted."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request wants its tokens chosen, and when it is done. Raises UserError out of range."""

    max_tokens: int | None = 256
    """Most tokens to generate; None goes on until the context is full."""
    min_tokens: int = 0
    """Until there are so many, no token that would end the answer is chosen; texts in `stop` still end it."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 (or -1, as others write it) keeps all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output; above 1 discourages."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence in the output."""
    stop: str | Sequence[str] = ()
    """Texts that end the answer and are not part of it; stored as a tuple."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the answer, besides the model's own; stored as a tuple."""
    ignore_eos: bool = False
    """The model's own end of text does not end the answer: for benchmarks."""
    seed: int | None = None
    """The same seed gives the same draws; None takes the engine's next."""
    logprobs: int | None = None
    """Report the log-probability of each token and of this many of the likeliest; 0 is the token's alone."""

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        for name, values in (("stop", stop), ("stop_token_ids", self.stop_token_ids)):
            if not isinstance(values, Iterable):
                raise UserError(f"{name} is {values!r}: it must be a list")
            object.__setattr__(self, name, tuple(values))
        for name, allowed in _RANGES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise UserError(f"{name} is {value!r}: it must be {allowed}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UserError(
                f"min_tokens is {self.min_tokens}: it must be at most max_tokens, {self.max_tokens}"
            )
        if not isinstance(self.ignore_eos, bool):
            raise UserError(f"ignore_eos is {self.ignore_eos!r}: it must be True or False")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise UserError(f"stop has {text!r}: each stop must be a text of at least one character")
        for token_id in self.stop_token_ids:
            if not is_whole(token_id) or token_id < 0:
                raise UserError(f"stop_token_ids has {token_id!r}: each must be a token id, 0 or above")
        if self.seed is not None and not is_whole(self.seed):
            raise UserError(f"seed is {self.seed!r}: it must be a whole number, or None")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def filters(self) -> bool:
        """Whether some words are ruled out before the draw."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class _Range(NamedTuple):
    """The values a parameter may take; `in` tells, `str` says."""

    least: float
    most: float = math.inf
    above: bool = False
    """The least itself is not allowed."""
    whole: bool = False
    optional: bool = False

    def __contains__(self, value: object) -> bool:
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        enough = value > self.least if self.above else value >= self.least
        return enough and value <= self.most and value != math.inf

    def __str__(self) -> str:
        text = "a whole number" if self.whole else "a number"
        text += f" {'above' if self.above else 'at least'} {self.least:g}"
        text += f" and at most {self.most:g}" if self.most < math.inf else ""
        return text + (", or None" if self.optional else "")


_RANGES = {
    "max_tokens": _Range(1, whole=True, optional=True),
    "min_tokens": _Range(0, whole=True),
    "temperature": _Range(0),
    "top_p": _Range(0, 1, above=True),
    "top_k": _Range(-1, whole=True),
    "min_p": _Range(0, 1),
    "repetition_penalty": _Range(0, above=True),
    "presence_penalty": _Range(-2, 2),
    "frequency_penalty": _Range(-2, 2),
    "logprobs": _Range(0, whole=True, optional=True),
}


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities where one token was chosen."""

    token_id: int
    logprob: float
    top: dict[int, float]
    """The likeliest token ids, likeliest first; the chosen one is among them only if it is that likely."""


@dataclass(frozen=True)
class Sampled:
    token_id: int
    logprobs: TokenLogprobs | None = None


class Sampler:
    """What one request carries from token to token: its params, its random numbers, and what was said."""

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int], seed: int | str, end_ids: Iterable[int] = ()
    ) -> None:
        """end_ids: what min_tokens rules out."""
        self.params = params
        self.random = random.Random(str(seed))  # of a number it would take the magnitude alone
        self.adjusts = params.penalizes or params.min_tokens > 0
        self.simple = params.greedy and not self.adjusts and params.logprobs is None
        self._prompt_ids = prompt_ids
        self._end_ids = list(end_ids)
        self._generated = 0
        self._said: Tensor | None = None
        """Ids of prompt and output; which of them is there twice does not matter."""
        self._counts: Tensor | None = None
        """[vocab] float32: how often each word is in the output."""

    def uniform(self) -> float:
        """The next random number, in [0, 1) and so far from 1 that times a total it stays below the total."""
        return self.random.getrandbits(48) * 2.0**-48

    def adjust(self, logits: Tensor) -> None:
        """logits: [vocab] float32; min_tokens and penalties are put into them, at the few words they concern."""
        params = self.params
        if self._generated < params.min_tokens:
            logits[[i for i in self._end_ids if i < len(logits)]] = -math.inf
        if not params.penalizes:
            return
        if self._said is None or self._counts is None:
            self._said = torch.tensor(self._prompt_ids, device=logits.device).unique()
            self._counts = torch.zeros_like(logits)
        said = penalize_repetition(logits[self._said], params.repetition_penalty)
        counts = self._counts[self._said]
        logits[self._said] = penalize_output(said, counts, params.presence_penalty, params.frequency_penalty)

    def observe(self, token_id: int) -> None:
        self._generated += 1
        if self._said is not None and self._counts is not None:
            self._said = torch.cat([self._said, self._said.new_tensor([token_id])])
            self._counts[token_id] += 1


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[Sampled]:
    """The next token of each request. logits: [requests, vocab] of any float dtype, left as they are.

    Raises UserError, before any request has changed, if the logits are not numbers.
    """
    if all(sampler.simple for sampler in samplers):
        return [Sampled(token_id) for token_id in likeliest(logits)]
    logits = logits.float()
    adjusted = logits
    adjusting = [i for i, sampler in enumerate(samplers) if sampler.adjusts]
    if adjusting:
        adjusted = logits.clone()
        for i in adjusting:
            samplers[i].adjust(adjusted[i])

    token_ids = likeliest(adjusted)
    drawing = [i for i, sampler in enumerate(samplers) if not sampler.params.greedy]
    if drawing:
        rows = adjusted if len(drawing) == len(samplers) else adjusted[drawing]
        weights = distribution(rows, [samplers[i].params for i in drawing])
        drawn = draw(weights, [samplers[i].uniform() for i in drawing])
        for i, token_id in zip(drawing, drawn.tolist(), strict=True):
            token_ids[i] = token_id
    for i in adjusting:
        samplers[i].observe(token_ids[i])

    reports: dict[int, TokenLogprobs] = {}
    asked = [i for i, sampler in enumerate(samplers) if sampler.params.logprobs is not None]
    if asked:
        wanted = [samplers[i].params.logprobs or 0 for i in asked]
        reports = dict(zip(asked, report(logits[asked], [token_ids[i] for i in asked], wanted), strict=True))
    return [Sampled(token_id, reports.get(i)) for i, token_id in enumerate(token_ids)]


# The steps, as functions of tensors --------------------------------------------------------------------


def likeliest(logits: Tensor) -> list[int]:
    """The id of the largest logit in each row; raises UserError where that is not a number."""
    largest, ids = logits.max(dim=-1)
    if not all(map(math.isfinite, largest.tolist())):
        raise UserError("the logits are not numbers: the weights are damaged, or overflow in this dtype")
    token_ids: list[int] = ids.tolist()
    return token_ids


def penalize_repetition(logits: Tensor, penalty: float) -> Tensor:
    """Push down what was said (arXiv 1909.05858, section 4.1, with the sign handled as transformers does).

    logits: [...], those of words in prompt or output. Penalties below 1 push up.
    """
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def penalize_output(logits: Tensor, counts: Tensor, presence: float, frequency: float) -> Tensor:
    """OpenAI's two penalties. logits: [...]; counts: how often each of the words is in the output so far."""
    return logits - frequency * counts - presence * (counts > 0)


def distribution(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """What to draw from, after temperature, top_k, top_p and min_p.

    logits: [requests, vocab] float32. Returns weights of the same shape, zero for what is ruled out and not
    normalised. Each rule is a least probability: words as likely as the last one kept are kept as well, so a
    row's result depends on nothing but the row.
    """

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device).unsqueeze(1)

    probs = (logits / column([p.temperature for p in params])).softmax(dim=-1)
    if not any(p.filters for p in params):
        return probs
    vocab = logits.shape[-1]
    top_k = column([min(p.top_k, vocab) if p.top_k > 0 else vocab for p in params]).long()
    top_p = column([p.top_p if p.top_p < 1 else 2.0 for p in params])  # 2: sums round, and all must stay
    min_p = column([p.min_p for p in params])

    ranked = probs.topk(min(PREFIX, vocab), dim=-1).values
    # What comes after is less likely still: it matters only to a row that no rule cuts off before, or where
    # top_p is a share of what a top_k beyond it leaves.
    rest_is_out = ranked.sum(-1, keepdim=True) >= top_p
    rest_is_out |= ranked[:, -1:] < min_p * ranked[:, :1]
    rest_is_out &= (top_k == vocab) | (top_p > 1)
    rest_is_out |= top_k <= PREFIX
    if not bool(rest_is_out.all()):
        ranked = in_order(probs)
    in_top_k = ranked >= ranked.gather(1, (top_k - 1).clamp_(max=ranked.shape[1] - 1))
    total = torch.where(top_k < vocab, (ranked * in_top_k).sum(-1, keepdim=True), 1.0)
    before = ranked.cumsum(dim=-1) - ranked
    kept = in_top_k & (before < top_p * total) & (ranked >= min_p * ranked[:, :1])
    least = ranked.gather(1, (kept.sum(-1, keepdim=True) - 1).clamp_(min=0))
    return probs.masked_fill(probs < least, 0.0)


def in_order(probs: Tensor) -> Tensor:
    """Each row sorted, largest first. On a CPU by NumPy, whose vectorised sort is many times torch's speed."""
    if probs.device.type == "cpu":
        return torch.from_numpy(np.sort(probs.numpy(), axis=-1)).flip(-1)
    return probs.sort(dim=-1, descending=True).values


def draw(weights: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Inverse transform sampling: the word at which the running sum passes u * total.

    weights: [requests, vocab], not negative, not all zero in a row; uniforms: one in [0, 1) for each request.
    Returns ids [requests] int64.
    """
    sums = weights.cumsum(dim=-1, dtype=torch.float64)
    targets = torch.tensor(uniforms, dtype=torch.float64, device=weights.device).unsqueeze(1) * sums[:, -1:]
    return torch.searchsorted(sums, targets, right=True).squeeze(1)


def report(logits: Tensor, token_ids: Sequence[int], wanted: Sequence[int]) -> list[TokenLogprobs]:
    """Log-probabilities of the chosen tokens and of the `wanted` likeliest. logits: [requests, vocab]."""
    logprobs = logits.log_softmax(dim=-1)
    columns = torch.tensor(token_ids, device=logits.device).unsqueeze(1)
    chosen = logprobs.gather(1, columns).squeeze(1).tolist()
    top = logprobs.topk(min(max(wanted), logits.shape[-1]), dim=-1)
    return [
        TokenLogprobs(token_id, logprob, dict(zip(ids[:n], values[:n], strict=True)))
        for token_id, logprob, ids, values, n in zip(
            token_ids, chosen, top.indices.tolist(), top.values.tolist(), wanted, strict=True
        )
    ]
