"""Triton's kernels against float64: in Triton's interpreter on a CPU, on a CUDA device where there is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dsv3.config import PRESETS
from dsv3.kernels import attention as kernels_attention
from dsv3.kernels import inference, moe
from dsv3.kernels.fp8 import TILE
from dsv3.kernels.packed import Packed, dequantize
from dsv3.model.moe import Gate
from dsv3.quant import quantize_blocks
from dsv3.quant import quantize_tiles as reference_tiles

triton = pytest.importorskip("triton", reason="triton is not installed (torch's CUDA builds bring it)")

from dsv3.kernels.triton import attention, matmul, routing  # noqa: E402

# The interpreter (of 3.7 and 3.9) multiplies the bits of bfloat16 as if they were integers, and cuts off where
# bfloat16 rounds. Hence there float16 takes its place.
if torch.cuda.is_available():
    DEVICES, HALVES = [pytest.param("cuda", marks=pytest.mark.gpu)], [torch.bfloat16, torch.float16]
elif not triton.knobs.runtime.interpret:
    pytest.skip("triton was imported before TRITON_INTERPRET=1 was set", allow_module_level=True)
elif tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
    pytest.skip("the interpreter of this triton cannot loop with numpy 2.4", allow_module_level=True)
else:
    DEVICES, HALVES = [pytest.param("cpu", id="interpreter")], [torch.float16]

pytestmark = pytest.mark.parametrize("device", DEVICES)
each_half = pytest.mark.parametrize("half", HALVES, ids=str)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Products ----------------------------------------------------------------------------------------------


def codes(rows: int, k: int, seed: int) -> Tensor:
    return (random(rows, k, seed=seed) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)


def scales(*shape: int, seed: int) -> Tensor:
    """Over four orders of magnitude, so that a scale in the wrong place shows; float16 holds what comes out."""
    return 10 ** (4 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 5)


def spread(q: Tensor, scale: Tensor | None) -> Tensor:
    """What [rows, k] numbers with scales of tiles or blocks stand for, in float64."""
    x = q.double()
    if scale is not None:
        tall = 1 if scale.shape[0] == q.shape[0] else TILE
        x *= (
            scale.double()
            .repeat_interleave(tall, 0)[: q.shape[0]]
            .repeat_interleave(TILE, 1)[:, : q.shape[1]]
        )
    return x


def rounded(x: Tensor) -> Tensor:
    """What is left of [rows, k] after e4m3 tiles, whose own test is below."""
    return spread(*(t.cpu() for t in matmul.quantize_tiles(x)))


def check(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Products of two short numbers are exact in float32, sums round; tensor cores add FP8 with some 14 bits."""
    assert out.shape == (left.shape[0], right.shape[0])
    error = (out.cpu().double() - left @ right.T).abs()
    sizes = left.abs() @ right.abs().T
    allowed = (left.shape[1] + 8) * 2.0**-24 * sizes if out.device.type == "cpu" else 2.0**-11 * sizes
    if out.dtype != torch.float32:
        allowed = (
            allowed + 2.0**-8 * (left @ right.T).abs() + 2.0**-24
        )  # half of float16's smallest number, rounded up
    assert (error <= allowed).all(), f"off by {(error / allowed).max():.1f} times what rounding explains"


