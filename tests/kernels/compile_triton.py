"""Compile Triton's kernels for Hopper as V3 uses them, which needs no GPU, and print what each takes.

    python tests/kernels/compile_triton.py

A line per kernel: KiB of shared memory, registers of a thread, bytes of a thread's stack (registers that spilled), and
whether it multiplies by `wgmma`, the instruction that reaches Hopper's full rate.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsv3.kernels.triton import attention, matmul, routing

BF16, E4M3, F32, I32, I64 = "*bf16", "*fp8e4nv", "*fp32", "*i32", "*i64"


def report(name: str, kernel: Any, types: dict[str, str], warps: int, stages: int, **constants: Any) -> None:
    """types: of the arguments that are no 32-bit integers; pointers and sizes are taken to be multiples of 16."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n] not in ("constexpr", "fp32")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([cuobjdump, "-res-usage", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    how = "wgmma" if "wgmma.mma_async" in made.asm["ptx"] else "mma" if "mma.sync" in made.asm["ptx"] else "-"
    print(
        f"{name:24} shared {made.metadata.shared >> 10:3} registers {found[1]:>3} stack {found[2]:>3} {how}"
    )


def main() -> None:
    types = {"scale_a": F32, "b": E4M3, "scale_b": F32, "out": BF16, "ends": I32}
    for rows in (1, 20, 64, 100, 1000):
        few = rows <= 64
        tiles = matmul._tiles(rows, not few)
        constants = {"BLOCKS": True, "EVEN": True, "ROWS": tiles.rows, "COLS": tiles.cols}
        constants |= {"scale_a": None} if few else {}
        here = types | {"a": BF16 if few else E4M3}, *tiles[2:]
        report(f"{rows} rows", matmul._product, *here, **constants, ends=None, EXPERTS=0)
        report(f"{rows} rows an expert", matmul._product, *here, **constants, EXPERTS=256)
    for rows in (1, 1000):
        tiles = matmul._tiles(rows, False)
        constants = {"BLOCKS": False, "EVEN": True, "ROWS": tiles.rows, "COLS": tiles.cols, "EXPERTS": 256}
        here = {"a": BF16, "b": BF16, "out": BF16, "ends": I32}, *tiles[2:]
        report(
            f"{rows} rows an expert, bf16", matmul._product, *here, **constants, scale_a=None, scale_b=None
        )
    report("quantise", matmul._quantize, {"x": BF16, "codes": E4M3, "scale": F32}, 4, 3, SLICES=8)

    where = {"tables": I32, "owners": I32, "positions": I64, "scale": "fp32"}
    sizes = {"BLOCK": 64, "RANK": 512, "ROTARY": 64, "R": 512, "T": 64, "AT_ONCE": attention._AT_ONCE}
    for heads, warps in ((16, 4), (64, 8)):
        here = {"q": BF16, "cache": BF16, "out": F32, "lse": F32} | where, warps, 2
        report(f"attention, {heads} heads", attention._part, *here, **sizes, HEADS=heads)
    report("combine", attention._combine, {"part": F32, "lse": F32, "out": BF16}, 4, 3, R=512)

    numbers = {"logits": F32, "bias": F32, "scores": F32, "indices": I64, "weights": F32, "factor": "fp32"}
    groups = {"GROUPS": 8, "GROUPS_WIDTH": 8, "EACH": 32, "EACH_WIDTH": 32, "ADMITTED": 4, "TWO_BEST": True}
    choice = {"CHOSEN": 8, "CHOSEN_WIDTH": 8, "SIGMOID": True, "NORMALIZE": True}
    report("routing", routing._route, numbers, 4, 3, **groups, **choice)


if __name__ == "__main__":
    main()
