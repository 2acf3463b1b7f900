"""From messages to the text that a chat model was tuned on.

A chat format says where the turns begin and end. DeepSeek-V3's is

    <｜begin▁of▁sentence｜>system text<｜User｜>question<｜Assistant｜>answer<｜end▁of▁sentence｜>

with the turns repeating, and the prompt for the next answer ends in `<｜Assistant｜>`. A checkpoint brings
its own format as a Jinja template, a program that came with the weights; it runs in Jinja's sandbox, with
the few additions that transformers gives it. DeepSeek's format (`DEEPSEEK_TEMPLATE`) is one more such
template, for checkpoints that have none.

The special tokens are the authority in this text: who writes `<｜Assistant｜>` decides whose words follow.
So a message, or a tool's description, that *contains* the characters `<｜Assistant｜>` must not become that
token. Before rendering, `shield` puts a marker, a character that occurs nowhere in them, into each such string;
the tokens that the template itself writes have no marker. The tokenizer encodes the one kind as tokens, the
other as plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cache, lru_cache, partial
from typing import Any, NoReturn, TypedDict, cast

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsv3.errors import UserError
from dsv3.text.tools import Style, ToolCall, call_style, write_calls


class Message(TypedDict):
    """One turn of a chat, in OpenAI's form. Other keys (`name`, `tool_call_id`, ...) are handed on to the template."""

    role: str
    content: str | None
    """None only in an assistant's turn, where its `tool_calls` are all there is. OpenAI's list of text parts is taken
    as well: `[{"type": "text", "text": ...}]`."""


ROLES = ("system", "user", "assistant", "tool")


def _tools_section(style: Style) -> str:
    """The part of a template that describes the tools and how they are called."""
    apart = ", each on a line of its own" if style == "v3" else ""
    return (
        "## Tools\n\nThese functions are there for you:\n\n"
        "{% for tool in tools %}{% set function = tool['function'] or tool %}"
        "### {{ function['name'] }}\n\n"
        "{% if function['description'] %}{{ function['description'] }}\n\n{% endif %}"
        "Parameters: {{ (function['parameters'] or {}) | tojson }}\n\n"
        "{% endfor %}"
        "To call one, write exactly\n\n" + write_calls([ToolCall("NAME", "ARGUMENTS")], style) + "\n\n"
        "where ARGUMENTS is JSON that fits the parameters. Several calls stand between the same outer marks"
        f"{apart}. What they return comes in the next turn."
    )


DEEPSEEK_TEMPLATE = (
    "{{ bos_token }}"
    "{% set ns = namespace(after='', outputs=false) %}"
    "{% for message in messages if message['role'] == 'system' %}"
    "{{ ns.after }}{{ message['content'] }}{% set ns.after = '\n\n' %}"
    "{% endfor %}"
    "{% if tools %}{{ ns.after }}" + _tools_section("v3") + "{% endif %}"
    "{% for message in messages if message['role'] != 'system' %}"
    "{% if ns.outputs and message['role'] != 'tool' %}<｜tool▁outputs▁end｜>{% endif %}"
    "{% if message['role'] == 'user' %}<｜User｜>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% if not ns.outputs %}<｜Assistant｜>{% endif %}"
    "{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '<｜tool▁calls▁begin｜>' if loop.first else '\n' }}"
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ call['function']['name'] }}\n"
    "```json\n"
    "{% set arguments = call['function']['arguments'] %}"
    "{{ arguments if arguments is string else arguments | tojson }}\n"
    "```<｜tool▁call▁end｜>"
    "{{ '<｜tool▁calls▁end｜>' if loop.last }}"
    "{% endfor %}"
    "{{ eos_token }}"
    "{% else %}"
    "{{ '\n' if ns.outputs else '<｜tool▁outputs▁begin｜>' }}"
    "<｜tool▁output▁begin｜>{{ message['content'] }}<｜tool▁output▁end｜>"
    "{% endif %}"
    "{% set ns.outputs = message['role'] == 'tool' %}"
    "{% endfor %}"
    "{% if ns.outputs %}<｜tool▁outputs▁end｜>{% endif %}"
    "{% if add_generation_prompt and not ns.outputs %}<｜Assistant｜>{% endif %}"
)
"""DeepSeek-V3's chat format: the text that its own template gives, and a description of the tools, which its own lacks.

After the outputs of tools the answer goes on at once, without `<｜Assistant｜>`, as in DeepSeek's."""

