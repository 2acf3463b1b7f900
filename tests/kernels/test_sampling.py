"""Drawing words: the rules against transformers' warpers, the native way against the readable one."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dsv3.kernels import sampling
from dsv3.kernels.native import library
from dsv3.kernels.sampling import PREFIX, draw, inverse_transform


class Rules(NamedTuple):
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def columns(rows: list[Rules]) -> dict[str, list[float]]:
    return {name: [getattr(row, name) for row in rows] for name in Rules._fields}


def distribution(logits: Tensor, rows: list[Rules]) -> Tensor:
    return sampling.distribution(logits, **columns(rows))  # type: ignore[arg-type]


def normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(dim=-1, keepdim=True)


def in_transformers(logits: Tensor, params: Rules) -> Tensor:
    """Probabilities [1, vocab] after transformers' warpers, in transformers' own order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    scores: Tensor = warpers(torch.zeros(1, 1, dtype=torch.int64), logits)
    return scores.softmax(dim=-1)


@st.composite
def filters(draw: st.DrawFn) -> Rules:
    return Rules(
        temperature=draw(st.floats(0.05, 3)),
        top_k=draw(st.sampled_from([0, 1, 2, 7, 50, 2000, 10_000, 10**20])),
        top_p=draw(st.sampled_from([1.0]) | st.floats(0.01, 0.999)),
        min_p=draw(st.sampled_from([0.0]) | st.floats(0.001, 1.0)),
    )


@given(
    st.lists(filters(), min_size=1, max_size=5),
    st.sampled_from([2, 60, PREFIX, PREFIX + 1, 5000]),
    st.sampled_from([0.01, 1.0, 6.0]),
    st.integers(0, 10_000),
)
def test_filters_are_transformers(rows: list[Rules], vocab: int, spread: float, seed: int) -> None:
    logits = spread * torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(seed))
    ours = normalised(distribution(logits, rows))
    for i, params in enumerate(rows):
        theirs = in_transformers(logits[i : i + 1].clone(), params)[0]
        # Sums to the edge of top_p round differently: a word exactly there may be in or out.
        different = (ours[i] > 0) != (theirs > 0)
        assert different.sum() <= 1, f"{params}: {int((ours[i] > 0).sum())} words, {int((theirs > 0).sum())}"
        if not different.any():
            torch.testing.assert_close(ours[i], theirs, rtol=1e-4, atol=1e-7)


def test_filters_keep_what_is_as_likely_as_the_last_one_kept() -> None:
    logits = torch.tensor([[2.0, 1.0, 3.0, 1.0, 0.0]])
    assert (distribution(logits, [Rules(top_k=3)]) > 0).tolist() == [[True, True, True, True, False]]
    assert (distribution(logits, [Rules(top_k=2)]) > 0).tolist() == [[True, False, True, False, False]]


def test_top_p_sees_only_what_top_k_left() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # Of the two that are left, the first holds 4/7 > 0.55; of all four, 0.4 < 0.55 would let the second in.
    assert (distribution(logits, [Rules(top_k=2, top_p=0.55)]) > 0).tolist() == [[True] + 3 * [False]]
    assert (distribution(logits, [Rules(top_p=0.55)]) > 0).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("min_p", [0.0, 0.95])
def test_top_p_is_a_share_of_what_a_long_top_k_leaves(min_p: float) -> None:
    """The prefix alone does not tell how much that is, even where top_p or min_p cut within it."""
    logits = torch.linspace(1.0, 0.5, 1200).log().unsqueeze(0)
    params = Rules(top_k=1000, top_p=0.2, min_p=min_p)
    kept = int((distribution(logits, [params]) > 0).sum())
    assert kept == int((in_transformers(logits, params) > 0).sum()) and 100 < kept < PREFIX


def test_without_filters_nothing_is_ruled_out() -> None:
    logits = torch.randn(2, 3 * PREFIX)
    rows = [Rules(), Rules(top_p=0.5)]  # together with one that filters, too
    torch.testing.assert_close(distribution(logits, rows)[0], logits[0].softmax(-1))
    assert (distribution(logits, rows)[1] > 0).sum() < 3 * PREFIX


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    logits = torch.randn(1, 3 * PREFIX)
    assert torch.equal(distribution(logits, [Rules(top_k=10**20)]), logits.softmax(-1))


