"""Large numbers as people read them."""

from __future__ import annotations


def count(n: int) -> str:
    """Parameters as model cards give them: 671.0B."""
    return f"{n / 1e9:,.1f}B" if n >= 1e9 else f"{n / 1e6:,.1f}M" if n >= 1e6 else f"{n:,}"


def size(n: float) -> str:
    """Bytes in the decimal units that disks and model cards use: 688.6 GB."""
    for unit in ("bytes", "kB", "MB"):
        if n < 1000:
            return f"{n:,.0f} bytes" if unit == "bytes" else f"{n:,.1f} {unit}"
        n /= 1000
    return f"{n:,.1f} GB"
