"""`dsv3 keys`: who may use a server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="API keys of a server: add one, list them, take one away.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

_File = Annotated[Path, typer.Option("--file", "-f", help="The file of keys that the server reads.")]
_Name = Annotated[str, typer.Argument(help="Whose key it is.", metavar="NAME")]


@app.command()
def add(name: _Name, file: _File) -> None:
    """Make a key and print it. Only its hash is kept: nobody can print it again."""
    from dsv3.server.keys import add_key

    key = add_key(file, name)
    print(
        f"the key of {name}, which is shown this once; a running server takes it within a second:",
        file=sys.stderr,
    )
    print(key)


@app.command("list")
def list_(file: _File) -> None:
    """Say who has a key, and since when."""
    from dsv3.server.keys import read_keys

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("name")
    table.add_column("since")
    for key in read_keys(file):
        table.add_row(key.name, key.created)
    Console().print(table)


@app.command()
def remove(name: _Name, file: _File) -> None:
    """Take a key away. Requests under way finish."""
    from dsv3.server.keys import remove_key

    remove_key(file, name)
