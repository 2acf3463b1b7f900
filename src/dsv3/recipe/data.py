"""What a model reads: corpora, and what is done to them before they are tokens.

Read from top to bottom, the `data` section of a recipe tells the life of a document: where it comes from and
under which licence, which filters it must pass, whether a duplicate of it is dropped, what is held back to
measure on, how the vocabulary is learned, and how it is turned into tokens. `docs/data.md` explains each key.
Weights of the corpora are not here but in each stage's `mixture`: the same data serves several.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dsv3.recipe.fields import RecipeError, build, read_yaml


def _check_name(what: str, name: str) -> None:
    """Names become names of files."""
    if not name.replace("-", "").replace("_", "").isalnum():
        raise RecipeError(f"{what} is named {name!r}: use letters, digits, - and _")


def _at_least_one(recipe: object, *keys: str) -> None:
    for key in keys:
        if (value := getattr(recipe, key)) < 1:
            raise RecipeError(f"{key} is {value}: it must be 1 or more")


@dataclass(frozen=True)
class Source:
    """Files of one origin."""

    licence: str
    path: str = ""
    """A file or folder: absolute, below the material, or with `hub` inside the dataset; or a URL (s3://...)."""
    hub: str | None = None
    """Id of a dataset on the Hugging Face hub, such as HuggingFaceFW/fineweb."""
    format: str = "auto"
    """By default each file's ending says: .txt, .jsonl, .parquet, plain or with .gz or .zst. Or a reader's name."""
    files: str | None = None
    """Only files that match this pattern, such as `*.jsonl.gz`."""
    text_key: str = "text"
    """The key or column with the text, in JSONL and Parquet."""
    messages_key: str = "messages"
    """The key or column with the chat: a list of {role, content}."""
    origin: str = ""
    """Where it can be had: shown where it is missing, and kept in the manifest."""
    options: dict[str, Any] = field(default_factory=dict)
    """Passed to a named reader."""

    def __post_init__(self) -> None:
        if not self.licence.strip():
            raise RecipeError("licence is empty: say under which terms the text may be used")


@dataclass(frozen=True)
class Filter:
    """A filter by name, with what differs from its defaults: `gopher` or `{gopher: {min_doc_words: 20}}`."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: Any, where: str) -> Filter:
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, Mapping) and len(value) == 1:
            ((name, options),) = value.items()
            if isinstance(options, Mapping):
                return cls(str(name), {str(k): v for k, v in options.items()})
        raise RecipeError(f"{where} is {value!r}: it must be a filter's name, or {{name: {{option: value}}}}")


@dataclass(frozen=True)
class HoldOut:
    """Which documents of a corpus are kept back to measure on. One of `titles`, `split` and `share` chooses."""

    titles: tuple[str, ...] = ()
    """Documents whose source (a book's title) begins so, whatever the case."""
    split: str | None = None
    """Documents that their source assigns to this split."""
    share: float = 0.0
    """A share of all documents, chosen by a hash of the text, so that copies go the same way."""
    characters: int | None = None
    """No more than this; what is left over is not used at all."""
    decontaminate: bool = True
    """Drop training documents that share a run of words with it."""

    def __post_init__(self) -> None:
        if bool(self.titles) + (self.split is not None) + (self.share > 0) != 1 or not 0 <= self.share < 1:
            raise RecipeError("held_out must have one of titles, split, share (above 0, below 1)")
        if self.characters is not None and self.characters < 0:
            raise RecipeError(f"characters is {self.characters}: it must be 0 or more")


@dataclass(frozen=True)
class Simplest:
    """Keep only the documents that are easiest for whoever has read another corpus."""

    like: str
    """The corpus whose words count as known."""
    characters: int
    """How much is kept."""
    known_from: int = 20
    """Words that the other corpus has at least so often are known."""


@dataclass(frozen=True)
class CorpusRecipe:
    """A corpus: its sources, and what happens to their documents, in this order."""

    sources: tuple[Source, ...]
    kind: Literal["text", "chats"] = "text"
    """Chats become rows with sample masks and an answer mask. A source of chats in a corpus of text is rendered
    in the chat format and read like any other text."""
    held_out: HoldOut | None = None
    filters: tuple[Filter, ...] = ()
    pii: bool = False
    """Replace e-mail and public IP addresses."""
    simplest: Simplest | None = None
    dedup: tuple[Literal["exact", "minhash"], ...] = ()
    """Within all corpora that ask for it: the first in the recipe's order stays."""
    decontaminate: bool = True
    fim_rate: float | None = None
    """By default the recipe's for text. Chats are never reordered."""
    max_tasks: int = 1000
    """Files are read in so many tasks at most; each writes a shard."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise RecipeError("sources is empty: name at least one")
        if self.fim_rate is not None and not 0 <= self.fim_rate <= 1:
            raise RecipeError(f"fim_rate is {self.fim_rate}: it must be from 0 to 1")
        if self.max_tasks < 1:
            raise RecipeError(f"max_tasks is {self.max_tasks}: it must be 1 or more")


@dataclass(frozen=True)
class TokenizerRecipe:
    """The vocabulary: one that is there, or one that is learned from a sample of the corpora."""

    path: str | None = None
    """A folder with tokenizer.json and tokenizer_config.json, as a checkpoint's; then nothing is learned."""
    vocab_size: int = 128_000
    characters: dict[str, int] = field(default_factory=dict)
    """How many characters of each corpus are learned from; by default 100 million of each corpus of text."""


@dataclass(frozen=True)
class MinhashRecipe:
    """Near-duplicates: documents whose sets of word n-grams are alike. The defaults are FineWeb's: documents
    that share 75% of their 5-grams are found with a probability of 77%, 85% with 99%."""

    n_grams: int = 5
    buckets: int = 14
    hashes_per_bucket: int = 8

    def __post_init__(self) -> None:
        _at_least_one(self, "n_grams", "buckets", "hashes_per_bucket")


@dataclass(frozen=True)
class Evaluation:
    """An evaluation set that training must not have seen."""

    path: str
    keys: tuple[str, ...] = ("question", "answer")
    """The fields of each record whose text counts, joined in this order."""
    hub: str | None = None
    files: str | None = None

    def __post_init__(self) -> None:
        if not self.keys:
            raise RecipeError("keys is empty: name the fields that count")


@dataclass(frozen=True)
class Decontamination:
    """Documents that share a run of words with an evaluation set or held-out text are dropped."""

    n_grams: int = 12
    evaluations: dict[str, Evaluation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _at_least_one(self, "n_grams")
        for name in self.evaluations:
            _check_name("an evaluation set", name)


@dataclass(frozen=True)
class DataRecipe:
    """The `data` section of a recipe."""

    corpora: dict[str, CorpusRecipe]
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    minhash: MinhashRecipe = field(default_factory=MinhashRecipe)
    decontamination: Decontamination = field(default_factory=Decontamination)
    fim_rate: float = 0.1
    """The share of text documents reordered to prefix, suffix, middle (report, section 4.1)."""
    split_joined: float = 0.0
    """The share of tokens of punctuation plus line break that are split (section 4.1; no rate is given there)."""
    longest: int = 1_000_000
    """Documents of more characters than this are cut into several, at a line or word where there is one."""
    max_epochs: float | None = 4
    """How often a mixture may read a corpus."""
    seed: int = 0
    slurm: dict[str, Any] = field(default_factory=dict)
    """Arguments of datatrove's SlurmPipelineExecutor: partition, time, mem_per_cpu_gb, ..."""
    ray: dict[str, Any] = field(default_factory=dict)
    """Arguments of datatrove's RayPipelineExecutor."""

    def __post_init__(self) -> None:
        if not self.corpora:
            raise RecipeError("corpora is empty: name at least one")
        for name, corpus in self.corpora.items():
            _check_name("a corpus", name)
            if corpus.simplest is not None and corpus.simplest.like not in self.corpora:
                raise RecipeError(
                    f"corpora.{name}.simplest.like is {corpus.simplest.like!r}: there is no such corpus"
                )
        for name in self.tokenizer.characters:
            if name not in self.corpora:
                raise RecipeError(f"tokenizer.characters names {name!r}: there is no such corpus")
        for key in ("fim_rate", "split_joined"):
            if not 0 <= getattr(self, key) <= 1:
                raise RecipeError(f"{key} is {getattr(self, key)}: it must be from 0 to 1")
        if self.max_epochs is not None and self.max_epochs <= 0:
            raise RecipeError(
                f"max_epochs is {self.max_epochs}: it must be above 0, or left out (null) for no limit"
            )
        if self.longest < 1000:
            raise RecipeError(f"longest is {self.longest}: it must be 1000 characters or more")


def load_data_recipe(path: Path) -> tuple[str, DataRecipe]:
    """The `data` section of a recipe, and the recipe's name; the rest of it is not looked at, and may be missing.

    Raises RecipeError, in one line that names the file and the key.
    """
    values = read_yaml(path)
    if "data" not in values:
        raise RecipeError(f"{path} has no `data` section: say there what is read")
    try:
        return str(values.get("name", path.stem)), build(DataRecipe, values["data"], "data")
    except RecipeError as problem:
        raise RecipeError(f"{path}: {problem}") from None