def test_draws_are_in_proportion() -> None:
    weights = torch.tensor([[0.0, 3.0, 1.0, 0.0, 4.0, 0.0]])
    places = inverse_transform(weights.expand(8000, -1), [(i + 0.5) / 8000 for i in range(8000)])
    assert torch.bincount(places, minlength=6).tolist() == [0, 3000, 1000, 0, 4000, 0]


def test_draws_at_the_ends_never_take_what_is_ruled_out() -> None:
    weights = torch.tensor([[0.0, 0.1, 0.2, 0.0]])
    assert inverse_transform(weights, [0.0]).item() == 1
    assert inverse_transform(weights, [1 - 2.0**-48]).item() == 2


# Drawing ------------------------------------------------------------------------------------------------


def shares(logits: Tensor, rules: Rules, draws: int) -> Tensor:
    """How often each word comes, for random numbers evenly spread over [0, 1)."""
    uniform = [(i + 0.5) / draws for i in range(draws)]
    ids = draw(logits.expand(draws, -1), **columns([rules] * draws), uniform=uniform)  # type: ignore[arg-type]
    return torch.bincount(torch.tensor(ids), minlength=logits.shape[-1]) / draws


@given(
    filters(),
    st.sampled_from([1, 2, 17, 60, PREFIX + 1, 3000]),
    st.sampled_from([0.01, 1, 6]),
    st.integers(0, 10_000),
)
def test_words_come_as_often_as_they_should(rules: Rules, vocab: int, spread: float, seed: int) -> None:
    """The native way, where it is there, against the distribution as torch makes it."""
    logits = spread * torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed))
    if seed % 3 == 0 and vocab > 2:
        logits[0, ::2] = -torch.inf
    expected = normalised(distribution(logits, [rules]))[0]
    ours = shares(logits, rules, 500)
    # Both go through the words in the same order, so running sums can differ by a draw at most ...
    apart = (ours.cumsum(0) - expected.cumsum(0)).abs().max()
    # ... and by a word that sums to the edge of a rule and rounds differently.
    edge = expected[expected > 0].min()
    assert apart <= 1 / 500 + edge + 1e-5, (apart, edge)
    assert not ours[logits[0] == -torch.inf].any()


@pytest.mark.parametrize("native", [True, False])
def test_draws_are_the_inverse_of_the_running_sum(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if native and library() is None:
        pytest.skip("no native kernels on this machine")
    if not native:
        monkeypatch.setattr(sampling, "library", lambda: None)
    logits = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log().expand(6, -1)
    rules = columns([Rules()] * 6)
    drawn = draw(logits, **rules, uniform=[0.0, 0.4999, 0.5001, 0.7499, 0.7501, 1 - 2**-48])  # type: ignore[arg-type]
    assert drawn == [0, 0, 2, 2, 3, 3]


def test_a_row_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(9, 5000, generator=generator)
    rows = [Rules(0.7 + 0.1 * i, 40 * (i % 2), 0.8 if i % 3 else 1.0, 0.01 * (i % 4)) for i in range(9)]
    uniform = torch.rand(9, generator=generator).tolist()
    together = draw(logits, **columns(rows), uniform=uniform)  # type: ignore[arg-type]
    alone = [draw(logits[i : i + 1], **columns([rows[i]]), uniform=[uniform[i]])[0] for i in range(9)]  # type: ignore[arg-type]
    assert together == alone


@pytest.mark.parametrize("native", [True, False])
def test_rows_with_nothing_to_draw_from_are_told(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if native and library() is None:
        pytest.skip("no native kernels on this machine")
    if not native:
        monkeypatch.setattr(sampling, "library", lambda: None)
    logits = torch.zeros(5, 40)
    logits[1, 3], logits[2, 39], logits[3] = torch.nan, torch.inf, -torch.inf
    drawn = draw(logits, **columns([Rules(top_p=0.9)] * 5), uniform=[0.5] * 5)  # type: ignore[arg-type]
    assert [token_id >= 0 for token_id in drawn] == [True, False, False, False, True]
