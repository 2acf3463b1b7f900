"""Structured output: whatever is drawn at random among what is allowed has the form, and nothing hostile gets through."""

from __future__ import annotations

import json
import random
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import jsonschema_rs
import pytest
import torch
from tokenizers import AddedToken

from dsv3.checkpoint.hub import resolve
from dsv3.engine import grammar as module
from dsv3.engine.grammar import GrammarCompiler, GrammarError, Matcher, StructuredOutput, mask_logits
from dsv3.errors import UserError
from dsv3.text import Tokenizer
from dsv3.text.bpe import TOOL_TOKENS
from dsv3.text.tools import (
    CALL_BEGIN,
    CALLS_BEGIN,
    CALLS_END,
    HeldCalls,
    Style,
    ToolCall,
    ToolCallParser,
    gather,
    tool_use,
    write_calls,
)
from tests.text.toy import ASSISTANT, BOS, EOS, PAD, USER, train

SEEDS = range(25)


@cache
def nano() -> Tokenizer:
    return Tokenizer.from_pretrained(resolve("nano"))


@cache
def toy(tool_tokens: bool = False) -> Tokenizer:
    backend = train()
    if tool_tokens:
        backend.add_tokens([AddedToken(token, normalized=False) for token in TOOL_TOKENS])
    return Tokenizer(backend, {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD})


@cache
def compiler_of(tokenizer: Tokenizer) -> GrammarCompiler:
    """The model has room for 100 tokens more than there are."""
    return GrammarCompiler(tokenizer, tokenizer.vocab_size + 100, tokenizer.eos_token_ids)


def allowed(matcher: Matcher, size: int) -> list[int]:
    logits = torch.zeros(size)
    matcher.mask(logits)
    return (logits == 0).nonzero().flatten().tolist()


def write(matcher: Matcher, tokenizer: Tokenizer, seed: int, patience: int = 25) -> str:
    """A text drawn at random; once patience is over, what closes or ends it is preferred."""
    rng = random.Random(seed)
    ends = set(tokenizer.eos_token_ids)
    closing = [i for c in '"}].' for i in tokenizer.encode(c)]
    ids: list[int] = []
    for step in range(1000):
        choices = allowed(matcher, tokenizer.vocab_size + 100)
        assert choices, "there is always something to say"
        preferred = [i for i in (*ends, *closing) if i in choices] if step > patience else []
        token = preferred[0] if preferred else rng.choice(choices)
        matcher.accept(token)
        if token in ends:
            assert not matcher.failed
            return tokenizer.decode_bytes(ids).decode()
        ids.append(token)
    raise AssertionError(f"no end to {tokenizer.decode(ids)[:200]!r}")


def texts(spec: StructuredOutput, tokenizer: Tokenizer | None = None) -> list[str]:
    tokenizer = tokenizer or nano()
    grammar = compiler_of(tokenizer).compile(spec)
    return [write(grammar.matcher(), tokenizer, seed, seed * 2) for seed in SEEDS]


# What is written has the form -------------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mail": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
        "home": {"$ref": "#/$defs/place"},
    },
    "required": ["name", "age", "home"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"city": {"enum": ["奥斯陆", 'a "b" \\', "Róma 🦊", ""]}, "at": {"type": "number"}},
            "required": ["city", "at"],
        }
    },
}
SCHEMAS: list[Any] = [
    PERSON,
    True,
    {},
    {"type": "object"},
    {"type": "array", "items": PERSON["properties"]["tags"], "minItems": 1, "maxItems": 2},  # type: ignore[index]
    {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"type": "boolean"}],
        "items": False,
        "minItems": 2,
    },
    {"enum": [1, 1.5, -2e30, "é\n", None, True, {"a": [1]}, []]},
    {"type": "integer", "enum": [1, "x", 2.0]},
    {"const": {"a": 'say "hi"', "b": [None]}},
    {"type": ["integer", "null"], "minimum": -7, "exclusiveMaximum": 12},
    {"type": "number", "exclusiveMinimum": -0.5, "maximum": 2.25},
    {"minimum": 5},
    {"maxLength": 3},
    {"items": {"type": "null"}},
    {"required": ["a", "b"], "properties": {"b": {"type": "null"}}},
    {"type": "object", "required": ["a"], "additionalProperties": {"type": "integer"}},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1, "maxProperties": 2},
    {"type": "object", "patternProperties": {"^x[0-9]$": {"type": "integer"}}, "additionalProperties": False},
    {
        "type": "object",
        "propertyNames": {"pattern": "^[a-z]{1,3}$"},
        "additionalProperties": {"type": "null"},
    },
    {"type": "string", "pattern": "^[A-Z]{2}-\\d{3}(-[^a-z]{1,2})?$"},
    {"type": "string", "pattern": "^.{2,5}$"},
    {"type": "string", "pattern": "^[\\s\\S]{2,5}?$"},
    {"type": "string", "pattern": '^["\\\\]{2}\\n(\\t|)\\x01\\u0022[^\\w\\d ][\\]a-d-]+$'},
    {"type": "string", "pattern": "^$|^(?:a|b)c*(?<n>x)?\\W\\D$"},
    {"type": "string", "pattern": ".,+[^a]a"},
    {"type": "string", "minLength": 221},
    {"type": "string", "maxLength": 0},
    {"type": ["string", "null"], "minLength": 2, "maxLength": 4, "format": "email"},
    {"type": "object", "patternProperties": {'^"x"$': True, "^y{2}$": {"type": "null"}}},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {
        "type": "object",
        "anyOf": [{"required": ["a"], "properties": {"a": {"type": "integer"}}}, {"maxProperties": 0}],
    },
    {"oneOf": [{"type": "string"}, {"type": "integer"}]},
    {"allOf": [{"$ref": "#/definitions/n"}], "definitions": {"n": {"type": "null"}}, "description": "x"},
    {"properties": {'k"e\\y\n林': {"type": "null"}}, "required": ['k"e\\y\n林']},
    {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
                "required": ["kids"],
            }
        },
    },
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_json_fits_its_schema(schema: Any) -> None:
    validator = jsonschema_rs.validator_for(schema)
    for text in texts(StructuredOutput(json_schema=json.dumps(schema))):
        value = json.loads(text)
        assert validator.is_valid(value), text


