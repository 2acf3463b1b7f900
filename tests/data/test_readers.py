"""Readers of books and collections, on tiny files of invented text."""

from __future__ import annotations

import csv
import io
import json
import random
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pytest
from datatrove.data import Document
from datatrove.io import get_datafolder

from dsv3.data.build import build
from dsv3.data.job import find
from dsv3.data.manifest import DataError
from dsv3.data.readers import READERS, books, make_reader, nano_chats
from dsv3.data.readers.material import read_chatterbot
from dsv3.recipe.data import Source
from tests.data.made_up import PLACES, prose, recipe, text, write_bytes, write_jsonl, write_parquet

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


def read(path: Path, format: str, **options: Any) -> tuple[list[Document], dict[str, int]]:
    """The documents of a file, and the counts of what was left out."""
    reader = make_reader(
        Source("made up", format=format, options=options), path.name, get_datafolder(str(path.parent)), False
    )
    documents = list(reader.read_file(path.name))
    return documents, {label: int(metric.total) for label, metric in reader.stats.stats.items()}


# --- books --------------------------------------------------------------------------------------------------


def test_front_matter_notes_and_licence_are_dropped() -> None:
    dropped: Counter[str] = Counter()
    found = dict(books.sections(TALES, dropped))
    assert list(found) == ["The Fox Under the Hill", "The Bell"]
    body = "\n".join(p for paragraphs in found.values() for p in paragraphs)
    for word in ("Contents", "preface", "Illustration", "Nobody", "notes", "Licence", "Gutenberg"):
        assert word.lower() not in body.lower(), f"{word} is still in the text"
    assert found["The Fox Under the Hill"] == [FOX]
    assert '"It rang—twice," said Mabel.' in body
    assert dropped["front matter"] > 0 and dropped["notes or licence tail"] > 0


def test_books_are_cut_into_documents(tmp_path: Path) -> None:
    other = "\n\n".join(["THE LONG ROAD", "CHAPTER I", *prose("road", 40)])
    left_out = "\n\n".join(["A BOOK IN DIALECT", "CHAPTER I", *prose("dialect", 9)])
    path = write_bytes(tmp_path / "books.txt.gz", "\n<|endofbook|>\n".join([TALES, other, left_out]).encode())
    documents, counts = read(path, "books", leave_out=["A Book in  Dialect"])
    assert counts["note_books left out"] == 1 and counts["note_paragraphs: front matter"] > 0
    assert {d.metadata["source"] for d in documents} == {"TALES OF THE HILL", "THE LONG ROAD"}
    assert documents[0].text == f"The Fox Under the Hill\n\n{FOX}" and documents[0].metadata["opens"]
    body = "\n\n".join(d.text for d in documents)
    assert all(p in body for p in prose("road", 40)) and prose("dialect", 1)[0] not in body
    assert sum(d.metadata["opens"] for d in documents if d.metadata["source"] == "THE LONG ROAD") == 1
    only, _ = read(path, "books", only="long road")
    assert {d.metadata["source"] for d in only} == {"THE LONG ROAD"}


def test_books_of_wrapped_lines(tmp_path: Path) -> None:
    whole = "THE ROAD\nCHAPTER I\n" + "\n".join(prose("long", 8))  # a line is a paragraph
    no_marks = "THE WALL\n" + "\n".join("a line of some words that ends somewhere" for _ in range(80))
    path = write_bytes(tmp_path / "books.txt", "\n<|endofbook|>\n".join([whole, no_marks]).encode())
    documents, counts = read(path, "books", wrapped=True)
    assert counts["note_books without marks of paragraphs"] == 1
    assert [d.metadata["source"] for d in documents] == ["THE ROAD"]
    assert prose("long", 8)[3] in documents[0].text.split("\n\n")


def test_chunks_keep_every_paragraph_in_order() -> None:
    paragraphs = prose("chunks", 40)
    runs = books.chunks(paragraphs, 2000)
    assert [p for run in runs for p in run] == paragraphs
    assert all(sum(map(len, run)) >= 600 for run in runs) and len(runs) > 3


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("ONCE UPON A TIME there was", "Once upon a time there was"),
        ("MARLEY was dead", "Marley was dead"),
        ("“Don’t”  _go_ -- [3] {12}now", '"Don\'t" go—now'),
        ("So . . . he went", "So... he went"),
    ],
)
def test_clean(written: str, expected: str) -> None:
    assert books.clean(written) == expected


