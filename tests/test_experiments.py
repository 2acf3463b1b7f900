"""`benchmarks/experiments.py`: its variants are what they say, and its table adds up."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from dsv3.checkpoint.summary import summarize

PATH = Path(__file__).parents[1] / "benchmarks" / "experiments.py"


@pytest.fixture(scope="module")
def experiments() -> Any:
    spec = importlib.util.spec_from_file_location("experiments", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(variant: str, seed: int, loss: float) -> dict[str, Any]:
    bits = dict.fromkeys(("stories", "novels", "dialogues"), loss / 2)
    return {
        "variant": variant,
        "seed": seed,
        "loss": loss,
        "load": 1.5,
        "bits_per_byte": bits,
        "acceptance": None if variant == "dense" else 0.6,
        "curve": [[1000 * n, 9.0 - n, 2.0] for n in range(1, 6)],
    }


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_the_table_and_the_pictures(experiments: Any, seeds: int, tmp_path: Path) -> None:
    losses = {"base": 4.0, "fp8": 4.01, "aux": 4.1, "unbalanced": 4.0, "no-mtp": 4.2, "dense": 4.41}
    results = {v: [result(v, s, loss + 0.1 * s) for s in range(seeds)] for v, loss in losses.items()}
    table = experiments.summary(results)
    assert table["base"]["loss_apart"] is None
    first_apart = table["fp8"]["loss_apart"][0]
    assert first_apart == pytest.approx(sum(0.01 / (4 + 0.1 * s) for s in range(seeds)) / seeds)
    against_no_mtp = sum(0.21 / (4.2 + 0.1 * s) for s in range(seeds)) / seeds
    assert table["dense"]["loss_apart"][0] == pytest.approx(against_no_mtp), "neither has MTP"
    lines = experiments.markdown(table).splitlines()
    assert len(lines) == 2 + len(losses) and "nan" not in " ".join(lines)
    experiments.plots(results, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"fp8.png", "balance.png", "mtp.png", "dense.png"}


def test_variants_differ_as_they_say(experiments: Any) -> None:
    recipes = {name: experiments.recipe_of(name, 1e5, 0) for name in experiments.VARIANTS}
    base = recipes["base"]
    assert recipes["fp8"].precision == "fp8" and base.precision == "bf16"
    assert recipes["aux"].model.aux_loss_alpha > 10 * base.model.aux_loss_alpha
    assert recipes["aux"].phases["pretrain"].gamma.pieces[0].start == 0
    assert recipes["fp8"].phases == base.phases and recipes["fp8"].model == base.model


def test_dense_has_as_many_active_parameters(experiments: Any, tmp_path: Path) -> None:
    main = {}
    for name in ("no-mtp", "dense"):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(experiments.recipe_of(name, 1e5, 0).config("pretrain").to_dict()))
        main[name] = summarize(str(path)).main.active
    assert main["dense"] == pytest.approx(main["no-mtp"], rel=0.01)
