"""Clients that nobody here wrote, against the server with the model that ships: OpenAI's own, curl, lm-eval."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from dsv3.checkpoint.hub import resolve
from dsv3.engine import sampling
from dsv3.engine.async_engine import AsyncEngine
from dsv3.engine.llm import LLM
from dsv3.engine.sampling import Sampler
from dsv3.server.keys import add_key
from dsv3.text import Tokenizer
from dsv3.text.tools import CALLS_BEGIN, CALLS_END, ToolCall, write_calls
from tests.server.live import Live, live

HELLO: Any = [{"role": "user", "content": "Hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def engine() -> AsyncEngine:
    return AsyncEngine(LLM("nano", dtype="float32", max_num_seqs=16))


@pytest.fixture(scope="module")
def server(engine: AsyncEngine) -> Iterator[Live]:
    with live(engine, served_model_names=("nano",)) as found:
        yield found


@pytest.fixture
def client(server: Live) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


# OpenAI's client ----------------------------------------------------------------------------------------


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="nano", messages=HELLO, temperature=0, max_tokens=20)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_is_the_answer_in_pieces(client: OpenAI) -> None:
    asked: Any = {"model": "nano", "messages": HELLO, "temperature": 0, "max_tokens": 30}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason


def test_an_answer_is_continued(client: OpenAI) -> None:
    asked: Any = {"model": "nano", "temperature": 0}
    whole = client.chat.completions.create(**asked, messages=HELLO, max_tokens=30).choices[0].message.content
    assert whole is not None
    said = " ".join(whole.split(" ")[:4])
    more = client.chat.completions.create(
        **asked,
        messages=[*HELLO, {"role": "assistant", "content": said}],
        max_tokens=30,
        extra_body={"add_generation_prompt": False, "continue_final_message": True},
    )
    assert (said + (more.choices[0].message.content or "")).startswith(whole)


def test_several_answers_and_seeds(client: OpenAI) -> None:
    def ask(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model="nano", messages=HELLO, n=3, temperature=1.5, max_tokens=12, seed=seed
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    assert len(set(ask(3))) > 1
    assert ask(3) == ask(3) != ask(2)


def test_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="nano", messages=HELLO, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    report = answer.choices[0].logprobs
    assert report is not None and report.content is not None
    for token in report.content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token, "greedy takes the likeliest"
    said = b"".join(bytes(token.bytes or []) for token in report.content).decode()
    assert said.startswith(answer.choices[0].message.content or "?")


class Pet(BaseModel):
    name: str
    kind: Literal["cat", "dog", "fox"]
    age: int


def test_a_json_schema_holds(client: OpenAI) -> None:
    pytest.importorskip("xgrammar")
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 10},
            "kind": {"enum": ["cat", "dog", "fox"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 30},
        },
        "required": ["name", "kind", "age"],
        "additionalProperties": False,
    }
    for seed in range(3):
        answer = client.chat.completions.create(
            model="nano",
            messages=[{"role": "user", "content": "Tell me about a pet."}],
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "pet", "schema": schema, "strict": True},
            },
            temperature=1.0,
            max_tokens=200,
            seed=seed,
        )
        assert answer.choices[0].finish_reason == "stop"
        assert 0 <= Pet.model_validate_json(answer.choices[0].message.content or "").age <= 30


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_must_be_called_is(client: OpenAI, stream: bool) -> None:
    pytest.importorskip("xgrammar")
    asked: Any = {
        "model": "nano",
        "messages": [{"role": "user", "content": "What is the weather in Oslo?"}],
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "temperature": 1.0,
        "max_tokens": 200,
        "seed": 3,
    }
    if stream:
        name, arguments, reason = "", "", None
        for chunk in client.chat.completions.create(**asked, stream=True):
            (choice,) = chunk.choices
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or []:
                assert call.index == 0 and call.function is not None
                name += call.function.name or ""
                arguments += call.function.arguments or ""
    else:
        (choice,) = client.chat.completions.create(**asked).choices
        reason = choice.finish_reason
        assert choice.message.tool_calls is not None
        (made,) = choice.message.tool_calls
        assert made.type == "function" and made.id
        name, arguments = made.function.name, made.function.arguments
    assert reason == "tool_calls" and name == "get_weather"
    values = json.loads(arguments)
    assert set(values) == {"city", "unit"} and values["unit"] in ("celsius", "fahrenheit")


def wish(monkeypatch: pytest.MonkeyPatch, *texts: str) -> None:
    """Let the model want to say this and no more, and go on with the next text where it may not say one; nano would hardly
    call a tool by itself."""
    tokenizer = Tokenizer.from_pretrained(resolve("nano"))
    script = [*map(tokenizer.encode, texts), [tokenizer.eos_token_ids[0]]]
    left: dict[Sampler, list[list[int]]] = {}

    def sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> Any:
        logits = logits.float().clone()
        for row, sampler in zip(logits, samplers, strict=True):
            rest = left.setdefault(sampler, [list(ids) for ids in script])
            while rest and not (rest[0] and (sampler.matcher is None or sampler.matcher.allows(rest[0][0]))):
                rest.pop(0)
            if rest:
                row[rest[0].pop(0)] += 1000
        return sampling.sample(logits, samplers)

    monkeypatch.setattr("dsv3.engine.engine.sample", sample)


class Weather(BaseModel):
    city: Literal["Oslo", "Rome"]
    days: Literal[3, 7] | None


FREE: Any = {"type": "function", "function": {"name": "note", "parameters": {"not": {}}}}
RIGHT = '{"city": "Oslo", "days": 3}'
CALL = write_calls([ToolCall("Weather", RIGHT)]).removeprefix(CALLS_BEGIN).removesuffix(CALLS_END)
HEAD, TAIL = CALL.split(RIGHT)
WRONG = (HEAD + '{"city": "', "Atlantis", 'Rome", "days": ', '"many"', "7}" + TAIL)
"""A call to nowhere, and what is left to say where that cannot be said."""
FIXED = '{"city": "Rome", "days": 7}'


@pytest.mark.parametrize("parallel", [True, False])
def test_a_strict_tool_that_may_be_called(
    client: OpenAI, monkeypatch: pytest.MonkeyPatch, parallel: bool
) -> None:
    """What OpenAI's client makes of a pydantic model is strict: it parses the arguments, and they must fit."""
    pytest.importorskip("xgrammar")
    first, *rest = WRONG
    wish(monkeypatch, f"Let me see.{CALLS_BEGIN}{CALL}", f"\n{first}", *rest, CALLS_END)
    asked: Any = {
        "model": "nano",
        "messages": HELLO,
        "tools": [openai.pydantic_function_tool(Weather), FREE],
        "parallel_tool_calls": parallel,
        "max_tokens": 400,
        "temperature": 0,
    }
    (choice,) = client.chat.completions.create(**asked).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
    calls = [call.function.arguments for call in choice.message.tool_calls or ()]
    assert calls == [RIGHT, FIXED][: 1 + parallel]

    with client.chat.completions.stream(**{**asked, "tools": asked["tools"][:1]}) as stream:
        (final,) = stream.get_final_completion().choices
    assert final.message.content == "Let me see."
    assert [call.function.arguments for call in final.message.tool_calls or ()] == calls
    assert all(isinstance(c.function.parsed_arguments, Weather) for c in final.message.tool_calls or ())

    strict = openai.pydantic_function_tool(Weather)["function"]
    response = client.responses.create(
        model="nano",
        input="Hello",
        tools=[{"type": "function", **strict}, {"type": "function", **FREE["function"], "strict": False}],  # type: ignore[typeddict-item, list-item]
        parallel_tool_calls=parallel,
        temperature=0,
        max_output_tokens=400,
    )
    assert response.output_text == "Let me see."
    assert [item.arguments for item in response.output if item.type == "function_call"] == calls


