"""What goes wrong is named where it began, and a jump of the loss is seen; healthy runs are left alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from dsv3.config import PRESETS
from dsv3.data.stream import Batch
from dsv3.model import Transformer
from dsv3.model.moe import MoE
from dsv3.parallel.part import Part, spans
from dsv3.train.guard import Examination, SpikeGuard, dump, name_the_layer, stopped
from dsv3.train.loss import objective
from dsv3.train.recompute import apply_recompute
from tests.parallel.processes import run

CONFIG = PRESETS["tiny"].replace(num_hidden_layers=4, num_nextn_predict_layers=1)


def batch(seed: int = 0, words: int = CONFIG.vocab_size) -> Batch:
    return Batch(torch.randint(words, (2, 13), generator=torch.Generator().manual_seed(seed)))


def model() -> Transformer:
    made = Transformer(CONFIG)
    made.init_weights()
    return made


def examine(m: Transformer) -> Examination:
    return name_the_layer(m, lambda: objective(m, batch(), 0.3).total.backward())


def expert_weights(m: Transformer) -> None:
    mlp = m.layers[2].mlp
    assert isinstance(mlp, MoE)
    with torch.no_grad():
        mlp.experts.down_proj[5, 0, 0] = math.nan


def activation(m: Transformer) -> None:
    m.layers[1].self_attn.register_forward_hook(lambda module, args, out: out * math.inf)


def residual(m: Transformer) -> None:
    m.layers[2].post_attention_layernorm.register_forward_pre_hook(lambda module, args: (args[0] / 0.0,))


def gradient(m: Transformer) -> None:
    def spoil(module: Any, args: Any, out: Tensor) -> None:
        out.register_hook(lambda grad: grad * math.nan)

    m.layers[1].mlp.register_forward_hook(spoil)


def matrix_gradient(m: Transformer) -> None:
    m.layers[3].self_attn.o_proj.weight.register_hook(lambda grad: grad * math.inf)


def ahead(m: Transformer) -> None:
    m.mtp[0].eh_proj.weight.data.fill_(1e38)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (expert_weights, "weights of layers.2.mlp.experts.down_proj[5] are not finite"),
        (activation, "layers.1.self_attn makes numbers that are not finite"),
        (residual, "what goes into layers.2.post_attention_layernorm is not finite"),
        (gradient, "the gradient of layers.1.mlp is not finite"),
        (matrix_gradient, "the gradient of layers.3.self_attn.o_proj.weight is not finite"),
        (ahead, "what goes into mtp.0.block.input_layernorm is not finite"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_where_it_began_is_named(plant: Callable[[Transformer], None], said: str, recompute: bool) -> None:
    m = model()
    if recompute:
        apply_recompute(m)
    plant(m)
    assert str(examine(m)) == said


def test_a_healthy_model_is_left_alone() -> None:
    m, plain = model(), model()
    before = {name: module._forward_hooks.copy() for name, module in m.named_modules()}
    seen = examine(m)
    assert seen.found is None
    layers = [f"layers.{i}" for i in range(4)] + ["mtp.0"]
    assert set(layers) < set(seen.activations) and min(seen.activations.values()) > 0
    objective(plain, batch(), 0.3).total.backward()
    expected: dict[str, list[Tensor]] = {}
    for (name, ours), theirs in zip(m.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)
        parts = name.split(".")
        layer = ".".join(parts[:2]) if parts[0] in ("layers", "mtp") else parts[0]
        expected.setdefault(layer, []).append(theirs.grad.flatten())
    norms = {layer: float(torch.cat(grads).norm()) for layer, grads in expected.items()}
    assert seen.gradients == pytest.approx(norms, rel=1e-5)
    assert {name: module._forward_hooks for name, module in m.named_modules()} == before
    largest = max(norms, key=norms.__getitem__)
    assert str(seen).startswith(
        f"the largest gradient is {largest}'s ({norms[largest]:.3g}), the largest activation"
    )


def _stage(folder: Path) -> tuple[str, str]:
    """A pipeline of two: the trouble starts in the first stage's second layer, and shows in all of the second."""
    whole, rank = model(), dist.get_rank()
    activation(whole)
    span = spans(CONFIG, 2)[rank]
    part = Part(whole, [span])

    def again() -> None:
        hidden = None
        if rank:
            hidden = torch.empty(2, 12, CONFIG.hidden_size)
            dist.recv(hidden, src=0)
        losses = objective(part, batch(), 0.3, None, span, hidden)
        if losses.hidden is not None:
            dist.send(losses.hidden.detach(), dst=1)

    seen = name_the_layer(part, again)
    place = dump(folder, 7, "the loss is nan", seen, batch() if rank == 0 else None, {"lr": 0.1})
    return str(seen), str(place)