def test_json_objects() -> None:
    found = [json.loads(text) for text in texts(StructuredOutput(json_object=True))]
    assert all(isinstance(value, dict) for value in found) and any(found)


@pytest.mark.parametrize(
    "regex",
    [
        r"[a-z]{2,5}@[a-z]+\.(com|org)",
        r"^(0|[1-9][0-9]*)(\.\d{1,3})?$",
        r"(?:yes|no), [^.]{1,10}\.",
        r"[一-龥]{1,4}🦊?\n",
        r"\s\S\w\W\d\D",
        r'"[^"\\]*"',
        r"",
    ],
)
def test_texts_match_their_expression(regex: str) -> None:
    for text in texts(StructuredOutput(regex=regex)):
        assert re.fullmatch(regex, text, re.ASCII | re.DOTALL), repr(text)


def test_texts_are_of_their_grammar() -> None:
    sums = 'root ::= term ("+" term)*\nterm ::= [1-9] [0-9]{0,3} | "(" root ")"  # Token(3)\n'
    found = texts(StructuredOutput(grammar=sums))
    for text in found:
        assert re.fullmatch(r"[0-9+()]+", text) and isinstance(eval(text), int)
    balanced = 'root ::= "a" root "b" | "林"'
    for text in texts(StructuredOutput(grammar=balanced)):
        depth = text.count("a")
        assert text == "a" * depth + "林" + "b" * depth


def test_texts_are_among_the_choices() -> None:
    choices = ["yes", "no", "", 'a "quoted"\\ one\n', "\x00\x7f\t", "奥斯陆 🦊", "nobody"]
    found = texts(StructuredOutput(choice=tuple(choices)))
    assert set(found) <= set(choices) and len(set(found)) > 3


@pytest.mark.parametrize("tool_tokens", [True, False])
@pytest.mark.parametrize("style", ["v3", "v3.1"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "place.find"}}])
def test_calls_that_are_required_are_made(tool_tokens: bool, style: Style, choice: Any) -> None:
    tools = [
        {"type": "function", "function": {"name": "person", "parameters": PERSON}},
        {"type": "function", "function": {"name": "now"}},
        {
            "type": "function",
            "function": {"name": "place.find", "parameters": {**PERSON["$defs"]["place"]}},  # type: ignore[index]
        },
    ]
    parameters = {t["function"]["name"]: t["function"].get("parameters", {"maxProperties": 0}) for t in tools}  # type: ignore[attr-defined]
    required = tool_use(tools, choice, style).held
    tokenizer = toy(tool_tokens)
    names = []
    for text in texts(StructuredOutput(tool_calls=required), tokenizer):
        parser = ToolCallParser()
        answer = gather([*parser.push(text), *parser.close()])
        assert answer.content == "" and answer.calls
        for call in answer.calls:
            names.append(call.name)
            assert jsonschema_rs.is_valid(parameters[call.name], json.loads(call.arguments))
        assert len(answer.calls) == 1 or choice == "required"
    assert set(names) == ({"person", "now", "place.find"} if choice == "required" else {"place.find"})


FREE = {"properties": {"n": {"multipleOf": 3}}}
"""Parameters that no grammar can hold."""
CITY = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}


def optional(style: Style = "v3", parallel: bool = True, **more: Any) -> StructuredOutput:
    """Calls that may be made, of a function that is strict and one that is not."""
    tools = [
        {"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": True}},
        {"type": "function", "function": {"name": "free", "parameters": FREE}},
    ]
    return StructuredOutput(tool_calls=tool_use(tools, "auto", style, parallel).held, **more)


