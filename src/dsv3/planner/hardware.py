"""Machines as numbers: what one accelerator holds, computes and moves, and what an hour of it costs.

The shipped profiles are in `hardware.yaml` beside this file, a mapping of names; `load_profiles` adds those of a file
of one's own, in the same form:

    mine:
      title: 8 x H100 at our provider
      like: h100                                                   # take what is not said from there
      dollars_per_hour: {value: 2.49, source: contract of June}

Every number is what a data sheet or a list of prices says (`grouped`: what libraries can do there), with where that is.
What programs reach of it is another matter, and written elsewhere: `dsv3.planner.training` and `dsv3.planner.serving`
list what they assume. Arithmetic is dense (no structured sparsity), bandwidths are of one direction.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dsv3.errors import UserError

SHIPPED = Path(__file__).with_name("hardware.yaml")


@dataclass(frozen=True)
class Hardware:
    """One kind of accelerator, in the machine it is usually bought in."""

    name: str
    title: str
    memory: float
    """Bytes of its fast memory."""
    bandwidth: float
    """Bytes per second of that memory."""
    bf16_flops: float
    """Dense FLOP/s of matrix products in bf16, summed in float32."""
    fp8_flops: float
    """The same in FP8; 0 where there is no such arithmetic."""
    int8_ops: float
    """Dense operations per second in int8; 0 where there are none."""
    int4_ops: float
    """The same in 4 bits, integer or float; 0 where there are none."""
    nvlink: float
    """Bytes per second and direction from one accelerator to the others of its node: NVLink, or PCIe where there is
    none."""
    network: float
    """Bytes per second and direction of one accelerator's share of the network between nodes."""
    gpus_per_node: int
    dollars_per_hour: float
    """Of one accelerator."""
    sms: int
    """Multiprocessors; cores of a CPU."""
    grouped: int
    """1 where one kernel multiplies for all experts at once; 0 where each expert's product is a call of its own."""
    sources: dict[str, str] = field(default_factory=dict, compare=False)
    """Where each number is from."""

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            value, least = getattr(self, name), "at least" if name in _MAY_LACK else "above"
            if not math.isfinite(value) or value < 0 or (least == "above" and value == 0):
                raise UserError(f"{self.name}.{name} is {value}: it must be {least} 0")
            if name in _WHOLE and value != int(value):
                raise UserError(f"{self.name}.{name} is {value}: it must be a whole number")

    def flops(self, precision: str) -> float:
        """The peak of matrix products in fp8, bf16 or fp32; fp8 falls back to bf16 where there is none."""
        if precision == "fp8" and self.fp8_flops:
            return self.fp8_flops
        # float32 products run as TF32 on tensor cores, at half the rate of bf16.
        return self.bf16_flops / 2 if precision == "fp32" else self.bf16_flops


_NUMBERS = tuple(f.name for f in dataclasses.fields(Hardware) if f.name not in ("name", "title", "sources"))
_WHOLE = ("gpus_per_node", "sms", "grouped")
_MAY_LACK = ("fp8_flops", "int8_ops", "int4_ops", "dollars_per_hour", "grouped")


def load_profiles(extra: Path | None = None) -> dict[str, Hardware]:
    """The shipped profiles by name, and those of a YAML file of the same form, which may replace them.

    Raises UserError, in one line, for a file that cannot be read, an unknown key, a number that is none or lacks
    its source.
    """
    profiles = dict(_shipped())
    if extra is not None:
        for name, values in _read(extra).items():
            try:
                profiles[name] = _profile(name, values, profiles)
            except UserError as problem:
                raise UserError(f"{extra}: {problem}") from None
    return profiles


def find_profile(name: str, extra: Path | None = None) -> Hardware:
    """The profile of that name, in any case; raises UserError that lists those there are."""
    profiles = load_profiles(extra)
    for key, hardware in profiles.items():
        if key.lower() == name.lower():
            return hardware
    raise UserError(f"hardware {name!r} is not known: there are {', '.join(profiles)}; or give a YAML file")


@cache
def _shipped() -> dict[str, Hardware]:
    profiles: dict[str, Hardware] = {}
    for name, values in _read(SHIPPED).items():
        profiles[name] = _profile(name, values, profiles)
    return profiles


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name a YAML file of hardware profiles") from None
    except OSError as problem:
        raise UserError(f"{path} cannot be read: {problem.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(problem).split())}") from None
    if not isinstance(values, dict) or not values:
        raise UserError(f"{path} has no profiles: it must map names to numbers, as hardware.yaml does")
    return {str(name): value for name, value in values.items()}


def _profile(name: str, values: Any, known: Mapping[str, Hardware]) -> Hardware:
    if not isinstance(values, Mapping):
        raise UserError(f"{name} is {values!r}: it must map {', '.join(_NUMBERS)} to numbers")
    unknown = sorted(str(key) for key in values.keys() - {"title", "like", *_NUMBERS})
    if unknown:
        known_keys = ", ".join(("title", "like", *_NUMBERS))
        raise UserError(f"{name} has an unknown key {unknown[0]!r}: there are {known_keys}")
    like = values.get("like")
    if like is not None and like not in known:
        raise UserError(f"{name}.like is {like!r}: there are {', '.join(known)}")
    base = None if like is None else known[like]
    numbers = {} if base is None else {key: getattr(base, key) for key in _NUMBERS}
    sources = {} if base is None else dict(base.sources)
    for key in _NUMBERS:
        if key in values:
            numbers[key], sources[key] = _sourced(values[key], f"{name}.{key}")
        elif base is None:
            raise UserError(f"{name} lacks {key!r}: give it, or `like` another profile")
    title = str(values.get("title", name if base is None else base.title))
    for key in _WHOLE:
        numbers[key] = int(numbers[key]) if numbers[key] == numbers[key] // 1 else numbers[key]
    return Hardware(name=name, title=title, sources=sources, **numbers)


def _sourced(value: Any, where: str) -> tuple[float, str]:
    """{value: 80e9, source: data sheet}. YAML reads 80e9 as a string, so such strings are numbers too."""
    if not isinstance(value, Mapping) or set(map(str, value)) != {"value", "source"}:
        raise UserError(f"{where} is {value!r}: it must be like {{value: 80e9, source: data sheet}}")
    number, source = value["value"], value["source"]
    if isinstance(number, str):
        try:
            number = float(number)
        except ValueError:
            raise UserError(f"{where}.value is {number!r}: it must be a number, such as 80e9") from None
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise UserError(f"{where}.value is {number!r}: it must be a number, such as 80e9")
    if not isinstance(source, str) or not source.strip():
        raise UserError(f"{where}.source is {source!r}: say where the number is from")
    return float(number), source
