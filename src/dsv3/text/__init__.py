"""Between text and token ids: a checkpoint's tokenizer, its chat format, and decoding as a stream."""

from dsv3.text.chat import Message
from dsv3.text.stream import StreamDecoder
from dsv3.text.tokenizer import Tokenizer

__all__ = ["Message", "StreamDecoder", "Tokenizer"]
