"""From token shards to training batches: which documents come next, and how they are laid into rows.

Three ideas carry everything here.

**A corpus has an order for each epoch that nobody stores.** Its documents are shuffled by a permutation that is
computed, not drawn: a Feistel network over the document's number, keyed by seed, corpus and epoch (`shuffled`).
So the n-th document of an epoch of 10 billion is found at once, in no memory, on every process alike.

**A mixture is error diffusion.** The next document is of the corpus furthest behind its share of the tokens read
so far (`Mixture`), as Bresenham's line takes its next step. After any number of tokens every corpus is within
about a document of its weight, and nothing is drawn at random. A corpus that has been read `max_epochs` times
is left out, and the others fill its place. A chat counts with its whole length, also where it is cut to fit a row.

**So a place in the stream is a few numbers**: documents and tokens read by corpus, and how far into the current
document. `state()` gives them, `load_state()` goes on from there to the token. They do not depend on how many
processes share the rows of a batch: each calls `next(rows, mine)` with the same `rows` and gets its own.

`TokenStream` packs text as the technical report does in pretraining (section 4.1): documents end to end, without
a mask between them. `ChatStream` packs whole chats, and says with `segments` which tokens belong together
(section 5.1: samples do not see each other), and with `loss_mask` which tokens are answers.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dsv3.data.manifest import Corpus, DataError, Manifest, map_array

Array = npt.NDArray[Any]
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Batch:
    """Rows for one optimiser step. Position i is input where i < seq, and target of position i - 1."""

    tokens: Tensor
    """[rows, seq + 1], int64."""
    loss_mask: Tensor | None = None
    """[rows, seq + 1], bool: where the loss of predicting this token counts; None: everywhere."""
    segments: Tensor | None = None
    """[rows, seq + 1], int64: the chat a token belongs to, from 1 in each row, 0 for padding; None: no masks."""


# --- one corpus ---------------------------------------------------------------------------------------------


def shuffled(index: int, length: int, key: int) -> int:
    """Where place `index` of `length` goes under the permutation named by `key`: a bijection for each key.

    A Feistel network of four rounds permutes the smallest power of four that has room; a number that falls
    outside goes through it again until it is inside (cycle walking), at most four times on average.
    """
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(right + (turn << 32) ^ key) & mask)
        index = left << half | right
        if index < length:
            return index


def _mix(x: int) -> int:
    """The finaliser of SplitMix64: every bit of the result depends on every bit of x."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


class Shelf:
    """The documents of a corpus in the order of reading, epoch after epoch, from mapped shards."""

    def __init__(self, folder: Path, name: str, corpus: Corpus, dtype: str, seed: int) -> None:
        shards = [shard for shard in corpus.shards if shard.documents]
        if not shards:
            raise DataError(f"the corpus {name!r} in {folder} has no documents: leave it out of the mixture")
        self.name = name
        self.documents = corpus.documents
        self.tokens = corpus.tokens
        self._key = f"{seed} {name}"
        self._epoch_key = (-1, 0)
        paths = [folder / shard.file for shard in shards]
        self._tokens = [map_array(p, dtype, s.tokens) for p, s in zip(paths, shards, strict=True)]
        self._ends = [
            map_array(_beside(p, "index"), "uint64", s.documents) for p, s in zip(paths, shards, strict=True)
        ]
        self._loss: list[Array] = []
        if corpus.kind == "chats":
            self._loss = [
                map_array(_beside(p, "loss"), "uint8", s.tokens) for p, s in zip(paths, shards, strict=True)
            ]
        self._first = np.cumsum([0, *(shard.documents for shard in shards)]).tolist()

    def place(self, number: int) -> tuple[int, int, int]:
        """Shard, first and last token + 1 of the `number`-th document ever read, epochs counted through."""
        epoch, index = divmod(number, self.documents)
        if self._epoch_key[0] != epoch:
            digest = hashlib.blake2b(f"{self._key} {epoch}".encode(), digest_size=8).digest()
            self._epoch_key = epoch, int.from_bytes(digest, "little")
        document = shuffled(index, self.documents, self._epoch_key[1])
        shard = bisect_right(self._first, document) - 1
        within = document - self._first[shard]
        ends = self._ends[shard]
        return shard, int(ends[within - 1]) if within else 0, int(ends[within])

    def length(self, number: int) -> int:
        _, start, end = self.place(number)
        return end - start

    def read(self, number: int, start: int = 0, stop: int | None = None) -> Array:
        """Tokens `start` to `stop` of a document."""
        return self._part(self._tokens, number, start, stop)

    def answers(self, number: int) -> Array:
        """For each token of a chat, whether it is part of an answer."""
        return self._part(self._loss, number, 0, None)

    def _part(self, arrays: Sequence[Array], number: int, start: int, stop: int | None) -> Array:
        shard, first, end = self.place(number)
        return arrays[shard][first + start : end if stop is None else first + stop]


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.name}.{what}")


