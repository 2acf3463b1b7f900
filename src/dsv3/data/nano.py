"""What the bundled model `nano` trains on: a folder of raw text in, token files out.

    python -m dsv3.data.nano MATERIAL OUT

`nano_sources` reads and cleans the text, `nano_chats` makes requests and answers of it; here both become
tokens.
Four kinds make the pretraining stream (`MIXTURE`): children's stories, novels, booking dialogues, a little
Chinese. A kind with too little text is repeated, at most four times, and the epochs of every kind are spread
evenly over the stream, so that a second reading comes long after the first.

For chat tuning, whole chats are packed into rows of 512 + 1 tokens; `segment` numbers the chats of a row so
that attention can be kept inside each. (DeepSeek-V3 does so for chat tuning, and does not for pretraining.)

Held-out text is whole books and whole dialogues; a training document that shares a run of words with a
held-out story or novel is dropped. Everything follows from the material and the seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import sys
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dsv3.data import nano_chats
from dsv3.data import nano_sources as sources
from dsv3.data.nano_sources import EOS, KINDS, SPECIALS, Chat, Document, Message, dialogue, render, words_of

Tokens = npt.NDArray[np.uint16]

_SPECIAL = re.compile("|".join(SPECIALS))
BOS_ID, EOS_ID, PAD_ID, USER_ID, ASSISTANT_ID = range(5)

MIXTURE = {
    "stories": 0.51,
    "dialogues": 0.22,
    "novels": 0.22,
    "chinese": 0.05,
}  # shares of pretraining tokens
MAX_EPOCHS = 4
ROW = 513  # 512 inputs and, shifted by one, 512 targets
HELD_OUT_BOOKS = ("The Happy Prince", "THE MAGIC OF OZ", "THROUGH THE POSTERN GATE")
HELD_OUT_CHARS = 200_000
SHINGLE = 12  # words in a run that marks two texts as the same

LICENCES = {
    "english_stories": "public domain in the USA",
    "english_novels": "public domain",
    "fairytaleqa": "Apache-2.0",
    "sgd_dialogues": "CC BY-SA 4.0",
    "chatterbot": "BSD-3-Clause",
    "chinese_classics": "MIT",
}


# --- choosing -----------------------------------------------------------------------------------------------


def shingles(text: str, stride: int = 1) -> Iterator[str]:
    words = words_of(text)
    for i in range(0, len(words) - SHINGLE + 1, stride):
        yield " ".join(words[i : i + SHINGLE])


def is_held_out(document: Document) -> bool:
    return any(document.source.lower().startswith(name.lower()) for name in HELD_OUT_BOOKS)


def decontaminate(documents: Iterable[Document], held: set[str], dropped: Counter[str]) -> list[Document]:
    """The documents that share no run of 17 words (SHINGLE + stride - 1) with the held-out shingles."""
    kept = []
    for document in documents:
        if held.isdisjoint(shingles(document.text, stride=6)):
            kept.append(document)
        else:
            dropped["shares text with held-out"] += 1
    return kept


def simplest(novels: Sequence[Document], common: set[str], chars: int) -> list[Document]:
    """The novels' documents in words that the stories use, with talk in them, up to `chars` characters."""

    def hardness(document: Document) -> float:
        words = words_of(document.text)
        rare = sum(w not in common for w in words) / max(1, len(words))
        talk = sum(p[0] in "\"'" for p in document.paragraphs) / len(document.paragraphs)
        return rare - 0.05 * talk

    kept, total = [], 0
    for document in sorted(novels, key=hardness):
        if total >= chars:
            break
        kept.append(document)
        total += len(document.text)
    return kept


