"""`dsv3 inspect`: what a model is made of, what it weighs, and what fits on this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.table import Table

from dsv3.cli.tables import grid, table
from dsv3.cli.units import count
from dsv3.errors import size

if TYPE_CHECKING:  # the module imports torch, which --help does not wait for
    from dsv3.checkpoint.summary import Pool, Summary, Weights

_COST = (
    "nano decodes 8 times slower, reads prompts 2.5 times and trains 1.5 times; packed weights become bf16"
)
"""What torch alone takes, on a processor that multiplies bf16: `DSV3_NATIVE=0 dsv3 bench nano`, docs/benchmarks.md."""
_OLDER = "without instructions for bf16 and bytes: about twice the time where memory is not the limit"

LONG = 131_072  # the context that the technical report extends to, 128K


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="nano, a checkpoint's folder, a GGUF file, a config.json, a hub id (weights are not downloaded), or a "
            "preset: v3-671b, v3-16b, tiny.",
            metavar="MODEL",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON; sizes in bytes.")] = False,
) -> None:
    """Look into a model: parameters by part, memory in each format, cache, what fits on this machine."""
    from dsv3.checkpoint.summary import memory_pools, summarize

    summary, pools = summarize(model), memory_pools()
    if as_json:
        print(json.dumps(_facts(model, summary, pools), indent=2))
        return
    gpus = sorted(pools[1:], key=lambda pool: pool.free)  # a model runs on one: the roomiest is of interest
    shown = [*pools[:1], *gpus[-1:]]
    about = _architecture(model, summary), _parameters(summary), _weights(summary, shown), _cache(summary)
    Console(highlight=False).print(*(Group("", section) for section in (*about, _machine(shown))))


def _facts(model: str, summary: Summary, pools: list[Pool]) -> dict[str, Any]:
    from dsv3.kernels.native import instructions, missing

    kernels = instructions()
    files, per_token = summary.files, summary.cache_per_token()
    return {
        "model": model,
        "config": summary.config.to_dict(),
        "parameters": {
            "main": {"total": summary.main.total, "active": summary.main.active},
            "with_mtp": summary.with_mtp,
            "in_files": summary.in_files,
            "parts": [{"name": p.name, "total": p.total, "active": p.active} for p in summary.parts],
        },
        "weights": [{"format": w.format, "memory": w.memory, "disk": w.disk} for w in summary.weights],
        "cache": {"dtype": "bf16", "per_token": per_token, "at_128k": per_token * LONG},
        "native_kernels": kernels,
        "without_native_kernels": None if kernels else {"reason": missing(), "cost": _COST},
        "machine": [
            {
                "name": pool.name,
                "total": pool.total,
                "free": pool.free,
                "context": {w.format: summary.context_in(pool, w) for w in summary.weights if _runs(w, pool)},
            }
            for pool in pools
        ],
        "checkpoint": files
        and {
            "folder": str(files.folder),
            "format": files.format,
            "tensors": files.tensors,
            "shards": files.shards,
            "bytes": files.nbytes,
        },
    }


def _architecture(model: str, summary: Summary) -> Table:
    c, files, yarn = summary.config, summary.files, summary.config.rope_scaling
    dense = sum(not c.is_moe_layer(layer) for layer in range(c.num_hidden_layers))
    query = f"query rank {c.q_lora_rank}" if c.q_lora_rank else "queries not compressed"
    rows = {
        "parameters": f"{count(summary.main.total)}, {count(summary.main.active)} of them active per token",
        "layers": f"{c.num_hidden_layers}, {dense} of them dense; width {c.hidden_size:,}",
        "attention": f"{c.num_attention_heads} heads of {c.qk_nope_head_dim}+{c.qk_rope_head_dim}, values "
        f"{c.v_head_dim}; {query}, latent {c.kv_lora_rank}+{c.qk_rope_head_dim}",
    }
    if c.n_routed_experts is not None:
        groups = f" from {c.topk_group} of {c.n_group} groups" if c.limits_groups else ""
        rows["experts"] = (
            f"{c.num_experts_per_tok} of {c.n_routed_experts} routed{groups}, {c.n_shared_experts or 0} "
            f"shared; width {c.moe_intermediate_size:,}, {c.scoring_func}"
        )
    rows["context"] = f"{c.max_position_embeddings:,} tokens"
    if yarn is not None:
        rows["context"] += f", YaRN x{yarn.factor:g} from {yarn.original_max_position_embeddings:,}"
    rows["vocabulary"] = f"{c.vocab_size:,} tokens"
    if files is not None:
        shards = "1 file" if files.shards == 1 else f"{files.shards} files"
        rows["checkpoint"] = f"{files.format}, {size(files.nbytes)}, {files.tensors:,} tensors in {shards}"
        rows["folder"] = str(files.folder)
    return grid(model, rows)


def _parameters(summary: Summary) -> Table:
    made = table("Parameters", "", "total", "active per token")
    parts = [part for part in summary.parts if part is not summary.mtp]
    for part in parts:
        made.add_row(part.name, f"{part.total:,}", f"{part.active:,}", end_section=part is parts[-1])
    made.add_row("main model", f"{summary.main.total:,}", f"{summary.main.active:,}", style="bold")
    if summary.mtp is not None:
        made.add_row(summary.mtp.name, f"{summary.mtp.total:,}", f"{summary.mtp.active:,}")
        made.add_row("together", f"{summary.with_mtp:,}")
        made.add_row("as files count them", f"{summary.in_files:,}")
        made.caption = "Files repeat embedding and head in each MTP module; in memory they are shared."
    return made


def _weights(summary: Summary, pools: list[Pool]) -> Table:
    columns = [f"in {size(pool.free)} of free {pool.name}" for pool in pools]
    made = table("Weights: in memory without MTP, on disk with it", "", "memory", "disk", *columns)
    for weights in summary.weights:
        fits = (_fits(summary, weights, pool) for pool in pools)
        made.add_row(weights.format, size(weights.memory), size(weights.disk), *fits)
    made.caption = (
        "Memory: what is loaded to generate. Disk: with MTP, and but for integers its copies. Half of what is then free "
        "is for the cache."
    )
    return made


def _runs(weights: Weights, pool: Pool) -> bool:
    """Whether weights stay in this format where they are loaded. Elsewhere packed ones become bf16."""
    from dsv3.kernels.native import library

    return not weights.packed or (pool.name == "RAM" and library() is not None)


def _fits(summary: Summary, weights: Weights, pool: Pool) -> str:
    if not _runs(weights, pool):
        return "made bf16"
    room = summary.context_in(pool, weights)
    return "does not fit" if room is None else f"fits, {room:,} tokens"


def _cache(summary: Summary) -> Table:
    per_token, longest = summary.cache_per_token(), summary.config.max_position_embeddings
    rows = {"one token": f"{per_token:,} bytes"}
    for length in sorted({LONG, longest}):
        name = "128K tokens" if length == LONG else f"{length:,} tokens"
        rows[name] = size(length * per_token) + (", beyond its context" if length > longest else "")
    return grid("Latent cache in bf16", rows)


def _machine(pools: list[Pool]) -> Table:
    from dsv3.kernels.native import instructions, missing

    kernels = instructions()
    rows = {"native kernels": f"none: {missing()}" if kernels is None else kernels}
    if kernels is None:
        rows["what that costs"] = _COST
    elif "VNNI" not in kernels or "BF16" not in kernels:
        rows["native kernels"] += f", {_OLDER}"
    rows |= {pool.name: f"{size(pool.free)} of {size(pool.total)} free" for pool in pools}
    return grid("This machine", rows)
