"""How commands show numbers: tables with quiet lines, and grids of a name and a value."""

from __future__ import annotations

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text


def table(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    made = Table(title=title, title_justify="left", title_style="bold")
    made.min_width = len(title)
    made.box, made.show_edge, made.pad_edge = box.SIMPLE_HEAD, False, False
    made.caption_justify, made.caption_style = "left", "dim"
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left")
    return made


def grid(title: str, rows: dict[str, str]) -> Table:
    """Names and what they are."""
    made = Table.grid(padding=(0, 2))
    made.title, made.title_justify, made.title_style = title, "left", "bold"
    for name, value in rows.items():
        made.add_row(Text(name, style="dim"), Text(value))
    return made


def noted(made: Table, note: str) -> Group:
    """A table with a note under it, which may be wider than the table."""
    return Group(made, Text(note, style="dim")) if note else Group(made)
