"""How steps run: those of a corpus in each of its tasks, those of the whole build once.

A task's documents stay together from step to step: task n reads what task n of an earlier step wrote.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

from dsv3.data.job import Job, Task, hash_of
from dsv3.data.readers import make_reader

Steps = list[tuple[str, PipelineStep]]
"""Pipeline steps, each under the name that its counts have in the manifest."""
Make = Callable[[Job, int], Steps]
"""The steps of one task."""


class ByCorpus(PipelineStep):  # type: ignore[misc]
    """Runs, for each task, the steps that its corpus asks for, and keeps their counts under the corpus' name."""

    type = "dsv3"

    def __init__(self, name: str, job: Job, make: Make) -> None:
        self.name = name
        super().__init__()
        self.job, self.make = job, make

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        steps = self.make(self.job, rank)
        flow: Any = None
        for _, step in steps:
            flow = step(flow, rank, world_size)
        for _ in flow or ():
            pass
        corpus = self.job.tasks[rank].corpus
        for i, (name, step) in enumerate(steps):
            for label, metric in step.stats.stats.items():
                self.stat_update(f"{corpus}\t{i:02d} {name}\t{label}", value=metric.total)
        yield from ()


class Once(PipelineStep):  # type: ignore[misc]
    """A step of one task that is a function of the job."""

    type = "dsv3"

    def __init__(self, name: str, job: Job, function: Callable[[Job], None]) -> None:
        self.name = name
        super().__init__()
        self.job, self.function = job, function

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self.function(self.job)
        yield from ()


class Sourced(PipelineStep):  # type: ignore[misc]
    """Reads the files of a task by their readers, and notes the hash of each."""

    type, name = "dsv3", "read"

    def __init__(self, job: Job, task: Task) -> None:
        super().__init__()
        self.job, self.task = job, task

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        corpus = self.job.recipe.corpora[self.task.corpus]
        hashes = []
        for source, file in self.task.files:
            folder = get_datafolder(file.folder)
            reader = make_reader(corpus.sources[source], file.path, folder, corpus.kind == "chats")
            yield from reader.read_files_shard([file.path])
            for label, count in reader.counts():
                self.stat_update(label, value=count)
            hashes.append({"source": source, "file": file.path, "bytes": file.bytes, "sha256": hash_of(file)})
        path = self.job.work / "hashes" / f"{rank:05d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(hashes), encoding="utf-8")


class Stored(PipelineStep):  # type: ignore[misc]
    """The documents that this task wrote in an earlier step."""

    type, name = "dsv3", "stored"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        yield from stored(self.folder, rank)


def stored(folder: Path, task: int) -> Iterator[Document]:
    """What a task wrote, if it wrote anything."""
    name = f"{task:05d}.jsonl.zst"
    if (folder / name).exists():
        yield from JsonlReader(str(folder), compression="zstd").read_file(name)


def store(folder: Path) -> JsonlWriter:
    return JsonlWriter(str(folder), "${rank}.jsonl", compression="zstd")


def held_out(job: Job, corpus: str) -> list[Document]:
    """What is held out of a corpus, up to its limit."""
    rule = job.recipe.corpora[corpus].held_out
    limit = None if rule is None else rule.characters
    kept: list[Document] = []
    total = 0
    for document in matched(job, corpus):
        if limit is not None and total >= limit:
            break
        kept.append(document)
        total += len(document.text)
    return kept


def matched(job: Job, corpus: str) -> Iterator[Document]:
    """All that a corpus' rule takes out of training."""
    folder = job.work / "held"
    for task in job.tasks_of(corpus):
        if (folder / f"{task:05d}.jsonl").exists():
            yield from JsonlReader(str(folder), compression=None).read_file(f"{task:05d}.jsonl")
