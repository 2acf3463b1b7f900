"""Single tokens as clients are shown them.

A token is a string of bytes, and those need not be text: one of the three tokens of a Chinese character is not.
Beside each token's text OpenAI therefore reports its bytes. Where a token must be told by its name alone, as in
the tables of /v1/completions, one that is no text is called `bytes:\\xe4`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from dsv3.engine.sampling import TokenLogprobs
from dsv3.text import Tokenizer

LOWEST = -9999.0
"""What stands for minus infinity, which JSON has not."""


class Vocabulary:
    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        """size: ids that the model has, which may be more than the tokenizer's."""
        self.size = size
        self.bytes_of = lru_cache(maxsize=65536)(tokenizer.token_bytes)
        self.name = lru_cache(maxsize=65536)(self._name)
        self._tokenizer = tokenizer

    def _name(self, token_id: int) -> str:
        data = self.bytes_of(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self.bytes_of(token_id)
        return {
            "token": data.decode("utf-8", "replace"),
            "logprob": max(logprob, LOWEST),
            "bytes": list(data),
        }

    def chat_logprobs(self, tokens: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
        """`choices[].logprobs.content` of a chat."""
        return [
            {
                **self._entry(token.token_id, token.logprob),
                "top_logprobs": [self._entry(i, logprob) for i, logprob in token.top.items()],
            }
            for token in tokens
        ]

    def completion_logprobs(
        self, tokens: Sequence[TokenLogprobs | int], offset: int
    ) -> tuple[dict[str, list[Any]], int]:
        """`choices[].logprobs` of a completion, and the offset at which it ends.

        tokens: with their log-probabilities, or only an id where there is none (a text's first token);
        offset: characters of text before them.
        """
        names: list[Any] = []
        logprobs: list[Any] = []
        tops: list[Any] = []
        offsets: list[Any] = []
        decoder = self._tokenizer.stream(skip_special_tokens=False)
        for token in tokens:
            offsets.append(offset)
            token_id = token if isinstance(token, int) else token.token_id
            offset += len(decoder.push(token_id))
            names.append(self.name(token_id))
            if isinstance(token, int):
                logprobs.append(None)
                tops.append(None)
                continue
            logprobs.append(max(token.logprob, LOWEST))
            # The chosen token is always in the table, as OpenAI has it.
            table = token.top if token_id in token.top else {**token.top, token_id: token.logprob}
            tops.append({self.name(i): max(logprob, LOWEST) for i, logprob in table.items()})
        shown = {"tokens": names, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}
        return shown, offset

    def prompt_logprobs(self, tokens: Sequence[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
        """As vLLM has them: by token id, the prompt's own among the likeliest."""
        found: list[dict[str, Any] | None] = []
        for token in tokens:
            if token is None:
                found.append(None)
                continue
            table = {i: (logprob, rank) for rank, (i, logprob) in enumerate(token.top.items(), 1)}
            table.setdefault(token.token_id, (token.logprob, None))  # type: ignore[arg-type]
            found.append(
                {
                    str(i): {"logprob": max(logprob, LOWEST), "rank": rank, "decoded_token": self.name(i)}
                    for i, (logprob, rank) in table.items()
                }
            )
        return found
