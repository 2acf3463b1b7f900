"""`dsv3 data`: from the corpora that a recipe names to token shards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:  # the module imports datatrove, which --help does not wait for
    from dsv3.data.manifest import Manifest

app = typer.Typer(help="Corpora to tokens: read, filter, deduplicate, tokenise.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Corpora to tokens: read, filter, deduplicate, tokenise."""


@app.command(epilog="Example: dsv3 data build recipes/nano.yaml --material ./material --out ./data")
def build(
    recipe: Annotated[Path, typer.Argument(help="A recipe; its `data` section is what counts here.")],
    material: Annotated[
        Path | None, typer.Option(help="The folder that the recipe's relative paths lie in. Default: here.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: runs/NAME/data.")] = None,
    executor: Annotated[
        Literal["local", "slurm", "ray"],
        typer.Option(help="Run here, or hand the steps to a cluster (recipe: data.slurm, data.ray)."),
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Tasks at once. Default: as many as processors; no limit on clusters."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Build the token shards of a recipe, with a manifest of every source, step and loss.

    Interrupted at any moment, the same command goes on from there. What is built already is left alone.
    """
    from dsv3.errors import UserError

    try:
        from dsv3.data.build import build as run
    except ModuleNotFoundError as problem:
        raise UserError(f"building data needs {problem.name}: pip install 'dsv3[train]'") from None
    from dsv3.recipe.data import load_data_recipe

    name, read = load_data_recipe(recipe)
    out = out or Path("runs") / name / "data"
    try:
        with _Bar(sys.stderr.isatty()) as bar:
            manifest = run(read, material, out, executor, workers, bar.show)
    except KeyboardInterrupt:
        raise UserError("interrupted: the same command goes on from there") from None
    if manifest is None:
        print(f"the steps are handed to {executor}; {out / 'manifest.json'} appears when all are done")
    elif as_json:
        print((out / "manifest.json").read_text(encoding="utf-8"), end="")
    else:
        _tables(manifest, out)


class _Bar:
    """One line that says which step runs, and how many of its tasks are done."""

    def __init__(self, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description:<20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._progress = Progress(
            *columns, console=Console(file=sys.stderr), transient=True, disable=not shown
        )
        self._shown = shown
        self._task: Any = None
        self._name = ""

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, name: str, done: int, tasks: int) -> None:
        if name != self._name:
            self._name = name
            if not self._shown:
                print(f"dsv3 data: {name}", file=sys.stderr, flush=True)
            elif self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(name, total=tasks)
        self._progress.update(self._task, completed=done)


def _tables(manifest: Manifest, out: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def table(title: str, *columns: str, text: int) -> Table:
        made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        made.show_edge, made.pad_edge = False, False
        for i, column in enumerate(columns):
            made.add_column(column, justify="left" if i < text else "right")
        return made

    steps = table("What each step kept and dropped", "corpus", "step", "documents", "dropped", "", text=2)
    steps.columns[-1].justify = "left"
    for name, corpus in manifest.corpora.items():
        shown = ""
        for step in corpus.steps:
            dropped = step.get("dropped", {})
            total = step.get("dropped_total") or sum(dropped.values())
            if not total and not step.get("notes") and step["step"] not in ("read", "tokens"):
                continue
            reasons = [f"{reason} {n:,}" for reason, n in sorted(dropped.items(), key=lambda item: -item[1])]
            notes = [f"({note}: {n:,})" for note, n in step.get("notes", {}).items()]
            steps.add_row(
                name if name != shown else "",
                step["step"],
                f"{step['documents']:,}" if "documents" in step else "",
                f"{total:,}" if total else "",
                ", ".join([*reasons, *notes]),
                end_section=step is corpus.steps[-1],
            )
            shown = name
    tokens = table(
        "Tokens", "corpus", "", "documents", "tokens", "bytes per token", "held-out tokens", text=2
    )
    for name, corpus in manifest.corpora.items():
        size = corpus.steps[-1].get("bytes", 0) if corpus.steps else 0
        held = manifest.heldout.get(name)
        tokens.add_row(
            name,
            corpus.kind,
            f"{corpus.documents:,}",
            f"{corpus.tokens:,}",
            f"{size / corpus.tokens:.2f}" if corpus.tokens else "",
            f"{held.tokens:,}" if held else "",
        )
    Console(highlight=False).print(
        steps, "", tokens, "", f"{out}: vocabulary of {manifest.vocab_size:,}", sep="\n"
    )
