"""/v1/chat/completions: the next turn of a conversation, whole or as a stream.

The server keeps no conversation: each request brings all of it, and what the last turn's prompt and this one's have in
common is found in the engine's prefix cache.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from dsv3.engine.async_engine import Update
from dsv3.server.answers import Answer, Answers
from dsv3.server.apart import apart, json_answer
from dsv3.server.protocol import ChatRequest, NamedTool, read
from dsv3.server.service import Exchange, Service, exchange_of, service_of
from dsv3.server.speech import Speaking, Speech
from dsv3.server.sse import DONE, EventStream, compact, data, quote, while_connected
from dsv3.server.structure import structured_output


async def chat_completions(request: Request) -> Response:
    service, exchange = service_of(request), exchange_of(request)
    asked = await read(ChatRequest, request, service.settings)
    chat = await Chat.begin(service, exchange, asked)
    if asked.stream:
        return EventStream(chat.events(), service, exchange)
    async with while_connected(request.receive, service):
        answers = await chat.answers.collect()
    return await json_answer(chat.answers.size(), lambda: chat.whole(answers))


class Chat:
    """One request of this endpoint."""

    def __init__(self, asked: ChatRequest, answers: Answers, model: str, speaking: Speaking) -> None:
        self.asked, self.answers, self.speaking = asked, answers, speaking
        self.vocabulary = answers.service.vocabulary
        self.head = {
            "id": f"chatcmpl-{answers.exchange.id}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": answers.service.fingerprint,
        }

    @classmethod
    async def begin(cls, service: Service, exchange: Exchange, asked: ChatRequest) -> Chat:
        model = service.served(asked.model)
        messages = [message.plain() for message in asked.messages]
        if service.settings.log_prompts:
            exchange.prompt = messages
        choice = asked.tool_choice
        speaking = Speaking(
            service.engine.llm.tokenizer,
            [tool.model_dump(exclude_none=True) for tool in asked.tools or ()],
            choice.model_dump() if isinstance(choice, NamedTool) else choice,
            asked.parallel_tool_calls is not False,
        )
        goes_on = bool(asked.continue_final_message)
        prompt = await service.encode_chat(
            exchange, messages, speaking.tools, asked.chat_template_kwargs, not goes_on, goes_on
        )
        speaking.begin(prompt, (messages[-1]["content"] or "") if goes_on else "")
        structured = speaking.structured(structured_output(asked.structure(), asked.response_format))
        params = asked.sampling(
            service.engine.llm.default_params,
            max_tokens=asked.max_completion_tokens or asked.max_tokens,
            logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
            prompt_logprobs=asked.prompt_logprobs,
            logit_bias=asked.biases,
            structured=structured,
        )
        answers = await Answers.begin(
            service,
            exchange,
            [prompt],
            params,
            salt=asked.cache_salt,
            decoder=speaking.decoder,
            param="messages",
        )
        return cls(asked, answers, model, speaking)

    # Whole ---------------------------------------------------------------------------------------------

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        choices = [self._choice(i, answer) for i, answer in enumerate(answers)]
        whole = {**self.head, "choices": choices, "usage": self.answers.usage()}
        if self.asked.prompt_logprobs is not None:
            whole["prompt_logprobs"] = self.vocabulary.prompt_logprobs(answers[0].prompt_logprobs or [])
        if self.asked.return_token_ids:
            whole["prompt_token_ids"] = self.answers.prompts[0]
        return whole

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        speech = self.speaking.listen()
        speech.push(answer.text)
        speech.close()
        choice: dict[str, Any] = {
            "index": index,
            "message": speech.message(),
            "logprobs": self._logprobs(answer),
            "finish_reason": speech.finish_reason(answer.finish_reason),
            "stop_reason": answer.stop_reason,
        }
        if self.asked.return_token_ids:
            choice["token_ids"] = answer.token_ids
        return choice

    def _logprobs(self, answer: Answer | Update) -> dict[str, Any] | None:
        if not self.asked.logprobs:
            return None
        return {"content": self.vocabulary.chat_logprobs(answer.logprobs or ()), "refusal": None}

    # Streamed ------------------------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[bytes, None]:
        asked = self.asked
        head = {**self.head, "object": "chat.completion.chunk"}
        end = ',"usage":null}\n\n' if asked.wants_usage else "}\n\n"
        chunk = f'data: {compact(head)[:-1]},"choices":[{{"index":'
        before = [f'{chunk}{i},"delta":{{"content":' for i in range(self.answers.params.n)]
        after = f'}},"logprobs":null,"finish_reason":null}}]{end}'
        detailed = bool(asked.logprobs or asked.return_token_ids or asked.prompt_logprobs is not None)
        plain = not detailed and self.speaking.plain
        speeches = [self.speaking.listen() for _ in before]
        role = f',"delta":{{"role":"assistant","content":""}},"logprobs":null,"finish_reason":null}}]{end}'
        yield "".join(f"{chunk}{i}{role}" for i in range(len(before))).encode()
        started: set[int] = set()
        async with aclosing(self.answers.updates()) as updates:
            async for update in updates:
                if plain and update.finish_reason is None:
                    if update.text:
                        yield (before[update.index] + quote(update.text) + after).encode()
                    continue
                first = update.index not in started
                started.add(update.index)
                write = partial(self._chunks, head, update, speeches[update.index], detailed, first)
                yield await apart(self.answers.size(update) if detailed else 0, write)
        usage = data({**head, "choices": [], "usage": self.answers.usage()}) if asked.wants_usage else b""
        yield usage + DONE

    def _chunks(
        self, head: dict[str, Any], update: Update, speech: Speech, detailed: bool, first: bool
    ) -> bytes:
        """All that one update brings. first: whether it is its answer's first."""
        choices = self._choices(update, speech, detailed)
        more: dict[str, Any] = {"usage": None} if self.asked.wants_usage else {}
        if first and self.asked.prompt_logprobs is not None:
            more["prompt_logprobs"] = self.vocabulary.prompt_logprobs(update.prompt_logprobs or [])
        if first and self.asked.return_token_ids:
            more["prompt_token_ids"] = self.answers.prompts[0]
        return b"".join(data({**head, "choices": [choice], **more}) for choice in choices)

    def _choices(self, update: Update, speech: Speech, detailed: bool) -> list[dict[str, Any]]:
        """The chunks of one update: its parts one by one, and at its end why it ended.

        What is known of the tokens goes with the first chunk."""
        deltas = speech.push(update.text)
        if update.finish_reason is not None:
            deltas += speech.close()
        if detailed and not deltas:
            deltas = [{}]
        choices: list[dict[str, Any]] = [
            {"index": update.index, "delta": delta, "logprobs": None, "finish_reason": None}
            for delta in deltas
        ]
        if update.finish_reason is not None:
            reason = speech.finish_reason(update.finish_reason)
            last = {"index": update.index, "delta": {}, "logprobs": None, "finish_reason": reason}
            choices.append({**last, "stop_reason": update.stop_reason})
        if detailed:
            choices[0]["logprobs"] = self._logprobs(update)
            if self.asked.return_token_ids:
                choices[0]["token_ids"] = update.token_ids
        return choices
