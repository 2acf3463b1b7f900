"""The token files of nano, made from a tiny material folder of invented text."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dsv3.data import nano, nano_chats, nano_sources
from dsv3.data.nano_sources import Document, Message, dialogue, render

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


def prose(seed: str, paragraphs: int, sentences: int = 5) -> list[str]:
    """Invented paragraphs, the same for the same seed and hardly alike for another."""
    rng = random.Random(seed)

    def name() -> str:
        return "".join(rng.choice(["ba", "lo", "mi", "ru", "te", "so", "ka"]) for _ in range(4)).capitalize()

    def sentence() -> str:
        deed, thing, place = rng.choice(DEEDS), rng.choice(THINGS), rng.choice(PLACES)
        day = rng.randrange(1000)
        return f"{name()} {deed} {thing} for {name()} near the {place}, {day} days after {name()}."

    return [" ".join(sentence() for _ in range(sentences)) for _ in range(paragraphs)]


FOX = (
    "Once upon a time there was a fox who lived under a hill. The fox was hungry, and he went to the "
    "river to look for a fish. He sat in the grass and waited a long while, until a small grey fish "
    "came up to look at him. 'Do not eat me,' said the fish, 'for I am thin.' The fox laughed and let "
    "it swim off. After that the fox ate berries, and he lived happily ever after."
)
FRONT = """TALES OF THE HILL
By Nobody Atall
[Illustration: a hill]
CONTENTS
THE FOX   1 THE BELL   9
PREFACE"""
TALES = "\n\n".join(
    [
        *FRONT.split("\n"),
        "This preface thanks the printer of the book. " * 8,
        "THE FOX UNDER THE HILL",
        FOX,
        "CHAPTER II",
        "THE BELL",
        "“It rang--twice,” said _Mabel_. " * 8,
        *prose("tales", 12),
        "NOTES AND REFERENCES",
        "These notes name the sources of the tales. " * 8,
        "End of the Project Gutenberg EBook",
        "Licence words " * 40,
    ]
)


def book(title: str, paragraphs: list[str]) -> str:
    return "\n\n".join([title.upper(), "CHAPTER I", *paragraphs])


def write_gzip(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(text)


def sheet(rows: list[dict[str, str]]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("material")
    end = "\n<|endofbook|>\n"
    # The copy in the second book shares its paragraphs with the held-out one, and must go.
    prince = prose("prince", 8)
    stories = [TALES, book("The Happy Prince", prince), book("A Copy", [*prose("copy", 2), *prince[:3]])]
    write_gzip(root / "english_stories/gutenberg_children.txt.gz", end.join(stories))
    novels = [book("Through the Postern Gate", prose("gate", 9)), book("The Long Road", prose("road", 40))]
    write_gzip(root / "english_novels/novels-0.txt.gz", end.join(novels))
    write_gzip(root / "english_novels/novels-1.txt.gz", book("The Short Road", prose("short", 30)))

    passage = " ".join(prose("qa", 2, 3))
    asked = [("What did the boy lose?", "He lost a bell at the mill."), ("Where?", "the mill")]
    told_there = [{"section": "1", "text": prose("prince", 8)[0]}]  # stands in the held-out book too
    tables = {
        "section-stories/train/the-prince-story.csv": told_there,
        "questions/train/the-prince-questions.csv": [
            {"cor_section": "1", "question": "Who came?", "answer1": "The prince came to town."}
        ],
        "section-stories/train/the-bell-story.csv": [{"section": "1", "text": passage}],
        "questions/train/the-bell-questions.csv": [
            {"cor_section": "1", "question": q, "answer1": answer} for q, answer in asked
        ],
    }
    (root / "fairytaleqa").mkdir()
    with tarfile.open(root / "fairytaleqa/fairytaleqa.tar.gz", "w:gz") as archive:
        for name, rows in tables.items():
            data = sheet(rows)
            info = tarfile.TarInfo(f"data-by-train-split/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

    lines = []
    for i in range(60):
        turns = [{"role": "user", "content": f"I want a table for {i} at the {PLACES[i % 10]}."},
                 {"role": "assistant", "content": f"Is {i % 12} o'clock right?"},
                 {"role": "user", "content": "Yes, thank you."},
                 {"role": "assistant", "content": f"Table {i} is yours."}]  # fmt: skip
        lines.append(
            json.dumps({"id": str(i), "split": "test" if i % 5 == 0 else "train", "messages": turns})
        )
    write_gzip(root / "sgd_dialogues/sgd_turns.jsonl.gz", "\n".join(lines))

    poems = [
        {"source": "诗", "title": f"其{i}", "author": "", "text": f"[1]山高水长第{i}首，" * 6}
        for i in range(400)
    ]
    write_gzip(root / "chinese_classics/classics.jsonl.gz", "\n".join(json.dumps(p) for p in poems))
    for language, talk in (
        ("english", ("Good day", "Good day to you.")),
        ("chinese", ("你好", "你好，朋友。")),
    ):
        folder = root / f"chatterbot/chatterbot_corpus/data/{language}"
        folder.mkdir(parents=True)
        talks = f"- - {talk[0]}\n  - {talk[1]}\n- - My CPU\n  - is a server\n"
        text = f"categories:\n- greetings\nconversations:\n{talks}"
        (folder / "greetings.yml").write_text(text, encoding="utf-8")
    return root


def run(material: Path, out: Path, seed: int = 0) -> dict[str, Any]:
    return nano.build(material, out, vocab_size=600, pretrain_tokens=30_000, seed=seed)


@pytest.fixture(scope="module")
def built(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    patch = pytest.MonkeyPatch()
    patch.setattr(nano, "HELD_OUT_CHARS", 6000)
    out = tmp_path_factory.mktemp("out")
    run(material, out)
    run(material, out / "again")
    run(material, out / "other", seed=1)
    patch.undo()
    return out


@pytest.fixture(scope="module")
def tokenizer(built: Path) -> Tokenizer:
    return Tokenizer.from_file(str(built / "tokenizer.json"))


# --- books --------------------------------------------------------------------------------------------------


def test_front_matter_notes_and_licence_are_dropped() -> None:
    dropped: Counter[str] = Counter()
    found = dict(nano_sources.sections(TALES, dropped))
    assert list(found) == ["The Fox Under the Hill", "The Bell"]
    text = "\n".join(p for body in found.values() for p in body)
    for word in ("Contents", "preface", "Illustration", "Nobody", "notes", "Licence", "Gutenberg"):
        assert word.lower() not in text.lower(), f"{word} is still in the text"
    assert found["The Fox Under the Hill"] == [FOX]
    assert '"It rang—twice," said Mabel.' in text
    assert dropped["front matter"] > 0 and dropped["notes or licence tail"] > 0


def test_chunks_keep_every_paragraph_in_order() -> None:
    paragraphs = prose("chunks", 40)
    runs = nano_sources.chunks(paragraphs, 2000)
    assert [p for run in runs for p in run] == paragraphs
    assert all(sum(map(len, run)) >= 600 for run in runs) and len(runs) > 3


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("ONCE UPON A TIME there was", "Once upon a time there was"),
        ("MARLEY was dead", "Marley was dead"),
        ("“Don’t”  _go_ -- [3] {12}now", '"Don\'t" go—now'),
    ],
)
def test_clean(written: str, read: str) -> None:
    assert nano_sources.clean(written) == read


# --- tokens -------------------------------------------------------------------------------------------------


@given(text=st.text(), raw=st.binary())
def test_any_text_round_trips(tokenizer: Tokenizer, text: str, raw: bytes) -> None:
    for written in (text, raw.decode("latin-1")):
        ids = tokenizer.encode(written, add_special_tokens=False).ids
        if not any(i < len(nano_sources.SPECIALS) for i in ids):
            assert tokenizer.decode(ids, skip_special_tokens=False) == written


def test_special_tokens_come_first_and_nothing_is_added(tokenizer: Tokenizer) -> None:
    assert [tokenizer.id_to_token(i) for i in range(8)] == list(nano_sources.SPECIALS)
    assert tokenizer.get_vocab_size() == 600
    assert nano.BOS_ID not in tokenizer.encode("A bell.").ids


def test_digits_are_read_by_threes(tokenizer: Tokenizer) -> None:
    assert tokenizer.pre_tokenizer is not None
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("Day 12345, 你好 ok.\n\n")]
    assert pieces[:5] == ["Day", "Ġ", "123", "45", ","]
    assert pieces[-1] == ".ĊĊ"


def test_pretraining_stream_is_whole_documents(built: Path, tokenizer: Tokenizer) -> None:
    stream = np.load(built / "pretrain.npy", mmap_mode="r")
    assert (
        stream.dtype == np.uint16 and 20_000 < len(stream) < 31_000
    )  # the budget, at most four epochs a kind
    assert stream[0] == nano.BOS_ID and stream[-1] == nano.EOS_ID
    starts = np.flatnonzero(stream == nano.BOS_ID)
    assert (stream[starts[1:] - 1] == nano.EOS_ID).all()
    chat = next(s for s in np.split(stream, starts)[1:] if s[1] == nano.USER_ID)
    assert re.fullmatch(
        r"(<｜User｜>[^<]+<｜Assistant｜>[^<]+<｜end▁of▁sentence｜>)+",
        tokenizer.decode(chat[1:].tolist(), skip_special_tokens=False),
    )


def test_epochs_of_a_kind_do_not_meet() -> None:
    pieces = {"stories": [np.array([i], np.uint16) for i in range(50)]}
    order, epochs = nano.mix(pieces, 150, {"stories": 1.0}, random.Random(0))
    seen = [int(tokens[0]) for _, tokens in order]
    assert epochs["stories"] == 3
    assert all(sorted(seen[at : at + 50]) == list(range(50)) for at in (0, 50, 100))
    assert seen[:50] != seen[50:100], "each epoch has an order of its own"


# --- chats --------------------------------------------------------------------------------------------------


def test_mask_is_on_answers_only(tokenizer: Tokenizer) -> None:
    chat = (Message("system", "Be brief."), *dialogue("Hello", "Good day.", "A bell?", "It rang."))
    tokens, mask = nano.encode_chat(tokenizer, chat)
    text = nano_sources.BOS + render(chat)
    assert tokens == tokenizer.encode(text, add_special_tokens=False).ids, "parts encode as the whole does"
    learned = tokenizer.decode([t for t, m in zip(tokens, mask, strict=True) if m], skip_special_tokens=False)
    assert learned == f"Good day.{nano_sources.EOS}It rang.{nano_sources.EOS}"


def test_packed_rows(built: Path, tokenizer: Tokenizer) -> None:
    with np.load(built / "sft.npz") as file:
        tokens, mask, segment = file["tokens"], file["mask"], file["segment"]
    assert tokens.dtype == np.uint16 and tokens.shape[1] == 513
    assert tokens.shape == mask.shape == segment.shape
    assert (tokens[segment == 0] == nano.PAD_ID).all() and (mask[segment == 0] == 0).all()
    assert (segment > 0).mean() > 0.9
    for row in range(0, len(tokens), 7):
        for number in range(1, segment[row].max() + 1):
            at = np.flatnonzero(segment[row] == number)
            assert (np.diff(at) == 1).all(), "a chat lies in one piece"
            ids, learned = tokens[row, at], mask[row, at]
            assert ids[0] == nano.BOS_ID and ids[-1] == nano.EOS_ID and (ids[1:] != nano.BOS_ID).all()
            assert learned.any() and (learned[np.isin(ids, (0, 3, 4))] == 0).all()
            for start in np.flatnonzero(ids == nano.ASSISTANT_ID):
                end = start + np.flatnonzero(ids[start:] == nano.EOS_ID)[0]
                assert learned[start + 1 : end + 1].all()
            for start in np.flatnonzero(ids == nano.USER_ID):
                end = start + np.flatnonzero(ids[start:] == nano.ASSISTANT_ID)[0]
                assert not learned[start : end + 1].any()


def test_long_chats_end_at_a_turn() -> None:
    tokens = [0, 3, 9, 4, 9, 1, 3, 9, 9, 4, 9, 1]
    mask = [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1]
    packed = nano.pack([(tokens, mask)], row=10)
    assert packed.tokens.tolist() == [[0, 3, 9, 4, 9, 1, 2, 2, 2, 2]]
    assert packed.segment.tolist() == [[1] * 6 + [0] * 4]
    assert len(nano.pack([([0, 3, *[9] * 20], [0] * 22)], row=10).tokens) == 0


def test_packing_loses_no_chat() -> None:
    rng = random.Random(3)
    chats = [([0, 3, 9, 4, *[10 + i] * rng.randrange(1, 50), 1], i) for i in range(300)]
    packed = nano.pack([(t, [0] * 4 + [1] * (len(t) - 4)) for t, _ in chats], row=64)
    assert (packed.segment > 0).sum() == sum(len(t) for t, _ in chats)
    assert set(range(10, 310)) <= set(packed.tokens.flatten().tolist())


def test_a_short_story_is_found_and_asked_for_by_what_it_is_about() -> None:
    document = Document(
        "stories", "fairy tales", "\n\n".join(["The Fox", FOX, *prose("more", 3, 12)]), opens=True
    )
    story = next(nano_chats.short_stories(document))
    assert (story.title, story.text) == ("The Fox", FOX)
    assert story.nouns[0] == "fox"
    rng = random.Random(0)
    requests = {nano_chats.request_for(story, rng) for _ in range(300)}
    assert "Tell me about a fox." in requests and len(requests) > 30
    middle = Document("stories", "fairy tales", "\n\n".join(prose("middle", 3, 12)))
    assert not list(nano_chats.short_stories(middle)), "the middle of a tale is no story"


def test_fables_are_filled_in() -> None:
    stories = list(nano_chats.written_fables(3, random.Random(0)))
    assert len({s.text for s in stories}) > 0.9 * len(stories)
    for story in stories:
        assert not re.search(r"[\[\]{}|]", story.title + story.text), story.text
        assert not re.search(r"\ba [aeio]", story.text), story.text
        assert all(re.search(rf"\b{noun}", story.text, re.I) for noun in story.nouns), story.text
        assert story.text.count('"') % 2 == 0 and story.text[-1] in '.!"', story.text


def test_identity_says_who_it_is() -> None:
    answers = {way: answer for ways, answer in nano_chats.identity_chats() for way in ways}
    assert "nano" in answers["Who are you?"] and "dsv3" in answers["Who are you?"]
    assert len(answers) > 100


def test_identity_is_asked_about_alone_and_in_the_middle_of_a_chat() -> None:
    identity = [([f"question {i}", f"QUESTION {i}"], f"answer {i}") for i in range(7)]
    chats = list(nano_chats.identity_variants(identity, 20, random.Random(0)))
    assert {len(chat) for chat in chats} == {2, 4, 6, 8}
    pairs = [
        (q.content.lower()[-1], a.content[-1]) for c in chats for q, a in zip(c[::2], c[1::2], strict=True)
    ]
    assert all(question == answer for question, answer in pairs)
    assert Counter(answer for _, answer in pairs) == {str(i): 20 for i in range(7)}


def test_unfit_small_talk_and_fragments_are_left_out(material: Path) -> None:
    said = [m.content for chat in nano_chats.small_talk(material) for m in chat]
    assert "Good day to you." in said and "is a server" not in said
    answers = [chat[-1].content for chat in nano_chats.reading_chats(nano_sources.read_fairytales(material))]
    assert answers == ["He lost a bell at the mill.", "The prince came to town."]


# --- the whole ----------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes(built: Path) -> None:
    for name in (
        "tokenizer.json",
        "pretrain.npy",
        "sft.npz",
        "heldout.npz",
        "heldout.jsonl",
        "manifest.json",
    ):
        assert (built / name).read_bytes() == (built / "again" / name).read_bytes(), name
    for name in ("pretrain.npy", "sft.npz"):
        assert (built / name).read_bytes() != (built / "other" / name).read_bytes(), name
    assert not list(built.rglob("*.part"))


def test_held_out_text_is_not_in_training(built: Path, tokenizer: Tokenizer) -> None:
    held = [json.loads(line) for line in (built / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {h["kind"] for h in held} == set(nano_sources.KINDS)
    stream = tokenizer.decode(np.load(built / "pretrain.npy").tolist(), skip_special_tokens=False)
    with np.load(built / "sft.npz") as file:
        stream += tokenizer.decode(file["tokens"].flatten().tolist(), skip_special_tokens=False)
    assert "He lost a bell at the mill." in stream and "The prince came to town." not in stream
    for h in held:
        for paragraph in h["text"].split("\n\n") if h["kind"] in ("stories", "novels") else [h["text"]]:
            assert len(paragraph) < 40 or paragraph not in stream, paragraph[:80]
    assert prose("road", 1)[0] in stream, "and training text is"


def test_heldout_bytes_are_of_the_text_alone(built: Path, tokenizer: Tokenizer) -> None:
    held = [json.loads(line) for line in (built / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    with np.load(built / "heldout.npz") as file:
        for kind in nano_sources.KINDS:
            plain = "".join(re.sub("<｜.*?｜>", "", h["text"]) for h in held if h["kind"] == kind)
            assert int(file[f"{kind}_bytes"]) == len(plain.encode())
            assert tokenizer.decode(file[f"{kind}_tokens"].tolist(), skip_special_tokens=True) == plain


def test_manifest_names_sources_and_shares(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["sources"]["sgd_dialogues"]["licence"] == "CC BY-SA 4.0"
    assert all(len(digest) == 64 for s in manifest["sources"].values() for digest in s["sha256"].values())
    assert manifest["dropped"]["stories"]["shares text with held-out"] == 2
    assert sum(kind["share"] for kind in manifest["sft"]["kinds"].values()) == pytest.approx(1, abs=0.01)


def test_missing_material_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nano.main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert "fairytaleqa" in capsys.readouterr().err
