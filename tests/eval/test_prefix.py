"""A prefix read once says what the plain model says, however many continuations were tried before."""

from __future__ import annotations

import pytest
import torch

from dsv3.eval import prefix
from dsv3.eval.prefix import Prefix
from tests.engine.small import greedy, model

PROMPT = [5, 77, 200, 31, 4, 4, 90, 18]


def plain(prompt: list[int], ids: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model()(torch.tensor([prompt + ids])).logits[0].log_softmax(dim=-1)
    return [float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(ids)]


@pytest.mark.parametrize("chunk", [2048, 3])
def test_logprobs_are_the_plain_models(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "_CHUNK", chunk)
    read = Prefix(model(), PROMPT, room=6)
    for ids in ([9], [9, 8, 7], [100, 101, 102, 103, 104, 105], [9, 8, 7]):
        assert read.logprobs(ids) == pytest.approx(plain(PROMPT, ids), abs=1e-4)


def test_what_was_tried_leaves_no_trace() -> None:
    read = Prefix(model(), PROMPT, room=8)
    answer = read.greedy(8)
    assert answer == greedy(PROMPT, 8)
    read.logprobs([1, 2, 3, 4, 5])
    assert read.greedy(8) == answer
    read.extend([60, 61])
    assert read.length == 10
    assert read.logprobs([7, 8]) == pytest.approx(plain([*PROMPT, 60, 61], [7, 8]), abs=1e-4)
    assert read.greedy(5) == greedy([*PROMPT, 60, 61], 5)


def test_greedy_ends_before_an_end() -> None:
    said = greedy(PROMPT, 8)
    assert Prefix(model(), PROMPT, room=8).greedy(8, {said[3]}) == said[: said.index(said[3])]


def test_a_long_prompt_has_no_gradient() -> None:
    read = Prefix(model(), PROMPT, room=2)
    assert not any(layer.requires_grad for layer in read._cache)
