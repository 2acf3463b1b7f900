"""Structured output: answers that have a given form, whatever the model would rather say.

A form (a JSON schema, a regular expression, a grammar, one of some texts, a tool call) is compiled into a grammar.
Calls that need not be made are a form too: any text, or text of a form, in which a call cannot but be a right one.
While an answer is written, the grammar is followed token by token, and before each choice every token that cannot come
next gets the logit -inf. What ends an answer is a token too, allowed only where the form is complete: so an answer that
ends by itself has the form, and one that max_tokens cuts off is the beginning of such a text.

The work is done by xgrammar (the extra `dsv3[serve]`), which for each state of a grammar knows beforehand what most of
the vocabulary comes to, and answers in some ten microseconds. This module gives it our vocabulary and bounds it. Three
things in a vocabulary are no text and never allowed: ids without a token, special tokens (a JSON string holds no
`<｜User｜>`), and what the model has room for beyond its tokenizer. Only calls of tools are spelled with some of them.

Forms come from strangers, and xgrammar has neither a time limit nor a way to stop it. A grammar of two kilobytes can
keep it busy for seconds, one of sixty for minutes, since each state is checked against the whole vocabulary; it does
let other threads run meanwhile. So a text may have 65,536 characters, a schema 100 levels, and forms are compiled on
threads of their own, two at a time: who waits longer than 10 seconds is told so. What runs on then ends by itself, and
its result is kept. Grammars that can be read in very many ways are slow to follow rather than to compile; an answer
whose form takes more than its share of processor time is ended there, as is one whose grammar leads nowhere
(`Matcher.failed`). What remains: two compilations may go on for minutes that nobody waits for any more, and meanwhile
other new forms are refused; those in the cache are not.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3.engine.schema import MAX_CHARS, RULE, check_regex, read_schema
from dsv3.errors import UserError
from dsv3.text import Tokenizer
from dsv3.text.tools import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    READABLE,
    SEPARATOR,
    THINK_BEGIN,
    THINK_END,
    HeldCalls,
)

SECONDS = 10.0
"""How long a form may take to compile before whoever asked for it is told that it takes too long."""

COMPILING, WAITING = 2, 64
"""How many forms are compiled at a time, and how many may be under way in all."""

CACHE_BYTES = 256 << 20
"""Memory of compiled grammars that is kept for later requests; a schema takes some 100 kB."""

WHITE_SPACE = 32
"""Most white space in a row between the parts of JSON: without a bound, weak models write nothing else."""

GRACE, SHARE = 2.0, 0.02
"""Seconds of processor time that following a grammar may take in all, and more of them for each token."""


@dataclass(frozen=True)
class StructuredOutput:
    """The form of an answer: exactly one of these. Raises UserError for none or several, or a wrong type.

    Calls that are not required may stand beside another: the answer then is of that form, or calls."""

    json_schema: str | None = None
    """JSON that fits this schema, which is JSON text itself."""
    json_object: bool = False
    """A JSON object, any."""
    regex: str | None = None
    """A text that the expression matches whole."""
    grammar: str | None = None
    """A text of this grammar, in EBNF as xgrammar reads it (llama.cpp's GBNF); it begins at the rule `root`."""
    choice: tuple[str, ...] | None = None
    """One of these texts; given as any sequence, stored as a tuple."""
    tool_calls: HeldCalls | None = None
    """Calls of tools and nothing else; where they are not required, a text that may end in them."""
    after_reasoning: bool = False
    """Not a form: the form begins after `</think>`, and before that any text may come."""

    def __post_init__(self) -> None:
        if isinstance(self.choice, list):
            object.__setattr__(self, "choice", tuple(self.choice))
        given = [field.name for field in fields(self)[:-1] if getattr(self, field.name) not in (None, False)]
        names = ", ".join(field.name for field in fields(self)[:-1])
        calls = self.tool_calls
        optional = isinstance(calls, HeldCalls) and not calls.required
        if len(given) != 1 and not (optional and len(given) == 2):
            what = " and ".join(given) or "none of them"
            raise UserError(f"structured output needs exactly one of {names}: it has {what}")
        value = getattr(self, self.name)
        if self.name in ("json_schema", "regex", "grammar"):
            _check_text(value, self.name)
        elif self.name == "json_object" and value is not True:
            raise UserError(f"json_object is {value!r}: it must be True or False")
        elif self.name == "tool_calls" and not isinstance(calls, HeldCalls):
            raise UserError(f"tool_calls is a {type(calls).__name__}: it must be HeldCalls")
        elif self.name == "choice":
            if not isinstance(value, tuple) or not value:
                raise UserError(f"choice is {value!r}: it must be a list of at least one text")
            for text in value:
                _check_text(text, "choice")
            if sum(map(len, value)) > MAX_CHARS:
                raise UserError(f"choice has more than {MAX_CHARS:,} characters in all: give fewer texts")

    @property
    def name(self) -> str:
        """Which of the forms it is, that of the text where there may be calls instead."""
        return next(f.name for f in fields(self) if getattr(self, f.name) not in (None, False))


def _check_text(text: Any, name: str) -> None:
    if not isinstance(text, str):
        raise UserError(f"{name} has a {type(text).__name__}: it must be a text")
    if len(text) > MAX_CHARS:
        raise UserError(f"{name} has {len(text):,} characters: make it {MAX_CHARS:,} at most")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} is not valid Unicode: it holds half a surrogate pair") from None


