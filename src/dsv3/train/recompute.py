"""Recomputation of RMSNorm and of MLA's up-projections in the backward pass (report, section 3.2.3).

Autograd keeps whatever the backward pass will read. In attention that is mostly queries, keys and values of
all heads: for DeepSeek-V3, 128 * (192 + 192 + 128) numbers per token and layer, all of them made from the
2,112 numbers that come out of the down-projections. So keep those, and compute the rest again when it is
needed. Likewise a norm's output is a cheap function of its input, which the residual stream keeps anyway.

Two means, both torch's own:

- Attention runs in a checkpoint with a rule of what to keep: the results of the down-projections and of
  attention itself. What lies between them (norms of the latents, up-projections, rotation, concatenation) is
  done again. The output matrix comes last, and nothing after it needs recomputing, so neither does its
  product.
- The two norms of a block have several readers (attention, gate, shared experts). While a block runs, a hook
  looks at every tensor that is kept; if it is such a norm's output, what is kept instead is how to make it
  anew. The gate, which reads its input in float32, is a checkpoint of its own, so that this copy is not kept
  either.

Recomputation runs the same code on the same numbers, so gradients are the same to the bit. It costs the
up-projections' products once more. Of MTP modules the block is treated alike; the input of `eh_proj`, two
norms side by side, is kept. With `apply_fp8`, before or after this, what the FP8 layers outside attention
keep is FP8 and stays so; computing SwiGLU again is theirs (`dsv3.train.fp8`). torch's compiler is kept
out of attention and gates then, since it would choose for itself what to keep. Where attention is the native
kernel's (a CPU without AMX), torch sees no operator whose result it could keep, and attention is done again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

import dsv3.kernels.fp8  # noqa: F401  (makes the operator that is named below)
from dsv3.model.attention import LatentAttention
from dsv3.model.moe import Gate
from dsv3.model.transformer import Block

Kind = TypeVar("Kind", bound=nn.Module)

_aten = torch.ops.aten
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
_DOWN = ("q_a_proj", "q_proj", "kv_a_proj_with_mqa")  # what attention's input goes through
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, torch.ops.dsv3.fp8_matmul.default}


def apply_recompute(model: nn.Module) -> None:
    """Recompute norms and MLA's up-projections of every block in the backward pass, in place. Once per model."""
    for module in model.modules():
        if isinstance(module, Block):
            block = _turn(module, RecomputedBlock)
            block.norm_outputs = []
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.register_forward_hook(block.remember)
        elif isinstance(module, LatentAttention):
            attention = _turn(module, RecomputedAttention)
            attention.keeping = False
            for name, linear in attention.named_children():
                if name in _DOWN or name == "o_proj":
                    linear.register_forward_pre_hook(attention.enter)
                    linear.register_forward_hook(attention.leave)
        elif isinstance(module, Gate):
            _turn(module, RecomputedGate)


def _turn(module: nn.Module, kind: type[Kind]) -> Kind:
    """The same module with the methods of a subclass: parameters, names and hooks stay."""
    module.__class__ = kind
    return cast(Kind, module)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _checkpoint(
    forward: Callable[..., Any], *args: Any, contexts: Callable[[], Any] = noop_context_fn
) -> Any:
    """Run a module's forward pass and keep its inputs only, and what a selective context says."""
    if not torch.is_grad_enabled():
        return forward(*args)
    # Nothing here draws random numbers.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


class RecomputedGate(Gate):
    """A gate that keeps only its input."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = _checkpoint(super().forward, x)
        return result


class RecomputedAttention(LatentAttention):
    """Attention that keeps its input, the results of some products, and what attention itself needs."""

    keeping: bool
    """Whether the product that runs now is one whose result is kept."""

    def forward(self, *args: Any) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, self._policy)
        out: Tensor = _checkpoint(super().forward, *args, contexts=contexts)
        return out

    def enter(self, linear: nn.Module, args: Any) -> None:
        # A recomputation ends when the last kept tensor is there. torch's linear keeps its input before it
        # multiplies, so the last product, o_proj's, is never done again; other linear layers keep it afterwards.
        self.keeping = linear is not self.o_proj or type(linear) is not nn.Linear

    def leave(self, linear: nn.Module, args: Any, out: Tensor) -> None:
        self.keeping = False

    def _policy(self, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = op in _ATTENTION or (self.keeping and op in _PRODUCTS)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class RecomputedBlock(Block):
    """A block that keeps, instead of its norms' outputs, how to compute them."""

    norm_outputs: list[tuple[Tensor, Callable[[], Tensor]]]
    """While a forward pass runs: the outputs so far, and what makes each anew."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            with saved_tensors_hooks(self._pack, self._unpack):
                return super().forward(*args, **kwargs)
        finally:
            self.norm_outputs.clear()

    def remember(self, norm: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        if torch.is_grad_enabled():
            self.norm_outputs.append((out, partial(_again, norm, args[0].detach())))

    def _pack(self, kept: Tensor) -> Tensor | Callable[[], Tensor]:
        for out, again in self.norm_outputs:
            if kept.untyped_storage().data_ptr() == out.untyped_storage().data_ptr():
                return partial(_view, again, kept.size(), kept.stride(), int(kept.storage_offset()))
        return kept

    @staticmethod
    def _unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()


def _again(norm: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():  # which decides how the norm is computed
        out: Tensor = norm.forward(x.requires_grad_())  # without the hook
    return out.detach()


def _view(again: Callable[[], Tensor], size: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
    return again().as_strided(size, stride, offset)
