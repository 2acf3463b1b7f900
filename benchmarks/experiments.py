"""Claims of the DeepSeek-V3 technical report, tried at a scale that two CPU cores can bear.

    dsv3 data build recipes/nano.yaml --material MATERIAL --out DATA
    python benchmarks/experiments.py DATA OUT                  # all of them, an hour or so on one core
    python benchmarks/experiments.py DATA OUT --tokens 1e5 --seeds 1    # a quick look

The model is nano's architecture, narrower (`MODEL`). Each variant is trained
once for each seed, from the same weights on the same tokens in the same order. Runs that are done are not done again.
What comes out is OUT/results.json, pictures in OUT/plots, and a table on standard output, whatever it shows:
`docs/experiments.md` has the figures and what they mean. `dense` has no MTP module: hold it against `no-mtp`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dsv3.data.stream import heldout
from dsv3.figures import COLORS
from dsv3.figures import figure as picture
from dsv3.files import write_whole
from dsv3.model import Transformer
from dsv3.recipe import Recipe, load_recipe
from dsv3.train.heldout import bits_per_byte
from dsv3.train.metrics import read_metrics
from dsv3.train.stages import Options, make_run, run_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "nano.yaml"
MODEL: dict[str, Any] = {
    "preset": "nano",
    "hidden_size": 128,
    "intermediate_size": 320,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "rope_scaling": None,
    "max_position_embeddings": 512,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "fp8": {"precision": "fp8"},
    "aux": {"model.aux_loss_alpha": 0.003, "stages.pretrain.gamma": 0},  # balanced by the loss alone
    "unbalanced": {"model.aux_loss_alpha": 0.0, "stages.pretrain.gamma": 0},
    "no-mtp": {"stages.pretrain.mtp": 0},
    # As many numbers at work per token: one feed-forward of 5 * 64, where base has a shared and four routed experts.
    "dense": {
        "model.first_k_dense_replace": 4,
        "model.num_nextn_predict_layers": 0,
        "stages.pretrain.mtp": 0,
    },
}


def recipe_of(variant: str, tokens: float, seed: int) -> Recipe:
    """The pretraining of one variant: warm-up, constant, cosine, as the report's in miniature."""
    pretrain = {
        "tokens": tokens,
        "sequence_length": 256,
        "batch": 8,
        "lr": [
            {"for": 0.03 * tokens, "linear": [0, 3e-3]},
            {"until": 0.6 * tokens, "constant": 3e-3},
            {"cosine": [3e-3, 2e-4]},
        ],
        "mtp": [{"until": 0.67 * tokens, "constant": 0.3}, {"constant": 0.1}],
        "gamma": [{"until": 0.95 * tokens, "constant": 0.001}, {"constant": 0}],
        "mixture": {"stories": 0.6, "novels": 0.25, "dialogues": 0.15},
    }
    changes = {"name": variant, "seed": seed, "model": dict(MODEL), "stages": {"pretrain": pretrain}}
    return load_recipe(RECIPE, changes | VARIANTS[variant])


