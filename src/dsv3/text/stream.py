"""From token ids to text, one id at a time, without ever showing half a character.

A byte-level vocabulary cuts text into bytes, not characters: one Chinese character is often two or
three tokens, an emoji up to four. Decoding each token alone would print U+FFFD for every piece. The usual
remedy is to decode a window of recent ids again at each step and to hold back text that ends in U+FFFD; that
costs more the longer the window grows, and cannot tell a broken character from one that is not finished. But
a token of such a vocabulary *is* a string of bytes, so the remedy here is an incremental UTF-8 decoder: it
keeps at most three bytes back, and lets U+FFFD out as soon as it is sure that the bytes at hand can never
become a character.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable


class StreamDecoder:
    """Decodes ids as they come. All pushes and the flush, joined, equal decoding all ids at once.

    A character here is a Unicode code point: the parts of a joined emoji (a family, a flag) may come one
    after the other, as a terminal or a browser can show them, but a code point never comes in pieces.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        """token_bytes: the bytes that an id stands for, none for an id that is to be left out."""
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this id completes: often a word, sometimes none."""
        return self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the last character was never finished, else nothing."""
        return self._utf8.decode(b"", final=True)
