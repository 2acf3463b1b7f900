"""Chats that teach `nano` to answer: requests and the answers we wish for.

The booking dialogues are chats already. For "Tell me about a fox." we look for short pieces of stories that
open like a story, close well and speak of a fox more than once; what the user may have said is made from what
the piece is about (`nano_requests.json`). Such pieces are cut from longer tales, so their plots often stop
halfway. The fables written for this purpose (`nano_fables.jsonl`) are whole: each has casts to choose from
and [one way|another way] to say things, which gives many short stories with a beginning and an end.
`nano_identity.jsonl` holds what nano says of itself.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files

from dsv3.data.chats import Chat, dialogue
from dsv3.data.readers.books import words_of
from dsv3.data.readers.material import Fairytale

# Books of tales that stand alone; chapters of a long story do not make answers.
TALE_BOOKS = re.compile(r"fairy|grimm|andersen|just so|mother west wind|burgess|arabian nights|jungle", re.I)
_BEING = (
    r"(fox|wolf|lion|bear|cat|dog|mouse|rat|king|queen|princess|prince|farmer|woodman|wood-?cutter|fisherman|"
    r"miller|tailor|shoemaker|crow|frog|tiger|jackal|monkey|hare|rabbit|tortoise|donkey|ass|goat|hen|"
    r"cock|peasant|widow|woman|man|boy|girl|soldier|merchant|knight|giant)"
)
OPENING = re.compile(
    r"(once (upon|there|when|on a)\b|long ago|a long time ago|many years ago|(it happened )?one (\w+ )?"
    r"(day|morning|evening|night|afternoon|winter|summer)\b|"
    r"there (once )?(was|were|lived) (once )?(an?|two|three)\b|"
    r"in (the )?(olden|days of|a far|a certain|a great|a little|former)\b|far away|a certain\b|"
    rf"an? (\w+ ){{0,2}}{_BEING}\b.{{0,60}}\b(was|had|once|lived|went|came)\b|old mother west wind)",
    re.I,
)
CLOSING = re.compile(
    r"ever after|never (again|more|after)|to this (very )?day|happ(y|ily)|that is (why|how)|lived|"
    r"went (home|away|off)|came home|fell asleep|was (dead|glad|content|gone)|the end\b|wedding|married|"
    r"at last|so (it|he|she|they)\b|and (so|since then)|thanked|died|no more",
    re.I,
)
# Ways to ask for a story, by what they name; system prompts; and NOUNS, what stories may be about.
REQUESTS: dict[str, list[str]] = json.loads((files("dsv3.data") / "nano_requests.json").read_text("utf-8"))
SYSTEMS, NOUNS = REQUESTS["systems"], REQUESTS["nouns"]
PRONOUNS = {
    "he": ("he", "him", "his", "himself"),
    "she": ("she", "her", "her", "herself"),
    "it": ("it", "it", "its", "itself"),
}
SMALL_TALK = ("greetings", "conversations", "emotion", "food")
UNFIT_TALK = re.compile(  # boasts, jargon, nonsense, and what a program should not say of itself
    r"awesome|eliza|firewall|exception|segmentation|syntactic|source code|corrupt|variable|documentation|"
    r"python|java|never lie|dream of|electric sheep|intoxicated|burger|shortage|\bbug\b|wrong guy|smarter|"
    r"million|unit|incorrect|dammit|hell\b|drunk|tipsy|wine|beer|sex|kill|god\b|crash|lost|programmer|sophisticated|parse|"
    r"algorithm|mask|zen\b|ugly|namespaces|\bcpu\b|ambigu|complex|server|bonkers|cake|yolo|ego\b|mentally|"
    r"robot takes|being\.|engine|davis|jacobs|smith|system|off switch|"
    r"疯|面具|谎言|晦涩|丑陋|算法|程序员|死|杀",
    re.I,
)


@dataclass(frozen=True)
class Story:
    """A piece short enough to be an answer, and what it is about."""

    title: str
    text: str
    nouns: tuple[str, ...]
    topics: tuple[str, ...] = ()  # further things it may be asked for by: "snow", "being brave"


def read_data(name: str) -> list[str]:
    return (files("dsv3.data") / name).read_text(encoding="utf-8").strip().split("\n")


def nouns_of(text: str) -> tuple[str, ...]:
    """The beings and things a story is about: named at least twice, the most frequent first."""
    counts = Counter(words_of(text))
    named = {n: counts[n] + counts[n + "s"] for n in NOUNS}
    return tuple(sorted((n for n in NOUNS if named[n] >= 2), key=lambda n: (-named[n], n))[:3])


def short_stories(text: str, opens: bool = False, least: int = 60, most: int = 300) -> Iterator[Story]:
    """Runs of whole paragraphs, `least` to `most` words long, that open like a story and close well.

    opens: the text is the first of a tale or chapter, and may begin with its title.
    """
    paragraphs = text.split("\n\n")
    title = ""
    if opens and paragraphs and len(paragraphs[0]) < 80 and paragraphs[0][-1] not in ".!?\"'":
        # "The Golden Crab(5)": footnotes and sources stand beside titles.
        title, paragraphs = re.sub(r" ?[(\[].*", "", paragraphs[0]), paragraphs[1:]
    i = 0
    while i < len(paragraphs):
        starts = i == 0 and opens and len(paragraphs[0]) > 100
        if not (starts or OPENING.match(paragraphs[i])):
            i += 1
            continue
        best, count = (-1, 0), 0
        for j in range(i, len(paragraphs)):
            last = paragraphs[j]
            count += len(last.split())
            if count > most:
                break
            text = "\n\n".join(paragraphs[i : j + 1])
            if count >= least and last[-1] in '.!"' and text.count('"') % 2 == 0:
                told = last[0] not in "\"'" and last[-1] == "."
                best = max(best, (2 * bool(CLOSING.search(last[-160:])) + told, j + 1))
        text = "\n\n".join(paragraphs[i : best[1]])
        nouns = nouns_of(text)
        if best[0] >= 2 or (best[0] == 1 and nouns):
            yield Story(title if i == 0 else "", text, nouns)
        i = max(i + 1, best[1])


def written_fables(versions: int, rng: random.Random) -> Iterator[Story]:
    """Our own fables: `versions` tellings for each cast, the ways to say things chosen anew each time."""
    for fable in map(json.loads, read_data("nano_fables.jsonl")):
        for members in fable["cast"]:
            for _ in range(versions):
                cast = tuple(rng.choice(member.split("|")) for member in members)  # "Anna|Lily": either
                title, text = (tell(fable[part], cast, rng) for part in ("title", "text"))
                yield Story(title, text, cast, tuple(fable.get("about", ())))


def tell(text: str, cast: Sequence[str], rng: random.Random) -> str:
    """Chooses among [one way|another way], then puts in the cast.

    {a}, {b}, {c}; with an article {an_a}; {he_a}, {him_a}, {his_a}, {himself_a} as each one is spoken of.
    {A}, {An_a}, {He_a} and so on begin a sentence.
    """
    text = re.sub(r"\[([^\]]*)\]", lambda m: rng.choice(m[1].split("|")), text)
    words: dict[str, str] = {}
    for key, noun in zip("abc", cast, strict=False):
        kind = "she" if noun in REQUESTS["she"] else "it" if noun in REQUESTS["it"] else "he"
        words |= {key: noun, f"an_{key}": a(noun)}
        words |= {f"{he}_{key}": word for he, word in zip(PRONOUNS["he"], PRONOUNS[kind], strict=True)}
    return text.format(**words, **{k.capitalize(): v[:1].upper() + v[1:] for k, v in words.items()})


def a(noun: str) -> str:
    """a fox, an owl, the moon, snow, Anna"""
    if noun in REQUESTS["only"]:
        return f"the {noun}"
    if noun[0].isupper() or noun in REQUESTS["bare"]:
        return noun
    return f"{'an' if noun[0] in 'aeiou' and not noun.startswith('uni') else 'a'} {noun}"


def request_for(story: Story, rng: random.Random) -> str:
    """What a user may have said to be told this story."""
    dice = rng.random()
    if not story.nouns or dice < 0.1:
        return rng.choice(REQUESTS["plain"])
    if story.title and dice < 0.16:
        return rng.choice(REQUESTS["titled"]).format(t=story.title)
    if story.topics and rng.random() < 0.3:
        return rng.choice(REQUESTS["about_topic"]).format(a=rng.choice(story.topics))
    first = story.nouns[0] if dice < 0.75 else rng.choice(story.nouns)
    others = [n for n in story.nouns if n != first]
    if others and dice > 0.9:
        named = [n for n in others if n[0].isupper()]
        if named or first[0].isupper():  # a girl called Anna
            one, name = (first, named[0]) if named else (others[0], first)
            return rng.choice(REQUESTS["about_named"]).format(a=a(one), b=name)
        return rng.choice(REQUESTS["about_two"]).format(a=a(first), b=a(others[0]))
    asked = rng.choice(REQUESTS["about_topic" if first[0].isupper() else "about"])
    return asked.format(a=a(first), n=first)


def vary(text: str, rng: random.Random) -> str:
    """The same request as people type it: sometimes in small letters, sometimes without its full stop."""
    if rng.random() < 0.25:
        text = text.lower()
    return text.rstrip(".?!。！？") if rng.random() < 0.25 else text


def identity_chats() -> list[tuple[list[str], str]]:
    """Our own short chats: (ways to say it, answer)."""
    return [(r["user"], r["assistant"]) for r in map(json.loads, read_data("nano_identity.jsonl"))]


def sum_chats() -> list[tuple[list[str], str]]:
    """Sums of the numbers up to ten, as `identity_chats` has its questions."""
    signs = {"+": ("plus", "and", int.__add__), "-": ("minus", "take away", int.__sub__)}
    return [
        (
            [
                f"What is {x} {sign} {y}?",
                f"What is {x} {word} {y}?",
                f"How much is {x} {other} {y}?",
                f"{x}{sign}{y}",
                f"{x} {sign} {y} = ?",
            ],
            f"{x} {word} {y} is {count(x, y)}.",
        )
        for sign, (word, other, count) in signs.items()
        for x in range(1, 11)
        for y in range(1, 11)
        if count(x, y) >= 0
    ]


def small_talk(topic: str, talks: Iterable[Sequence[str]]) -> Iterator[Chat | None]:
    """Chats of conversations in chatterbot-corpus; None for each that is not fit. In `emotion` and `food` further
    lines are other answers."""
    for talk in talks:
        pairs = [[talk[0], line] for line in talk[1:]] if topic in ("emotion", "food") else [talk[:6]]
        for lines in pairs:
            fit = len(lines) > 1 and all(lines) and not UNFIT_TALK.search(" ".join(lines))
            yield dialogue(*lines[: len(lines) // 2 * 2]) if fit else None


def reading_chats(tales: Iterable[Fairytale], most: int = 230) -> Iterator[Chat | None]:
    """A short passage and a question, answered in a whole sentence; None for each that is not fit."""
    for tale in tales:
        for question, answer, number in tale.questions:
            whole = answer[:1].isupper() and answer.endswith(".") and len(answer.split()) >= 5
            passage = tale.sections[number - 1] if 1 <= number <= len(tale.sections) else ""
            fit = whole and passage and len(passage.split()) <= most
            yield dialogue(f"{passage}\n\n{question}", answer) if fit else None


def identity_variants(
    identity: list[tuple[list[str], str]], times: int, rng: random.Random
) -> Iterator[Chat]:
    """Every exchange `times` times, one to four of them in a chat, so that each question gets its own answer."""
    for _ in range(times):
        exchanges = rng.sample(identity, len(identity))
        while exchanges:
            n = rng.randint(1, 4)
            turns, exchanges = exchanges[:n], exchanges[n:]
            lines = [line for ways, said in turns for line in (vary(rng.choice(ways), rng), said)]
            yield dialogue(*lines)


def story_chats(
    stories: Sequence[Story], identity: list[tuple[list[str], str]], times: int, rng: random.Random
) -> Iterator[Chat]:
    """Each story `times` times, asked for in different words, now and then inside a little small talk."""
    greetings = [
        (ways, said) for ways, said in identity if ways[0] in ("Hello", "Hi", "Good evening", "I am bored.")
    ]
    thanks = [(ways, said) for ways, said in identity if ways[0] in ("Thank you", "That was nice.", "Bye")]
    for _ in range(times):
        for story in stories:
            chat = dialogue(vary(request_for(story, rng), rng), story.text)
            if rng.random() < 0.12:
                ways, said = rng.choice(greetings)
                chat = dialogue(vary(rng.choice(ways), rng), said) + chat
            other = rng.choice(stories)
            if rng.random() < 0.06 and len(f"{story.text} {other.text}".split()) < 300:
                chat += dialogue(vary(rng.choice(REQUESTS["another"]), rng), other.text)
            if rng.random() < 0.15:
                ways, said = rng.choice(thanks)
                chat += dialogue(vary(rng.choice(ways), rng), said)
            yield chat