def follow(matcher: Matcher, tokenizer: Tokenizer, text: str, spelled: bool = False) -> bool:
    """Whether the text may be written; spelled: markers as text, though there are tokens for them."""
    for token in tokenizer.encode(text, allow_special=not spelled):
        if not matcher.allows(token):
            return False
        matcher.accept(token)
    return not matcher.failed


@pytest.mark.parametrize("tool_tokens", [True, False])
@pytest.mark.parametrize("style", ["v3", "v3.1"])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_call_that_is_begun_is_held_to_its_schema(tool_tokens: bool, style: Style, parallel: bool) -> None:
    tokenizer = toy(tool_tokens)
    grammar = compiler_of(tokenizer).compile(optional(style, parallel))
    names = set()
    for seed in SEEDS:
        start = "Let me <｜see｜>.\n" * (seed % 2) + CALLS_BEGIN
        matcher = grammar.matcher()
        assert follow(matcher, tokenizer, start)
        text = start + write(matcher, tokenizer, seed, seed * 2)
        parser = ToolCallParser()
        answer = gather([*parser.push(text), *parser.close()])
        assert answer.content == start.removesuffix(CALLS_BEGIN) and answer.calls
        assert parallel or len(answer.calls) == 1
        for call in answer.calls:
            names.add(call.name)
            value = json.loads(call.arguments)
            assert isinstance(value, dict) and (call.name == "free" or jsonschema_rs.is_valid(CITY, value))
    assert names == {"weather", "free"}

    second = "\n" * (style == "v3") + CALL_BEGIN
    one = write_calls([ToolCall("weather", '{"city": "Oslo", "days": 3}')], style).removesuffix(CALLS_END)
    matcher = grammar.matcher()
    assert follow(matcher, tokenizer, one) and follow(matcher, tokenizer, second) is parallel
    for arguments in ('{"city": "Bonn"', '{"days"', '{"city": "Oslo"}'):
        wrong = write_calls([ToolCall("weather", arguments)], style)
        assert not follow(grammar.matcher(), tokenizer, wrong)
    free = [ToolCall("free", '{"n": 1, "more": [{"x": null}]}')]
    matcher = grammar.matcher()
    assert follow(matcher, tokenizer, write_calls(free, style)) and matcher.finished
    assert not follow(grammar.matcher(), tokenizer, write_calls([ToolCall("other", "{}")], style))


@pytest.mark.parametrize("tool_tokens", [True, False])
def test_without_a_call_any_text_may_come(tool_tokens: bool) -> None:
    tokenizer = toy(tool_tokens)
    eos = tokenizer.eos_token_ids[0]
    grammar = compiler_of(tokenizer).compile(optional())
    for text in (
        "",
        "Yes.",
        "\x00<<｜<｜tool｜> a<b <｜tool▁<｜tool▁cal\n林🦊",
        "<｜tool▁outputs▁begin｜>"[:9],
        "<",
    ):
        matcher = grammar.matcher()
        assert follow(matcher, tokenizer, text) and matcher.allows(eos), text
        assert follow(matcher, tokenizer, CALLS_BEGIN), "and a call after it"
        assert not matcher.allows(eos)
    plain = {i for i in range(tokenizer.vocab_size) if i not in tokenizer.control_ids}
    lacking = plain - set(allowed(grammar.matcher(), tokenizer.vocab_size + 100))
    for token in lacking:  # pieces of characters cannot begin one
        with pytest.raises(UnicodeDecodeError):
            tokenizer.token_bytes(token).decode()


@pytest.mark.parametrize("marker", [CALLS_BEGIN, CALL_BEGIN])
def test_a_marker_that_is_spelled_as_text_begins_no_call(marker: str) -> None:
    """What looks like one is read as a call, so text cannot be a way around its grammar."""
    tokenizer = toy(True)
    for spec in (optional(), optional(after_reasoning=True)):
        for text in (marker, f"so {marker}", f"<<｜tool{marker}"):
            matcher = compiler_of(tokenizer).compile(spec).matcher()
            assert not follow(matcher, tokenizer, text, spelled=True)
    for i in tokenizer.readable_ids - {tokenizer.backend.token_to_id(t) for t in (CALLS_BEGIN, "<think>")}:
        assert not compiler_of(tokenizer).compile(optional()).matcher().allows(i)