def test_all_stages_of_a_pipeline_name_the_first(tmp_path: Path) -> None:
    said = "layers.1.self_attn makes numbers that are not finite"
    assert run(2, _stage, tmp_path) == [(said, str(tmp_path / "stopped-7"))] * 2
    report = json.loads((tmp_path / "stopped-7" / "report.json").read_text())
    assert report["found"] == {"what": "output", "place": "layers.1.self_attn"}
    assert report["activations"]["layers.1"] in ("nan", "inf") and report["activations"]["layers.0"] > 0
    assert {path.name for path in (tmp_path / "stopped-7").iterdir()} == {
        "report.json",
        "batch-0.safetensors",
    }


def test_a_corrupted_batch_is_seen_and_kept(tmp_path: Path) -> None:
    """A model that has learnt a small vocabulary reads noise; the guard goes on from its state as if not stopped."""
    m, guard = model(), SpikeGuard(8.0, 8)
    optimizer = torch.optim.AdamW(m.parameters(), lr=3e-3)
    for step in range(30):
        loss = objective(m, batch(step, words=4), 0.3)
        loss.total.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0))
        assert loss.main is not None
        assert guard.check("loss", float(loss.main)) is None and guard.check("norm", norm) is None
        optimizer.step()
        optimizer.zero_grad()
    bad = batch(99)
    guard = SpikeGuard(8.0, 8, json.loads(json.dumps(guard.state())))
    again = SpikeGuard(8.0, 8, guard.state())
    main = objective(m, bad, 0.3).main
    assert main is not None
    why = guard.check("loss", float(main))
    assert why is not None and why.startswith(f"the loss jumped to {float(main):.4g} from ")
    assert again.check("loss", float(main)) == why

    seen = name_the_layer(m, lambda: objective(m, bad, 0.3).total.backward())
    place = dump(tmp_path, 31, why, seen, bad, {"loss": float(main)})
    assert torch.equal(load_file(place / "batch-0.safetensors")["tokens"], bad.tokens)
    report = json.loads((place / "report.json").read_text())
    assert (
        report["why"] == why and report["loss"] == float(main) and report["gradients"].keys() >= {"layers.3"}
    )
    message = str(stopped(31, why, seen, place))
    assert message.startswith(f"at step 31 {why}: the largest gradient is ") and str(place) in message
    assert "\n" not in message


def test_what_is_no_jump() -> None:
    """A falling loss, noise, a slow rise, and the first steps, however they are."""
    guard = SpikeGuard(8.0, 16)
    noise = torch.rand(400, generator=torch.Generator().manual_seed(0)).tolist()
    values = [1e6, 0.1, 50.0, 3.0]
    values += [2 + 8 * math.exp(-i / 20) + 0.2 * x for i, x in enumerate(noise)]
    values += [2 + 0.003 * i + 0.2 * x for i, x in enumerate(noise)]
    assert [guard.check("loss", x) for x in values] == [None] * len(values)
    assert guard.check("loss", 30.0) is not None
    for value in [1.0, 3.0, 0.5, 2.0] * 4:
        assert guard.check("norm", value) is None
    assert guard.check("norm", 10.0) is None and guard.check("norm", 1e6) is not None
