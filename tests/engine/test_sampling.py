"""Sampling, step by step against transformers' logits processors and against counting."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    RepetitionPenaltyLogitsProcessor,
)

from dsv3.engine.sampling import (
    Sampler,
    SamplingParams,
    likeliest,
    penalize_output,
    penalize_repetition,
    report,
    sample,
)
from dsv3.errors import UserError

# Penalties ----------------------------------------------------------------------------------------------


@given(st.floats(0.2, 3), st.lists(st.integers(0, 19), min_size=1, max_size=30), st.integers(0, 10_000))
def test_repetition_penalty_is_transformers(penalty: float, said: list[int], seed: int) -> None:
    logits = 3 * torch.randn(1, 20, generator=torch.Generator().manual_seed(seed))
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([said]), logits.clone())
    torch.testing.assert_close(penalize_repetition(logits[0, said], penalty), theirs[0, said])


def test_presence_and_frequency_penalties_by_hand() -> None:
    logits, counts = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 3.0])
    assert penalize_output(logits, counts, 0.5, 0.25).tolist() == [1.0, 0.25, -0.25]


@given(st.integers(0, 10_000))
def test_penalties_follow_prompt_and_output(seed: int) -> None:
    """Token by token through `sample`, against penalties computed from the token lists."""
    generator = torch.Generator().manual_seed(seed)
    params = SamplingParams(
        temperature=0.0, repetition_penalty=1.4, presence_penalty=0.6, frequency_penalty=-0.3
    )
    prompt, output = [1, 4, 4], list[int]()
    sampler = Sampler(params, prompt, seed=0)
    plain = Sampler(SamplingParams(temperature=0.0), prompt, seed=0)
    for _ in range(12):
        logits = torch.randn(2, 8, generator=generator)
        expected = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([prompt + output]), logits[:1].clone())[
            0
        ]
        for token in set(output):
            expected[token] -= 0.6 - 0.3 * output.count(token)
        before = logits.clone()
        penalized, unpenalized = sample(logits, [sampler, plain])
        assert penalized.token_id == int(expected.argmax())
        assert unpenalized.token_id == int(logits[1].argmax())
        assert torch.equal(before, logits)
        output.append(penalized.token_id)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_until_there_are_min_tokens_nothing_ends_the_text(temperature: float) -> None:
    logits = torch.tensor([[9.0, 1.0, 8.0, 0.0]])
    params = SamplingParams(temperature=temperature, min_tokens=3, logprobs=1)
    # A tokenizer may know more ids than the model has words.
    sampler = Sampler(params, [0], seed=0, end_ids=[0, 2, 400])
    said = [sample(logits, [sampler])[0] for _ in range(3)]
    assert {token.token_id for token in said} <= {1, 3}
    assert all(token.logprobs is not None and list(token.logprobs.top) == [0] for token in said)
    assert sample(logits, [sampler])[0].token_id in (0, 2)


# The draw -----------------------------------------------------------------------------------------------


def test_samples_follow_the_distribution() -> None:
    params = SamplingParams(temperature=0.8, top_k=4)
    logits = torch.tensor([[0.3, 1.0, -0.5, 0.0, 2.0, -3.0]])
    sampler = Sampler(params, [0], seed=3)
    n = 6000
    counts = torch.zeros(6)
    for _ in range(n):
        counts[sample(logits, [sampler])[0].token_id] += 1
    expected = (logits[0] / 0.8).masked_fill(logits[0] < 0.0, -torch.inf).softmax(-1)  # the four likeliest
    assert ((counts > 0) == (expected > 0)).all()
    # Within five standard deviations of a binomial count.
    assert ((counts / n - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all(), counts / n


def test_seeds_differ_by_their_sign_too() -> None:
    draws = {seed: [Sampler(SamplingParams(), [0], seed).uniform()] for seed in (7, -7, 8)}
    assert draws[7] != draws[-7] and draws[7] != draws[8]
    assert draws[7] == [Sampler(SamplingParams(), [0], 7).uniform()]


def test_greedy_is_the_largest_logit_whatever_the_filters() -> None:
    logits = torch.randn(3, 50)
    rows = [SamplingParams(temperature=t, top_k=k) for t, k in ((0.0, 0), (1e-6, 3), (1.0, 1))]
    tokens = sample(logits, [Sampler(params, [0], seed=0) for params in rows])
    assert [t.token_id for t in tokens] == logits.argmax(dim=-1).tolist()


def test_bfloat16_logits() -> None:
    logits = torch.randn(2, 50, dtype=torch.bfloat16)
    greedy, drawn = sample(
        logits,
        [
            Sampler(SamplingParams(temperature=0.0), [0], 0),
            Sampler(SamplingParams(top_k=1, logprobs=1), [0], 0),
        ],
    )
    assert [greedy.token_id, drawn.token_id] == logits.argmax(dim=-1).tolist()
    assert drawn.logprobs is not None
    assert drawn.logprobs.logprob == pytest.approx(float(logits[1].float().log_softmax(-1).max()))


# Log-probabilities --------------------------------------------------------------------------------------


def test_logprobs_are_the_models_own() -> None:
    logits = torch.randn(2, 30)
    params = SamplingParams(temperature=0.5, top_k=2, repetition_penalty=2.0, logprobs=3)
    told, silent = sample(logits, [Sampler(params, [4], 0), Sampler(SamplingParams(logprobs=0), [4], 0)])
    assert told.logprobs is not None and silent.logprobs is not None
    expected = logits.log_softmax(dim=-1)
    assert told.logprobs.token_id == told.token_id
    assert told.logprobs.logprob == pytest.approx(expected[0, told.token_id].item())
    values, ids = expected[0].topk(3)
    assert list(told.logprobs.top) == ids.tolist()
    assert list(told.logprobs.top.values()) == pytest.approx(values.tolist())
    assert silent.logprobs.top == {}


def test_more_logprobs_than_words() -> None:
    (all_of_them,) = report(torch.randn(1, 5), [2], [20])
    assert len(all_of_them.top) == 5
    assert sum(map(math.exp, all_of_them.top.values())) == pytest.approx(1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number(value: float) -> None:
    logits = torch.randn(2, 5)
    logits[1, 3] = value
    with pytest.raises(UserError, match="not numbers"):
        likeliest(logits)


# Params -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("max_tokens", -1, "a whole number at least 0, or None"),
        ("max_tokens", 2.5, "a whole number at least 0, or None"),
        ("max_tokens", True, "a whole number at least 0, or None"),
        ("min_tokens", -1, "a whole number at least 0"),
        ("min_tokens", None, "a whole number at least 0"),
        ("ignore_eos", 1, "True or False"),
        ("temperature", -0.1, "a number at least 0 and at most 100"),
        ("temperature", float("nan"), "a number at least 0 and at most 100"),
        ("temperature", float("inf"), "a number at least 0 and at most 100"),
        ("temperature", "hot", "a number at least 0 and at most 100"),
        ("temperature", None, "a number at least 0 and at most 100"),
        ("top_p", 0.0, "a number above 0 and at most 1"),
        ("top_p", 1.01, "a number above 0 and at most 1"),
        ("top_k", -2, "a whole number at least -1"),
        ("top_k", 1.0, "a whole number at least -1"),
        ("min_p", -0.01, "a number at least 0 and at most 1"),
        ("min_p", 1.5, "a number at least 0 and at most 1"),
        ("repetition_penalty", 0.0, "a number at least 0.01 and at most 100"),
        ("presence_penalty", 2.1, "a number at least -2 and at most 2"),
        ("frequency_penalty", -2.1, "a number at least -2 and at most 2"),
        ("logprobs", -1, "a whole number at least 0, or None"),
        ("seed", 1.5, "a whole number, or None"),
        ("seed", "1", "a whole number, or None"),
    ],
)
def test_params_out_of_range(name: str, value: object, says: str) -> None:
    with pytest.raises(UserError) as error:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert str(error.value) == f"{name} is {value!r}: it must be {says}"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens is 4: it must be at most max_tokens, 3"),
        ({"stop": ["a", ""]}, "stop has ''"),
        ({"stop": [3]}, "stop has 3"),
        ({"stop": 3}, "stop is 3: it must be a list"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids has -1"),
        ({"stop_token_ids": 7}, "stop_token_ids is 7: it must be a list"),
        ({"stop_token_ids": ["7"]}, "stop_token_ids has '7'"),
    ],
)
def test_stops_that_cannot_be(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        SamplingParams(**wrong)  # type: ignore[arg-type]


def test_params_are_checked_again_when_replaced_and_compare_by_value() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[5])
    assert params == SamplingParams(stop=["end"], stop_token_ids=(5,))
    assert len({params, SamplingParams(stop=["end"], stop_token_ids=(5,))}) == 1
    assert SamplingParams(top_k=-1).top_k == -1
    assert len({SamplingParams(logit_bias={5: 1.0}), SamplingParams(logit_bias={5: 1.0})}) == 1
    with pytest.raises(UserError, match="top_p"):
        replace(params, top_p=2.0)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"n": 0}, "n is 0: it must be a whole number at least 1 and at most 128"),
        ({"logit_bias": [1]}, r"logit_bias is \[1\]: it must be a dict"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias has -1: each must be a token id"),
        ({"logit_bias": {"5": 0.0}}, "logit_bias has '5'"),
        ({"logit_bias": {5: 101}}, "logit_bias of token 5 is 101: it must be -100 to 100"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias of token 5 is nan"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"allowed_token_ids": [True]}, "allowed_token_ids has True"),
        ({"structured": "json"}, "structured is a str"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
    ],
)
def test_what_the_newer_params_refuse(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        SamplingParams(**wrong)  # type: ignore[arg-type]
