"""The engine's one promise: whatever it does with batches, chunks, blocks and guesses, tokens are the plain model's."""

from __future__ import annotations

import contextlib
import random
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.config import PRESETS
from dsv3.engine.engine import Engine
from dsv3.engine.sampling import Sampled, SamplingParams
from dsv3.engine.sequence import Sequence
from dsv3.errors import UserError
from dsv3.model import Transformer
from tests.engine.small import CONFIG, engine, greedy, is_greedy, model, run

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


def prompts(lengths: list[int]) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(CONFIG.vocab_size) for _ in range(n)] for n in lengths]


# The same tokens as the plain model -------------------------------------------------------------------


def test_greedy_is_the_plain_models_argmax_loop() -> None:
    prompt = prompts([9])[0]
    e = engine()
    sequence = e.sequence(prompt, GREEDY)
    run(e, sequence)
    assert sequence.output_ids == greedy(prompt, 12)
    assert sequence.finish_reason == "length"


def test_unequal_lengths_in_one_batch() -> None:
    e = engine()
    sequences = [e.sequence(p, GREEDY) for p in prompts([1, 30, 2, 17, 64])]
    run(e, *sequences)
    for sequence in sequences:
        assert sequence.output_ids == greedy(sequence.prompt_ids, 12)


def test_more_prompts_than_rows() -> None:
    e = engine(max_num_seqs=2)
    params = [SamplingParams(temperature=0.0, max_tokens=n) for n in (3, 9, 1, 5, 12, 2, 7)]
    sequences = [e.sequence(p, q) for p, q in zip(prompts([5, 11, 3, 20, 1, 8, 2]), params, strict=True)]
    most = 0
    for sequence in sequences:
        e.add(sequence)
    while e.unfinished:
        e.step()
        most = max(most, len(e.scheduler.running))
    assert most == 2
    for sequence, asked in zip(sequences, params, strict=True):
        assert len(sequence.output_ids) == asked.max_tokens
        assert is_greedy(sequence.prompt_ids, sequence.output_ids)