def test_reasoning_may_come_before_calls_that_may() -> None:
    tokenizer = toy(True)
    eos = tokenizer.eos_token_ids[0]
    matcher = compiler_of(tokenizer).compile(optional(after_reasoning=True)).matcher()
    assert follow(matcher, tokenizer, "so be it") and not matcher.allows(eos)
    assert follow(matcher, tokenizer, "</think>Yes.") and matcher.allows(eos)
    assert follow(matcher, tokenizer, CALLS_BEGIN)
    matcher = compiler_of(tokenizer).compile(optional()).matcher()
    assert follow(matcher, tokenizer, "<think>so") and not matcher.allows(eos), "a model may begin by itself"
    assert follow(matcher, tokenizer, "</think>Yes.") and matcher.allows(eos)
    matcher = compiler_of(tokenizer).compile(optional(json_object=True, after_reasoning=True)).matcher()
    assert follow(matcher, tokenizer, 'so</think>{"a": 1}') and matcher.allows(eos)


@pytest.mark.parametrize("tool_tokens", [True, False])
@pytest.mark.parametrize(
    "form",
    [{"json_schema": json.dumps(PERSON)}, {"json_object": True}, {"regex": "[a-z]{3}"}, {"choice": ("a",)}],
)
def test_a_form_or_calls(tool_tokens: bool, form: dict[str, Any]) -> None:
    tokenizer = toy(tool_tokens)
    eos = tokenizer.eos_token_ids[0]
    spec = optional(**form)
    assert spec.name == next(iter(form))
    grammar = compiler_of(tokenizer).compile(spec)
    both = [i for i in allowed(grammar.matcher(), tokenizer.vocab_size + 100) if i != eos]
    alone = compiler_of(tokenizer).compile(StructuredOutput(**form))
    only = [i for i in allowed(alone.matcher(), tokenizer.vocab_size + 100) if i != eos]
    assert set(both) - set(only) == {tokenizer.encode(CALLS_BEGIN)[0]} and set(only) <= set(both)
    matcher = grammar.matcher()
    assert not matcher.allows(eos)
    assert follow(matcher, tokenizer, write_calls([ToolCall("weather", '{"city": "Rome", "days": 1}')]))
    assert matcher.finished
    assert not follow(grammar.matcher(), tokenizer, write_calls([ToolCall("weather", '{"city": "Bonn"}')]))
    for seed in range(8):
        matcher, other = grammar.matcher(), alone.matcher()
        token = only[seed % len(only)]
        matcher.accept(token)
        other.accept(token)
        text = write(other, tokenizer, seed, 2 * seed)
        assert follow(matcher, tokenizer, text) and matcher.allows(eos), "what has the form may be written"
        assert not matcher.allows(tokenizer.encode(CALLS_BEGIN)[0]) or "json" not in spec.name


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"properties": {"a": {"type": "null"}}, "required": ["a"]}, r"at \$, strict needs 'additional"),
        ({**CITY, "required": ["city"]}, r"at \$, strict needs every property in 'required', and 'days'"),
        ({**CITY, "properties": {"city": {"type": "object"}, "days": {}}}, r"at \$.properties.city, strict"),
        ({**CITY, "additionalProperties": True}, r"at \$, strict needs 'additionalProperties': false"),
    ],
)
def test_strict_is_what_openai_has_it(parameters: dict[str, Any], says: str) -> None:
    function: dict[str, Any] = {"name": "f", "parameters": parameters}
    for choice in ("auto", "required"):
        for strict in (True, False):
            tool = {"type": "function", "function": {**function, "strict": strict}}
            spec = StructuredOutput(tool_calls=tool_use([tool], choice).held)
            if not strict:
                compiler_of(toy()).compile(spec)
                continue
            with pytest.raises(UserError, match=rf"^tools\[0\].function.parameters: {says}"):
                compiler_of(toy()).compile(spec)


# Tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        StructuredOutput(regex="(.|\n)*"),
        StructuredOutput(grammar="root ::= [^]*"),
        StructuredOutput(grammar='root ::= TagDispatch(("zz", x))\nx ::= "a"'),
        StructuredOutput(grammar='root ::= [^] [^"]*'),
        StructuredOutput(json_schema="true"),
    ],
)
def test_control_tokens_and_padding_never_come(spec: StructuredOutput) -> None:
    tokenizer = toy(True)
    control = {tokenizer.backend.token_to_id(t) for t in (BOS, PAD, USER, ASSISTANT, "<think>", *TOOL_TOKENS)}
    matcher = compiler_of(tokenizer).compile(spec).matcher()
    for text in ("", '"'):
        for token in tokenizer.encode(text):
            matcher.accept(token)
        found = set(allowed(matcher, tokenizer.vocab_size + 100))
        assert found and not found & control
        assert max(found) < tokenizer.vocab_size


def test_the_end_comes_only_where_the_form_is_complete() -> None:
    tokenizer = nano()
    eos = tokenizer.eos_token_ids[0]
    matcher = compiler_of(tokenizer).compile(StructuredOutput(regex="a(bc)?")).matcher()
    (a,), (b,), (c,) = map(tokenizer.encode, "abc")
    seen = []
    for token in (a, b, c, eos, eos):
        seen.append((matcher.allows(eos), matcher.finished))
        matcher.accept(token)
    assert seen == [(False, False), (True, False), (False, False), (True, True), (True, True)]
    assert allowed(matcher, tokenizer.vocab_size + 100) == [eos], "after the end there is only the end"


