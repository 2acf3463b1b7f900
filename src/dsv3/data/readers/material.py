"""Readers of particular collections: FairytaleQA, Schema-Guided Dialogue, chatterbot-corpus, chinese-poetry."""

from __future__ import annotations

import csv
import io
import random
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datatrove.data import Document
from datatrove.io import DataFolder

from dsv3.data.chats import Chat, Message, dialogue, render
from dsv3.data.readers.books import chunks, clean
from dsv3.data.readers.files import BROKEN_OFF, Reader, chat_document, chat_of

# --- FairytaleQA --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fairytale:
    """A story of FairytaleQA: its sections, and questions as (question, answer, section number)."""

    name: str
    sections: tuple[str, ...]
    questions: tuple[tuple[str, str, int], ...]


def read_fairytales(reader: Reader, path: str) -> list[Fairytale]:
    """The tales of a .tar.gz of `section-stories` and `questions`, in the order of their names.

    The reader counts what is lost where the archive or a table in it is broken.
    """
    rows: dict[str, list[defaultdict[str, str]]] = {}
    try:
        with reader.data_folder.open(path, "rb") as file, tarfile.open(fileobj=file) as archive:
            for member in archive:
                data = archive.extractfile(member)
                if member.name.endswith(".csv") and data is not None:
                    stem = member.name.rsplit("/", 1)[-1].removesuffix(".csv")
                    rows[stem] = _table(reader, data.read().decode("utf-8-sig", "replace"))
    except (tarfile.TarError, *BROKEN_OFF):
        reader.note("files that break off")
    tales = []
    for stem in sorted(s for s in rows if s.endswith("-story")):
        name = stem.removesuffix("-story")
        asked = [r for r in rows.get(f"{name}-questions", []) if r["cor_section"].isdecimal()]
        questions = tuple((clean(r["question"]), clean(r["answer1"]), int(r["cor_section"])) for r in asked)
        body = tuple("\n\n".join(filter(None, map(clean, lines_joined(r["text"])))) for r in rows[stem])
        if any(body):
            tales.append(Fairytale(name.replace("-", " ").title(), body, questions))
        else:
            reader.drop("no text")
    return tales


def _table(reader: Reader, text: str) -> list[defaultdict[str, str]]:
    """The rows of a CSV table; a field that is missing is empty."""
    try:
        rows = list(csv.DictReader(io.StringIO(text)))
    except csv.Error:
        reader.drop("not CSV")
        return []
    return [defaultdict(str, {key: value for key, value in row.items() if value}) for row in rows]