@pytest.mark.parametrize("chunk", [4, 5, 16, 33])
def test_chunked_prefill_while_others_decode(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    e = engine(max_num_seqs=4, max_batched_tokens=chunk, speculation="off")
    short, long, other = prompts([3, 50, 37])
    first = e.sequence(short, SamplingParams(temperature=0.0, max_tokens=30))
    e.add(first)
    e.step()
    later = [e.sequence(p, GREEDY) for p in (long, other)]

    sizes: list[int] = []
    forward = model().forward_flat
    monkeypatch.setattr(
        model(), "forward_flat", lambda ids, batch: (sizes.append(len(ids)), forward(ids, batch))[1]
    )
    decoded_before = len(first.output_ids)
    for sequence in later:
        e.add(sequence)
    e.step()
    assert len(first.output_ids) == decoded_before + 1, "a long prompt must not stall those who decode"
    run(e)
    assert max(sizes) == chunk, "no step may take more tokens than its budget, and a long prompt fills it"
    for sequence in (first, *later):
        assert is_greedy(sequence.prompt_ids, sequence.output_ids)
        assert sequence.finished


@pytest.mark.parametrize("length", [1, 2, 40])
def test_decoding_token_by_token_gives_the_logits_of_one_full_forward(length: int) -> None:
    tokens = prompts([length + 64])[0]
    e = engine()
    sequence = e.sequence(tokens[:length], SamplingParams(max_tokens=64))
    e.add(sequence)
    steps: list[Tensor] = []
    for token in tokens[length:]:
        (work,) = e.scheduler.schedule()
        (hidden,) = e.runner.run([work.piece], [work.token_ids])
        steps.append(e.runner.logits([hidden[-1:]]))
        sequence.append(Sampled(token))
        e.scheduler.book(sequence, len(sequence.tokens) - 1)
    with torch.no_grad():
        whole = model()(torch.tensor([tokens])).logits[0, length - 1 : -1]
    assert len(steps) == 64
    assert whole.abs().max() > 1
    torch.testing.assert_close(torch.cat(steps), whole, rtol=0, atol=1e-4)


@given(st.data())
@settings(max_examples=60)
def test_random_arrivals_lengths_chunks_and_cancellations(data: st.DataObject) -> None:
    """With small caches, shared beginnings, guesses or none: always the plain model's tokens, and no block leaks."""
    e = engine(
        max_num_seqs=data.draw(st.integers(1, 4), "rows"),
        max_batched_tokens=data.draw(st.integers(1, 150), "budget"),
        max_model_len=data.draw(st.sampled_from([24, 48, 200]), "max_model_len"),
        cache_tokens=data.draw(st.sampled_from([256, 320, 448, 10_000]), "cache"),
        prefix_caching=data.draw(st.booleans(), "prefix caching"),
        speculation=data.draw(st.sampled_from(["off", "auto", 1, 3]), "speculation"),
        deterministic=False,
    )
    rng = random.Random(data.draw(st.integers(0, 99), "seed"))
    beginnings = [[rng.randrange(CONFIG.vocab_size) for _ in range(n)] for n in (0, 70, 130)]
    sequences: list[Sequence] = []
    cancelled: list[Sequence] = []
    for _ in range(data.draw(st.integers(1, 7), "requests")):
        length = data.draw(st.integers(1, 23), "length")
        params = SamplingParams(
            temperature=0.0, max_tokens=data.draw(st.none() | st.integers(0, 9), "max_tokens")
        )
        if params.max_tokens is None and e.max_model_len > 50:
            continue
        prompt = [rng.randrange(CONFIG.vocab_size) for _ in range(length)]
        if e.max_model_len == 200:
            prompt = data.draw(st.sampled_from(beginnings), "beginning") + prompt
        sequences.append(e.sequence(prompt, params))
        e.add(sequences[-1])
        for _ in range(data.draw(st.integers(0, 4), "steps")):
            e.step()
        if data.draw(st.integers(0, 4), "cancel") == 0:
            cancelled.append(rng.choice(sequences))
            e.abort(cancelled[-1])
    run(e)
    for sequence in sequences:
        assert is_greedy(sequence.prompt_ids, sequence.output_ids)
        if sequence not in cancelled:
            assert len(sequence.tokens) == sequence.limit
            assert sequence.finish_reason == "length"
    assert not e.scheduler.running and not e.scheduler.waiting
    assert e.manager.used == 0 and e.manager.free == e.manager.total


@given(st.data())
@settings(max_examples=25)
def test_a_request_gets_the_same_whoever_is_in_the_batch(data: st.DataObject) -> None:
    """Any mix of params together gives each request what it gets alone."""
    params = data.draw(st.lists(sampling_params(), min_size=2, max_size=5))
    asked = prompts([data.draw(st.integers(1, 30)) for _ in params])
    together = engine(max_num_seqs=data.draw(st.integers(2, 5)), max_batched_tokens=20)
    batch = [together.sequence(p, q) for p, q in zip(asked, params, strict=True)]
    run(together, *batch)
    for sequence in batch:
        alone = engine()
        single = alone.sequence(sequence.prompt_ids, sequence.params)
        run(alone, single)
        assert single.output_ids == sequence.output_ids, sequence.params
        assert [t.token_id for t in single.logprobs] == [t.token_id for t in sequence.logprobs]


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        max_tokens=draw(st.integers(1, 8)),
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 1.7])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.3])),
        top_k=draw(st.sampled_from([0, 1, 5, 40])),
        min_p=draw(st.sampled_from([0.0, 0.05, 0.5])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.8])),
        presence_penalty=draw(st.sampled_from([0.0, 0.7])),
        frequency_penalty=draw(st.sampled_from([0.0, -0.5])),
        seed=draw(st.integers(0, 5)),
        logprobs=draw(st.sampled_from([None, 0, 3])),
    )


# Ends ---------------------------------------------------------------------------------------------------


def test_end_of_text_in_the_middle_of_a_batch() -> None:
    asked = prompts([6, 13, 4, 21])
    plain = [greedy(p, 12) for p in asked]
    e = engine(end_ids=[plain[1][4]], max_num_seqs=3)
    sequences = [e.sequence(p, GREEDY) for p in asked]
    run(e, *sequences)
    for sequence, expected in zip(sequences, plain, strict=True):
        end = next((i + 1 for i, token in enumerate(expected) if token == plain[1][4]), 12)
        assert sequence.output_ids == expected[:end], "the token that ends the text is the last one reported"
    assert len(sequences[1].output_ids) <= 5
    assert sequences[1].finish_reason == "stop"


