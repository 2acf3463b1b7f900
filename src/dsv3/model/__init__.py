"""The architecture of DeepSeek-V3 and nothing else: no devices, processes, files or servers."""

from dsv3.model.attention import FlatBatch, Span
from dsv3.model.moe import Routing
from dsv3.model.transformer import ModelOutput, Transformer

__all__ = ["FlatBatch", "ModelOutput", "Routing", "Span", "Transformer"]
