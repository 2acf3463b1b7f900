"""What `dsv3 data build` leaves behind, and how its files are read.

    DATA/manifest.json                 what everything is, where it came from, what was dropped and why
    DATA/tokenizer.json, tokenizer_config.json
    DATA/tokens/<corpus>/00000.ds      token ids one after the other, little-endian uint16 or uint32
    DATA/tokens/<corpus>/00000.ds.index    where each document ends, in tokens, uint64
    DATA/tokens/<corpus>/00000.ds.loss     chats only: for each token 1 if it is part of an answer, else 0
    DATA/heldout/<corpus>.ds, .ds.index, .jsonl    text to measure on, as tokens and as text

The `.ds` files are datatrove's own format (`TokenizedFile`), which nanotron reads too. They are mapped, never
loaded: what a run needs in memory is nothing but the pages it touches.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dsv3.errors import UserError
from dsv3.files import write_whole

Kind = Literal["text", "chats"]
FORMAT = 1
MANIFEST = "manifest.json"


class DataError(UserError):
    """Built data that is missing, broken, or not what is asked of it."""


@dataclass(frozen=True)
class Shard:
    """A file of tokens: whole documents, each from BOS to EOS."""

    file: str
    """Relative to the data's folder."""
    documents: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """A named set of documents that a mixture weighs."""

    kind: Kind
    sources: tuple[dict[str, Any], ...]
    """For each source: path or hub id, format, licence, origin, and the sha256 and bytes of its files."""
    steps: tuple[dict[str, Any], ...]
    """What each step passed on and dropped, by reason, in order."""
    shards: tuple[Shard, ...]

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)


@dataclass(frozen=True)
class HeldOutFile:
    """What a held-out set has, and where. `bytes` are those of its text in UTF-8, without special tokens."""

    file: str
    documents: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The table of contents of a data folder."""

    recipe: dict[str, Any]
    """The recipe's `data` section as it was read, and its sha256."""
    versions: dict[str, str]
    vocab_size: int
    tokenizer_sha256: str
    dtype: Literal["uint16", "uint32"]
    max_epochs: float | None
    """How often a corpus may be read before a mixture goes on without it."""
    corpora: dict[str, Corpus]
    heldout: dict[str, HeldOutFile] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The sets that training was decontaminated against: the sha256 and bytes of their files."""
    format: int = FORMAT

    @property
    def inputs(self) -> list[tuple[str, str]]:
        """Every file that was read, with its SHA-256."""
        read = [source["files"] for corpus in self.corpora.values() for source in corpus.sources]
        found = [*read, *self.evaluations.values()]
        return sorted((name, facts["sha256"]) for files in found for name, facts in files.items())

    def save(self, folder: Path) -> None:
        """Write manifest.json, last of all and through a temporary name: where it is, the data is whole."""
        write_whole(folder / MANIFEST, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read a data folder's manifest; raises DataError if there is none, or none of this format."""
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(
                f"{path} does not exist: build the data with `dsv3 data build RECIPE --out {folder}`"
            ) from None
        except (OSError, ValueError) as problem:
            raise DataError(f"{path} cannot be read ({problem}): build the data again") from None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise DataError(f"{path} is not a manifest of this version of dsv3: build the data again")
        try:
            values["corpora"] = {
                name: Corpus(
                    corpus["kind"],
                    tuple(corpus["sources"]),
                    tuple(corpus["steps"]),
                    tuple(Shard(**shard) for shard in corpus["shards"]),
                )
                for name, corpus in values["corpora"].items()
            }
            values["heldout"] = {name: HeldOutFile(**held) for name, held in values["heldout"].items()}
            return cls(**values)
        except (KeyError, TypeError, AttributeError) as problem:
            raise DataError(f"{path} is broken ({problem}): build the data again") from None


def map_array(path: Path, dtype: str, count: int | None = None) -> npt.NDArray[Any]:
    """A file's numbers, mapped read-only; raises DataError if it is missing or not of the size it should have."""
    size = np.dtype(dtype).itemsize
    try:
        length = path.stat().st_size
        if length % size or (count is not None and length != count * size):
            wanted = "" if count is None else f" instead of {count * size:,}"
            raise DataError(f"{path} has {length:,} bytes{wanted}: build the data again")
        if not length:  # an empty file cannot be mapped
            return np.zeros(0, dtype)
        return np.memmap(path, dtype=dtype, mode="r")
    except OSError as problem:
        raise DataError(f"{path} cannot be read ({problem.strerror}): build the data again") from None