def test_the_configs_own_end_of_text() -> None:
    prompt = prompts([6])[0]
    end = greedy(prompt, 3)[2]
    other = Transformer(CONFIG.replace(eos_token_id=(300, end))).eval()
    other.load_state_dict(model().state_dict())
    e = Engine(other)
    sequence = e.sequence(prompt, GREEDY)
    run(e, sequence)
    assert sequence.finish_reason == "stop"
    assert sequence.output_ids == greedy(prompt, len(sequence.output_ids))
    assert sequence.output_ids[-1] == end


def test_stop_token_ids() -> None:
    prompt = prompts([6])[0]
    plain = greedy(prompt, 12)
    e = engine()
    sequence = e.sequence(prompt, SamplingParams(temperature=0.0, stop_token_ids=[plain[5]]))
    run(e, sequence)
    assert sequence.output_ids == plain[: plain.index(plain[5]) + 1]
    assert sequence.finish_reason == "stop"


def test_min_tokens() -> None:
    prompt = prompts([6])[0]
    plain = greedy(prompt, 3)
    e = engine(end_ids=plain[:1])
    params = SamplingParams(temperature=0.0, max_tokens=12, min_tokens=5, stop_token_ids=plain[1:])
    sequence = e.sequence(prompt, params)
    run(e, sequence)
    assert len(sequence.output_ids) >= 5
    assert not set(sequence.output_ids[:5]) & set(plain)


@pytest.mark.parametrize("max_tokens", [None, 1000])
def test_the_end_of_the_context(max_tokens: int | None) -> None:
    e = engine(max_model_len=20)
    sequence = e.sequence(prompts([15])[0], SamplingParams(temperature=0.0, max_tokens=max_tokens))
    run(e, sequence)
    assert sequence.finish_reason == "length"
    assert sequence.output_ids == greedy(sequence.prompt_ids, 5)


# What cannot be -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([], "the prompt is empty"),
        ([1, 256], "token id 256: the model's vocabulary goes from 0 to 255"),
        ([-1], "token id -1"),
        ([1] * 20, "the prompt has 20 tokens: shorten it to 19 at most"),
    ],
)
def test_prompts_that_cannot_be_served(ids: list[int], says: str) -> None:
    e = engine(max_model_len=20)
    with pytest.raises(UserError, match=says):
        e.sequence(ids, GREEDY)
    assert not e.unfinished


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_model_len": 1},
        {"max_model_len": 513},
        {"max_model_len": 1.5},
        {"max_model_len": "abc"},
        {"max_num_seqs": 0},
        {"max_num_seqs": True},
        {"max_batched_tokens": 0},
        {"max_batched_tokens": "1"},
        {"cache_tokens": 0},
    ],
)
def test_engines_that_cannot_be(wrong: dict[str, object]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=f"{name} is {value!r}"):
        engine(**wrong)


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(UserError, match="without a tokenizer"):
        engine().sequence([1], SamplingParams(stop="x"))


