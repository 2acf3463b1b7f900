"""The routed experts of a checkpoint, one by one: where each lies, how large it is in memory, and how it gets there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.checkpoint.direct import DirectReader
from dsv3.checkpoint.pretrained import layouts
from dsv3.checkpoint.reader import Checkpoint, Layout
from dsv3.checkpoint.shards import ALIGNED
from dsv3.kernels.packed import Packed, Weight, empty
from dsv3.model.stored import Expert

Key = tuple[int, int]
"""A layer, and the number of an expert there."""


class ExpertFiles:
    """The routed experts of a checkpoint, each of which can be read into a slot."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        """dtype: of experts that are not packed, once they are in memory."""
        self.checkpoint, self.dtype = checkpoint, dtype
        routed = [name for name in checkpoint.pieces if ".mlp.experts." in name]
        self._reader = DirectReader(checkpoint, routed, forget=True)
        self._names: dict[Key, list[tuple[bool, slice | None, str]]] = {}
        self._forms: dict[int, tuple[_Form, _Form]] = {}
        layout = layouts(checkpoint)
        of_layer: dict[int, dict[bool, _Form]] = {}
        for name in routed:
            piece = checkpoint.pieces[name]
            layer, expert = int(name.split(".")[2]), piece.index[0]
            is_down = piece.parameter.endswith("down_proj")
            assert isinstance(expert, int)
            half = piece.index[1] if len(piece.index) > 1 else None
            assert half is None or isinstance(half, slice)
            self._names.setdefault((layer, expert), []).append((is_down, half, name))
            rows, width = piece.shape
            shape = torch.Size((rows if half is None else 2 * rows, width))
            of_layer.setdefault(layer, {})[is_down] = _Form(shape, layout.get(piece.parameter), dtype)
        for layer, forms in of_layer.items():
            self._forms[layer] = forms[False], forms[True]
        known = list(dict.fromkeys(self._forms.values()))
        self.form = {layer: known.index(forms) for layer, forms in self._forms.items()}
        """A number for each layer; those with the same one have experts that lie alike."""

    @property
    def layers(self) -> int:
        return len(self._forms)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def slot_bytes(self) -> int:
        """Of a slot that is large enough for any of them."""
        return max(sum(form.nbytes for form in forms) for forms in self._forms.values())

    def lay(self, layer: int, slot: Tensor) -> Expert:
        """An expert of this layer in the memory of a slot, uint8 [slot_bytes]."""
        gate_up, down = self._forms[layer]
        return Expert(gate_up.lay(slot), down.lay(slot[gate_up.nbytes :]))

    @torch.inference_mode()  # as whoever asks; reading happens on other threads
    def read(self, key: Key, into: Expert) -> int:
        """Read one expert; returns how many bytes that took. Good from several threads at once."""
        got = 0
        for is_down, half, name in self._names[key]:
            matrix = into.down if is_down else into.gate_up
            if half is not None:
                matrix = matrix.rows(half.start, half.stop) if isinstance(matrix, Packed) else matrix[half]
            got += self._reader.read(name, matrix)
        return got


@dataclass(frozen=True)
class _Form:
    """How a matrix lies in a slot."""

    shape: torch.Size
    layout: Layout | None
    dtype: torch.dtype

    @property
    def tensors(self) -> list[Tensor]:
        """Without memory."""
        device = torch.device("meta")
        if self.layout is None:
            return [torch.empty(self.shape, dtype=self.dtype, device=device)]
        kind, group, zero = self.layout
        return empty(kind, self.shape, group, zero, device).tensors

    @property
    def nbytes(self) -> int:
        return sum(-(-t.nbytes // ALIGNED) * ALIGNED for t in self.tensors)

    def lay(self, memory: Tensor) -> Weight:
        parts, first = [], 0
        for tensor in self.tensors:
            part = memory[first : first + tensor.nbytes]
            parts.append(part.view(tensor.dtype).view(tensor.shape))
            first += -(-tensor.nbytes // ALIGNED) * ALIGNED
        return parts[0] if self.layout is None else Packed(self.layout[0], *parts)
