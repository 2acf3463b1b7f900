"""What a build has to do: every file of every corpus found, and the work cut into tasks.

Nothing is read yet, so that what is missing or misspelt is said at once, and not after hours.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from datatrove.io import get_datafolder

from dsv3.data.manifest import DataError
from dsv3.data.readers import READERS, make_reader, reader_of
from dsv3.data.steps import make_filter
from dsv3.recipe.data import CorpusRecipe, DataRecipe, Evaluation, Source
from dsv3.text import Tokenizer

HUB = "hf://datasets/"
PUBLIC_SOURCES = "docs/data.md lists where corpora can be had"
LEAST_BYTES = 1_000_000
"""Smaller files are read together."""
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class File:
    """A file of a source: `folder` may be a URL, `path` is relative to it."""

    folder: str
    path: str
    bytes: int


@dataclass(frozen=True)
class Task:
    """The files that one task reads, each with the number of its source in the corpus."""

    corpus: str
    number: int
    """Of the task in its corpus."""
    files: tuple[tuple[int, File], ...]


@dataclass(frozen=True)
class Job:
    """A build: what every step of it knows."""

    recipe: DataRecipe
    out: Path
    work: Path
    tasks: tuple[Task, ...]
    evaluations: dict[str, tuple[File, ...]]
    tokenizer: Path | None
    """A folder with a tokenizer that is there; None: it is learned."""

    def corpus(self, task: int) -> CorpusRecipe:
        return self.recipe.corpora[self.tasks[task].corpus]

    def tasks_of(self, corpus: str) -> list[int]:
        return [i for i, task in enumerate(self.tasks) if task.corpus == corpus]

    @property
    def files(self) -> list[File]:
        """Everything that is read."""
        read = [file for task in self.tasks for _, file in task.files]
        return read + [file for found in self.evaluations.values() for file in found]

    @property
    def vocabulary(self) -> Path:
        return self.tokenizer or self.work / "tokenizer"


def find(source: Source | Evaluation, material: Path | None, name: str) -> list[File]:
    """The files of a source, in the order of their names. Raises DataError where there are none."""
    named = READERS.get(getattr(source, "format", "auto"))
    if not source.path and source.hub is None:
        if named is None or named.package_file is None:
            raise DataError(f"{name} has neither path nor hub: name a folder of text, or a dataset's id")
        folder = str(files("dsv3.data"))
        return [File(folder, named.package_file, (Path(folder) / named.package_file).stat().st_size)]
    where = _where(source, material)
    origin = getattr(source, "origin", "")
    hint = f"it can be had from {origin}" if origin else PUBLIC_SOURCES
    advice = f"{hint}; say where it is with --material, or correct `path` in the recipe"
    folder, single = (where, "") if "://" in where or not Path(where).is_file() else os.path.split(where)
    if "://" not in where and not Path(where).exists():
        raise DataError(f"{name} is not there: {where} does not exist; {advice}")
    try:
        data = get_datafolder(folder)
        paths = [single] if single else data.list_files(glob_pattern=source.files)
        found = [File(folder, path, int(data.info(path).get("size") or 0)) for path in paths]
    except (OSError, ValueError, ImportError) as problem:
        raise DataError(f"{name} cannot be listed: {where} ({problem}); {advice}") from None
    if isinstance(source, Source) and source.format == "auto" and not single:
        found = [file for file in found if reader_of(source, file.path)]
    if isinstance(source, Source) and named is not None:
        found = [file for file in found if named.wants(file.path, source.options)]
    if not found:
        raise DataError(f"{name} has no file to read in {where}; {advice}")
    return found


def _where(source: Source | Evaluation, material: Path | None) -> str:
    if source.hub is not None:
        return f"{HUB}{source.hub}/{source.path}".rstrip("/")
    if "://" in source.path:
        return source.path
    return str((material or Path()).expanduser().absolute() / Path(source.path).expanduser())


def plan(recipe: DataRecipe, material: Path | None, out: Path) -> Job:
    """Find every file and cut the work into tasks; nothing is read yet. Raises DataError for what is missing."""
    tasks: list[Task] = []
    for name, corpus in recipe.corpora.items():
        found = [
            (i, file)
            for i, source in enumerate(corpus.sources)
            for file in find(source, material, f"the corpus {name!r}")
        ]
        kinds = {(i, reader_of(corpus.sources[i], file.path)): file for i, file in found}
        for (i, _), file in kinds.items():  # a wrong name of a format or filter should not wait for its turn
            make_reader(corpus.sources[i], file.path, get_datafolder(file.folder), corpus.kind == "chats")
        for asked in corpus.filters:
            make_filter(asked, corpus.kind == "chats")
        groups = _grouped(found, corpus.max_tasks)
        tasks += [Task(name, n, tuple(group)) for n, group in enumerate(groups)]
    evaluations = {
        name: tuple(find(e, material, f"the evaluation set {name!r}"))
        for name, e in recipe.decontamination.evaluations.items()
    }
    tokenizer = None
    if recipe.tokenizer.path is not None:
        tokenizer = (material or Path()).expanduser().absolute() / Path(recipe.tokenizer.path).expanduser()
        Tokenizer.from_pretrained(tokenizer)
    job = Job(recipe, out, out / ".build", tuple(tasks), evaluations, tokenizer)
    stamps = [(file.folder, file.path, file.bytes, _changed(file)) for file in job.files]
    parts = [plain(recipe), stamps, tokenizer and sha256(tokenizer / TOKENIZER_FILE), makers()]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return dataclasses.replace(job, work=job.work / key)


def makers() -> dict[str, str]:
    """What of dsv3 a build depends on: its version, and the hash of the texts of its own."""
    texts = sorted(path for path in Path(str(files("dsv3.data"))).glob("nano_*.json*"))
    own = hashlib.sha256("".join(map(sha256, texts)).encode()).hexdigest()
    return {"dsv3": version("dsv3"), "dsv3's own texts": own}


def _grouped(found: Sequence[tuple[int, File]], most: int) -> Iterator[list[tuple[int, File]]]:
    """The files in order, in at most `most` groups of about a megabyte or more."""
    enough = max(LEAST_BYTES, sum(file.bytes for _, file in found) // most)
    group: list[tuple[int, File]] = []
    size = 0
    for number, file in found:
        group.append((number, file))
        size += file.bytes
        if size >= enough:
            yield group
            group, size = [], 0
    if group:
        yield group


def _changed(file: File) -> int | str:
    """When a file was last written, in nanoseconds; where it lies elsewhere, what its file system says of it."""
    return hash_of(file) if "://" in file.folder else (Path(file.folder) / file.path).stat().st_mtime_ns


def plain(recipe: DataRecipe) -> dict[str, Any]:
    """The recipe as JSON has it; how it is run (Slurm, Ray) is no part of it."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe)))
    return {key: value for key, value in values.items() if key not in ("slurm", "ray")}


def recipe_hash(recipe: DataRecipe) -> str:
    return hashlib.sha256(json.dumps(plain(recipe), sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(file: File) -> str:
    """The file's SHA-256; for what lies elsewhere, what its file system says of it."""
    if "://" in file.folder:
        return f"ukey:{get_datafolder(file.folder).ukey(file.path)}"
    return sha256(Path(file.folder) / file.path)