@pytest.mark.parametrize("where", ["forward_flat", "logits_flat", "draft_flat"])
@pytest.mark.parametrize("when", [0, 1, 4, 11])
def test_a_step_that_fails_can_be_taken_again(when: int, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    e = engine(max_num_seqs=3, max_batched_tokens=10, speculation=1)
    sequences = [e.sequence(p, GREEDY) for p in prompts([12, 3, 9])]
    for sequence in sequences:
        e.add(sequence)
    for _ in range(when):
        e.step()

    def fail(*_: Any) -> Tensor:
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr(model(), where, fail)
        for _ in range(2):
            with contextlib.suppress(MemoryError):
                e.step()
    run(e)
    for sequence in sequences:
        assert sequence.output_ids == greedy(sequence.prompt_ids, 12)
    assert e.manager.used == 0 and e.finished == {"length": 3}


def test_logits_that_are_not_numbers_are_said_to_be_so() -> None:
    damaged = Transformer(CONFIG).eval()
    damaged.load_state_dict(model().state_dict())
    damaged.lm_head.weight.data[3] = float("nan")
    e = Engine(damaged)
    for temperature in (0.0, 1.0):
        sequence = e.sequence([1, 2], SamplingParams(temperature=temperature))
        e.add(sequence)
        with pytest.raises(UserError, match="logits are not numbers"):
            e.step()
        e.abort(sequence)
    assert not e.unfinished


def test_memory_that_cannot_be_measured_limits_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3.engine.machine.free_memory", lambda device: None)
    e = engine(max_num_seqs=3)
    assert e.max_model_len == CONFIG.max_position_embeddings
    for prompt in prompts([4, 4, 4]):
        e.add(e.sequence(prompt, SamplingParams(max_tokens=None)))
    e.step()
    assert len(e.scheduler.running) == 3


# Blocks -------------------------------------------------------------------------------------------------


def test_when_blocks_run_out_the_youngest_waits_and_comes_back() -> None:
    e = engine(max_num_seqs=4, max_model_len=200, cache_tokens=256, speculation="off")
    params = SamplingParams(temperature=0.0, max_tokens=90)
    sequences = [e.sequence(p, params) for p in prompts([50, 60, 55])]  # 3 blocks each in the end, of 4
    for sequence in sequences:
        e.add(sequence)
    e.step()
    assert e.scheduler.running == sequences[:2], "the third waits: somebody may soon want another block"
    finished: list[Sequence] = []
    while e.unfinished:
        finished += [s for s in e.step() if s.finished]
    assert finished == sequences, "the oldest is never thrown out"
    assert e.scheduler.counts.preemptions >= 1
    for sequence in sequences:
        assert is_greedy(sequence.prompt_ids, sequence.output_ids) and len(sequence.output_ids) == 90
    assert e.manager.used == 0


def test_the_same_beginning_is_read_once() -> None:
    e = engine(max_num_seqs=8)
    beginning = prompts([150])[0]
    first = e.sequence([*beginning, 1], GREEDY)
    run(e, first)
    later = [e.sequence([*beginning, i, i], GREEDY) for i in (1, 2, 3)]
    run(e, *later)
    assert [s.cached_tokens for s in (first, *later)] == [0, 128, 128, 128]
    assert (e.scheduler.counts.prompt_tokens, e.scheduler.counts.cached_tokens) == (151 + 3 * 152, 3 * 128)
    for sequence in later:
        assert sequence.output_ids == greedy(sequence.prompt_ids, 12)


def test_those_who_come_together_share_what_one_of_them_reads() -> None:
    e = engine(max_num_seqs=8)
    beginning = prompts([200])[0]
    together = [e.sequence([*beginning, i], GREEDY) for i in range(5)]
    other = e.sequence(prompts([7])[0], GREEDY)
    for sequence in (*together, other):
        e.add(sequence)
    e.step()
    assert e.scheduler.running == [together[0], other], "who can share waits, and lets others by"
    run(e)
    assert [s.cached_tokens for s in together] == [0, 192, 192, 192, 192]
    for sequence in together:
        assert sequence.output_ids == greedy(sequence.prompt_ids, 12)


def test_an_answer_is_in_the_cache_for_the_next_turn() -> None:
    e = engine(speculation="off")
    first = e.sequence(prompts([40])[0], SamplingParams(temperature=0.0, max_tokens=60))
    run(e, first)
    second = e.sequence([*first.tokens, 5, 6, 7], GREEDY)
    run(e, second)
    assert second.cached_tokens == 64
    assert second.output_ids == greedy(second.prompt_ids, 12)


def test_a_whole_prompt_in_the_cache_still_gives_a_token() -> None:
    e = engine()
    prompt = prompts([128])[0]
    for expected in (0, 64):
        sequence = e.sequence(prompt, GREEDY)
        run(e, sequence)
        assert sequence.cached_tokens == expected
        assert sequence.output_ids == greedy(prompt, 12)


def test_other_salts_and_no_caching_share_nothing() -> None:
    prompt = prompts([100])[0]
    e = engine()
    for salt, cached in (("a", 0), ("b", 0), ("a", 64)):
        (sequence,) = e.sequences(prompt, GREEDY, salt=salt)
        run(e, sequence)
        assert sequence.cached_tokens == cached
    e = engine(prefix_caching=False)
    for _ in range(2):
        sequence = e.sequence(prompt, GREEDY)
        run(e, sequence)
        assert sequence.cached_tokens == 0


def test_a_short_question_does_not_wait_for_a_long_prompt() -> None:
    e = engine(max_batched_tokens=32, max_num_seqs=4, speculation="off")
    long, short = (e.sequence(p, GREEDY) for p in prompts([400, 20]))
    e.add(long)
    e.add(short)
    steps = 0
    while not short.output_ids:
        e.step()
        steps += 1
    assert steps == 2 and long.pending > 300


@pytest.mark.parametrize("speculation", ["off", 1])
def test_a_prompt_whose_last_token_is_left_for_a_step_of_its_own(speculation: str | int) -> None:
    """Without a token to generate there is no room for guesses, not even for none minus one."""
    e = engine(max_batched_tokens=16, max_num_seqs=2, speculation=speculation)
    other = e.sequence([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=12))
    (sequence,) = e.sequences(prompts([17])[0], SamplingParams(max_tokens=0, prompt_logprobs=0))
    run(e, sequence)
    assert sequence.finish_reason == "length" and len(sequence.prompt_logprobs) == 17
    again = e.sequence(prompts([18])[0], SamplingParams(max_tokens=0))
    run(e, other, again)
    assert other.output_ids == greedy([1, 2, 3], 12)


def test_guesses_leave_room_for_prompts() -> None:
    e = engine(max_num_seqs=5, max_batched_tokens=8, speculation=4)
    talking = [e.sequence([i, i], SamplingParams(temperature=0.0, max_tokens=None)) for i in range(4)]
    for sequence in talking:
        e.add(sequence)
    for _ in range(5):
        e.step()
    reader = e.sequence(prompts([20])[0], GREEDY)
    e.add(reader)
    for _ in range(30):
        e.step()
    assert reader.output_ids
    assert is_greedy(reader.prompt_ids, reader.output_ids)


def test_a_beginning_that_was_read_without_the_module_is_read_again_when_guesses_pay() -> None:
    e = engine(speculation=1)
    beginning = prompts([100])[0]
    e._keeps_pace = lambda batch: False  # type: ignore[method-assign]
    run(e, e.sequence(beginning, GREEDY))
    assert e.drafted_tokens == 0
    del e._keeps_pace  # type: ignore[attr-defined]
    outputs = []
    for cached in (0, 64):
        sequence = e.sequence([*beginning, 5], GREEDY)
        before = e.drafted_tokens
        run(e, sequence)
        assert sequence.cached_tokens == cached and e.drafted_tokens > before
        outputs.append(sequence.output_ids)
    assert outputs == [greedy([*beginning, 5], 12)] * 2


def test_the_size_of_the_cache_alone_limits_the_length() -> None:
    e = engine(cache_tokens=256)
    assert e.max_model_len == 256 - 2 * e.drafts and e.manager.total == 4
    sequence = e.sequence([1, 2], SamplingParams(temperature=0.0, max_tokens=None))
    run(e, sequence)
    assert len(sequence.tokens) == e.max_model_len
    with pytest.raises(UserError, match="cache_tokens is 256: one sequence of 400 tokens takes"):
        engine(cache_tokens=256, max_model_len=400)


def test_memory_that_one_sequence_would_not_fit_into_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3.engine.engine.fitting_tokens", lambda *_, **__: 100)
    assert engine().max_model_len == 64 - 2
    with pytest.raises(UserError, match="the memory's room is 100"):
        engine(max_model_len=300)


# Several answers, and what is known of prompts ------------------------------------------------------------


def test_several_answers_are_different_draws_and_share_the_prompt() -> None:
    e = engine()
    params = SamplingParams(n=3, max_tokens=10, temperature=1.5, seed=4)
    answers = e.sequences(prompts([100])[0], params)
    run(e, *answers)
    assert len({tuple(s.output_ids) for s in answers}) == 3
    assert [s.cached_tokens for s in answers] == [0, 64, 64]
    (alone,) = e.sequences(prompts([100])[0], SamplingParams(max_tokens=10, temperature=1.5, seed=4))
    run(e, alone)
    assert alone.output_ids == answers[0].output_ids


@pytest.mark.parametrize("budget", [7, 64, 500])
def test_prompt_logprobs_are_the_plain_models(budget: int) -> None:
    e = engine(max_batched_tokens=budget, max_num_seqs=2)
    prompt = prompts([150])[0]
    params = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=2)
    run(e, e.sequence(prompt, GREEDY))  # which leaves the prompt in the cache
    sequence = e.sequence(prompt, params)
    run(e, sequence)
    assert sequence.cached_tokens == 0
    with torch.no_grad():
        table = model()(torch.tensor([prompt])).logits[0].log_softmax(-1)
    reported = sequence.prompt_logprobs
    assert reported[0] is None and len(reported) == 150
    for place, one in enumerate(reported[1:], start=1):
        assert one is not None and one.token_id == prompt[place]
        assert one.logprob == pytest.approx(float(table[place - 1, prompt[place]]), abs=1e-4)
        assert list(one.top) == table[place - 1].topk(2).indices.tolist()
    assert sequence.output_ids == greedy(prompt, 3)


