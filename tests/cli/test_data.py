"""`dsv3 data build`: what it prints, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3.cli.main import main
from tests.data.made_up import chat, text, write_jsonl

RECIPE = """
data:
  corpora:
    web: {sources: [{path: web, licence: CC0}], filters: [{gopher: {min_doc_words: 20, min_stop_words: 0}}]}
    talks: {kind: chats, sources: [{path: talks.jsonl, licence: MIT, origin: https://example.org}]}
  tokenizer: {vocab_size: 400}
"""


@pytest.fixture
def material(tmp_path: Path) -> Path:
    write_jsonl(
        tmp_path / "web/a.jsonl", [*({"text": text(i)} for i in range(10)), "no JSON", {"text": "short"}]
    )
    write_jsonl(tmp_path / "talks.jsonl", [chat(i) for i in range(5)])
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path


def build(material: Path, *options: str) -> int:
    recipe = str(material / "small.yaml")
    return main(["data", "build", recipe, "--material", str(material), "--workers", "1", *options])


def test_a_build_shows_what_it_kept_and_dropped(material: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert build(material, "--out", str(material / "out")) == 0
    printed = capfd.readouterr()
    for shown in ("web", "talks", "not JSON 1", "gopher_short_doc 1", "What each step kept and dropped"):
        assert shown in printed.out, printed.out
    assert [line.removeprefix("dsv3 data: ") for line in printed.err.splitlines()] == [
        "read",
        "clean",
        "tokenizer",
        "tokens",
        "finish",
    ]
    assert build(material, "--out", str(material / "out"), "--json") == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out)["corpora"]["web"]["kind"] == "text" and not printed.err, "all was there"


def test_it_is_written_to_a_folder_of_the_recipes_name(
    material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(material)
    assert main(["data", "build", "small.yaml", "--workers", "1"]) == 0
    assert (material / "runs/small/data/manifest.json").exists()


def test_a_missing_corpus_is_one_line(material: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (material / "talks.jsonl").unlink()
    assert build(material) == 1
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert (
        "the corpus 'talks' is not there" in printed.err
        and "it can be had from https://example.org" in printed.err
    )


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("name: x", "has no `data` section"),
        ("data: {corpora: {}}", "data: corpora is empty"),
        ("data: {corpora: {a: {sources: [{path: x, licence: ''}]}}}", r"sources[0]: licence is empty"),
        ("data: {corpora: {a: {sources: [{path: x}]}}}", "lacks 'licence'"),
        ("data: {corpora: {a: {sources: [{path: x, licence: y}], filter: []}}}", "unknown key 'filter'"),
        (
            "data: {corpora: {a: {sources: [{path: x, licence: y}], dedup: [all]}}}",
            "must be one of exact, minhash",
        ),
        (
            "data: {corpora: {a: {sources: [{path: x, licence: y}], held_out: {}}}}",
            "one of titles, split, share",
        ),
        (
            "data: {corpora: {a: {sources: [{path: x, licence: y}], held_out: {split: t, characters: -1}}}}",
            "characters is -1",
        ),
        (
            "data: {corpora: {a: {sources: [{path: x, licence: y}]}}, minhash: {buckets: 0}}",
            "buckets is 0: it must be 1 or more",
        ),
        (
            "data: {corpora: {a: {sources: [{path: x, licence: y}]}}, decontamination: {n_grams: 0}}",
            "n_grams is 0: it must be 1 or more",
        ),
        (
            "data: {corpora: {a: {sources: [{path: x, licence: y}]}}, "
            "decontamination: {evaluations: {q: {path: x, keys: []}}}}",
            "keys is empty",
        ),
        (
            "data: {corpora: {a: {sources: [{path: x, licence: y}]}}, "
            "decontamination: {evaluations: {q/r: {path: x}}}}",
            "an evaluation set is named 'q/r'",
        ),
    ],
)
def test_a_wrong_recipe_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], written: str, message: str
) -> None:
    (tmp_path / "r.yaml").write_text(written)
    assert main(["data", "build", str(tmp_path / "r.yaml")]) == 1
    printed = capfd.readouterr().err
    assert message in printed and str(tmp_path / "r.yaml") in printed and printed.count("\n") == 1
