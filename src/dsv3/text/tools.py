"""Tool calls and reasoning: what a chat model writes besides the answer itself, in DeepSeek's two spellings.

A chat may offer tools (functions, in OpenAI's words). The model then answers with calls, which whoever runs the chat
carries out and hands back as messages of the role `tool`. DeepSeek-V3, V3-0324 and R1 write a call as a kind, a name,
and a block of JSON:

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather
    ```json
    {"city": "Oslo"}
    ```<｜tool▁call▁end｜>⏎<｜tool▁call▁begin｜>...<｜tool▁call▁end｜><｜tool▁calls▁end｜>

and V3.1 leaves out all that is not needed:

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Oslo"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>

`ToolCallParser` reads both, whichever comes: arguments are an object, so what follows the separator is a brace in the
one spelling and a name in the other. It reads the text as it streams, and gives the same for every way of cutting it.
The markers are tokens of DeepSeek's vocabulary, but text like any other to a vocabulary that lacks them, and the text
is all that is looked at. So the parser follows the JSON: a marker inside a string of it is part of the string.

Models make mistakes. What never becomes a call (no name, no separator) is given back as content, with its markers;
what has begun as a call stays one, and whoever carries it out finds that its arguments are not JSON, as with any other
server of this kind.

Reasoning is simpler: R1 and V3.1 put it between `<think>` and `</think>` before the answer, and their templates write
the first of the two into the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from dsv3.errors import UserError

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
THINK_BEGIN, THINK_END = "<think>", "</think>"

READABLE = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR, THINK_BEGIN, THINK_END)
"""The markers that the parsers here look for; a vocabulary that has them must keep them in the text."""

Style = Literal["v3", "v3.1"]
"""How calls are written: with kind and code block (V3, V3-0324, R1), or bare (V3.1)."""

MAX_NAME = 256
"""The longest name that is taken for one."""

MAX_TOOLS = 128
"""Most tools of one request, as OpenAI has it."""


def call_style(template: str | None) -> Style:
    """How calls are written where this chat template wrote the prompt; None is DeepSeek-V3's own."""
    return "v3" if template is None or "```json" in template or CALLS_BEGIN not in template else "v3.1"


# What is parsed --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToolCall:
    """One call, whole."""

    name: str
    arguments: str
    """JSON text, as the model wrote it."""


@dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thought before it answered."""

    text: str


@dataclass(frozen=True)
class Content:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call begins, the `index`th of the answer, from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of the arguments of the call that began last."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    """The call that began last is complete. It does not come for a call that the end of the answer cut off."""

    index: int


CallEvent = Content | CallStart | CallArguments | CallEnd
Event = Reasoning | CallEvent


@dataclass(frozen=True)
class Answer:
    """All events of an answer, put together."""

    content: str
    calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""


def gather(events: Sequence[Event]) -> Answer:
    """The answer that these events tell of."""
    names: list[str] = []
    arguments: list[str] = []
    for event in events:
        if isinstance(event, CallStart):
            names.append(event.name)
            arguments.append("")
        elif isinstance(event, CallArguments):
            arguments[-1] += event.text
    return Answer(
        "".join(event.text for event in events if isinstance(event, Content)),
        tuple(map(ToolCall, names, arguments)),
        "".join(event.text for event in events if isinstance(event, Reasoning)),
    )


def write_calls(calls: Sequence[ToolCall], style: Style = "v3") -> str:
    """Calls as a model writes them."""
    if style == "v3":
        written = [f"function{SEPARATOR}{call.name}\n```json\n{call.arguments}\n```" for call in calls]
    else:
        written = [f"{call.name}{SEPARATOR}{call.arguments}" for call in calls]
    between = "\n" if style == "v3" else ""
    return CALLS_BEGIN + between.join(f"{CALL_BEGIN}{call}{CALL_END}" for call in written) + CALLS_END


# Reading calls ---------------------------------------------------------------------------------------------


class ToolCallParser:
    """Tells calls from content in one answer, as it streams.

    `push` takes the text in pieces and returns what they make certain; `close` gives what was held back. Neighbouring
    pieces of content, or of a call's arguments, joined, are the same for every way of cutting the text.
    """

    def __init__(self, instead: bool = False) -> None:
        """instead: calls are all of the answer or none of it, so that after anything else no marker counts."""
        self._text = ""
        """What nothing has been decided about."""
        self._read = self._begin if instead else self._content
        """Reads one part of an answer from the front of `_text`; raises _More where that cannot be decided yet."""
        self._events: list[CallEvent] = []
        self._calls = 0
        self._opening = ""
        """The marker before all calls, until a first call shows that it was meant."""
        self._open = False
        """Whether the marker after all calls is due."""
        self._json = _Json()
        self._last = False
        """No more text will come."""

    def push(self, text: str) -> list[CallEvent]:
        """What this piece of the answer makes certain."""
        self._text += text
        return self._run()

    def close(self) -> list[CallEvent]:
        """The answer is over: what was held back."""
        self._last = True
        return self._run()

    def _run(self) -> list[CallEvent]:
        with suppress(_More):
            while True:
                self._read()
        events, self._events = self._events, []
        return events

    def _say(self, content: str) -> None:
        if content:
            self._events.append(Content(content))

    def _argue(self, arguments: str) -> None:
        if arguments:
            self._events.append(CallArguments(self._calls - 1, arguments))

    def _begin(self) -> None:
        """The beginning of an answer that is calls or content."""
        self._read = self._content if _Cursor(self._text, self._last).at_marker(CALLS_BEGIN) else self._rest

    def _rest(self) -> None:
        """Content, up to the end."""
        self._say(self._text)
        self._text = ""
        raise _More

    def _content(self) -> None:
        """Content, up to the next marker. A call that lacks the marker before all calls is taken all the same."""
        markers = (CALLS_BEGIN, CALL_BEGIN, CALLS_END) if self._open else (CALLS_BEGIN, CALL_BEGIN)
        place, marker = _first(self._text, markers)
        if not marker and not self._last:
            place -= _begun(self._text, markers)
        self._say(self._text[:place])
        self._text = self._text[place:]
        if not marker:
            raise _More
        if marker == CALLS_END:
            self._text = self._text.removeprefix(CALLS_END)
            self._open = False
        elif marker == CALLS_BEGIN:
            self._text = self._text.removeprefix(CALLS_BEGIN)
            self._opening = CALLS_BEGIN
            self._read = self._opened
        else:
            self._read = self._head

    def _opened(self) -> None:
        """After the marker before all calls: a call, or it was none."""
        cursor = _Cursor(self._text, self._last)
        cursor.spaces()
        if cursor.at_marker(CALL_BEGIN):
            self._opening += self._text[: cursor.at]
            self._text = self._text[cursor.at :]
            self._read = self._head
        else:
            self._say(self._opening)
            self._read = self._content

    def _head(self) -> None:
        """A call up to its arguments; what cannot be one is content."""
        cursor = _Cursor(self._text, self._last)
        name, empty = _read_head(cursor)
        if name:
            self._events.append(CallStart(self._calls, name))
            self._calls += 1
            self._open = True
            self._text = self._text[cursor.at :]
            self._json = _Json()
            self._read = self._arguments
            if empty:
                self._argue("{}")
                self._read = self._tail
        else:
            self._say(self._opening + CALL_BEGIN)
            self._text = self._text.removeprefix(CALL_BEGIN)
            self._read = self._content
        self._opening = ""

    def _arguments(self) -> None:
        """Arguments, as long as they are JSON."""
        read = self._json.read(self._text)
        self._argue(self._text[:read])
        self._text = self._text[read:]
        if self._json.complete:
            self._read = self._tail
        elif self._text:
            self._read = self._broken
        else:
            raise _More

    def _tail(self) -> None:
        """After whole arguments: the call's end. A forgotten marker is forgiven."""
        cursor = _Cursor(self._text, self._last)
        cursor.spaces()
        cursor.take("```")
        cursor.spaces()
        if (
            cursor.take(CALL_END)
            or cursor.over
            or any(map(cursor.at_marker, (CALLS_END, CALL_BEGIN, CALLS_BEGIN)))
        ):
            self._text = self._text[cursor.at :]
            self._events.append(CallEnd(self._calls - 1))
            self._read = self._between
        else:
            self._read = self._broken

    def _broken(self) -> None:
        """Arguments that are not JSON: all there is up to a marker."""
        markers = (CALL_END, CALLS_END, CALL_BEGIN, CALLS_BEGIN)
        place, marker = _first(self._text, markers)
        if not marker:
            if not self._last:
                place = _before_fence(self._text[: place - _begun(self._text, markers)], unfinished=True)
            self._argue(self._text[:place])
            self._text = self._text[place:]
            raise _More
        self._argue(self._text[: _before_fence(self._text[:place])])
        self._text = self._text[place:].removeprefix(CALL_END)
        self._events.append(CallEnd(self._calls - 1))
        self._read = self._between

    def _between(self) -> None:
        """After a call: another, or the end of all. White space here is nobody's."""
        cursor = _Cursor(self._text, self._last)
        cursor.spaces()
        if cursor.over:
            self._text = ""
            raise _More
        if cursor.take(CALLS_END):
            self._text = self._text[cursor.at :]
            self._open = False
            self._read = self._content
        elif cursor.at_marker(CALL_BEGIN):
            self._text = self._text[cursor.at :]
            self._read = self._head
        else:
            self._read = self._content


