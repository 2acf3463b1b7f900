"""Two passes that take turns: while one's tokens travel, the other computes."""

from __future__ import annotations


def pause() -> None:
    """Called when something has been sent and not yet arrived: let the other pass go on, if two overlap."""