# Reasoning models write these into their answers, and their templates look for them there.
_REASONING = re.compile(r"</?think>|◁/?think▷")


def check_messages(messages: Sequence[Message]) -> None:
    """Raise UserError naming the first message that is not one."""
    form = "{'role': ..., 'content': ...}"
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise UserError(f"messages is a {type(messages).__name__}: give a list of {form}")
    if not messages:
        raise UserError(f"messages is empty: give at least one {form}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise UserError(f"messages[{i}] is a {type(message).__name__}: give {form}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"messages[{i}] has the role {role!r}: it must be one of {', '.join(ROLES)}")
        calls = message.get("tool_calls") if role == "assistant" else None
        if calls:
            _check_calls(calls, f"messages[{i}].tool_calls")
        if isinstance(content, list) and content:
            for part in content:
                if (
                    not isinstance(part, dict)
                    or part.get("type") != "text"
                    or not isinstance(part.get("text"), str)
                ):
                    raise UserError(
                        f"messages[{i}] has the content part {part!r}: it must be a string, or "
                        "{'type': 'text', 'text': ...}"
                    )
        elif not isinstance(content, str) and not (calls and content is None):
            raise UserError(f"messages[{i}] has the content {content!r}: it must be a string")


def _check_calls(calls: Any, place: str) -> None:
    if not isinstance(calls, list):
        raise UserError(f"{place} is a {type(calls).__name__}: it must be a list")
    for i, call in enumerate(calls):
        # Templates of other makers know calls without `function` in between.
        function = call.get("function", call) if isinstance(call, dict) else None
        function = function if isinstance(function, dict) else {}
        if not isinstance(function.get("name"), str) or not isinstance(function.get("arguments"), str | dict):
            raise UserError(
                f"{place}[{i}] must be {{'type': 'function', 'function': {{'name': ..., 'arguments': JSON text}}}}"
            )


def plain_messages(messages: Sequence[Message]) -> list[Message]:
    """Messages that have passed `check_messages`, in the one form that templates are written for.

    Content is a text: parts of it become lines. A turn without tool calls has no key for them, and one that is nothing
    but calls has the content None, since templates ask for that. Arguments have their escapes resolved: what a
    template may make of them is there to be seen before it runs.
    """
    plain = []
    for message in messages:
        new: dict[str, Any] = dict(message)
        if isinstance(new.get("content"), list):
            new["content"] = "\n".join(part["text"] for part in new["content"])
        if new["role"] == "assistant" and new.get("tool_calls"):
            new["content"] = new.get("content") or None
            new["tool_calls"] = [_plain_call(call) for call in new["tool_calls"]]
        else:
            new.pop("tool_calls", None)
        plain.append(cast(Message, new))
    return plain


def _plain_call(call: dict[str, Any]) -> dict[str, Any]:
    function = {**call.get("function", call)}
    arguments = function["arguments"]
    if isinstance(arguments, str) and "\\" in arguments:
        with suppress(ValueError, RecursionError):  # a model may have written what is no JSON
            function["arguments"] = json.dumps(json.loads(arguments), ensure_ascii=False)
    return {"type": "function", **call, "function": function} if "function" in call else function


class _JSONText(str):
    """Arguments of a call: text to templates that write it as it is, the value to those that use `tojson`."""


