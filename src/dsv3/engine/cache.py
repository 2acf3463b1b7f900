"""The latent cache: what the model keeps of the tokens it has been through, in blocks that sequences share.

For each token and layer that is one latent, `kv_lora_rank + qk_rope_head_dim` numbers, instead of keys and
values for every head (report, section 2.1.1). Latents lie in blocks of 64 tokens. A sequence takes blocks one by
one as it grows and gives them back at its end, so no memory is set aside for what may never be said.

A full block has a name: a hash of all tokens from the start of the text to its end, chained from block to block.
Who begins with the same tokens finds the block by that name and shares it (`Sequence` after `Sequence` with one
system prompt, turn after turn of one conversation). A block that nobody uses keeps its latents and its name until
its memory is needed; the one unused for longest goes first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dsv3.config import ModelConfig
from dsv3.kernels.inference import BLOCK


def allocate(
    config: ModelConfig, blocks: int, dtype: torch.dtype, device: torch.device, mtp: bool = False
) -> list[Tensor]:
    """Empty blocks for each layer, [blocks, 64, latent_dim]; `mtp` adds the layer of the first MTP module.

    They are zeros, not whatever memory held: what is masked out is multiplied by 0, and 0 times NaN is NaN. On a CPU
    the system hands memory out only as blocks are written.
    """
    shape = blocks, BLOCK, config.latent_dim

    def zeros() -> Tensor:
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        same_size = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.itemsize]
        return torch.from_numpy(np.zeros(shape, dtype=same_size)).view(dtype)

    return [zeros() for _ in range(config.num_hidden_layers + mtp)]


def chained_hash(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a block: of all that comes before it, and of its own tokens."""
    return hashlib.blake2b(array("i", tokens).tobytes(), key=before, digest_size=16).digest()


class BlockManager:
    """Which blocks are free, who else uses the others, and what is in them."""

    def __init__(self, blocks: int) -> None:
        self.total = blocks
        self._users = [0] * blocks
        self._names: list[bytes | None] = [None] * blocks
        self._by_name: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        """In the order in which they will be used again."""
        self.drafted = [False] * blocks
        """Whether a block holds latents of the MTP module too."""

    @property
    def free(self) -> int:
        """Blocks that nobody uses, remembered ones included."""
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def take(self) -> int:
        """A block to write into. There must be a free one."""
        block, _ = self._free.popitem(last=False)
        name = self._names[block]
        if name is not None:
            del self._by_name[name]
            self._names[block] = None
        self._users[block] = 1
        self.drafted[block] = False
        return block

    def find(self, name: bytes) -> int | None:
        """The block of this name, if it is still there."""
        return self._by_name.get(name)

    def is_free(self, block: int) -> bool:
        return not self._users[block]

    def share(self, block: int) -> None:
        """One more user for a block that was found."""
        if not self._users[block]:
            del self._free[block]
        self._users[block] += 1

    def name(self, block: int, name: bytes) -> None:
        """Say what a block holds now that it is full. Where another block has this name, that one keeps it, unless
        only this one holds what the MTP module needs."""
        if self._names[block] is not None:
            return
        other = self._by_name.get(name)
        if other is not None:
            if self.drafted[other] or not self.drafted[block]:
                return
            self._names[other] = None
        self._names[block] = name
        self._by_name[name] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Give blocks of a sequence back. The beginning, which others may want, is kept longest."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if not self._users[block]:
                self._free[block] = None
                if self._names[block] is None:  # nothing to remember
                    self._free.move_to_end(block, last=False)
