"""Number formats smaller than bfloat16: how weights are squeezed into them and brought back."""

from dsv3.quant.fp8 import BLOCK, dequantize_blocks, quantize_blocks

__all__ = ["BLOCK", "dequantize_blocks", "quantize_blocks"]
