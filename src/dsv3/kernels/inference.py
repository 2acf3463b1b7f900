"""All layers over their caches in one call: what makes answering quick on a CPU.

A step of decoding touches every weight for a few tokens only. Through torch it is some forty operations a layer on
tensors so small that the operations themselves are most of the time. Here they are one call in C++
(`inference.cpp`), norms, products, rotary turn, cache and attention, routing and experts, for bf16 weights on x86
CPUs. Weights may be packed (`dsv3.kernels.packed`): they are unpacked in registers.

What a token gets does not depend on its company: every sum is taken in an order that follows from the token's own
row, so the same context gives the same bits in a batch of any size, in one piece or in many, on any number of
threads. torch's products do not promise that; they are a reference for tests here, and the way for everything else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.kernels import triton
from dsv3.kernels.native import call, pointer, usable
from dsv3.kernels.packed import Packed, Weight, dequantize

BLOCK = 64
"""Tokens to a block of the cache: DeepSeek's and FlashMLA's number."""

_VECTOR = 16


_KINDS = {"bf16": 0, "fp8": 1, "int8": 2, "int4": 3}


class Matrix(ctypes.Structure):
    """A matrix as products.h sees it. Whoever makes one keeps the tensors alive."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("kind", "out", "width", "group")),
    )

    @property
    def form(self) -> int:
        """In which the input is wanted: 0 as it is, 1 as FP8 pairs its numbers, else rounded in groups of so many."""
        return 0 if self.kind == _KINDS["bf16"] else 1 if self.kind == _KINDS["fp8"] else int(self.group)

    @classmethod
    def of(cls, weight: Weight) -> Matrix:
        """Of [out, in] in bf16 or packed. ValueError if the native kernels cannot take it."""
        kind: str
        dtypes: tuple[torch.dtype, ...]
        if isinstance(weight, Packed):
            kind, group, tensors = weight.kind, weight.group, weight.tensors
            dtypes = (weight.codes.dtype, torch.float32 if kind == "fp8" else torch.float16, torch.uint8)
        else:
            kind, group, tensors, dtypes = "bf16", 0, [weight], (torch.bfloat16,)
        for tensor, dtype in zip(tensors, dtypes, strict=False):
            if not tensor.is_cpu or not tensor.is_contiguous() or tensor.dtype != dtype:
                raise ValueError(
                    f"{tensor.dtype} on {tensor.device}, strides {tensor.stride()}, not a run of {dtype}"
                )
        if len(weight.shape) != 2 or any(size % _VECTOR for size in weight.shape):
            raise ValueError(f"a matrix {tuple(weight.shape)} is not whole vectors")
        where = [tensor.data_ptr() for tensor in tensors]
        return cls(*where, *[None] * (3 - len(where)), _KINDS[kind], *weight.shape, group)


