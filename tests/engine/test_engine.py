"""The engine's one promise: whatever it does with batches, chunks and rows, tokens are the plain model's."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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
    assert e.scheduler.cache.rows == 2
    for sequence, asked in zip(sequences, params, strict=True):
        assert len(sequence.output_ids) == asked.max_tokens
        assert is_greedy(sequence.prompt_ids, sequence.output_ids)


@pytest.mark.parametrize("chunk", [4, 5, 16, 33])
def test_chunked_prefill_while_others_decode(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    e = engine(max_num_seqs=4, max_batched_tokens=chunk)
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
        schedule = e.scheduler.schedule()
        ready, logits = e.runner.run(schedule)
        steps.append(logits)
        e.scheduler.postprocess(schedule, ready, [Sampled(token)])
    with torch.no_grad():
        whole = model()(torch.tensor([tokens])).logits[0, length - 1 : -1]
    assert len(steps) == 64
    assert whole.abs().max() > 1
    torch.testing.assert_close(torch.cat(steps), whole, rtol=0, atol=1e-4)


@given(st.data())
@settings(max_examples=40)
def test_random_arrivals_lengths_chunks_and_cancellations(data: st.DataObject) -> None:
    e = engine(
        max_num_seqs=data.draw(st.integers(1, 4), "rows"),
        max_batched_tokens=data.draw(st.integers(1, 40), "budget"),
        max_model_len=data.draw(st.sampled_from([24, 48, 300]), "max_model_len"),
    )
    e.scheduler.max_cached_tokens = data.draw(st.sampled_from([60, 10_000]), "memory")
    rng = random.Random(data.draw(st.integers(0, 99), "seed"))
    sequences: list[Sequence] = []
    cancelled: list[Sequence] = []
    for _ in range(data.draw(st.integers(1, 7), "requests")):
        length = data.draw(st.integers(1, 23), "length")
        params = SamplingParams(
            temperature=0.0, max_tokens=data.draw(st.none() | st.integers(1, 9), "max_tokens")
        )
        if params.max_tokens is None and e.max_model_len > 50:
            continue
        sequences.append(e.sequence([rng.randrange(CONFIG.vocab_size) for _ in range(length)], params))
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
    ],
)
def test_engines_that_cannot_be(wrong: dict[str, object]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=f"{name} is {value!r}"):
        engine(**wrong)


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(UserError, match="without a tokenizer"):
        engine().sequence([1], SamplingParams(stop="x"))


@pytest.mark.parametrize("when", [0, 1, 4])
def test_a_step_that_fails_can_be_taken_again(when: int, monkeypatch: pytest.MonkeyPatch) -> None:
    e = engine(max_num_seqs=3, max_batched_tokens=10)
    sequences = [e.sequence(p, GREEDY) for p in prompts([12, 3, 9])]
    for sequence in sequences:
        e.add(sequence)
    for _ in range(when):
        e.step()

    def fail(*_: Any) -> Tensor:
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr(model(), "forward_flat", fail)
        for _ in range(2):
            with pytest.raises(MemoryError):
                e.step()
    run(e)
    for sequence in sequences:
        assert sequence.output_ids == greedy(sequence.prompt_ids, 12)


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


def test_memory_limits_who_runs_together_but_never_the_first() -> None:
    e = engine(max_num_seqs=4)
    e.scheduler.max_cached_tokens = 50
    sequences = [e.sequence(p, GREEDY) for p in prompts([8, 8, 60, 8])]  # 20 or 72 tokens at their longest
    for sequence in sequences:
        e.add(sequence)
    together = []
    while e.unfinished:
        e.step()
        together.append({sequences.index(s) for s in e.scheduler.running})
    assert {0, 1} in together and {2} in together
    assert not any(2 in running and len(running) > 1 for running in together)
    for sequence in sequences:
        assert sequence.output_ids == greedy(sequence.prompt_ids, 12)


def test_memory_that_cannot_be_measured_limits_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3.engine.machine.free_memory", lambda device: None)
    e = engine(max_num_seqs=3)
    assert e.max_model_len == CONFIG.max_position_embeddings
    for prompt in prompts([4, 4, 4]):
        e.add(e.sequence(prompt, SamplingParams(max_tokens=None)))
    e.step()
    assert len(e.scheduler.running) == 3


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