def test_a_token_that_was_not_allowed_is_an_error_and_changes_nothing() -> None:
    tokenizer = nano()
    matcher = compiler_of(tokenizer).compile(StructuredOutput(regex="ab")).matcher()
    (a,), (b,) = map(tokenizer.encode, "ab")
    for token in (b, 0, tokenizer.eos_token_ids[0], -1, tokenizer.vocab_size + 99, 10**9):
        with pytest.raises(GrammarError, match=f"the token {token} cannot come next"):
            matcher.accept(token)
    matcher.accept(a)
    assert matcher.allows(b)


def test_answers_of_one_grammar_do_not_meet() -> None:
    tokenizer = nano()
    grammar = compiler_of(tokenizer).compile(StructuredOutput(regex="ab"))
    first, second = grammar.matcher(), grammar.matcher()
    first.accept(tokenizer.encode("a")[0])
    assert not second.allows(tokenizer.encode("b")[0])


def test_a_mask_of_xgrammar_that_is_wrong_ends_the_answer() -> None:
    """The class allows no quote, but after "H" xgrammar 0.2 lets a comma with one pass, and then does not take it."""
    tokenizer = nano()
    spec = StructuredOutput(grammar="root ::= [H] [,]+ [ -!#-~\\ue000-\\U0010ffff] [a]")
    matcher = compiler_of(tokenizer).compile(spec).matcher()
    matcher.accept(tokenizer.encode("H")[0])
    (token,) = tokenizer.encode(',"')
    if matcher.allows(token):
        matcher.accept(token)
        assert matcher.failed and allowed(matcher, tokenizer.vocab_size + 100) == list(
            tokenizer.eos_token_ids
        )


def test_without_an_end_token_the_form_is_finished_all_the_same() -> None:
    tokenizer = nano()
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, [])
    matcher = compiler.compile(StructuredOutput(choice=["a"])).matcher()  # type: ignore[arg-type]
    assert not matcher.finished
    matcher.accept(tokenizer.encode("a")[0])
    assert matcher.finished and not matcher.failed


def test_a_model_with_fewer_words_than_its_tokenizer() -> None:
    tokenizer = nano()
    compiler = GrammarCompiler(tokenizer, 300, tokenizer.eos_token_ids)
    matcher = compiler.compile(StructuredOutput(json_object=True)).matcher()
    assert set(allowed(matcher, 300)) <= set(range(300))


def test_reasoning_comes_before_the_form() -> None:
    tokenizer = toy()
    spec = StructuredOutput(choice=("a",), after_reasoning=True)
    matcher = compiler_of(tokenizer).compile(spec).matcher()
    think_end = tokenizer.backend.token_to_id("</think>")
    eos = tokenizer.eos_token_ids[0]
    for token in tokenizer.encode("so be it"):
        assert matcher.allows(think_end) and not matcher.allows(eos) and not matcher.allows(0)
        matcher.accept(token)
    matcher.accept(think_end)
    assert allowed(matcher, tokenizer.vocab_size + 100) == tokenizer.encode("a")
    without = Tokenizer(nano().backend, {"eos_token": EOS})
    if without.backend.token_to_id("</think>") is None:
        with pytest.raises(UserError, match="</think>"):
            compiler_of(without).compile(spec)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 1000])
def test_logits_are_masked_alike_everywhere(size: int) -> None:
    """xgrammar's kernel for a CPU, and ours for what it does not take: strided rows, other devices."""
    generator = torch.Generator().manual_seed(size)
    flags = torch.rand(size, generator=generator) < 0.5
    bits = module._bits(flags.nonzero().flatten().tolist(), size)
    logits = torch.randn(size, 3, generator=generator)
    mask_logits(logits[:, 1], bits)
    assert torch.equal(logits[:, 1] > -torch.inf, flags) and torch.isfinite(logits[:, [0, 2]]).all()