class Layer(ctypes.Structure):
    """A layer's matrices and sizes as inference.cpp sees them. Whoever makes one keeps the tensors alive."""

    # fmt: off
    MATRICES = ("q_a", "q_b", "kv_a", "o", "gate_up", "down")
    VECTORS = (
        "input_norm", "q_a_bias", "q_a_norm", "kv_a_bias", "kv_norm", "kv_b", "o_bias", "post_norm", "gate", "gate_bias",
    )
    SIZES = (
        "hidden", "heads", "nope", "rotary", "v_dim", "rank", "q_rank",
        "width", "experts", "expert_width", "chosen", "sigmoid", "groups", "topk_group", "two_best", "normalize",
        "form",
    )
    # fmt: on
    FRACTIONS = ("eps", "latent_eps", "scale", "factor")
    _fields_ = (
        *((name, Matrix) for name in MATRICES),
        ("routed", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in VECTORS),
        *((name, ctypes.c_int64) for name in SIZES),
        *((name, ctypes.c_float) for name in FRACTIONS),
    )
    table: ctypes.Array[Matrix] | None

    @classmethod
    def of(
        cls,
        matrices: Mapping[str, Weight],
        routed: Sequence[tuple[Weight, Weight]],
        vectors: Mapping[str, Tensor],
        sizes: Mapping[str, int],
        fractions: Mapping[str, float],
    ) -> Layer:
        """Matrices [out, in] in bf16 or packed; routed: each expert's gate_up and down; vectors in bf16, and with them
        the small matrices kv_b and gate (`gate_bias` float32). Those that the layer lacks are left out.

        width: of the shared experts together, or of the dense feed-forward, 0 if there is neither; groups: 0 where
        all experts may be chosen; two_best: groups are ranked by the sum of their two best rather than by the best;
        normalize: a token's weights are divided by their sum; factor: what they are multiplied by; scale: of the
        softmax. ValueError if the native kernels cannot take these sizes or tensors.
        """
        for name, tensor in vectors.items():
            wanted = torch.float32 if name == "gate_bias" else torch.bfloat16
            if tensor.dtype != wanted or not tensor.is_cpu or not tensor.is_contiguous():
                raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, strides {tensor.stride()}")
        ours = {name: Matrix.of(weight) for name, weight in matrices.items()}
        table = (Matrix * (2 * len(routed)))(*(Matrix.of(weight) for pair in routed for weight in pair))
        forms = {m.form for m in (*ours.values(), *table)} - {0}
        if len(forms) > 1:
            raise ValueError(f"matrices that want their input in different forms, {sorted(forms)}")
        layer = cls(
            **ours, **{name: tensor.data_ptr() for name, tensor in vectors.items()}, **sizes, **fractions
        )
        layer.table = table if routed else None
        layer.routed = ctypes.addressof(table) if routed else None
        layer.form = forms.pop() if forms else 0
        whole = (
            layer.hidden,
            layer.nope,
            layer.v_dim,
            layer.q_rank,
            layer.width,
            layer.experts,
            layer.expert_width,
        )
        if (
            any(size % _VECTOR for size in whole)
            or layer.rank % (2 * _VECTOR)
            or layer.rotary % (2 * _VECTOR)
        ):
            raise ValueError(f"sizes {dict(sizes)} are not whole vectors")
        return layer


