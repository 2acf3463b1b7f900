"""/v1/responses: OpenAI's newer API, without its memory.

An answer here is a list of items: messages, and calls of tools. A stream tells of each item that it begins, what is
added to it, and that it is done, so that a client need not guess. Nothing is stored: `store` and whatever
builds on it (`previous_response_id`, `conversation`, `background`) is refused, and so are OpenAI's own tools.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from dsv3.engine.async_engine import Update
from dsv3.server.answers import Answers
from dsv3.server.apart import apart, json_answer
from dsv3.server.errors import ApiError
from dsv3.server.protocol import (
    InputCall,
    InputCallOutput,
    InputItem,
    InputMessage,
    InputReasoning,
    ResponseNamedTool,
    ResponsesRequest,
    TextPart,
    read,
)
from dsv3.server.service import Exchange, Service, exchange_of, service_of
from dsv3.server.speech import Speaking, Spelling
from dsv3.server.sse import EventStream, compact, quote, while_connected
from dsv3.server.structure import structured_output


async def responses(request: Request) -> Response:
    service, exchange = service_of(request), exchange_of(request)
    asked = await read(ResponsesRequest, request, service.settings)
    reply = await Reply.begin(service, exchange, asked)
    if asked.stream:
        return EventStream(reply.events(), service, exchange, reply.failed)
    async with while_connected(request.receive, service), aclosing(reply.answers.updates()) as updates:
        async for update in updates:
            reply.push(update)
    reply.close()
    await reply.count_reasoning()
    return await json_answer(reply.answers.size(), lambda: reply.whole(reply.status))


class Reply:
    """One response, from its first item to its last.

    `push` and `close` take what the model says and return the events that tell of it; the whole is what all of them
    have left in `items`."""

    def __init__(self, asked: ResponsesRequest, answers: Answers, model: str, speaking: Speaking) -> None:
        self.asked, self.answers = asked, answers
        self.id = answers.exchange.id
        self.items: list[dict[str, Any]] = []
        self.status = "in_progress"
        self._speech = speaking.listen()
        self._plain = speaking.plain and not asked.wants_logprobs
        self._spelling = Spelling()
        self._decoder = speaking.decode()
        self._number = 0
        self._finish_reason: str | None = None
        self._reasoning_tokens = 0
        params, format = answers.params, asked.text.format if asked.text else None
        choice = asked.tool_choice or "auto"
        self._head: dict[str, Any] = {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": int(time.time()),
            "background": False,
            "error": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": model,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": params.temperature,
            "text": {
                "format": format.model_dump(by_alias=True, exclude_none=True) if format else {"type": "text"}
            },
            "tool_choice": choice.model_dump() if isinstance(choice, ResponseNamedTool) else choice,
            "tools": [tool.model_dump() for tool in asked.tools or ()],
            "top_logprobs": params.logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "user": asked.user,
        }

    @classmethod
    async def begin(cls, service: Service, exchange: Exchange, asked: ResponsesRequest) -> Reply:
        model = service.served(asked.model)
        messages = _messages(asked)
        if service.settings.log_prompts:
            exchange.prompt = messages
        tools = [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in asked.tools or ()
        ]
        choice: str | dict[str, Any] | None
        if isinstance(asked.tool_choice, ResponseNamedTool):
            choice = {"type": "function", "function": {"name": asked.tool_choice.name}}
        else:
            choice = asked.tool_choice
        speaking = Speaking(
            service.engine.llm.tokenizer, tools, choice, asked.parallel_tool_calls is not False
        )
        prompt = await service.encode_chat(exchange, messages, speaking.tools, asked.chat_template_kwargs)
        speaking.begin(prompt)
        structured = speaking.structured(structured_output(None, asked.text.format if asked.text else None))
        params = asked.sampling(
            service.engine.llm.default_params,
            max_tokens=asked.max_output_tokens,
            logprobs=(asked.top_logprobs or 0) if asked.wants_logprobs else None,
            structured=structured,
        )
        answers = await Answers.begin(
            service,
            exchange,
            [prompt],
            params,
            salt=asked.cache_salt,
            decoder=speaking.decoder,
            param="input",
        )
        return cls(asked, answers, model, speaking)

    def whole(self, status: str) -> dict[str, Any]:
        """The response as it stands."""
        done = status in ("completed", "incomplete")
        exchange = self.answers.exchange
        usage = {
            "input_tokens": exchange.prompt_tokens,
            "input_tokens_details": {"cached_tokens": exchange.cached_tokens},
            "output_tokens": exchange.generated_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": exchange.prompt_tokens + exchange.generated_tokens,
        }
        return {
            **self._head,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "completed_at": int(time.time()) if done else None,
            "output": self.items if done else [],
            "usage": usage if done else None,
        }

    async def count_reasoning(self) -> None:
        """How many of the tokens are reasoning, by its text: all that is said is one text to the engine."""
        texts = [item["content"][0]["text"] for item in self.items if item["type"] == "reasoning"]
        self._reasoning_tokens = sum(map(len, await self.answers.service.encode(texts, special=False)))

    # What the model says -------------------------------------------------------------------------------

    def push(self, update: Update) -> list[bytes]:
        self._finish_reason = update.finish_reason
        if not self.asked.wants_logprobs:
            return self._say(update.text)
        # Token by token, so that what each of them says can be told. What ends the text is not part of it.
        events: list[bytes] = []
        said = update.logprobs or []
        for token in said[:-1] if update.finish_reason == "stop" else said:
            text = self._decoder.push(token.token_id)
            self._spelling.add(token, text)
            events += self._say(text)
        return events if update.finish_reason is None else events + self._say(self._decoder.flush())

    def _say(self, text: str) -> list[bytes]:
        return [event for delta in self._speech.push(text) for event in self._take(delta)]

    def close(self) -> list[bytes]:
        events = [event for delta in self._speech.close() for event in self._take(delta)]
        if not self.items:  # an answer without a word is a message without one
            events += self._open_message()
        self.status = "incomplete" if self._finish_reason == "length" else "completed"
        return events + self._finish_item(self.status)

    def _take(self, delta: dict[str, Any]) -> list[bytes]:
        """One of OpenAI's chat deltas: text, reasoning, or part of a call."""
        events: list[bytes] = []
        if text := delta.get("reasoning_content"):
            events += [] if self._current("reasoning") else self._open_reasoning()
            self.items[-1]["content"][0]["text"] += text
            events.append(self._event("response.reasoning_text.delta", content_index=0, delta=text))
        if text := delta.get("content"):
            events += [] if self._current("message") else self._open_message()
            part = self.items[-1]["content"][0]
            part["text"] += text
            logprobs = self._logprobs(text)
            part["logprobs"] += logprobs
            events.append(
                self._event("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)
            )
        for call in delta.get("tool_calls", ()):
            function = call["function"]
            if "id" in call:
                events += self._open_call(call["id"], function["name"])
            if arguments := function.get("arguments"):
                self.items[-1]["arguments"] += arguments
                events.append(self._event("response.function_call_arguments.delta", delta=arguments))
        return events

    def _logprobs(self, text: str) -> list[dict[str, Any]]:
        """Those of the tokens of a text that has come just now, where they are wanted."""
        if not self.asked.wants_logprobs:
            return []
        return self.answers.service.vocabulary.chat_logprobs(self._spelling.take(text))

    def _current(self, kind: str) -> bool:
        return (
            bool(self.items) and self.items[-1]["type"] == kind and self.items[-1]["status"] == "in_progress"
        )

    def _open_message(self) -> list[bytes]:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        events = self._open({"id": self._new("msg"), "type": "message", "role": "assistant", "content": []})
        self.items[-1]["content"].append(part)
        return [*events, self._event("response.content_part.added", content_index=0, part=part)]

    def _open_reasoning(self) -> list[bytes]:
        part = {"type": "reasoning_text", "text": ""}
        events = self._open({"id": self._new("rs"), "type": "reasoning", "summary": [], "content": []})
        self.items[-1]["content"].append(part)
        return [*events, self._event("response.content_part.added", content_index=0, part=part)]

    def _open_call(self, call_id: str, name: str) -> list[bytes]:
        call = {
            "id": self._new("fc"),
            "type": "function_call",
            "call_id": call_id,
            "name": name,
            "arguments": "",
        }
        return self._open(call)

    def _new(self, kind: str) -> str:
        return f"{kind}_{self.id}_{len(self.items)}"

    def _open(self, item: dict[str, Any]) -> list[bytes]:
        events = self._finish_item("completed")
        self.items.append({**item, "status": "in_progress"})
        events.append(self._item_event("response.output_item.added"))
        return events

    def _finish_item(self, status: str) -> list[bytes]:
        """The item that is being written is done, if one is."""
        if not self.items or self.items[-1]["status"] != "in_progress":
            return []
        item = self.items[-1]
        item["status"] = status
        events = []
        if item["type"] == "function_call":
            events.append(
                self._event(
                    "response.function_call_arguments.done", name=item["name"], arguments=item["arguments"]
                )
            )
        else:
            part = item["content"][0]
            kind = "output_text" if item["type"] == "message" else "reasoning_text"
            more = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            events.append(self._event(f"response.{kind}.done", content_index=0, text=part["text"], **more))
            events.append(self._event("response.content_part.done", content_index=0, part=part))
        return [*events, self._item_event("response.output_item.done")]

    # Events --------------------------------------------------------------------------------------------

    def _event(self, kind: str, **fields: Any) -> bytes:
        """An event about the item being written."""
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return self._write(kind, {**place, **fields})

    def _item_event(self, kind: str) -> bytes:
        return self._write(kind, {"output_index": len(self.items) - 1, "item": self.items[-1]})

    def _write(self, kind: str, fields: dict[str, Any]) -> bytes:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {kind}\ndata: {compact(event)}\n\n".encode()

    def failed(self, error: ApiError) -> bytes:
        failure = {"code": error.code or error.type, "message": error.message}
        return self._write("response.failed", {"response": {**self.whole("failed"), "error": failure}})

    async def events(self) -> AsyncGenerator[bytes, None]:
        first = self._write("response.created", {"response": self.whole("in_progress")})
        yield first + self._write("response.in_progress", {"response": self.whole("in_progress")})
        before = after = ""
        async with aclosing(self.answers.updates()) as updates:
            async for update in updates:
                if self._plain and before and update.text and not update.finish_reason:
                    # What `push` would do, without its detours.
                    item = self.items[-1]
                    item["content"][0]["text"] += update.text
                    number, self._number = self._number, self._number + 1
                    yield f"{before}{number}{after}{quote(update.text)}}}\n\n".encode()
                elif events := self.push(update):
                    yield b"".join(events)
                    if self._plain:
                        kind = "response.output_text.delta"
                        before = f'event: {kind}\ndata: {{"type":"{kind}","sequence_number":'
                        item_id = quote(self.items[-1]["id"])
                        after = (
                            f',"item_id":{item_id},"output_index":0,"content_index":0,"logprobs":[],"delta":'
                        )

        def end() -> bytes:
            whole = {"response": self.whole(self.status)}
            return b"".join([*events, self._write(f"response.{self.status}", whole)])

        size = self.answers.size() if self.asked.wants_logprobs else 0
        events = await apart(size, self.close)
        await self.count_reasoning()
        yield await apart(size, end)


def _messages(asked: ResponsesRequest) -> list[dict[str, Any]]:
    """The conversation as chat templates know it."""
    messages: list[dict[str, Any]] = []
    if asked.instructions is not None:
        messages.append({"role": "system", "content": asked.instructions})
    if isinstance(asked.input, str):
        return [*messages, {"role": "user", "content": asked.input}]
    thought: dict[str, Any] = {}
    for item in asked.input:
        if isinstance(item, InputReasoning):  # belongs to the turn that it began
            thought = {"reasoning_content": "\n".join(part.text for part in item.content or ())}
        else:
            _append(messages, item, thought)
            thought = {}
    return messages


def _append(messages: list[dict[str, Any]], item: InputItem, thought: dict[str, Any]) -> None:
    """thought: what came before an assistant's turn, or nothing; before another's it is of no use."""
    if isinstance(item, InputCall):
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        if thought or not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None, **thought})
        messages[-1].setdefault("tool_calls", []).append(call)  # calls belong to the turn that they end
    elif isinstance(item, InputCallOutput):
        messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
    elif isinstance(item, InputMessage):
        role = "system" if item.role == "developer" else item.role
        messages.append(
            {"role": role, "content": _text(item.content), **(thought if role == "assistant" else {})}
        )


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