class _More(Exception):
    """What comes next decides."""


def _first(text: str, markers: Sequence[str]) -> tuple[int, str]:
    """Where the first of the markers stands, and which; the text's end and nothing if there is none."""
    found = [(place, marker) for marker in markers if (place := text.find(marker)) >= 0]
    return min(found, default=(len(text), ""))


def _begun(text: str, markers: Sequence[str]) -> int:
    """How many characters at the end of the text may be the beginning of a marker."""
    place = text.rfind("<", max(0, len(text) - max(map(len, markers)) + 1))
    # No marker has a second "<", so the last one is where a marker may have begun.
    return len(text) - place if place >= 0 and any(m.startswith(text[place:]) for m in markers) else 0


def _before_fence(text: str, unfinished: bool = False) -> int:
    """Where the white space and code fence at the end of the text begin; unfinished: also one of one or two ticks."""
    bare = text.rstrip()
    ticks = min(len(bare) - len(bare.rstrip("`")), 3)
    return len(bare[: len(bare) - ticks].rstrip()) if ticks == 3 or (unfinished and ticks) else len(bare)


class _Cursor:
    """A place in a text that may go on; raises _More where the next characters decide."""

    def __init__(self, text: str, last: bool) -> None:
        self.text, self.last, self.at = text, last, 0

    @property
    def over(self) -> bool:
        """Whether the answer ends here."""
        return self.last and self.at == len(self.text)

    def next(self) -> str:
        """The character here, nothing after the last."""
        if self.at == len(self.text) and not self.last:
            raise _More
        return self.text[self.at : self.at + 1]

    def at_marker(self, marker: str) -> bool:
        """Whether the marker stands here."""
        here = self.text[self.at : self.at + len(marker)]
        if here != marker and marker.startswith(here) and not self.last:
            raise _More
        return here == marker

    def take(self, marker: str) -> bool:
        """Step over the marker if it stands here."""
        there = self.at_marker(marker)
        self.at += len(marker) * there
        return there

    def spaces(self) -> None:
        """Step over white space."""
        rest = self.text[self.at :]
        self.at += len(rest) - len(rest.lstrip())

    def word(self, ends: str) -> str:
        """Step over what comes before white space or one of the characters; nothing if it is too long for a name."""
        start = self.at
        while (char := self.next()) and not char.isspace() and char not in ends:
            self.at += 1
            if self.at - start > MAX_NAME:
                return ""
        return self.text[start : self.at]