def render(template: str, messages: Sequence[Message], variables: dict[str, Any]) -> str:
    """The text of a chat. `variables` are the template's: special tokens, add_generation_prompt, tools, ...

    Tools that the template does not ask about are described at the end of the system text: those of DeepSeek's own
    leave that to the one who asks. Raises UserError if the template is broken, does something the sandbox forbids, or
    refuses the messages.
    """
    try:
        # A published template asks whether `content` is none, and a missing one is something else to Jinja.
        copies: list[dict[str, Any]] = [{"content": None, **message} for message in messages]
        for message in copies:
            if message.get("tool_calls"):
                message["tool_calls"] = [_with_json_text(call) for call in message["tool_calls"]]
        if variables.get("tools") and "tools" not in variables_of(template):
            copies = _describe(copies, variables["tools"], call_style(template))
        return _compiled(template).render(messages=copies, **variables)
    except Exception as error:  # a program of somebody else's: whatever it raises is an error of the input
        raise UserError(f"the chat template cannot render these messages: {error}") from error


def _with_json_text(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _with_json_text(call["function"])}
    arguments = call["arguments"]
    return {**call, "arguments": _JSONText(arguments) if isinstance(arguments, str) else arguments}


def _describe(messages: list[dict[str, Any]], tools: Any, style: Style) -> list[dict[str, Any]]:
    """The messages with a description of the tools in the last system message."""
    section = _compiled(_tools_section(style)).render(tools=tools)
    systems = [i for i, message in enumerate(messages) if message["role"] == "system"]
    if not systems:
        return [{"role": "system", "content": section}, *messages]
    last = messages[systems[-1]]
    described = {**last, "content": f"{last['content']}\n\n{section}" if last["content"] else section}
    return [*messages[: systems[-1]], described, *messages[systems[-1] + 1 :]]


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@lru_cache(maxsize=16)
def variables_of(template: str) -> frozenset[str]:
    """The variables that a template asks for."""
    found = jinja2.meta.find_undeclared_variables(_environment().parse(template))
    return frozenset(found - _environment().globals.keys())


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """The sandbox, with the switches, functions and tags that transformers gives a template."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda style: datetime.now().strftime(style)
    return env


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the model said, for training masks; in rendering it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (the name and form that Jinja asks for)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja's own filter escapes <, >, & and ' for HTML."""
    if isinstance(value, _JSONText):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def shield(
    messages: Sequence[Message], variables: Mapping[str, Any], control: re.Pattern[str]
) -> tuple[list[Message], dict[str, Any], str]:
    """Break every control token in what a template is given; returns messages, variables and the marker.

    control: matches the control tokens. The marker is one character that occurs in no message and no variable;
    it stands after the first character of each match. In what the assistant said, `<think>` and `</think>` are left
    whole: the model writes them as tokens, and its template looks for them. Raises UserError where something
    is no JSON value: what we cannot look into we cannot shield.
    """

    def broken(match: re.Match[str]) -> str:
        return match[0][0] + marker + match[0][1:]

    def broken_in_answer(match: re.Match[str]) -> str:
        return match[0] if _REASONING.fullmatch(match[0]) else broken(match)

    try:
        used = set(json.dumps([list(messages), dict(variables)], ensure_ascii=False))
        marker = next(c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in used)  # plane 15, private use
        shielded = []
        for message in messages:
            copy = _map_strings(message, partial(control.sub, broken))
            if message["role"] == "assistant" and isinstance(message["content"], str):
                copy["content"] = control.sub(broken_in_answer, message["content"])
            shielded.append(copy)
        return shielded, _map_strings(dict(variables), partial(control.sub, broken)), marker
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the chat or a variable of its template is not plain JSON: {error}") from None


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of nested lists and objects with every string changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value


def latest_turns(messages: Sequence[Message], fits: Callable[[list[Message]], bool]) -> list[Message]:
    """The system messages and as many of the latest turns as `fits` accepts, at least the last message.

    What is left begins with a user's message, so that no answer stands there without its question. `fits` is
    asked first about everything, then with one turn less each time.
    """
    kept = list(messages)
    while not fits(kept):
        turns = [i for i, message in enumerate(kept) if message["role"] != "system"]
        later = [i for i in turns[1:] if kept[i]["role"] == "user"]
        if not later:
            break
        kept = [message for i, message in enumerate(kept) if message["role"] == "system" or i >= later[0]]
    return kept
