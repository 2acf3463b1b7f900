"""From logits to the next token.

A model gives one number (logit) per word of the vocabulary; softmax makes them probabilities. What happens
between is the request's choice, and always in this order:

1. what a structure does not allow and what is not among allowed_token_ids is ruled out, and what ends the text until
   there are min_tokens; then come logit_bias and penalties on what was said before: repetition (prompt and output),
   frequency and presence (output);
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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3.engine.grammar import Matcher, StructuredOutput
from dsv3.errors import UserError
from dsv3.kernels.sampling import draw

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them overflows and changes nothing."""

LONGEST_STOP = 1000
"""Characters of a stop text: what is held back for one is looked at again with each token."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request wants its tokens chosen, and when it is done. Raises UserError out of range."""

    max_tokens: int | None = 256
    """Most tokens to generate; None goes on until the context is full, 0 reads the prompt and no more."""
    n: int = 1
    """How many answers to give, each drawn by itself; they share the reading of the prompt."""
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
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    """Added to the logits of these tokens, -100 to 100; stored as a dict."""
    allowed_token_ids: Sequence[int] | None = None
    """Only these may be chosen; stored as a tuple."""
    structured: StructuredOutput | None = None
    """The form that the answer must have: a JSON schema, a regular expression, a grammar, one of some texts."""
    seed: int | None = None
    """The same seed gives the same draws; None takes the engine's next."""
    logprobs: int | None = None
    """Report the log-probability of each token and of this many of the likeliest; 0 is the token's alone."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, which is then read anew whatever the cache holds."""

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
        if self.allowed_token_ids is not None:
            object.__setattr__(
                self, "allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids)
            )
            if not self.allowed_token_ids:
                raise UserError("allowed_token_ids is empty: name at least one token, or leave it out (None)")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise UserError(
                    f"logit_bias is {self.logit_bias!r}: it must be a dict of token ids to numbers"
                )
            _token_ids("logit_bias", self.logit_bias)
            for token_id, bias in self.logit_bias.items():
                if bias not in _Range(-100, 100):
                    raise UserError(f"logit_bias of token {token_id} is {bias!r}: it must be -100 to 100")
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        if self.structured is not None and not isinstance(self.structured, StructuredOutput):
            raise UserError(f"structured is a {type(self.structured).__name__}: give a StructuredOutput")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UserError(
                f"min_tokens is {self.min_tokens}: it must be at most max_tokens, {self.max_tokens}"
            )
        if not isinstance(self.ignore_eos, bool):
            raise UserError(f"ignore_eos is {self.ignore_eos!r}: it must be True or False")
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= LONGEST_STOP:
                shown = f"{text[:20]!r}..." if isinstance(text, str) and len(text) > 20 else repr(text)
                raise UserError(
                    f"stop has {shown}: each stop must be a text of 1 to {LONGEST_STOP} characters"
                )
        _token_ids("stop_token_ids", self.stop_token_ids)
        if self.seed is not None and not is_whole(self.seed):
            raise UserError(f"seed is {self.seed!r}: it must be a whole number, or None")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

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
    "max_tokens": _Range(0, whole=True, optional=True),
    "n": _Range(1, 128, whole=True),
    "min_tokens": _Range(0, whole=True),
    "temperature": _Range(0, 100),
    "top_p": _Range(0, 1, above=True),
    "top_k": _Range(-1, whole=True),
    "min_p": _Range(0, 1),
    "repetition_penalty": _Range(0.01, 100),
    "presence_penalty": _Range(-2, 2),
    "frequency_penalty": _Range(-2, 2),
    "logprobs": _Range(0, whole=True, optional=True),
    "prompt_logprobs": _Range(0, whole=True, optional=True),
}


def _token_ids(name: str, values: object) -> tuple[int, ...]:
    if not isinstance(values, Iterable):
        raise UserError(f"{name} is {values!r}: it must be a list")
    for token_id in (ids := tuple(values)):
        if not is_whole(token_id) or token_id < 0:
            raise UserError(f"{name} has {token_id!r}: each must be a token id, 0 or above")
    return ids


