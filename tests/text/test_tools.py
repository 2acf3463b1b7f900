"""Tool calls and reasoning in the text of answers: the same however the text is cut, and nothing lost."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from dsv3.errors import UserError
from dsv3.text import Tokenizer
from dsv3.text.tools import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    READABLE,
    SEPARATOR,
    Answer,
    AnswerParser,
    CallEnd,
    CallStart,
    Content,
    Event,
    Function,
    HeldCalls,
    Reasoning,
    ReasoningParser,
    Style,
    ToolCall,
    ToolCallParser,
    ToolUse,
    call_style,
    gather,
    reasoning_opened,
    tool_use,
    write_calls,
)
from tests.text.toy import BOS, EOS, train

PIECES = [
    *READABLE,
    "<",
    "<｜",
    "\n",
    " ",
    "```",
    "```json\n",
    '"',
    "\\",
    "{",
    "}",
    "function",
    "f",
    '{"a": 1}',
    "林",
]

names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,20}", fullmatch=True)
texts = st.text(st.characters(codec="utf-8"), max_size=10) | st.lists(
    st.sampled_from(PIECES), max_size=5
).map("".join)
values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def arguments(draw: st.DrawFn) -> str:
    value = draw(st.dictionaries(texts, values, max_size=3))
    return json.dumps(value, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 2])))


calls = st.lists(st.builds(ToolCall, names, arguments()), min_size=1, max_size=3)
styles: st.SearchStrategy[Style] = st.sampled_from(["v3", "v3.1"])


def cut(text: str, places: Sequence[int]) -> Iterator[str]:
    """The text in pieces, cut at these places."""
    at = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return (text[a:b] for a, b in zip(at, at[1:], strict=False))


def events(parser: Any, pieces: Any) -> list[Event]:
    return [event for piece in pieces for event in parser.push(piece)] + parser.close()


def read(text: str) -> Answer:
    return gather(events(ToolCallParser(), [text]))


# Calls ------------------------------------------------------------------------------------------------------


@given(calls, styles, st.lists(st.integers(0, 10_000), max_size=20), texts.filter(lambda t: "<" not in t))
def test_calls_that_are_written_are_read_however_they_are_cut(
    calls: list[ToolCall], style: Style, places: list[int], content: str
) -> None:
    text = content + write_calls(calls, style)
    found = events(ToolCallParser(), cut(text, places))
    assert gather(found) == Answer(content, tuple(calls))
    assert [e.index for e in found if isinstance(e, CallEnd)] == list(range(len(calls)))


def merged(found: list[Event]) -> list[Event]:
    """Neighbouring pieces of the same thing as one."""
    whole: list[Any] = []
    for event in found:
        last = whole[-1] if whole else None
        if isinstance(event, CallStart | CallEnd) or type(last) is not type(event):
            whole.append(event)
        else:
            whole[-1] = type(event)(**{**vars(event), "text": last.text + event.text})  # type: ignore[attr-defined]
    return whole


@given(
    st.lists(st.sampled_from(PIECES), max_size=30).map("".join), st.lists(st.integers(0, 10_000), max_size=20)
)
def test_any_text_gives_the_same_events_however_it_is_cut(text: str, places: list[int]) -> None:
    for make in (
        ToolCallParser,
        ReasoningParser,
        lambda: AnswerParser(opened=True, tools=True),
        lambda: AnswerParser(opened=True, tools=True, instead=True),
    ):
        whole = merged(events(make(), [text]))
        assert merged(events(make(), cut(text, places))) == whole
        assert merged(events(make(), text)) == whole, "one character at a time"


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_nothing_that_is_no_call_is_lost(text: str) -> None:
    found = events(ToolCallParser(), [text])
    if not any(isinstance(event, CallStart) for event in found):
        assert gather(found).content == text


@pytest.mark.parametrize("style", ["v3", "v3.1"])
def test_arguments_stream_as_they_come(style: Style) -> None:
    text = write_calls([ToolCall("find", '{"where": "the wood"}')], style)
    parser, at = ToolCallParser(), text.index("the wood")
    before = gather(parser.push(text[:at]))
    assert before == Answer("", (ToolCall("find", '{"where": "'),))
    assert gather([CallStart(0, "find"), *parser.push("the ")]).calls[0].arguments == "the "


@pytest.mark.parametrize(
    ("text", "content", "found"),
    [
        # what models forget or add
        (f"{CALL_BEGIN}f{SEPARATOR}{{}}{CALL_END}", "", [("f", "{}")]),
        (f"{CALLS_BEGIN}{CALL_BEGIN}f{SEPARATOR}{{}}", "", [("f", "{}")]),
        (f"{CALLS_BEGIN}{CALL_BEGIN}f{SEPARATOR}{{}}{CALLS_END}", "", [("f", "{}")]),
        (f"{CALLS_BEGIN}\n{CALL_BEGIN}f{SEPARATOR} {{}} {CALL_END} {CALLS_END}", "", [("f", "{}")]),
        (f"{CALL_BEGIN}f{SEPARATOR}{{}}{CALL_BEGIN}g{SEPARATOR}{{}}", "", [("f", "{}"), ("g", "{}")]),
        (f"{CALL_BEGIN}function{SEPARATOR}f\n{{}}{CALL_END}", "", [("f", "{}")]),
        (f"{CALL_BEGIN}function{SEPARATOR}f\n```json\n{{}}\n{CALL_END}", "", [("f", "{}")]),
        (f"{CALL_BEGIN}function{SEPARATOR}f\n```\n{{}}\n``` \n{CALL_END}", "", [("f", "{}")]),
        (f"{CALLS_BEGIN}{CALL_BEGIN}f{SEPARATOR}{{}}{CALL_END}{CALLS_END}\nSo.", "\nSo.", [("f", "{}")]),
        # no arguments are none
        (f"{CALL_BEGIN}f{SEPARATOR}{CALL_END}", "", [("f", "{}")]),
        (f"{CALL_BEGIN}function{SEPARATOR}f{CALL_END}", "", [("f", "{}")]),
        (f"{CALL_BEGIN}function{SEPARATOR}f\n```json\n\n```{CALL_END}", "", [("f", "{}")]),
        # arguments that are no JSON are handed on
        (
            f'{CALL_BEGIN}f{SEPARATOR}{{"a" 1}}{CALL_END}{CALL_BEGIN}g{SEPARATOR}{{}}',
            "",
            [("f", '{"a" 1}'), ("g", "{}")],
        ),
        (f'{CALL_BEGIN}f{SEPARATOR}{{"a": "say "hi""}}{CALL_END}', "", [("f", '{"a": "say "hi""}')]),
        (f"{CALL_BEGIN}function{SEPARATOR}f\n```json\n{{}} x ```\n```{CALL_END}.", ".", [("f", "{} x ```")]),
        (f'{CALL_BEGIN}f{SEPARATOR}{{"a": [1', "", [("f", '{"a": [1')]),
        # a marker in a string is text
        (f'{CALL_BEGIN}f{SEPARATOR}{{"a": "{CALL_END}"}}{CALL_END}', "", [("f", f'{{"a": "{CALL_END}"}}')]),
        # what never becomes a call is content
        (CALLS_BEGIN, CALLS_BEGIN, []),
        (f"{CALLS_BEGIN}{CALLS_END}", f"{CALLS_BEGIN}{CALLS_END}", []),
        (f"{CALLS_BEGIN}hm{CALLS_END}", f"{CALLS_BEGIN}hm{CALLS_END}", []),
        (f"a{CALLS_BEGIN}{CALL_BEGIN}f", f"a{CALLS_BEGIN}{CALL_BEGIN}f", []),
        (f"{CALL_BEGIN}{SEPARATOR}{{}}{CALL_END}", f"{CALL_BEGIN}{SEPARATOR}{{}}{CALL_END}", []),
        (f"{CALL_BEGIN}two words{SEPARATOR}{{}}", f"{CALL_BEGIN}two words{SEPARATOR}{{}}", []),
        (f"{CALL_BEGIN}{'f' * 300}{SEPARATOR}{{}}", f"{CALL_BEGIN}{'f' * 300}{SEPARATOR}{{}}", []),
        (f"{CALL_BEGIN}x{CALL_BEGIN}f{SEPARATOR}{{}}", f"{CALL_BEGIN}x", [("f", "{}")]),
        ("a < b and <｜tool▁ca", "a < b and <｜tool▁ca", []),
    ],
)
def test_what_models_get_wrong(text: str, content: str, found: list[tuple[str, str]]) -> None:
    assert read(text) == Answer(content, tuple(ToolCall(*call) for call in found))


def test_a_call_that_is_cut_off_has_no_end() -> None:
    found = events(ToolCallParser(), [f'{CALL_BEGIN}f{SEPARATOR}{{"a": '])
    assert CallStart(0, "f") in found and CallEnd(0) not in found


def test_a_long_answer_costs_the_same_per_character() -> None:
    def seconds(n: int) -> float:
        text = f'{CALL_BEGIN}f{SEPARATOR}{{"a": "' + "x" * n
        parser, start = ToolCallParser(), time.perf_counter()
        for char in text:
            parser.push(char)
        return time.perf_counter() - start

    assert min(seconds(20_000) for _ in range(2)) < 60 * min(seconds(2_000) for _ in range(3))


# Reasoning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "opened", "answer"),
    [
        ("<think>\nso\n</think>\n\nYes.", False, Answer("Yes.", reasoning="so")),
        ("so\n</think>\n\nYes.", True, Answer("Yes.", reasoning="so")),
        ("<think>\nso</think>Yes.", True, Answer("Yes.", reasoning="so")),
        ("Yes. <think>no</think>", False, Answer("Yes. <think>no</think>")),
        ("</think>Yes.", True, Answer("Yes.")),
        ("still think", True, Answer("", reasoning="still think")),
        ("<thin", False, Answer("<thin")),
        (" <thi", True, Answer("", reasoning="<thi")),
        ("  Yes.", False, Answer("  Yes.")),
        ("a<b </thin </think> c</think>", True, Answer("c</think>", reasoning="a<b </thin")),
        (
            "so" + write_calls([ToolCall("f", "{}")]),
            True,
            Answer("", (ToolCall("f", "{}"),), reasoning="so"),
        ),
    ],
)
def test_reasoning_is_told_from_the_answer(text: str, opened: bool, answer: Answer) -> None:
    parser = AnswerParser(reasoning=True, opened=opened, tools=True)
    assert gather(events(parser, text)) == answer


def test_an_answer_is_plain_text_unless_more_is_looked_for() -> None:
    text = "<think>a</think>" + write_calls([ToolCall("f", "{}")])
    assert events(AnswerParser(), [text]) == [Content(text)]
    assert isinstance(events(AnswerParser(reasoning=True), [text])[0], Reasoning)


CALL = write_calls([ToolCall("f", '{"a": 1}')])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (f'{{"a": "{CALL}"}}', Answer(f'{{"a": "{CALL}"}}')),
        (f" {CALL}", Answer(f" {CALL}")),
        (CALL, Answer("", (ToolCall("f", '{"a": 1}'),))),
        ("<｜tool▁calls▁beg", Answer("<｜tool▁calls▁beg")),
        ("", Answer("")),
    ],
)
def test_calls_in_place_of_content_begin_the_answer(text: str, answer: Answer) -> None:
    for pieces in (text, [text]):
        assert gather(events(AnswerParser(tools=True, instead=True), pieces)) == answer


def test_calls_in_place_of_content_come_after_reasoning() -> None:
    said = events(AnswerParser(opened=True, tools=True, instead=True), f"so</think>{CALL}")
    assert gather(said) == Answer("", (ToolCall("f", '{"a": 1}'),), "so")


def test_prompts_tell_whether_reasoning_is_open() -> None:
    assert reasoning_opened("<｜Assistant｜><think>\n") and reasoning_opened("<think>")
    assert not reasoning_opened("<｜Assistant｜></think>") and not reasoning_opened("<think> ?")


# Tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [True, False])
def test_markers_stay_in_the_text_of_a_stream(special: bool) -> None:
    backend = train()
    backend.add_tokens([AddedToken(token, normalized=False, special=special) for token in READABLE[:5]])
    tokenizer = Tokenizer(backend, {"bos_token": BOS, "eos_token": EOS})
    text = "I look." + write_calls([ToolCall("find", '{"where": "林"}')])
    ids = [tokenizer.bos_token_id or 0, *tokenizer.encode(text)]
    assert tokenizer.readable_ids & set(ids), "the vocabulary spells markers as tokens"

    def streamed(**kwargs: Any) -> str:
        decoder = tokenizer.stream(**kwargs)
        return "".join(map(decoder.push, ids)) + decoder.flush()

    assert streamed(keep=tokenizer.readable_ids) == text
    assert (CALL_BEGIN in streamed()) is not special
    assert streamed(keep=tokenizer.readable_ids, skip_special_tokens=False) == BOS + text


def test_vocabularies_without_markers_spell_them() -> None:
    tokenizer = Tokenizer(train(), {"bos_token": BOS, "eos_token": EOS})
    assert len(tokenizer.readable_ids) == 2, "the toy has <think> and </think>"
    decoder = tokenizer.stream(keep=tokenizer.readable_ids)
    calls = [ToolCall("find", '{"where": "林"}')]
    pieces = [*map(decoder.push, tokenizer.encode(write_calls(calls))), decoder.flush()]
    assert gather(events(ToolCallParser(), pieces)) == Answer("", tuple(calls))


# What a request asks for ------------------------------------------------------------------------------------

FIND: dict[str, Any] = {
    "type": "function",
    "function": {"name": "find", "parameters": {"properties": {"where": {"type": "string"}}}},
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}


def test_tool_choice() -> None:
    for tools, choice in ((None, None), ([], "auto"), ([FIND], "none"), (None, "none")):
        assert tool_use(tools, choice) == ToolUse(None)
    for choice in (None, "auto"):
        use = tool_use([FIND, NOW], choice)
        assert use.shown == [FIND, NOW] and use.held is not None
        assert use.held.free and not use.held.required
    strict = {"type": "function", "function": {**FIND["function"], "strict": True}}
    for tools, parallel in (([NOW, strict], True), ([NOW], False)):
        held = tool_use(tools, "auto", parallel=parallel).held
        assert held is not None and not held.free and not held.required and held.several is parallel
        assert [function.strict for function in held.functions] == [False, True][: len(tools)]

    required = tool_use([FIND, NOW], "required", "v3.1").held
    assert required is not None and required.style == "v3.1" and required.several
    assert [function.name for function in required.functions] == ["find", "now"]
    assert [json.loads(function.parameters) for function in required.functions] == [
        {"type": "object", "properties": {"where": {"type": "string"}}},
        {"type": "object", "properties": {}},
    ]
    assert tool_use([FIND], "required", parallel=False).held == HeldCalls(required.functions[:1], "v3", False)

    named = tool_use([FIND, NOW], {"type": "function", "function": {"name": "now"}})
    now = Function("now", '{"type": "object", "properties": {}}', "tools[1].function.parameters")
    assert named == ToolUse([FIND, NOW], HeldCalls((now,), "v3", several=False))


@pytest.mark.parametrize(
    ("tools", "choice", "says"),
    [
        (None, "required", "there are no tools"),
        ([], {"type": "function", "function": {"name": "f"}}, "there are no tools"),
        ([FIND], "some", "tool_choice is 'some'"),
        ([FIND], {"type": "function"}, "tool_choice is"),
        ([FIND], {"type": "function", "function": {"name": "lose"}}, "names 'lose'.*they are find"),
        ("find", None, "tools is a str"),
        ([FIND, 5], None, r"tools\[1\] must be"),
        ([{"type": "web_search"}], None, r"tools\[0\] must be"),
        ([{"type": "function", "function": {}}], None, r"tools\[0\].function.name is None"),
        ([{"type": "function", "function": {"name": "<｜User｜>"}}], None, r"tools\[0\].function.name"),
        ([FIND, FIND], None, r"tools\[1\].function.name is 'find', as that of another"),
        ([NOW] * 129, None, "129 entries"),
        ([{"type": "function", "function": {"name": "f", "description": 5}}], None, "description"),
        ([{"type": "function", "function": {"name": "f", "strict": 1}}], None, "strict is 1"),
        (
            [{"type": "function", "function": {"name": "f", "parameters": []}}],
            None,
            r"tools\[0\].function.parameters",
        ),
        ([{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}], None, "'array'"),
        ([{"type": "function", "function": {"name": "f", "parameters": {"x": {1}}}}], None, "not plain JSON"),
    ],
)
def test_what_is_wrong_with_tools_is_named(tools: Any, choice: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        tool_use(tools, choice)
    assert "\n" not in str(error.value)


def test_the_template_tells_how_calls_are_written() -> None:
    assert call_style(None) == "v3"
    assert call_style("{{ messages }}") == "v3"
    assert call_style(f"'{CALLS_BEGIN}{CALL_BEGIN}' + name + '{SEPARATOR}' + arguments") == "v3.1"
    assert call_style(f"'{CALLS_BEGIN}' + kind + '{SEPARATOR}' + name + '\\n```json\\n' + arguments") == "v3"
