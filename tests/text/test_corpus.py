"""Reading text of any size and in any state: pieces, records, and what is broken in them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.errors import UserError
from dsv3.text import corpus
from dsv3.text.bpe import pre_tokenizer
from dsv3.text.corpus import Corpus, Text


def read(*inputs: object, **options: object) -> list[Text]:
    return list(Corpus([str(name) for name in inputs], **options))


def jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# Files ------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_full_depth_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/one.txt").write_text("one", encoding="utf-8")
    (tmp_path / "c.TXT.gz").write_bytes(gzip.compress(b"two"))
    jsonl(tmp_path / "a.jsonl", {"text": "zero"})
    (tmp_path / "notes.md").write_text("not read")
    assert [text.text for text in read(tmp_path)] == ["zero", "one", "two"]
    assert read(tmp_path / "notes.md") == [Text("not read")], "what is named is read, whatever its ending"


def test_a_name_before_the_path_is_the_group(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"text": "x", "language": "fra"}, {"text": "y"})
    assert read(f"code={file}") == [Text("x", "code"), Text("y", "code")]
    assert read(file) == [Text("x", "fra"), Text("y")]
    (odd := tmp_path / "a=b.txt").write_text("z")
    assert read(odd) == [Text("z")], "a file of that name comes first"


@pytest.mark.parametrize("name", ["nowhere", "name=nowhere"])
def test_an_input_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(UserError, match=r"^nowhere does not exist"):
        Corpus([name])


def test_a_folder_without_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"has no file of text in it: \.txt or \.jsonl"):
        Corpus([str(tmp_path)])


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(bytes(range(256)) * 100)
    for i, content in enumerate((whole[:-40], b"no archive", whole[:30] + b"\xff" * 40 + whole[70:])):
        path = tmp_path / f"{i}.txt.gz"
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{i}\.txt\.gz is a broken archive"):
            read(path)


def test_no_text_at_all_is_an_error_that_says_what_there_is(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(UserError, match=r"empty\.txt holds no text$"):
        read(empty)
    tasks = jsonl(tmp_path / "tasks.jsonl", {"task_id": 1, "prompt": "x"}, {"task_id": 2, "prompt": "y"})
    with pytest.raises(UserError, match=r"2 lines are no records with text or messages, .* task_id, prompt"):
        read(tasks)
    assert read(tasks, fields=["prompt"]) == [Text("x"), Text("y")]


# Records ----------------------------------------------------------------------------------------------------


def test_a_records_text_is_what_its_fields_hold(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "A fox?"}, {"role": "assistant", "content": "Yes."}]}
    calls = {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"name": "find"}]}]}
    pair = {"question": "1 + 1?", "answer": "2", "text": ""}
    file = jsonl(tmp_path / "a.ndjson", chat, calls, pair, ["list"], {"text": 5}, {"text": "z"})
    found = Corpus([str(file)], fields=["text", "messages", "answer", "question"])
    assert [text.text for text in found] == ["A fox?\nYes.", "2\n1 + 1?", "z"]
    assert found.skipped == 3


def test_lines_that_are_no_json_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\n\n{"text": "b\n' + b"[" * 100_000 + b'\n{"text": "c"}')
    found = Corpus([str(file)])
    assert [text.text for text in found] == ["a", "c"]
    assert (found.skipped, found.bytes) == (2, 2)
    list(found)
    assert (found.skipped, found.bytes) == (2, 2), "counts are of one reading"


# Bytes ------------------------------------------------------------------------------------------------------


def test_bytes_that_are_no_utf8_are_replaced_and_counted(tmp_path: Path) -> None:
    (plain := tmp_path / "a.txt").write_bytes(b"a\xffb \xe4\xbd\n\xf0\x9f")
    found = Corpus([str(plain)])
    assert [text.text for text in found] == ["a\ufffdb \ufffd\ufffd\n\ufffd\ufffd"]
    assert found.replaced == 5
    (lines := tmp_path / "a.jsonl").write_bytes(b'{"text": "a\xff"}\n{"text": "\\ud83d!"}\n')
    found = Corpus([str(lines)])
    assert [text.text for text in found] == ["a\ufffd", "\ufffd!"]
    assert found.replaced == 2


@given(st.binary(max_size=200))
def test_no_bytes_are_too_broken_to_read(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    for name in ("a.txt", "a.jsonl"):
        (folder / name).write_bytes(data + b"\n")
    (folder / "b.jsonl").write_text('{"text": "x"}')
    for text in read(folder):
        text.text.encode()


def test_a_mark_of_byte_order_is_no_text(tmp_path: Path) -> None:
    (path := tmp_path / "a.txt").write_bytes("\ufeffa\ufeffb".encode())
    assert read(path) == [Text("a\ufeffb")]


lines = st.lists(
    st.sampled_from(["a", "你", ".\n", "\n", " ", "\t", "\r\n", "\u3000", "\x85", "\x1c", "(", "é", "9"])
)


@given(lines.map("".join))
def test_pieces_of_a_long_text_have_the_tokens_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("long") / "a.txt"
    path.write_text(text + "x", encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "BLOCK", 7)
        pieces = [piece.text for piece in read(path)]
    assert "".join(pieces) == text + "x"

    def cut(text: str) -> list[str]:
        return [piece for piece, _ in pre_tokenizer().pre_tokenize_str(text)]

    assert [piece for text in pieces for piece in cut(text)] == cut(text + "x")


def test_a_text_without_a_place_to_cut_is_cut_somewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "BLOCK", 8)
    monkeypatch.setattr(corpus, "LONGEST", 20)
    (path := tmp_path / "a.txt").write_text("你" * 100, encoding="utf-8")
    pieces = [text.text for text in read(path)]
    assert "".join(pieces) == "你" * 100 and max(map(len, pieces)) < 30
