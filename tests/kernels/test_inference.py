"""The native kernels of inference: as near to the exact result as torch's, and the same bits in any company."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.kernels import inference, native
from dsv3.kernels.attention import latent_attention, paged_latent_attention
from dsv3.kernels.packed import Packed, dequantize, pack, panel
from dsv3.quant.fp8 import quantize_blocks

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native kernels on this machine")

BATCHES = [2, 3, 17, 64]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def by_torch(function: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        return function()


def error(ours: Tensor, exact: Tensor) -> float:
    assert ours.shape == exact.shape
    return ((ours.double() - exact).norm() / exact.norm()).item()


# Products ----------------------------------------------------------------------------------------------

SHAPES = [(16, 16), (48, 32), (96, 256), (320, 112), (64, 1040)]


@pytest.mark.parametrize("out, dim", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, 16, 33])
def test_linear(out: int, dim: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = random(rows, dim), random(out, dim, seed=1), random(out, seed=2)
    for b in (None, bias):
        exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
        ours = inference.linear(x, weight, b)
        theirs = by_torch(lambda b=b: inference.linear(x, weight, b), monkeypatch)  # type: ignore[misc]
        assert ours.dtype == torch.bfloat16
        assert error(ours, exact) <= 1.05 * error(theirs, exact) + 1e-5


@pytest.mark.parametrize("out, dim", SHAPES)
def test_a_row_of_linear_does_not_depend_on_the_others(out: int, dim: int) -> None:
    x, weight = random(max(BATCHES), dim), random(out, dim, seed=1)
    alone = torch.cat([inference.linear(row, weight) for row in x.split(1)])
    for rows in BATCHES:
        assert torch.equal(inference.linear(x[:rows], weight), alone[:rows])
        assert torch.equal(inference.linear(x[-rows:], weight), alone[-rows:])


def test_linear_on_two_threads_and_with_rows_far_apart() -> None:
    x, weight = random(64, 512), random(512, 512, seed=1)
    with threads(1):
        one = inference.linear(x, weight)
    with threads(2):
        assert torch.equal(inference.linear(x, weight), one)
    wide = torch.stack((x, torch.full_like(x, math.nan)), dim=1)
    assert torch.equal(inference.linear(wide[:, 0], weight), one)
    assert torch.equal(inference.linear(x.unflatten(0, (4, 16)), weight), one.unflatten(0, (4, 16)))
    assert inference.linear(x[:0], weight).shape == (0, 512)


def test_linear_falls_back() -> None:
    """On other dtypes, odd sizes, and where a gradient is wanted."""
    x, weight = random(3, 32), random(48, 32, seed=1)
    assert inference.is_native(weight)
    for a, w in ((x.float(), weight.float()), (x, random(47, 32)), (x[:, :31], weight[:, :31])):
        assert torch.equal(inference.linear(a, w), F.linear(a, w))
    with torch.enable_grad():
        assert inference.linear(x, weight.requires_grad_()).requires_grad


def test_what_is_not_finite_stays_in_its_row() -> None:
    x, weight = random(20, 64), random(32, 64, seed=1)
    clean = inference.linear(x, weight)
    x[7, 13] = math.nan
    out = inference.linear(x, weight)
    assert out[7].isnan().all()
    x[7] = 0
    others = [i for i in range(20) if i != 7]
    assert torch.equal(out[others], clean[others])


# Packed weights ------------------------------------------------------------------------------------------


def packed(kind: str, out: int, width: int, group: int = 32, zeros: bool = False) -> Packed:
    """A random matrix that uses every code there is."""
    g = torch.Generator().manual_seed(out * width + group)
    if kind == "fp8":
        weight, scale = quantize_blocks(torch.randn(out, width, generator=g))
        codes = torch.randint(0, 256, (out, width), generator=g, dtype=torch.uint8)
        codes[codes & 0x7F == 0x7F] = 0  # these two are no numbers
        return Packed("fp8", codes.view(weight.dtype), scale)
    bits = int(kind[3:])

    def integers(*shape: int) -> Tensor:
        return torch.randint(0, 2**bits, shape, generator=g, dtype=torch.uint8)

    scale = panel((torch.rand(out, width // group, generator=g) * 0.02 + 0.001).half())
    zero = panel(integers(out, width // group)) if zeros else None
    return Packed(f"int{bits}", pack(integers(out, width), bits), scale, zero)  # type: ignore[arg-type]


def rounded(x: Tensor, group: int) -> Tensor:
    """What the kernels for integers make of x: each group in whole steps of its largest / 127."""
    groups = x.double().unflatten(-1, (-1, group))
    step = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / step).round() * step).nan_to_num().flatten(-2)


FORMATS = [
    ("fp8", 128, False),
    *((f"int{b}", g, z) for b in (8, 4) for g in (32, 128) for z in (False, True)),
]


@pytest.mark.parametrize("kind, group, zeros", FORMATS)
@pytest.mark.parametrize("out, panels", [(16, 1), (48, 3), (272, 5)])
def test_linear_by_packed_weights(kind: str, group: int, zeros: bool, out: int, panels: int) -> None:
    weight = packed(kind, out, panels * max(group, 32) if kind != "fp8" else 112 * panels, group, zeros)
    x, bias = random(40, weight.width), random(out, seed=2)
    x[3, : weight.width // 2] = 0
    exact = (x.double() if kind == "fp8" else rounded(x, group)) @ dequantize(weight, torch.float64).T
    assert inference.is_native(weight)
    every = inference.linear(x, weight, bias)
    assert (
        error(every, exact + bias.double()) < 3e-3
    )  # half a unit of bf16 in the last place, and near-ties of x
    for rows in (1, 2, 5, 8, 9, 13, 33):  # one panel at a time or two, unpacked before or not
        assert torch.equal(inference.linear(x[:rows], weight, bias), every[:rows])
        assert torch.equal(inference.linear(x[-rows:], weight, bias), every[-rows:])


@pytest.mark.parametrize("kind, group, zeros", FORMATS)
def test_packed_weights_without_the_kernels(
    kind: str, group: int, zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = packed(kind, 48, 256, group, zeros)
    x = random(7, 256)
    theirs = by_torch(lambda: inference.linear(x, weight), monkeypatch)
    assert error(theirs, x.double() @ dequantize(weight, torch.float64).T) < 5e-3
    exact = x.double() @ dequantize(weight, torch.float64).T
    assert error(inference.linear(x.float(), weight), exact) < 1e-5  # not bf16: not for the kernels


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_what_is_not_finite_stays_in_its_row_of_packed_products(kind: str) -> None:
    x, weight = random(20, 256), packed(kind, 32, 256)
    clean = inference.linear(x, weight)
    for bad in (math.nan, math.inf):
        wrong = x.clone()
        wrong[7, 13] = bad
        out = inference.linear(wrong, weight)
        assert not out[7].isfinite().any()
        assert torch.equal(out[torch.arange(20) != 7], clean[torch.arange(20) != 7])


def test_every_number_of_fp8() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = Packed("fp8", codes.repeat(16, 1), torch.ones(1, 2))
    for i in range(256):
        x = torch.zeros(1, 256).bfloat16()
        x[0, i] = 1.0
        one = Packed("fp8", codes[i].repeat(16, 16), torch.ones(1, 1))
        out = inference.linear(x[:, :16] * 0 + torch.eye(16)[:1].bfloat16(), one)[0, 0]
        assert torch.equal(out.float(), codes[i].float()) or (out.isnan() and codes[i].float().isnan())
    assert inference.linear(torch.ones(1, 256).bfloat16(), weight).isnan().all()


# Attention over blocks -----------------------------------------------------------------------------------

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, float]

HEADS = [(4, 96, 64), (1, 48, 32), (3, 64, 32), (16, 192, 160), (80, 112, 96), (128, 576, 512)]


def case(lengths: list[int], heads: int, dim: int, rank: int, seed: int = 0, new: int = 1) -> Case:
    """Sequences of these lengths in blocks all over the cache, the last `new` tokens of each asking. What belongs to
    nobody is not a number."""
    g = torch.Generator().manual_seed(seed)
    counts = [-(-n // 64) for n in lengths]
    blocks = torch.randperm(sum(counts) + 3, generator=g).tolist()
    cache = torch.full((len(blocks), 64, dim), math.nan).bfloat16()
    tables = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int32)
    owners, positions = [], []
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        mine = [blocks.pop() for _ in range(count)]
        tables[row, :count] = torch.tensor(mine)
        latents = torch.randn(length, dim, generator=g).bfloat16()
        for i, block in enumerate(mine):
            part = latents[64 * i : 64 * i + 64]
            cache[block, : len(part)] = part
        owners += [row] * min(new, length)
        positions += range(length - min(new, length), length)
    q = torch.randn(len(owners), heads, dim, generator=g).bfloat16()
    where = tables, torch.tensor(owners, dtype=torch.int32), torch.tensor(positions)
    return q, cache, *where, rank, 2 / math.sqrt(dim)


def token_by_token(given: Case) -> Tensor:
    q, cache, tables, owners, positions, rank, scale = given
    each = [slice(i, i + 1) for i in range(len(q))]
    return torch.cat(
        [paged_latent_attention(q[i], cache, tables, owners[i], positions[i], rank, scale) for i in each]
    )


def exactly(given: Case, dtype: torch.dtype = torch.float64) -> Tensor:
    q, cache, tables, owners, positions, rank, scale = given
    out = []
    for row, owner, position in zip(q, owners.tolist(), positions.tolist(), strict=True):
        latents = cache[tables[owner].long()].flatten(0, 1)[: position + 1]
        out.append(latent_attention(row[None].to(dtype), latents[None].to(dtype), rank, scale)[0])
    return torch.stack(out)


@pytest.mark.parametrize("heads, dim, rank", HEADS)
def test_paged_attention(heads: int, dim: int, rank: int) -> None:
    given = case([1, 2, 15, 63, 64, 65, 200, 513], heads, dim, rank)
    exact, ours = exactly(given), paged_latent_attention(*given)
    assert ours.dtype == torch.bfloat16
    assert error(ours, exact) <= 1.05 * error(exactly(given, torch.bfloat16), exact)


@pytest.mark.parametrize("heads, dim, rank", HEADS)
def test_attention_of_a_token_does_not_depend_on_the_others(heads: int, dim: int, rank: int) -> None:
    g = torch.Generator().manual_seed(1)
    batches = BATCHES if heads < 20 else BATCHES[:2]
    given = case(torch.randint(1, 300, (max(batches),), generator=g).tolist(), heads, dim, rank)
    q, cache, tables, owners, positions, *rest = given
    alone = token_by_token(given)
    for n in batches:
        for some in (slice(0, n), torch.randperm(len(q), generator=g)[:n]):
            out = paged_latent_attention(q[some], cache, tables, owners[some], positions[some], *rest)
            assert torch.equal(out, alone[some])
    with threads(2):
        assert torch.equal(paged_latent_attention(*given), alone)


@pytest.mark.parametrize("heads, dim, rank", HEADS)
def test_attention_of_a_piece_of_a_prompt_is_that_of_its_tokens(heads: int, dim: int, rank: int) -> None:
    given = case([130, 7, 90], heads, dim, rank, new=40 if heads < 20 else 5)
    out = paged_latent_attention(*given)
    assert torch.equal(out, token_by_token(given))
    assert error(out, exactly(given)) < 4e-3


def test_attention_of_sequences_that_begin_in_the_same_blocks() -> None:
    q, cache, tables, owners, positions, rank, scale = case([300, 290, 310, 200, 70], 4, 96, 64, new=2)
    tables[1, :4] = tables[0, :4]
    tables[2, :2] = tables[0, :2]
    tables[4] = tables[3]
    given = q, cache, tables, owners, positions, rank, scale
    out = paged_latent_attention(*given)
    assert torch.equal(out, token_by_token(given))
    assert error(out, exactly(given)) < 4e-3


@pytest.mark.parametrize("heads, dim, rank", HEADS)
def test_threads_share_a_long_context(heads: int, dim: int, rank: int) -> None:
    """A few tokens, several segments each: the same bits from one thread, which takes them one after the other."""
    long = max(1700, 7_000_000 // (heads * (dim + rank)))  # or one thread would do all of it
    given = case([long, 512, 40, 513], heads, dim, rank, new=2)
    ours = paged_latent_attention(*given)
    assert error(ours, exactly(given)) < 4e-3
    q, cache, tables, owners, positions, *rest = given
    for few in (slice(0, 1), slice(0, 8)):
        some = q[few], cache, tables, owners[few], positions[few]
        for count in (2, 3):
            with threads(count):
                assert torch.equal(paged_latent_attention(*some, *rest), ours[few])


def test_no_tokens() -> None:
    q, cache, tables, owners, positions, *rest = case([70], 3, 64, 32)
    with threads(2):
        none = paged_latent_attention(q[:0], cache, tables, owners[:0], positions[:0], *rest)
    assert none.shape == (0, 3, 32)


def test_weights_far_apart() -> None:
    """Softmax over scores of hundreds: the highest of a later block makes all before it vanish, or the other way."""
    q, cache, tables, owners, positions, rank, _ = case([256, 256], 4, 96, 64)
    given = q, cache, tables, owners, positions, rank, 30.0
    assert error(paged_latent_attention(*given), exactly(given)) < 4e-3


def test_attention_shows_what_is_not_a_number() -> None:
    given = case([100, 100], 4, 96, 64)
    q, cache, tables = given[:3]
    cache[int(tables[1, 0]), 50, 3] = math.nan
    out = paged_latent_attention(*given)
    assert out[0].isfinite().all() and out[1].isnan().any(-1).all()
    q[0, 2, 5] = math.nan
    assert paged_latent_attention(*given)[0].isnan().all(-1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("place", [64, 512, 563, 575])
def test_attention_shows_what_is_not_a_number_in_a_later_segment(place: int) -> None:
    given = case([580, 100], 4, 96, 64)
    given[1][int(given[2][0, place // 64]), place % 64, 3] = math.nan
    out = paged_latent_attention(*given)
    assert out[0].isnan().any(-1).all() and out[1].isfinite().all()


# What layers are given -------------------------------------------------------------------------------------


def test_layers_refuse_what_they_would_misread() -> None:
    good = {"o": random(64, 32)}
    sizes = {"hidden": 64, "rank": 32, "rotary": 32}
    layer = inference.Layer.of(good, [], {}, sizes, {})
    for bad in (random(64, 32).float(), random(64, 32).T):
        with pytest.raises(ValueError, match=r"not a run of torch\.bfloat16"):
            inference.Layer.of({"o": bad}, [], {}, sizes, {})
        with pytest.raises(ValueError, match="gate is"):
            inference.Layer.of(good, [], {"gate": bad}, sizes, {})
    two = Packed("int8", pack(torch.zeros(16, 64, dtype=torch.uint8), 8), torch.ones(1, 2, 16).half())
    one = Packed("int8", two.codes, torch.ones(1, 1, 16).half())
    inference.Layer.of({"o": two, "q_b": two}, [(two, two)], {}, sizes, {})
    with pytest.raises(ValueError, match=r"different forms, \[32, 64\]"):
        inference.Layer.of({"o": two}, [(two, one)], {}, sizes, {})
    for name, size in (("hidden", 60), ("rank", 48), ("rotary", 16), ("experts", 6)):
        with pytest.raises(ValueError, match="whole vectors"):
            inference.Layer.of(good, [], {}, sizes | {name: size}, {})
    numbers = torch.arange(3)
    few = numbers.int()
    angles = torch.zeros(3, 16), torch.zeros(3, 16)
    batch = inference.Batch.of(numbers, numbers, few, few[None], angles, True)
    with pytest.raises(ValueError, match="int32 is wanted"):
        inference.Batch.of(numbers, numbers, numbers, few[None], angles, True)
    for short in ((numbers[:2], few), (numbers, few[:2])):
        with pytest.raises(ValueError, match="do not fit"):
            inference.Batch.of(numbers, *short, few[None], angles, True)
    with pytest.raises(ValueError, match="do not fit"):
        inference.Batch.of(numbers, numbers, few, few[None], (angles[0], angles[1][:2]), True)
    narrow = inference.Batch.of(
        numbers, numbers, few, few[None], (torch.zeros(3, 8), torch.zeros(3, 8)), True
    )
    with pytest.raises(ValueError, match="angles for 16 numbers does not fit"):
        inference.blocks_forward(inference.Layers([layer], [random(1, 64, 64)]), narrow, random(3, 64))
    for x, cache in ((random(2, 64), random(1, 64, 64)), (random(3, 64), random(1, 32, 64))):
        with pytest.raises(ValueError, match="does not fit"):
            inference.blocks_forward(inference.Layers([layer], [cache]), batch, x)
    with pytest.raises(ValueError, match="does not fit"):
        inference.feed_forward(layer, random(3, 32))


def test_linear_refuses_what_does_not_fit() -> None:
    weight = torch.zeros(16, 32, dtype=torch.bfloat16)
    if not inference.is_native(weight):
        pytest.skip("no native kernels on this machine")
    with pytest.raises(ValueError, match="do not fit"):
        inference.linear(torch.zeros(3, 64, dtype=torch.bfloat16), weight)
    with pytest.raises(ValueError, match="do not fit"):
        inference.linear(
            torch.zeros(3, 32, dtype=torch.bfloat16), weight, torch.zeros(8 * 4, dtype=torch.bfloat16)
        )