SHAPES = [
    (256, 256, 256),
    (5, 7, 300),
    (1, 1, 1),
    (130, 129, 64),
    (3, 300, 1280),
    (70, 1, 17),
    (1100, 300, 40),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("blocks", [False, True], ids=["tiles", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_fp8_matmul(device: str, shape: tuple[int, int, int], blocks: bool, dtype: torch.dtype) -> None:
    m, n, k = shape
    slices = -(-k // TILE)
    a, b = codes(m, k, 1), codes(n, k, 2)
    scale_a, scale_b = scales(m, slices, seed=3), scales(-(-n // TILE) if blocks else n, slices, seed=4)
    given = (t.to(device) for t in (a, scale_a, b, scale_b))
    check(matmul.fp8_matmul(*given, dtype), spread(a, scale_a), spread(b, scale_b))


def test_a_scale_applies_to_its_slice_and_sums_are_float32(device: str) -> None:
    """128 + 2^-9 has 17 bits: more than the sums of FP8 products have on tensor cores."""
    a = torch.ones(1, 256, device=device).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0**-16]], device=device)
    ones = torch.ones(1, 2, device=device)
    assert matmul.fp8_matmul(a, scale, a, ones, torch.float32).item() == 128 + 2.0**-9
    assert matmul.fp8_matmul(a, scale.flip(1), a, ones, torch.float32).item() == 128 + 2.0**-9


@pytest.mark.parametrize("cols", [1, 100, 128, 300, 2304])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_quantised_tiles_are_the_same_codes(device: str, cols: int, dtype: torch.dtype) -> None:
    x = (random(9, cols) * scales(9, 1, seed=5)).to(device, dtype)
    x[3] = 0
    x[4, 0] = 1e-42
    (ours, scale), (reference, reference_scale) = matmul.quantize_tiles(x), reference_tiles(x)
    assert ours.dtype == reference.dtype and ours.shape == reference.shape
    assert torch.equal(scale, reference_scale)
    assert torch.equal(ours.float(), reference.float())


@each_half
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 40, 64, 65, 200])
@pytest.mark.parametrize("shape", [(300, 1100), (64, 1536), (128, 100)], ids=str)
def test_linear(device: str, rows: int, shape: tuple[int, int], half: torch.dtype) -> None:
    """Few rows multiply as they are, many are rounded to e4m3 first: the reference follows."""
    n, k = shape
    x, weight = random(rows, k).to(device, half), codes(n, k, 1)
    scale = scales(-(-n // TILE), -(-k // TILE), seed=2)
    out = matmul.linear(x, weight.to(device), scale.to(device))
    assert out.dtype == half
    left = x.double().cpu() if rows <= 64 else rounded(x)
    check(out, left, spread(weight, scale))


def test_a_narrow_product_is_split_and_adds_up(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, scale = random(3, 2304).to(HALVES[0]), codes(64, 2304, 1), scales(1, 18, seed=2)
    given = [t.to(device) for t in (x, weight, scale)]
    grids = []

    class Spy:
        def __getitem__(self, grid: tuple[int, int]) -> Any:
            grids.append(grid)
            return product[grid]

    product = matmul._product
    monkeypatch.setattr(matmul, "_product", Spy())
    for processors in (0, 1, 2, 100):
        monkeypatch.setattr(matmul, "processors", lambda _, count=processors: count)
        check(matmul.linear(*given), x.double(), spread(weight, scale))
    assert grids == [(1, 1), (1, 2), (1, 4), (1, 4)]  # of 18 slices four programs take 5, 5, 5 and 3


COUNTS = [[3, 0, 17, 1], [0, 0, 5], [1], [90, 0, 170, 1]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("kind", ["half", "fp8"])
@pytest.mark.parametrize("shape", [(96, 160), (129, 300)], ids=str)
@each_half
def test_grouped(
    device: str, counts: list[int], kind: str, shape: tuple[int, int], half: torch.dtype
) -> None:
    (n, k), experts = shape, len(counts)
    rows = random(sum(counts), k).to(device, half)
    ends = torch.tensor(counts).cumsum(0).int()
    if kind == "half":
        weights, scale = random(experts, n, k, seed=1).to(half), None
    else:
        weights = torch.stack([codes(n, k, e) for e in range(experts)])
        scale = scales(experts, -(-n // TILE), -(-k // TILE), seed=2)
    moved = None if scale is None else scale.to(device)
    out = matmul.grouped(rows, weights.to(device), ends.to(device), moved)
    assert out.dtype == half
    left = rounded(rows) if scale is not None and len(rows) > 64 * experts else rows.double().cpu()
    first = 0
    for e, count in enumerate(counts):
        here = slice(first, first + count)
        check(out[here], left[here], spread(weights[e], None if scale is None else scale[e]))
        first += count


def test_no_rows(device: str) -> None:
    weights, scale = (
        torch.zeros(2, 5, 130, device=device).to(torch.float8_e4m3fn),
        torch.ones(2, 1, 2, device=device),
    )
    rows, ends = torch.zeros(0, 130, device=device).to(HALVES[0]), torch.zeros(2, device=device).int()
    assert matmul.grouped(rows, weights, ends, scale).shape == (0, 5)
    assert matmul.linear(rows, weights[0], scale[0]).shape == (0, 5)
    assert matmul.quantize_tiles(rows)[1].shape == (0, 2)


# Attention ---------------------------------------------------------------------------------------------

Paged = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, float]


def paged(
    heads: int, rank: int, rotary: int, lengths: list[int], tokens: list[int], block: int = 64
) -> Paged:
    """The last `tokens` of sequences of `lengths`, in blocks in no order, with NaN wherever nothing was written."""
    each = [-(-length // block) for length in lengths]
    dim = rank + rotary
    cache = torch.full((sum(each) + 3, block, dim), float("nan"))
    places = torch.randperm(len(cache), generator=torch.Generator().manual_seed(0)).int().split([*each, 3])
    tables = torch.zeros(len(lengths), max(each) + 2, dtype=torch.int32)
    for i, (length, place) in enumerate(zip(lengths, places, strict=False)):
        tables[i, : len(place)] = place
        for j, b in enumerate(place.tolist()):
            size = min(block, length - j * block)
            cache[b, :size] = random(size, dim, seed=100 * i + j)
    owners = torch.tensor([i for i, count in enumerate(tokens) for _ in range(count)]).int()
    positions = torch.tensor([n - c + j for n, c in zip(lengths, tokens, strict=True) for j in range(c)])
    q = random(len(owners), heads, dim, seed=7).to(HALVES[0])
    return q, cache.to(q.dtype), tables, owners, positions, rank, dim**-0.5


def exactly(
    q: Tensor, cache: Tensor, tables: Tensor, owners: Tensor, positions: Tensor, rank: int, scale: float
) -> Tensor:
    out = []
    for i in range(len(q)):
        latents = cache[tables[owners[i]]].flatten(0, 1)[: positions[i] + 1].double()
        out.append((q[i].double() @ latents.T * scale).softmax(-1) @ latents[:, :rank])
    return torch.stack(out)


@pytest.mark.parametrize(
    "given",
    [
        paged(2, 512, 64, [70, 1, 300], [1, 1, 1]),
        paged(16, 256, 32, [130], [2]),
        paged(17, 96, 32, [200, 64], [1, 3]),  # a second group of heads, a rank that is no power of two
        paged(70, 32, 16, [65, 63], [1, 1]),
        paged(1, 16, 8, [40], [40], block=32),  # every position of a sequence
        paged(3, 32, 16, [2000], [1]),
    ],
    ids=["v3", "two tokens", "odd rank", "many heads", "each position", "long"],
)
@pytest.mark.parametrize("parts", ["one", "many", "as it comes"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where a part is empty
def test_paged_attention(device: str, given: Paged, parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if parts != "as it comes":
        monkeypatch.setattr(attention, "processors", lambda _: 0 if parts == "one" else 1000)
    q, cache, tables, owners, positions, rank, scale = given
    wide = torch.cat((tables, torch.full_like(tables, -1)), 1)[
        :, : tables.shape[1]
    ]  # not contiguous, as in the model
    where = (t.to(device) for t in (q, cache, wide, owners, positions))
    out = attention.paged_latent_attention(*where, rank, scale)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:2], rank)
    exact = exactly(*given)
    # bf16 has 8 bits: weights are rounded to it before they multiply, and the sum is at the end
    torch.testing.assert_close(out.cpu().double(), exact, rtol=2**-8, atol=2**-8 * float(exact.abs().max()))


def test_no_tokens_and_what_does_not_fit(device: str) -> None:
    q, cache, tables, owners, positions, rank, scale = paged(2, 32, 16, [70], [1])
    where = tuple(t.to(device) for t in (cache, tables, owners[:0], positions[:0]))
    assert attention.paged_latent_attention(q[:0].to(device), *where, rank, scale).shape == (0, 2, 32)
    with pytest.raises(ValueError, match=r"float32"):
        attention.paged_latent_attention(q.float(), cache.float(), tables, owners, positions, rank, scale)


def test_what_flash_mla_is_given(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that holds us to what the library's interface asserts."""
    given = paged(2, 512, 64, [70, 1, 300], [1, 1, 2])
    plan = object()

    def with_kvcache(
        q: Tensor, k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, head_dim_v: int,
        tile_scheduler_metadata: object, num_splits: None, softmax_scale: float, causal: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        tokens, queries, _, dim = q.shape
        assert queries == 1 and dim == 576 and head_dim_v == 512 and k_cache.shape[1:] == (64, 1, 576)
        assert block_table.dtype == cache_seqlens.dtype == torch.int32 and block_table.is_contiguous()
        assert len(block_table) == len(cache_seqlens) == tokens
        assert tile_scheduler_metadata is plan and num_splits is None
        each = torch.arange(tokens)
        out = exactly(q[:, 0], k_cache[:, :, 0], block_table, each, cache_seqlens - 1, 512, softmax_scale)
        return out.unsqueeze(1).to(q.dtype), None

    module: Any = types.ModuleType("flash_mla")
    module.flash_mla_with_kvcache, module.get_mla_metadata = with_kvcache, lambda *_: (plan, None)
    monkeypatch.setitem(sys.modules, "flash_mla", module)
    assert torch.equal(attention._flash_mla(*given), exactly(*given).to(HALVES[0]))


# Routing -----------------------------------------------------------------------------------------------


def by_hand(
    logits: Tensor, bias: Tensor | None, chosen: int, sigmoid: bool, groups: int, topk_group: int, two_best: bool,
    normalize: bool, factor: float,
) -> tuple[Tensor, list[list[int]], Tensor]:  # fmt: skip
    """Each token by itself, with Python's sorting, in float64."""
    scores = logits.double().sigmoid() if sigmoid else logits.double().softmax(-1)
    picks, weights = [], []
    for score in scores:
        biased = (score if bias is None else score + bias.double()).tolist()
        admitted = range(len(biased))
        if groups:
            each = len(biased) // groups
            of = [range(g * each, (g + 1) * each) for g in range(groups)]
            value = [sum(sorted((biased[e] for e in g), reverse=True)[: 1 + two_best]) for g in of]
            best = sorted(range(groups), key=value.__getitem__, reverse=True)[:topk_group]
            admitted = [e for g in best for e in of[g]]
        pick = sorted(admitted, key=biased.__getitem__, reverse=True)[:chosen]
        weight = score[pick]
        picks.append(pick)
        weights.append((weight / weight.sum() if normalize else weight) * factor)
    return scores, picks, torch.stack(weights)


ROUTINGS = [  # experts, chosen, sigmoid, groups, topk_group, two_best, normalize, factor
    (256, 8, True, 8, 4, True, True, 2.5),  # DeepSeek-V3
    (160, 6, False, 8, 3, False, False, 16.0),  # DeepSeek-V2
    (64, 6, False, 0, 0, False, False, 1.0),  # and its Lite
    (24, 5, True, 3, 2, True, True, 1.5),
    (7, 7, True, 0, 0, True, False, 1.0),
    (1, 1, False, 0, 0, True, True, 1.0),
    (6, 2, True, 6, 3, False, True, 1.0),  # groups of one
]


@pytest.mark.parametrize("case", ROUTINGS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_routing(device: str, case: tuple[Any, ...], biased: bool) -> None:
    experts, *rest = case
    logits = random(19, experts) * 2
    bias = random(experts, seed=1) * 2 - 1 if biased else None  # scores below 0 among them
    scores, indices, weights = routing.route(
        logits.to(device), bias if bias is None else bias.to(device), *rest
    )
    exact_scores, picks, exact_weights = by_hand(logits, bias, *rest)
    assert indices.dtype == torch.int64 and indices.tolist() == picks
    torch.testing.assert_close(scores.cpu().double(), exact_scores, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weights.cpu().double(), exact_weights, rtol=1e-5, atol=1e-7)


def test_ties_and_undefined_logits_still_choose_different_experts(device: str) -> None:
    logits = torch.zeros(3, 16, device=device)
    logits[1] = float("nan")
    logits[2, 3] = float("nan")
    _, indices, weights = routing.route(logits, None, 4, groups=4, topk_group=2)
    assert indices[0].tolist() == [0, 1, 2, 3]
    assert indices[2, 0] == 3, "what is not a number is seen"
    assert all(len(set(row)) == 4 and set(row) <= set(range(16)) for row in indices.tolist())
    torch.testing.assert_close(weights[0].cpu(), torch.full((4,), 0.25))


def test_what_cannot_be_routed(device: str) -> None:
    logits = torch.zeros(2, 12, device=device)
    with pytest.raises(ValueError, match="4 of 12 experts in 1 of 4 groups"):
        routing.route(logits, None, 4, groups=4, topk_group=1)
    with pytest.raises(ValueError, match="in 5 of 5 groups"):
        routing.route(logits, None, 2, groups=5)
    assert routing.route(logits[:0], None, 2)[1].shape == (0, 2)


# The ways to the kernels -------------------------------------------------------------------------------


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU are treated like a GPU's: what decides asks `usable`, and the interpreter takes them."""
    from dsv3.kernels import triton as package

    monkeypatch.setattr(package, "usable", lambda *_: True)
    monkeypatch.setattr(package, "usable_fp8", lambda *_: True)


@pytest.mark.usefixtures("dispatched")
@pytest.mark.parametrize(
    "changes",
    [
        {"topk_method": "noaux_tc", "n_group": 4, "topk_group": 2},
        {"topk_method": "noaux_tc", "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "scoring_func": "softmax"},
        {"topk_method": "greedy", "scoring_func": "softmax", "model_type": "deepseek_v2"},
    ],
    ids=lambda changes: changes["topk_method"],
)
def test_a_gate_is_the_same_fused(device: str, changes: dict[str, Any]) -> None:
    config = replace(PRESETS["tiny"], n_routed_experts=16, num_experts_per_tok=4, hidden_size=16, **changes)
    gate = Gate(config, 16).to(device)
    gate.weight.data.copy_(random(16, 16))
    if gate.e_score_correction_bias is not None:
        gate.e_score_correction_bias.copy_(random(16, seed=3))
    x = random(33, 16, seed=1).to(device)
    scores, indices, weights = (t.detach() for t in gate(x))  # with gradient: torch's way
    with torch.no_grad():
        ours = gate(x)
    torch.testing.assert_close(ours[0], scores)
    order, ours_order = indices.argsort(-1), ours[1].argsort(-1)
    assert torch.equal(ours[1].gather(1, ours_order), indices.gather(1, order))
    torch.testing.assert_close(ours[2].gather(1, ours_order), weights.gather(1, order))


@pytest.mark.usefixtures("dispatched")
@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_routed_experts_in_fp8(device: str, tokens: int) -> None:
    experts, width, hidden = 6, 96, 160
    packs = []
    for shape in ((2 * width, hidden), (hidden, width)):
        pairs = [quantize_blocks(random(*shape, seed=e) / shape[1] ** 0.5) for e in range(experts)]
        packs.append(Packed("fp8", *(torch.stack(parts).to(device) for parts in zip(*pairs, strict=True))))
    x = random(tokens, hidden).to(device, HALVES[0])
    indices = torch.stack([torch.randperm(experts)[:2] for _ in range(tokens)]).to(device)
    weights = torch.rand(tokens, 2).to(device)
    with torch.no_grad():
        out = moe.routed_experts(x, indices, weights, *packs)
    exact = moe.routed_experts(
        x.double().cpu(),
        indices.cpu(),
        weights.double().cpu(),
        *(dequantize(p).double().cpu() for p in packs),
    )
    error = (out.cpu().double() - exact).norm() / exact.norm()
    assert out.dtype == x.dtype and error < (0.01 if tokens < 200 else 0.06), error


@pytest.mark.usefixtures("dispatched")
def test_a_packed_matrix_multiplies_in_fp8(device: str) -> None:
    weight, bias = (
        Packed("fp8", *(t.to(device) for t in quantize_blocks(random(200, 300)))),
        random(200, seed=2),
    )
    x = random(2, 3, 300, seed=1).to(device, HALVES[0])
    exact = torch.nn.functional.linear(x.double().cpu(), dequantize(weight).double().cpu(), bias.double())
    with torch.no_grad(), patch.object(matmul, "linear", wraps=matmul.linear) as ours:
        out = inference.linear(x, weight, bias.to(device, x.dtype))
    assert ours.called
    torch.testing.assert_close(out.cpu().double(), exact, rtol=2**-7, atol=0.05)


@pytest.mark.usefixtures("dispatched")
def test_attention_goes_there(device: str) -> None:
    given = tuple(t.to(device) if isinstance(t, Tensor) else t for t in paged(4, 32, 16, [80], [2]))
    with torch.no_grad(), patch.object(attention, "paged_latent_attention", return_value="ours") as ours:
        assert kernels_attention.paged_latent_attention(*given) == "ours"
        q, cache, *rest = given
        assert (
            kernels_attention.paged_latent_attention(q.float(), cache.float(), *rest).dtype == torch.float32
        )
    assert ours.call_count == 1


# What the interpreter cannot show ----------------------------------------------------------------------


@pytest.mark.slow
def test_the_kernels_compile_for_hopper(device: str) -> None:
    """Where tiles are tall enough they multiply by wgmma; hardly a register spills; shared memory suffices."""
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).with_name("compile_triton.py")
    run = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [
        re.fullmatch(r"(.*?) +shared +(\d+) registers +\d+ stack +(\d+) (\S+)", x)
        for x in run.stdout.splitlines()
    ]
    found = {line[1]: (int(line[2]), int(line[3]), line[4]) for line in lines if line}
    assert len(found) == len(lines) == 17, run.stdout
    assert all(shared <= 227 and stack <= 32 for shared, stack, _ in found.values()), run.stdout
    others = {name: how for name, (_, _, how) in found.items() if how != "wgmma"}
    assert others == {"quantise": "-", "attention, 16 heads": "mma", "combine": "-", "routing": "-"}
