"""Reading the raw text that the bundled model `nano` learns from.

A small model is what it reads. So books lose their title pages, contents lists, notes and licence tails, and
are cut into documents of a page or two; dialogues become chats. One function reads each shelf:
`read_stories`, `read_novels`, `read_fairytales`, `read_dialogues`, `read_chatterbot`, `read_chinese`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
SPECIALS = (BOS, EOS, PAD, USER, ASSISTANT, "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")

KINDS = ("stories", "novels", "dialogues", "chinese")
DOC_CHARS = 3500  # a document is closed once it is this long: about a thousand tokens
ALSO_STORIES = (
    "THE SECRET GARDEN",
    "LITTLE LORD FAUNTLEROY",
    "TREASURE ISLAND",
)  # novels that the stories have too


@dataclass(frozen=True)
class Message:
    """One turn of a chat; `role` is system, user or assistant."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ("system", "user", "assistant"):
            raise ValueError(f"role {self.role!r} is not one of system, user, assistant")


Chat = tuple[Message, ...]


@dataclass(frozen=True)
class Document:
    """A piece of text that training reads as a whole. `opens` marks the first piece of a tale or chapter."""

    kind: str
    source: str
    text: str
    opens: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is not one of {', '.join(KINDS)}")

    @property
    def paragraphs(self) -> list[str]:
        return self.text.split("\n\n")


def dialogue(*lines: str) -> Chat:
    return tuple(Message("assistant" if i % 2 else "user", line) for i, line in enumerate(lines))


def render(chat: Chat) -> str:
    """DeepSeek-V3's chat format without the leading BOS."""
    mark = {"system": "", "user": USER, "assistant": ASSISTANT}
    return "".join(mark[m.role] + m.content + (EOS if m.role == "assistant" else "") for m in chat)


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
    text = _NOTE.sub("", unicodedata.normalize("NFC", text).translate(_QUOTES))
    text = re.sub(r"\s*(?:-{2,}|—+)\s*", "—", text).replace("_", "")
    text = re.sub(r"\s*(?:\.\s){2,}\.?", "... ", text)
    text = re.sub(r"\s+", " ", text).strip()
    # "ONCE UPON A TIME there was" opens a chapter in capitals.
    return re.sub(r"^([\"']?[A-Z])([A-Z']+)((?: [A-Z']+){0,4})(?= [a-z])", _lower_opening, text)


def _lower_opening(match: re.Match[str]) -> str:
    rest = [w.lower() if w.lower() in _LOWERED else w.capitalize() for w in match[3].split()]
    return " ".join([match[1] + match[2].lower(), *rest])


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
                dropped["front matter"] += len(body)
            title = title_of(p) or ("" if body else title)
            front = bool(_FRONT.match(p)) or (front and not any(map(is_prose, paragraphs[i + 1 : i + 4])))
            body = []
        elif _EDITOR.search(p) or _SOURCE_LINE.match(p) or not re.search(r"\w", p) or p.startswith("["):
            dropped["editor's line"] += 1
        elif _LOST_MARKS.search(p):
            dropped["quotation marks lost"] += 1
        elif _SLUR.search(p):
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


def book_documents(kind: str, name: str, raw: str, dropped: Counter[str]) -> Iterator[Document]:
    for title, paragraphs in sections(raw, dropped):
        for i, run in enumerate(chunks(paragraphs)):
            head = [title] if title and i == 0 else []
            yield Document(kind, name, "\n\n".join(head + run), opens=i == 0)


# --- reading ------------------------------------------------------------------------------------------------


