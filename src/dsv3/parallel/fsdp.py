"""Weights cut over processes: torch's FSDP2 on a model's blocks (`sharding: fsdp`).

ZeRO-1 (`dsv3.train.optimizer`) shares what the optimiser keeps, but every process has all weights and a float32
gradient for each. Here those are cut too. Of each matrix of a block a process has some rows, in float32. Just before
the block runs, forward and again backward, the rows of all are gathered, rounded to the dtype it computes in; after it
they are dropped. Gradients, of this process's tokens, are added up over the processes in float32 as soon as the block
is through, and each keeps its rows of the sum. Gathering is begun while the block before computes, on a GPU.

So a block travels three times for each microbatch, where ZeRO-1 sends gradients and weights once a step: it is for
models that do not fit otherwise, and for few and large microbatches. Nor does it go with a pipeline, whose devices
work on many microbatches at once.

Routed experts are a group of their own, cut over the processes that hold the same: all of them, or with expert
parallelism its replicas. What is cut are whole experts, since a process's part must be a run of the flattened whole
(`dsv3.parallel.sharding`). Where there are fewer experts than processes that hold them, or nobody else does, they stay
as they are, and so do the embedding, the head and what stands beside the blocks of MTP modules, which are few
numbers in a large model. The optimiser shares masters and moments of all these as in ZeRO-1.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from dsv3.model import Transformer
from dsv3.model.moe import MoE
from dsv3.model.transformer import Block
from dsv3.parallel.mesh import Mesh


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a parameter that is cut, or of its gradient, and any other as it is; shares its memory."""
    if isinstance(tensor, DTensor):
        rows: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
        return rows
    return tensor


def first_row(tensor: Tensor) -> int:
    """Number of the first of these rows, in a tensor that is cut as `torch.chunk` cuts; 0 in any other."""
    if not isinstance(tensor, DTensor):
        return 0
    rows, mesh = tensor.shape[0], tensor.device_mesh
    each = -(-rows // mesh.size())
    return min(mesh.get_local_rank() * each, rows)


class Cutter:
    """Cuts a model block by block, so that it need never be whole in memory."""

    def __init__(self, mesh: Mesh, dtype: torch.dtype) -> None:
        """dtype: what blocks compute in. All processes make one at the same time."""
        self.replicas = mesh.groups["replica"]
        self.all = init_device_mesh(self.replicas.device_type, (mesh.layout.world,), mesh_dim_names=("all",))
        self.policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        # That they must not be changed in place, which nobody does.
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(\w+\) returned a view")

    def cut(self, block: Block) -> None:
        """Cut a block's weights over the processes, in place: names stay, numbers too."""
        whole: set[nn.Parameter] = set()
        if isinstance(block.mlp, MoE):
            experts = block.mlp.experts
            if 1 < self.replicas.size() <= len(experts.down_proj):
                self._shard(experts, self.replicas, whole)
            else:
                whole = set(experts.parameters())
        self._shard(block, self.all, whole)
        _keep_routing(block)

    def join(self, model: Transformer) -> None:
        """Make the blocks of a model one, after all were cut: they gather ahead for each other, and share buffers."""
        whole = {p for p in model.parameters() if not isinstance(p, DTensor)}
        fully_shard(model, mesh=self.all, mp_policy=self.policy, ignored_params=whole)
        # Training calls this, and not `forward`. Its `routing` is empty, and so no copy of it is made.
        register_fsdp_forward_method(model, "through")

    def _shard(self, module: nn.Module, over: DeviceMesh, whole: set[nn.Parameter]) -> None:
        for parameter in set(module.parameters()) - whole:
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.float()
        sharded: Any = fully_shard(
            module, mesh=over, reshard_after_forward=True, mp_policy=self.policy, ignored_params=whole
        )
        sharded.set_gradient_divide_factor(1.0)  # losses are divided by the whole batch already
        sharded.set_force_sum_reduction_for_comms(True)  # gloo can do no other


def _keep_routing(block: Block) -> None:
    """Let `forward` append to its caller's own `routing`: FSDP's hook hands it copies of lists."""
    aside: list[Any] = []

    def hide(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        before, routing = args[:5], args[5:]  # as `Block.forward` has them
        aside.append(routing[0] if routing else kwargs.get("routing"))
        return before, {name: value for name, value in kwargs.items() if name != "routing"}

    def show(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"routing": aside.pop()}

    block.register_forward_pre_hook(hide, prepend=True, with_kwargs=True)
    block.register_forward_pre_hook(show, with_kwargs=True)
