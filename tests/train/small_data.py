"""A data folder as `dsv3 data build` leaves it, of made-up text, small enough for a test."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.data.manifest import Corpus, HeldOutFile, Manifest, Shard
from dsv3.text.bpe import save_tokenizer, train_tokenizer

WORDS = (
    "the fox",
    "a hen",
    "one day",
    "the king",
    "went home",
    "was glad",
    "and so",
    "saw",
    "said",
    "at last",
)


def sentences(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(6, 30))).capitalize() + "." for _ in range(count)]


def write_data(folder: Path, documents: int = 200, chats: int = 60, seed: int = 0) -> Path:
    """Text `words`, chats `talk`, and held-out text `words`; a vocabulary of 300."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = sentences(documents, seed)
    tokenizer = train_tokenizer(texts, 300)
    save_tokenizer(folder, tokenizer)

    def encoded(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def shard(name: str, pieces: list[list[int]], loss: list[list[int]] | None = None) -> Shard:
        place = folder / "tokens" / name
        place.mkdir(parents=True, exist_ok=True)
        path = place / "00000.ds"
        np.concatenate([np.array(p, "uint16") for p in pieces]).tofile(path)
        np.cumsum([len(p) for p in pieces]).astype("uint64").tofile(f"{path}.index")
        if loss is not None:
            np.concatenate([np.array(p, "uint8") for p in loss]).tofile(f"{path}.loss")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return Shard(str(path.relative_to(folder)), len(pieces), sum(map(len, pieces)), digest)

    words = shard("words", [[0, *encoded(t), 1] for t in texts])
    asked = [(encoded(q), encoded(a)) for q, a in zip(sentences(chats, 1), sentences(chats, 2), strict=True)]
    talk = shard(
        "talk",
        [[0, 3, *q, 4, *a, 1] for q, a in asked],
        [[0, 0, *[0] * len(q), 0, *[1] * len(a), 1] for q, a in asked],
    )
    held = sentences(20, seed + 100)
    tokens = np.concatenate([np.array([0, *encoded(t), 1], "uint16") for t in held])
    (folder / "heldout").mkdir()
    tokens.tofile(folder / "heldout" / "words.ds")
    corpora = {"words": Corpus("text", (), (), (words,)), "talk": Corpus("chats", (), (), (talk,))}
    heldout = HeldOutFile("heldout/words.ds", len(held), len(tokens), sum(len(t.encode()) for t in held), "")
    Manifest({}, {}, 300, "", "uint16", None, corpora, {"words": heldout}).save(folder)
    return folder


RECIPE: dict[str, Any] = {
    "name": "small",
    "model": {"preset": "tiny", "vocab_size": 300, "max_position_embeddings": 32},
    "data": {
        "corpora": {
            "words": {"sources": [{"path": "nowhere", "licence": "none"}]},
            "talk": {"kind": "chats", "sources": [{"path": "nowhere", "licence": "none"}]},
        }
    },
    "precision": "fp32",
    "stages": {
        "pretrain": {
            "tokens": "20 steps",
            "sequence_length": 32,
            "batch": [{"for": "10 steps", "linear": [2, 6]}, {"constant": 6}],
            "lr": [{"for": "3 steps", "linear": [0, 1e-2]}, {"constant": 1e-2}],
            "mtp": 0.3,
            "gamma": [{"until": "15 steps", "constant": 0.001}, {"constant": 0}],
            "mixture": {"words": 1},
            "microbatch": 2,
        },
        "extend": [
            {
                "tokens": "3 steps",
                "sequence_length": 64,
                "batch": 2,
                "lr": 1e-3,
                "mtp": 0.1,
                "mixture": {"words": 1},
                "max_position_embeddings": 64,
                "rope_scaling": {"factor": 4, "original_max_position_embeddings": 32, "mscale_all_dim": 1.0},
            },
            {
                "tokens": "2 steps",
                "sequence_length": 128,
                "batch": 1,
                "lr": 1e-3,
                "mixture": {"words": 1},
                "max_position_embeddings": 256,
                "rope_scaling": {"factor": 4, "original_max_position_embeddings": 32, "mscale_all_dim": 1.0},
            },
        ],
        "sft": {
            "tokens": "1 epoch",
            "sequence_length": 256,
            "batch": 2,
            "lr": [{"cosine": [1e-2, 1e-3]}],
            "mtp": 0.1,
            "mixture": {"talk": 1},
            "fresh_moments": True,
        },
    },
}


def write_recipe(path: Path, **stages: Any) -> Path:
    """The recipe as JSON, which is YAML too; stages: changes of their values by name, None to leave one out."""
    values = json.loads(json.dumps(RECIPE))
    for name, changes in stages.items():
        if changes is None:
            del values["stages"][name]
        else:
            values["stages"][name].update(changes)
    path.write_text(json.dumps(values), encoding="utf-8")
    return path
