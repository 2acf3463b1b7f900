"""The comparison of two models, against the definitions over all logits at once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from dsv3.checkpoint import DeepseekV3, convert
from dsv3.checkpoint.mapped import mapped_bytes
from dsv3.config import PRESETS
from dsv3.eval import divergence
from dsv3.eval.divergence import Reading, compare, read

VOCAB = 50


def reading(ids: Tensor, seed: int, noise: float = 0.0) -> Reading:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(ids), ids.shape[1] - 1, 8, generator=generator)
    head = torch.randn(VOCAB, 8, generator=generator)
    return Reading(ids, list(hidden + noise * torch.randn(hidden.shape)), head)


@pytest.mark.parametrize("rows", [512, 3])
def test_each_number_is_what_its_name_says(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "_ROWS", rows)
    ids = torch.randint(0, VOCAB, (4, 11))
    source, result = reading(ids, 1), reading(ids, 1, noise=0.5)
    found = compare(source, result)
    a, b = (torch.cat([f @ r.head.T for f in r.features]).double() for r in (source, result))
    following = ids[:, 1:].flatten()
    assert found.tokens == 40
    assert found.source_perplexity == pytest.approx(math.exp(cross_entropy(a, following)))
    assert found.perplexity == pytest.approx(math.exp(cross_entropy(b, following)))
    expected = kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="batchmean", log_target=True)
    assert found.divergence == pytest.approx(float(expected), rel=1e-5) and found.divergence > 0.1
    assert found.agreement == (a.argmax(-1) == b.argmax(-1)).double().mean()
    same = compare(source, source)
    assert same.divergence == 0 and same.agreement == 1 and same.perplexity == same.source_perplexity


def test_more_bits_are_nearer(tmp_path: Path) -> None:
    config = PRESETS["tiny"]
    model = DeepseekV3(config)
    model.init_weights(1)
    model.save_pretrained(tmp_path / "bf16")
    ids = torch.randint(0, config.vocab_size, (4, 32))
    mapped = mapped_bytes()
    before, seen = read(tmp_path / "bf16", ids), []
    far = []
    for to in ("bf16", "int8", "int4"):
        convert(tmp_path / "bf16", tmp_path / "out", to)  # type: ignore[arg-type]
        after = read(tmp_path / "out", ids, progress=lambda done, total: seen.append((done, total)))
        far.append(compare(before, after).divergence)
    assert far[0] == 0 < far[1] < far[2]
    assert seen[:4] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert mapped_bytes() == mapped, "what is kept of a model keeps its file in memory"