class GrammarError(RuntimeError):
    """A token was taken that the grammar does not allow: the logits it was chosen by had not been masked."""


@dataclass
class _Work:
    """A form that is being compiled, or waits for its turn."""

    future: Future[CompiledGrammar] = field(default_factory=Future)
    waiters: int = 0


class GrammarCompiler:
    """Makes grammars of forms, for one vocabulary. For any number of threads.

    Grammars are kept, those used last longest, up to `CACHE_BYTES`. A form that several threads ask for at once is
    compiled once.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        end_ids: Iterable[int],
        *,
        seconds: float = SECONDS,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """vocab_size: the model's, which is how many logits there are; end_ids: what ends an answer.

        xgrammar is loaded by the first `compile`, which takes some seconds."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = frozenset(i for i in end_ids if i < vocab_size)
        self._seconds = seconds
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(COMPILING)
        self._cache: OrderedDict[StructuredOutput, CompiledGrammar] = OrderedDict()
        self._running: dict[StructuredOutput, _Work] = {}
        self._vocabulary: _Vocabulary | None = None
        self._loading = threading.Lock()

    @property
    def cached_bytes(self) -> int:
        """Memory of the grammars that are kept."""
        with self._lock:
            return sum(grammar.size for grammar in self._cache.values())

    def compile(self, spec: StructuredOutput) -> CompiledGrammar:
        """The grammar of a form; waits for it.

        Raises UserError, which names the form's keyword and the place, for a form that is wrong, cannot be a grammar,
        matches nothing, or takes too long; and if xgrammar is not installed.
        """
        if (made := self.cached(spec)) is not None:
            return made
        vocabulary = self._load()
        with self._lock:
            if spec in self._cache:
                return self._cache[spec]
            work = self._running.get(spec)
            if work is None:
                if len(self._running) >= WAITING:
                    raise UserError(f"{spec.name}: {WAITING} others are being prepared: try again later")
                work = self._running[spec] = _Work()
                threading.Thread(
                    target=self._work, args=(vocabulary, spec, work), name="dsv3-grammar", daemon=True
                ).start()
            elif work.future.cancelled():  # all who waited have given up, and its turn has not come
                work.future = Future()
            work.waiters += 1
            future = work.future
        try:
            return future.result(self._seconds)
        except TimeoutError:
            raise UserError(
                f"{spec.name}: preparing it takes longer than {self._seconds:g} seconds: make it smaller, or try again "
                "later"
            ) from None
        finally:
            with self._lock:
                work.waiters -= 1
                if not work.waiters:
                    work.future.cancel()  # of no effect once it has begun

    def cached(self, spec: StructuredOutput) -> CompiledGrammar | None:
        """The grammar of a form if it is there; does not wait."""
        with self._lock:
            if spec in self._cache:
                self._cache.move_to_end(spec)
            return self._cache.get(spec)

    def _load(self) -> _Vocabulary:
        with self._loading:
            if self._vocabulary is None:
                self._vocabulary = _Vocabulary(self._tokenizer, self._vocab_size, self._end_ids)
            return self._vocabulary

    def _work(self, vocabulary: _Vocabulary, spec: StructuredOutput, work: _Work) -> None:
        with self._slots:
            with self._lock:
                future = work.future
                if not future.set_running_or_notify_cancel():  # nobody waits for it
                    del self._running[spec]
                    return
            try:
                grammar = vocabulary.compile(spec)
            except BaseException as error:
                future.set_exception(error)
            else:
                self._keep(spec, grammar)
                future.set_result(grammar)
        with self._lock:
            del self._running[spec]

    def _keep(self, spec: StructuredOutput, grammar: CompiledGrammar) -> None:
        with self._lock:
            self._cache[spec] = grammar
            size = sum(grammar.size for grammar in self._cache.values())
            while self._cache and size > self._cache_bytes:
                size -= self._cache.popitem(last=False)[1].size