_NOT_NUMBERS = "the logits are not numbers: the weights are damaged, or overflow in this dtype"


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
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        seed: int | str,
        end_ids: Iterable[int] = (),
        matcher: Matcher | None = None,
    ) -> None:
        """end_ids: what min_tokens rules out; matcher: what the structure allows."""
        self.params = params
        self.matcher = matcher
        self.random = random.Random(str(seed))  # of a number it would take the magnitude alone
        self.adjusts = params.penalizes or params.min_tokens > 0 or matcher is not None
        self.adjusts |= params.logit_bias is not None or params.allowed_token_ids is not None
        self.simple = params.greedy and not self.adjusts and params.logprobs is None
        self._prompt_ids = prompt_ids
        self._end_ids = list(end_ids)
        self._generated = 0
        self._others: Tensor | None = None
        """[vocab] bool: what allowed_token_ids leaves out."""
        self._said: Tensor | None = None
        """Ids of prompt and output; which of them is there twice does not matter."""
        self._counts: Tensor | None = None
        """[vocab] float32: how often each word is in the output."""

    def uniform(self) -> float:
        """The next random number, in [0, 1) and so far from 1 that times a total it stays below the total."""
        return self.random.getrandbits(48) * 2.0**-48

    def adjust(self, logits: Tensor) -> None:
        """logits: [vocab] float32; what is ruled out, biases and penalties are put into them."""
        params = self.params
        if params.allowed_token_ids is not None:
            if self._others is None:
                self._others = torch.ones_like(logits, dtype=torch.bool)
                self._others[list(params.allowed_token_ids)] = False
            logits.masked_fill_(self._others, -math.inf)
        if self.matcher is not None:
            self.matcher.mask(logits)
        ends = [i for i in self._end_ids if i < len(logits)]
        if self._generated < params.min_tokens:
            logits[ends] = -math.inf
        if (self.matcher or self._others is not None) and logits.max() == -math.inf:
            self.matcher = None  # nothing meets all that was asked for: the answer ends here
            logits[ends or slice(None)] = 0.0
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits.device)
            logits[ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
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
        if self.matcher is not None:
            self.matcher.accept(token_id)
        if self._said is not None and self._counts is not None:
            self._said = torch.cat([self._said, self._said.new_tensor([token_id])])
            self._counts[token_id] += 1


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[Sampled]:
    """The next token of each request. logits: [requests, vocab] of any float dtype, left as they are.

    Raises UserError if the logits are not numbers, and then no request has taken a token.
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

    token_ids = [-1] * len(samplers)
    settled = [i for i, sampler in enumerate(samplers) if sampler.params.greedy]
    drawing = [i for i, sampler in enumerate(samplers) if not sampler.params.greedy]
    if settled:
        for i, token_id in zip(settled, likeliest(_rows(adjusted, settled)), strict=True):
            token_ids[i] = token_id
    if drawing:
        asked_for = [samplers[i].params for i in drawing]
        drawn = draw(
            _rows(adjusted, drawing),
            temperature=[params.temperature for params in asked_for],
            top_k=[params.top_k for params in asked_for],
            top_p=[params.top_p for params in asked_for],
            min_p=[params.min_p for params in asked_for],
            uniform=[samplers[i].uniform() for i in drawing],
        )
        if min(drawn) < 0:
            raise UserError(_NOT_NUMBERS)
        for i, token_id in zip(drawing, drawn, strict=True):
            token_ids[i] = token_id
    for i in adjusting:
        samplers[i].observe(token_ids[i])

    reports: dict[int, TokenLogprobs] = {}
    asked = [i for i, sampler in enumerate(samplers) if sampler.params.logprobs is not None]
    if asked:
        wanted = [samplers[i].params.logprobs or 0 for i in asked]
        reports = dict(zip(asked, report(logits[asked], [token_ids[i] for i in asked], wanted), strict=True))
    return [Sampled(token_id, reports.get(i)) for i, token_id in enumerate(token_ids)]


def _rows(logits: Tensor, places: list[int]) -> Tensor:
    return logits if len(places) == len(logits) else logits[places]


# The steps, as functions of tensors --------------------------------------------------------------------


def likeliest(logits: Tensor) -> list[int]:
    """The id of the largest logit in each row; raises UserError where that is not a number."""
    largest, ids = logits.max(dim=-1)
    if not all(map(math.isfinite, largest.tolist())):
        raise UserError(_NOT_NUMBERS)
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
