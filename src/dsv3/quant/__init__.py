"""Number formats smaller than bfloat16: how weights are squeezed into them and brought back."""

from dsv3.quant.fp8 import (
    BLOCK,
    dequantize_blocks,
    dequantize_e5m6,
    dequantize_tiles,
    quantize_blocks,
    quantize_e5m6,
    quantize_tiles,
)
from dsv3.quant.integers import quantize

__all__ = [
    "BLOCK",
    "dequantize_blocks",
    "dequantize_e5m6",
    "dequantize_tiles",
    "quantize",
    "quantize_blocks",
    "quantize_e5m6",
    "quantize_tiles",
]