class _Vocabulary:
    """A tokenizer's vocabulary as xgrammar takes it, and the compiler that works on it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: frozenset[int]) -> None:
        try:
            import xgrammar
        except ImportError as error:
            raise UserError(
                f"structured output needs xgrammar, which cannot be loaded ({error}): pip install 'dsv3[serve]'"
            ) from None
        self.xgrammar: Any = xgrammar
        self.size = vocab_size
        self.end_ids = end_ids
        marked = {i for i in tokenizer.control_ids if i < vocab_size}
        self.markers = marked & tokenizer.readable_ids
        self.ids = {text: tokenizer.backend.token_to_id(text) for text in READABLE}
        known = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        text = {i for i, token in enumerate(known) if token} - marked - end_ids
        self.text = _bits(text, vocab_size)
        self.ends = _bits(end_ids, vocab_size)
        # xgrammar takes what has no bytes for special, and then not even by its id. Bytes that are no UTF-8 can be
        # named by id, and no text is spelled with them.
        for i in marked:
            known[i] = b"\xff%d" % i if i in self.markers else b""
        self.last_bytes = [token[-1:] for token in known]
        # xgrammar lets the bytes of half a surrogate pair pass for a character, which in UTF-8 they are not: 0xED, and
        # then one from 0xA0 on.
        self.surrogates = _bits(
            {i for i, token in enumerate(known) if b"\xa0" <= token[:1] < b"\xc0"}, vocab_size
        )
        info = xgrammar.TokenizerInfo(
            known, xgrammar.VocabType.RAW, vocab_size=vocab_size, stop_token_ids=sorted(end_ids)
        )
        self._compiler: Any = xgrammar.GrammarCompiler(info, max_threads=_threads(), cache_enabled=False)

    def compile(self, spec: StructuredOutput) -> CompiledGrammar:
        think_end = self.ids[THINK_END] if spec.after_reasoning else None
        if spec.after_reasoning and think_end is None:
            raise UserError(
                f"after_reasoning: the vocabulary has no token {THINK_END!r}, so no reasoning ends"
            )
        try:
            compiled = self._compile(spec)
        except UserError:
            raise
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{spec.name}: {_reason(error)}") from None
        allowed = self.text | self.ends
        if spec.tool_calls is not None:
            allowed |= _bits(self.markers, self.size)
            think_end = None  # the grammar has it
        grammar = CompiledGrammar(self, compiled, allowed, think_end)
        if Matcher(grammar, begun=True).failed:
            raise UserError(f"{spec.name}: no text has this form")
        return grammar

    def _compile(self, spec: StructuredOutput) -> Any:
        rules: list[str] = []
        grammar = self._text(spec, rules)
        if spec.tool_calls is not None:
            calls = self._tagged(_calls(spec.tool_calls, grammar is not None, self.ids, rules))
            grammar = calls if grammar is None else self.xgrammar.Grammar.union(grammar, calls)
            if spec.after_reasoning:
                before = self._tagged(_row(_NO_CALLS, _marker(THINK_END, self.ids)))
                grammar = self.xgrammar.Grammar.concat(before, grammar)
        if not rules:
            return self._compiler.compile_grammar(grammar)
        # Our rules for strings in place of xgrammar's, see `dsv3.engine.schema`.
        text = _RULE.sub(r"dsv3_\1", str(grammar))
        ours = [rule.replace("@", f"dsv3_{i}") for i, rule in enumerate(rules)]
        return self._compiler.compile_grammar("\n".join([text, *ours]))

    def _text(self, spec: StructuredOutput, rules: list[str]) -> Any:
        """The grammar of all but calls; None if there is nothing else. rules: see `read_schema`."""
        grammars = self.xgrammar.Grammar
        if spec.regex is not None:
            check_regex(spec.regex, "regex")
            return grammars.from_regex(spec.regex)
        if spec.grammar is not None:
            _check_grammar(spec.grammar)
            return grammars.from_ebnf(spec.grammar)
        if spec.choice is not None:
            return grammars.from_ebnf("root ::= " + " | ".join(map(_literal, spec.choice)))
        if spec.json_schema is None and not spec.json_object:
            return None
        schema = '{"type": "object"}' if spec.json_schema is None else spec.json_schema
        schema = read_schema(schema, "json_schema", rules)
        return grammars.from_json_schema(schema, max_whitespace_cnt=WHITE_SPACE)

    def _tagged(self, format: dict[str, Any]) -> Any:
        tag = {"type": "structural_tag", "format": format}
        return self.xgrammar.Grammar.from_structural_tag(json.dumps(tag))


_RULE = re.compile(r'Regex\("' + RULE.format(r"(\d+)") + r'", json_string=true\)')


class CompiledGrammar:
    """A form, ready to be followed by any number of answers."""

    def __init__(
        self, vocabulary: _Vocabulary, compiled: Any, allowed: Tensor, think_end: int | None
    ) -> None:
        self.vocabulary = vocabulary
        self.compiled = compiled
        self.allowed = allowed
        """Bits of the tokens that may come at all."""
        self.think_end = think_end
        """What ends the reasoning that comes before the form; None: nothing comes before it."""
        self.reasoning = (
            vocabulary.text if think_end is None else vocabulary.text | _bits({think_end}, vocabulary.size)
        )
        """Bits of the tokens that may come in it."""
        self.size: int = compiled.memory_size_bytes
        """Bytes of memory, about."""

    def matcher(self) -> Matcher:
        """What follows it through one answer."""
        return Matcher(self)


class Matcher:
    """Follows a grammar through one answer: `mask`, choose a token, `accept` it, and again."""

    def __init__(self, grammar: CompiledGrammar, begun: bool = False) -> None:
        """begun: without the reasoning that may come before the form."""
        self._grammar = grammar
        self._vocabulary = grammar.vocabulary
        self._inner: Any = self._vocabulary.xgrammar.GrammarMatcher(grammar.compiled)
        self._bits = torch.empty_like(grammar.allowed)
        self._fresh = False
        """Whether `_bits` are those of the next token."""
        self._reasoning = grammar.think_end is not None and not begun
        self._ended = False
        self._failed = False
        self._last_byte = b""
        self._left = GRACE

    def mask(self, logits: Tensor) -> None:
        """Give every token that cannot come next -inf, in place. logits: [vocab] float32, on any device.

        Where nothing can come next, since the grammar leads nowhere, has `failed`, or is complete, it is what ends the
        answer that is left.
        """
        if logits.shape != (self._vocabulary.size,) or logits.dtype != torch.float32:
            raise ValueError(
                f"the logits are {tuple(logits.shape)} {logits.dtype}: they must be ({self._vocabulary.size},) float32"
            )
        bits = self._next()
        if logits.device.type == "cpu" and logits.is_contiguous():
            self._vocabulary.xgrammar.apply_token_bitmask_inplace(logits, bits)
        else:
            mask_logits(logits, bits)

    def accept(self, token_id: int) -> None:
        """Go on with this token. Raises GrammarError if it cannot come next."""
        if not self.allows(token_id):
            raise GrammarError(
                f"the token {token_id} cannot come next: the logits it was chosen by were not masked"
            )
        if token_id in self._vocabulary.end_ids:
            self._ended = True
        elif self._reasoning:
            self._reasoning = token_id != self._grammar.think_end
        else:
            before = time.thread_time()
            # xgrammar 0.2 has masks that allow what it then does not take (of classes with ranges up to the last
            # character, say). The token has been said: the answer cannot have the form any more.
            self._failed = not self._inner.accept_token(token_id)
            self._left += SHARE + before - time.thread_time()
            self._last_byte = self._vocabulary.last_bytes[token_id]
        self._fresh = False

    def allows(self, token_id: int) -> bool:
        """Whether this token can come next."""
        if not 0 <= token_id < self._vocabulary.size:
            return False
        return bool(int(self._next()[token_id // 32]) >> token_id % 32 & 1)

    @property
    def finished(self) -> bool:
        """Whether nothing but the end can follow."""
        return not bool((self._next() & ~self._vocabulary.ends).any())

    @property
    def failed(self) -> bool:
        """Whether the answer has to end without having the form: no token leads on, or it takes too long to tell."""
        self._next()
        return self._failed

    def _next(self) -> Tensor:
        """The bits of the tokens that can come next."""
        if self._fresh:
            return self._bits
        self._fresh = True
        if self._ended or self._failed:
            self._bits.copy_(self._vocabulary.ends)
        elif self._reasoning:
            self._bits.copy_(self._grammar.reasoning)
        else:
            before = time.thread_time()
            self._inner.fill_next_token_bitmask(self._bits)
            self._bits &= self._grammar.allowed
            if self._last_byte == b"\xed":
                self._bits &= ~self._vocabulary.surrogates
            self._left += before - time.thread_time()
            leads_nowhere = not self._bits.any() and not self._inner.is_completed()
            if leads_nowhere or self._left < 0:
                self._failed = True
                self._bits.copy_(self._vocabulary.ends)
        return self._bits


def _threads() -> int:
    """Threads to compile one form with: some cores are left to the model."""
    return max(1, min(8, (os.cpu_count() or 1) // 2))


def mask_logits(logits: Tensor, bits: Tensor) -> None:
    """What xgrammar does to contiguous logits on a CPU, in torch: logits [vocab] become -inf where the bit is 0.

    bits: [ceil(vocab / 32)] int32 on the CPU, the lowest bit of each first. (xgrammar needs triton on a GPU, and takes
    strided logits for contiguous ones.)
    """
    words = bits.to(logits.device, non_blocking=True)
    places = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = (words.unsqueeze(1) >> places & 1).flatten()[: len(logits)]
    logits.masked_fill_(allowed == 0, -torch.inf)


def _bits(ids: Iterable[int], size: int) -> Tensor:
    """Tokens as xgrammar's bits: [ceil(size / 32)] int32."""
    flags = np.zeros(-(-size // 32) * 32, dtype=np.uint8)
    flags[list(ids)] = 1
    return torch.from_numpy(np.packbits(flags, bitorder="little").view(np.int32))


# Forms as xgrammar takes them ------------------------------------------------------------------------------


def _row(*elements: dict[str, Any]) -> dict[str, Any]:
    return {"type": "sequence", "elements": list(elements)}


def _const(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


def _marker(value: str, ids: dict[str, int | None]) -> dict[str, Any]:
    """By its id where it is a token."""
    return _const(value) if ids[value] is None else {"type": "token", "token": ids[value]}


def _without(start: str) -> str:
    """EBNF of any text in which this does not occur; its first character must be nowhere else in it.

    Each rule is a place in it: what goes on as it does not leads back to plain text, and so does what begins anew."""
    first = start[0]
    rules = [f'root ::= [^{first}]* ("{first}" at1)*']
    for i, char in enumerate(start[1:], 1):
        further = f' | "{char}" at{i + 1}' if i < len(start) - 1 else ""
        rules.append(f'at{i} ::= "" | [^{first}{char}] [^{first}]*{further}')
    return "\n".join(rules)


_NO_CALLS = {"type": "grammar", "grammar": _without("<｜tool▁call")}
"""Any text without the beginning of CALLS_BEGIN and CALL_BEGIN: spelled as text, they begin a call to the parser too."""


def _calls(held: HeldCalls, instead: bool, ids: dict[str, int | None], rules: list[str]) -> dict[str, Any]:
    """Tool calls as xgrammar's structural tag, markers by their ids where they are tokens, arguments by schemas; and the
    text before those that are not required, unless they come instead of one.

    rules: see `read_schema`."""
    if not held.functions:
        raise UserError("tool_calls has no functions: give at least one")
    calls = []
    size = 0
    for function in held.functions:
        binding = held.required or function.strict
        parameters = function.parameters if binding else '{"type": "object"}'
        schema = read_schema(parameters, function.place, rules, function.strict)
        size += len(schema)
        arguments = {
            "type": "json_schema",
            "json_schema": json.loads(schema),
            "max_whitespace_cnt": WHITE_SPACE,
        }
        separator = _marker(SEPARATOR, ids)
        if held.style == "v3":
            head = [_const("function"), separator, _const(f"{function.name}\n```json\n")]
            call = [*head, arguments, _const("\n```")]
        else:
            call = [_const(function.name), separator, arguments]
        calls.append(_row(_marker(CALL_BEGIN, ids), *call, _marker(CALL_END, ids)))
    if size > MAX_CHARS:
        raise UserError(
            f"tools: their parameters have {size:,} characters: make it {MAX_CHARS:,} at most in all"
        )
    one = calls[0] if len(calls) == 1 else {"type": "or", "elements": calls}
    more = _row(_const("\n"), one) if held.style == "v3" else one
    rest = [{"type": "star", "content": more}] if held.several else []
    whole = _row(_marker(CALLS_BEGIN, ids), one, *rest, _marker(CALLS_END, ids))
    if held.required or instead:
        return whole
    # A model may begin to reason by itself.
    think = [_marker(THINK_BEGIN, ids), _NO_CALLS, _marker(THINK_END, ids)]
    return _row(_optional(_row(*think)), _NO_CALLS, _optional(whole))


def _optional(format: dict[str, Any]) -> dict[str, Any]:
    return {"type": "optional", "content": format}


def _literal(text: str) -> str:
    """A text as xgrammar's EBNF quotes it."""
    written = json.dumps(text, ensure_ascii=False)[1:-1]
    return f'"{written}"'.replace("\x7f", "\\x7f")


_NOT_RULES = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*')


def _check_grammar(text: str) -> None:
    """Raise UserError for what would name tokens: which those are is the model's business."""
    found = re.search(
        r"\b(?:ExcludeToken|Token|TokenTagDispatch)\s*\(", _NOT_RULES.sub(lambda m: " " * len(m[0]), text)
    )
    if found:
        line = text.count("\n", 0, found.start()) + 1
        raise UserError(
            f"grammar: at line {line}, {found[0].rstrip('( ')} is not supported: write the text itself"
        )


def _reason(error: Exception) -> str:
    """What xgrammar says, without the place in its own source, in one line."""
    text = str(error)
    for _ in range(3):
        text = re.sub(r"^\s*\[[\d:]+\] \S+:\d+: ", "", text)
        text = re.sub(r"^Check failed: \(.*?\) is false: ", "", text)
    with suppress(IndexError):
        text = text.strip().splitlines()[0]
    return text[:300] or "xgrammar cannot read it"