class Batch(ctypes.Structure):
    """New tokens of several sequences and where their past lies, as inference.cpp sees them."""

    _fields_ = (
        ("tokens", ctypes.c_int64),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("owners", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("most_blocks", ctypes.c_int64),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("interleave", ctypes.c_int64),
    )
    tensors: tuple[Tensor, ...]
    rotary: int

    @classmethod
    def of(
        cls,
        positions: Tensor,
        slots: Tensor,
        owners: Tensor,
        tables: Tensor,
        angles: tuple[Tensor, Tensor],
        interleave: bool,
    ) -> Batch:
        """positions, slots (where each token's latent goes: block * 64 + place): [tokens] int64; owners: [tokens] int32,
        rows of tables [sequences, most blocks] int32; angles: cos and sin of the positions, [tokens, rotary / 2] float32;
        interleave: as in `rotate`."""
        tensors = (positions, slots, owners, tables, *angles)
        dtypes = (torch.int64, torch.int64, torch.int32, torch.int32, torch.float32, torch.float32)
        each, turns = positions.shape, angles[0].shape
        fit = slots.shape == owners.shape == each and angles[1].shape == turns and turns[:1] == each
        if not fit or len(each) != 1 or len(turns) != 2 or tables.dim() != 2:
            shapes = [tuple(x.shape) for x in tensors]
            raise ValueError(f"positions, slots, owners, tables and angles of shapes {shapes} do not fit")
        for x, dtype in zip(tensors, dtypes, strict=True):
            if x.dtype != dtype or not x.is_contiguous() or not x.is_cpu:
                raise ValueError(f"{x.dtype} {tuple(x.shape)} on {x.device} where {dtype} is wanted")
        where = [x.data_ptr() for x in tensors]
        batch = cls(len(positions), *where[:4], tables.shape[1], *where[4:], int(interleave))
        batch.tensors = tensors  # which live as long as their addresses are here
        batch.rotary = 2 * angles[0].shape[1]
        return batch


def _check_cache(layer: Layer, cache: Tensor) -> None:
    fits = cache.shape[1:] == (BLOCK, layer.rank + layer.rotary) and cache.dtype == torch.bfloat16
    if not fits or not cache.is_contiguous():
        raise ValueError(f"a cache {tuple(cache.shape)} of {cache.dtype} does not fit the layer")


def _check(layer: Layer, batch: Batch, x: Tensor) -> None:
    if x.shape != (batch.tokens, layer.hidden) or batch.rotary != layer.rotary:
        raise ValueError(f"x {tuple(x.shape)} with angles for {batch.rotary} numbers does not fit the layer")


class Layers:
    """Layers one after the other and their caches, [blocks, 64, latent_dim] in bf16 each, for `blocks_forward`."""

    def __init__(self, layers: Sequence[Layer], caches: Sequence[Tensor]) -> None:
        for layer, cache in zip(layers, caches, strict=True):
            _check_cache(layer, cache)
        self.count = len(layers)
        pointers = ctypes.c_void_p * self.count
        self.layers = pointers(*map(ctypes.addressof, layers))
        self.caches = pointers(*(cache.data_ptr() for cache in caches))
        self.alive = layers, caches  # as long as their addresses are here


def blocks_forward(layers: Layers, batch: Batch, x: Tensor) -> None:
    """Whole layers on x [tokens, hidden], in place; the tokens' latents are written to each layer's cache."""
    for layer in layers.alive[0][:1]:
        _check(layer, batch, x)
    call("blocks_forward", layers.layers, layers.caches, layers.count, batch, x)


def feed_forward(layer: Layer, x: Tensor) -> None:
    """A layer's second half on x [tokens, hidden], in place: norm, experts (or the dense feed-forward), residual."""
    if x.dim() != 2 or x.shape[1] != layer.hidden:
        raise ValueError(f"x {tuple(x.shape)} does not fit the layer")
    call("feed_forward", layer, x, len(x))


def attention_half(layer: Layer, batch: Batch, x: Tensor, cache: Tensor) -> None:
    """A layer's first half on x [tokens, hidden], in place; cache [blocks, 64, latent_dim] is the layer's own."""
    _check_cache(layer, cache)
    _check(layer, batch, x)
    call("attention_half", layer, batch, x, cache)


def route(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """The experts that x [tokens, hidden], as it is before a layer's second half, chooses there, and what they weigh:
    int32 and float32 [tokens, chosen]."""
    if x.dim() != 2 or x.shape[1] != layer.hidden or layer.table is None:
        raise ValueError(f"x {tuple(x.shape)} does not fit the layer, or it has no experts")
    chosen = torch.empty(len(x), layer.chosen, dtype=torch.int32)
    weights = torch.empty(len(x), layer.chosen)
    call("route", layer, x, len(x), chosen, weights)
    return chosen, weights


def feed_forward_wave(
    layer: Layer, x: Tensor, chosen: Tensor, weights: Tensor, sums: Tensor, experts: range
) -> None:
    """`feed_forward` for those of the experts that `route` chose which have their turn, the others' matrices not being
    read: from call to call the ranges follow each other and cover all experts. The last call changes x.

    sums [tokens, hidden] float32 keeps what is added up meanwhile; the result is the same bits as in one call."""
    shape = (len(x), layer.chosen)
    if sums.shape != x.shape or x.shape[1] != layer.hidden or not shape == chosen.shape == weights.shape:
        raise ValueError(f"x {tuple(x.shape)}, choices {tuple(chosen.shape)} and sums {tuple(sums.shape)}")
    call("feed_forward_wave", layer, x, len(x), chosen, weights, sums, experts.start, experts.stop)


def is_native(weight: Weight) -> bool:
    """Whether `linear` with this weight goes the native way for bf16 inputs on a CPU."""
    return usable() and _matrix(weight) is not None


def _matrix(weight: Weight) -> Matrix | None:
    """What the native kernels are given of it; None if they cannot take it."""
    try:
        return Matrix.of(weight)
    except ValueError:
        return None


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., in] @ weight [out, in].T (+ bias [out]): `F.linear`, but weight may be packed, and where it is native a
    row's result is the same bits whatever other rows there are. Where gradients are wanted it is torch's."""
    tensors = [t for t in (x, weight, bias) if isinstance(t, Tensor)]
    training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if isinstance(weight, Packed) and not training and triton.takes_fp8(x, weight):
        from dsv3.kernels.triton import matmul

        product = matmul.linear(x.reshape(-1, x.shape[-1]), weight.codes, weight.scale)
        return (product if bias is None else product + bias).view(*x.shape[:-1], weight.out)
    native = not training and usable(*([x] if bias is None else [x, bias]))
    matrix = _matrix(weight) if native else None
    if matrix is None:
        return F.linear(x, dequantize(weight, x.dtype) if isinstance(weight, Packed) else weight, bias)
    if x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit, or the bias does not"
        )
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    call("linear", pointer(rows), rows.stride(0), matrix, bias, out, len(rows))
    return out
