"""Made-up corpora for the tests of the data pipeline: prose, chats, and whatever can be wrong with files."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from dsv3.recipe.data import DataRecipe
from dsv3.recipe.fields import build as parse

PLACES = ("mill", "river", "garden", "market", "bridge", "tower", "barn", "harbour", "meadow", "church")
DEEDS = ("found", "lost", "painted", "carried", "mended", "hid", "sold", "washed", "borrowed", "counted")
THINGS = (
    "a lamp",
    "a drum",
    "a kite",
    "an apple",
    "a ladder",
    "a letter",
    "a bell",
    "a basket",
    "a boat",
    "a hat",
)


def prose(seed: object, paragraphs: int = 1, sentences: int = 5) -> list[str]:
    """Invented paragraphs, the same for the same seed and hardly alike for another."""
    rng = random.Random(str(seed))

    def name() -> str:
        return "".join(rng.choice(["ba", "lo", "mi", "ru", "te", "so", "ka"]) for _ in range(4)).capitalize()

    def sentence() -> str:
        deed, thing, place = rng.choice(DEEDS), rng.choice(THINGS), rng.choice(PLACES)
        day = rng.randrange(1000)
        return f"{name()} {deed} {thing} for {name()} near the {place}, {day} days after {name()}."

    return [" ".join(sentence() for _ in range(sentences)) for _ in range(paragraphs)]


def text(seed: object, paragraphs: int = 2) -> str:
    return "\n\n".join(prose(seed, paragraphs))


def chat(seed: object, turns: int = 2) -> dict[str, Any]:
    messages = []
    for turn in range(turns):
        messages.append({"role": "user", "content": prose(f"{seed} ask {turn}", 1, 1)[0]})
        messages.append({"role": "assistant", "content": prose(f"{seed} say {turn}", 1, 2)[0]})
    return {"messages": messages}


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    """A line of JSON each; strings are written as they are. `.gz` and `.zst` are compressed."""
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    return write_bytes(path, "".join(line + "\n" for line in lines).encode())


def write_bytes(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        content = gzip.compress(content, 1, mtime=0)
    elif path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def recipe(corpora: dict[str, Any], **settings: Any) -> DataRecipe:
    """A recipe of these corpora, with a small vocabulary."""
    settings.setdefault("tokenizer", {"vocab_size": 400})
    for corpus in corpora.values():
        for source in corpus["sources"]:
            source.setdefault("licence", "made up")
    return parse(DataRecipe, {"corpora": corpora, **settings}, "data")
