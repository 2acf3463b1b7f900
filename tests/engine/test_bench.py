"""`dsv3 bench`: what it counts, and that it measures what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dsv3.cli.main import main
from dsv3.config import PRESETS
from dsv3.engine.bench import Ceilings, _cost, bench, measure_ceilings
from dsv3.errors import UserError
from dsv3.kernels.packed import empty
from dsv3.model import Transformer
from dsv3.model.layers import put_packed

CONFIG = PRESETS["tiny"].replace(num_nextn_predict_layers=0, max_position_embeddings=512)


def model() -> Transformer:
    made = Transformer(CONFIG)
    made.init_weights()
    return made.bfloat16().eval()


def test_what_a_step_reads_and_multiplies() -> None:
    whole = model()
    cost = _cost(whole)
    stacks = [p for name, p in whole.named_parameters() if ".experts." in name]
    routed = sum(p.numel() for p in stacks)
    rest = sum(p.numel() for p in whole.parameters()) - routed - whole.embed_tokens.weight.numel()
    buffers = sum(b.nbytes for b in whole.buffers())
    assert (cost.routed, cost.fixed) == (2 * routed, 2 * rest + buffers)
    assert cost.active == rest + routed * CONFIG.num_experts_per_tok // (CONFIG.n_routed_experts or 1)
    share = CONFIG.num_experts_per_tok / (CONFIG.n_routed_experts or 1)
    assert cost.bytes(1, 0) == pytest.approx(cost.fixed + cost.routed * share)
    assert cost.bytes(10**6, 10) == pytest.approx(cost.fixed + cost.routed + 10 * cost.token)
    assert cost.token == 2 * CONFIG.latent_dim * CONFIG.num_hidden_layers and not cost.integers


def test_packed_weights_count_as_they_are_stored() -> None:
    plain, packed = model(), model()
    name = "layers.1.mlp.experts.down_proj"
    stack = plain.get_parameter(name)
    small = empty("int4", stack.shape, 32, False, torch.device("cpu"))
    put_packed(packed, name, small)
    a, b = _cost(plain), _cost(packed)
    assert a.routed - b.routed == stack.nbytes - small.nbytes
    assert (a.active, a.fixed) == (b.active, b.fixed)


def test_measurements_and_their_roofline() -> None:
    ceilings = Ceilings(bandwidth=1e9, products=1e12, byte_products=2e12)
    whole = model()
    works = list(bench(whole, ceilings, prompt=64, depths=[0, 100], batches=[1, 3], tokens=2, repeats=1))
    found = [(work.name, work.depth, work.batch) for work in works]
    assert found == [("prefill", 64, 1), *(("decode", d, b) for d in (0, 100) for b in (1, 3))]
    cost = _cost(whole)
    for work in works[1:]:
        steps = work.tokens_per_second / work.batch
        read = cost.bytes(work.batch, work.batch * (max(work.depth, 1) + 4))
        assert work.bytes_per_second == pytest.approx(steps * read)
        assert work.roofline == pytest.approx(work.batch / (read / 1e9))
        assert work.share == pytest.approx(work.tokens_per_second / work.roofline)
    with pytest.raises(UserError, match="context is 512: lower --depths"):
        next(bench(whole, ceilings, depths=[600]))


def test_ceilings() -> None:
    found = measure_ceilings(torch.device("cpu"), size=2**24)
    assert found.bandwidth > 1e8 and found.byte_products >= found.products > 1e9


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    work = [
        "bench",
        "nano",
        "--prompt",
        "32",
        "--depths",
        "0",
        "--batch",
        "1",
        "--tokens",
        "2",
        "--repeats",
        "1",
    ]
    picture = tmp_path / "bench.svg"
    assert main([*work, "--json", "--plot", str(picture)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in facts["results"]] == ["prefill", "decode"]
    assert facts["peak_bytes"] > 1e7 and facts["ceilings"]["bandwidth"] > 0
    assert "tokens/s" in picture.read_text() or picture.stat().st_size > 1000
    assert main(work) == 0
    assert "of what is possible" in capsys.readouterr().out
    assert main(["bench", "nano", "--batch", "0,x"]) == 1
    assert "--batch is '0,x'" in capsys.readouterr().err