def _read_head(cursor: _Cursor) -> tuple[str, bool]:
    """Step over a call up to its arguments: its name, and whether it ends without any. No name: this is no call."""
    none = "", False
    cursor.take(CALL_BEGIN)
    cursor.spaces()
    kind = cursor.word('<{"`')
    cursor.spaces()
    if not kind or not cursor.take(SEPARATOR):
        return none
    cursor.spaces()
    if cursor.next() == "{":
        return kind, False
    if cursor.next() == "<":
        return (kind, True) if cursor.at_marker(CALL_END) else none
    name = cursor.word('<{"`')
    cursor.spaces()
    if cursor.take("```"):
        cursor.word("{`<")  # the language
        cursor.spaces()
    if name and cursor.next() == "{":
        return name, False
    if name and (cursor.at_marker("```") or cursor.at_marker(CALL_END)):
        return name, True
    return none


_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_WORD = re.compile(r"[-+.0-9A-Za-z]*")
_SCALAR = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?|true|false|null")


class _Json:
    """Follows one JSON value as it streams, to tell where it is complete or breaks off."""

    def __init__(self) -> None:
        self.complete = False
        self._open = ""
        """The brackets that are open."""
        self._state = "value"
        self._word = ""
        self._key = False
        """Whether the string that is being read is a key."""

    def read(self, text: str) -> int:
        """How much of the text still belongs to the value; less than all if it is complete, or no JSON."""
        at = 0
        while at < len(text) and not self.complete:
            step = self._step(text, at)
            if not step:
                break
            at += step
        return at

    def _step(self, text: str, at: int) -> int:
        """How many characters are read next; 0 if the one here cannot stand here."""
        char, state = text[at], self._state
        if state == "string":
            plain = _PLAIN.match(text, at)
            if plain and plain[0]:
                return len(plain[0])
            if char == "\\":
                self._state = "escape"
            elif char == '"':
                self._state = "colon" if self._key else "next"
                self.complete = not self._open
            else:
                return 0
            return 1
        if state == "escape":
            self._state = "uXXXX" if char == "u" else "string"
            return int(char in '"\\/bfnrtu')
        if state.startswith("u"):
            self._state = state[:-1] if len(state) > 2 else "string"
            return int(char in "0123456789abcdefABCDEF")
        if state == "word":
            more = _WORD.match(text, at)
            if more and more[0]:
                self._word += more[0]
                return len(more[0]) if len(self._word) <= 400 else 0
            if not _SCALAR.fullmatch(self._word):
                return 0
            self._state = state = "next"
        if char in " \t\r\n":
            return 1
        return self._mark(char, state)

    def _mark(self, char: str, state: str) -> int:
        """A bracket, a comma, a colon, or the beginning of a value."""
        if char in "}]" and state in ("next", "first"):
            if self._open[-1:] != {"}": "{", "]": "["}[char]:
                return 0
            self._open = self._open[:-1]
            self._state = "next"
            self.complete = not self._open
            return 1
        if state == "next":
            self._state = "key" if self._open[-1:] == "{" else "value"
            return int(char == ",")
        if state == "colon":
            self._state = "value"
            return int(char == ":")
        self._key = state == "key" or (state == "first" and self._open[-1:] == "{")
        if char == '"':
            self._state = "string"
        elif self._key:
            return 0
        elif char in "{[":
            self._open += char
            self._state = "first"
        elif char in "-0123456789tfn":
            self._state, self._word = "word", char
        else:
            return 0
        return 1


# Reasoning -------------------------------------------------------------------------------------------------


def reasoning_opened(prompt: str) -> bool:
    """Whether a chat's prompt ends in `<think>`, so that the answer begins in the middle of the reasoning."""
    return prompt.rstrip().endswith(THINK_BEGIN)


