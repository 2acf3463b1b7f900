"""The needle sweep: a model that finds every needle scores 100%, one that guesses scores chance, and texts are what
they are said to be."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from dsv3 import LLM
from dsv3.config import PRESETS
from dsv3.errors import UserError
from dsv3.eval.haystack import built_in, from_file
from dsv3.eval.needle import (
    NUMBERS,
    PLACES,
    Case,
    Cell,
    NeedleResult,
    Texts,
    even_depths,
    has_number,
    plot,
    rank_first,
    sweep,
    usual_lengths,
)
from dsv3.model import Transformer
from dsv3.text import Tokenizer
from tests.eval.fakes import VOCAB, Guesser, Retriever, Scripted, Silent, llm, tokenizer

NANO = Path(__file__).parents[2] / "src" / "dsv3" / "assets" / "nano"


# Texts -------------------------------------------------------------------------------------------------


def texts(raw: bool = True, vocabulary: Tokenizer | None = None, **changes: object) -> Texts:
    values: dict[str, object] = {"filler": built_in, "distractors": 9, "answer_tokens": 32} | changes
    return Texts(vocabulary or tokenizer(), raw, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_a_text_has_its_length_and_the_needle_its_depth(raw: bool, depth: float) -> None:
    for length in (300, 511, 1024):
        maker = texts(raw)
        case = maker.case(length, depth, random.Random(7))
        assert len(case.prompt_ids) == length - 32, "the rest is the room for the answer"
        needle = tokenizer().decode(case.prompt_ids[case.needle])
        assert needle.startswith(" The secret number of the ") and needle.endswith(f" {case.number}.")
        head = len(maker._head)
        before = case.needle.start - head
        hay = length - 32 - head - len(maker._tail) - (case.needle.stop - case.needle.start)
        hay -= len(question(case, raw))
        assert before == round(depth * hay), f"{before} of {hay} tokens stand before the needle"
        assert case.depth == pytest.approx(depth, abs=0.51 / hay)


def question(case: Case, raw: bool) -> list[int]:
    """The tokens of the question in a text."""
    text = tokenizer().decode(case.prompt_ids[case.needle.stop :], skip_special_tokens=False)
    asked = text[text.index("\n\n") :].removesuffix("<｜Assistant｜>")
    place = next(place for place in PLACES if place in asked)
    if raw:
        assert asked == (
            f"\n\nQuestion: What is the secret number of the {place}?\n"
            f"Answer: The secret number of the {place} is"
        )
    else:
        assert asked == f"\n\nWhat is the secret number of the {place}?"
    return tokenizer().encode(asked)


def test_the_needle_stands_between_two_sentences_and_holds_the_only_number() -> None:
    for seed in range(10):
        case = texts().case(500, 0.4, random.Random(seed))
        text = tokenizer().decode(case.prompt_ids)
        needle = tokenizer().decode(case.prompt_ids[case.needle])
        before, after = text.split(needle)
        assert before.endswith(".") and after.startswith(" ")
        assert not any(c.isdigit() for c in before + after)
        assert sum(before.count(place) + after.count(place) for place in PLACES) == 2, "both in the question"


@pytest.mark.parametrize("raw", [True, False])
def test_with_nanos_vocabulary(raw: bool) -> None:
    nano = Tokenizer.from_pretrained(NANO)
    case = texts(raw, nano).case(512, 0.5, random.Random(0))
    assert len(case.prompt_ids) == 480 and abs(case.needle.start - 240) < 30
    text = nano.decode(case.prompt_ids, skip_special_tokens=False)
    assert nano.encode(text) == case.prompt_ids or not raw, "pieces give the tokens of the whole"
    assert text.startswith("<｜begin▁of▁sentence｜>") and text.count("<｜begin▁of▁sentence｜>") == 1
    assert text.endswith(" is" if raw else "?<｜Assistant｜>")
    assert ("<｜User｜>Read this text" in text) == (not raw)
    assert nano.decode(case.lead) == ("" if raw else text[text.index("The secret") :].split(" is")[0] + " is")


def test_candidates_are_ten_numbers_of_as_many_tokens() -> None:
    for seed in range(20):
        case = texts().case(400, 0.5, random.Random(seed))
        said = [tokenizer().decode(ids) for ids in case.candidates]
        assert said[0] == f" {case.number}" and len(set(said)) == 10
        assert all(int(number) in NUMBERS for number in said)
        assert len({len(ids) for ids in case.candidates}) == 1


def test_the_same_seed_asks_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, other = (texts().case(400, 0.5, random.Random(seed)) for seed in (1, 1, 2))
    assert one == two and one.prompt_ids != other.prompt_ids


def test_control_tokens_in_a_haystack_are_text(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("He wrote <｜Assistant｜> and <｜end▁of▁sentence｜> on the wall. " * 30)
    case = texts(raw=False, filler=from_file(book)).case(500, 0.5, random.Random(0))
    control = tokenizer().encode("<｜Assistant｜><｜end▁of▁sentence｜>")
    assert [case.prompt_ids.count(token) for token in control] == [1, 0]


def test_a_file_is_a_haystack_in_its_own_order(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text('One is here. "Two is there!" 三在这里。Four?\n\nFive', encoding="utf-8")
    sentences = from_file(book)(random.Random(0))
    first = [next(sentences) for _ in range(10)]
    whole = [" One is here.", ' "Two is there!"', " 三在这里。", "Four?", "\n\nFive"]
    start = whole.index(first[0])
    assert first == ((whole + whole + whole)[start:])[:10]


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    for name, says in (("empty", "no text"), ("latin", "UTF-8"), ("none", "cannot be read")):
        with pytest.raises(UserError, match=says):
            from_file(tmp_path / f"{name}.txt")


# Scores ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [True, False])
def test_a_model_that_finds_every_needle_scores_everything(raw: bool) -> None:
    result = sweep(llm(Retriever()), [400, 800], even_depths(5), samples=2, raw=raw)
    assert result.table("exact") == [[1.0, 1.0]] * 5
    assert result.table("first") == [[1.0, 1.0]] * 5
    assert all(cell.margin > 5 for cell in result.cells)


def test_a_model_that_guesses_scores_chance() -> None:
    result = sweep(llm(Guesser()), [200], even_depths(10), samples=40, raw=True, answer_tokens=6)
    assert result.mean("exact") < 0.01
    # 400 guesses at 1 of 10: two standard deviations are 0.03.
    assert abs(result.mean("first") - 0.1) < 0.045, result.mean("first")
    assert abs(result.mean("margin")) < 0.15


def test_a_model_that_finds_all_answers_alike_scores_chance_exactly() -> None:
    result = sweep(llm(Silent()), [300], [0.5], samples=3, raw=True)
    assert result.mean("first") == pytest.approx(0.1) and result.mean("margin") == 0


class Near(Retriever):
    """Sees only the last tokens of what it reads."""

    def expects(self, ids):  # type: ignore[no-untyped-def]
        return super().expects(ids[-250:])


def test_each_cell_is_its_own() -> None:
    result = sweep(llm(Near()), [250, 800], [0.0, 1.0], samples=2, raw=True)
    assert result.table("exact") == [[1.0, 0.0], [1.0, 1.0]], "depth downwards, length to the right"
    assert [(cell.length, cell.depth) for cell in result.cells] == [
        (250, 0.0),
        (250, 1.0),
        (800, 0.0),
        (800, 1.0),
    ]


def test_other_lengths_and_depths_do_not_change_a_cell() -> None:
    alone = sweep(llm(Guesser()), [300], [0.5], samples=3, raw=True, seed=5)
    among = sweep(llm(Guesser()), [260, 300], [0.25, 0.5], samples=3, raw=True, seed=5)
    assert alone.cells[0] in among.cells


def test_a_real_model_with_random_weights() -> None:
    model = Transformer(PRESETS["tiny"].replace(vocab_size=VOCAB))
    model.init_weights()
    tiny = LLM(model, tokenizer=tokenizer())
    seen: list[tuple[int, int]] = []
    result = sweep(tiny, None, [0.0, 1.0], samples=2, raw=True, progress=lambda *at: seen.append(at))
    assert result.lengths == (512,) and seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert 0 <= result.mean("first") <= 1 and result.mean("exact") == 0


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("It is 4812.", True),
        ("4,812", True),
        ("the number is4812!", True),
        ("14812", False),
        ("48123", False),
        ("4 812", False),
        ("3.4812", False),
        ("14,812", False),
        ("", False),
    ],
)
def test_a_number_in_an_answer(answer: str, right: bool) -> None:
    assert has_number(answer, "4812") is right


def test_ranks() -> None:
    assert rank_first(-1.0, [-2.0, -3.0]) == 1
    assert rank_first(-2.0, [-1.0, -3.0]) == 0
    assert rank_first(-1.0, [-1.0, -1.0, -3.0]) == pytest.approx(1 / 3)


def test_depths_and_lengths() -> None:
    assert even_depths(11) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1])
    assert even_depths(1) == (0.5,)
    assert usual_lengths(2048) == (512, 1024, 2048)
    assert usual_lengths(131_072 + 5)[-1] == 131_072
    assert usual_lengths(100) == (100,)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lengths": [2000]}, "2000 is too long: the model takes 1024"),
        ({"lengths": [50]}, "50 is too short"),
        ({"lengths": []}, "no length"),
        ({"depths": [1.5]}, "depth 1.5"),
        ({"samples": 0}, "samples is 0"),
        ({"answer_tokens": 0}, "answer_tokens is 0"),
        ({"distractors": 0}, "distractors is 0"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_read(
    changes: dict[str, object], says: str
) -> None:
    model = Scripted()
    with pytest.raises(UserError, match=says):
        sweep(llm(model), **{"lengths": [400], "raw": True, **changes})  # type: ignore[arg-type]
    assert not model.read


def test_a_model_without_a_chat_format_is_told_of_raw() -> None:
    base = Tokenizer(tokenizer().backend, {"bos_token": "<｜begin▁of▁sentence｜>"}, chat_template="{{ 'x' }}")
    with pytest.raises(UserError, match="--raw"):
        sweep(LLM(Scripted(), tokenizer=base), [400])


# Results -----------------------------------------------------------------------------------------------


def result(lengths: int = 3, depths: int = 4) -> NeedleResult:
    places = [512 << i for i in range(lengths)]
    cells = [
        Cell(length, depth, 1 - depth, depth, i / 10)
        for i, length in enumerate(places)
        for depth in even_depths(depths)
    ]
    return NeedleResult(tuple(places), even_depths(depths), 10, 9, 0, False, tuple(cells))


def test_the_json_has_both_measures_and_their_chance() -> None:
    facts = json.loads(json.dumps(result().to_dict()))
    assert facts["chance"] == {"exact": 1 / 9000, "first": 0.1, "margin": 0.0}
    assert facts["exact"] == pytest.approx(0.5) and facts["first"] == pytest.approx(0.5)
    assert facts["cells"][1] == {
        "length": 512,
        "depth": pytest.approx(1 / 3),
        "exact": pytest.approx(2 / 3),
        "first": pytest.approx(1 / 3),
        "margin": 0.0,
    }
    assert len(facts["cells"]) == 12 and facts["format"] == "chat"


@pytest.mark.parametrize(("lengths", "depths"), [(1, 1), (3, 11), (9, 40)])
def test_the_heat_map_says_what_it_shows(lengths: int, depths: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "needle.svg"
    plot(result(lengths, depths), path, "some-model")
    drawn = path.read_text()
    for text in ("some-model", "chance 0.01%", "chance 10%", "first of 10", "Depth", "Length", "10 texts"):
        assert f"<!-- {text}" in drawn or text in drawn, f"{text!r} is not in the picture"
