"""What each process holds of a model: together the whole, and the same numbers whatever the layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dsv3.config import PRESETS, ModelConfig
from dsv3.model import Transformer
from dsv3.parallel.mesh import Mesh, make_groups
from dsv3.parallel.sharding import build, holdings
from dsv3.recipe import Layout
from tests.parallel.processes import run

LAYOUTS = {
    "experts": Layout(data=4, expert=2),
    "context": Layout(data=2, context=2, expert=4, nodes=2),
    "pipeline": Layout(pipeline=2, data=2, expert=2, schedule="dualpipe"),
    "folded": Layout(pipeline=2, data=2, schedule="dualpipev"),
}
CPU = torch.device("cpu")


def config(tied: bool = False) -> ModelConfig:
    return PRESETS["tiny"].replace(vocab_size=75, tie_word_embeddings=tied)


def whole_model(tied: bool = False) -> Transformer:
    model = Transformer(config(tied))
    model.init_weights(5)
    return model


def numbers_of(layout: Layout, tied: bool, dtype: torch.dtype) -> dict[str, Any]:
    """What this process holds, by name: where, who else, and the numbers."""
    mesh = Mesh.of(layout)
    model = build(config(tied), mesh, 5, dtype, CPU)
    held = holdings(model, mesh)
    assert all(p.dtype == dtype and p.is_leaf and p.requires_grad for p in model.parameters())
    assert all(b.dtype == torch.float32 and not b.any() for b in model.buffers())
    if tied and hasattr(model, "lm_head"):
        assert model.lm_head.weight is model.embed_tokens.weight
    return {
        name: (held[name].start, held[name].ranks, tuple(held[name].shape), p.detach().float().numpy())
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_parts_are_the_whole(name: str, tied: bool) -> None:
    layout = LAYOUTS[name]
    everyones = run(layout.world, numbers_of, layout, tied, torch.float32)
    whole = {name: p.detach() for name, p in whole_model(tied).named_parameters()}
    assert set().union(*everyones) == whole.keys()
    for key, wanted in whole.items():
        covered = np.zeros(wanted.numel(), dtype=int)
        for rank, held in enumerate(everyones):
            if key not in held:
                continue
            start, ranks, shape, here = held[key]
            assert shape == tuple(wanted.shape)
            assert np.array_equal(here.ravel(), wanted.flatten()[start : start + here.size].numpy()), key
            same = [r for r, other in enumerate(everyones) if key in other and other[key][0] == start]
            assert list(ranks) == same, f"rank {rank}, {key}"
            covered[start : start + here.size] += here.size > 0
        assert covered.min() > 0, f"nobody holds a part of {key}"
    largest = max(sum(here.size for *_, here in held.values()) for held in everyones)
    assert largest < sum(p.numel() for p in whole.values())


def test_a_part_in_bfloat16_is_the_whole_rounded() -> None:
    (held, _) = run(2, numbers_of, Layout(data=2, expert=2), False, torch.bfloat16)
    for key, wanted in whole_model().bfloat16().named_parameters():
        start, _, _, here = held[key]
        assert np.array_equal(
            here.ravel(), wanted.detach().float().flatten()[start : start + here.size].numpy()
        )


def test_one_process_holds_everything() -> None:
    model = build(config(), None, 5, torch.float32, CPU)
    for (name, one), (_, other) in zip(
        model.named_parameters(), whole_model().named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    assert all(held.start == 0 and held.ranks == (0,) for held in holdings(model, None).values())


def test_seeds_and_names_give_other_numbers() -> None:
    one, other = Transformer(config()), Transformer(config())
    one.init_weights(1)
    other.init_weights(2)
    matrices = {name: p for name, p in one.named_parameters() if p.dim() > 1}
    assert not any(torch.equal(p, other.get_parameter(name)) for name, p in matrices.items())
    stack = next(p for name, p in matrices.items() if name.endswith("experts.down_proj"))
    assert not torch.equal(stack[0], stack[1])
    spread = torch.cat([p.detach().flatten() for p in matrices.values()]).std()
    assert float(spread) == pytest.approx(config().initializer_range, rel=0.02)


def sums(wanted: list[list[tuple[int, ...]]]) -> list[float]:
    groups = make_groups(wanted[dist.get_rank()])
    assert set(groups) == set(wanted[dist.get_rank()])
    results = []
    for _, group in sorted(groups.items()):
        value = torch.tensor(10.0 ** dist.get_rank())
        dist.all_reduce(value, group=group)
        results.append(float(value))
    return results


def test_groups_are_made_by_all() -> None:
    """Overlapping ones, wanted in different orders, and one process that wants none."""
    wanted: list[list[tuple[int, ...]]] = [[(0, 2), (0, 1, 2)], [(0, 1, 2)], [(0, 1, 2), (0, 2)], []]
    assert run(4, sums, wanted) == [[111.0, 101.0], [111.0], [111.0, 101.0], []]
