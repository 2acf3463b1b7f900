"""The engine behind asyncio: everybody gets what they would get alone, and whoever leaves frees their blocks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from dsv3.engine.async_engine import AsyncEngine, EngineBusy, EngineError, EngineStats, Update
from dsv3.engine.sampling import SamplingParams
from dsv3.errors import UserError
from tests.engine.small import engine, greedy, model

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


class OnlyAnEngine:
    """What AsyncEngine needs of an LLM."""

    def __init__(self, **kwargs: Any) -> None:
        self.engine = engine(**kwargs)
        self.experts = None


@asynccontextmanager
async def running(max_waiting: int | None = None, **kwargs: Any) -> AsyncIterator[AsyncEngine]:
    asynchronous = AsyncEngine(OnlyAnEngine(**kwargs), max_waiting=max_waiting)  # type: ignore[arg-type]
    asynchronous.start()
    try:
        yield asynchronous
    finally:
        await asynchronous.close()


async def answer(e: AsyncEngine, prompt: list[int], params: SamplingParams = GREEDY) -> list[Update]:
    return [update async for update in e.generate(prompt, params)]


def tokens(updates: list[Update], index: int = 0) -> list[int]:
    return [token for update in updates if update.index == index for token in update.token_ids]


def idle(stats: EngineStats) -> bool:
    return stats.running == stats.waiting == stats.blocks_used == 0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


def test_many_at_once_get_what_the_plain_model_says() -> None:
    async def main() -> None:
        async with running(max_num_seqs=4, max_batched_tokens=30) as e:
            asked = [[i, i + 1, i + 2] * (1 + i % 5) for i in range(12)]
            answers = await asyncio.gather(*(answer(e, prompt) for prompt in asked))
            for prompt, updates in zip(asked, answers, strict=True):
                assert tokens(updates) == greedy(prompt, 12)
                assert [u.finish_reason for u in updates if u.finish_reason] == ["length"]
                assert updates[-1].finish_reason
            await until(lambda: idle(e.stats()))
            stats = e.stats()
            assert stats.finished == {"length": 12}
            assert stats.generated_tokens == 12 * 12

    asyncio.run(main())


def test_several_answers_to_one_prompt() -> None:
    async def main() -> None:
        async with running() as e:
            params = SamplingParams(n=3, temperature=1.3, max_tokens=8, seed=1, logprobs=1)
            updates = await answer(e, [1, 2, 3], params)
            assert {u.index for u in updates} == {0, 1, 2}
            for index in range(3):
                mine = [u for u in updates if u.index == index]
                reported = [one.token_id for u in mine for one in u.logprobs or []]
                assert reported == tokens(updates, index) and len(reported) == 8
            again = await answer(e, [1, 2, 3], params)
            assert [tokens(again, i) for i in range(3)] == [tokens(updates, i) for i in range(3)]

    asyncio.run(main())


def test_a_slow_reader_gets_everything_in_fewer_updates_and_holds_nobody_up() -> None:
    async def main() -> None:
        async with running(speculation="off") as e:
            slow = e.generate(
                [1, 2], SamplingParams(temperature=0.0, max_tokens=40, logprobs=0, prompt_logprobs=0)
            )
            first = await anext(slow)
            await until(lambda: e.stats().finished == {"length": 1})
            assert tokens(await answer(e, [5])) == greedy([5], 12)
            updates = [first, *[update async for update in slow]]
            assert tokens(updates) == greedy([1, 2], 40) and len(updates) < 10
            assert [len(u.logprobs or []) for u in updates] == [len(u.token_ids) for u in updates]
            assert [u.prompt_logprobs is not None for u in updates] == [True] + [False] * (len(updates) - 1)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["aclose", "cancel", "never read"])
def test_who_leaves_frees_their_blocks(how: str) -> None:
    async def main() -> None:
        async with running(max_model_len=500) as e:
            long = SamplingParams(temperature=0.0, max_tokens=None)
            if how == "cancel":
                task = asyncio.create_task(answer(e, [1] * 100, long))
                await until(lambda: e.stats().running == 1)
                task.cancel()
            else:
                generator = e.generate([1] * 100, long)
                if how == "aclose":
                    await anext(generator)
                await generator.aclose()
            if how == "never read":
                assert e.stats().steps == 0
            else:
                await until(lambda: e.stats().finished == {"abort": 1})
            await until(lambda: idle(e.stats()))
            assert tokens(await answer(e, [5])) == greedy([5], 12)

    asyncio.run(main())


def test_wrong_requests_are_refused_at_once() -> None:
    async def main() -> None:
        async with running(max_model_len=20) as e:
            with pytest.raises(UserError, match="shorten it"):
                e.generate([1] * 30, GREEDY)
            with pytest.raises(UserError, match="empty"):
                e.generate([], GREEDY)
            assert idle(e.stats())

    asyncio.run(main())


def test_a_full_queue_refuses_more() -> None:
    async def main() -> None:
        async with running(max_waiting=2, max_num_seqs=1, max_model_len=500) as e:
            long = SamplingParams(temperature=0.0, max_tokens=None)
            generators = [e.generate([1, 2], long)]
            await anext(generators[0])
            waiting = [asyncio.create_task(answer(e, [3])) for _ in range(2)]
            await until(lambda: e.stats().waiting == 2)
            with pytest.raises(EngineBusy, match="2 answers are waited for already"):
                e.generate([4], GREEDY)
            await generators[0].aclose()
            assert [tokens(updates) for updates in await asyncio.gather(*waiting)] == [greedy([3], 12)] * 2

    asyncio.run(main())


def test_deadlines_reach_the_reader() -> None:
    async def main() -> None:
        async with running() as e:
            updates = [u async for u in e.generate([1, 2], SamplingParams(max_tokens=None), deadline=0.05)]
            assert updates[-1].finish_reason == "deadline"
            with pytest.raises(EngineError, match="deadline"):
                await e.embed([1, 2, 3], deadline=0.0)

    asyncio.run(main())


def test_embeddings_are_the_mean_of_the_hidden_states() -> None:
    async def main() -> list[float]:
        async with running(max_batched_tokens=16, max_num_seqs=2) as e:
            return await e.embed(list(range(1, 41)))

    with torch.no_grad():
        expected = model()(torch.arange(1, 41)[None]).hidden_states[0].mean(0)
    torch.testing.assert_close(torch.tensor(asyncio.run(main())), expected, rtol=0, atol=1e-4)


def test_a_failing_step_ends_those_who_run_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with running() as e:
            step = e._engine.step
            broken = True

            def fails() -> Any:
                if broken:
                    raise MemoryError("no room")
                return step()

            monkeypatch.setattr(e._engine, "step", fails)
            tasks: list[Awaitable[Any]] = [answer(e, [1, 2]), answer(e, [3])]
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(outcome, EngineError) and "no room" in str(outcome)
            await until(lambda: idle(e.stats()))
            broken = False
            assert tokens(await answer(e, [5])) == greedy([5], 12)

    asyncio.run(main())


def test_closing_ends_everybody() -> None:
    async def main() -> None:
        async with running(max_model_len=500) as e:
            task = asyncio.create_task(answer(e, [1], SamplingParams(max_tokens=None)))
            await until(lambda: e.stats().running == 1)
        with pytest.raises(EngineError, match="shut down"):
            await task
        with pytest.raises(EngineBusy, match="not running"):
            e.generate([1], GREEDY)

    asyncio.run(main())


def test_closing_forgets_nobody_who_has_just_come() -> None:
    """Whose order lies unread, and who starts to read only afterwards, hear of it too."""

    async def main() -> None:
        async with running() as e:
            step = e._engine.step
            e._engine.step = lambda: (time.sleep(0.05), step())[1]  # type: ignore[method-assign, func-returns-value]
            started = asyncio.create_task(answer(e, [1], SamplingParams(max_tokens=None)))
            await until(lambda: e.stats().running == 1)
            ordered = asyncio.create_task(answer(e, [2]))
            await asyncio.sleep(0)
            later = e.generate([3], GREEDY)
        for task in (started, ordered, anext(later)):
            with pytest.raises(EngineError, match="shut down"):
                async with asyncio.timeout(5):
                    await task

    asyncio.run(main())
