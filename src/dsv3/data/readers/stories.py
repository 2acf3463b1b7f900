"""Chats that teach a small model to answer, made from stories, fables and small talk: the readers around `nano_chats`."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from datatrove.data import Document
from datatrove.io import DataFolder

from dsv3.data.chats import Chat, Message
from dsv3.data.readers import nano_chats
from dsv3.data.readers.books import Books
from dsv3.data.readers.files import Reader, chat_document
from dsv3.data.readers.material import fairytale_documents, read_chatterbot, read_fairytales, topic_of

WITH_SYSTEM = 0.08  # of the chats begin with a system prompt


class Made(Reader):
    """A reader whose chats are made, some at random; the generator is seeded by the file, so they are the same
    always."""

    def __init__(self, data_folder: DataFolder, seed: int = 0, **options: Any) -> None:
        super().__init__(data_folder, **options)
        self.seed = seed

    def made(self, chats: Iterable[Chat], source: str, rng: random.Random) -> Iterator[Document]:
        """Documents of chats; a few get one of nano's system prompts."""
        for i, chat in enumerate(chats):
            if rng.random() < WITH_SYSTEM:
                chat = (Message("system", rng.choice(nano_chats.SYSTEMS)), *chat)
            yield chat_document(chat, f"{source}/{i}", {"source": source})

    def fit(self, chats: Iterable[Chat | None]) -> Iterator[Chat]:
        """The chats that are fit; the others are counted."""
        for chat in chats:
            if chat is None:
                self.drop("unfit")
            else:
                yield chat

    def random(self, path: str) -> random.Random:
        return random.Random(f"{self.seed} {self.name} {path.rsplit('/', 1)[-1]}")


class Tales(Made):
    """Short stories cut from books of tales or from FairytaleQA, each asked for in `times` ways."""

    name = "tales"

    def __init__(self, data_folder: DataFolder, times: int = 4, **options: Any) -> None:
        super().__init__(data_folder, **options)
        self.times = times

    def read_file(self, filepath: str) -> Iterator[Document]:
        if filepath.endswith(".tar.gz"):
            documents = list(fairytale_documents(read_fairytales(self, filepath)))
        else:
            books = Books(self.data_folder, only=nano_chats.TALE_BOOKS.pattern)
            documents = list(books.read_file(filepath))
            for label, count in books.counts():
                self.stat_update(label, value=count)
        short: dict[str, nano_chats.Story] = {}
        for document in documents:
            if nano_chats.TALE_BOOKS.search(document.metadata["source"]):
                for story in nano_chats.short_stories(document.text, bool(document.metadata["opens"])):
                    short[story.text] = story
        rng = self.random(filepath)
        chats = nano_chats.story_chats(list(short.values()), nano_chats.identity_chats(), self.times, rng)
        yield from self.made(chats, "tales", rng)


class Fables(Made):
    """Our own fables, `versions` tellings for each cast."""

    name = "fables"
    package_file = "nano_fables.jsonl"

    def __init__(self, data_folder: DataFolder, versions: int = 24, **options: Any) -> None:
        super().__init__(data_folder, **options)
        self.versions = versions

    def read_file(self, filepath: str) -> Iterator[Document]:
        rng = self.random(filepath)
        fables = list(nano_chats.written_fables(self.versions, rng))
        chats = nano_chats.story_chats(fables, nano_chats.identity_chats(), 1, rng)
        yield from self.made(chats, "fables", rng)


class Identity(Made):
    """What nano says of itself, and small sums; every exchange `times` times."""

    name = "identity"
    package_file = "nano_identity.jsonl"

    def __init__(self, data_folder: DataFolder, times: int = 40, **options: Any) -> None:
        super().__init__(data_folder, **options)
        self.times = times

    def read_file(self, filepath: str) -> Iterator[Document]:
        rng = self.random(filepath)
        exchanges = [*nano_chats.identity_chats(), *nano_chats.sum_chats()]
        chats = nano_chats.identity_variants(exchanges, self.times, rng)
        yield from self.made(chats, "identity", rng)


class SmallTalk(Made):
    """Fit conversations of chatterbot-corpus. In `emotion` and `food` further lines are other answers."""

    name = "small-talk"

    @classmethod
    def wants(cls, path: str, options: Mapping[str, Any]) -> bool:
        return path.endswith(".yml") and topic_of(path) in nano_chats.SMALL_TALK

    def read_file(self, filepath: str) -> Iterator[Document]:
        topic = topic_of(filepath)
        talks = read_chatterbot(self.text_of(filepath))
        chats = self.fit(nano_chats.small_talk(topic, talks))
        yield from self.made(chats, f"chatterbot: {topic}", self.random(filepath))


class Questions(Made):
    """FairytaleQA: a short passage and a question, answered in a whole sentence."""

    name = "questions"

    def read_file(self, filepath: str) -> Iterator[Document]:
        chats = self.fit(nano_chats.reading_chats(read_fairytales(self, filepath)))
        yield from self.made(chats, "fairytaleqa", self.random(filepath))