def test_a_prompt_can_be_read_for_its_hidden_states_alone() -> None:
    e = engine(max_batched_tokens=20, max_num_seqs=3)
    prompt = prompts([50])[0]
    (sequence,) = e.sequences(prompt, SamplingParams(max_tokens=0), pools=True)
    run(e, sequence, e.sequence(prompt[:9], GREEDY))
    assert sequence.output_ids == [] and sequence.finish_reason == "length"
    with torch.no_grad():
        expected = model()(torch.tensor([prompt])).hidden_states[0].sum(0)
    assert sequence.pooled is not None
    torch.testing.assert_close(sequence.pooled.float(), expected, rtol=0, atol=1e-3)


def test_logit_bias_and_allowed_tokens() -> None:
    prompt = prompts([6])[0]
    plain = greedy(prompt, 5)
    e = engine()
    banned = e.sequence(prompt, SamplingParams(temperature=0.0, max_tokens=5, logit_bias={plain[0]: -100}))
    forced = e.sequence(prompt, SamplingParams(temperature=0.0, max_tokens=5, logit_bias={17: 100.0}))
    few = e.sequence(prompt, SamplingParams(temperature=1.0, max_tokens=40, allowed_token_ids=[3, 9]))
    run(e, banned, forced, few)
    assert plain[0] not in banned.output_ids
    assert forced.output_ids == [17] * 5
    assert set(few.output_ids) == {3, 9}