class ReasoningParser:
    """Tells reasoning from what follows it, as it streams. White space around the reasoning is dropped.

    Only what an answer begins with is reasoning. It ends with `</think>`, or with calls, before which models forget it.
    """

    def __init__(self, opened: bool = False) -> None:
        """opened: the prompt has written `<think>` already, see `reasoning_opened`."""
        self._opened = opened
        self._text = ""
        self._read = self._start
        self._events: list[Reasoning | Content] = []
        self._last = False

    def push(self, text: str) -> list[Reasoning | Content]:
        """What this piece of the answer makes certain."""
        self._text += text
        return self._run()

    def close(self) -> list[Reasoning | Content]:
        """The answer is over: what was held back."""
        self._last = True
        return self._run()

    def _run(self) -> list[Reasoning | Content]:
        with suppress(_More):
            while True:
                self._read()
        events, self._events = self._events, []
        return events

    def _start(self) -> None:
        cursor = _Cursor(self._text, self._last)
        cursor.spaces()
        if not cursor.take(THINK_BEGIN) and not self._opened:
            self._read = self._rest
            return
        self._text = self._text[cursor.at :]
        self._read = self._reasoning
        self._space()

    def _reasoning(self) -> None:
        markers = (THINK_END, CALLS_BEGIN)
        place, marker = _first(self._text, markers)
        if not marker and not self._last:
            place -= _begun(self._text, markers)
        said = self._text[:place].rstrip()
        if said:
            self._events.append(Reasoning(said))
        if not marker:
            self._text = "" if self._last else self._text[len(said) :]
            raise _More
        self._text = self._text[place:]
        self._read = self._rest
        if marker == THINK_END:
            self._text = self._text.removeprefix(THINK_END)
            self._space()

    def _space(self) -> None:
        """Drop white space before reading on."""
        after = self._read

        def skip() -> None:
            self._text = self._text.lstrip()
            if not self._text:
                raise _More
            self._read = after

        self._read = skip

    def _rest(self) -> None:
        if self._text:
            self._events.append(Content(self._text))
            self._text = ""
        raise _More


class AnswerParser:
    """Reasoning, content and calls of one answer, as it streams."""

    def __init__(
        self, *, reasoning: bool = False, opened: bool = False, tools: bool = False, instead: bool = False
    ) -> None:
        """Which of reasoning and calls to look for; opened: the prompt has written `<think>` already; instead: calls
        stand in place of content, see `ToolCallParser`."""
        self._reasoning = ReasoningParser(opened) if reasoning or opened else None
        self._calls = ToolCallParser(instead) if tools else None

    def push(self, text: str) -> list[Event]:
        """What this piece of the answer makes certain."""
        return self._pass(self._reasoning.push(text) if self._reasoning else [Content(text)])

    def close(self) -> list[Event]:
        """The answer is over: what was held back."""
        events = self._pass(self._reasoning.close() if self._reasoning else [])
        return events + (self._calls.close() if self._calls else [])

    def _pass(self, events: Sequence[Reasoning | Content]) -> list[Event]:
        found: list[Event] = []
        for event in events:
            if isinstance(event, Content) and self._calls:
                found += self._calls.push(event.text)
            elif event.text:
                found.append(event)
        return found


# What a request asks for -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Function:
    """One tool, as far as its calls are concerned."""

    name: str
    parameters: str
    """The JSON schema of its arguments, an object's, as JSON text."""
    place: str = "tools"
    """Where the schema stands, for messages."""
    strict: bool = False
    """Whether arguments fit the schema in every call, not only in one that is required."""


@dataclass(frozen=True)
class HeldCalls:
    """Calls that can be of these functions alone, with arguments that fit."""

    functions: tuple[Function, ...]
    style: Style = "v3"
    several: bool = True
    """Whether there may be more than one call."""
    required: bool = True
    """Whether the answer consists of them; else there may be text, which may end in calls, and arguments of functions that
    are not strict are any object."""

    @property
    def free(self) -> bool:
        """Whether all of this is the model's own affair, so that nothing need be held."""
        return not self.required and self.several and not any(function.strict for function in self.functions)