# --- collections --------------------------------------------------------------------------------------------


def write_fairytales(path: Path) -> Path:
    tables = {
        "section-stories/train/the-bell-story.csv": [{"section": "1", "text": " ".join(prose("qa", 2, 3))}],
        "questions/train/the-bell-questions.csv": [
            {
                "cor_section": "1",
                "question": "What did the boy lose?",
                "answer1": "He lost a bell at the mill.",
            },
            {"cor_section": "1", "question": "Where?", "answer1": "the mill"},
        ],
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, rows in tables.items():
            sheet = io.StringIO()
            writer = csv.DictWriter(sheet, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
            info = tarfile.TarInfo(f"data-by-train-split/{name}")
            info.size = len(sheet.getvalue().encode())
            archive.addfile(info, io.BytesIO(sheet.getvalue().encode()))
    return path


def test_fairytales_are_text_and_questions(tmp_path: Path) -> None:
    path = write_fairytales(tmp_path / "fairytaleqa.tar.gz")
    (tale,), _ = read(path, "fairytales")
    assert tale.text.startswith("The Bell\n\n") and tale.metadata == {
        "source": "fairytaleqa: The Bell",
        "opens": True,
    }
    (asked,), _ = read(path, "questions")
    *_, question, answer = asked.metadata["messages"]
    assert (
        question["content"].endswith("What did the boy lose?")
        and answer["content"] == "He lost a bell at the mill."
    )


def test_bookings_keep_their_split(tmp_path: Path) -> None:
    def booking(i: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"A table for {i} at the {PLACES[i % 10]}."},
                {"role": "assistant", "content": f"Table {i} is yours."}]  # fmt: skip

    lines = [{"split": "test" if i % 5 == 0 else "train", "messages": booking(i)} for i in range(60)]
    lines.append({"split": "test", "messages": booking(1)})  # stands in training too
    documents, counts = read(write_jsonl(tmp_path / "sgd.jsonl.gz", lines), "sgd")
    assert Counter(d.metadata["split"] for d in documents) == {"test": 12, "train": 48}
    assert counts["dropped_test dialogue that is in training too"] == 1
    assert documents[0].text.startswith("<｜User｜>A table for")


def test_chatterbot_and_small_talk(tmp_path: Path) -> None:
    talks = "- - Good day\n  - Good day to\n    you.\n- - My CPU\n  - is a server\n- - Alone\n"
    for topic in ("greetings", "politics"):
        write_bytes(tmp_path / f"{topic}.yml", f"categories:\n- {topic}\nconversations:\n{talks}".encode())
    assert read_chatterbot(talks)[0] == ["Good day", "Good day to you."]
    documents, counts = read(tmp_path / "greetings.yml", "chatterbot", times=2)
    assert len(documents) == 4 and counts["dropped_no answer"] == 1
    fit, counts = read(tmp_path / "greetings.yml", "small-talk")
    assert [d.metadata["messages"][-1]["content"] for d in fit] == ["Good day to you."] and counts[
        "dropped_unfit"
    ] == 2
    source = Source("made up", path=".", format="small-talk")
    assert [f.path for f in find(source, tmp_path, "x")] == ["greetings.yml"]
    source = Source("made up", path=".", format="chatterbot", options={"topics": ["politics"]})
    assert [f.path for f in find(source, tmp_path, "x")] == ["politics.yml"]


def test_classics_hold_back_the_same_pieces_always(tmp_path: Path) -> None:
    pieces = [{"source": "诗", "title": f"其{i}", "text": f"[1]山高水长第{i}首，" * 6} for i in range(400)]
    pieces += [pieces[0], {"source": "诗", "title": "", "text": "短"}]
    path = write_jsonl(tmp_path / "classics.jsonl.gz", pieces)
    documents, counts = read(path, "classics", test_characters=500)
    assert len(documents) == 400 and counts == {"dropped_the same text": 1, "dropped_too short": 1}
    test = [d.text for d in documents if d.metadata["split"] == "test"]
    assert 500 <= sum(map(len, test)) < 600 and "[1]" not in test[0]
    assert test == [d.text for d in read(path, "classics", test_characters=500)[0][: len(test)]]


# --- files with something wrong -----------------------------------------------------------------------------

BOOKING = {"split": "train", "messages": [{"role": "user", "content": "A table?"},
                                          {"role": "assistant", "content": "Yours.\u2028At\u0085noon."}]}  # fmt: skip
PIECE = {"source": "诗", "title": "其一", "text": "山高水长，" * 6}


@pytest.mark.parametrize(
    ("format", "good", "reasons"),
    [
        ("sgd", BOOKING, {"dropped_no chat": 3}),
        ("classics", PIECE, {"dropped_no text": 3}),
    ],
)
def test_a_bad_line_costs_a_line(
    tmp_path: Path, format: str, good: dict[str, Any], reasons: dict[str, int]
) -> None:
    lines = [good, "{broken", "[7]", {}, {"text": None}, {"split": "test", "messages": [{"role": "user"}]}]
    documents, counts = read(write_jsonl(tmp_path / "x.jsonl", lines), format)
    assert len(documents) == 1
    assert counts == {"dropped_not JSON": 1, "dropped_not an object": 1, **reasons}


@pytest.mark.parametrize("format", ["books", "text"])
def test_a_file_that_breaks_off_gives_what_it_has(tmp_path: Path, format: str) -> None:
    written = "\n\n".join(["THE LONG ROAD", "CHAPTER I", *prose("road", 400)])
    path = write_bytes(tmp_path / "x.txt.gz", written.encode())
    path.write_bytes(path.read_bytes()[:-200])
    documents, counts = read(path, format)
    assert prose("road", 1)[0] in documents[0].text and counts["note_files that break off"] == 1


@pytest.mark.parametrize("content", ["", " \t\r\n \n", "\ufeff\n<|endofbook|>\n\t"])
def test_a_blank_file_has_no_book(tmp_path: Path, content: str) -> None:
    path = write_bytes(tmp_path / "x.txt", content.encode())
    assert read(path, "books", wrapped=True) == ([], {"dropped_no text": 1})
    assert books.unwrap("") == ""


def test_an_archive_that_breaks_off(tmp_path: Path) -> None:
    path = write_fairytales(tmp_path / "x.tar.gz")
    whole = path.read_bytes()
    for broken in (b"no archive", whole[: len(whole) // 2], b""):
        path.write_bytes(broken)
        assert read(path, "fairytales")[1]["note_files that break off"] == 1
        assert read(path, "questions")[1]["note_files that break off"] == 1


def test_a_table_without_its_columns(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        for name in ("a-story", "a-questions"):
            info = tarfile.TarInfo(f"{name}.csv")
            info.size = 6
            archive.addfile(info, io.BytesIO(b"a\n1\n2\n"))
    assert read(tmp_path / "x.tar.gz", "fairytales") == ([], {"dropped_no text": 1})


def test_a_damaged_page_of_parquet_costs_the_rest_of_its_file(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [{"text": text(i)} for i in range(300)])
    content = bytearray(path.read_bytes())
    content[60:2000] = b"\xff" * 1940
    path.write_bytes(content)
    _, counts = read(path, "parquet")
    assert counts["note_files that break off"] == 1


def test_what_is_no_chat_is_left_out_where_chats_are_wanted(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "x.txt", b"Hello")
    reader = make_reader(Source("made up"), "x.txt", get_datafolder(str(tmp_path)), chats=True)
    assert not list(reader.read_files_shard([path.name]))
    assert dict(reader.counts()) == {"dropped_no chat": 1}
    for name in ("text", "books", "fairytales", "classics"):
        with pytest.raises(DataError, match=f"the format '{name}' gives text, and no chats"):
            make_reader(Source("made up", format=name), "x.txt", get_datafolder(str(tmp_path)), chats=True)


def test_a_pattern_that_is_none_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="options of the format 'books'"):
        read(write_bytes(tmp_path / "x.txt", b""), "books", only="(")


def test_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    _, counts = read(write_fairytales(tmp_path / "x.tar.gz"), "questions")
    assert counts["dropped_unfit"] == 1
    write_bytes(tmp_path / "x.yml", b"conversations:\n- - Good day\n  - Good day.\n  - Bye\n")
    assert read(tmp_path / "x.yml", "chatterbot")[1] == {"note_last lines without an answer": 1}
    _, counts = read(write_bytes(tmp_path / "b.txt", TALES.encode()), "tales")
    assert counts["note_books that are not asked for"] == 1
    dropped: Counter[str] = Counter()
    list(
        books.sections(
            "\n\n".join(
                ["CHAPTER I", *prose(1, 3), "CHAPTER II", prose(2, 1, 2)[0], "CHAPTER III", *prose(3, 3)]
            ),
            dropped,
        )
    )
    assert dropped == {"sections of a few lines": 1}


# --- chats that are made ------------------------------------------------------------------------------------


def test_a_short_story_is_found_and_asked_for_by_what_it_is_about() -> None:
    story = next(nano_chats.short_stories("\n\n".join(["The Fox", FOX, *prose("more", 3, 12)]), opens=True))
    assert (story.title, story.text) == ("The Fox", FOX)
    assert story.nouns[0] == "fox"
    rng = random.Random(0)
    requests = {nano_chats.request_for(story, rng) for _ in range(300)}
    assert "Tell me about a fox." in requests and len(requests) > 30
    assert not list(nano_chats.short_stories("\n\n".join(prose("middle", 3, 12)))), (
        "the middle of a tale is no story"
    )


def test_tales_are_chats(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "books.txt", TALES.replace("TALES", "FAIRY TALES", 1).encode())
    documents, _ = read(path, "tales", times=3)
    answers = [m["content"] for d in documents for m in d.metadata["messages"] if m["role"] == "assistant"]
    assert len(documents) == 6 and answers.count(FOX) >= 3, "two stories, each asked for three times"


@pytest.mark.parametrize("name", ["fables", "identity"])
def test_our_own_chats_are_the_same_always(name: str) -> None:
    kind = READERS[name]
    assert kind.package_file is not None
    (file,) = find(Source("MIT", format=name), None, "x")

    def made(**options: Any) -> list[str]:
        reader = make_reader(
            Source("MIT", format=name, options=options), file.path, get_datafolder(file.folder), True
        )
        return [d.text for d in reader.read_file(file.path)]

    options = {"versions": 1} if name == "fables" else {"times": 1}
    assert made(**options) == made(**options) != made(**options, seed=1)
    assert len(made(**options)) > 100


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


# --- where files lie ----------------------------------------------------------------------------------------


def test_a_dataset_of_the_hub_is_read_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = fsspec.filesystem("memory")
    lines = "".join(json.dumps({"text": text(i)}) + "\n" for i in range(9))
    hub.pipe("/datasets/someone/poems/data/a.jsonl", lines.encode())
    hub.pipe("/datasets/someone/poems/README.md", b"not read")
    monkeypatch.setattr("dsv3.data.job.HUB", "memory://datasets/")
    data = recipe({"poems": {"sources": [{"hub": "someone/poems", "path": "data"}]}})
    manifest = build(data, tmp_path, tmp_path / "out", workers=1)
    assert manifest is not None and manifest.corpora["poems"].documents == 9
    (source,) = manifest.corpora["poems"].sources
    assert source["hub"] == "someone/poems" and source["files"]["a.jsonl"]["sha256"].startswith("ukey:")


def test_only_files_of_a_pattern(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl.gz", "c/d.jsonl"):
        write_jsonl(tmp_path / name, [{"text": text(name)}])

    def files(pattern: str | None) -> list[str]:
        return [f.path for f in find(Source("made up", path=".", files=pattern), tmp_path, "x")]

    assert files(None) == ["a.jsonl", "b.jsonl.gz", "c/d.jsonl"]
    assert files("*.gz") == ["b.jsonl.gz"] and files("c/*") == ["c/d.jsonl"]