def test_what_nothing_can_meet_ends_and_harms_nobody() -> None:
    e = engine(end_ids=[7])
    impossible = SamplingParams(temperature=0.0, max_tokens=9, min_tokens=9, allowed_token_ids=[7])
    sequence, other = e.sequence([1, 2], impossible), e.sequence([3, 4], GREEDY)
    run(e, sequence, other)
    assert sequence.output_ids == [7] and sequence.finish_reason == "stop"
    assert other.output_ids == greedy([3, 4], len(other.output_ids))


def test_deadlines() -> None:
    e = engine(max_num_seqs=1)
    (running,) = e.sequences([1, 2], SamplingParams(max_tokens=None), deadline=60)
    (waiting,) = e.sequences([3], GREEDY, deadline=0.0)
    e.add(running)
    e.step()
    e.add(waiting)
    assert waiting in e.step()
    assert waiting.finish_reason == "deadline" and waiting.output_ids == []
    assert running.deadline is not None
    running.deadline = 0.0
    assert e.step() == [running]
    assert running.finish_reason == "deadline" and len(running.output_ids) == 2
    assert not e.unfinished and e.manager.used == 0
    assert e.finished == {"deadline": 2}


# The same to the bit ------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=15)
def test_deterministic_answers_do_not_depend_on_company(data: st.DataObject) -> None:
    """Log-probabilities to the last bit, whatever else runs, however little cache there is, whatever it holds."""
    rng = random.Random(data.draw(st.integers(0, 99), "seed"))
    beginning = [rng.randrange(CONFIG.vocab_size) for _ in range(data.draw(st.sampled_from([0, 64, 100])))]
    asked = [
        (
            beginning + [rng.randrange(CONFIG.vocab_size) for _ in range(rng.randrange(1, 90))],
            SamplingParams(
                temperature=rng.choice([0.0, 1.0]), max_tokens=rng.randrange(1, 30), logprobs=0, seed=i
            ),
        )
        for i in range(data.draw(st.integers(2, 5), "requests"))
    ]
    together = engine(
        deterministic=True,
        max_num_seqs=data.draw(st.integers(1, 4), "rows"),
        max_batched_tokens=data.draw(st.integers(1, 200), "budget"),
        max_model_len=256,
        cache_tokens=data.draw(st.sampled_from([320, 512, 5000]), "cache"),
    )
    sequences = [together.sequence(*one) for one in asked]
    for sequence in sequences:
        together.add(sequence)
        for _ in range(rng.randrange(4)):
            together.step()
    run(together)
    for (prompt, params), sequence in zip(asked, sequences, strict=True):
        alone = engine(deterministic=True, max_model_len=256, prefix_caching=False)
        single = alone.sequence(prompt, params)
        run(alone, single)
        assert [one.logprob for one in single.logprobs] == [one.logprob for one in sequence.logprobs]
        assert single.output_ids == sequence.output_ids


