"""From made-up corpora to shards and a manifest: the steps together, and what a build does when things are wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3.data import finish
from dsv3.data.build import _alone, _is_built, build, plan, stages
from dsv3.data.executors import QuietLocalExecutor, make_executors
from dsv3.data.manifest import Corpus, DataError, Manifest
from dsv3.data.stream import heldout, open_stream
from dsv3.recipe.data import DataRecipe
from dsv3.text import Tokenizer
from dsv3.text.bpe import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE
from tests.data.made_up import chat, prose, recipe, text, write_bytes, write_jsonl, write_parquet


def run(data: DataRecipe, folder: Path, workers: int = 1) -> Manifest:
    manifest = build(data, folder, folder / "out", workers=workers)
    assert manifest is not None
    return manifest


def texts(folder: Path, corpus: str) -> list[str]:
    """The documents of a corpus as text, special tokens included but for BOS and EOS."""
    tokenizer = Tokenizer.from_pretrained(folder)
    found = []
    for shard in Manifest.load(folder).corpora[corpus].shards:
        tokens = np.fromfile(folder / shard.file, "<u2")
        ends = np.fromfile(folder / f"{shard.file}.index", "<u8").astype(int)
        assert len(tokens) == shard.tokens == ends[-1] and len(ends) == shard.documents
        for document in np.split(tokens, ends[:-1]):
            found.append(tokenizer.decode(document.tolist(), skip_special_tokens=False))
            assert found[-1].startswith(BOS) and found[-1].endswith(EOS)
    return [d.removeprefix(BOS).removesuffix(EOS) for d in found]


def steps(corpus: Corpus) -> dict[str, dict[str, Any]]:
    return {step["step"]: step for step in corpus.steps}


# --- files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with everything that can be wrong with files, built."""
    folder = tmp_path_factory.mktemp("broken")
    corpus = folder / "corpus"
    good = [{"text": text(f"json {i}")} for i in range(20)]
    for ending in ("", ".gz", ".zst"):
        write_jsonl(corpus / f"good.jsonl{ending}", [{"text": d["text"] + ending} for d in good])
        write_bytes(corpus / f"good.txt{ending}", (text("plain") + ending).encode())
    write_parquet(corpus / "good.parquet", [{"text": text(f"row {i}"), "n": i} for i in range(15)])
    wrong = ['{"text": "broken off', '["no object"]', {"title": "no text"}, {"text": 7}, {"text": "  "}, ""]
    write_jsonl(corpus / "wrong.jsonl", [*wrong, {"text": text("after the wrong lines")}])
    invalid = json.dumps({"text": text("invalid")}).encode().replace(b"the", b"\xff\xfe")
    write_bytes(corpus / "invalid.jsonl", invalid + b"\n" + json.dumps({"text": text("next")}).encode())
    write_bytes(corpus / "invalid.txt", b"\xef\xbb\xbfgood \x80 bad " + text("invalid text").encode())
    write_bytes(corpus / "empty.txt", b"")
    write_bytes(corpus / "empty.jsonl", b"")
    write_parquet(corpus / "empty.parquet", [{"text": "", "n": 0}])
    line = " ".join(prose("line", 1, 2000))
    write_bytes(corpus / "line.txt", (line + " ").encode() * 4)
    whole = write_jsonl(corpus / "cut.jsonl.gz", [{"text": text(f"cut {i}", 20)} for i in range(50)])
    whole.write_bytes(whole.read_bytes()[:-200])
    (corpus / "picture.png").write_bytes(b"\x89PNG")
    data = recipe({"all": {"sources": [{"path": "corpus"}]}}, fim_rate=0, longest=100_000)
    run(data, folder)
    return folder


def test_every_kind_of_file_is_read_and_every_loss_is_counted(broken: Path) -> None:
    out = broken / "out"
    corpus = Manifest.load(out).corpora["all"]
    read, kept = steps(corpus)["read"], steps(corpus)["kept"]
    assert read["dropped"] == {"not JSON": 1, "not an object": 1, "no text": 3 + 2 + 1 - 1}
    assert read["notes"]["files that break off"] == 1
    assert read["notes"]["characters that were not UTF-8"] > 2
    found = texts(out, "all")
    assert len(found) == corpus.documents == kept["documents"] == steps(corpus)["tokens"]["documents"]
    assert sum(len(d.encode()) for d in found) == kept["bytes"] == read["bytes"], "nothing is lost"
    for i in range(20):
        for ending in ("", ".gz", ".zst"):
            assert text(f"json {i}") + ending in found
    for wanted in (
        text("plain"),
        text("row 14"),
        text("after the wrong lines"),
        text("next"),
        text("cut 0", 20),
    ):
        assert wanted in found, wanted[:80]
    assert any(d.startswith("good � bad ") for d in found)
    assert not any("PNG" in d for d in found)


