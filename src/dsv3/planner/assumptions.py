"""What a plan takes for granted: numbers that are neither the model's nor a data sheet's, each with its source.

Every kind of plan has a frozen dataclass of such numbers, a mapping of their names to sources, and one to the units of
those that are no shares.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv3.errors import UserError


@dataclass(frozen=True)
class Assumption:
    """A number that is neither the model's nor the data sheet's."""

    name: str
    value: float
    unit: str
    source: str


def check_shares(assumed: Any, units: Mapping[str, str]) -> None:
    """Raise UserError for a number without a unit, which is a share, that is not from 0 to 1."""
    for f in dataclasses.fields(assumed):
        value = getattr(assumed, f.name)
        if f.name not in units and not 0 <= value <= 1:
            raise UserError(f"{f.name} is {value}: it is a share, so from 0 to 1")


def listed(assumed: Any, sources: Mapping[str, str], units: Mapping[str, str]) -> tuple[Assumption, ...]:
    """Each with its unit (none for a share) and source, as a table shows them."""
    names = [f.name for f in dataclasses.fields(assumed)]
    return tuple(
        Assumption(n.replace("_", " "), getattr(assumed, n), units.get(n, ""), sources[n]) for n in names
    )
