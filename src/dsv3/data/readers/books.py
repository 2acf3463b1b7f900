"""Books as plain text: their stories without title pages, contents lists, notes and licence tails.

A small model is what it reads. Old books as archives keep them begin with a title page, a preface and a list of
contents, and end in notes and in the archive's licence; all of that goes, paragraph by paragraph, with a count for
each reason. What is left is cut into documents of a page or two, at chapters and between paragraphs, so that a
filter or a duplicate costs a page and not a book.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from datatrove.data import Document
from datatrove.io import DataFolder

from dsv3.data.readers.files import Reader

DOC_CHARS = 3500  # a document is closed once it is this long: about a thousand tokens


@dataclass(frozen=True)
class Piece:
    """A run of paragraphs of a book. `opens` marks the first of a tale or chapter."""

    title: str
    paragraphs: tuple[str, ...]
    opens: bool

    @property
    def text(self) -> str:
        return "\n\n".join([self.title] * bool(self.title and self.opens) + list(self.paragraphs))


class Books(Reader):
    """Files of books, one after the other with `separator` between them; paragraphs are parted by blank lines."""

    name = "books"
    only_text = True

    def __init__(
        self,
        data_folder: DataFolder,
        separator: str = "<|endofbook|>",
        wrapped: bool = False,
        leave_out: Sequence[str] = (),
        only: str | None = None,
        **options: Any,
    ) -> None:
        """wrapped: the lines of a paragraph may be broken, and a double space may stand for a dash;
        leave_out: how the text of books begins that are not wanted; only: a pattern for the titles of those that
        are."""
        super().__init__(data_folder, **options)
        self.separator, self.wrapped = separator, wrapped
        self.only = None if only is None else re.compile(only, re.I)
        self.leave_out = tuple(" ".join(name.split()).upper() for name in leave_out)

    def read_file(self, filepath: str) -> Iterator[Document]:
        found = books(self.text_of(filepath), self.separator)
        if not found:
            self.drop("no text")
        for name, raw in found:
            if self.only is not None and not self.only.search(name):
                self.note("books that are not asked for")
                continue
            body: str | None = raw
            if self.wrapped and (body := unwrap(raw)) is not None:
                body = re.sub(r"(?<=[a-z,;])  (?=[a-z])", "—", body)
            if " ".join(raw[:1000].split()).upper().startswith(self.leave_out) and self.leave_out:
                self.note("books left out")
            elif body is None:
                self.note("books without marks of paragraphs")
            else:
                yield from self.documents(name, body)

    def documents(self, name: str, raw: str) -> Iterator[Document]:
        """The documents of one book."""
        dropped = Counter[str]()
        for i, piece in enumerate(pieces(raw, dropped)):
            yield Document(piece.text, f"{name}/{i}", metadata={"source": name, "opens": piece.opens})
        for reason, count in dropped.items():
            self.note(f"paragraphs: {reason}", count)


def pieces(raw: str, dropped: Counter[str]) -> Iterator[Piece]:
    """The documents that a book is cut into."""
    for title, paragraphs in sections(raw, dropped):
        for i, run in enumerate(chunks(paragraphs)):
            yield Piece(title, tuple(run), opens=i == 0)


# --- cleaning -----------------------------------------------------------------------------------------------

_QUOTES = str.maketrans(
    {
        "“": '"',
        "”": '"',
        "„": '"',
        "‘": "'",
        "’": "'",
        "`": "'",
        "´": "'",
        "\u00a0": " ",
        "\ufeff": "",
        "\u00ad": "",
        "–": "-",
        "\t": " ",
    }
)
_NOTE = re.compile(
    r"\[\s*(?:Illustration|Picture|Sidenote|Footnote|Transcriber|Note|Greek|Blank|Line-Art|Full)[^\]]*\]"
    r"|\[\d+\]|\{\d+\w*\}",
    re.I,
)
_FRONT = re.compile(  # headings of what is not the story
    r"^\W*(table of )?(contents|preface|dedication|dedicatory|introduction|prefatory|foreword|notes?\b|"
    r"list of|illustrations|index|glossary|footnotes|advertisement|to the reader|to my|to our|author's|"
    r"how to get into|say this|transcriber|by the same|books by|other books|the wonderful oz books|"
    r"preparer|publisher|acknowledg|copyright|errata)",
    re.I,
)
_TAIL = re.compile(
    r"^\W*(notes and references|notes?\W*$|footnotes|index|glossary|appendix|transcriber|"
    r"the wonderful oz books)",
    re.I,
)
_EDITOR = re.compile(
    r"gutenberg|\be-?text\b|transcrib|millennium fulcrum|illustrat(ed|ions?) by|copyright|"
    r"all rights reserved|proofread|\bprinted (by|in)\b|\b1[789]\d\d\s*[-–]\s*1[89]\d\d\b|www\.|http|"
    r"\bpage \d+|italic emphases|most spellings|^\W*by the author of|^\W*author of\b",
    re.I,
)
_EDITORS_WORDS = (
    "gutenberg", "text", "transcrib", "fulcrum", "illustrat", "copyright", "rights reserved", "proofread", "printed",
    "17", "18", "19", "www.", "http", "page ", "italic emphases", "most spellings", "author of",
)  # fmt: skip
_SOURCE_LINE = re.compile(
    r"^[\[(]?\W*(footnotes?:?$|from the|from|adapted|translated|source|parallels|remarks)\b.{0,80}$"
    r"|^\(\d+\)|^\([^)]{0,60}\)\.?$|^\w+\.$",
    re.I,
)
_COUNT = (
    r"(?:[IVXLC]+|[ivxlc]+|\d+|(?i:the )?(?i:first|second|third|fourth|last|one|two|three|four|five|six))\b"
)
_CHAPTER = re.compile(
    rf"^(?i:chapter|book|part|stave|letter|volume|vol\.)\s+{_COUNT}[\s.:—-]*|^[IVXLC]+\.?$"
    r"|^[IVXLC]+[.:—-]+\s*(?=[A-Z\"'])|^[IVXLC]{2,}\s+(?=[A-Z])|^\d+\.?\s*(?=[A-Z]|$)"
)
_SMALL = {"a", "an", "and", "the", "of", "in", "on", "to", "for", "or", "with", "at", "by", "from", "into"}
_LOWERED = (
    _SMALL
    | {"was", "is", "his", "her", "that", "who", "it", "upon"}
    | {"time", "once", "there", "were", "day"}
)
_LOST_MARKS = re.compile(
    r"\b(it|that|don|can|he|she|you|won|didn|i|there|couldn|they|we) (s|t|ve|ll|re|d|m)\b", re.I
)
_SLUR = re.compile(r"\bn[i1]gg", re.I)  # old books carry words that we do not teach


def clean(text: str) -> str:
    """One line of plain text: straight quotes, single spaces, no marks of the editor or of italics."""
    text = unicodedata.normalize("NFC", text).translate(_QUOTES)
    if "[" in text or "{" in text:  # looking for a character is much faster than for a pattern
        text = _NOTE.sub("", text)
    if "--" in text or "—" in text:
        text = re.sub(r"\s*(?:-{2,}|—+)\s*", "—", text)
    text = text.replace("_", "")
    if re.search(r"\.\s\.", text):
        text = re.sub(r"\s*(?:\.\s){2,}\.?", "... ", text)
    text = re.sub(r"\s+", " ", text).strip()
    # "ONCE UPON A TIME there was" opens a chapter in capitals.
    return re.sub(r"^([\"']?[A-Z])([A-Z']+)((?: [A-Z']+){0,4})(?= [a-z])", _lower_opening, text)


def _lower_opening(match: re.Match[str]) -> str:
    rest = [w.lower() if w.lower() in _LOWERED else w.capitalize() for w in match[3].split()]
    return " ".join([match[1] + match[2].lower(), *rest])


def _is_editors(paragraph: str) -> bool:
    """Whether it speaks of the edition; most paragraphs have none of these words, and need no pattern."""
    lowered = paragraph.lower()
    return any(word in lowered for word in _EDITORS_WORDS) and _EDITOR.search(paragraph) is not None


def is_prose(paragraph: str) -> bool:
    """Whole sentences in mixed case, as against titles, lists and tables."""
    letters = [c for c in paragraph if c.isalpha()]
    lower = sum(c.islower() for c in letters)
    return len(paragraph) >= 120 and lower > 0.85 * len(letters) and paragraph[-1] in ".!?\"'—:)"


def is_heading(paragraph: str) -> bool:
    words = [w for w in (w.strip(".,;:!?\"'()—-") for w in paragraph.split()) if w]
    if not paragraph or len(paragraph) > 90 or not re.search(r"\w", paragraph):
        return False
    if _CHAPTER.match(paragraph):
        return True
    if paragraph[0] in "\"'(" or not words:
        return False
    if paragraph.upper() == paragraph and len(words[0]) + len(words) > 3:
        return True
    titled = words[0][0].isupper() and all(w[0].isupper() or w in _SMALL for w in words)
    return titled and 1 < len(words) <= 10 and paragraph[-1] not in ".,;:!?\"'—"


def title_of(heading: str) -> str:
    """`CHAPTER VI REDDY FOX GOES FISHING` as `Reddy Fox Goes Fishing`; empty where only a number is left."""
    words = _CHAPTER.sub("", re.sub(r"\[.*?\]", "", heading)).strip(" .:—-").lower().split()
    return " ".join(w if i and w in _SMALL else w[:1].upper() + w[1:] for i, w in enumerate(words))


def sections(raw: str, dropped: Counter[str]) -> Iterator[tuple[str, list[str]]]:
    """The chapters or tales of a book as (title, paragraphs), without front matter, notes and licence tails.

    `raw` has its paragraphs separated by blank lines. `dropped` counts, by reason, the paragraphs left out.
    """
    paragraphs = [p for p in (clean(p) for p in re.split(r"\n\s*\n", raw)) if p]
    for i, p in enumerate(paragraphs):
        late = i > 0.6 * len(paragraphs)
        if late and (
            (_TAIL.match(p) and len(p) < 60)
            or re.match(r"end of (the )?project gutenberg", p, re.I)
            or (re.match(r"(the )?end\W*$", p, re.I) and i > 0.95 * len(paragraphs))
        ):
            dropped["notes or licence tail"] += len(paragraphs) - i
            paragraphs = paragraphs[:i]
            break
    title, body, front = "", list[str](), True
    for i, p in enumerate([*paragraphs, ""]):
        if not p or is_heading(p):
            if body and not front and sum(map(len, body)) > 300:
                yield title, body
            elif body:
                dropped["front matter" if front else "sections of a few lines"] += len(body)
            title = title_of(p) or ("" if body else title)
            front = bool(_FRONT.match(p)) or (front and not any(map(is_prose, paragraphs[i + 1 : i + 4])))
            body = []
        elif _is_editors(p) or _SOURCE_LINE.match(p) or not re.search(r"\w", p) or p.startswith("["):
            dropped["editor's line"] += 1
        elif _LOST_MARKS.search(p):
            dropped["quotation marks lost"] += 1
        elif "gg" in p.lower() and _SLUR.search(p):
            dropped["slur"] += 1
        elif not front and len(p) > 200 and p.upper() == p:
            dropped["contents list"] += 1
        else:
            body.append(p)


def chunks(paragraphs: Sequence[str], size: int = DOC_CHARS) -> list[list[str]]:
    """Runs of whole paragraphs of about `size` characters; a short rest joins the run before it."""
    runs: list[list[str]] = [[]]
    for p in paragraphs:
        if sum(map(len, runs[-1])) >= size:
            runs.append([])
        runs[-1].append(p)
    if len(runs) > 1 and sum(map(len, runs[-1])) < size // 3:
        runs[-2:] = [runs[-2] + runs[-1]]
    return runs


def book_name(raw: str) -> str:
    """The first line that looks like a title."""
    skip = re.compile(r"e-?text|transcribed|gutenberg|available|^\[|^dashes|^by\b|^note", re.I)
    lines = (clean(line) for line in raw.split("\n"))
    return next((line[:60].strip(" ,.:;") for line in lines if line and not skip.search(line)), "untitled")


def books(raw: str, separator: str) -> list[tuple[str, str]]:
    return [(book_name(b), b) for b in raw.split(separator) if b.strip().strip("\ufeff").strip()]


def unwrap(raw: str) -> str | None:
    """Novels come wrapped or with a line per paragraph; None where the ends of paragraphs cannot be told."""
    lines = raw.split("\n")
    filled = sorted(len(line) for line in lines if line.strip())
    if filled and filled[int(0.9 * len(filled))] > 120:  # a line is a paragraph
        return "\n\n".join(line for line in lines if line.strip())
    blank = sum(not line.strip() for line in lines)
    return raw if blank > 0.08 * len(lines) else None


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())