def test_strided_logits_and_wrong_ones() -> None:
    tokenizer = nano()
    size = tokenizer.vocab_size + 100
    matcher = compiler_of(tokenizer).compile(StructuredOutput(regex="a|b")).matcher()
    logits = torch.zeros(size, 2)
    matcher.mask(logits[:, 1])
    assert (logits[:, 1] == 0).sum() == 2 and (logits[:, 0] == 0).all()
    for wrong in (torch.zeros(size - 1), torch.zeros(1, size), torch.zeros(size, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="float32"):
            matcher.mask(wrong)


# Bad and hostile forms --------------------------------------------------------------------------------------


def nested(depth: int) -> str:
    return '{"properties":{"a":' * depth + "{}" + "}}" * depth


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({}, "exactly one of json_schema, .*none"),
        ({"regex": "a", "json_object": True}, "json_object and regex"),
        ({"regex": 5}, "regex has a int"),
        ({"json_schema": {"type": "object"}}, "json_schema has a dict"),
        ({"json_object": 1}, "json_object is 1"),
        ({"choice": ()}, "choice is"),
        ({"choice": "yes"}, "choice is 'yes'"),
        ({"choice": ("a", 5)}, "choice has a int"),
        ({"choice": ("\ud800",)}, "choice is not valid Unicode"),
        ({"choice": ("x" * 1000,) * 66}, "choice has more than 65,536"),
        ({"tool_calls": "f"}, "tool_calls is a str"),
        ({"tool_calls": HeldCalls(())}, "no functions"),
        ({"tool_calls": HeldCalls(()), "json_object": True}, "exactly one of"),
        ({"tool_calls": HeldCalls((), required=False), "regex": "a", "choice": ("a",)}, "exactly one of"),
        ({"json_schema": "{"}, "json_schema is not JSON"),
        ({"json_schema": '{"const": NaN}'}, "NaN"),
        ({"json_schema": '{"maximum": 1e999}'}, "1e999 is no number that fits"),
        ({"json_schema": '{"const": ' + "9" * 5000 + "}"}, "99.* is no number that fits"),
        ({"json_schema": '{"enum": ["\\ud800"]}'}, "json_schema"),
        ({"json_schema": "5"}, r"json_schema: at \$, a schema is"),
        ({"json_schema": '{"type": "frob"}'}, r'at \$, the type is "frob"'),
        ({"json_schema": '{"type": []}'}, r"at \$, the type is \[\]"),
        ({"json_schema": '{"properties": {"a": {"multipleOf": 2}}}'}, r"at \$.properties.a, 'multipleOf'"),
        ({"json_schema": '{"items": {"not": {}}}'}, r"at \$.items, 'not'"),
        ({"json_schema": '{"if": {}, "then": {}}'}, "'if' is not supported"),
        ({"json_schema": '{"uniqueItems": true}'}, "'uniqueItems'"),
        ({"json_schema": '{"allOf": [{}, {}]}'}, "more than one"),
        ({"json_schema": '{"anyOf": [{}], "minimum": 5}'}, "'minimum' beside 'anyOf'"),
        ({"json_schema": '{"anyOf": [{"type": "null"}], "type": "string"}'}, r"at \$.anyOf\[0\]"),
        ({"json_schema": '{"$ref": "http://x/y"}'}, "only places in this schema"),
        ({"json_schema": '{"$ref": "#/$defs/none"}'}, "json_schema: .*none"),
        ({"json_schema": '{"minimum": 1, "pattern": "a"}'}, "number and no type|string and number"),
        ({"json_schema": '{"pattern": "a", "maxLength": 3}'}, "'pattern' beside a length"),
        ({"json_schema": '{"pattern": "a("}'}, r"at \$, the pattern: at character 2, this \( is not closed"),
        ({"json_schema": '{"pattern": "a)"}'}, "at character 2, there is no"),
        ({"json_schema": '{"pattern": "[a"}'}, r"at character 1, \[ is not finished"),
        ({"json_schema": '{"pattern": "a**"}'}, r"at character 3, there is nothing that \*"),
        ({"json_schema": '{"pattern": "(?=a)"}'}, "looking around"),
        ({"json_schema": '{"pattern": "[b-a]"}'}, "out of order"),
        ({"json_schema": '{"pattern": "[]"}'}, "matches nothing"),
        (
            {"json_schema": '{"properties": {"a": {"pattern": "\\\\p{L}"}}}'},
            r"at \$.properties.a, the pattern: .*\\p",
        ),
        ({"json_schema": '{"pattern": 5}'}, "the pattern is 5"),
        ({"json_schema": '{"minLength": -1}'}, "minLength is -1"),
        ({"json_schema": '{"minLength": 1001}'}, "minLength is 1001"),
        (
            {"json_schema": '{"minProperties": 3, "required": ["a"], "additionalProperties": true}'},
            "2 is all it can be",
        ),
        ({"json_schema": '{"minimum": "x"}'}, "minimum is"),
        ({"json_schema": '{"maximum": 1e300}'}, r"maximum is 1e\+300: it must be below"),
        ({"json_schema": '{"patternProperties": {"a": {}, "^a$": {}}}'}, "two patterns are the same"),
        ({"json_schema": '{"enum": []}'}, "enum is"),
        ({"json_schema": '{"type": "string", "const": 5}'}, "no value of const"),
        ({"json_schema": '{"required": ["a"], "additionalProperties": false}'}, "'a' is required"),
        ({"json_schema": '{"items": [{}]}'}, "prefixItems"),
        ({"json_schema": '{"patternProperties": {"a": {}}, "additionalProperties": true}'}, "keep one"),
        ({"json_schema": '{"minLength": 3, "maxLength": 2}'}, "minLength 3 is more"),
        ({"json_schema": "false"}, "json_schema: .*false"),
        ({"json_schema": '{"$ref": "#"}'}, "no text has this form"),
        ({"json_schema": nested(60)}, "nests deeper than 100"),
        ({"json_schema": "[" * 30_000}, "json_schema"),
        ({"json_schema": '{"a":' * 10_000 + "1" + "}" * 10_000}, "nests deeper than 100"),
        ({"json_schema": " " * 70_000}, "70,000 characters"),
        ({"regex": "(a"}, "regex: Regex parsing error at position"),
        ({"regex": "[a"}, "regex: "),
        ({"regex": r"(a)\1"}, "regex: .*Backreference"),
        ({"regex": "(?=a)"}, "regex: .*Lookahead"),
        ({"regex": r"\p{L}"}, "regex: .*not supported"),
        ({"regex": r"a\z"}, r"regex: at character 2, the escape \\z"),
        ({"regex": "a$b"}, r"regex: at character 2, \$"),
        ({"regex": "a^"}, r"regex: at character 2, \^"),
        ({"regex": "(" * 20_000 + ")" * 20_000}, "regex: "),
        ({"grammar": ""}, "grammar: .*root"),
        ({"grammar": 'root ::= "a'}, "grammar: .*line 1, column 12"),
        ({"grammar": "root ::= nobody"}, "grammar: .*nobody"),
        ({"grammar": 'root ::= "a"\n | Token(3)'}, "grammar: at line 2, Token is not supported"),
        ({"grammar": "root ::= ExcludeToken (3)"}, "ExcludeToken"),
        ({"grammar": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000}, "grammar: "),
        ({"grammar": "root ::= root"}, "no text has this form"),
        ({"grammar": 'root ::= root "a"'}, "no text has this form"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_wrong_forms_say_what_is_wrong_in_a_line(spec: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        compiler_of(nano()).compile(StructuredOutput(**spec))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500 and "/project" not in str(error.value)


def test_wrong_parameters_of_a_tool_are_named() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}
    spec = StructuredOutput(tool_calls=tool_use([tool], "required").held)
    with pytest.raises(UserError, match=r"^tools\[0\].function.parameters: at \$.properties.a, 'not'"):
        compiler_of(nano()).compile(spec)


@pytest.mark.parametrize(
    "spec",
    [
        {"json_schema": nested(45)},
        {"json_schema": '{"type": "string", "minLength": 300, "maxLength": 2000000000}'},
        {"json_schema": '{"type": "array", "items": {"type": "string"}, "minItems": 1000000}'},
        {"json_schema": json.dumps({"enum": [f"v{i}" for i in range(6000)]})},
        {"regex": "((a{1000}){1000}){1000}"},
        {"regex": "(a|a)*(a*)*(a|b)*a(a|b){200}"},
        {
            "grammar": "root ::= r0\n"
            + "".join(f"r{i} ::= r{i + 1} r{i + 1}\n" for i in range(60))
            + 'r60 ::= "a" | ""'
        },
        {"grammar": "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(3000)) + 'r3000 ::= "a"'},
    ],
    ids=lambda value: repr(value)[:60],
)
def test_large_forms_are_done_in_time(spec: dict[str, Any]) -> None:
    start = time.monotonic()
    matcher = compiler_of(nano()).compile(StructuredOutput(**spec)).matcher()
    rng = random.Random(0)
    for _ in range(20):
        matcher.accept(rng.choice(allowed(matcher, nano().vocab_size + 100)))
        if matcher.finished:
            break
    assert time.monotonic() - start < 30


def test_who_waits_too_long_is_told_and_the_work_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = toy()
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids, seconds=0.3)
    compiler.compile(StructuredOutput(regex="warm"))
    go = threading.Event()
    real = module._Vocabulary._compile
    monkeypatch.setattr(module._Vocabulary, "_compile", lambda self, spec: go.wait(20) and real(self, spec))
    for form in ("a", "b", "c"):  # two are under way, the third waits for its turn
        with pytest.raises(UserError, match="regex: preparing it takes longer"):
            compiler.compile(StructuredOutput(regex=form))
    assert compiler.compile(StructuredOutput(regex="warm")), "what is in the cache is there at once"
    go.set()
    deadline = time.monotonic() + 20
    while compiler._running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {StructuredOutput(regex="a"), StructuredOutput(regex="b")} <= set(compiler._cache)
    assert StructuredOutput(regex="c") not in compiler._cache, "nobody waited for it when its turn came"


def test_too_many_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = toy()
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids, seconds=0.2)
    compiler.compile(StructuredOutput(regex="warm"))
    go = threading.Event()
    monkeypatch.setattr(module, "WAITING", 2)
    monkeypatch.setattr(module._Vocabulary, "_compile", lambda self, spec: go.wait(20) and 1 / 0)
    for form, says in (("a", "longer"), ("b", "longer"), ("c", "2 others")):
        with pytest.raises(UserError, match=says):
            compiler.compile(StructuredOutput(regex=form))
    go.set()


def test_who_gives_up_does_not_take_others_with_him() -> None:
    """One waits for a turn and leaves; another, who came later, gets the grammar, and so does one who comes anew."""
    tokenizer = toy()
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids, seconds=0.4)
    spec = StructuredOutput(choice=("a", "b"))
    compiler.compile(StructuredOutput(choice=("c",)))
    for _ in range(module.COMPILING):
        compiler._slots.acquire()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(compiler.compile, spec)
        time.sleep(0.2)
        second = pool.submit(compiler.compile, spec)
        with pytest.raises(UserError, match="takes longer"):
            first.result()
        assert not second.done()
        compiler._slots.release()
        assert second.result() is compiler.cached(spec)
        again = StructuredOutput(choice=("d",))
        compiler._slots.acquire()
        with pytest.raises(UserError, match="takes longer"):
            compiler.compile(again)
        third = pool.submit(compiler.compile, again)
        time.sleep(0.05)
        compiler._slots.release()
        assert third.result() is compiler.cached(again)
    compiler._slots.release()


