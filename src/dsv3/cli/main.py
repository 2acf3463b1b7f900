"""The entry point of `dsv3`: which commands there are, and how they end.

Exit status: 0 done, 1 failed, 2 wrong use, 130 interrupted, 141 nobody reads on (`| head`), 143 terminated.
What a person can mend (`UserError`, `OSError`, or a flag that is not one) is one line on standard error; anything
else is a defect of dsv3 and keeps its traceback. Commands import what they need when they run, so that
`dsv3 --help` does not wait for torch.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Annotated, cast

import typer

from dsv3.cli.bench import bench
from dsv3.cli.chat import chat
from dsv3.cli.convert import convert
from dsv3.cli.data import app as data
from dsv3.cli.eval import evaluate
from dsv3.cli.inspect import inspect
from dsv3.cli.keys import app as keys
from dsv3.cli.plan import plan
from dsv3.cli.serve import serve
from dsv3.cli.tokenizer import app as tokenizer
from dsv3.cli.train import train
from dsv3.errors import UserError

# Typer has changed whose click it uses; its own BadParameter(UsageError(ClickException)) leads to either.
_ClickError = cast(type[Exception], typer.BadParameter.__mro__[2])

_UNREAD = 128 + signal.SIGPIPE  # nobody reads what we write; we end as programs do that the signal kills

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="MODEL is [bold]nano[/bold], the model that ships; a checkpoint's folder; a GGUF file; or a hub id such "
    "as deepseek-ai/DeepSeek-V3.",
)
app.command(epilog="Example: dsv3 chat nano --system 'You are a kind fox.'")(chat)
app.command(epilog="Example: dsv3 serve nano --port 8000")(serve)
app.add_typer(keys, name="keys", epilog="Example: dsv3 keys add ada --file keys.json")
app.command(epilog="Example: dsv3 inspect v3-671b")(inspect)
app.command("eval", epilog="Example: dsv3 eval nano --tasks needle --lengths 512,1024 --plot needle.png")(
    evaluate
)
app.command(epilog="Example: dsv3 convert ./DeepSeek-V3 ./DeepSeek-V3-bf16 --to bf16")(convert)
app.add_typer(data, name="data", epilog="Example: dsv3 data build recipes/nano.yaml --material ./material")
app.add_typer(tokenizer, name="tokenizer", epilog="Example: dsv3 tokenizer report nano -i ./books")
app.command(epilog="Example: dsv3 bench nano --depths 0,4096 --batch 1,8 --plot bench.png")(bench)
app.command(epilog="Example: dsv3 plan v3-671b --fit --gpu '2x rtx4090' --ram 256GB")(plan)
app.command(epilog="Example: dsv3 train recipes/nano.yaml --material ./material")(train)


def _version(asked: bool) -> None:
    if asked:
        from dsv3 import __version__

        print(f"dsv3 {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def dsv3(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Say which version this is.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """DeepSeek-V3, whole: chat with a model, look into it, convert its checkpoint."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does, so that it clears away what it has half done."""
    if current_thread() is not main_thread():  # only there may signals be handled
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own; returns the exit status."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it was closed when we were started (`dsv3 chat <&-`)
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open as long as the process)
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter shows ? instead
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    command = typer.main.get_command(app)
    try:
        with _terminable():
            status = command.main(
                None if args is None else list(args), prog_name="dsv3", standalone_mode=False
            )
            sys.stdout.flush()
    except UserError as error:
        print(f"dsv3: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is None:  # a stream: what it still holds must not fail again when Python ends
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        if isinstance(error, BrokenPipeError):
            return _UNREAD
        place = "" if error.filename is None else f"{error.filename}: "
        print(f"dsv3: {place}{error.strerror or error}", file=sys.stderr)
        return 1
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # Typer has made a failure of it
            return _UNREAD
        raise
    except _ClickError as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "dsv3"
        message = " ".join(getattr(error, "format_message", error.__str__)().split())
        print(f"dsv3: {message} (see {path} --help)", file=sys.stderr)
        return 2
    except typer.Abort:
        return 1
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(main())