@dataclass(frozen=True)
class ToolUse:
    """What `tools` and `tool_choice` of a request come to."""

    shown: list[dict[str, Any]] | None
    """The tools that the chat template is given; None: the model shall not know of any, and its text is content."""
    held: HeldCalls | None = None
    """What its calls can be, for `StructuredOutput`."""


_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}")


def tool_use(
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any] | None = None,
    style: Style = "v3",
    parallel: bool = True,
) -> ToolUse:
    """Read OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`. Raises UserError for what is wrong in them.

    tools: `[{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}]`;
    tool_choice: "none", "auto", "required" or `{"type": "function", "function": {"name": ...}}`; None is "auto".
    """
    functions = _functions(tools)
    named = _named(tool_choice)
    if tool_choice == "none" or (not functions and not named and tool_choice != "required"):
        return ToolUse(None)
    shown = [dict(tool) for tool in tools or ()]
    if not functions:
        raise UserError(f"tool_choice is {tool_choice!r} and there are no tools: give some")
    if named:
        chosen = [function for function in functions if function.name == named]
        if not chosen:
            names = ", ".join(function.name for function in functions)
            raise UserError(f"tool_choice names {named!r}, which is not among the tools: they are {names}")
        return ToolUse(shown, HeldCalls(tuple(chosen), style, several=False))
    return ToolUse(shown, HeldCalls(tuple(functions), style, parallel, tool_choice == "required"))


def _named(tool_choice: str | Mapping[str, Any] | None) -> str:
    """The function that a tool_choice names, nothing if it is of the other kinds."""
    if tool_choice in (None, "none", "auto", "required"):
        return ""
    if isinstance(tool_choice, Mapping) and tool_choice.get("type") == "function":
        function = tool_choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and name:
            return name
    raise UserError(
        f"tool_choice is {tool_choice!r}: it must be 'none', 'auto', 'required' or "
        "{'type': 'function', 'function': {'name': ...}}"
    )


def _functions(tools: Sequence[Mapping[str, Any]] | None) -> list[Function]:
    if tools is None:
        return []
    if isinstance(tools, str | bytes) or not isinstance(tools, Sequence):
        raise UserError(f"tools is a {type(tools).__name__}: it must be a list")
    if len(tools) > MAX_TOOLS:
        raise UserError(f"tools has {len(tools)} entries: give {MAX_TOOLS} at most")
    found: dict[str, Function] = {}
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            raise UserError(f"tools[{i}] must be {{'type': 'function', 'function': {{'name': ..., ...}}}}")
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(
                f"tools[{i}].function.name is {name!r}: it must be of letters, digits, _ . : / - and 128 at most"
            )
        if name in found:
            raise UserError(f"tools[{i}].function.name is {name!r}, as that of another tool: rename one")
        if not isinstance(function.get("description", ""), str | None):
            raise UserError(f"tools[{i}].function.description is no text")
        if not isinstance(strict := function.get("strict"), bool | None):
            raise UserError(f"tools[{i}].function.strict is {strict!r}: it must be True or False")
        place = f"tools[{i}].function.parameters"
        found[name] = Function(name, _object_schema(parameters, place), place, strict is True)
    return list(found.values())


def _object_schema(parameters: Any, place: str) -> str:
    """The schema of a function's arguments as JSON text; without one, it takes none."""
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping):
        raise UserError(f"{place} is a {type(parameters).__name__}: it must be the JSON schema of an object")
    kind = parameters.get("type", "object")
    if kind != "object":
        raise UserError(f"{place} is of the type {kind!r}: arguments are always an object")
    try:
        composed = {"$ref", "anyOf", "oneOf", "allOf"} & parameters.keys()
        return json.dumps(parameters if composed else {**parameters, "type": "object"}, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{place} is not plain JSON: {error}") from None