def test_a_grammar_that_is_slow_to_follow_ends_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = nano()
    ambiguous = 'root ::= root root root | "a" | root root | [^b]*'
    matcher = compiler_of(tokenizer).compile(StructuredOutput(grammar=ambiguous)).matcher()
    monkeypatch.setattr(module, "SHARE", 0.0)
    matcher._left = 0.05
    rng, start = random.Random(0), time.monotonic()
    while not matcher.failed:
        matcher.accept(rng.choice(allowed(matcher, tokenizer.vocab_size + 100)))
        assert time.monotonic() - start < 60
    assert matcher.finished and allowed(matcher, tokenizer.vocab_size + 100) == list(tokenizer.eos_token_ids)


def test_a_grammar_that_leads_nowhere_ends_the_answer() -> None:
    tokenizer = nano()
    spec = StructuredOutput(grammar='root ::= "a" bad | "b"\nbad ::= bad "x"')
    matcher = compiler_of(tokenizer).compile(spec).matcher()
    if matcher.allows(tokenizer.encode("a")[0]):
        matcher.accept(tokenizer.encode("a")[0])
        assert matcher.failed and matcher.finished and matcher.allows(tokenizer.eos_token_ids[0])


# The cache --------------------------------------------------------------------------------------------------


def test_a_form_is_compiled_once() -> None:
    compiler = compiler_of(nano())
    spec = {"regex": "once[0-9]"}
    assert compiler.compile(StructuredOutput(**spec)) is compiler.compile(StructuredOutput(**spec))  # type: ignore[arg-type]


