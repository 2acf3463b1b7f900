"""`dsv3 data build`: from a recipe's corpora to token shards, as a chain of datatrove pipelines.

    read         files to documents; what is held out, filters, personal data     a task for a group of files
    held-out     whether each rule has found something to hold out
    simplest     which documents of a corpus are easiest, by another one's words
    exact        hashes of documents, then the duplicates among them
    minhash      signatures, buckets, clusters of near-duplicates
    index        the word runs of evaluation sets and held-out text
    clean        drops what those four found; what is left is what is trained on
    tokenizer    the vocabulary, from a sample
    tokens       fill-in-the-middle, ids, shards
    finish       held-out sets, hashes, the manifest; the data appears

Each link reads what the one before it wrote below OUT/.build, so a build that was killed goes on where it stopped.
A task's documents stay together from the first step to the last: task n of `read` writes the documents that task
n of `tokens` turns into shard n. So the result is the same bytes for any number of workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.io import get_datafolder
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
from datatrove.pipeline.dedup import (
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.hashing import create_hash_func
from datatrove.utils.text import ngrams, simplify_text

from dsv3.data.executors import Place, Stage, make_executors
from dsv3.data.finish import finish
from dsv3.data.job import TOKENIZER_FILE, File, Job, hash_of, makers, plan, recipe_hash, sha256
from dsv3.data.manifest import DataError, Manifest
from dsv3.data.readers import make_reader, reader_of
from dsv3.data.readers.books import words_of
from dsv3.data.steps import WORDS, Chosen, Cut, HeldOut, Passed, Pii, Shards, hardness, make_filter
from dsv3.data.tasks import ByCorpus, Make, Once, Sourced, Steps, Stored, held_out, matched, store, stored
from dsv3.files import only_writer
from dsv3.recipe.data import DataRecipe, Evaluation, Source
from dsv3.text.bpe import save_tokenizer, train_tokenizer

# --- the steps ----------------------------------------------------------------------------------------------


def read_steps(job: Job, task: int) -> Steps:
    corpus = job.corpus(task)
    steps: Steps = [("read", Sourced(job, job.tasks[task])), ("read", Passed())]
    steps.append(("cut", Cut(job.recipe.longest)))
    if corpus.held_out is not None:
        steps.append(("held out", HeldOut(corpus.held_out, str(job.work / "held"))))
    steps += [(asked.name, make_filter(asked)) for asked in corpus.filters]
    if corpus.pii:
        steps.append(("pii", Pii()))
    return [*steps, ("kept", Passed()), ("kept", store(job.work / "read"))]


def check_held_out(job: Job) -> None:
    """Raises DataError for a rule that holds nothing out: it is misspelt, or meant for another corpus."""
    for name, corpus in job.recipe.corpora.items():
        if (rule := corpus.held_out) is None:
            continue
        sources = {str(document.metadata.get("source", "")).lower() for document in matched(job, name)}
        missed = [t for t in rule.titles if not any(source.startswith(t.lower()) for source in sources)]
        if missed:
            raise DataError(f"held_out of the corpus {name!r} has the title {missed[0]!r}: nothing begins so")
        if not sources and rule.characters != 0:
            raise DataError(
                f"held_out of the corpus {name!r} matches no document: correct it, or set its characters to 0"
            )


def choose_simplest(job: Job) -> None:
    """For each corpus that asks for it, a mask of its documents for each task."""
    (job.work / "simplest").mkdir(parents=True, exist_ok=True)
    for name, corpus in job.recipe.corpora.items():
        if (rule := corpus.simplest) is None:
            continue
        counts = Counter(
            word
            for t in job.tasks_of(rule.like)
            for d in stored(job.work / "read", t)
            for word in words_of(d.text)
        )
        known = frozenset(word for word, n in counts.items() if n >= rule.known_from)
        tasks = job.tasks_of(name)
        rated = [
            [(hardness(d.text, known), len(d.text)) for d in stored(job.work / "read", t)] for t in tasks
        ]
        masks = [np.zeros(len(r), bool) for r in rated]
        total = 0
        for _, t, i in sorted((h, t, i) for t, r in enumerate(rated) for i, (h, _) in enumerate(r)):
            if total >= rule.characters:
                break
            masks[t][i] = True
            total += rated[t][i][1]
        for t, mask in zip(tasks, masks, strict=True):
            np.save(job.work / "simplest" / f"{t:05d}.npy", mask)


def _up_to_exact(job: Job, task: int) -> Steps:
    steps: Steps = [("stored", Stored(job.work / "read"))]
    if job.corpus(task).simplest is not None:
        steps.append(("simplest", Chosen(job.work / "simplest" / f"{task:05d}.npy")))
    return steps


def _up_to_minhash(job: Job, task: int) -> Steps:
    steps = _up_to_exact(job, task)
    if "exact" in job.corpus(task).dedup:
        steps.append(
            ("exact duplicates", ExactDedupFilter(str(job.work / "exact" / "found"), exact_config()))
        )
    return steps


def _content(document: Document) -> str:
    return str(document.text)


def _priority(document: Document, task: int) -> int:
    return max(1, 65535 - task)  # of two documents that are the same, the one of the first task stays


def exact_config(task: int = 0) -> ExactDedupConfig:
    return ExactDedupConfig(content_getter=_content, document_priority=partial(_priority, task=task))


def minhash_config(job: Job) -> MinhashConfig:
    m = job.recipe.minhash
    return MinhashConfig(n_grams=m.n_grams, num_buckets=m.buckets, hashes_per_bucket=m.hashes_per_bucket)


def exact_steps(job: Job, task: int) -> Steps:
    if "exact" not in job.corpus(task).dedup:
        return []
    return [
        *_up_to_exact(job, task),
        ("hash", ExactDedupSignature(str(job.work / "exact" / "hashes"), exact_config(task))),
    ]


def minhash_steps(job: Job, task: int) -> Steps:
    if "minhash" not in job.corpus(task).dedup:
        return []
    signature = MinhashDedupSignature(
        str(job.work / "minhash" / "signatures"), minhash_config(job), language=WORDS
    )
    return [*_up_to_minhash(job, task), ("signature", signature)]


def decontamination_config(job: Job) -> NGramsDecontConfig:
    return NGramsDecontConfig(n_grams=job.recipe.decontamination.n_grams)


def build_index(job: Job) -> None:
    """The hashes of all word runs of evaluation sets and held-out text, as datatrove's filter reads them.

    (datatrove's own indexer imports lighteval and reads its tasks; this writes the same files from any records.)
    """
    config = decontamination_config(job)
    hash_of = create_hash_func(config.hash_config)
    folder = job.work / "index"
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in _texts_to_avoid(job):
        hashes: set[int] = set()
        for text in texts:
            words = WORDS.word_tokenize(simplify_text(text, config.norm_config))
            hashes.update(hash_of(" ".join(run)) for run in ngrams(words, config.n_grams))
        array = np.array(sorted(hashes), dtype=config.hash_config.np_descr)
        array.tofile(folder / f"{name}.index.hashes")


def _texts_to_avoid(job: Job) -> Iterator[tuple[str, Iterable[str]]]:
    for name, evaluation in job.recipe.decontamination.evaluations.items():
        yield name, _evaluation_texts(evaluation, job.evaluations[name], name)
    for name, corpus in job.recipe.corpora.items():
        if corpus.held_out is not None and corpus.held_out.decontaminate:
            yield f"held-out {name}", [d.text for d in held_out(job, name)]


def _evaluation_texts(evaluation: Evaluation, found: Iterable[File], name: str) -> Iterator[str]:
    some = False
    source = Source(licence="-", text_key=evaluation.keys[0])
    for file in found:
        if reader_of(source, file.path) is None:
            continue
        reader = make_reader(source, file.path, get_datafolder(file.folder), chats=False)
        # The record as it is, before the reader looks for its text.
        reader.document = lambda record, path, number: record  # type: ignore[method-assign]
        for record in reader.read_file(file.path):
            if isinstance(record, dict):
                text = "\n".join(str(record[key]) for key in evaluation.keys if record.get(key))
                some = some or bool(text)
                yield text
    if not some:
        raise DataError(
            f"the evaluation set {name!r} has no record with {' or '.join(evaluation.keys)}: correct its `keys`"
        )


def clean_steps(job: Job, task: int) -> Steps:
    corpus = job.corpus(task)
    steps = _up_to_minhash(job, task)
    if "minhash" in corpus.dedup:
        steps.append(("near-duplicates", MinhashDedupFilter(str(job.work / "minhash" / "clusters"))))
    if corpus.decontaminate and _decontaminates(job.recipe):
        contaminated = NGramsDecontFilter(
            str(job.work / "index"), decontamination_config(job), language=WORDS
        )
        steps.append(("decontamination", contaminated))
    return [*steps, ("kept", Passed()), ("kept", store(job.work / "clean"))]


def _decontaminates(recipe: DataRecipe) -> bool:
    held = any(c.held_out is not None and c.held_out.decontaminate for c in recipe.corpora.values())
    return held or bool(recipe.decontamination.evaluations)


def learn_vocabulary(job: Job) -> None:
    """Train the tokenizer on a sample of the corpora of text."""
    settings = job.recipe.tokenizer
    wanted = settings.characters or {
        name: 100_000_000 for name, c in job.recipe.corpora.items() if c.kind == "text"
    }
    tokenizer = train_tokenizer(
        (text for name, characters in wanted.items() for text in sample(job, name, characters)),
        settings.vocab_size,
    )
    save_tokenizer(job.work / "tokenizer", tokenizer)


def sample(job: Job, corpus: str, characters: int) -> Iterator[str]:
    """About so many characters of a corpus, from its whole length: all documents, or those whose hash is low."""
    tasks = job.tasks_of(corpus)
    whole = sum(len(d.text) for t in tasks for d in stored(job.work / "clean", t))
    share = characters / max(1, whole)
    for task in tasks:
        for number, document in enumerate(stored(job.work / "clean", task)):
            digest = hashlib.blake2b(f"{job.recipe.seed} {task} {number}".encode(), digest_size=8).digest()
            if int.from_bytes(digest, "big") < share * 2**64:
                yield document.text


def token_steps(job: Job, task: int) -> Steps:
    corpus, recipe = job.corpus(task), job.recipe
    this = job.tasks[task]
    chats = corpus.kind == "chats"
    rate = corpus.fim_rate if corpus.fim_rate is not None else recipe.fim_rate
    shards = Shards(
        job.work / "tokens" / this.corpus,
        f"{this.number:05d}.ds",
        job.vocabulary,
        chats,
        0.0 if chats else rate,
        recipe.split_joined,
        f"{recipe.seed} {this.corpus} {this.number}",
    )
    return [("stored", Stored(job.work / "clean")), ("tokens", shards), ("tokens", Passed())]


# --- the chain ----------------------------------------------------------------------------------------------


def stages(job: Job) -> list[Stage]:
    """The pipelines of a build, in order; those that no corpus asks for are left out."""
    recipe, tasks, work = job.recipe, len(job.tasks), job.work
    wants = {step for corpus in recipe.corpora.values() for step in corpus.dedup}

    def by_corpus(name: str, make: Make) -> Stage:
        return Stage(name, (ByCorpus(name, job, make),), tasks)

    def once(name: str, function: Callable[[Job], None]) -> Stage:
        return Stage(name, (Once(name, job, function),), 1)

    chain = [by_corpus("read", read_steps)]
    if any(corpus.held_out is not None for corpus in recipe.corpora.values()):
        chain.append(once("held-out", check_held_out))
    if any(corpus.simplest is not None for corpus in recipe.corpora.values()):
        chain.append(once("simplest", choose_simplest))
    if "exact" in wants:
        chain.append(by_corpus("exact-hashes", exact_steps))
        find_exact = ExactFindDedups(
            str(work / "exact" / "hashes"), str(work / "exact" / "found"), exact_config()
        )
        chain.append(Stage("exact-found", (find_exact,), 1))
    if "minhash" in wants:
        config, folder = minhash_config(job), work / "minhash"
        chain.append(by_corpus("minhash-signatures", minhash_steps))
        buckets = MinhashDedupBuckets(str(folder / "signatures"), str(folder / "pairs"), config=config)
        chain.append(Stage("minhash-buckets", (buckets,), recipe.minhash.buckets))
        clusters = MinhashDedupCluster(str(folder / "pairs"), str(folder / "clusters"), config=config)
        chain.append(Stage("minhash-clusters", (clusters,), 1))
    if _decontaminates(recipe):
        chain.append(once("index", build_index))
    chain.append(by_corpus("clean", clean_steps))
    if job.tokenizer is None:
        chain.append(once("tokenizer", learn_vocabulary))
    chain.append(by_corpus("tokens", token_steps))
    chain.append(once("finish", finish))
    return chain


Progress = Callable[[str, int, int], None]


def _nobody(name: str, done: int, tasks: int) -> None:
    """Whoever asked for the build does not want to watch."""


@contextlib.contextmanager
def _watched(completions: Path, stage: Stage, progress: Progress) -> Iterator[None]:
    """Tell twice a second how many tasks of a stage datatrove has marked as done."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            progress(stage.name, len(list(completions.glob("*"))), stage.tasks)

    progress(stage.name, 0, stage.tasks)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def build(
    recipe: DataRecipe,
    material: Path | None,
    out: Path,
    executor: Place = "local",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Manifest | None:
    """Build the data of a recipe in the folder `out`; returns its manifest, or None where jobs were submitted.

    material: where relative paths of the recipe lie; workers: tasks at once, by default as many as processors;
    progress: told the name of a step, how many of its tasks are done, and how many there are. What is there and was
    built from the same recipe and files is left as it is. Raises DataError for what a person can mend.
    """
    out = out.expanduser().absolute()
    job = plan(recipe, material, out)
    with _alone(out):
        if not _is_built(job):
            job.work.mkdir(parents=True, exist_ok=True)
            chain = stages(job)
            options = {"local": {}, "slurm": recipe.slurm, "ray": recipe.ray}[executor]
            count = workers or (_processors() if executor == "local" else -1)
            runs = make_executors(chain, job.work / "logs", executor, count, options)
            if executor != "local":
                runs[-1].run()  # launches what it depends on first
                return None
            for stage, run in zip(chain, runs, strict=True):
                with _watched(job.work / "logs" / stage.name / "completions", stage, progress or _nobody):
                    run.run()
        if executor == "local":
            shutil.rmtree(job.work, ignore_errors=True)
            with contextlib.suppress(OSError):  # not there, or another build's work is in it
                job.work.parent.rmdir()
        return Manifest.load(out)


def _alone(out: Path) -> AbstractContextManager[None]:
    """Nobody else builds in the folder meanwhile; raises DataError where somebody does."""
    busy = f"{out} is being built by another process: wait for it, or name another --out"
    return only_writer(out, DataError(busy))


def _is_built(job: Job) -> bool:
    """Whether `out` holds what this build would write: of the files that are read, the content counts."""
    try:
        manifest = Manifest.load(job.out)
    except DataError:
        return False
    made = [manifest.recipe.get("sha256"), *(manifest.versions.get(name) for name in makers())]
    if made != [recipe_hash(job.recipe), *makers().values()]:
        return False
    if job.tokenizer is not None and manifest.tokenizer_sha256 != sha256(job.tokenizer / TOKENIZER_FILE):
        return False
    return manifest.inputs == sorted((file.path, hash_of(file)) for file in job.files)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
