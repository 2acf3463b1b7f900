"""The latent cache: what the model keeps of the tokens it has been through.

For each token and layer that is one latent, `kv_lora_rank + qk_rope_head_dim` numbers, instead of keys and
values for every head (report, section 2.1.1). Here each running sequence has one row of a tensor
[rows, capacity, latent_dim] per layer. Rows in use are always the first ones, so that decoding reads a view
of the cache and copies nothing; the tensors grow, doubling, as sequences do, and nothing large is set aside
before it is needed.

The alternative is blocks of a few dozen tokens handed out one by one, which waste nothing on unequal lengths
and can be shared by sequences that begin alike, at the price of an indirection in every read.
"""

from __future__ import annotations

import torch

from dsv3.config import ModelConfig

FIRST_CAPACITY = 256


class LatentCache:
    """Rows of latents for up to `max_rows` sequences of up to `max_length` tokens."""

    def __init__(
        self, config: ModelConfig, max_rows: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.max_rows, self.max_length = max_rows, max_length
        empty = torch.zeros(0, 0, config.latent_dim, dtype=dtype, device=device)
        self.layers = [empty] * config.num_hidden_layers
        """For each layer [rows, capacity, latent_dim]."""

    @property
    def rows(self) -> int:
        return self.layers[-1].shape[0]

    @property
    def capacity(self) -> int:
        """Tokens that fit in a row now."""
        return self.layers[-1].shape[1]

    def reserve(self, rows: int, length: int) -> None:
        """Make room for `length` tokens in each of `rows` rows, keeping what is there.

        Layer by layer, the last one last: where memory runs out on the way, rows and capacity are still the
        old ones and everything in them is whole.
        """
        old_rows, old_capacity = self.rows, self.capacity
        if rows <= old_rows and length <= old_capacity:
            return
        if rows > old_rows:
            rows = min(max(rows, 2 * old_rows), self.max_rows)
        if length > old_capacity:
            length = min(max(length, 2 * old_capacity, FIRST_CAPACITY), self.max_length)
        rows, length = max(rows, old_rows), max(length, old_capacity)
        for i, old in enumerate(self.layers):
            # Zeros, not whatever memory held: what is masked out is multiplied by 0, and 0 times NaN is NaN.
            new = old.new_zeros(rows, length, old.shape[2])
            new[:old_rows, :old_capacity] = old[:old_rows, :old_capacity]
            self.layers[i] = new

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row over another."""
        for layer in self.layers:
            layer[target, :length] = layer[source, :length]
