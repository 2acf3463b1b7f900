"""Large numbers as people read them."""

from __future__ import annotations


def count(n: int) -> str:
    """Parameters as model cards give them: 671.0B."""
    return f"{n / 1e9:,.1f}B" if n >= 1e9 else f"{n / 1e6:,.1f}M" if n >= 1e6 else f"{n:,}"
