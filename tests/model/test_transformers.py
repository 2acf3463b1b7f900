"""Logits equal transformers' own, over random configurations, with and without a cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.config import PRESETS, ModelConfig
from tests.model.reference import LatentCache, assert_close, in_transformers, random_ids, random_model
from tests.model.strategies import v2_configs, v3_configs

SEEDS = st.integers(0, 10_000)


def check_whole(config: ModelConfig, batch: int, length: int, seed: int) -> None:
    model = random_model(config, seed)
    ids = random_ids(config, batch, length, seed)
    theirs = in_transformers(model)(ids).logits
    assert_close(model(ids).logits, theirs, what=config)


def check_cached(config: ModelConfig, batch: int, prompt: int, chunk: int, seed: int) -> None:
    """Prompts in chunks, then token by token; transformers with its own cache, prompt and then token by token."""
    model = random_model(config, seed)
    length = prompt + 4
    ids = random_ids(config, batch, length, seed)

    theirs_model = in_transformers(model)
    out = theirs_model(ids[:, :prompt], use_cache=True)
    theirs = [out.logits]
    for i in range(prompt, length):
        out = theirs_model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        theirs.append(out.logits)

    cache = LatentCache(model, batch, length + 3)
    pieces = list(range(0, prompt, chunk)) + list(range(prompt, length + 1))
    ours = []
    for start, stop in zip(pieces, pieces[1:], strict=False):
        logits = cache.step({row: ids[row, start:stop] for row in range(batch)})
        ours.append(torch.stack([logits[row] for row in range(batch)]))
    assert_close(torch.cat(ours, dim=1), torch.cat(theirs, dim=1), what=config)


@settings(max_examples=60)
@given(config=v3_configs(), batch=st.integers(1, 3), length=st.integers(1, 40), seed=SEEDS)
def test_v3_logits(config: ModelConfig, batch: int, length: int, seed: int) -> None:
    check_whole(config, batch, length, seed)


@settings(max_examples=40)
@given(
    config=v3_configs(),
    batch=st.integers(1, 3),
    prompt=st.integers(1, 24),
    chunk=st.integers(1, 24),
    seed=SEEDS,
)
def test_v3_logits_with_a_cache(config: ModelConfig, batch: int, prompt: int, chunk: int, seed: int) -> None:
    check_cached(config, batch, prompt, chunk, seed)


@settings(max_examples=40)
@given(config=v2_configs(), batch=st.integers(1, 3), length=st.integers(1, 40), seed=SEEDS)
def test_v2_logits(config: ModelConfig, batch: int, length: int, seed: int) -> None:
    check_whole(config, batch, length, seed)


@settings(max_examples=40)
@given(
    config=v2_configs(),
    batch=st.integers(1, 3),
    prompt=st.integers(1, 24),
    chunk=st.integers(1, 24),
    seed=SEEDS,
)
def test_v2_logits_with_a_cache(config: ModelConfig, batch: int, prompt: int, chunk: int, seed: int) -> None:
    check_cached(config, batch, prompt, chunk, seed)


@pytest.mark.parametrize("preset", ["tiny", "nano"])
def test_presets(preset: str) -> None:
    check_whole(PRESETS[preset], batch=2, length=24, seed=0)
