"""Text to hide something in: sentences without end, about nothing in particular.

The built-in text is made of parts of our own, so that no model has read it and its length has no limit. It holds no
digit and none of the places that needles are about: the fact that is hidden stands in it once. A long book of one's
own, `from_file`, is nearer to what a model will be used on, and says something else only where
it is one that the model knows by heart.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path

from dsv3.errors import UserError

Filler = Callable[[random.Random], Iterator[str]]
"""Gives sentences for ever, each with the space before it."""

_WHO = (
    "An old gardener",
    "The baker's daughter",
    "A tired postman",
    "The youngest of the brothers",
    "A woman with a red umbrella",
    "The tailor from the next street",
    "Nobody but the shepherd",
    "A travelling musician",
    "The teacher and her pupils",
    "Somebody's grey cat",
    "The fisherman's wife",
    "A boy with muddy boots",
    "The new neighbour",
    "An honest merchant",
    "The girl who sold flowers",
    "A small brown dog",
    "The carpenter's apprentice",
    "An uncle of mine",
    "The two painters",
    "A nurse on her way home",
)
_DID = (
    "carried a basket of apples",
    "told a story about the winter",
    "waited for a letter",
    "mended a broken chair",
    "looked for a lost glove",
    "sang an old song",
    "watched the clouds go by",
    "shared some bread and cheese",
    "planted a row of beans",
    "counted the birds on the fence",
    "forgot to close the gate",
    "drank a cup of warm milk",
    "asked the way to the market",
    "painted a door green",
    "folded the clean sheets",
    "picked mushrooms",
    "wrote a few lines in a notebook",
    "bought a ball of blue wool",
    "fell asleep in the shade",
    "laughed about the weather",
)
_WHERE = (
    "along the quiet road",
    "before the rain began",
    "under the chestnut tree",
    "while the kettle was boiling",
    "at the edge of the field",
    "as the sun went down",
    "in the garden behind the house",
    "without saying a word",
    "on a bench near the pond",
    "after a long breakfast",
    "beside the open window",
    "and thought no more of it",
    "on the other side of the hill",
    "as everybody did in spring",
    "although it was getting late",
    "where the path turns to the left",
    "until the bell rang",
    "with great care",
    "just as the year before",
    "to the surprise of the others",
)


def built_in(rng: random.Random) -> Iterator[str]:
    """Sentences from 8,000 that the parts make."""
    while True:
        yield f" {rng.choice(_WHO)} {rng.choice(_DID)} {rng.choice(_WHERE)}."


def from_file(path: Path) -> Filler:
    """The sentences of a text file, from one chosen at random on, and from its start again after its end.

    Raises UserError if there is no text in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}): convert it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    sentences = [s for s in _SENTENCE.findall(text) if s.strip()]
    if not sentences:
        raise UserError(f"{path} holds no text: give a longer one")
    if not sentences[0][0].isspace():
        sentences[0] = f" {sentences[0]}"

    def filler(rng: random.Random) -> Iterator[str]:
        return islice(cycle(sentences), rng.randrange(len(sentences)), None)

    return filler


_SENTENCE = re.compile(r"\s*[^.!?。！？]*[.!?。！？]+[\"'”’」』)]*|\s*[^.!?。！？]+")