# --- several corpora ----------------------------------------------------------------------------------------


class Pick(NamedTuple):
    """The next document: of which corpus, and its number there (epochs counted through)."""

    corpus: str
    number: int


class Mixture:
    """Draws documents so that every corpus has its share of the tokens."""

    def __init__(
        self, shelves: Mapping[str, Shelf], weights: Mapping[str, float], max_epochs: float | None
    ) -> None:
        self.shelves = dict(shelves)
        self.weights = dict(weights)
        self.max_epochs = max_epochs
        self.documents = dict.fromkeys(weights, 0)
        self.tokens = dict.fromkeys(weights, 0)

    def draw(self) -> Pick:
        """The next document, of the corpus furthest behind its share. Raises DataError when all is read."""
        left = [name for name in self.weights if not self._read_out(name)]
        if not left:
            raise DataError(
                f"every corpus of the mixture ({', '.join(self.weights)}) has been read {self.max_epochs:g} times: "
                "train on fewer tokens, or raise max_epochs in the recipe and build the data again"
            )
        name = min(left, key=lambda name: self.tokens[name] / self.weights[name])
        pick = Pick(name, self.documents[name])
        self.documents[name] += 1
        self.tokens[name] += self.shelves[name].length(pick.number)
        return pick

    def _read_out(self, name: str) -> bool:
        return (
            self.max_epochs is not None
            and self.documents[name] >= self.max_epochs * self.shelves[name].documents
        )

    def epochs(self) -> dict[str, float]:
        return {name: self.documents[name] / shelf.documents for name, shelf in self.shelves.items()}

    def state(self) -> dict[str, Any]:
        return {"documents": dict(self.documents), "tokens": dict(self.tokens)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for counts, key in ((self.documents, "documents"), (self.tokens, "tokens")):
            if state[key].keys() != counts.keys():
                raise DataError(
                    f"the saved place in the data is of the mixture {', '.join(state[key])}, this one is of "
                    f"{', '.join(counts)}: go on with the same mixture, or start the stage anew"
                )
            counts.update({name: int(state[key][name]) for name in counts})


class _Stream:
    """What both kinds of stream have in common: shelves, weights, and the place in them."""

    kind: str

    def __init__(
        self, folder: Path, mixture: Mapping[str, float], seed: int, seq: int, max_epochs: float | None = None
    ) -> None:
        """mixture: weights of corpora, of any sum; seq: tokens in a row, less the one that it shares with the
        next; max_epochs: how often a corpus may be read, by default as the recipe of the data says."""
        manifest = Manifest.load(folder)
        self.folder, self.seed, self.seq = folder, seed, seq
        weights = _weights(manifest, folder, mixture)
        for name in weights:
            if manifest.corpora[name].kind != self.kind:
                raise DataError(
                    f"the corpus {name!r} is of {manifest.corpora[name].kind}, not of {self.kind}"
                )
        shelves = {
            name: Shelf(folder, name, manifest.corpora[name], manifest.dtype, seed) for name in weights
        }
        self.mixture = Mixture(shelves, weights, manifest.max_epochs if max_epochs is None else max_epochs)
        self.vocab_size = manifest.vocab_size

    @property
    def shelves(self) -> dict[str, Shelf]:
        return self.mixture.shelves

    def epochs(self) -> dict[str, float]:
        """How often each corpus has been read so far."""
        return self.mixture.epochs()

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of all corpora in the mixture, each read once."""
        return sum(shelf.tokens for shelf in self.shelves.values())


class TokenStream(_Stream):
    """Text: rows of seq + 1 tokens that overlap by one, documents end to end without masks."""

    kind = "text"

    def __init__(
        self, folder: Path, mixture: Mapping[str, float], seed: int, seq: int, max_epochs: float | None = None
    ) -> None:
        super().__init__(folder, mixture, seed, seq, max_epochs)
        self._open: Pick | None = None
        self._at = 0
        """Tokens of the open document that have been read."""
        self._last: int | None = None
        """The last token given, with which the next row begins."""

    def next(self, rows: int, mine: slice = slice(None)) -> Batch:
        """The next `rows` rows; `mine`: those of them that are read, the others are only counted.

        All processes that share a batch call this with the same `rows`, and stay at the same place.
        """
        flat = np.zeros(rows * self.seq + 1, np.int64)
        wanted = range(rows)[mine]
        low, high = (wanted[0] * self.seq, wanted[-1] * self.seq + self.seq + 1) if wanted else (0, 0)
        at = 0
        if self._last is not None:
            flat[0], at = self._last, 1
        while at < len(flat):
            if self._open is None:
                self._open, self._at = self.mixture.draw(), 0
            shelf = self.shelves[self._open.corpus]
            left = shelf.length(self._open.number) - self._at
            take = min(left, len(flat) - at)
            # The last token of all is always read: the next batch begins with it.
            if (at < high and at + take > low) or at + take == len(flat):
                flat[at : at + take] = shelf.read(self._open.number, self._at, self._at + take)
            at += take
            self._at += take
            if take == left:
                self._open = None
        self._last = int(flat[-1])
        rows_of = np.lib.stride_tricks.sliding_window_view(flat, self.seq + 1)[:: self.seq][mine]
        return Batch(torch.from_numpy(rows_of.copy()))

    def state(self) -> dict[str, Any]:
        """The place in the stream, as JSON has it."""
        open_document = None if self._open is None else [*self._open, self._at]
        return {**self.mixture.state(), "open": open_document, "last": self._last}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a place that `state` gave. Raises DataError if it is of another mixture."""
        self.mixture.load_state(state)
        self._open, self._at, self._last = None, 0, state["last"]
        if state["open"] is not None:
            corpus, number, self._at = state["open"]
            self._open = Pick(corpus, number)


class ChatStream(_Stream):
    """Chats: whole ones in rows of seq + 1 tokens, with the mask of answers and the chat of each token.

    Chats are drawn until they fill a window of rows, then laid into rows by best fit, the longest first; the
    rows of a window come in shuffled order. What stays empty depends on the chats: next to nothing where they are
    much shorter than rows, a tenth of the places where they are half as long. A chat longer than a row ends after its last whole answer that fits.
    """

    kind = "chats"
    WINDOW = 128
    """Rows that are packed together."""

    def __init__(
        self, folder: Path, mixture: Mapping[str, float], seed: int, seq: int, max_epochs: float | None = None
    ) -> None:
        super().__init__(folder, mixture, seed, seq, max_epochs)
        from dsv3.text import Tokenizer

        tokenizer = Tokenizer.from_pretrained(folder)
        self._pad = tokenizer.pad_token_id or 0
        self._eos = tokenizer.eos_token_id
        self._rows: list[list[Pick]] = []
        """The window's rows; those before `_at` have been given."""
        self._at = 0
        self._start = self.mixture.state()
        """The mixture's place at the start of the window."""

    def next(self, rows: int, mine: slice = slice(None)) -> Batch:
        """The next `rows` rows; `mine`: those of them that are read, the others are only counted."""
        chosen: list[list[Pick]] = []
        while len(chosen) < rows:
            if self._at == len(self._rows):
                self._fill()
            take = self._rows[self._at : self._at + rows - len(chosen)]
            chosen += take
            self._at += len(take)
        chosen = chosen[mine]
        shape = (len(chosen), self.seq + 1)
        tokens, mask, segments = (
            np.full(shape, self._pad, np.int64),
            np.zeros(shape, bool),
            np.zeros(shape, np.int64),
        )
        for r, row in enumerate(chosen):
            at = 0
            for number, pick in enumerate(row, start=1):
                length = self._fitting(pick)
                here = slice(at, at + length)
                shelf = self.shelves[pick.corpus]
                tokens[r, here] = shelf.read(pick.number)[:length]
                mask[r, here] = shelf.answers(pick.number)[:length]
                segments[r, here] = number
                at += length
        return Batch(torch.from_numpy(tokens), torch.from_numpy(mask), torch.from_numpy(segments))

    def _fill(self) -> None:
        """Draw and pack the next window."""
        self._start = self.mixture.state()
        room, wanted, barren = self.seq + 1, self.WINDOW * (self.seq + 1), 0
        picks: list[tuple[int, Pick]] = []
        filled = 0
        while filled < wanted:
            try:
                pick = self.mixture.draw()
            except DataError:
                if picks:  # the last window of all
                    break
                raise
            length = self._fitting(pick)
            if length:
                picks.append((length, pick))
                filled += length
            barren = 0 if length else barren + 1
            if barren > sum(shelf.documents for shelf in self.shelves.values()):
                raise DataError(
                    f"no chat has an answer that ends within {room} tokens: use a longer sequence_length"
                )
        rng = np.random.default_rng((self.seed, *self._start["documents"].values()))
        rows = pack([length for length, _ in picks], room)
        self._rows = [[picks[i][1] for i in rows[r]] for r in rng.permutation(len(rows))]
        self._at = 0

    def _fitting(self, pick: Pick) -> int:
        """How many tokens of a chat go into a row: all, or up to the end of its last answer that fits."""
        shelf = self.shelves[pick.corpus]
        length, room = shelf.length(pick.number), self.seq + 1
        if length <= room:
            return length
        tokens, answers = shelf.read(pick.number, 0, room), shelf.answers(pick.number)[:room]
        ends = np.flatnonzero((tokens == self._eos) & (answers > 0))
        return int(ends[-1]) + 1 if len(ends) else 0

    def state(self) -> dict[str, Any]:
        """The place in the stream, as JSON has it: where the window began, and how many of its rows are read."""
        return {**self._start, "rows": self._at} if self._rows else {**self.mixture.state(), "rows": 0}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a place that `state` gave. Raises DataError if it is of another mixture."""
        self.mixture.load_state(state)
        self._rows, self._at = [], 0
        if state["rows"]:
            self._fill()
            self._at = int(state["rows"])


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Rows of `room` places, each a list of what lies in it, in order: best fit, the longest first.

    Each goes whole into the fullest row that has room for it. Raises ValueError for one longer than a row.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (places left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > room:
            raise ValueError(f"item {i} has length {lengths[i]}: a row has room for {room}")
        at = bisect_left(free, (lengths[i], -1))
        if at < len(free):
            left, row = free.pop(at)
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append(i)
        insort(free, (left - lengths[i], row))
    return [sorted(row) for row in rows]


def _weights(manifest: Manifest, folder: Path, mixture: Mapping[str, float]) -> dict[str, float]:
    """The corpora with a weight above 0; raises DataError for one that the data has not."""
    for name, weight in mixture.items():
        if name not in manifest.corpora:
            raise DataError(
                f"the mixture names the corpus {name!r}, but {folder} has {', '.join(manifest.corpora)}: correct the "
                "recipe's mixture, or add the corpus to its data and build again"
            )
        if weight < 0:
            raise DataError(f"the weight of the corpus {name!r} is {weight}: it must be 0 or more")
    weights = {name: float(weight) for name, weight in mixture.items() if weight > 0}
    if not weights:
        raise DataError("the mixture has no corpus with a weight above 0: name one")
    return weights


def open_stream(folder: Path, mixture: Mapping[str, float], seed: int, seq: int) -> TokenStream | ChatStream:
    """The stream of a mixture, of text or of chats; raises DataError if it has both, or what the data has not."""
    manifest = Manifest.load(folder)
    kinds = {manifest.corpora[name].kind: name for name in _weights(manifest, folder, mixture)}
    if len(kinds) > 1:
        raise DataError(
            f"the mixture has text ({kinds['text']}) and chats ({kinds['chats']}): one stream reads one kind; "
            "without `kind: chats` in the recipe, a corpus of chats is text"
        )
    stream = ChatStream if "chats" in kinds else TokenStream
    return stream(folder, mixture, seed, seq)


# --- held-out text ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """Text that is kept out of training, for bits per byte. With `decontaminate: false` in the recipe, training
    documents may share word runs with it.

    These are the negative log-likelihood in nats, summed over the targets that are not special tokens, over
    ln 2, over `bytes`.
    """

    tokens: Array
    """All documents, one after the other, each from BOS to EOS."""
    bytes: int
    """UTF-8 bytes of the text, without special tokens."""
    documents: int


def heldout(folder: Path) -> dict[str, HeldOut]:
    """The held-out sets of a data folder, by corpus."""
    manifest = Manifest.load(folder)
    return {
        name: HeldOut(map_array(folder / held.file, manifest.dtype, held.tokens), held.bytes, held.documents)
        for name, held in manifest.heldout.items()
    }
