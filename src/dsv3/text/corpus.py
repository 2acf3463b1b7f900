"""Text files as a stream of texts, whatever their size and whatever is broken in them.

    corpus = Corpus(["stories.txt.gz", "code=./python"])
    for text in corpus: ...
    corpus.replaced     # bytes that were no UTF-8, each now U+FFFD

An input is a file or a folder, read in full depth and in the order of names: `.txt`, `.jsonl` (or `.ndjson`), each
plain or with `.gz`. A file that is named itself may have any other ending and is read as plain text. `NAME=PATH`
puts what is read from PATH in a group of that name.

Plain text is handed on in pieces of about a megabyte, cut where a line begins with something other than a blank:
there the pre-tokenisation of `dsv3.text.bpe` cuts in any case, so the pieces have the tokens of the whole. A
line of JSON is an object, and its text is what the fields of `fields` hold, a chat's `messages` included.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from dsv3.errors import UserError

FIELDS = ("text", "messages")
BLOCK = 1 << 20  # bytes read at once
LONGEST = 16 * BLOCK  # characters without a place to cut after which a text is cut anywhere

_JSON_LINES = (".jsonl", ".ndjson")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Text:
    """A piece of text, and where it belongs if its file or record says so."""

    text: str
    group: str | None = None


class Corpus:
    """The texts of files and folders. Iterating reads them; the counts are those of the latest reading."""

    def __init__(self, inputs: Sequence[str], fields: Sequence[str] = FIELDS) -> None:
        """Raises UserError for an input that is not there, or a folder without a file of text."""
        self.fields = tuple(fields)
        self.files = [found for name in inputs for found in _find(name)]
        """Each file with the name of its group."""
        self._reset()

    def _reset(self) -> None:
        self.bytes = 0
        """Of the texts handed on, in UTF-8."""
        self.replaced = 0
        """Bytes that were no UTF-8, or halves of surrogate pairs written in JSON."""
        self.skipped = 0
        """Lines that are no JSON object, or have none of the fields."""
        self._keys: list[str] = []

    def __iter__(self) -> Iterator[Text]:
        """Raises UserError for a broken archive, and at the end if there was no text at all."""
        self._reset()
        for path, group in self.files:
            try:
                with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                    pieces = self._records if _is_json_lines(path) else self._plain
                    for text in pieces(cast(BinaryIO, file)):
                        self.bytes += len(text.text.encode())
                        yield text if group is None else Text(text.text, group)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{path} is a broken archive ({error}): copy it anew") from None
        if not self.bytes:
            raise UserError(self._nothing())

    def _nothing(self) -> str:
        files = f"{len(self.files)} files hold" if len(self.files) > 1 else f"{self.files[0][0]} holds"
        if not self.skipped:
            return f"{files} no text"
        has = f", whose first has {', '.join(self._keys)}" if self._keys else ""
        return f"{files} no text: {self.skipped} lines are no records with {' or '.join(self.fields)}{has}"

    def _plain(self, file: BinaryIO) -> Iterator[Text]:
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        held, first = "", True
        while True:
            block = file.read(BLOCK)
            held += decoder.decode(block, final=not block)
            if first and held:
                held, first = held.removeprefix("\ufeff"), False
            cut = _last_cut(held) if len(block) == BLOCK else 0
            if not block or (not cut and len(held) > LONGEST):
                cut = len(held)
            if cut:
                yield Text(self._clean(held[:cut]))
                held = held[cut:]
            if not block:
                return

    def _records(self, file: BinaryIO) -> Iterator[Text]:
        for number, line in enumerate(file):
            if not number:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8", "surrogateescape"))
            except (ValueError, RecursionError):
                record = None
            found = (
                [record[field] for field in self.fields if field in record]
                if isinstance(record, dict)
                else []
            )
            text = "\n".join(_strings(found))
            if not text:
                self.skipped += 1
                self._keys = self._keys or (list(record) if isinstance(record, dict) else [])
                continue
            language = record.get("language") or record.get("lang")
            yield Text(self._clean(text), language if isinstance(language, str) else None)

    def _clean(self, text: str) -> str:
        text, count = _SURROGATE.subn("\ufffd", text)
        self.replaced += count
        return text


def _find(name: str) -> Iterator[tuple[Path, str | None]]:
    path, group = Path(name), None
    if not path.exists() and "=" in name:
        group, _, rest = name.partition("=")
        path = Path(rest)
    if not path.exists():
        raise UserError(f"{path} does not exist: name a file or a folder of text")
    if not path.is_dir():
        yield path, group
        return
    found = sorted(p for p in path.rglob("*") if p.is_file() and _is_text(p))
    if not found:
        raise UserError(f"{path} has no file of text in it: .txt or .jsonl, plain or with .gz")
    for file in found:
        yield file, group


def _kind(path: Path) -> str:
    """The ending that says what a file is: `.jsonl` of `a.jsonl.gz`."""
    return Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()


def _is_json_lines(path: Path) -> bool:
    return _kind(path) in _JSON_LINES


def _is_text(path: Path) -> bool:
    return _kind(path) in (".txt", *_JSON_LINES)


def _last_cut(text: str) -> int:
    """Behind the last line break that something other than a blank follows; 0 if there is none."""
    at = len(text) - 1
    while (at := text.rfind("\n", 0, at)) >= 0:
        if not text[at + 1].isspace():
            return at + 1
    return 0


def _strings(value: Any) -> Iterator[str]:
    """The texts of a field: a string, a list of them, or of messages with `content`."""
    if isinstance(value, str):
        if value:
            yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        yield from _strings(value.get("content"))
