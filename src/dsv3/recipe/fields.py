"""Reading YAML into dataclasses, strictly: what is unknown, missing or of another type is refused by name."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dsv3.errors import UserError

T = TypeVar("T")
_LARGEST = 1e30
_SUFFIX = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


class RecipeError(UserError):
    """A recipe that is not one: the message names the file, the key and what it must be."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises RecipeError, in one line, if there is none to be had."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path} does not exist: name a recipe, such as recipes/nano.yaml") from None
    except OSError as problem:
        raise RecipeError(f"{path} cannot be read: {problem.strerror}") from None
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as problem:  # ValueError: a date that is none, bytes not UTF-8
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(problem).split())}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} holds a {type(values).__name__}: a recipe is a mapping of keys to values")
    return values


def number(value: Any, where: str) -> float:
    """A number, or one written as 10e12, 469B, 14.8T (K, M, B, T: powers of a thousand)."""
    if isinstance(value, str):
        match = re.fullmatch(r"([-+]?[\d_]*\.?\d+(?:[eE][-+]?\d+)?)([KMBT]?)", value.strip())
        if match:
            value = float(match[1].replace("_", "")) * _SUFFIX[match[2]]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        raise RecipeError(
            f"{where} is {str(value)[:40]!r}: it must be a number, such as 0.1, 2e-4, 512 or 14.8T"
        )
    return value


def build(cls: type[T], values: Any, where: str) -> T:
    """A dataclass from a mapping; `where` is the path of keys that led here, for messages.

    Fields may be bool, int, float, str, Path, a dataclass, `X | None`, Literal, tuple[X, ...] or dict[str, X] of
    these. A class with a `parse(value, where)` classmethod reads itself. Raises RecipeError.
    """
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where} is {values!r}: it must be a mapping of keys to values")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    unknown = sorted(str(key) for key in values.keys() - fields.keys())
    if unknown:
        raise RecipeError(f"{where} has an unknown key {unknown[0]!r}: there are {', '.join(fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise RecipeError(f"{where} lacks {name!r}")
    read = {name: _read(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    try:
        return cls(**read)
    except RecipeError as problem:
        raise RecipeError(f"{where}: {problem}") from None


def _read(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = (a for a in args if a is not type(None))
        return _read(hint, value, where)
    if origin is typing.Literal:
        if value not in args:
            raise RecipeError(f"{where} is {value!r}: it must be one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise RecipeError(f"{where} is {value!r}: it must be a list")
        return tuple(_read(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise RecipeError(f"{where} is {value!r}: it must be a mapping of names to values")
        return {str(key): _read(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is Any:
        return value
    if hasattr(hint, "parse"):
        return hint.parse(value, where)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if hint is float:
        return float(number(value, where))
    if hint is int:
        whole = number(value, where)
        if whole != int(whole):
            raise RecipeError(f"{where} is {value!r}: it must be a whole number")
        return int(whole)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    raise RecipeError(f"{where} is {value!r}: it must be a {getattr(hint, '__name__', hint)}")
