"""The engine: requests in, tokens out, one step at a time.

`step()` is the whole of it: the scheduler says who runs, the runner takes their tokens through the model, sampling picks
a token for each (and goes on along the guesses that were right), and the MTP module guesses for next time. All else is
bookkeeping at the doors. An engine is for one thread.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from dsv3.engine.cache import BlockManager, allocate
from dsv3.engine.grammar import CompiledGrammar, GrammarCompiler
from dsv3.engine.machine import fitting_tokens
from dsv3.engine.runner import ModelRunner
from dsv3.engine.sampling import SamplingParams, is_whole, report, sample
from dsv3.engine.scheduler import Scheduler, Work
from dsv3.engine.sequence import Sequence, TextDecoder
from dsv3.engine.speculation import Pace
from dsv3.errors import UserError
from dsv3.kernels.inference import BLOCK
from dsv3.model import Piece, Transformer

if TYPE_CHECKING:
    from dsv3.text.tokenizer import Tokenizer

Speculation = Literal["auto", "off"] | int
"""How many tokens the MTP module guesses ahead; "auto" is one where that is faster, and none without a module."""

REMEMBERED = 2
"""Without cache_tokens the cache is this many times as large as all running sequences need at their longest."""
REPORTED_TOGETHER = 64
"""Rows of logits that are made at once for prompt_logprobs: a long prompt's would take gigabytes."""
MANY_TOKENS = 128
"""Tokens of a step from which it is worth waking further threads for a small model."""