def test_a_long_line_is_cut_into_documents_that_are_the_line(broken: Path) -> None:
    corpus = Manifest.load(broken / "out").corpora["all"]
    assert steps(corpus)["cut"]["notes"] == {"documents cut": 1}
    line = (broken / "corpus/line.txt").read_text()
    assert len(line) > 600_000
    found = texts(broken / "out", "all")
    pieces = [d for d in found if len(d) > 8_000]
    assert "".join(pieces) == line and max(map(len, pieces)) <= 100_000


def test_the_manifest_has_the_hash_of_every_file(broken: Path) -> None:
    (source,) = Manifest.load(broken / "out").corpora["all"].sources
    assert source["licence"] == "made up"
    names = {p.name for p in (broken / "corpus").iterdir()} - {"picture.png"}
    assert source["files"].keys() == names
    for name, facts in source["files"].items():
        content = (broken / "corpus" / name).read_bytes()
        assert facts == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def test_the_manifest_has_the_hash_of_evaluation_sets(books: Path) -> None:
    content = (books / "test.jsonl").read_bytes()
    expected = {"test.jsonl": {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}}
    assert Manifest.load(books / "out").evaluations == {"quiz": expected}


def test_the_manifest_has_the_hash_of_every_shard(broken: Path) -> None:
    manifest = Manifest.load(broken / "out")
    for shard in manifest.corpora["all"].shards:
        assert shard.sha256 == hashlib.sha256((broken / "out" / shard.file).read_bytes()).hexdigest()
    content = (broken / "out" / "tokenizer.json").read_bytes()
    assert manifest.tokenizer_sha256 == hashlib.sha256(content).hexdigest()
    assert manifest.vocab_size == 400 and manifest.dtype == "uint16"
    assert not (broken / "out" / ".build").exists(), "what was needed on the way is gone"


