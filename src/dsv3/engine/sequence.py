"""One request, from prompt to finish reason.

A `Sequence` is the list of its tokens, prompt and output in one, and a count of how many of them the model
has been through (`computed`): those have their latents in the cache. What is pending is the difference: all
of the prompt at first, then one token at a time, the one sampled last. Scheduler, runner and cache need to
know no more than that.
"""

from __future__ import annotations

from typing import Literal, Protocol

from dsv3.engine.sampling import Sampled, Sampler, SamplingParams, TokenLogprobs

FinishReason = Literal["stop", "length"]


class TextDecoder(Protocol):
    """Turns token ids into text as they come, whole characters only (`dsv3.text.StreamDecoder`)."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class OutputText:
    """The text of an output as it grows, cut at the first stop string.

    What could still turn into a stop string is held back, so that whatever has been shown stays true: `text`
    only ever gets longer.
    """

    def __init__(self, decoder: TextDecoder, stop: tuple[str, ...] = ()) -> None:
        self.text = ""
        self._held = ""
        self._decoder = decoder
        self._stop = stop

    def push(self, token_id: int) -> bool:
        """Add a token. Returns whether a stop string is now complete; nothing may be pushed after that."""
        return self._add(self._decoder.push(token_id))

    def close(self) -> bool:
        """No token follows: show what was held back. Returns whether it ended in a stop string after all."""
        stopped = self._add(self._decoder.flush())
        if not stopped:
            self.text, self._held = self.text + self._held, ""
        return stopped

    def _add(self, piece: str) -> bool:
        if not self._stop:
            self.text += piece
            return False
        pending = self._held + piece
        found = [place for stop in self._stop if (place := pending.find(stop)) >= 0]
        shown = min(found) if found else len(pending) - max(_overlap(pending, stop) for stop in self._stop)
        self.text += pending[:shown]
        self._held = "" if found else pending[shown:]
        return bool(found)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins, short of all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Sequence:
    """One request and all that belongs to it."""

    def __init__(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        seed: int | str,
        decoder: TextDecoder,
        end_ids: frozenset[int],
        max_model_len: int,
    ) -> None:
        """end_ids: the model's own end-of-text tokens; max_model_len: most tokens, prompt included."""
        self.tokens = list(prompt_ids)
        self.prompt_ids = list(prompt_ids)
        """Every output shares this list: a long prompt is not copied for each token."""
        self.params = params
        self.end_ids = (frozenset() if params.ignore_eos else end_ids).union(params.stop_token_ids)
        self.sampler = Sampler(params, prompt_ids, seed, self.end_ids)
        self.computed = 0
        """How many tokens have their latents in the cache."""
        self.finish_reason: FinishReason | None = None
        self.logprobs: list[TokenLogprobs] = []
        self.output = OutputText(decoder, tuple(params.stop))
        self.limit = min(max_model_len, len(prompt_ids) + (params.max_tokens or max_model_len))
        """The most tokens it can come to."""

    @property
    def pending(self) -> int:
        """Tokens that the model has not been through."""
        return len(self.tokens) - self.computed

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[len(self.prompt_ids) :]

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def append(self, sampled: Sampled) -> None:
        """Take the next token, and finish if it is the last. A token that ends the text is not part of it."""
        self.tokens.append(sampled.token_id)
        if sampled.logprobs is not None:
            self.logprobs.append(sampled.logprobs)
        if sampled.token_id in self.end_ids:
            self.output.close()
            self.finish_reason = "stop"
        elif self.output.push(sampled.token_id):
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "stop" if self.output.close() else "length"