@cache
def in_bfloat16() -> Transformer:
    config = PRESETS["nano"].replace(num_hidden_layers=2, vocab_size=512, eos_token_id=None)
    transformer = Transformer(config).eval().requires_grad_(False)
    transformer.init_weights(3)
    for parameter in transformer.parameters():
        parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return transformer.to(torch.bfloat16)


@given(st.data())
@settings(max_examples=25)
def test_native_answers_do_not_depend_on_company_either(data: st.DataObject) -> None:
    """All at once, with guesses, drawn or greedy: the same bits as alone, without guesses, in one piece."""
    if not in_bfloat16().batch_invariant:
        pytest.skip("no native kernels on this machine")
    rng = random.Random(data.draw(st.integers(0, 99), "seed"))
    beginning = [rng.randrange(512) for _ in range(data.draw(st.sampled_from([0, 64, 100])))]
    asked = [
        (
            beginning + [rng.randrange(512) for _ in range(rng.randrange(1, 90))],
            SamplingParams(
                temperature=rng.choice([0.0, 1.0]),
                top_p=0.9,
                max_tokens=rng.randrange(0, 30),
                logprobs=0,
                seed=i,
            ),
        )
        for i in range(data.draw(st.integers(2, 5), "requests"))
    ]
    together = Engine(
        in_bfloat16(),
        deterministic=True,
        speculation=data.draw(st.sampled_from(["off", "auto", 1, 2]), "speculation"),
        max_num_seqs=data.draw(st.integers(1, 4), "rows"),
        max_batched_tokens=data.draw(st.integers(1, 200), "budget"),
        max_model_len=256,
        cache_tokens=data.draw(st.sampled_from([320, 512, 5000]), "cache"),
    )
    assert not together.runner.alone
    sequences = [together.sequences(*one, pools=one[1].max_tokens == 0)[0] for one in asked]
    for sequence in sequences:
        together.add(sequence)
        for _ in range(rng.randrange(4)):
            together.step()
    run(together)
    for (prompt, params), sequence in zip(asked, sequences, strict=True):
        alone = Engine(in_bfloat16(), max_model_len=256, prefix_caching=False, speculation="off")
        (single,) = alone.sequences(prompt, params, pools=params.max_tokens == 0)
        run(alone, single)
        assert single.output_ids == sequence.output_ids
        assert [one.logprob for one in single.logprobs] == [one.logprob for one in sequence.logprobs]
        if single.pooled is not None and sequence.pooled is not None:
            assert torch.equal(single.pooled.float(), sequence.pooled.float())


