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
from datetime import datetime
from functools import lru_cache, partial
from typing import Any, NoReturn, TypedDict

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsv3.errors import UserError


class Message(TypedDict):
    """One turn of a chat. Other keys (`name`, `tool_calls`, ...) are handed on to the template."""

    role: str
    content: str | None
    """None only in an assistant's turn, where its `tool_calls` are all there is."""


ROLES = ("system", "user", "assistant", "tool")

DEEPSEEK_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages if message['role'] == 'system' %}"
    "{{ '' if loop.first else '\n\n' }}{{ message['content'] }}"
    "{% endfor %}"
    "{% for message in messages if message['role'] != 'system' %}"
    "{% if message['role'] == 'user' %}<｜User｜>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' and not message['tool_calls'] %}"
    "<｜Assistant｜>{{ message['content'] }}{{ eos_token }}"
    "{% else %}"
    "{% set what = 'tool calls' if message['tool_calls'] else 'the role ' ~ message['role'] %}"
    "{{ raise_exception('no place for ' ~ what) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
"""DeepSeek-V3's chat format: the text that its own template gives for system, user and assistant turns."""

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
        calls = role == "assistant" and message.get("tool_calls")
        if not isinstance(content, str) and not (calls and content is None):
            raise UserError(f"messages[{i}] has the content {content!r}: it must be a string")


def render(template: str, messages: Sequence[Message], variables: dict[str, Any]) -> str:
    """The text of a chat. `variables` are the template's: special tokens, add_generation_prompt, tools, ...

    Raises UserError if the template is broken, does something the sandbox forbids, or refuses the messages.
    """
    try:
        # A published template asks whether `content` is none, and a missing one is something else to Jinja.
        copies = [{"content": None, **message} for message in messages]
        return _compiled(template).render(messages=copies, **variables)
    except Exception as error:  # a program of somebody else's: whatever it raises is an error of the input
        raise UserError(f"the chat template cannot render these messages: {error}") from error


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    """The template in a sandbox, with the switches, functions and tags that transformers gives it."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda style: datetime.now().strftime(style)
    return env.from_string(template)


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
    it stands after the first character of each match. In assistant turns `<think>` and `</think>` are left
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
            breaker = broken_in_answer if message["role"] == "assistant" else broken
            shielded.append(_map_strings(message, partial(control.sub, breaker)))
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