def read_gzip(path: Path) -> str:
    """The text of a gzipped file. Raises FileNotFoundError, naming the file, where the material lacks it."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: point MATERIAL at the folder that holds {path.parent.name}/"
        )
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.read()


def book_name(raw: str) -> str:
    """The first line that looks like a title."""
    skip = re.compile(r"e-?text|transcribed|gutenberg|available|^\[|^dashes|^by\b|^note", re.I)
    lines = (clean(line) for line in raw.split("\n"))
    return next((line[:60].strip(" ,.:;") for line in lines if line and not skip.search(line)), "untitled")


def books(raw: str) -> list[tuple[str, str]]:
    return [(book_name(b), b) for b in raw.split("<|endofbook|>") if b.strip("\ufeff \n")]


def read_stories(material: Path, dropped: Counter[str]) -> Iterator[Document]:
    for name, raw in books(read_gzip(material / "english_stories/gutenberg_children.txt.gz")):
        if " ".join(raw.split()).startswith("ADVENTURES OF HUCKLEBERRY FINN"):
            dropped["book in dialect"] += 1
        else:
            yield from book_documents("stories", name, raw, dropped)


def unwrap(raw: str) -> str | None:
    """Novels come wrapped or with a line per paragraph; None where the ends of paragraphs cannot be told."""
    lines = raw.split("\n")
    filled = sorted(len(line) for line in lines if line.strip())
    if filled[int(0.9 * len(filled))] > 120:  # a line is a paragraph
        return "\n\n".join(line for line in lines if line.strip())
    blank = sum(not line.strip() for line in lines)
    return raw if blank > 0.08 * len(lines) else None


def read_novels(material: Path, dropped: Counter[str]) -> Iterator[Document]:
    for part in ("novels-0", "novels-1"):
        for name, raw in books(read_gzip(material / f"english_novels/{part}.txt.gz")):
            body = unwrap(raw)
            if name.upper() in ALSO_STORIES:
                dropped["book also among the stories"] += 1
            elif body is None:
                dropped["book without marks of paragraphs"] += 1
            else:
                # In these editions a dash inside a sentence became two spaces.
                yield from book_documents(
                    "novels", name, re.sub(r"(?<=[a-z,;])  (?=[a-z])", "—", body), dropped
                )


@dataclass(frozen=True)
class Fairytale:
    """A story of FairytaleQA: its sections, and questions as (question, answer, section number)."""

    name: str
    sections: tuple[str, ...]
    questions: tuple[tuple[str, str, int], ...]


def lines_joined(text: str) -> list[str]:
    """The paragraphs of a section: its lines, or where lines are wrapped, lines up to a short last one."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines or max(map(len, lines)) > 90:
        return lines
    paragraphs = [""]
    for line in lines:
        paragraphs[-1] += " " + line
        if len(line) < 58 and line[-1] in ".!?\"':":
            paragraphs.append("")
    return paragraphs


def read_fairytales(material: Path) -> list[Fairytale]:
    path = material / "fairytaleqa/fairytaleqa.tar.gz"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: point MATERIAL at the folder that holds fairytaleqa/")
    rows: dict[str, list[dict[str, str]]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            data = archive.extractfile(member)
            if member.name.endswith(".csv") and data is not None:
                text = data.read().decode("utf-8-sig")
                rows[Path(member.name).stem] = list(csv.DictReader(io.StringIO(text)))
    tales = []
    for stem in sorted(s for s in rows if s.endswith("-story")):
        name = stem.removesuffix("-story")
        asked = [r for r in rows.get(f"{name}-questions", []) if r["cor_section"].isdigit()]
        questions = tuple((clean(r["question"]), clean(r["answer1"]), int(r["cor_section"])) for r in asked)
        body = tuple("\n\n".join(filter(None, map(clean, lines_joined(r["text"])))) for r in rows[stem])
        tales.append(Fairytale(name.replace("-", " ").title(), body, questions))
    return tales


def fairytale_documents(tales: Iterable[Fairytale]) -> Iterator[Document]:
    for tale in tales:
        for i, run in enumerate(chunks("\n\n".join(tale.sections).split("\n\n"))):
            head = [tale.name] if i == 0 else []
            yield Document("stories", f"fairytaleqa: {tale.name}", "\n\n".join(head + run), opens=i == 0)


def read_dialogues(material: Path) -> list[tuple[str, Chat]]:
    """The booking dialogues as (split, chat); a chat starts with the user and ends with the assistant."""
    records = map(json.loads, read_gzip(material / "sgd_dialogues/sgd_turns.jsonl.gz").splitlines())
    return [
        (r["split"], tuple(Message(m["role"], clean(m["content"])) for m in r["messages"])) for r in records
    ]


def read_chatterbot(material: Path, language: str, topics: Iterable[str]) -> list[list[str]]:
    """Conversations of the chatterbot corpus: lists of lines. Its YAML is a list of lists, no more."""
    talks: list[list[str]] = []
    for topic in topics:
        path = material / f"chatterbot/chatterbot_corpus/data/{language}/{topic}.yml"
        if not path.exists():
            continue  # not every topic exists in every language
        for line in path.read_text(encoding="utf-8").split("conversations:")[-1].splitlines():
            if line.startswith("- - "):
                talks.append([line[4:]])
            elif line.startswith("  - ") and talks:
                talks[-1].append(line[4:])
            elif line.startswith("    ") and talks:
                talks[-1][-1] += " " + line.strip()
    return [[clean(line).strip("\"' ") for line in talk] for talk in talks]


CHINESE_TOPICS = (
    "greetings",
    "conversations",
    "emotion",
    "food",
    "literature",
    "science",
    "psychology",
    "sports",
)


def read_chinese(material: Path) -> Iterator[Document]:
    for line in read_gzip(material / "chinese_classics/classics.jsonl.gz").splitlines():
        piece = json.loads(line)
        text = re.sub(r"\[\d+\]", "", piece["text"]).strip()
        if len(text) >= 20:
            yield Document("chinese", piece["source"], "\n".join(filter(None, (piece["title"], text))))


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())
