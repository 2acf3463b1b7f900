"""Checkpoints in Hugging Face's format, in and out, and out as GGUF: streamed, checked, and never a pickle."""

from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.gguf import export_gguf
from dsv3.checkpoint.hub import resolve
from dsv3.checkpoint.pretrained import DeepseekV3
from dsv3.checkpoint.reader import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "DeepseekV3", "convert", "export_gguf", "open_checkpoint", "resolve"]
