"""How often each expert is chosen on a text: what expert load balancing goes by (`dsv3.planner.experts`).

Training keeps each expert's share of the tokens alike over a whole batch of its mixture. On one kind of text, such as
what people ask a server, some experts are chosen far more often than others, and a server that knows which can hold
these several times (report, section 3.4.1). So let the model read a text of that kind, in windows that know nothing of
each other, and count what its gates decide, MTP modules' included where they are loaded. Nothing is generated, and no
logits are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsv3.errors import UserError
from dsv3.figures import FAINT, figure, title
from dsv3.model import Routing, Transformer
from dsv3.train import loss

if TYPE_CHECKING:
    from dsv3.engine.llm import LLM

_ROWS = 8  # windows that are read at once
_PIECE = 1 << 16  # characters of a file that are encoded at once


@dataclass(frozen=True)
class LoadsResult:
    """Counts of a whole text."""

    tokens: int
    window: int
    layers: dict[int, list[int]]
    """For each MoE layer, by its number: how many tokens chose each expert."""

    def over_mean(self, layer: int) -> list[float]:
        """Each expert's count over the layer's mean: 1 is a fair share."""
        counts = self.layers[layer]
        mean = sum(counts) / len(counts)
        return [count / mean for count in counts]

    def to_dict(self) -> dict[str, Any]:
        """As `dsv3.planner.experts.read_loads` reads it."""
        layers = {str(layer): counts for layer, counts in self.layers.items()}
        return {"tokens": self.tokens, "window": self.window, "layers": layers}


def expert_loads(
    llm: LLM, path: Path, window: int = 512, progress: Callable[[int, int], None] | None = None
) -> LoadsResult:
    """Let a model read a text file, `window` tokens at a time, and count the experts that it chooses.

    Control tokens in the text, such as a chat format's, count as such. progress: told how many of the file's bytes are
    done. Raises UserError for a model without routed experts, a window that it is not made for, or no text.
    """
    config = llm.model.config
    if not any(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)):
        raise UserError("the model has no routed experts: there are no loads to count")
    if window > config.max_position_embeddings:
        raise UserError(
            f"--window is {window}: the model reads {config.max_position_embeddings} tokens at most"
        )
    counts: dict[int, Tensor] = {}
    tokens = 0
    for ids in _windows(llm, path, window, progress):
        _count(llm.model, ids, counts)
        tokens += ids.numel()
    if not tokens:
        raise UserError(f"{path} holds no text: give a longer one")
    return LoadsResult(tokens, window, {layer: count.tolist() for layer, count in sorted(counts.items())})


@torch.inference_mode()
def _count(model: Transformer, ids: Tensor, counts: dict[int, Tensor]) -> None:
    """Add to `counts` what ids [rows, window] choose."""
    routing: list[Routing] = []
    model.features(ids.to(model.embed_tokens.weight.device), routing=routing)
    for layer, chosen in loss.expert_loads(routing).items():
        counts[layer] = counts.get(layer, 0) + chosen.cpu()


def _windows(
    llm: LLM, path: Path, window: int, progress: Callable[[int, int], None] | None
) -> Iterator[Tensor]:
    """The tokens of a file, [rows, window] int64, the last ones in fewer rows, and one that is shorter."""
    ids: list[int] = []
    for piece, done, total in _pieces(path):
        ids += llm.tokenizer.encode(piece, add_bos=not done)
        while len(ids) >= _ROWS * window:
            yield torch.tensor(ids[: _ROWS * window]).view(-1, window)
            del ids[: _ROWS * window]
        if progress is not None:
            progress(done + len(piece.encode()), total)
    whole = len(ids) // window * window
    if whole:
        yield torch.tensor(ids[:whole]).view(-1, window)
    if len(ids) > whole:
        yield torch.tensor([ids[whole:]])


def _pieces(path: Path) -> Iterator[tuple[str, int, int]]:
    """A file's text in pieces that end with a line where there are lines; the bytes before each, and in all."""
    try:
        total, done, rest = path.stat().st_size, 0, ""
        with path.open(encoding="utf-8", newline="") as file:
            while read := file.read(_PIECE):
                text = rest + read
                end = text.rfind("\n") + 1 or len(text)
                piece, rest = text[:end], text[end:]
                yield piece, done, total
                done += len(piece.encode())
        if rest:
            yield rest, done, total
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}): convert it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def plot(result: LoadsResult, path: Path, name: str) -> None:
    """A picture of all loads over their layer's mean: layers downwards, experts to the right."""
    layers = list(result.layers)
    table = [result.over_mean(layer) for layer in layers]
    experts = len(table[0])
    with figure(path, 7.5, 1.6 + min(6.0, max(1.2, 0.16 * len(layers)))) as canvas:
        axes = canvas.subplots()
        most = max(2.0, *(max(row) for row in table))
        # White is a fair share, wherever it lies between nothing and the most.
        image = axes.imshow(table, cmap="RdBu_r", norm=_centred(most), aspect="auto", interpolation="nearest")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        every = max(1, -(-len(layers) // 16))
        axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
        axes.set_ylabel("Layer")
        axes.set_xlabel(f"Expert, 0 to {experts - 1}")
        bar = canvas.colorbar(image, ax=axes, pad=0.02)
        bar.set_label("Load over the mean", color=FAINT, fontsize=8)
        bar.outline.set_visible(False)
        note = f"{result.tokens:,} tokens, {result.window} at a time"
        title(axes, f"Loads of the experts: {name}", note)


def _centred(most: float) -> Any:
    from matplotlib.colors import TwoSlopeNorm

    return TwoSlopeNorm(1.0, vmin=0.0, vmax=most)
