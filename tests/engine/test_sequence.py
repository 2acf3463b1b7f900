"""Stop strings in a growing text, and how a sequence ends."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dsv3.engine.sampling import Sampled, SamplingParams
from dsv3.engine.sequence import OutputText, Sequence


class Pieces:
    """A decoder whose token i is the i-th of a list of texts, and whose flush gives a last one."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self.pieces, self.rest = pieces, rest

    def push(self, token_id: int) -> str:
        return self.pieces[token_id]

    def flush(self) -> str:
        return self.rest


letters = st.text("ab", max_size=4)


@given(st.lists(letters, max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), letters)
@example(["aab", "aab"], ["aabaac"], "")
@example(["ab", "abab", "c"], ["ababc"], "")
@example(["x a", "b", "ab"], ["abb"], "")
def test_stop_strings_however_the_text_is_cut(pieces: list[str], stops: list[str], rest: str) -> None:
    output = OutputText(Pieces(pieces, rest), tuple(stops))
    whole, stopped = "", False
    for i, piece in enumerate([*pieces, rest]):
        before = output.text
        whole += piece
        stopped = output.push(i) if i < len(pieces) else output.close()
        assert output.text.startswith(before), "what was shown must stay"
        found = [whole.find(stop) for stop in stops if stop in whole]
        assert stopped == bool(found)
        if stopped:
            assert output.text == whole[: min(found)]
            break
        # Held back: exactly the longest end that a stop string begins with; at the very end, nothing.
        ends = [
            n
            for n in range(len(whole) + 1)
            if any(stop.startswith(whole[len(whole) - n :]) for stop in stops)
        ]
        held = max(ends, default=0) if i < len(pieces) else 0
        assert output.text == whole[: len(whole) - held]


def test_without_stops_text_comes_at_once() -> None:
    output = OutputText(Pieces(["He", "llo"], "!"))
    assert not output.push(0) and output.text == "He"
    assert not output.push(1) and output.text == "Hello"
    assert not output.close() and output.text == "Hello!"


def sequence(
    pieces: list[str], rest: str = "", end_ids: frozenset[int] = frozenset(), **params: object
) -> Sequence:
    return Sequence(
        [0, 0],
        SamplingParams(**params),  # type: ignore[arg-type]
        seed=0,
        decoder=Pieces(pieces, rest),
        end_ids=end_ids,
        max_model_len=10,
    )


def feed(s: Sequence, count: int) -> None:
    for token in range(count):
        assert not s.finished
        s.append(Sampled(token))


def test_the_token_that_ends_the_text_is_no_part_of_it() -> None:
    s = sequence(["a", "b", "END"], end_ids=frozenset({2}))
    feed(s, 3)
    assert (s.finish_reason, s.output.text, s.output_ids) == ("stop", "ab", [0, 1, 2])


def test_the_end_of_text_can_be_ignored() -> None:
    s = sequence(["a", "END", "b"], end_ids=frozenset({1}), ignore_eos=True, stop_token_ids=[2])
    feed(s, 3)
    assert (s.finish_reason, s.output.text, s.output_ids) == ("stop", "aEND", [0, 1, 2])


def test_what_was_held_back_comes_out_at_the_end_of_text() -> None:
    s = sequence(["a", "<", "END"], end_ids=frozenset({2}), stop="</s>")
    feed(s, 2)
    assert s.output.text == "a"
    s.append(Sampled(2))
    assert (s.finish_reason, s.output.text) == ("stop", "a<")


def test_what_was_held_back_comes_out_at_the_last_token() -> None:
    s = sequence(["a", "<"], stop="</s>", max_tokens=2)
    feed(s, 2)
    assert (s.finish_reason, s.output.text) == ("length", "a<")


def test_a_stop_string_in_the_last_token_is_a_stop() -> None:
    s = sequence(["a<", "/s>b"], stop="</s>", max_tokens=2)
    feed(s, 2)
    assert (s.finish_reason, s.output.text, s.output_ids) == ("stop", "a", [0, 1])


def test_a_stop_string_that_only_the_flush_completes() -> None:
    s = sequence(["a", "<"], rest=">", stop="<>", max_tokens=2)
    feed(s, 2)
    assert (s.finish_reason, s.output.text) == ("stop", "a")


@pytest.mark.parametrize(("max_tokens", "limit"), [(3, 5), (8, 10), (100, 10), (None, 10)])
def test_limit(max_tokens: int | None, limit: int) -> None:
    s = sequence(["a"] * 10, max_tokens=max_tokens)
    assert s.limit == limit
    feed(s, limit - 2)
    assert s.finish_reason == "length"


def test_pending() -> None:
    s = sequence(["a"] * 3)
    assert (s.pending, s.prompt_ids, s.output_ids) == (2, [0, 0], [])
    s.computed = 2
    s.append(Sampled(2))
    assert (s.pending, s.prompt_ids, s.output_ids, s.tokens) == (1, [0, 0], [2], [0, 0, 2])