@pytest.mark.slow
def test_a_line_of_50_megabytes(tmp_path: Path) -> None:
    line = " ".join(prose("line", 1, 10_000))
    line = (line + " ") * (50_000_000 // len(line) + 1)
    write_jsonl(
        tmp_path / "c/line.jsonl", [{"text": text("before")}, {"text": line}, {"text": text("after")}]
    )
    manifest = run(
        recipe(
            {"c": {"sources": [{"path": "c"}]}}, tokenizer={"vocab_size": 400, "characters": {"c": 100_000}}
        ),
        tmp_path,
    )
    read = steps(manifest.corpora["c"])["read"]
    assert read["bytes"] == steps(manifest.corpora["c"])["tokens"]["bytes"] > 50_000_000


# --- what is dropped ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora with duplicates, near-duplicates, an evaluation set's question and a held-out document's words."""
    folder = tmp_path_factory.mktemp("books")
    one = [{"text": text(f"one {i}", 4), "split": "test" if i < 3 else "train"} for i in range(30)]
    near = text("one 5", 4).replace("days", "nights", 1)
    shared = text("two 0", 3) + "\n\n" + prose("one 1", 4)[2]  # a paragraph of a held-out document
    asked = text("two 1", 3) + " " + prose("question", 1)[0]
    mail = text("two 2", 2) + " Write to someone.else@mail.org or to 8.8.8.8."
    two = [
        near,
        text("one 6", 4),
        shared,
        asked,
        mail,
        "Too short.",
        *(text(f"two {i}", 4) for i in range(10, 20)),
    ]
    write_jsonl(folder / "one.jsonl", one)
    write_jsonl(folder / "two.jsonl", [{"text": t} for t in two])
    write_jsonl(folder / "test.jsonl", [{"question": prose("question", 1)[0], "answer": "a boat"}])
    build(books_recipe(), folder, folder / "out", workers=1)
    return folder


def books_recipe(**changes: Any) -> DataRecipe:
    dedup = ["exact", "minhash"]
    filters = [{"gopher": {"min_doc_words": 20, "min_stop_words": 1}}]
    return recipe(
        {
            "one": {
                "sources": [{"path": "one.jsonl"}],
                "held_out": {"split": "test", "characters": 2000},
                "dedup": dedup,
            },
            "two": {"sources": [{"path": "two.jsonl"}], "filters": filters, "pii": True, "dedup": dedup},
        },
        decontamination={"n_grams": 12, "evaluations": {"quiz": {"path": "test.jsonl"}}},
        **{"fim_rate": 0.0, **changes},
    )


def test_each_step_drops_what_it_should(books: Path) -> None:
    manifest = Manifest.load(books / "out")
    two = steps(manifest.corpora["two"])
    assert two["gopher"]["dropped"] == {"gopher_short_doc": 1}
    assert two["pii"]["notes"] == {"documents changed": 1}
    dropped = {
        name: two[name]["dropped_total"]
        for name in ("exact duplicates", "near-duplicates", "decontamination")
    }
    one = steps(manifest.corpora["one"])
    dropped["near-duplicates"] += one["near-duplicates"].get("dropped_total", 0)
    assert dropped == {"exact duplicates": 1, "near-duplicates": 1, "decontamination": 2}
    assert two["decontamination"]["by"] == {"held-out one": 1, "quiz": 1}
    found = texts(books / "out", "one") + texts(books / "out", "two")
    assert found.count(text("one 6", 4)) == 1, "of copies the first stays"
    assert not any(prose("question", 1)[0] in d or prose("one 1", 4)[2] in d for d in found)
    assert not any("someone.else@mail.org" in d or "8.8.8.8" in d for d in found)
    assert any("email@example.com" in d for d in found)
    for i in range(10, 20):
        assert text(f"two {i}", 4) in found


def test_counts_add_up(books: Path) -> None:
    for corpus in Manifest.load(books / "out").corpora.values():
        before: int | None = None
        for step in corpus.steps:
            if "documents" in step:
                lost = step.get("dropped_total", 0)
                assert before is None or step["documents"] == before - lost, (step, before)
                before = step["documents"]
        assert before == corpus.documents


def test_held_out_text_is_kept_up_to_its_limit(books: Path) -> None:
    (name, held), *_ = heldout(books / "out").items()
    assert name == "one" and held.documents == 2, "documents until there are 2000 characters"
    tokenizer = Tokenizer.from_pretrained(books / "out")
    plain = tokenizer.decode(held.tokens.tolist())
    assert plain == text("one 0", 4) + text("one 1", 4)
    assert held.bytes == len(plain.encode())
    lines = (books / "out/heldout/one.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == [text("one 0", 4), text("one 1", 4)]
    assert not any(text(f"one {i}", 4) in d for i in range(3) for d in texts(books / "out", "one"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_the_same_recipe_gives_the_same_bytes(books: Path, tmp_path: Path) -> None:
    for name in ("one.jsonl", "two.jsonl", "test.jsonl"):
        shutil.copy(books / name, tmp_path)
    build(books_recipe(), tmp_path, tmp_path / "out", workers=2)
    assert files_of(tmp_path / "out") == files_of(books / "out"), "for any number of workers"
    build(books_recipe(seed=1, fim_rate=0.5), tmp_path, tmp_path / "other", workers=1)
    assert files_of(tmp_path / "other") != files_of(books / "out")


def test_what_is_built_is_left_alone_and_a_killed_build_goes_on(
    books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one.jsonl", "two.jsonl", "test.jsonl"):
        shutil.copy(books / name, tmp_path)
    ran: list[str] = []
    die = ["once"]
    real = QuietLocalExecutor.run

    def dies(self: QuietLocalExecutor) -> Any:
        ran.append(Path(self.logging_dir.path).name)
        if ran[-1] == "tokens" and die:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(QuietLocalExecutor, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        build(books_recipe(), tmp_path, tmp_path / "out", workers=1)
    assert not (tmp_path / "out/manifest.json").exists()
    die.clear()
    written = max(p.stat().st_mtime_ns for p in (tmp_path / "out/.build").rglob("*.zst"))
    build(books_recipe(), tmp_path, tmp_path / "out", workers=1)
    assert files_of(tmp_path / "out") == files_of(books / "out")
    del ran[:]
    build(books_recipe(), tmp_path, tmp_path / "out", workers=1)
    assert not ran, "all is there"
    assert written < (tmp_path / "out/manifest.json").stat().st_mtime_ns
    write_jsonl(tmp_path / "two.jsonl", [{"text": text(i)} for i in range(5)])
    build(books_recipe(), tmp_path, tmp_path / "out", workers=1)
    assert ran, "another text is built anew"


def test_finish_may_be_run_again_and_killed(
    books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    die, real = ["once"], finish._put

    def dies(what: Path, where: Path) -> None:
        real(what, where)
        if die:
            raise KeyboardInterrupt

    monkeypatch.setattr(finish, "_put", dies)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        build(books_recipe(), books, out, workers=1)
    die.clear()
    assert (out / "tokens").exists() and not (out / "manifest.json").exists()
    job = plan(books_recipe(), books, out)
    for _ in range(2):
        finish.finish(job)
        kept = {k: v for k, v in files_of(out).items() if not k.startswith(".build")}
        assert kept == files_of(books / "out")
    build(books_recipe(), books, out, workers=1)
    assert files_of(out) == files_of(books / "out"), "what was needed on the way is gone"


def test_what_a_build_depends_on_is_noticed(
    books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = tmp_path / "vocabulary"
    vocabulary.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(books / "out" / name, vocabulary)
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": text(i)} for i in range(9)])
    data = recipe({"c": {"sources": [{"path": "c.jsonl"}]}}, tokenizer={"path": "vocabulary"})
    run(data, tmp_path)

    def noticed() -> bool:
        job = plan(data, tmp_path, tmp_path / "out")
        return not _is_built(job)

    assert not noticed()
    path.touch()
    assert not noticed(), "the content counts"
    work = plan(data, tmp_path, tmp_path / "out").work
    written = path.read_bytes()
    path.write_bytes(written.replace(b"the", b"THE", 1))
    assert noticed(), "an edit that leaves the size as it is"
    path.write_bytes(written)
    tokenizer = (vocabulary / "tokenizer.json").read_bytes()
    (vocabulary / "tokenizer.json").write_bytes(tokenizer + b"\n")
    assert noticed() and plan(data, tmp_path, tmp_path / "out").work != work
    (vocabulary / "tokenizer.json").write_bytes(tokenizer)
    assert not noticed()
    monkeypatch.setattr("dsv3.data.build.makers", lambda: {"dsv3": "another"})
    assert noticed()


def test_one_build_at_a_time(books: Path, tmp_path: Path) -> None:
    (tmp_path / ".build/other").mkdir(parents=True)
    with _alone(tmp_path), pytest.raises(DataError, match="is being built by another process"):
        build(books_recipe(), books, tmp_path, workers=1)
    assert (tmp_path / ".build/other").exists()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"split": "tset"}, "matches no document"),
        ({"titles": ["one", "two"]}, "has the title 'two'"),
        ({"split": "tset", "characters": 0}, None),
    ],
)
def test_a_rule_that_holds_nothing_out_is_said(
    tmp_path: Path, rule: dict[str, Any], message: str | None
) -> None:
    write_jsonl(tmp_path / "one.jsonl", [{"text": text(i)} for i in range(3)])
    write_jsonl(tmp_path / "rest.jsonl", [{"text": text(i)} for i in range(3, 9)])
    sources = [{"path": "one.jsonl"}, {"path": "rest.jsonl"}]
    data = recipe({"c": {"sources": sources, "held_out": rule}})
    if message is None:
        assert run(data, tmp_path).corpora["c"].documents == 9
    else:
        with pytest.raises(DataError, match=message):
            run(data, tmp_path)


def test_an_older_manifest_is_still_read(books: Path, tmp_path: Path) -> None:
    values = json.loads((books / "out/manifest.json").read_text())
    del values["versions"]["dsv3's own texts"]
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    assert Manifest.load(tmp_path).corpora == Manifest.load(books / "out").corpora


# --- chats --------------------------------------------------------------------------------------------------


def test_chats_are_chats_or_text_as_the_recipe_says(tmp_path: Path) -> None:
    chats = [chat(i, 1 + i % 3) for i in range(20)]
    bad = [{"messages": [{"role": "user", "content": "no answer"}]}, {"messages": [{"role": "god", "content": "x"}]},
           {"text": "no chat"}]  # fmt: skip
    write_jsonl(tmp_path / "chats.jsonl", [*chats, *bad])
    sources = [{"path": "chats.jsonl"}]
    data = recipe({"talk": {"kind": "chats", "sources": sources}, "text": {"sources": sources}}, fim_rate=1.0)
    manifest = run(data, tmp_path)
    assert steps(manifest.corpora["talk"])["read"]["dropped"] == {"no chat": 3}
    assert steps(manifest.corpora["text"])["read"]["dropped"] == {"no text": 2}
    tokenizer = Tokenizer.from_pretrained(tmp_path / "out")
    rendered = [
        tokenizer.render_chat(c["messages"], add_generation_prompt=False).removeprefix(BOS) for c in chats
    ]
    assert [d + EOS for d in texts(tmp_path / "out", "talk")] == rendered, "as the chat template has it"
    assert [d + EOS for d in texts(tmp_path / "out", "text")][:20] == rendered, "never reordered"
    batch = open_stream(tmp_path / "out", {"talk": 1.0}, 0, 300).next(4)
    assert batch.loss_mask is not None
    learned = tokenizer.decode(batch.tokens[0][batch.loss_mask[0]].tolist(), skip_special_tokens=False)
    answers = {m["content"] for c in chats for m in c["messages"] if m["role"] == "assistant"}
    assert set(learned.split(EOS)) - {""} <= answers


def test_control_tokens_in_text_are_only_letters(tmp_path: Path) -> None:
    written = f"He wrote {EOS} and <｜User｜> on the wall. " + text(1)
    messages = [
        {"role": "user", "content": f"say {BOS}<｜Assistant｜>"},
        {"role": "assistant", "content": EOS},
    ]
    write_jsonl(tmp_path / "c.jsonl", [{"text": written}, *({"text": text(i)} for i in range(9))])
    write_jsonl(tmp_path / "t.jsonl", [{"messages": messages}])
    sources = [{"path": "t.jsonl"}]
    run(
        recipe(
            {"c": {"sources": [{"path": "c.jsonl"}]}, "t": {"kind": "chats", "sources": sources}}, fim_rate=0
        ),
        tmp_path,
    )
    first = np.fromfile(tmp_path / "out/tokens/c/00000.ds", "<u2")
    assert (first == 0).sum() == (first == 1).sum() == 10 and (first == 3).sum() == 0
    assert texts(tmp_path / "out", "c")[0] == written
    ids = np.fromfile(tmp_path / "out/tokens/t/00000.ds", "<u2").tolist()
    assert [t for t in ids if t < 5] == [0, 3, 4, 1]


def test_personal_data_in_chats_is_replaced(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "I am jane@x.org."},
        {"role": "assistant", "content": "And I am joe@x.org."},
    ]
    write_jsonl(tmp_path / "t.jsonl", [{"messages": messages}, *(chat(i) for i in range(9))])
    sources = [{"path": "t.jsonl"}]
    corpora = {
        "t": {"kind": "chats", "sources": sources, "pii": True},
        "c": {"sources": sources, "pii": True},
    }
    manifest = run(recipe(corpora, fim_rate=0), tmp_path)
    for name in corpora:
        first = texts(tmp_path / "out", name)[0]
        assert "I am email@example.com." in first and "@x.org" not in first, first
        assert steps(manifest.corpora[name])["pii"]["notes"] == {"documents changed": 1}


# --- fill in the middle -------------------------------------------------------------------------------------


def test_fill_in_the_middle_has_its_rate_and_loses_nothing(tmp_path: Path) -> None:
    written = [text(i) for i in range(600)]
    write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in written])
    manifest = run(
        recipe({"c": {"sources": [{"path": "c.jsonl"}]}}, fim_rate=0.1, split_joined=0.2), tmp_path
    )
    found = texts(tmp_path / "out", "c")
    reordered = [d for d in found if d.startswith(FIM_BEGIN)]
    assert 0.06 < len(reordered) / len(found) < 0.14
    assert steps(manifest.corpora["c"])["tokens"]["reordered"] == len(reordered)
    for original, document in zip(written, found, strict=True):
        if document.startswith(FIM_BEGIN):
            prefix, rest = document.removeprefix(FIM_BEGIN).split(FIM_HOLE)
            suffix, middle = rest.split(FIM_END)
            assert prefix + middle + suffix == original, "prefix, suffix, middle"
        else:
            assert document == original


# --- what can be wrong --------------------------------------------------------------------------------------


def test_a_corpus_that_is_not_there_is_named_with_where_to_get_it(tmp_path: Path) -> None:
    data = recipe({"web": {"sources": [{"path": "web", "origin": "https://example.org/web"}]}})
    with pytest.raises(DataError) as error:
        run(data, tmp_path)
    message = str(error.value)
    assert "the corpus 'web' is not there" in message and str(tmp_path / "web") in message
    assert "https://example.org/web" in message and "--material" in message and "\n" not in message
    (tmp_path / "web").mkdir()
    with pytest.raises(DataError, match=r"the corpus 'web' has no file to read in .*"):
        run(data, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("corpus", "settings", "message"),
    [
        (
            {"sources": [{"path": "c.jsonl", "format": "poems"}]},
            {},
            "has the format 'poems': there are auto, text",
        ),
        ({"sources": [{"path": "c.jsonl", "options": {"x": 1}}]}, {}, "options of the format 'jsonl'"),
        (
            {"sources": [{"path": "c.jsonl"}], "filters": ["nice"]},
            {},
            "filters has 'nice': there are language",
        ),
        ({"sources": [{"path": "c.jsonl"}], "filters": [{"c4": {"x": 1}}]}, {}, "options of the filter c4"),
        ({"sources": [{}]}, {}, "has neither path nor hub"),
        (
            {"kind": "chats", "sources": [{"path": "c.jsonl", "format": "books"}]},
            {},
            "the format 'books' gives text, and no chats",
        ),
        (
            {"kind": "chats", "sources": [{"path": "c.jsonl"}], "filters": ["c4"]},
            {},
            "c4 edits text, and cannot edit chats",
        ),
        (
            {"sources": [{"path": "c.jsonl"}]},
            {"decontamination": {"evaluations": {"quiz": {"path": "c.jsonl", "keys": ["q"]}}}},
            "the evaluation set 'quiz' has no record with q",
        ),
        ({"sources": [{"path": "c.jsonl"}]}, {"tokenizer": {"vocab_size": 100}}, "vocabulary size is 100"),
    ],
)
def test_mistakes_in_a_recipe_are_one_line(
    tmp_path: Path, corpus: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    write_jsonl(tmp_path / "c.jsonl", [{"text": text(0)}])
    with pytest.raises(ValueError, match=message) as error:
        run(recipe({"c": corpus}, **settings), tmp_path)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_is_there_is_used(tmp_path: Path, books: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", [{"text": text(i)} for i in range(9)])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "vocabulary").mkdir(exist_ok=True)
        shutil.copy(books / "out" / name, tmp_path / "vocabulary")
    run(recipe({"c": {"sources": [{"path": "c.jsonl"}]}}, tokenizer={"path": "vocabulary"}), tmp_path)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (books / "out/tokenizer.json").read_bytes()


# --- clusters -----------------------------------------------------------------------------------------------


def test_slurm_gets_the_same_chain(books: Path, tmp_path: Path) -> None:
    job = plan(books_recipe(), books, tmp_path / "out")
    chain = stages(job)
    options = {"partition": "cpu", "time": "10:00:00", "mem_per_cpu_gb": 8}
    made = make_executors(chain, tmp_path / "logs", "slurm", 50, options)
    assert [type(e).__name__ for e in made] == ["SlurmPipelineExecutor"] * len(chain)
    for before, executor, stage in zip([None, *made], made, chain, strict=False):
        assert executor.depends is before and executor.tasks == stage.tasks and executor.workers == 50
        assert executor.pipeline == list(stage.pipeline)
        assert (executor.partition, executor.time, executor.mem_per_cpu_gb) == ("cpu", "10:00:00", 8)
        assert executor.logging_dir.path == str(tmp_path / "logs" / stage.name)
    with pytest.raises(DataError, match="`slurm` settings do not fit"):
        make_executors(chain, tmp_path / "logs", "slurm", 50, {"partition": "cpu"})


def test_ray_gets_the_same_chain_or_is_asked_for(books: Path, tmp_path: Path) -> None:
    chain = stages(plan(books_recipe(), books, tmp_path / "out"))
    try:
        made = make_executors(chain, tmp_path / "logs", "ray", -1, {"mem_per_cpu_gb": 4})
    except DataError as problem:
        assert "pip install 'ray[default]'" in str(problem)
    else:
        assert [e.depends for e in made] == [None, *made[:-1]]
        assert [e.tasks for e in made] == [stage.tasks for stage in chain]
