"""The architecture of DeepSeek-V3 and nothing else: no devices, processes, files or servers."""

from dsv3.model.flat import FlatBatch, Piece
from dsv3.model.moe import Routing
from dsv3.model.transformer import ModelOutput, Transformer

__all__ = ["FlatBatch", "ModelOutput", "Piece", "Routing", "Transformer"]