def lines_joined(text: str) -> list[str]:
    """The paragraphs of a section: its lines, or where lines are wrapped, lines up to a short last one."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines or max(map(len, lines)) > 90:
        return lines
    paragraphs = [""]
    for line in lines:
        paragraphs[-1] += " " + line
        if len(line) < 58 and line[-1] in ".!?\"':":
            paragraphs.append("")
    return paragraphs


def fairytale_documents(tales: Iterable[Fairytale]) -> Iterator[Document]:
    for tale in tales:
        for i, run in enumerate(chunks("\n\n".join(tale.sections).split("\n\n"))):
            text = "\n\n".join([tale.name] * (i == 0) + run)
            source = f"fairytaleqa: {tale.name}"
            yield Document(text, f"{source}/{i}", metadata={"source": source, "opens": i == 0})


class Fairytales(Reader):
    """The tales of FairytaleQA as text."""

    name = "fairytales"
    only_text = True

    def read_file(self, filepath: str) -> Iterator[Document]:
        yield from fairytale_documents(read_fairytales(self, filepath))


# --- dialogues ----------------------------------------------------------------------------------------------


class Dialogues(Reader):
    """Schema-Guided Dialogue: a line for each booking, `{"split": ..., "messages": [...]}`.

    What its authors set aside as test comes in an order of its own, drawn once, without dialogues that are in
    training too: so a limit in the recipe holds back the same ones always.
    """

    name = "sgd"

    def read_file(self, filepath: str) -> Iterator[Document]:
        training: list[Chat] = []
        tested: list[Chat] = []
        for _, record in self.records(filepath):
            if found := chat_of(record.get("messages")):
                chat = tuple(Message(m.role, clean(m.content)) for m in found)
                (tested if record.get("split") == "test" else training).append(chat)
            else:
                self.drop("no chat")
        random.Random("0 pretrain").shuffle(tested)
        known = set(map(render, training))
        for i, chat in enumerate(tested):
            if render(chat) in known:
                self.drop("test dialogue that is in training too")
            else:
                yield chat_document(chat, f"sgd-test/{i}", {"source": "sgd", "split": "test"})
        for i, chat in enumerate(training):
            yield chat_document(chat, f"sgd/{i}", {"source": "sgd", "split": "train"})


def read_chatterbot(text: str) -> list[list[str]]:
    """Conversations of a file of chatterbot-corpus: lists of lines. Its YAML is a list of lists, no more."""
    talks: list[list[str]] = []
    for line in text.split("conversations:")[-1].splitlines():
        if line.startswith("- - "):
            talks.append([line[4:]])
        elif line.startswith("  - ") and talks:
            talks[-1].append(line[4:])
        elif line.startswith("    ") and talks:
            talks[-1][-1] += " " + line.strip()
    return [[clean(line).strip("\"' ") for line in talk] for talk in talks]


def topic_of(path: str) -> str:
    return path.rsplit("/", 1)[-1].removesuffix(".yml")


class Chatterbot(Reader):
    """chatterbot-corpus: the conversations on some topics."""

    name = "chatterbot"

    def __init__(
        self, data_folder: DataFolder, topics: Sequence[str] = (), times: int = 1, **options: Any
    ) -> None:
        """topics: names of files without .yml, none: all of them; times: how often each conversation is given."""
        super().__init__(data_folder, **options)
        self.times = times

    @classmethod
    def wants(cls, path: str, options: Mapping[str, Any]) -> bool:
        return path.endswith(".yml") and (not options.get("topics") or topic_of(path) in options["topics"])

    def read_file(self, filepath: str) -> Iterator[Document]:
        topic = topic_of(filepath)
        for i, talk in enumerate(read_chatterbot(self.text_of(filepath))):
            chat = dialogue(*talk[: len(talk) // 2 * 2])
            if chat and all(m.content for m in chat):
                if len(talk) % 2:
                    self.note("last lines without an answer")
                for _ in range(self.times):
                    yield chat_document(chat, f"{filepath}/{i}", {"source": f"chatterbot: {topic}"})
            else:
                self.drop("no answer")


# --- Chinese ------------------------------------------------------------------------------------------------


class Classics(Reader):
    """chinese-poetry, one JSON line per piece. A share is marked as the split `test`, the same always."""

    name = "classics"
    only_text = True

    def __init__(self, data_folder: DataFolder, test_characters: int = 0, **options: Any) -> None:
        super().__init__(data_folder, **options)
        self.test_characters = test_characters

    def read_file(self, filepath: str) -> Iterator[Document]:
        texts: dict[str, str] = {}
        for _, piece in self.records(filepath):
            source, title, text = (str(piece.get(key) or "") for key in ("source", "title", "text"))
            text = re.sub(r"\[\d+\]", "", text).strip()
            whole = "\n".join(filter(None, (title, text)))
            if not text:
                self.drop("no text")
            elif len(text) < 20:
                self.drop("too short")
            elif whole in texts:
                self.drop("the same text")
            else:
                texts[whole] = source
        # What is drawn here must stay the same, or models that were measured on it cannot be compared.
        rng, order = random.Random("0 pretrain"), list(texts)
        rng.shuffle([0] * 4201)
        rng.shuffle(order)
        total = 0
        for i, text in enumerate(order):
            split = "test" if total < self.test_characters else "train"
            total += len(text)
            yield Document(text, f"classics/{i}", metadata={"source": texts[text], "split": split})
