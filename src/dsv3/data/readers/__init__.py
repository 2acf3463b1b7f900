"""Readers: files in, datatrove documents out. A recipe names them; most files say by their ending who reads them."""

from __future__ import annotations

import re

from datatrove.io import DataFolder

from dsv3.data.manifest import DataError
from dsv3.data.readers.books import Books
from dsv3.data.readers.files import COMPRESSIONS, JsonlReader, ParquetRows, Reader, TextReader
from dsv3.data.readers.material import Chatterbot, Classics, Dialogues, Fairytales
from dsv3.data.readers.stories import Fables, Identity, Questions, SmallTalk, Tales
from dsv3.recipe.data import Source

_NAMED: tuple[type[Reader], ...] = (
    TextReader, JsonlReader, ParquetRows, Books, Fairytales, Dialogues, Chatterbot, Classics,
    Tales, Fables, Identity, SmallTalk, Questions,
)  # fmt: skip
READERS = {reader.name: reader for reader in _NAMED}
ENDINGS = {".txt": TextReader, ".jsonl": JsonlReader, ".ndjson": JsonlReader, ".parquet": ParquetRows}


def reader_of(source: Source, path: str) -> type[Reader] | None:
    """Who reads a file: the recipe's choice, or by the file's ending; None where nobody does."""
    if source.format != "auto":
        if source.format not in READERS:
            raise DataError(
                f"a source has the format {source.format!r}: there are auto, {', '.join(READERS)}"
            )
        return READERS[source.format]
    for ending, reader in ENDINGS.items():
        if path.lower().endswith(tuple(ending + compression for compression in COMPRESSIONS)):
            return reader
    return None


def make_reader(source: Source, path: str, folder: DataFolder, chats: bool) -> Reader:
    """The reader of one file of a source; raises DataError if nobody reads it, or it has not these options."""
    kind = reader_of(source, path)
    if kind is None:
        raise DataError(
            f"{path} ends neither in .txt, .jsonl nor .parquet: name the source's format in the recipe"
        )
    if chats and kind.only_text and source.format != "auto":
        raise DataError(f"the format {kind.name!r} gives text, and no chats: leave out `kind: chats`")
    try:
        return kind(
            folder, text_key=source.text_key, messages_key=source.messages_key, chats=chats, **source.options
        )
    except (TypeError, re.error) as problem:
        raise DataError(f"the options of the format {kind.name!r} are {source.options}: {problem}") from None
