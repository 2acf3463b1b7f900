"""Files of text, JSON lines and Parquet, read so that one bad line costs one line.

datatrove's own readers do the work where they can. Where a corpus is damaged they stop at the first byte that is
not UTF-8, and what lay behind it is lost without a word. So text and JSON lines are read here as bytes: what is
not UTF-8 becomes U+FFFD, a line that is no JSON is counted and left, and a compressed file that breaks off gives
what it has. Every loss has a count under its own name.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import orjson
import zstandard
from datatrove.data import Document
from datatrove.io import DataFolder
from datatrove.pipeline.readers.base import BaseDiskReader
from datatrove.pipeline.readers.parquet import ParquetReader

from dsv3.data.chats import ROLES, Chat, Message, render

BROKEN_OFF = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)
BLOCK = 1 << 14  # bytes that are lost at most where a compressed file breaks off
COMPRESSIONS = ("", ".gz", ".zst")


class Reader(BaseDiskReader):  # type: ignore[misc]
    """What all readers here share: counts of what they leave out, and documents from records."""

    package_file: str | None = None
    """The file of `dsv3.data` that is read where a source names none."""
    only_text = False
    """Whether it never gives chats."""

    @classmethod
    def wants(cls, path: str, options: Mapping[str, Any]) -> bool:
        """Whether a file of a folder is one that this reader reads."""
        return True

    def __init__(
        self,
        data_folder: DataFolder,
        text_key: str = "text",
        messages_key: str = "messages",
        chats: bool = False,
    ) -> None:
        """chats: documents are chats, and records without one are left out."""
        super().__init__(data_folder, text_key=text_key)
        self.messages_key, self.chats = messages_key, chats

    def read_files_shard(self, shard: list[str]) -> Iterator[Document]:
        """The documents of files; what is no chat is left out where chats are wanted."""
        for document in super().read_files_shard(shard):
            if self.chats and "messages" not in document.metadata:
                self.drop("no chat")
            else:
                yield document

    def text_of(self, path: str) -> str:
        """A whole file as text: all that it has, where it breaks off; raises OSError where it cannot be read."""
        blocks = []
        try:
            with self.data_folder.open(path, "rb", compression="infer") as file:
                while block := file.read(BLOCK):
                    blocks.append(block)
        except BROKEN_OFF:
            self.note("files that break off")
        return self.whole(b"".join(blocks).decode("utf-8-sig", "replace"))

    def records(self, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """The objects of JSON lines, with their numbers."""
        try:
            with self.data_folder.open(path, "rb", compression="infer") as file:
                lines = io.BufferedReader(file, BLOCK) if path.endswith(".zst") else file
                for number, line in enumerate(lines):
                    if not line.strip():
                        continue
                    try:
                        record = orjson.loads(line.decode("utf-8-sig", "replace"))
                    except orjson.JSONDecodeError:
                        self.drop("not JSON")
                        continue
                    if isinstance(record, dict):
                        yield number, record
                    else:
                        self.drop("not an object")
        except BROKEN_OFF:
            self.note("files that break off")

    def counts(self) -> Iterator[tuple[str, int]]:
        """What was left out or noted so far, under its label in the statistics."""
        for label, metric in self.stats.stats.items():
            if label.startswith(("dropped_", "note_")):
                yield label, metric.total

    def note(self, what: str, count: int = 1) -> None:
        """Count something that is no document."""
        self.stat_update(f"note_{what}", value=count, unit="task")

    def drop(self, reason: str) -> None:
        self.stat_update(f"dropped_{reason}")

    def document(self, record: dict[str, Any], path: str, number: int) -> Document | None:
        """The document of a record, or None with its reason counted."""
        chat, text = chat_of(record.get(self.messages_key)), record.get(self.text_key)
        metadata: dict[str, Any] = {"source": path}
        if isinstance(record.get("split"), str):
            metadata["split"] = record["split"]
        if chat and (self.chats or not isinstance(text, str)):
            return chat_document(chat, f"{path}/{number}", metadata)
        if self.chats:
            self.drop("no chat")
            return None
        if not isinstance(text, str) or not text.strip():
            self.drop("no text")
            return None
        return Document(self.whole(text), f"{path}/{number}", metadata=metadata)

    def whole(self, text: str) -> str:
        """The text as it is; broken characters in it are counted."""
        if broken := text.count("\ufffd"):
            self.note("characters that were not UTF-8", broken)
        return text


def chat_document(chat: Chat, name: str, metadata: dict[str, Any]) -> Document:
    messages = [{"role": m.role, "content": m.content} for m in chat]
    return Document(render(chat), name, metadata={**metadata, "messages": messages})


def chat_of(messages: Any) -> Chat | None:
    """A chat from a list of {role, content} that has an answer; None for anything else."""
    if not isinstance(messages, list) or not messages:
        return None
    chat = []
    for message in messages:
        role, content = (
            (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        )
        if role not in ROLES or not isinstance(content, str):
            return None
        chat.append(Message(role, content))
    return tuple(chat) if any(m.role == "assistant" for m in chat) else None


class TextReader(Reader):
    """Plain text: a document for each file."""

    name = "text"
    only_text = True

    def read_file(self, filepath: str) -> Iterator[Document]:
        text = self.text_of(filepath)
        if text.strip():
            yield Document(text, filepath, metadata={"source": filepath})
        else:
            self.drop("no text")


class JsonlReader(Reader):
    """JSON lines: a document for each line."""

    name = "jsonl"

    def read_file(self, filepath: str) -> Iterator[Document]:
        for number, record in self.records(filepath):
            if document := self.document(record, filepath, number):
                yield document


class ParquetRows(Reader):
    """Parquet, by datatrove's reader: a document for each row."""

    name = "parquet"

    def read_file(self, filepath: str) -> Iterator[Document]:
        inner = ParquetReader(self.data_folder, batch_size=100)
        # Its rows come to us as they are, before it looks for their text.
        inner.get_document_from_dict = lambda row, path, number: self.document(row, path, number)
        import pyarrow

        try:
            yield from inner.read_file(filepath)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as problem:
            if isinstance(problem, OSError) and problem.errno is not None:  # the disk's or the network's
                raise
            self.note("files that break off")
