"""A layer over a cache in one call: what makes answering quick on a CPU.

A step of decoding touches every weight for a few tokens only. Through torch it is some forty operations a layer on
tensors so small that the operations themselves are most of the time. Here a layer is two calls in C++
(`inference.cpp`), norms, products, rotary turn, cache and attention, routing and experts, for bf16 weights on CPUs
that multiply bf16.

What a token gets does not depend on its company: every sum is taken in an order that follows from the token's own
row, so the same context gives the same bits in a batch of any size, in one piece or in many, on any number of
threads. torch's products do not promise that; they are a reference for tests here, and the way for everything else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.kernels.native import call, pointer, usable

BLOCK = 64
"""Tokens to a block of the cache: DeepSeek's and FlashMLA's number."""

_VECTOR = 16


class Layer(ctypes.Structure):
    """A layer's matrices and sizes as inference.cpp sees them. Whoever makes one keeps the tensors alive."""

    # fmt: off
    MATRICES = (
        "input_norm", "q_a", "q_a_bias", "q_a_norm", "q_b", "kv_a", "kv_a_bias", "kv_norm", "kv_b", "o", "o_bias",
        "post_norm", "gate_up", "down", "gate", "gate_bias", "experts_gate_up", "experts_down",
    )
    SIZES = (
        "hidden", "heads", "nope", "rotary", "v_dim", "rank", "q_rank",
        "width", "experts", "expert_width", "chosen", "sigmoid", "groups", "topk_group", "two_best", "normalize",
    )
    # fmt: on
    FRACTIONS = ("eps", "latent_eps", "scale", "factor")
    _fields_ = (
        *((name, ctypes.c_void_p) for name in MATRICES),
        *((name, ctypes.c_int64) for name in SIZES),
        *((name, ctypes.c_float) for name in FRACTIONS),
    )

    @classmethod
    def of(
        cls, matrices: Mapping[str, Tensor], sizes: Mapping[str, int], fractions: Mapping[str, float]
    ) -> Layer:
        """Matrices [out, in] and vectors in bf16 (`gate_bias` float32); those that the layer lacks are left out.

        width: of the shared experts together, or of the dense feed-forward, 0 if there is neither; groups: 0 where
        all experts may be chosen; two_best: groups are ranked by the sum of their two best rather than by the best;
        normalize: a token's weights are divided by their sum; factor: what they are multiplied by; scale: of the
        softmax. ValueError if the native kernels cannot take these sizes (`Layer.fits`) or tensors.
        """
        for name, tensor in matrices.items():
            wanted = torch.float32 if name == "gate_bias" else torch.bfloat16
            if tensor.dtype != wanted or not tensor.is_cpu or not tensor.is_contiguous():
                raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, strides {tensor.stride()}")
        layer = cls(**{name: tensor.data_ptr() for name, tensor in matrices.items()}, **sizes, **fractions)
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
        for x, dtype in zip(tensors, dtypes, strict=True):
            if x.dtype != dtype or not x.is_contiguous() or not x.is_cpu:
                raise ValueError(f"{x.dtype} {tuple(x.shape)} on {x.device} where {dtype} is wanted")
        where = [x.data_ptr() for x in tensors]
        batch = cls(len(positions), *where[:4], tables.shape[1], *where[4:], int(interleave))
        batch.tensors = tensors  # which live as long as their addresses are here
        return batch


def block_forward(layer: Layer, batch: Batch, x: Tensor, cache: Tensor) -> None:
    """A whole layer on x [tokens, hidden], in place; the tokens' latents are written to cache [blocks, 64, latent_dim]."""
    if x.shape != (batch.tokens, layer.hidden) or cache.shape[1:] != (BLOCK, layer.rank + layer.rotary):
        raise ValueError(f"x {tuple(x.shape)} and cache {tuple(cache.shape)} do not fit the layer")
    call("block_forward", layer, batch, x, cache)


def feed_forward(layer: Layer, x: Tensor) -> None:
    """A layer's second half on x [tokens, hidden], in place: norm, experts (or the dense feed-forward), residual."""
    if x.dim() != 2 or x.shape[1] != layer.hidden:
        raise ValueError(f"x {tuple(x.shape)} does not fit the layer")
    call("feed_forward", layer, x, len(x))


def is_native(weight: Tensor) -> bool:
    """Whether `linear` with this weight goes the native way for inputs that are like it."""
    return weight.dim() == 2 and weight.shape[0] % _VECTOR == 0 and weight.is_contiguous() and usable(weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] @ weight [out, in].T (+ bias [out]): `F.linear`, but where it is native a row's result is the same
    bits whatever other rows there are. Where gradients are wanted it is torch's."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if training or not is_native(weight) or not usable(*tensors):
        return F.linear(x, weight, bias)
    if x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit, or the bias does not"
        )
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    call(
        "linear", pointer(rows), rows.stride(0), weight, bias, out, len(rows), rows.shape[1], weight.shape[0]
    )
    return out
