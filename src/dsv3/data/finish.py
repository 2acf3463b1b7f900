"""The end of a build: held-out sets, the sum of all counts, the manifest; then everything takes its place."""

from __future__ import annotations

import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.data.job import TOKENIZER_FILE, Job, hash_of, makers, plain, recipe_hash, sha256
from dsv3.data.manifest import MANIFEST, Corpus, HeldOutFile, Manifest, Shard
from dsv3.data.steps import Encoder
from dsv3.data.tasks import held_out
from dsv3.text import Tokenizer

TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer_config.json")


def finish(job: Job) -> None:
    """Held-out sets, hashes and the manifest; then everything takes its place.

    Interrupted while things are moved, it moves the rest the next time: the manifest goes last, as a copy, so that
    the counts are made only once, while everything is in its place.
    """
    written = job.work / MANIFEST
    if not written.exists():
        _describe(job).save(job.work)
    (job.out / MANIFEST).unlink(missing_ok=True)
    for name in TOKENIZER_FILES:
        if (job.vocabulary / name).exists():
            _copy(job.vocabulary / name, job.out / name, job.work / "partial")
    for name in ("tokens", "heldout"):
        if (job.work / name).exists():
            _put(job.work / name, job.out / name)
    _copy(written, job.out / MANIFEST, job.work / "partial")


def _describe(job: Job) -> Manifest:
    """The manifest of what has been made."""
    tokenizer = Tokenizer.from_pretrained(job.vocabulary)
    size = 2 if tokenizer.vocab_size <= 1 << 16 else 4
    return Manifest(
        recipe={"sha256": recipe_hash(job.recipe), "data": plain(job.recipe)},
        versions={
            "python": platform.python_version(),
            **makers(),
            **{name: version(name) for name in ("datatrove", "tokenizers", "numpy")},
        },
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=sha256(job.vocabulary / TOKENIZER_FILE),
        dtype="uint16" if size == 2 else "uint32",
        max_epochs=job.recipe.max_epochs,
        corpora={name: _corpus(job, name, size) for name in job.recipe.corpora},
        heldout=_write_heldout(job, tokenizer, size),
        evaluations={
            name: {file.path: {"sha256": hash_of(file), "bytes": file.bytes} for file in found}
            for name, found in job.evaluations.items()
        },
    )


def _copy(what: Path, where: Path, partial: Path) -> None:
    """Copy a file to its place, where it is whole or not at all."""
    shutil.copyfile(what, partial)
    os.replace(partial, where)


def _put(what: Path, where: Path) -> None:
    """Move a folder to its place; what stood there goes."""
    if where.is_dir():
        shutil.rmtree(where)
    os.replace(what, where)


def _corpus(job: Job, name: str, size: int) -> Corpus:
    recipe = job.recipe.corpora[name]
    counts = _counts(job, name)
    folder = job.work / "tokens" / name
    shards = []
    for task in job.tasks_of(name):
        file = folder / f"{job.tasks[task].number:05d}.ds"
        index = file.with_name(f"{file.name}.index")
        documents = index.stat().st_size // 8 if index.exists() else 0
        if documents:
            path = file.relative_to(job.work).as_posix()
            shards.append(Shard(path, documents, file.stat().st_size // size, sha256(file)))
        else:
            for empty in folder.glob(f"{file.name}*"):
                empty.unlink()
    return Corpus(recipe.kind, _sources(job, name), tuple(counts), tuple(shards))


def _sources(job: Job, name: str) -> tuple[dict[str, Any], ...]:
    found: list[dict[str, Any]] = []
    for source in job.recipe.corpora[name].sources:
        named = {key: getattr(source, key) for key in ("path", "hub", "format", "licence", "origin")}
        found.append({**{key: value for key, value in named.items() if value}, "files": {}})
    for task in job.tasks_of(name):
        for file in json.loads((job.work / "hashes" / f"{task:05d}.json").read_text(encoding="utf-8")):
            found[file["source"]]["files"][file["file"]] = {"sha256": file["sha256"], "bytes": file["bytes"]}
    return tuple(found)


def _counts(job: Job, corpus: str) -> list[dict[str, Any]]:
    """What each step of a corpus passed on and dropped, from the statistics of its tasks."""
    steps: dict[tuple[int, str], dict[str, Any]] = {}
    for stage, name in enumerate(("read", "clean", "tokens")):
        for path in sorted((job.work / "logs" / name / "stats").glob("*.json")):
            for part in json.loads(path.read_text(encoding="utf-8")):
                for label, metric in part["stats"].items():
                    of, step, what = label.split("\t")
                    if of == corpus:
                        total = int(metric["total"] if isinstance(metric, dict) else metric)
                        _count(steps.setdefault((stage, step), {}), what, total)
    merged: dict[tuple[int, str], dict[str, Any]] = {}
    for (stage, numbered), counted in sorted(steps.items()):  # a step and the counter behind it have one name
        if counted:
            name = numbered.split(" ", 1)[1]
            merged.setdefault((stage, name), {"step": name}).update(counted)
    return list(merged.values())


_PLAIN = {"documents": "documents", "forwarded": "documents", "bytes": "bytes", "tokens": "tokens",
          "answer tokens": "answer_tokens", "reordered documents": "reordered", "dropped": "dropped_total"}  # fmt: skip
_BY_REASON = {"dropped_": "dropped", "contaminated_": "by", "note_": "notes", "line-filter-": "lines dropped"}


def _count(step: dict[str, Any], what: str, total: int) -> None:
    """Add a number of datatrove's statistics to a step's, under our name for it."""
    if what in _PLAIN:
        step[_PLAIN[what]] = step.get(_PLAIN[what], 0) + total
    for prefix, group in _BY_REASON.items():
        if what.startswith(prefix):
            reasons = step.setdefault(group, {})
            reason = what.removeprefix(prefix)
            reasons[reason] = reasons.get(reason, 0) + total


def _write_heldout(job: Job, tokenizer: Tokenizer, size: int) -> dict[str, HeldOutFile]:
    folder = job.work / "heldout"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    encoder = Encoder(tokenizer, 0.0, 0.0)
    found: dict[str, HeldOutFile] = {}
    for name, corpus in job.recipe.corpora.items():
        if corpus.held_out is None or corpus.held_out.characters == 0:
            continue
        documents = held_out(job, name)
        ids: list[int] = []
        ends: list[int] = []
        lines: list[str] = []
        length = 0
        for document in documents:
            messages = document.metadata.get("messages")
            if messages is not None:
                ids += encoder.chat(messages)[0]
                length += sum(len(m["content"].encode()) for m in messages)
            else:
                ids += [encoder.bos, *tokenizer.encode(document.text, allow_special=False), encoder.eos]
                length += len(document.text.encode())
            ends.append(len(ids))
            record = {"source": document.metadata.get("source"), "text": document.text}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        file = folder / f"{name}.ds"
        np.array(ids, f"<u{size}").tofile(file)
        np.array(ends, "<u8").tofile(folder / f"{name}.ds.index")
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        found[name] = HeldOutFile(f"heldout/{file.name}", len(documents), len(ids), length, sha256(file))
    return found
