"""Errors that a person can mend.

Everything a user can get wrong (a config, a folder, a prompt) raises a `UserError` whose message is one
line: the thing, the value it has, and what to do. The command line prints that line and exits with 1, as
it does for an `OSError`; any other exception is a defect of dsv3 and keeps its traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """A problem with what was given, worded for the person who gave it."""


class ConfigError(UserError):
    """A model configuration that is inconsistent, or asks for something dsv3 does not do."""


class CheckpointError(UserError):
    """A checkpoint that is missing, broken, unsafe, or not of this architecture."""


def size(n: float) -> str:
    """Bytes in the decimal units that disks and model cards use, for messages and tables: 688.6 GB."""
    for unit in ("bytes", "kB", "MB"):
        if n < 1000:
            return f"{n:,.0f} bytes" if unit == "bytes" else f"{n:,.1f} {unit}"
        n /= 1000
    return f"{n:,.1f} GB"