def test_the_cache_is_bounded_and_forgets_what_was_used_longest_ago() -> None:
    tokenizer = toy()
    size = GrammarCompiler(tokenizer, 400, [1]).compile(StructuredOutput(regex="[a-z]{0}")).size
    compiler = GrammarCompiler(tokenizer, 400, [1], cache_bytes=3 * size + size // 2)
    first = compiler.compile(StructuredOutput(regex="[a-z]{0}"))
    for n in range(1, 6):
        compiler.compile(StructuredOutput(choice=(str(n),)))
        assert compiler.compile(StructuredOutput(regex="[a-z]{0}")) is first, "it has just been used"
        assert 0 < compiler.cached_bytes <= 3 * size + size // 2
    assert StructuredOutput(choice=("1",)) not in compiler._cache
    big = compiler.compile(StructuredOutput(json_schema=json.dumps(PERSON)))
    assert big.size > 4 * size and compiler.cached_bytes <= 3 * size + size // 2, (
        "what is too large is not kept"
    )


def test_many_threads_at_once() -> None:
    tokenizer = nano()
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size + 100, tokenizer.eos_token_ids)
    specs = [StructuredOutput(json_schema=json.dumps(PERSON | {"title": str(i % 3)})) for i in range(6)]
    specs += [StructuredOutput(regex=f"[a-z]{{{i % 3}}}x") for i in range(6)]
    compiled: dict[int, Any] = {}
    written: list[str] = []

    def work(i: int) -> None:
        compiled[i] = compiler.compile(specs[i])
        written.append(write(compiled[i].matcher(), tokenizer, i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(specs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(written) == len(specs)
    assert len({id(grammar) for grammar in compiled.values()}) == 6, "equal forms are one grammar"


def test_without_xgrammar_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    compiler = GrammarCompiler(toy(), 400, [1])
    with pytest.raises(UserError, match=r"pip install 'dsv3\[serve\]'"):
        compiler.compile(StructuredOutput(json_object=True))