# --- tokens -------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; DeepSeek-V3's pre-tokenisation: digits by threes, runs of CJK, words, punctuation."""
    tokenizer = Tokenizer(models.BPE())
    word = (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = [pre_tokenizers.Split(Regex(p), "isolated") for p in (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", word)]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(s, normalized=False, special=True) for s in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_chat(tokenizer: Tokenizer, chat: Chat) -> tuple[list[int], list[int]]:
    """Tokens of BOS + `render(chat)`, and a mask: 1 on the assistant's words and the EOS after them."""
    tokens, mask = [BOS_ID], [0]
    for message in chat:
        ids: list[int] = tokenizer.encode(message.content, add_special_tokens=False).ids
        answer = message.role == "assistant"
        if message.role != "system":
            tokens.append(ASSISTANT_ID if answer else USER_ID)
            mask.append(0)
        ids = ids + [EOS_ID] * answer
        tokens += ids
        mask += [int(answer)] * len(ids)
    return tokens, mask


def cut(tokens: list[int], mask: list[int], room: int) -> tuple[list[int], list[int]]:
    """A chat that does not fit ends after the last whole answer that does; empty where none does."""
    if len(tokens) <= room:
        return tokens, mask
    ends = [i + 1 for i, (t, m) in enumerate(zip(tokens[:room], mask, strict=False)) if t == EOS_ID and m]
    end = ends[-1] if ends else 0
    return tokens[:end], mask[:end]


@dataclass(frozen=True)
class Packed:
    """Chats in rows: `tokens` uint16, `mask` uint8 and `segment` uint8, each [rows, row length].

    `mask[r, i]` is 1 where token i is an answer's: loss counts where it is to be predicted.
    `segment` counts the chats of a row from 1; 0 is padding.
    """

    tokens: Tokens
    mask: npt.NDArray[np.uint8]
    segment: npt.NDArray[np.uint8]

    def __post_init__(self) -> None:
        if not self.tokens.shape == self.mask.shape == self.segment.shape:
            raise ValueError(f"shapes differ: {self.tokens.shape}, {self.mask.shape}, {self.segment.shape}")


def pack(chats: Iterable[tuple[list[int], list[int]]], row: int = ROW, open_rows: int = 128) -> Packed:
    """Best fit over `open_rows` rows: each chat goes whole into the fullest row that has room for it."""
    rows: list[list[tuple[list[int], list[int]]]] = []
    room: list[tuple[int, int]] = []  # (free places, row), sorted
    for tokens, mask in chats:
        tokens, mask = cut(tokens, mask, row)
        if not tokens:
            continue
        at = bisect_right(room, (len(tokens), -1))
        if at < len(room):
            free, index = room.pop(at)
        else:
            free, index = row, len(rows)
            rows.append([])
        rows[index].append((tokens, mask))
        if len(rows[index]) < 255:
            insort(room, (free - len(tokens), index))
        if len(room) > open_rows:
            room.pop(0)  # the fullest is done
    shape = (len(rows), row)
    packed = Packed(np.full(shape, PAD_ID, np.uint16), np.zeros(shape, np.uint8), np.zeros(shape, np.uint8))
    for r, contents in enumerate(rows):
        at = 0
        for number, (tokens, mask) in enumerate(contents, start=1):
            here = slice(at, at + len(tokens))
            packed.tokens[r, here], packed.mask[r, here], packed.segment[r, here] = tokens, mask, number
            at += len(tokens)
    return packed


def mix(
    encoded: dict[str, list[Tokens]], budget: int, shares: dict[str, float], rng: random.Random
) -> tuple[list[tuple[str, Tokens]], dict[str, float]]:
    """Documents in the order of reading, and the epochs of each kind.

    A kind gets its share of `budget` tokens, at most MAX_EPOCHS readings; each epoch is shuffled anew, and
    epochs keep their turn over the stream.
    """
    placed: list[tuple[float, str, int]] = []
    epochs: dict[str, float] = {}
    for kind in sorted(encoded):
        pieces = encoded[kind]
        whole = sum(map(len, pieces))
        epochs[kind] = min(MAX_EPOCHS, budget * shares[kind] / max(1, whole))
        left = int(epochs[kind] * whole)
        order: list[int] = []
        while left > 0 and pieces:
            for i in rng.sample(range(len(pieces)), len(pieces)):
                if left <= 0:
                    break
                order.append(i)
                left -= len(pieces[i])
        placed += [((n + rng.random()) / len(order), kind, i) for n, i in enumerate(order)]
    placed.sort()
    return [(kind, encoded[kind][i]) for _, kind, i in placed], epochs


# --- writing ------------------------------------------------------------------------------------------------


def write(path: Path, save: Callable[[Any], object]) -> None:
    """Writes through a temporary name, so that a file that is there is whole."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        save(file)
    os.replace(part, path)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[Tokens]:
    """Each document as BOS, its tokens, EOS; a dialogue ends with its own EOS already."""
    encoded: list[Tokens] = []
    for start in range(0, len(documents), 2000):
        batch = documents[start : start + 2000]
        for document, e in zip(batch, tokenizer.encode_batch_fast([d.text for d in batch]), strict=True):
            tail = [] if document.text.endswith(EOS) else [EOS_ID]
            encoded.append(np.array([BOS_ID, *e.ids, *tail], np.uint16))
    return encoded


def joined(pieces: Iterable[Tokens]) -> Tokens:
    return np.concatenate([np.zeros(0, np.uint16), *pieces])


def bytes_of(documents: Iterable[Document]) -> int:
    """UTF-8 bytes of the text without special tokens."""
    return sum(len(_SPECIAL.sub("", d.text).encode()) for d in documents)


def first_chars(documents: Iterable[Document], limit: int) -> list[Document]:
    kept, total = [], 0
    for document in documents:
        if total >= limit:
            break
        kept.append(document)
        total += len(document.text)
    return kept


def source_of(material: Path, name: str, licence: str) -> dict[str, Any]:
    """What the manifest says of a shelf: its licence and its files."""
    found = sorted(p for p in (material / name).rglob("*") if p.is_file())
    return {"licence": licence, "sha256": {str(p.relative_to(material)): sha256(p) for p in found}}


def build(
    material: Path, out: Path, vocab_size: int = 6144, pretrain_tokens: int = 45_000_000, seed: int = 0
) -> dict[str, Any]:
    """Reads `material`, writes the token files to `out`, and returns what manifest.json says of them.

    tokenizer.json; pretrain.npy, uint16 [tokens]; sft.npz, see `Packed`; heldout.jsonl, the held-out texts;
    heldout.npz, `<kind>_tokens` uint16 and `<kind>_bytes`, UTF-8 bytes without special tokens, of each kind.
    Bits per byte: the negative log-likelihood in nats, summed over the targets that are not special tokens
    (id >= 8), over ln 2, over these bytes. Raises FileNotFoundError for a missing part of the material.
    """
    rng = random.Random(f"{seed} pretrain")
    out.mkdir(parents=True, exist_ok=True)
    dropped: dict[str, Counter[str]] = {kind: Counter() for kind in (*KINDS, "chats")}

    say("reading stories")
    tales = sources.read_fairytales(material)
    stories = [*sources.read_stories(material, dropped["stories"]), *sources.fairytale_documents(tales)]
    say("reading novels")
    novels = list(sources.read_novels(material, dropped["novels"]))
    held = {
        "stories": first_chars(filter(is_held_out, stories), HELD_OUT_CHARS),
        "novels": first_chars(filter(is_held_out, novels), HELD_OUT_CHARS),
    }
    common = {w for w, n in Counter(w for d in stories for w in words_of(d.text)).items() if n >= 20}
    novels = [d for d in novels if not is_held_out(d)]
    novels = simplest(novels, common, int(pretrain_tokens * MIXTURE["novels"] * 4.2))
    stories = [d for d in stories if not is_held_out(d)]
    say("dropping what the held-out books share with training")
    held_shingles = {s for kind in ("stories", "novels") for d in held[kind] for s in shingles(d.text)}
    stories = decontaminate(stories, held_shingles, dropped["stories"])
    novels = decontaminate(novels, held_shingles, dropped["novels"])

    say("reading dialogues and Chinese")
    dialogues = sources.read_dialogues(material)
    training = [chat for split, chat in dialogues if split != "test"]
    tested = [chat for split, chat in dialogues if split == "test"]
    rng.shuffle(tested)
    trained = {render(chat) for chat in training}
    as_document = [
        Document("dialogues", "sgd", render(chat)) for chat in tested if render(chat) not in trained
    ]
    held["dialogues"] = first_chars(as_document, HELD_OUT_CHARS)
    dropped["dialogues"]["test split, not used"] = len(tested) - len(held["dialogues"])
    chinese = list({d.text: d for d in sources.read_chinese(material)}.values())
    rng.shuffle(chinese)
    held["chinese"] = first_chars(chinese, HELD_OUT_CHARS // 6)
    chinese = chinese[len(held["chinese"]) :]
    talks = sources.read_chatterbot(material, "chinese", sources.CHINESE_TOPICS)
    spoken = [
        Document("chinese", "chatterbot", render(dialogue(*t[: len(t) // 2 * 2])))
        for t in talks
        if len(t) > 1
    ]
    kept = {
        "stories": stories,
        "novels": novels,
        "dialogues": [Document("dialogues", "sgd", render(chat)) for chat in training],
        "chinese": chinese + spoken * 3,
    }

    say("training the tokenizer")
    budget = {"stories": 9_000_000, "novels": 4_000_000, "dialogues": 5_000_000, "chinese": 500_000}
    sample = [
        d.text for kind in KINDS for d in first_chars(rng.sample(kept[kind], len(kept[kind])), budget[kind])
    ]
    tokenizer = train_tokenizer((s for text in sample for s in _SPECIAL.split(text)), vocab_size)
    write(out / "tokenizer.json", lambda f: f.write(tokenizer.to_str(pretty=True).encode()))

    encoded = {}
    for kind in KINDS:
        say(f"encoding {kind}: {len(kept[kind])} documents")
        encoded[kind] = encode_documents(tokenizer, kept[kind])
    order, epochs = mix(encoded, pretrain_tokens, MIXTURE, rng)
    stream = joined(tokens for _, tokens in order)
    write(out / "pretrain.npy", lambda f: np.save(f, stream))
    shares = Counter[str]()
    for kind, tokens in order:
        shares[kind] += len(tokens)
    say(f"pretrain.npy: {len(stream):,} tokens")

    arrays: dict[str, Any] = {}
    for kind in KINDS:
        arrays[f"{kind}_tokens"] = joined(encode_documents(tokenizer, held[kind]))
        arrays[f"{kind}_bytes"] = np.int64(bytes_of(held[kind]))
    write(out / "heldout.npz", lambda f: np.savez(f, **arrays))
    lines = [
        json.dumps({"kind": d.kind, "source": d.source, "text": d.text}, ensure_ascii=False)
        for kind in KINDS
        for d in held[kind]
    ]
    write(out / "heldout.jsonl", lambda f: f.write("\n".join(lines).encode()))

    say("making chats")
    rng = random.Random(f"{seed} chats")  # its own, so that new chats leave the pretraining stream as it was
    identity = nano_chats.identity_chats()
    short = [
        s for d in stories if nano_chats.TALE_BOOKS.search(d.source) for s in nano_chats.short_stories(d)
    ]
    short = list({s.text: s for s in short}.values())
    fables = list(nano_chats.written_fables(24, rng))
    reading = [c for c in nano_chats.reading_chats(tales) if held_shingles.isdisjoint(shingles(render(c)))]
    families: dict[str, list[Chat]] = {
        "booking": training,
        "short stories": list(nano_chats.story_chats(short, identity, 4, rng)),
        "fables": list(nano_chats.story_chats(fables, identity, 1, rng)),
        "reading": reading,
        "small talk": nano_chats.small_talk(material) * 6,
        "identity": list(nano_chats.identity_variants(identity, 400, rng)),
    }
    chats = [(name, chat) for name in families for chat in families[name]]
    rng.shuffle(chats)
    chat_tokens = Counter[str]()
    tokenised = []
    for name, chat in chats:
        if rng.random() < 0.08:
            chat = (Message("system", rng.choice(nano_chats.SYSTEMS)), *chat)
        pair = encode_chat(tokenizer, chat)
        dropped["chats"]["cut at a turn"] += len(pair[0]) > ROW
        chat_tokens[name] += min(ROW, len(pair[0]))
        tokenised.append(pair)
    packed = pack(tokenised)
    write(
        out / "sft.npz", lambda f: np.savez(f, tokens=packed.tokens, mask=packed.mask, segment=packed.segment)
    )

    manifest = {
        "seed": seed,
        "vocab_size": tokenizer.get_vocab_size(),
        "sources": {name: source_of(material, name, licence) for name, licence in LICENCES.items()},
        "pretrain": {
            "tokens": len(stream),
            "kinds": {
                kind: {
                    "documents": len(kept[kind]),
                    "unique_tokens": sum(map(len, encoded[kind])),
                    "tokens": shares[kind],
                    "share": round(shares[kind] / len(stream), 4),
                    "epochs": round(epochs[kind], 2),
                    "bytes_per_token": round(bytes_of(kept[kind]) / max(1, sum(map(len, encoded[kind]))), 3),
                }
                for kind in KINDS
            },
        },
        "sft": {
            "rows": len(packed.tokens),
            "row": ROW,
            "answer_tokens": int(packed.mask.sum()),
            "filled": round(float((packed.segment > 0).mean()), 4),
            "kinds": {
                name: {"chats": len(families[name]), "tokens": n, "share": round(n / chat_tokens.total(), 4)}
                for name, n in sorted(chat_tokens.items())
            },
        },
        "heldout": {
            kind: {
                "documents": len(held[kind]),
                "tokens": len(arrays[f"{kind}_tokens"]),
                "bytes": int(arrays[f"{kind}_bytes"]),
            }
            for kind in KINDS
        },
        "dropped": {kind: dict(counter) for kind, counter in dropped.items()},
    }
    write(
        out / "manifest.json", lambda f: f.write(json.dumps(manifest, indent=1, ensure_ascii=False).encode())
    )
    return manifest


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3.data.nano", description="Token files for training nano."
    )
    parser.add_argument("material", type=Path, help="folder with the raw text")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--vocab-size", type=int, default=6144, help="of the tokenizer; default: 6144")
    parser.add_argument("--pretrain-tokens", type=int, default=45_000_000, help="default: 45 million")
    parser.add_argument("--seed", type=int, default=0, help="of the order of documents and the chats made")
    args = parser.parse_args(argv)
    try:
        manifest = build(args.material, args.out, args.vocab_size, args.pretrain_tokens, args.seed)
    except FileNotFoundError as error:
        say(f"error: {error}")
        return 1
    print(json.dumps({k: manifest[k] for k in ("pretrain", "sft", "heldout", "dropped")}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
