"""JSON schemas and patterns, checked before a grammar is made of them.

xgrammar turns a JSON schema into a grammar, and passes in silence over what it cannot turn: `multipleOf`, `not`,
all of an `allOf` but its first part, bounds beside an `anyOf`, a required key that is described nowhere, bounds
without a type. The text would then not be what was asked for, and nobody would know. So a schema is read here
first: what no grammar can hold is an error that names the keyword and its place (`$.properties.age`), and what can be
said so that xgrammar does hear it is said that way. The insides of strings, by length and by pattern, are grammars of
our own, since xgrammar's let control characters through, and read some patterns wrongly.

What stays different: `oneOf` takes texts that meet several of its branches, keys that the schema does not name may come
twice, objects have their keys in the schema's order and no keys that the schema does not name (unless
`additionalProperties` asks for them), patterns match the whole string, and `format` binds where xgrammar knows it
(dates, UUIDs, addresses) and is a remark elsewhere.

Size and depth are bounded because the time to make a grammar is not: it grows with the square of how deep a schema
nests.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

from dsv3.errors import UserError

MAX_CHARS = 1 << 16
"""The longest text of a schema, an expression, a grammar, or of all choices together."""

MAX_DEPTH = 100
"""How deep a schema may nest, counted in brackets: some 50 objects in objects."""

MAX_LEAST = 1000
"""The longest string that a schema may insist on: each of its characters is a state of the grammar."""

RULE = "dsv3rule{}x"
"""The pattern that stands for a rule; see `read_schema`."""

_KINDS: dict[str, frozenset[str]] = {
    "string": frozenset({"minLength", "maxLength", "pattern"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems", "unevaluatedItems"}),
    "object": frozenset(
        {
            "properties",
            "required",
            "additionalProperties",
            "patternProperties",
            "propertyNames",
            "minProperties",
            "maxProperties",
            "unevaluatedProperties",
        }
    ),
}
_BOUNDS = frozenset[str]().union(*_KINDS.values())
_TYPES = frozenset({"string", "number", "integer", "boolean", "null", "array", "object"})
_WHOLE = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
"""Each says all there is to say about a value: bounds beside it go unheard."""

_IMPOSSIBLE = (
    *("not", "if", "then", "else", "multipleOf", "uniqueItems", "contains", "minContains", "maxContains"),
    *(
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "additionalItems",
        "$dynamicRef",
        "$recursiveRef",
    ),
)
_DEFINITIONS = ("$defs", "definitions")


def read_schema(text: str, name: str, rules: list[str], strict: bool = False) -> str:
    """The schema as JSON text that xgrammar turns into what was meant.

    name: what to call it in messages. rules: gets a rule of xgrammar's EBNF, named `@`, for each kind of string that
    the schema describes; in place of the ith, the schema has the pattern `RULE.format(i)`. strict: objects must be as OpenAI's strict mode asks: every property
    required, and no others allowed. Raises UserError for text that is no JSON, is too large or too deep, is no schema, or
    asks for what a grammar cannot hold.
    """
    if len(text) > MAX_CHARS:
        raise UserError(f"{name} has {len(text):,} characters: make it {MAX_CHARS:,} at most")
    try:
        schema = json.loads(text, parse_constant=_no_number, parse_int=_whole, parse_float=_real)
        depth = _depth(schema)
        text.encode()
    except RecursionError:
        depth = MAX_DEPTH + 1
    except ValueError as error:
        raise UserError(f"{name} is not JSON: {error}") from None
    if depth > MAX_DEPTH:
        raise UserError(f"{name} nests deeper than {MAX_DEPTH} levels: make it flatter")
    return json.dumps(_Reader(name, rules, strict).schema(schema, "$"), ensure_ascii=False)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is no number that fits in 64 bits")


def _whole(text: str) -> int:
    return int(text) if len(text) < 20 and abs(int(text)) < 1 << 63 else _no_number(text)


def _real(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _no_number(text)


def _depth(value: Any) -> int:
    """How many brackets are open at the deepest place. Iterative: json reads deeper than Python recurses."""
    deepest, stack = 0, [(value, 0)]
    while stack:
        item, depth = stack.pop()
        deepest = max(deepest, depth)
        if isinstance(item, dict | list):
            stack += [(child, depth + 1) for child in (item.values() if isinstance(item, dict) else item)]
    return deepest


class _Reader:
    """Walks through a schema; `place` is where, as a JSON path."""

    def __init__(self, name: str, rules: list[str], strict: bool) -> None:
        self._name = name
        self._rules = rules
        self._strict = strict

    def _fail(self, place: str, problem: str) -> NoReturn:
        raise UserError(f"{self._name}: at {place}, {problem}")

    def schema(self, node: Any, place: str) -> Any:
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            self._fail(place, f"a schema is an object, true or false, not {_short(node)}")
        for keyword in _IMPOSSIBLE:
            if keyword in node and (keyword, node[keyword]) != ("uniqueItems", False):
                self._fail(place, f"{keyword!r} is not supported: leave it out")
        new = dict(node)
        for key in _DEFINITIONS:
            if key in new:
                new[key] = self._each(new[key], f"{place}.{key}")
        whole = [key for key in _WHOLE if key in new]
        types = self._types(new, place)
        if whole:
            beside = sorted((set(whole[1:]) | _BOUNDS) & new.keys())
            if beside:
                self._fail(place, f"{beside[0]!r} beside {whole[0]!r} is not supported: move it inside")
            self._whole(new, whole[0], types, place)
        else:
            self._bounded(new, types, place)
        return new

    def _each(self, nodes: Any, place: str) -> dict[str, Any]:
        if not isinstance(nodes, dict):
            self._fail(place, f"there must be an object of schemas, not {_short(nodes)}")
        return {key: self.schema(value, f"{place}.{key}") for key, value in nodes.items()}

    def _list(self, nodes: Any, place: str) -> list[Any]:
        if not isinstance(nodes, list) or not nodes:
            self._fail(place, f"there must be a list of schemas, not {_short(nodes)}")
        return [self.schema(node, f"{place}[{i}]") for i, node in enumerate(nodes)]

    def _types(self, node: dict[str, Any], place: str) -> list[str]:
        if "type" not in node:
            return []
        types = node["type"] if isinstance(node["type"], list) else [node["type"]]
        if not types or not all(isinstance(t, str) and t in _TYPES for t in types):
            self._fail(
                place, f"the type is {_short(node['type'])}: it must be of {', '.join(sorted(_TYPES))}"
            )
        return types

    # A schema that says all in one keyword -----------------------------------------------------------------

    def _whole(self, node: dict[str, Any], key: str, types: list[str], place: str) -> None:
        inside = f"{place}.{key}"
        if key == "$ref":
            if not isinstance(node[key], str) or not node[key].startswith("#"):
                self._fail(
                    place,
                    f"$ref is {_short(node[key])}: only places in this schema ('#/$defs/...') can be named",
                )
            if types:
                self._fail(place, "'type' beside '$ref' is not supported: say it there")
        elif key in ("const", "enum"):
            self._values(node, key, types, place)
        else:
            parts = self._list(node[key], inside)
            if key == "allOf" and len(parts) > 1:
                self._fail(place, "'allOf' of more than one schema is not supported: write them as one")
            if types:
                parts = [self._typed(part, types, f"{inside}[{i}]") for i, part in enumerate(parts)]
                del node["type"]
            node[key] = parts

    def _typed(self, part: Any, types: list[str], place: str) -> Any:
        """A branch, held to the type that stands beside all branches."""
        if part is True:
            return {"type": types}
        if isinstance(part, dict):
            own = self._types(part, place)
            if own and set(own) <= set(types):
                return part
            if not own and not set(_WHOLE) & part.keys():
                return {**part, "type": types}
        self._fail(place, f"the type beside its list is {', '.join(types)}: say it in each branch")

    def _values(self, node: dict[str, Any], key: str, types: list[str], place: str) -> None:
        values = node[key] if key == "enum" else [node[key]]
        if not isinstance(values, list) or not values:
            self._fail(place, f"enum is {_short(values)}: it must be a list of at least one value")
        if types:
            values = [value for value in values if _is_of(value, types)]
            if not values:
                self._fail(place, f"no value of {key} is of the type {', '.join(types)}")
            del node["type"]
        if key == "enum":
            node[key] = values

    # A schema of a type and its bounds ---------------------------------------------------------------------

    def _bounded(self, node: dict[str, Any], types: list[str], place: str) -> None:
        kinds = [kind for kind, bounds in _KINDS.items() if bounds & node.keys()]
        if not types and kinds:
            if len(kinds) > 1:
                self._fail(place, f"there are bounds of {' and '.join(kinds)} and no type: say which it is")
            node["type"] = kinds[0]
            types = kinds
        for key in _KINDS["number"] & node.keys():
            if not isinstance(node[key], int | float) or isinstance(node[key], bool):
                self._fail(place, f"{key} is {_short(node[key])}: it must be a number")
            if abs(node[key]) >= 1 << 53 and (isinstance(node[key], float) or "number" in types):
                self._fail(place, f"{key} is {_short(node[key])}: it must be below 2**53")
        if "object" in types:
            self._object(node, place)
        if "array" in types:
            self._array(node, place)
        if {"pattern", "minLength", "maxLength"} & node.keys():
            self._string(node, place)

    def _string(self, node: dict[str, Any], place: str) -> None:
        node.pop("format", None)
        lengths = node.pop("minLength", 0), node.pop("maxLength", None)
        if lengths == (0, None):
            node["pattern"] = self._rule(node["pattern"], place)
            return
        least, most = lengths
        if "pattern" in node:
            self._fail(place, "'pattern' beside a length is not supported: say the length in the pattern")
        for key, length in (("minLength", least), ("maxLength", least if most is None else most)):
            if not isinstance(length, int) or isinstance(length, bool) or not 0 <= length < 1 << 31:
                self._fail(place, f"{key} is {_short(length)}: it must be a whole number, 0 or above")
        if least > MAX_LEAST:
            self._fail(place, f"minLength is {least}: it must be at most {MAX_LEAST}")
        if most is not None and most < least:
            self._fail(place, f"minLength {least} is more than maxLength {most}")
        node["pattern"] = self._named(length_rule(least, most))

    def _rule(self, pattern: Any, place: str) -> str:
        if not isinstance(pattern, str):
            self._fail(place, f"the pattern is {_short(pattern)}: it must be a text")
        return self._named(string_rule(pattern, f"{self._name}: at {place}, the pattern"))

    def _named(self, rule: str) -> str:
        if rule not in self._rules:
            self._rules.append(rule)
        return RULE.format(self._rules.index(rule))

    def _array(self, node: dict[str, Any], place: str) -> None:
        for key in ("items", "unevaluatedItems"):
            if key in node:
                if isinstance(node[key], list):
                    self._fail(place, f"{key} is a list: write 'prefixItems', as JSON Schema 2020-12 has it")
                node[key] = self.schema(node[key], f"{place}.{key}")
        if "prefixItems" in node:
            node["prefixItems"] = self._list(node["prefixItems"], f"{place}.prefixItems")

    def _object(self, node: dict[str, Any], place: str) -> None:
        for key in ("properties", "patternProperties"):
            if key in node:
                node[key] = self._each(node[key], f"{place}.{key}")
        for key in ("additionalProperties", "unevaluatedProperties"):
            if key in node:
                node[key] = self.schema(node[key], f"{place}.{key}")
        if "patternProperties" in node:
            inside = f"{place}.patternProperties"
            named = {
                self._rule(pattern, inside): value for pattern, value in node["patternProperties"].items()
            }
            if len(named) < len(node["patternProperties"]):
                self._fail(inside, "two patterns are the same: keep one")
            node["patternProperties"] = named
        if "patternProperties" in node and node.get("additionalProperties", False) is not False:
            self._fail(place, "'patternProperties' beside 'additionalProperties' is not supported: keep one")
        if "propertyNames" in node:
            if {"properties", "patternProperties"} & node.keys():
                self._fail(place, "'propertyNames' beside named properties is not supported: leave it out")
            node["propertyNames"] = self.schema(node["propertyNames"], f"{place}.propertyNames")
        required = node.get("required", [])
        if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
            self._fail(place, f"required is {_short(required)}: it must be a list of names")
        if self._strict:
            if node.get("additionalProperties") is not False:
                self._fail(place, "strict needs 'additionalProperties': false: write it, or leave strict out")
            for key in node.get("properties", {}):
                if key not in required:
                    self._fail(
                        place,
                        f"strict needs every property in 'required', and {key!r} is not: add it (its type may be a list "
                        "with 'null'), or leave strict out",
                    )
        # Of a key that is described nowhere the grammar would not know that it must come.
        others = node.get("additionalProperties", True)
        for key in required:
            if key not in node.get("properties", {}):
                if others is False:
                    self._fail(
                        place, f"{key!r} is required, but not among the properties, and no others may be"
                    )
                node["properties"] = {**node.get("properties", {}), key: others}
        least = node.get("minProperties", 0)
        others_come = "properties" not in node or bool(
            {"additionalProperties", "patternProperties"} & node.keys()
        )
        if others_come and isinstance(least, int) and least > len(required) + 1:
            self._fail(
                place,
                f"minProperties is {least}: names may come twice, so {len(required) + 1} is all it can be",
            )


def _is_of(value: Any, types: list[str]) -> bool:
    name = {str: "string", bool: "boolean", type(None): "null", list: "array", dict: "object"}.get(
        type(value)
    )
    if name is not None:
        return name in types
    return "number" in types or ("integer" in types and value == int(value))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


# Regular expressions ---------------------------------------------------------------------------------------

_ATOM = re.compile(
    r"""\\u\{[0-9a-fA-F]+\}|\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|\\c[A-Za-z]|\\.  # one character, or a class by its letter
    |\[\^?(?:\\.|[^\]\\])*\]                  # a class
    |\((?:\?(?::|P?<[A-Za-z_]\w*>))?          # a group
    |(?:[*+?]|\{\d+(?:,\d*)?\})\??            # how often; lazily or not is the same here
    |.""",
    re.DOTALL | re.VERBOSE,
)
_NAMED = {"n": 10, "t": 9, "r": 13, "f": 12, "v": 11, "b": 8, "0": 0}


def check_regex(text: str, name: str) -> None:
    """Raise UserError for what xgrammar would read as something else: \\z as z, $ in the middle as nothing."""
    if len(text) > MAX_CHARS:
        raise UserError(f"{name} has {len(text):,} characters: make it {MAX_CHARS:,} at most")
    before = ""
    for match in _ATOM.finditer(text):
        atom, place = match[0], match.start() + 1
        after = text[match.end() : match.end() + 1]
        lost = atom == "^" and before not in ("", "|") and before[0] != "("
        if lost or (atom == "$" and after not in ("", ")", "|")):
            raise UserError(
                f"{name}: at character {place}, {atom} stands in the middle, where it can match nothing"
            )
        for letter in re.findall(r"\\([A-Za-z])", atom):
            if (
                letter not in "dDwWsSxucpPbBkae" and letter not in _NAMED
            ):  # of p, B and k xgrammar says itself
                raise UserError(f"{name}: at character {place}, the escape \\{letter} is not supported")
        before = atom


_OFTEN = re.compile(r"[*+?]\??|\{\d+(?:,\d*)?\}\??")

Ranges = list[tuple[int, int]]
"""Characters, as ranges of code points with both ends."""

_LAST = 0x10FFFF
_DIGIT: Ranges = [(48, 57)]
_LETTER: Ranges = [(48, 57), (65, 90), (95, 95), (97, 122)]
_SPACE: Ranges = [
    *((9, 13), (32, 32), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029)),
    *((0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)),
]
_LINE_ENDS: Ranges = [(10, 10), (13, 13), (0x2028, 0x2029)]
_ANY: Ranges = [(0, _LAST)]
_SHORT = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 34: '"', 92: "\\"}
"""The characters for which JSON has an escape of one letter."""


def _without(ranges: Ranges) -> Ranges:
    """All other characters."""
    others, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            others.append((start, low - 1))
        start = max(start, high + 1)
    return others + ([(start, _LAST)] if start <= _LAST else [])


def _common(one: Ranges, other: Ranges) -> Ranges:
    return _without(_without(one) + _without(other))


_CLASSES: dict[str, Ranges] = {
    **{"d": _DIGIT, "D": _without(_DIGIT), "w": _LETTER, "W": _without(_LETTER)},
    **{"s": _SPACE, "S": _without(_SPACE)},
}
_PLAIN = _without([(0, 31), (34, 34), (92, 92), (0xD800, 0xDFFF)])
"""Characters that stand for themselves in a string of JSON."""


def string_rule(pattern: str, name: str) -> str:
    """The inside of a JSON string that a pattern matches whole, as a rule `@` of xgrammar's EBNF.

    xgrammar has an own way for that, which does not know JSON's escapes and makes part of an optional group optional.
    The letters \\d, \\w, \\s and the dot mean what they do in ECMAScript, as JSON Schema asks. Raises UserError.
    """
    check_regex(pattern, name)

    def fail(place: int, problem: str) -> NoReturn:
        raise UserError(f"{name}: at character {place + 1}, {problem}")

    parts: list[str] = []
    groups: list[int] = []
    repeatable = False
    for match in _ATOM.finditer(pattern):
        atom, place = match[0], match.start()
        if _OFTEN.fullmatch(atom):
            if not repeatable:
                fail(place, f"there is nothing that {atom} could repeat")
            parts[-1] += atom[0] if atom[0] in "*+?" else atom.rstrip("?")
            repeatable = False
        elif atom[0] == "(":
            if pattern[match.end() : match.end() + 1] == "?":
                fail(place, "looking around and flags are not supported")
            groups.append(place)
            parts.append("(")
            repeatable = False
        elif atom in (")", "|"):
            if atom == ")" and not groups:
                fail(place, "there is no ( to this )")
            if not parts or parts[-1] in ("(", "|"):
                parts.append('""')
            if atom == ")":
                groups.pop()
            parts.append(atom)
            repeatable = atom == ")"
        elif atom in ("^", "$"):
            repeatable = False
        else:
            if atom in ("{", "[", "\\"):
                fail(place, f"{atom} is not finished")
            expression = _string_character(_characters(atom, place, fail))
            if not expression:
                fail(place, f"{atom} matches nothing")
            parts.append(expression)
            repeatable = True
    if groups:
        fail(groups[-1], "this ( is not closed")
    if not parts or parts[-1] == "|":
        parts.append('""')
    return "@ ::= " + " ".join(parts)


_REPEATED = 100


def length_rule(least: int, most: int | None) -> str:
    """The inside of a JSON string of so many characters.

    Counted by xgrammar's `max_chars` (an escape counts as two): a repetition would cost a state for each character.
    """
    # In one piece, xgrammar 0.2 loses count of more than 128.
    pieces = [_REPEATED] * (least // _REPEATED) + [least % _REPEATED] * (least % _REPEATED > 0)
    start = "".join(f"{_string_character(_ANY)}{{{piece}}} " for piece in pieces)
    letters = "".join(_SHORT.values()).replace("\\", "\\\\")
    rest = f'({_string_character(_ANY)} | "\\\\" [{letters}])*'
    if most is None:
        return f"@ ::= {start}{rest}"
    if most == least:
        return f"@ ::= {start or chr(34) * 2}"
    return f"@ ::= {start}@_rest\n@_rest[max_chars={most - least}] ::= {rest}"


def _characters(atom: str, place: int, fail: Callable[[int, str], NoReturn]) -> Ranges:
    """What one atom of an expression matches."""
    if atom == ".":
        return _without(_LINE_ENDS)
    if atom[0] == "\\":
        if atom[1] in _CLASSES:
            return _CLASSES[atom[1]]
        if atom[1] in "123456789kpPbB":
            fail(place, f"{atom} is not supported")
        return [(_code(atom),) * 2]
    if atom[0] != "[" or len(atom) == 1:
        return [(ord(atom),) * 2]
    negated = atom[1] == "^"
    inside = [match[0] for match in _ATOM_INSIDE.finditer(atom[2:-1] if negated else atom[1:-1])]
    ranges: Ranges = []
    i = 0
    while i < len(inside):
        item = inside[i]
        if item[0] == "\\" and item[1] in _CLASSES:
            ranges += _CLASSES[item[1]]
        elif inside[i + 1 : i + 2] == ["-"] and i + 2 < len(inside) and inside[i + 2][1:] not in _CLASSES:
            low, high = _code(item), _code(inside[i + 2])
            if low > high:
                fail(place, f"the range {item}-{inside[i + 2]} is out of order")
            ranges.append((low, high))
            i += 2
        else:
            ranges.append((_code(item),) * 2)
        i += 1
    return _without(ranges) if negated else ranges


_ATOM_INSIDE = re.compile(
    r"\\u\{[0-9a-fA-F]+\}|\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|\\c[A-Za-z]|\\.|.", re.DOTALL
)


def _code(atom: str) -> int:
    """The code point of one character, escaped or not."""
    if atom[0] != "\\":
        return ord(atom)
    if len(atom) == 2:
        return _NAMED.get(atom[1], ord(atom[1]))
    return ord(atom[2]) % 32 if atom[1] == "c" else min(int(atom[2:].strip("{}"), 16), _LAST)


def _string_character(ranges: Ranges) -> str:
    """One character of these, as a string of JSON has it; nothing if there are none.

    Those with an escape are left out where there are others: with two spellings, xgrammar can foresee little.
    """
    plain = _common(ranges, _PLAIN)
    if plain:
        # By what they leave out: of ranges that reach up to the last character xgrammar 0.2 makes wrong masks.
        negated = plain[-1][1] == _LAST
        listed = _without(plain) if negated else plain
        return f"[{'^' * negated}" + "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in listed) + "]"
    ways = []
    letters = [letter for code, letter in _SHORT.items() if _common(ranges, [(code, code)])]
    if letters:
        ways.append('"\\\\" [' + "".join(letters).replace("\\", "\\\\") + "]")
    codes = [c for low, high in _common(ranges, [(0, 31)]) for c in range(low, high + 1) if c not in _SHORT]
    ways += [f'"\\\\u{code:04x}"' for code in codes]
    return f"({' | '.join(ways)})" if ways else ""
