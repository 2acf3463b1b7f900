"""What FP8 storage costs a model: its logits on a text, before and after 128 x 128 blocks.

    python benchmarks/fp8_error.py MODEL TEXT --tokens 2048

MODEL is a checkpoint in bf16 or fp32 (FP8 has paid already), TEXT a file of plain text. Both models compute in
float32; only the weights that released FP8 files quantise differ. Printed are

- the relative difference of the logits: norm(after - before) / norm(before);
- how often the likeliest next token stays the same;
- the mean KL divergence of the distributions, in nats per token, and what the loss becomes.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor

from dsv3 import DeepseekV3
from dsv3.checkpoint.names import table
from dsv3.quant.fp8 import dequantize_blocks, quantize_blocks
from dsv3.text import Tokenizer


@torch.no_grad()
def in_fp8(model: DeepseekV3) -> DeepseekV3:
    """A copy whose weights have been through FP8 and back."""
    after = copy.deepcopy(model)
    state = after.state_dict()
    for piece in table(model.config).values():
        if piece.in_fp8:
            weight = piece.of(state[piece.parameter])
            weight.copy_(dequantize_blocks(*quantize_blocks(weight)))
    return after


def compare(before: Tensor, after: Tensor, ids: Tensor) -> dict[str, float]:
    """Logits [tokens, vocab] of the two models, and the ids [tokens] they were read from."""
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    following = ids[1:, None]
    return {
        "relative difference": float((after - before).norm() / before.norm()),
        "same likeliest token": float((before.argmax(-1) == after.argmax(-1)).float().mean()),
        "KL divergence": float((p.exp() * (p - q)).sum(-1).mean()),
        "loss before": float(-p[:-1].gather(1, following).mean()),
        "loss after": float(-q[:-1].gather(1, following).mean()),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a checkpoint's folder")
    parser.add_argument("text", type=Path, help="a file of plain text")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text that are read, in rows of 512")
    args = parser.parse_args()
    model = DeepseekV3.from_pretrained(args.model, torch.float32)
    tokenizer = Tokenizer.from_pretrained(args.model)
    ids = torch.tensor(tokenizer.encode(args.text.read_text(encoding="utf-8")))[: args.tokens]
    rows = ids[: len(ids) // 512 * 512].view(-1, 512)
    before, after = model(rows).logits, in_fp8(model)(rows).logits
    found = [compare(a, b, row) for a, b, row in zip(before, after, rows, strict=True)]
    for name in found[0]:
        print(f"{name:22} {sum(f[name] for f in found) / len(found):.4f}")


if __name__ == "__main__":
    main()
