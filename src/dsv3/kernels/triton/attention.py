"""Latent attention of single tokens over a paged cache, split over the context (flash decoding).

In absorbed form all heads of a token share one key, a latent, and one value, the latent's first `rank` numbers. So a
program takes up to 64 heads at once: it reads each latent once, uses it for scores and for sums, and every head more is
arithmetic without memory. For V3's 128 heads that is 2 * 128 * (576 + 512) operations for the 1,152 bytes of a latent,
242 per byte, about where a Hopper GPU is bound by both; for fewer heads memory bounds. Tiles of 16 heads are for GPUs
whose shared memory does not hold 64 queries of 576 numbers.

One sequence has too few heads to fill a GPU. Therefore its context is split into parts: each program keeps a running
maximum, a sum of exponentials and a weighted sum of values (softmax needs no more), and a second kernel puts the
parts together, each weighted by its share of the sum. How many parts depends on how many tokens there are, and with it
the last bits of a result.

FlashMLA, DeepSeek's own kernel, is used where it is installed and takes the sizes (Hopper, 512 + 64, blocks of 64).
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3.kernels.triton import HALVES, processors

_LOG2E = 1.4426950408889634
_AT_ONCE = 32  # latents that a program holds


def paged_latent_attention(
    q: Tensor, cache: Tensor, tables: Tensor, owners: Tensor, positions: Tensor, rank: int, scale: float
) -> Tensor:
    """`dsv3.kernels.attention.paged_latent_attention` in bfloat16 or float16, for blocks of any multiple of 32 tokens."""
    if not fits(q, cache):
        raise ValueError(
            f"q {q.dtype} {tuple(q.shape)} and cache {cache.dtype} {tuple(cache.shape)} do not fit"
        )
    if not q.numel():
        return q.new_empty(*q.shape[:2], rank)
    if _flash_mla_takes(q, cache, rank):
        return _flash_mla(q, cache, tables, owners, positions, rank, scale)
    return _in_parts(q, cache, tables, owners, positions, rank, scale)


def _in_parts(
    q: Tensor, cache: Tensor, tables: Tensor, owners: Tensor, positions: Tensor, rank: int, scale: float
) -> Tensor:
    tokens, heads, dim = q.shape
    q, cache = q.contiguous(), cache.contiguous()
    many = heads > 16 and _has_room(q.device)
    height, warps, at_once = (64, 8, 1) if many else (16, 4, 4)  # programs that a multiprocessor holds
    groups = triton.cdiv(heads, height)
    most = tables.shape[1] * cache.shape[1]
    splits = max(1, min(at_once * processors(q.device) // (tokens * groups), most // (2 * _AT_ONCE), 64))
    out = q.new_empty(tokens, heads, rank)
    part = out if splits == 1 else q.new_empty(tokens, heads, splits, rank, dtype=torch.float32)
    lse = None if splits == 1 else q.new_empty(tokens, heads, splits, dtype=torch.float32)
    sizes = {"RANK": rank, "ROTARY": dim - rank, "R": _width(rank), "T": _width(dim - rank)}
    with torch.cuda.device_of(q):
        _part[tokens, groups, splits](
            q, cache, tables, owners, positions, part, lse, heads, tables.stride(0), scale * _LOG2E,
            BLOCK=cache.shape[1], **sizes, HEADS=height, AT_ONCE=_AT_ONCE, num_warps=warps, num_stages=2,
        )  # fmt: skip
        if splits > 1:
            _combine[tokens, heads](part, lse, out, heads, rank, splits, R=_width(rank))
    return out


def fits(q: Tensor, cache: Tensor) -> bool:
    """Whether dtypes and the size of blocks are among those that the kernel takes."""
    return q.dtype == cache.dtype and q.dtype in HALVES and cache.shape[1] % _AT_ONCE == 0


def _width(size: int) -> int:
    return max(16, int(triton.next_power_of_2(size)))


@cache
def _has_room(device: torch.device) -> bool:
    """For 64 queries and two tiles of latents: 150 KB."""
    if device.type != "cuda":
        return True
    room: int = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return room >= 160 << 10


@cache
def _flash_mla_is_installed() -> bool:
    return importlib.util.find_spec("flash_mla") is not None


def _flash_mla_takes(q: Tensor, cache: Tensor, rank: int) -> bool:
    if (q.shape[2], rank, cache.shape[1]) != (576, 512, 64) or not q.is_cuda or not _flash_mla_is_installed():
        return False
    return torch.cuda.get_device_capability(q.device) == (9, 0)


def _flash_mla(
    q: Tensor, cache: Tensor, tables: Tensor, owners: Tensor, positions: Tensor, rank: int, scale: float
) -> Tensor:
    """Each token as a sequence of its own, with a table of its own: in FlashMLA those of one sequence are its last."""
    flash_mla: Any = importlib.import_module("flash_mla")
    seen = (positions + 1).int()
    # Older versions plan here and return a plan in two tensors; newer ones ignore what they are given and plan later.
    plan = flash_mla.get_mla_metadata(seen, q.shape[1], 1)
    tables = tables[owners].contiguous()
    out, _ = flash_mla.flash_mla_with_kvcache(
        q.unsqueeze(1), cache.unsqueeze(2), tables, seen, rank, *plan, softmax_scale=scale
    )
    result: Tensor = out.squeeze(1)
    return result


# fmt: off
@triton.jit
def _part(
    q,  # [tokens, heads, rank + rotary]
    cache,  # [blocks, BLOCK, rank + rotary]
    tables, owners, positions,
    out,  # [tokens, heads, splits, rank]
    lse,  # float32 [tokens, heads, splits], log2 of the sum of exponentials, or None where there is one part
    heads, stride, scale,
    BLOCK: tl.constexpr, RANK: tl.constexpr, ROTARY: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr,  # as wide as RANK and ROTARY, or the next power of two
    HEADS: tl.constexpr, AT_ONCE: tl.constexpr,
):
    token, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    r, t = tl.arange(0, R), tl.arange(0, T)
    has_head, has_rank, has_rotary = head < heads, r < RANK, t < ROTARY
    row = token * heads + head
    q_at = q + row[:, None] * (RANK + ROTARY)
    q_rank = tl.load(q_at + r, mask=has_head[:, None] & has_rank, other=0.0)
    q_rotary = tl.load(q_at + RANK + t, mask=has_head[:, None] & has_rotary, other=0.0)

    context = tl.load(positions + token).to(tl.int32) + 1
    table = tables + tl.load(owners + token).to(tl.int64) * stride
    each = tl.cdiv(tl.cdiv(context, AT_ONCE), splits) * AT_ONCE
    stop = tl.minimum(each * (split + 1), context)
    top = tl.full((HEADS,), -float("inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    sums = tl.zeros((HEADS, R), tl.float32)
    for first in range(each * split, stop, AT_ONCE):
        at = first + tl.arange(0, AT_ONCE)
        seen = at < stop  # what lies beyond may be anything, NaN as well, which times 0 would stay NaN
        block = tl.load(table + first // BLOCK).to(tl.int64)
        latent = cache + (block * BLOCK + at % BLOCK)[:, None] * (RANK + ROTARY)
        key = tl.load(latent + r, mask=seen[:, None] if R == RANK else seen[:, None] & has_rank, other=0.0)
        rotated = tl.load(latent + RANK + t, mask=seen[:, None] & has_rotary, other=0.0)
        scores = tl.dot(q_rank, tl.trans(key))
        scores = tl.dot(q_rotary, tl.trans(rotated), scores) * scale
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weights, 1)
        sums = tl.dot(weights.to(key.dtype), key, sums * fade[:, None])
        top = higher

    where = out + ((row * splits + split)[:, None] * RANK + r)
    # A part without tokens is nothing, and must not become 0 / 0.
    sums = tl.where(total[:, None] == 0, 0.0, sums / total[:, None])
    tl.store(where, sums.to(out.dtype.element_ty), mask=has_head[:, None] & has_rank)
    if lse is not None:
        tl.store(lse + row * splits + split, top + tl.log2(total), mask=has_head)


@triton.jit
def _combine(part, lse, out, heads, rank, splits, R: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    r = tl.arange(0, R)
    top = -float("inf")
    total = 0.0
    sums = tl.zeros((R,), tl.float32)
    for split in range(splits):
        size = tl.load(lse + row * splits + split)
        higher = tl.maximum(top, size)  # finite from the first part on, which is never without tokens
        fade, share = tl.exp2(top - higher), tl.exp2(size - higher)
        numbers = tl.load(part + (row * splits + split) * rank + r, mask=r < rank, other=0.0)
        sums = sums * fade + numbers * share
        total = total * fade + share
        top = higher
    tl.store(out + row * rank + r, (sums / total).to(out.dtype.element_ty), mask=r < rank)
