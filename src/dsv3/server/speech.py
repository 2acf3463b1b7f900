"""What an answer says and what it does: content, reasoning, and calls of tools, told apart as it comes.

`dsv3.text.tools` reads the text; here its events become OpenAI's deltas. Where neither tools nor reasoning can occur the
text is taken as it is.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dsv3.engine.grammar import StructuredOutput
from dsv3.engine.sampling import TokenLogprobs
from dsv3.engine.sequence import TextDecoder
from dsv3.text import Tokenizer
from dsv3.text.tools import (
    THINK_BEGIN,
    THINK_END,
    AnswerParser,
    CallArguments,
    CallStart,
    Content,
    Event,
    Reasoning,
    call_style,
    reasoning_opened,
    tool_use,
)


class Speaking:
    """How the answers to one request are made and read."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        tools: Sequence[Mapping[str, Any]],
        choice: str | Mapping[str, Any] | None,
        parallel: bool = True,
    ) -> None:
        """tools, choice, parallel: OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`. Raises UserError."""
        template = tokenizer.chat_template
        use = tool_use(tools, choice, call_style(template), parallel)
        self._tokenizer, self._held = tokenizer, use.held
        self.tools: list[dict[str, Any]] = use.shown or []
        """What the chat template is told of."""
        self._reasons = THINK_BEGIN in (template or "")
        self._opened = self._instead = False

    @property
    def plain(self) -> bool:
        """Whether an answer can hold nothing but text."""
        return not (self.tools or self._reasons)

    @property
    def decoder(self) -> Callable[[], TextDecoder] | None:
        """What leaves the markers in the text that are to be read; None is the engine's own."""
        tokenizer = self._tokenizer
        return None if self.plain else lambda: tokenizer.stream(keep=tokenizer.readable_ids)

    def decode(self) -> TextDecoder:
        """One answer's decoder."""
        return (self.decoder or self._tokenizer.stream)()

    def structured(self, asked: StructuredOutput | None) -> StructuredOutput | None:
        """The form of an answer: that of its text, if one is asked for, and of calls that are held to something. Of an
        answer that must be calls there is no text."""
        held, form = self._held, asked
        if held is not None and held.required:
            form = StructuredOutput(tool_calls=held)
        elif held is not None and asked is not None:
            form, self._instead = replace(asked, tool_calls=held), True
        elif held is not None and not held.free:
            form = StructuredOutput(tool_calls=held)
        return form if form is None or not self._opened else replace(form, after_reasoning=True)

    def begin(self, prompt_ids: Sequence[int], said: str = "") -> None:
        """Look at the prompt's end: it may have begun the reasoning already, as may what is said of the answer."""
        if self._reasons:
            end = self._tokenizer.decode(prompt_ids[-8:], skip_special_tokens=False)
            self._opened = reasoning_opened(end) or said.rfind(THINK_BEGIN) > said.rfind(THINK_END)

    def listen(self) -> Speech:
        if self.plain:
            return Speech(None)
        tools = bool(self.tools)
        return Speech(
            AnswerParser(reasoning=self._reasons, opened=self._opened, tools=tools, instead=self._instead)
        )


class Spelling:
    """Which tokens a text is made of, as the parser gives it out: a while after they came, and without markers."""

    def __init__(self) -> None:
        self._pending: list[tuple[TokenLogprobs | None, str]] = []
        """Tokens and their texts since the last that was given out; no token where a part of its text was."""

    def add(self, token: TokenLogprobs, text: str) -> None:
        """The next token, and the characters that it completes."""
        self._pending.append((token, text))

    def take(self, text: str) -> list[TokenLogprobs]:
        """The tokens of the text that is given out now. What comes after it can only be the beginning of a marker."""
        whole = "".join(piece for _, piece in self._pending)
        end = len(whole) if whole.endswith(text) else max(whole.rfind("<"), 0)
        start = end - len(text)
        taken, rest, place = [], [], 0
        for token, piece in self._pending:
            after = place + len(piece)
            if token is not None and place < end and (after > start or (place == start and not piece)):
                taken.append(token)
                token = None
            if after > end or place >= end:
                rest.append((token, piece[max(end - place, 0) :]))
            place = after
        self._pending = rest
        return taken


class Speech:
    """One answer as it is read."""

    def __init__(self, parser: AnswerParser | None) -> None:
        """parser: None takes the text as it is."""
        self._parser = parser
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def push(self, text: str) -> list[dict[str, Any]]:
        """What is new, as OpenAI's deltas."""
        if self._parser is not None:
            return self._deltas(self._parser.push(text))
        self._content.append(text)
        return [{"content": text}] if text else []

    def close(self) -> list[dict[str, Any]]:
        """What was held back, now that no more text comes."""
        return [] if self._parser is None else self._deltas(self._parser.close())

    def message(self) -> dict[str, Any]:
        """The whole, as OpenAI's message."""
        content = "".join(self._content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["content"] = content or None
            message["tool_calls"] = self._calls
        return message

    def finish_reason(self, reason: str | None) -> str | None:
        """An answer that ends by itself after calls ends because of them."""
        return "tool_calls" if self._calls and reason == "stop" else reason

    def _deltas(self, events: Sequence[Event]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for event in events:
            if isinstance(event, Content):
                self._content.append(event.text)
                deltas.append({"content": event.text})
            elif isinstance(event, Reasoning):
                self._reasoning.append(event.text)
                deltas.append({"reasoning_content": event.text})
            elif isinstance(event, CallStart):
                function = {"name": event.name, "arguments": ""}
                call = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
                self._calls.append(call)
                deltas.append({"tool_calls": [{"index": event.index, **call, "function": dict(function)}]})
            elif isinstance(event, CallArguments):
                self._calls[event.index]["function"]["arguments"] += event.text
                part = {"index": event.index, "function": {"arguments": event.text}}
                deltas.append({"tool_calls": [part]})
        return deltas