def test_a_strict_tool_need_not_be_called(client: OpenAI) -> None:
    pytest.importorskip("xgrammar")
    asked: Any = {"model": "nano", "messages": HELLO, "max_tokens": 30, "temperature": 0}
    tool = openai.pydantic_function_tool(Weather)
    loosened: Any = {**tool["function"], "strict": False}
    free = client.chat.completions.create(**asked, tools=[{"type": "function", "function": loosened}])
    held = client.chat.completions.create(**asked, tools=[tool])
    assert held.choices[0].message.content == free.choices[0].message.content
    with pytest.raises(openai.BadRequestError) as error:
        loose: Any = {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}, "strict": True}
        client.chat.completions.create(**asked, tools=[{"type": "function", "function": loose}])
    assert error.value.param == "tools[0].function.parameters"


def test_a_form_or_a_tool(client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text has the form, unless a tool is called."""
    pytest.importorskip("xgrammar")
    asked: Any = {
        "model": "nano",
        "messages": HELLO,
        "tools": [openai.pydantic_function_tool(Weather)],
        "response_format": Pet,
        "temperature": 0,
        "max_tokens": 300,
    }
    wish(monkeypatch, '{"name": "<｜tool▁calls▁begin｜>", "kind": "fox", "age": 3}')
    (choice,) = client.chat.completions.parse(**asked).choices
    assert choice.finish_reason == "stop" and not choice.message.tool_calls
    assert choice.message.parsed == Pet(name="<｜tool▁calls▁begin｜>", kind="fox", age=3)
    wish(monkeypatch, CALLS_BEGIN, *WRONG, CALLS_END)
    (choice,) = client.chat.completions.parse(**asked).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls or []
    assert call.function.parsed_arguments == Weather(city="Rome", days=7)


def test_what_a_tool_said_is_read(client: OpenAI) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
    }
    messages: Any = [
        {"role": "user", "content": "What is the weather in Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "It is snowing."},
    ]
    answer = client.chat.completions.create(model="nano", messages=messages, tools=[WEATHER], max_tokens=5)
    assert answer.usage is not None and answer.usage.prompt_tokens > 30


def test_completions_echo_and_stop(client: OpenAI) -> None:
    answer = client.completions.create(
        model="nano",
        prompt="Once upon a time",
        max_tokens=30,
        temperature=0,
        echo=True,
        logprobs=1,
        stop=["."],
    )
    (choice,) = answer.choices
    assert choice.text.startswith("Once upon a time") and "." not in choice.text
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.token_logprobs[1] is not None
    several = client.completions.create(model="nano", prompt=["One", "Two"], max_tokens=3, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]


def test_responses(client: OpenAI) -> None:
    asked: Any = {
        "model": "nano",
        "input": "Hello",
        "instructions": "You are kind.",
        "max_output_tokens": 20,
        "temperature": 0,
    }
    whole = client.responses.create(**asked)
    assert whole.output_text and whole.status in ("completed", "incomplete")
    events = list(client.responses.create(**asked, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text


def test_logprobs_of_responses(client: OpenAI) -> None:
    asked: Any = {
        "model": "nano",
        "input": "Hello",
        "max_output_tokens": 8,
        "temperature": 0,
        "top_logprobs": 2,
    }
    asked["include"] = ["message.output_text.logprobs"]
    response = client.responses.create(**asked)
    (message,) = response.output
    assert message.type == "message" and message.content[0].type == "output_text"
    report = message.content[0].logprobs or []
    assert "".join(token.token for token in report) == response.output_text
    chat = client.chat.completions.create(
        model="nano", messages=HELLO, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    for token, other in zip(report, chat.choices[0].logprobs.content, strict=False):
        assert token.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [top.token for top in token.top_logprobs] == [top.token for top in other.top_logprobs]
    streamed = client.responses.create(**asked, stream=True)
    deltas = [event for event in streamed if event.type == "response.output_text.delta"]
    assert [token.token for event in deltas for token in event.logprobs] == [token.token for token in report]


def test_embeddings(client: OpenAI) -> None:
    answer = client.embeddings.create(model="nano", input=["a fox", "a fox", "the sea at night"])
    same, again, other = (item.embedding for item in answer.data)
    assert len(same) == 256 and other != same
    assert same == pytest.approx(again, abs=1e-4)
    plain = client.embeddings.create(model="nano", input="a fox", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(same, abs=1e-4)


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").id == "nano"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_errors_are_what_the_client_knows(client: OpenAI) -> None:
    def refused(**more: Any) -> openai.BadRequestError:
        asked: Any = {"model": "nano", "messages": HELLO, "max_tokens": 5} | more
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(**asked)
        return error.value

    assert refused(temperature=-1).param == "temperature"
    assert refused(extra_body={"no_such_thing": 1}).param == "no_such_thing"
    assert refused(messages=[]).param == "messages"
    assert refused(audio={"voice": "alloy", "format": "wav"}).param == "audio"
    assert refused(messages=[{"role": "user", "content": "word " * 5000}]).code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert unknown.value.code == "model_not_found"


def test_many_at_once_with_the_asynchronous_client(server: Live) -> None:
    async def main() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(i: int) -> str:
                asked: Any = [{"role": "user", "content": f"Tell me about the number {i % 4}."}]
                parts = []
                stream = await client.chat.completions.create(
                    model="nano", messages=asked, temperature=0, max_tokens=15, stream=True
                )
                async for chunk in stream:
                    parts.append(chunk.choices[0].delta.content or "")
                return "".join(parts)

            answers = await asyncio.gather(*(one(i) for i in range(24)))
            assert all(answers) and all(answers[i] == answers[i % 4] for i in range(24))

    asyncio.run(main())


def test_keys(engine: AsyncEngine, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = add_key(path, "ann")
    fresh = AsyncEngine(engine.llm)
    with live(fresh, api_keys=path, rate_limit=2) as server:
        stranger = OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        ann = OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        ann.models.list()
        with pytest.raises(openai.RateLimitError) as limited:
            for _ in range(5):
                ann.models.list()
        assert int(limited.value.response.headers["retry-after"]) >= 1


# Others -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server: Live) -> None:
    asked = {"model": "nano", "messages": HELLO, "max_tokens": 5, "stream": True}
    command = ["curl", "-sSN", f"{server.url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    done = subprocess.run([*command, "-d", json.dumps(asked)], capture_output=True, text=True, check=True)
    events = [line for line in done.stdout.splitlines() if line]
    assert all(line.startswith("data: ") for line in events) and events[-1] == "data: [DONE]"
    assert json.loads(events[0][6:])["object"] == "chat.completion.chunk"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local-completions", "local-chat-completions"])
def test_lm_eval(server: Live, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own code asks, over HTTP: log-likelihoods of answers (completions), and greedy text (both)."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    rows = [
        {"question": "Once upon a", "right": " time", "wrong": " zebra"},
        {"question": "She opened the", "right": " door", "wrong": " Thursday"},
        {"question": "The king and the", "right": " queen", "wrong": " nineteen"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\ntest_split: test\n"
    (tmp_path / "choose.yaml").write_text(
        f"task: choose\n{common}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\ntarget_delimiter: ''\n"
        "doc_to_choice: ['{{right}}', '{{wrong}}']\ndoc_to_target: 0\nmetric_list: [{metric: acc}]\n"
    )
    (tmp_path / "say.yaml").write_text(
        f"task: say\n{common}output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\ndoc_to_target: '{{{{right}}}}'\n"
        "generation_kwargs: {until: ['\\n'], max_gen_toks: 4, temperature: 0.0}\nmetric_list: [{metric: exact_match}]\n"
    )
    chat = kind == "local-chat-completions"
    route = "chat/completions" if chat else "completions"
    arguments = f"model=nano,base_url={server.url}/v1/{route},num_concurrent=2,max_retries=1"
    if not chat:
        arguments += f",tokenizer={files('dsv3') / 'assets' / 'nano'},tokenizer_backend=huggingface"
    results = lm_eval.simple_evaluate(
        model=kind,
        model_args=arguments,
        tasks=["say"] if chat else ["choose", "say"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=chat,
        bootstrap_iters=0,
        log_samples=True,
    )
    assert len(results["samples"]["say"]) == 3
    assert all(isinstance(sample["resps"][0][0], str) for sample in results["samples"]["say"])
    if not chat:
        assert results["results"]["choose"]["acc,none"] == 1.0, "even nano knows these"
