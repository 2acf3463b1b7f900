"""A model's shapes without its numbers: what names, sizes and loading begin with.

torch's layers draw random numbers as they are made, on the meta device too, where there is nothing to draw them for. It
takes a way through its compiler there, the import of which alone is a second and 80 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Undrawn(TorchFunctionMode):
    """What `torch.nn.init` is asked to fill stays as it is."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def outline() -> Iterator[None]:
    """Modules that are made within have their parameters on the meta device, and take a few milliseconds."""
    with torch.device("meta"), _Undrawn():
        yield
