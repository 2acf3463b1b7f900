"""One request, from prompt to finish reason.

A `Sequence` is the list of its tokens, prompt and output in one, the blocks of the cache that it holds, and a count
of how many tokens the model has been through (`computed`): those have their latents there. What is pending is the
difference: all of the prompt at first, then one token at a time, the one sampled last. A sequence that is thrown out
for want of blocks only loses blocks and count; its tokens are a longer prompt when it comes back.
"""

from __future__ import annotations

import hashlib
import time
from typing import Literal, Protocol

from torch import Tensor

from dsv3.engine.cache import chained_hash
from dsv3.engine.grammar import Matcher
from dsv3.engine.sampling import Sampled, Sampler, SamplingParams, TokenLogprobs
from dsv3.kernels.inference import BLOCK

FinishReason = Literal["stop", "length", "deadline"]


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
        self.stopped_by: str | None = None
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
        found = [(place, stop) for stop in self._stop if (place := pending.find(stop)) >= 0]
        if found:
            shown, self.stopped_by = min(found, key=lambda pair: pair[0])
        else:
            shown = len(pending) - max(_overlap(pending, stop) for stop in self._stop)
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
        matcher: Matcher | None = None,
        deadline: float | None = None,
        salt: str = "",
        pools: bool = False,
    ) -> None:
        """end_ids: the model's own end-of-text tokens; max_model_len: most tokens, prompt included; deadline: seconds
        from now; salt: only who brings the same one shares blocks of the cache; pools: hidden states are wanted, not
        tokens."""
        self.tokens = list(prompt_ids)
        self.prompt_ids = list(prompt_ids)
        """Every output shares this list: a long prompt is not copied for each token."""
        self.params = params
        self.end_ids = (frozenset() if params.ignore_eos else end_ids).union(params.stop_token_ids)
        self.sampler = Sampler(params, prompt_ids, seed, self.end_ids, matcher)
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        """The token or the text of the request that ended it."""
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]
        self.output = OutputText(decoder, tuple(params.stop))
        most = max_model_len if params.max_tokens is None else params.max_tokens
        self.limit = min(max_model_len, len(prompt_ids) + most)
        """The most tokens it can come to."""
        self.deadline = None if deadline is None else time.monotonic() + deadline
        self.pooled: Tensor | None = None
        """[hidden] float64: the sum of the hidden states so far, where they are wanted."""
        self.pools = pools
        self.aborted = False

        # What the scheduler keeps here.
        self.number = 0
        """The order of arrival."""
        self.computed = 0
        """How many tokens have their latents in the cache."""
        self.blocks: list[int] = []
        self.cached_tokens = 0
        """Tokens of the prompt that were found in the cache."""
        self.drafts: list[int] = []
        """Guesses at the tokens that follow."""
        self.counted = False
        self.waits_for: bytes | None = None
        """The block that it waits to share, which another sequence is about to fill."""
        self.drafting = False
        """Whether the MTP module has been through all that is computed, so that its guesses are good."""
        self._names = [hashlib.blake2b(salt.encode(), digest_size=16).digest()]

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

    @property
    def needs_all(self) -> bool:
        """Whether it needs something of every token of the prompt, so that the cache can spare it none."""
        return self.pools or self.params.prompt_logprobs is not None

    def name(self, block: int) -> bytes:
        """The cache's name for one of its full blocks."""
        while len(self._names) <= block + 1:
            start = (len(self._names) - 1) * BLOCK
            self._names.append(chained_hash(self._names[-1], self.tokens[start : start + BLOCK]))
        return self._names[block + 1]

    def append(self, sampled: Sampled) -> None:
        """Take the next token, and finish if it is the last. A token that ends the text is not part of it."""
        token_id = sampled.token_id
        self.tokens.append(token_id)
        if sampled.logprobs is not None:
            self.logprobs.append(sampled.logprobs)
        if token_id in self.end_ids:
            self.output.close()
            self.finish_reason = "stop"
            self.stop_reason = token_id if token_id in self.params.stop_token_ids else None
        elif self.output.push(token_id):
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.limit:
            self.finish("length")
        if self.output.stopped_by is not None:
            self.stop_reason = self.output.stopped_by

    def finish(self, reason: FinishReason) -> None:
        """End it for a reason that lies outside its text; what was held back is shown."""
        self.finish_reason = "stop" if self.output.close() else reason