class _NoText:
    """Stands in for a tokenizer's decoder where only token ids are wanted."""

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class Engine:
    """Generates from one model for several sequences at once; without a tokenizer, token ids alone."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        end_ids: Iterable[int] = (),
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_batched_tokens: int = 2048,
        cache_tokens: int | None = None,
        prefix_caching: bool = True,
        speculation: Speculation = "auto",
        deterministic: bool = False,
        seed: int = 0,
    ) -> None:
        """end_ids: tokens that end a text, besides the config's own; seed: for requests that bring none.

        max_model_len: the longest prompt and output together, by default what the model was made for or what
        fits in memory, if that is less. max_num_seqs sequences run at once, others wait; one step takes about
        max_batched_tokens through the model at most. cache_tokens: the size of the latent cache, by default what may
        be of use and fits. deterministic: what a request gets (one that is greedy or brings its seed) does not depend on
        who else runs, to the bit. Raises UserError for values that cannot be.
        """
        config = model.config
        weight = model.embed_tokens.weight
        counts = {"max_num_seqs": max_num_seqs, "max_batched_tokens": max_batched_tokens}
        counts |= {} if cache_tokens is None else {"cache_tokens": cache_tokens}
        for name, value in counts.items():
            if not is_whole(value) or value < 1:
                raise UserError(f"{name} is {value!r}: it must be a whole number, at least 1")
        self.drafts = drafts(speculation, model)
        lookahead = 2 * self.drafts
        fitting = fitting_tokens(config, weight.dtype, weight.device, mtp=self.drafts > 0)
        if fitting is None:  # nobody can tell: then nothing is too much
            fitting = max_num_seqs * (config.max_position_embeddings + lookahead + BLOCK) * REMEMBERED
        room = fitting if cache_tokens is None else min(fitting, cache_tokens)
        if max_model_len is None:
            max_model_len = min(config.max_position_embeddings, max(room // BLOCK * BLOCK - lookahead, 2))
        if not is_whole(max_model_len) or not 2 <= max_model_len <= config.max_position_embeddings:
            raise UserError(
                f"max_model_len is {max_model_len!r}: it must be a whole number between 2 and the model's "
                f"max_position_embeddings, {config.max_position_embeddings}"
            )
        longest = -(-(max_model_len + lookahead) // BLOCK)
        blocks = room // BLOCK
        if blocks < longest:
            what, least = (
                ("cache_tokens", cache_tokens) if room == cache_tokens else ("the memory's room", fitting)
            )
            raise UserError(
                f"{what} is {least}: one sequence of {max_model_len} tokens takes {longest * BLOCK} of the cache; make "
                "room for so many, or lower max_model_len"
            )
        if cache_tokens is None:
            blocks = min(blocks, REMEMBERED * max_num_seqs * longest)

        self.config = config
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.end_ids = frozenset((*config.eos_token_ids, *end_ids))
        self.deterministic = deterministic
        self.manager = BlockManager(blocks)
        alone = deterministic and not model.batch_invariant
        if alone and self.drafts:
            if speculation != "auto":
                raise UserError(
                    f"speculation is {speculation!r}: with deterministic it needs kernels that this machine, device or "
                    "dtype lacks (an x86 CPU with AVX2, bfloat16, a C++ compiler); turn one of the two off"
                )
            self.drafts = 0
        cache = allocate(config, self.manager.total, weight.dtype, weight.device, mtp=self.drafts > 0)
        self.scheduler = Scheduler(
            self.manager,
            max_num_seqs,
            max_batched_tokens,
            lookahead=lookahead,
            prefix_caching=prefix_caching,
            fixed_pieces=alone,
        )
        self.runner = ModelRunner(model, cache, alone)
        self.pace = Pace() if speculation == "auto" and self.drafts else None
        self.drafted_tokens = self.accepted_tokens = self.generated_tokens = self.steps = 0
        self.finished: Counter[str] = Counter()
        self.reading_threads: int | None = None
        """Threads for steps of many tokens, where they are not torch's own number (`LLM.use_threads`)."""
        self._grammars: GrammarCompiler | None = None
        self._seed, self._requests = seed, 0

    @property
    def unfinished(self) -> bool:
        return self.scheduler.unfinished

    # Requests -------------------------------------------------------------------------------------------

    def sequence(self, prompt_ids: list[int], params: SamplingParams) -> Sequence:
        """`sequences` of a request for one answer."""
        return self.sequences(prompt_ids, params)[0]

    def sequences(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        decoder: Callable[[], TextDecoder] | None = None,
        deadline: float | None = None,
        salt: str = "",
        pools: bool = False,
        grammar: CompiledGrammar | None = None,
    ) -> list[Sequence]:
        """A request, checked but not yet added: a sequence for each of its n answers.

        decoder: makes what turns ids into text, the tokenizer's own by default; grammar: params.structured, if it has
        been compiled already; the rest is as in `Sequence`. Raises UserError if this model cannot serve it.
        """
        if not isinstance(params, SamplingParams):
            raise UserError(f"sampling_params is a {type(params).__name__}: give a SamplingParams")
        vocab = self.config.vocab_size
        if not prompt_ids:
            raise UserError("the prompt is empty: give it at least one token")
        named = {"the prompt": prompt_ids, "allowed_token_ids": params.allowed_token_ids or ()}
        named["logit_bias"] = tuple(params.logit_bias or ())
        for name, ids in named.items():
            if ids and (min(ids) < 0 or max(ids) >= vocab):
                wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab)
                raise UserError(
                    f"{name} has token id {wrong}: the model's vocabulary goes from 0 to {vocab - 1}"
                )
        room = self.max_model_len - (params.max_tokens != 0)
        if len(prompt_ids) > room:
            raise UserError(
                f"the prompt has {len(prompt_ids)} tokens: shorten it to {room} at most "
                f"(max_model_len is {self.max_model_len})"
            )
        if params.stop and self.tokenizer is None:
            raise UserError(
                f"stop is {params.stop!r}: without a tokenizer there is no text to look for it in"
            )
        if decoder is None:
            decoder = _NoText if self.tokenizer is None else self.tokenizer.stream
        if params.structured is not None and grammar is None:
            grammar = self.grammars.compile(params.structured)
        self._requests += 1
        seed = f"{self._seed}/{self._requests}" if params.seed is None else params.seed
        return [
            Sequence(
                prompt_ids,
                params,
                seed=f"{seed}#{i}" if i else seed,
                decoder=decoder(),
                end_ids=self.end_ids,
                max_model_len=self.max_model_len,
                matcher=None if grammar is None else grammar.matcher(),
                deadline=deadline,
                salt=salt,
                pools=pools,
            )
            for i in range(params.n)
        ]

    @property
    def grammars(self) -> GrammarCompiler:
        """What compiles structures for this engine's tokenizer. Raises UserError without one."""
        if self.tokenizer is None:
            raise UserError("structured output needs a tokenizer, and this engine has none")
        if self._grammars is None:
            self._grammars = GrammarCompiler(self.tokenizer, self.config.vocab_size, self.end_ids)
        return self._grammars

    def add(self, sequence: Sequence) -> None:
        """Let a sequence take part in the following steps, as soon as there is a place for it.

        Until the next one is added, nobody must replace the model's weights or modules.
        """
        self.runner.look_again()
        self.scheduler.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Forget a sequence and free its blocks. Does nothing if it has left already or was never added."""
        if sequence.finished:
            self._leave(sequence)  # if a step that failed has left it here
        elif sequence.number and not sequence.aborted:
            sequence.aborted = True
            self.finished["abort"] += 1
            self.scheduler.remove(sequence)

    # Steps ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """One pass of the model for everybody. Returns the sequences that have a new token or have finished.

        If anything fails on the way, the step can be taken again: whatever tokens were chosen before it failed stand.
        """
        began = time.perf_counter()
        late = [sequence for sequence in self.scheduler.running if sequence.finished]  # as a step failed
        for sequence in self.scheduler.expired():
            sequence.finish("deadline")
            late.append(sequence)
        for sequence in late:
            self._leave(sequence)
        self.scheduler.wants_drafts = self._keeps_pace(max(1, len(self.scheduler.running)))
        work = self.scheduler.schedule()
        if not work:
            return late
        with self._threads_for(sum(item.new for item in work)):
            hidden = self.runner.run([item.piece for item in work], [item.token_ids for item in work])
        lengths = [len(item.sequence.tokens) for item in work]
        ready = [i for i, item in enumerate(work) if item.completes and lengths[i] < item.sequence.limit]
        if ready:
            logits = self.runner.logits([hidden[i][-1 - work[i].drafts :] for i in ready])
            self._choose([work[i] for i in ready], logits)
        self._read_prompts(work, hidden)
        self._book(work, lengths)
        drafting = self._draft(work, hidden) if self.drafts else 0.0
        self.steps += 1
        if self.pace is not None and all(item.new - item.drafts == 1 and item.completes for item in work):
            gained = sum(len(item.sequence.tokens) for item in work) - sum(lengths)
            drafted = [item.drafts > 0 for item in work]
            if all(drafted) or not any(drafted):
                seconds = time.perf_counter() - began - (0.0 if drafted[0] else drafting)
                self.pace.record(len(work), drafted[0], seconds, gained)
        done = [item.sequence for item in work if item.completes]
        for sequence in done:
            if sequence.finished:
                self._leave(sequence)
        return late + done

    @contextmanager
    def _threads_for(self, tokens: int) -> Iterator[None]:
        """More threads for a step that has much to read, where a step of decoding takes fewer."""
        few = torch.get_num_threads()
        if self.reading_threads is None or self.reading_threads == few or tokens < MANY_TOKENS:
            yield
            return
        torch.set_num_threads(self.reading_threads)
        try:
            yield
        finally:
            torch.set_num_threads(few)

    def _choose(self, ready: list[Work], logits: Tensor) -> None:
        """The next token of each, and those after it for as long as the guesses are what would have been chosen.

        logits: [rows, vocab], for each sequence 1 + drafts rows.
        """
        going = []
        row = 0
        for item in ready:
            going.append((item, row))
            row += 1 + item.drafts
        depth = 0
        while going:
            rows = logits if len(going) == row else logits[[first + depth for _, first in going]]
            sampled = sample(rows, [item.sequence.sampler for item, _ in going])
            right = []
            for (item, first), token in zip(going, sampled, strict=True):
                sequence = item.sequence
                sequence.append(token)
                guessed = depth < item.drafts and sequence.drafts[depth] == token.token_id
                if guessed and not sequence.finished:
                    right.append((item, first))
            going = right
            depth += 1

    def _read_prompts(self, work: list[Work], hidden: list[Tensor]) -> None:
        """What some want of the tokens of their prompts: log-probabilities, or the sum of hidden states."""
        for item, states in zip(work, hidden, strict=True):
            sequence, start = item.sequence, item.start
            if sequence.pools:
                total = states.sum(
                    dim=0, dtype=torch.float64
                )  # the same wherever the prompt was cut, all but for a bit
                sequence.pooled = total if sequence.pooled is None else sequence.pooled + total
            wanted = sequence.params.prompt_logprobs
            if wanted is None or start + 1 >= len(sequence.prompt_ids):
                continue
            targets = sequence.prompt_ids[start + 1 : start + 1 + item.new]
            del sequence.prompt_logprobs[start + 1 :]  # of a sequence that was thrown out and reads again
            for first in range(0, len(targets), REPORTED_TOGETHER):
                ids = targets[first : first + REPORTED_TOGETHER]
                logits = self.runner.logits([states[first : first + len(ids)]]).float()
                sequence.prompt_logprobs += report(logits, ids, [wanted] * len(ids))

    def _book(self, work: list[Work], lengths: list[int]) -> None:
        """What is in the cache now, what was counted, and who reached the end without a token."""
        keeps_pace = self._keeps_pace(len(work))
        for item, length in zip(work, lengths, strict=True):
            sequence = item.sequence
            sequence.drafting &= keeps_pace
            if not item.completes:
                self.scheduler.book(sequence, sequence.computed + item.new)
                continue
            gained = len(sequence.tokens) - length
            self.generated_tokens += gained
            self.drafted_tokens += item.drafts
            self.accepted_tokens += max(gained - 1, 0)
            self.scheduler.book(sequence, length + max(gained - 1, 0))
            if length >= sequence.limit:
                sequence.finish("length")

    def _keeps_pace(self, batch: int) -> bool:
        """Whether the MTP module goes along, so that it can guess."""
        return self.drafts > 0 and not (self.pace is not None and self.pace.settled_against(batch))

    def _draft(self, work: list[Work], hidden: list[Tensor]) -> float:
        """Take the MTP module through what the model has been through, and let it guess; returns the seconds it took."""
        began = time.perf_counter()
        pieces: list[Piece] = []
        next_ids: list[list[int]] = []
        states: list[Tensor] = []
        guessing: list[tuple[Sequence, int]] = []
        for item, given in zip(work, hidden, strict=True):
            sequence, new = item.sequence, item.sequence.computed - item.start
            sequence.drafts = []
            if not sequence.drafting or sequence.finished:
                continue
            if item.completes:
                guessing.append((sequence, len(pieces)))
            pieces.append(Piece(sequence.blocks, item.start, new))
            next_ids.append(sequence.tokens[item.start + 1 : sequence.computed + 1])
            states.append(given[:new])
        if not pieces:
            return 0.0
        outs = self.runner.draft(pieces, next_ids, states)
        if guessing and (self.pace is None or self.pace.speculates(len(guessing))):
            self._guess([s for s, _ in guessing], [outs[i][-1:] for _, i in guessing])
        return time.perf_counter() - began

    def _guess(self, sequences: list[Sequence], hidden: list[Tensor]) -> None:
        """The likeliest next tokens by what the module has at the last place of each [1, hidden], `drafts` of them."""
        for ahead in range(self.drafts):
            if ahead:
                pieces = [Piece(s.blocks, s.computed + ahead - 1, 1) for s in sequences]
                hidden = self.runner.draft(pieces, [s.drafts[-1:] for s in sequences], hidden)
            guesses: list[int] = self.runner.logits(hidden).max(dim=-1).indices.tolist()
            for sequence, guess in zip(sequences, guesses, strict=True):
                sequence.drafts.append(guess)

    def _leave(self, sequence: Sequence) -> None:
        if self.scheduler.remove(sequence):
            self.finished[sequence.finish_reason or ""] += 1


def drafts(speculation: Speculation, model: Transformer) -> int:
    """How many tokens to guess ahead. Raises UserError for what cannot be."""
    if speculation == "off" or (speculation == "auto" and not model.mtp):
        return 0
    if speculation == "auto":
        return 1
    if not is_whole(speculation) or not 0 <= speculation <= 8:
        raise UserError(
            f"speculation is {speculation!r}: it must be auto, off, or a whole number from 0 to 8"
        )
    if speculation and not model.mtp:
        raise UserError(
            f"speculation is {speculation}: the checkpoint has no multi-token prediction module to guess with"
        )
    return int(speculation)