def run(variant: str, data: Path, out: Path, tokens: float, seed: int) -> dict[str, Any]:
    """Train a variant, or find it trained, and measure it."""
    folder = out / "runs" / f"{variant}-{seed}-{tokens:g}"
    result = folder / "result.json"
    if result.exists():
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found
    recipe = recipe_of(variant, tokens, seed)
    run_recipe(recipe, data, folder, options=Options())
    trained = make_run(recipe, "pretrain", folder)
    trained.resume()
    lines = read_metrics(folder / "pretrain" / "metrics.jsonl")
    late = lines[-max(1, len(lines) // 10) :]
    found = {
        "variant": variant,
        "seed": seed,
        "tokens": lines[-1]["tokens"],
        "loss": statistics.mean(line["loss"] for line in late),
        "load": statistics.mean(line["load"] for line in late),
        "bits_per_byte": bits_per_byte(trained.model, data, 256),
        "acceptance": acceptance(trained.model, data) if len(trained.model.mtp) else None,
        "seconds": lines[-1]["seconds"],
        "curve": [[line["tokens"], line["loss"], line["load"]] for line in lines],
    }
    write_whole(result, json.dumps(found) + "\n")
    return found


@torch.inference_mode()
def acceptance(model: Transformer, data: Path, prompts: int = 48, given: int = 64, new: int = 48) -> float:
    """How often the MTP module's guess for the token after next is what the model itself then says, greedily.

    Prompts are held-out text; the model goes on with each by `new` tokens, and on these the module is asked.
    """
    held = heldout(data)
    pieces = []
    for kind in ("stories", "dialogues"):
        tokens = torch.from_numpy(held[kind].tokens.astype("int64"))
        starts = torch.arange(prompts // 2) * ((len(tokens) - given) // (prompts // 2))
        pieces += [tokens[start : start + given] for start in starts.tolist()]
    ids = torch.stack(pieces)
    for _ in range(new):
        hidden, _ = model.features(ids, mtp=False)
        ids = torch.cat((ids, model.lm_head(hidden[:, -1:]).argmax(-1)), dim=1)
    _, (ahead, *_) = model.features(ids)
    guesses = model.lm_head(ahead).argmax(-1)[:, given - 1 : -1]  # at i, for i + 2
    return float((guesses == ids[:, given + 1 :]).float().mean())


def text_bits(result: dict[str, Any]) -> float:
    """Mean bits per byte of held-out stories, novels and dialogues."""
    return statistics.mean(result["bits_per_byte"][kind] for kind in ("stories", "novels", "dialogues"))


MEASURES: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "loss": lambda r: r["loss"],
    "bits_per_byte": text_bits,
    "load": lambda r: None if r["variant"] == "dense" else r["load"],
    "acceptance": lambda r: None if r["variant"] == "no-mtp" else r["acceptance"],
}
AGAINST = {"dense": "no-mtp"}
"""What a variant is held against, where it is not `base`."""


def spread(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and standard deviation; None where a value is missing."""
    known = [v for v in values if v is not None]
    if not known or len(known) < len(values):
        return None
    return statistics.mean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def summary(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """By variant: mean and spread over seeds, and the difference from what it is held against, seed by seed."""
    table: dict[str, Any] = {}
    for variant, runs in results.items():
        row: dict[str, Any] = {name: spread([of(r) for r in runs]) for name, of in MEASURES.items()}
        against = results.get(AGAINST.get(variant, "base"))
        for name in ("loss", "bits_per_byte"):
            of = MEASURES[name]
            pairs = [] if against is None or against is runs else list(zip(runs, against, strict=True))
            row[f"{name}_apart"] = spread([of(r) / of(b) - 1 for r, b in pairs])  # type: ignore[operator]
        table[variant] = row
    return table


def markdown(table: dict[str, Any]) -> str:
    lines = [
        "| variant | training loss | apart | bits per byte | apart | busiest expert | second token accepted |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for variant, row in table.items():
        cells = [variant]
        for name in ("loss", "bits_per_byte"):
            mean, deviation = row[name]
            apart = row[f"{name}_apart"]
            cells.append(f"{mean:.4f} ± {deviation:.4f}")
            cells.append("" if apart is None else f"{apart[0]:+.2%} ± {apart[1]:.2%}")
        cells.append("" if row["load"] is None else f"{row['load'][0]:.2f}")
        cells.append("" if row["acceptance"] is None else f"{row['acceptance'][0]:.1%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def smoothed(values: Sequence[float], share: float = 0.04) -> list[float]:
    """A running mean over a share of the curve."""
    width = max(1, int(len(values) * share))
    total, out = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        out.append(total / min(i + 1, width))
    return out


def plots(results: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """A picture for each claim."""

    def lines(axes: Any, variants: Sequence[str], column: int) -> None:
        for i, variant in enumerate(v for v in variants if v in results):
            for n, r in enumerate(results[variant]):
                x = [point[0] / 1e6 for point in r["curve"]]
                y = smoothed([point[column] for point in r["curve"]])
                axes.plot(x, y, color=COLORS[i], alpha=0.8, lw=1.2, label=variant if n == 0 else None)
        axes.set_xlabel("tokens, millions")
        axes.legend()

    def figure(name: str, variants: Sequence[str], right: str, draw: Callable[[Any], None]) -> None:
        if not all(v in results for v in variants):
            return
        with picture(folder / f"{name}.png", 9, 3.6) as canvas:
            one, two = canvas.subplots(1, 2)
            lines(one, variants, 1)
            one.set_ylabel("training loss, nats per token")
            draw(two)
            two.set_ylabel(right)

    def apart(axes: Any) -> None:
        for n, (a, b) in enumerate(zip(results["fp8"], results["base"], strict=True)):
            x = [point[0] / 1e6 for point in a["curve"]]
            one, two = (smoothed([point[1] for point in r["curve"]]) for r in (a, b))
            axes.plot(
                x,
                [100 * (p / q - 1) for p, q in zip(one, two, strict=True)],
                color=COLORS[n],
                label=f"seed {n}",
            )
        axes.axhspan(-0.25, 0.25, color="0.9", zorder=0, label="the report's bound")
        axes.set_xlabel("tokens, millions")
        axes.legend()

    figure("fp8", ["base", "fp8"], "loss of fp8 over bf16, percent apart", apart)
    balance = ["base", "aux", "unbalanced"]
    figure("balance", balance, "busiest expert over the mean", lambda axes: lines(axes, balance, 2))

    def accepted(axes: Any) -> None:
        values = [r["acceptance"] * 100 for r in results["base"]]
        axes.bar([f"seed {n}" for n in range(len(values))], values, color=COLORS[0], width=0.5)
        axes.axhspan(85, 90, color="0.9", zorder=0, label="the report's, at 671B")
        axes.set_ylim(0, 100)
        axes.legend()

    figure("mtp", ["base", "no-mtp"], "second token accepted, percent", accepted)

    def bits(axes: Any) -> None:
        kinds = ("stories", "novels", "dialogues")
        for i, variant in enumerate(("base", "dense")):
            means = [statistics.mean(r["bits_per_byte"][k] for r in results[variant]) for k in kinds]
            axes.bar(
                [j + 0.36 * i for j in range(len(kinds))], means, width=0.34, color=COLORS[i], label=variant
            )
        axes.set_xticks([j + 0.18 for j in range(len(kinds))], kinds)
        axes.legend()

    figure("dense", ["base", "dense"], "bits per byte, held-out", bits)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="what `dsv3 data build recipes/nano.yaml` wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=float, default=2e6, help="of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    args = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(args.seeds):
        for variant in args.only:
            print(f"{variant}, seed {seed}", file=sys.stderr, flush=True)
            results.setdefault(variant, []).append(run(variant, args.data, args.out, args.tokens, seed))
    table = summary(results)
    write_whole(args.out / "results.json", json.dumps(table, indent=1) + "\n")
    (args.out / "plots").mkdir(exist_ok=True)
    plots(results, args.out / "plots")
    print(markdown(table))


if __name__ == "__main__":
    main()
