"""The engine: requests in, tokens out, one step at a time.

`step()` is the whole of it: the scheduler says who runs, the runner gives logits, sampling picks a token for
each, and every sequence takes its own. All else is bookkeeping at the doors. An engine is for one thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dsv3.engine.cache import LatentCache
from dsv3.engine.machine import fitting_tokens
from dsv3.engine.runner import ModelRunner
from dsv3.engine.sampling import SamplingParams, is_whole, sample
from dsv3.engine.scheduler import Scheduler
from dsv3.engine.sequence import Sequence, TextDecoder
from dsv3.errors import UserError
from dsv3.model import Transformer

if TYPE_CHECKING:
    from dsv3.text.tokenizer import Tokenizer


class _NoText:
    """Stands in for a tokenizer's decoder where only token ids are wanted."""

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class Engine:
    """Generates from one model for several sequences at once; without a tokenizer, token ids alone."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        end_ids: Iterable[int] = (),
        max_model_len: int | None = None,
        max_num_seqs: int = 8,
        max_batched_tokens: int = 2048,
        seed: int = 0,
    ) -> None:
        """end_ids: tokens that end a text, besides the config's own; seed: for requests that bring none.

        max_model_len: the longest prompt and output together, by default what the model was made for or what
        fits in memory, if that is less. max_num_seqs sequences run at once, others wait; one step takes about
        max_batched_tokens through the model at most. Raises UserError for values that cannot be.
        """
        config = model.config
        weight = model.embed_tokens.weight
        for name, value in (("max_num_seqs", max_num_seqs), ("max_batched_tokens", max_batched_tokens)):
            if not is_whole(value) or value < 1:
                raise UserError(f"{name} is {value!r}: it must be a whole number, at least 1")
        fitting = fitting_tokens(config, weight.dtype, weight.device)
        if fitting is None:  # nobody can tell: then nothing is too much
            fitting = max_num_seqs * config.max_position_embeddings
        if max_model_len is None:
            max_model_len = min(config.max_position_embeddings, max(fitting, 2))
        if not is_whole(max_model_len) or not 2 <= max_model_len <= config.max_position_embeddings:
            raise UserError(
                f"max_model_len is {max_model_len!r}: it must be a whole number between 2 and the model's "
                f"max_position_embeddings, {config.max_position_embeddings}"
            )
        self.config = config
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.end_ids = frozenset((*config.eos_token_ids, *end_ids))
        cache = LatentCache(config, max_num_seqs, max_model_len, weight.dtype, weight.device)
        self.scheduler = Scheduler(cache, max_batched_tokens, fitting)
        self.runner = ModelRunner(model, cache)
        self._seed, self._requests = seed, 0

    @property
    def unfinished(self) -> bool:
        return self.scheduler.unfinished

    def sequence(self, prompt_ids: list[int], params: SamplingParams) -> Sequence:
        """A request, checked but not yet added. Raises UserError if this model cannot serve it."""
        if not isinstance(params, SamplingParams):
            raise UserError(f"sampling_params is a {type(params).__name__}: give a SamplingParams")
        vocab = self.config.vocab_size
        if not prompt_ids:
            raise UserError("the prompt is empty: give it at least one token")
        if min(prompt_ids) < 0 or max(prompt_ids) >= vocab:
            wrong = next(token_id for token_id in prompt_ids if not 0 <= token_id < vocab)
            raise UserError(
                f"the prompt has token id {wrong}: the model's vocabulary goes from 0 to {vocab - 1}"
            )
        if len(prompt_ids) >= self.max_model_len:
            raise UserError(
                f"the prompt has {len(prompt_ids)} tokens: shorten it to {self.max_model_len - 1} at most "
                f"(max_model_len is {self.max_model_len})"
            )
        if params.stop and self.tokenizer is None:
            raise UserError(
                f"stop is {params.stop!r}: without a tokenizer there is no text to look for it in"
            )
        decoder: TextDecoder = _NoText() if self.tokenizer is None else self.tokenizer.stream()
        self._requests += 1
        return Sequence(
            prompt_ids,
            params,
            seed=f"{self._seed}/{self._requests}" if params.seed is None else params.seed,
            decoder=decoder,
            end_ids=self.end_ids,
            max_model_len=self.max_model_len,
        )

    def add(self, sequence: Sequence) -> None:
        """Let a sequence take part in the following steps, as soon as there is a place for it."""
        self.scheduler.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Forget a sequence and free its place. Does nothing if it has finished or was never added."""
        self.scheduler.remove(sequence)

    def step(self) -> list[Sequence]:
        """One pass of the model for everybody. Returns the sequences that have a new token."""
        if not self.unfinished:
            return []
        schedule = self.scheduler.schedule()
        ready, logits = self.runner.run(schedule)
        sampled = sample(logits, [sequence.sampler for sequence in ready])
        self.scheduler.postprocess(schedule, ready, sampled)
        return ready