# Speculation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_guesses_that_are_right_save_steps_and_change_nothing(
    drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that knows: it looks up what the model will say."""
    e = engine(speculation=drafts, max_num_seqs=3)
    sequences = [e.sequence(p, SamplingParams(temperature=0.0, max_tokens=30)) for p in prompts([5, 70, 9])]
    known = {tuple(s.prompt_ids): greedy(s.prompt_ids, 40) for s in sequences}

    def knows(asked: list[Sequence], hidden: list[Tensor]) -> None:
        for s in asked:
            said = len(s.output_ids)
            s.drafts = known[tuple(s.prompt_ids)][said : said + drafts]

    monkeypatch.setattr(e, "_guess", knows)
    run(e, *sequences)
    for sequence in sequences:
        assert sequence.output_ids == known[tuple(sequence.prompt_ids)][:30]
    assert e.accepted_tokens == e.drafted_tokens > 0
    assert e.steps <= 2 + -(-30 // (1 + drafts))


@pytest.mark.parametrize("drafts", [1, 3])
@given(params=st.lists(st.deferred(lambda: sampling_params()), min_size=1, max_size=4))
@settings(max_examples=20)
def test_with_guesses_a_seed_gives_the_same_tokens_as_without(
    drafts: int, params: list[SamplingParams]
) -> None:
    outputs = []
    for speculation in ("off", drafts):
        e = engine(speculation=speculation, max_num_seqs=3)
        asked = prompts([11, 3, 80, 20])[: len(params)]
        sequences = [e.sequence(p, q) for p, q in zip(asked, params, strict=True)]
        run(e, *sequences)
        assert (e.drafted_tokens > 0) == (speculation != "off" and any(q.max_tokens > 2 for q in params))  # type: ignore[operator]
        outputs.append([s.output_ids for s in sequences])
    assert outputs[0] == outputs[1]


def test_sampled_output_is_distributed_as_without_guesses() -> None:
    """Second tokens, where a guess was tried for each: a chi-squared test against the model's own probabilities."""
    prompt, first = [5, 6, 7], 11
    e = engine(speculation=1, max_num_seqs=64)
    params = SamplingParams(temperature=0.5, max_tokens=3)
    sequences = [e.sequence([*prompt, first], params) for _ in range(3000)]
    run(e, *sequences)
    assert 0 < e.accepted_tokens < e.drafted_tokens
    seen: dict[int, list[int]] = {}
    for sequence in sequences:
        seen.setdefault(sequence.output_ids[0], []).append(sequence.output_ids[1])
    given_first, seconds = max(seen.items(), key=lambda pair: len(pair[1]))
    with torch.no_grad():
        logits = model()(torch.tensor([[*prompt, first, given_first]])).logits[0, -1]
    expected = (logits / 0.5).softmax(-1) * len(seconds)
    counts = torch.bincount(torch.tensor(seconds), minlength=CONFIG.vocab_size).float()
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    wanted, observed = wanted[wanted > 0], observed[wanted > 0]
    chi_squared = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    assert freedom >= 2
    assert chi_squared < freedom + 4 * (2 * freedom) ** 0.5, (chi_squared, freedom)


def test_the_module_guesses_from_what_it_would_see_in_one_forward_pass() -> None:
    e = engine(speculation=1, max_batched_tokens=40, max_num_seqs=4)
    sequences = [e.sequence(p, SamplingParams(temperature=0.0, max_tokens=25)) for p in prompts([3, 90, 41])]
    for sequence in sequences:
        e.add(sequence)
    checked = 0
    while e.unfinished:
        for sequence in e.step():
            if sequence.drafts:
                with torch.no_grad():
                    logits = model()(torch.tensor([sequence.tokens])).mtp_logits[0]
                assert sequence.drafts == [int(logits[0, -1].argmax())]
                checked += 1
    assert checked > 40


def test_speculation_that_cannot_be() -> None:
    for wrong in ("on", -1, 9, 1.5, True):
        with pytest.raises(UserError, match="speculation is"):
            engine(speculation=wrong)
    plain = Transformer(CONFIG.replace(num_nextn_predict_layers=0)).eval()
    assert Engine(plain).drafts == 0
    with pytest.raises(UserError, match="no multi-token prediction module"):
        Engine(plain, speculation=1)


def test_seeds() -> None:
    def say(seed: int | None, engine_seed: int = 0) -> list[int]:
        e = engine(seed=engine_seed)
        first = e.sequence([5], SamplingParams(max_tokens=8))  # takes the engine's first own seed
        sequence = e.sequence([1, 2, 3], SamplingParams(max_tokens=20, temperature=1.5, seed=seed))
        run(e, first, sequence)
        return sequence.output_ids

    assert say(1) == say(1) == say(1, engine_seed=9)
    assert say(1) != say(2)
    assert say(None) == say(None)
    assert say(None) != say(None, engine_seed=9)


def test_requests_without_seeds_differ_from_each_other() -> None:
    e = engine()
    same = [e.sequence([1, 2, 3], SamplingParams(max_tokens=20, temperature=1.5)) for _ in range(2)]
    run(e, *same)
    assert same[0].output_ids != same[1].output_ids


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    on_gpu = Transformer(CONFIG).eval()
    on_gpu.load_state_dict(model().state_dict())
    e = Engine(on_gpu.cuda(), max_num_seqs=3, max_batched_tokens=24)
    sequences = [e.sequence(p, GREEDY) for p in prompts([1, 30, 2, 17, 64])]
    run(e, *sequences)
    for sequence in sequences:
        assert sequence.output_ids == greedy(sequence.prompt_ids, 12)
