"""The requests that we understand, and how what is wrong with one is said.

Every parameter of OpenAI's API has a place here. One that we do not support is there with the values at which it
asks for nothing (`Inert`): those are accepted, so that clients which always send them work, and any other is
refused by name. What is not here at all is refused as unknown. Nothing is dropped in silence: an answer that
ignores what was asked is worse than none.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from itertools import islice
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic_core
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    WrapValidator,
    field_validator,
    model_validator,
)
from starlette.requests import Request

from dsv3.engine.sampling import SamplingParams
from dsv3.server.apart import apart
from dsv3.server.errors import ApiError, ClientGone
from dsv3.server.settings import Settings

MAX_PROMPTS = 1024
"""Prompts in one request."""
MAX_ANSWERS = 128
"""Answers to one prompt."""
MAX_TURNS = 4096
"""Messages of a conversation, parts of one message, calls in it."""
_WHOLE = 2**31 - 1

_REFUSED = "is not supported here"

Whole = Annotated[int, Field(ge=0, le=_WHOLE)]
FAIL_FAST = Field(fail_fast=True)
"""A list ends at its first mistake: four megabytes of them would take seconds to tell, and nobody reads the second."""
TokenIds = Annotated[list[Whole], FAIL_FAST]
Free = dict[str, JsonValue]
"""A JSON object that is handed on."""


class Request_(BaseModel):
    """What all requests have in common: nothing unknown, nothing converted, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _no_crowd(cls, value: Any) -> Any:
        """Of many unknown names only the first is told; a name or two pydantic may tell by itself."""
        if isinstance(value, dict) and len(value) > len(cls.model_fields):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            unknown = next((name for name in value if name not in known), None)
            if unknown is not None:
                raise _wrong(unknown, "unknown here: leave it out", code="unknown_parameter")
        return value


def _prompts(value: Any, handler: Any) -> Any:
    """A text, several, token ids, or several lists of these: looked through here.

    pydantic tries each form on all of the value, which for a megabyte of ids takes seconds."""
    if isinstance(value, str) or not isinstance(value, list) or not value:
        return handler(value)
    kind: type = type(value[0])
    if kind is int:
        _check_ids(value)
        return value
    if kind not in (str, list):
        raise _wrong(0, "it must be a text, a token id or a list of token ids")
    if len(value) > MAX_PROMPTS:
        raise _wrong(f"it has {len(value):,} prompts: {MAX_PROMPTS:,} is the most")
    for i, item in enumerate(value):
        if type(item) is not kind:
            raise _wrong(i, "prompts must be all texts or all lists of token ids")
        if isinstance(item, list):
            _check_ids(item, i)
    return value


def prompts_of(given: Any) -> list[str | list[int]]:
    """What `_prompts` lets pass, as several."""
    return given if isinstance(given, list) and not isinstance(given[0], int) else [given]


def _check_ids(ids: list[Any], *place: int) -> None:
    if not ids:
        raise _wrong(*place, "it must have at least one token id")
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) <= _WHOLE:
        return
    wrong = next(i for i, item in enumerate(ids) if type(item) is not int or not 0 <= item <= _WHOLE)
    raise _wrong(*place, wrong, f"a token id is a whole number from 0 to {_WHOLE}")


def _at_most(most: int) -> BeforeValidator:
    """For objects of any names: how many there may be, before each of them is looked at."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"it has {len(value):,} names: {most:,} is the most")
        return value

    return BeforeValidator(check)


Metadata = Annotated[dict[str, str] | None, Field(max_length=16), _at_most(16)]
Choices = Annotated[list[str], FAIL_FAST]
Empty = Annotated[list[JsonValue] | None, Field(max_length=0, fail_fast=True)]


_INERT = Field(
    description="Not supported: accepted where it asks for nothing.", json_schema_extra={"x-inert": True}
)
"""Marks a parameter that we have only to refuse it by name."""


def _exactly(wanted: object) -> BeforeValidator:
    """To Python 0 is False and 1 is True; in JSON they are not."""

    def check(value: object) -> object:
        if value is not None and type(value) is not type(wanted):
            raise ValueError(_REFUSED)
        return value

    return BeforeValidator(check)


Nothing = Annotated[None, _INERT]
Off = Annotated[Literal[False] | None, _INERT, _exactly(False)]
On = Annotated[Literal[True] | None, _INERT, _exactly(True)]
No = Annotated[Literal["none"] | None, _INERT]
Medium = Annotated[Literal["medium"] | None, _INERT]
AnyTier = Annotated[Literal["auto", "default"] | None, _INERT]


# What all generating endpoints take ---------------------------------------------------------------------


class StreamOptions(Request_):
    include_usage: bool | None = None
    include_obfuscation: Off = None


class Structured(Request_):
    """The form that an answer must have: one of these."""

    json_: Annotated[Free | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None


class Generating(Request_):
    """How tokens are chosen, and when to stop; names and meanings as in vLLM where OpenAI has none."""

    model: str | None = None
    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    stream: bool | None = None
    user: str | None = None
    """Accepted, and of no use here: keys tell users apart."""
    # Beyond OpenAI
    top_k: Annotated[int | None, Field(ge=-1, le=_WHOLE)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=100)] = None
    min_tokens: Whole | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[TokenIds | None, Field(max_length=1024)] = None
    allowed_token_ids: Annotated[TokenIds | None, Field(min_length=1)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), le=2**63 - 1)] = None
    cache_salt: Annotated[
        str | None, Field(description="Only requests with the same salt share prefixes in the cache.")
    ] = None

    def sampling(self, defaults: SamplingParams, **own: Any) -> SamplingParams:
        """What the request says, over the checkpoint's defaults. Raises UserError."""
        given = {name: getattr(self, name) for name in _SHARED if getattr(self, name, None) is not None}
        fields = {name: getattr(defaults, name) for name in SamplingParams.__dataclass_fields__}
        return SamplingParams(**{**fields, **given, **own})


_SHARED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "ignore_eos",
    "stop",
    "stop_token_ids",
    "allowed_token_ids",
    "seed",
    "n",
)


StopText = Annotated[str, Field(max_length=1000)]


class Sampled(Generating):
    """What /v1/chat/completions and /v1/completions share."""

    n: Annotated[int | None, Field(ge=1, le=MAX_ANSWERS)] = None
    stop: StopText | Annotated[list[StopText], Field(max_length=64, fail_fast=True)] | None = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None,
        Field(max_length=4096),
        _at_most(4096),
    ] = None
    stream_options: StreamOptions | None = None
    # Beyond OpenAI
    prompt_logprobs: Annotated[int | None, Field(ge=0, le=100)] = None
    structured_outputs: Structured | None = None
    guided_json: Free | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    return_token_ids: bool | None = None
    include_stop_str_in_output: Off = None
    skip_special_tokens: On = None
    spaces_between_special_tokens: On = None

    @property
    def biases(self) -> dict[int, float] | None:
        return None if self.logit_bias is None else {int(i): bias for i, bias in self.logit_bias.items()}

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise _wrong("stream_options", "only with stream: true is there something to set")
        return self

    def structure(self) -> dict[str, Any] | None:
        """The keyword of StructuredOutput that vLLM's parameters ask for."""
        asked = self.structured_outputs or Structured()
        ways = {
            "json_schema": _first(asked.json_, self.guided_json),
            "regex": _first(asked.regex, self.guided_regex),
            "choice": _first(asked.choice, self.guided_choice),
            "grammar": _first(asked.grammar, self.guided_grammar),
        }
        given = {name: value for name, value in ways.items() if value is not None}
        if len(given) > 1:
            raise ApiError(
                400,
                f"an answer cannot have the form of {' and of '.join(given)}: ask for one",
                param="structured_outputs" if self.structured_outputs else "guided_json",
            )
        if isinstance(given.get("json_schema"), dict):
            given["json_schema"] = json.dumps(given["json_schema"])
        if "choice" in given:
            given["choice"] = tuple(given["choice"])
        return given or None


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


# Chat ---------------------------------------------------------------------------------------------------


class TextPart(Request_):
    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: Empty = None
    logprobs: list[JsonValue] | None = None
    """Accepted as we have given them out, and of no use."""


Parts = str | Annotated[list[TextPart], Field(max_length=MAX_TURNS, fail_fast=True)]


class Function(Request_):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str


class ToolCallMade(Request_):
    id: str
    type: Literal["function"] = "function"
    function: Function
    index: int | None = None


class ChatMessage(Request_):
    """One turn. Which roles may follow which is the chat template's to say."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Parts | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCallMade] | None, Field(max_length=MAX_TURNS, fail_fast=True)] = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: Empty = None
    audio: Nothing = None
    function_call: Nothing = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise _wrong("content", f"a message of the role {self.role} needs one")
        if self.tool_calls and self.role != "assistant":
            raise _wrong("tool_calls", "only the assistant makes them")
        return self

    def plain(self) -> dict[str, Any]:
        """As chat templates know it."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        message["content"] = content
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": call.function.model_dump()}
                for call in self.tool_calls
            ]
        return message


class FunctionTool(Request_):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}$")]
    description: str | None = None
    parameters: Free | None = None
    strict: bool | None = None


class Tool(Request_):
    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Request_):
    name: str


class NamedTool(Request_):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Request_):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[Free, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Request_):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_asked(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise _wrong("json_schema", "it belongs to type json_schema, and that to it")
        return self


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class ChatRequest(Sampled):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_TURNS, fail_fast=True)]
    max_tokens: Annotated[int | None, Field(ge=1, le=_WHOLE)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=_WHOLE)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool] | None, Field(max_length=128, fail_fast=True)] = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: Metadata = None
    """Accepted; nothing is kept that it could be found by."""
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    """Accepted: the cache finds common prefixes by itself."""
    # Beyond OpenAI
    chat_template_kwargs: Free | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: Off = None
    # Not supported
    audio: Nothing = None
    function_call: No = None
    functions: Nothing = None
    modalities: Annotated[
        list[Literal["text"]] | None,
        Field(max_length=1, fail_fast=True, json_schema_extra={"x-inert": True}),
    ] = None
    prediction: Nothing = None
    prompt_cache_retention: Nothing = None
    reasoning_effort: No = None
    service_tier: AnyTier = None
    store: Off = None
    verbosity: Medium = None
    web_search_options: Nothing = None
    moderation: Nothing = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise _wrong("max_tokens", "it is max_completion_tokens by its old name, and they differ")
        if self.top_logprobs is not None and not self.logprobs:
            raise _wrong("top_logprobs", "it needs logprobs: true")
        _check_end(self)
        if self.add_generation_prompt is False and not self.continue_final_message:
            raise _wrong("add_generation_prompt", "it can be false with continue_final_message alone")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise _wrong("tool_choice", "there are no tools to choose from")
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            if all(tool.function.name != name for tool in self.tools or ()):
                raise _wrong("tool_choice", f"there is no tool {name!r}")
        return self


def _check_end(asked: ChatRequest | TokenizeRequest) -> None:
    """A conversation ends within its last turn or at the beginning of the next."""
    if asked.continue_final_message and asked.add_generation_prompt is not False:
        raise _wrong(
            "continue_final_message", "it needs add_generation_prompt: false, since no other turn begins"
        )


# Completions ----------------------------------------------------------------------------------------------


class CompletionRequest(Sampled):
    prompt: Annotated[
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[
            list[Annotated[TokenIds, Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)
        ],
        WrapValidator(_prompts),
    ]
    max_tokens: Whole | None = 16
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=100)] = None
    best_of: Annotated[int | None, Field(ge=1, le=MAX_ANSWERS, description="Not supported but for n.")] = None
    suffix: Nothing = None
    # Beyond OpenAI
    add_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    # Not supported
    store: Off = None
    metadata: Metadata = None

    @model_validator(mode="after")
    def _best_of_is_n(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise _wrong("best_of", f"{_REFUSED}: every answer made is given, so it must be n")
        return self

    @model_validator(mode="after")
    def _ids_are_whole(self) -> Self:
        if (
            self.add_special_tokens
            and not isinstance(self.prompt, str)
            and not isinstance(self.prompt[0], str)
        ):
            raise _wrong(
                "add_special_tokens", "token ids are taken as they are: put the special ones among them"
            )
        return self


# Responses -------------------------------------------------------------------------------------------------


class InputMessage(Request_):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Parts
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class InputCall(Request_):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class InputCallOutput(Request_):
    type: Literal["function_call_output"]
    call_id: str
    output: Parts
    id: str | None = None
    status: str | None = None


class ReasoningPart(Request_):
    type: Literal["reasoning_text"]
    text: str


class InputReasoning(Request_):
    """What the model thought before an answer, as we have given it out."""

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningPart] | None, Field(max_length=MAX_TURNS, fail_fast=True)] = None
    summary: Empty = None
    encrypted_content: Nothing = None
    id: str | None = None
    status: str | None = None


InputItem = Annotated[
    InputMessage | InputCall | InputCallOutput | InputReasoning, Field(discriminator="type")
]


class ResponseTool(FunctionTool):
    type: Literal["function"]


class ResponseNamedTool(Request_):
    type: Literal["function"]
    name: str


class TextFormat(Request_):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[Free | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_where_asked(self) -> Self:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise _wrong("schema", "it belongs to type json_schema, and that to it")
        return self


class TextOptions(Request_):
    format: TextFormat | None = None
    verbosity: Medium = None


class ReasoningOptions(Request_):
    effort: No = None
    summary: Nothing = None
    generate_summary: Nothing = None


class ResponsesRequest(Generating):
    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_TURNS, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1, le=_WHOLE)] = None
    tools: Annotated[list[ResponseTool] | None, Field(max_length=128, fail_fast=True)] = None
    tool_choice: Literal["none", "auto", "required"] | ResponseNamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    metadata: Metadata = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    include: Annotated[
        list[Literal["message.output_text.logprobs"]] | None,
        Field(max_length=16, fail_fast=True, json_schema_extra={"x-inert": True}),
    ] = None
    """Nothing else is there to include."""
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    # Beyond OpenAI
    chat_template_kwargs: Free | None = None
    # Not supported
    background: Off = None
    context_management: Nothing = None
    conversation: Nothing = None
    max_tool_calls: Nothing = None
    moderation: Nothing = None
    previous_response_id: Nothing = None
    prompt: Nothing = None
    prompt_cache_retention: Nothing = None
    reasoning: ReasoningOptions | None = None
    service_tier: AnyTier = None
    store: Off = None
    stream_options: Nothing = None
    truncation: Annotated[Literal["disabled"] | None, _INERT] = None

    @field_validator("input", mode="before")
    @classmethod
    def _typed(cls, value: Any) -> Any:
        """A message may come without its type."""
        if not isinstance(value, list):
            return value
        return [
            {"type": "message", **item} if isinstance(item, dict) and "type" not in item else item
            for item in value[: MAX_TURNS + 1]
        ]

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.include)

    @model_validator(mode="after")
    def _logprobs_are_included(self) -> Self:
        if self.top_logprobs and not self.include:
            raise _wrong("top_logprobs", 'it needs include: ["message.output_text.logprobs"]')
        return self


# The smaller ones ------------------------------------------------------------------------------------------


class EmbeddingRequest(Request_):
    input: Annotated[
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[
            list[Annotated[TokenIds, Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)
        ],
        WrapValidator(_prompts),
    ]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[
        int | None, Field(ge=1, le=_WHOLE, description="Not supported but for the model's own.")
    ] = None
    user: str | None = None

    @model_validator(mode="after")
    def _texts_are_not_empty(self) -> Self:
        texts: list[Any] = self.input if isinstance(self.input, list) else []
        if "" in texts:
            raise _wrong("input", texts.index(""), "it must not be empty")
        return self


class TokenizeRequest(Request_):
    """Either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[
        list[ChatMessage] | None, Field(min_length=1, max_length=MAX_TURNS, fail_fast=True)
    ] = None
    tools: Annotated[list[Tool] | None, Field(max_length=128, fail_fast=True)] = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Free | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise _wrong("prompt", "give either prompt or messages")
        if self.messages is not None and self.add_special_tokens:
            raise _wrong(
                "add_special_tokens", "it belongs to prompt: the chat template writes those of messages"
            )
        _check_end(self)
        for name in ("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"):
            if self.prompt is not None and getattr(self, name) is not None:
                raise _wrong(name, "it belongs to messages, and there is a prompt")
        return self


class DetokenizeRequest(Request_):
    model: str | None = None
    tokens: TokenIds


# Reading them ----------------------------------------------------------------------------------------------


def _wrong(*place_and_message: str | int, code: str = "invalid_value") -> pydantic_core.PydanticCustomError:
    """An error whose place is not, or not all, pydantic's to know: the way from what is looked at, then the message."""
    *place, message = place_and_message
    # Braces would be taken for places to fill in.
    context = {"message": message, "place": place, "code": code}
    return pydantic_core.PydanticCustomError("wrong", "{message}", context)


R = TypeVar("R", bound=Request_)


async def read(model: type[R], request: Request, settings: Settings) -> R:
    """The request in a body; raises ApiError and ClientGone."""
    body = await read_body(request, settings)
    request.scope["dsv3"].length = len(body)
    return await apart(len(body), lambda: parse(model, request.headers.get("content-type", ""), body))


async def read_body(request: Request, settings: Settings) -> bytes:
    """The body, as long as it may be. Raises ApiError 408 or 413, and ClientGone."""
    too_long = ApiError(
        413,
        f"the body is longer than the {settings.max_body:,} bytes that are taken here",
        code="body_too_large",
        headers={"connection": "close"},  # what is still to come need not be read
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > settings.max_body:
        raise too_long
    body = bytearray()
    more = True
    try:
        async with asyncio.timeout(settings.body_timeout):
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > settings.max_body:
                    raise too_long
                more = message.get("more_body", False)
    except TimeoutError:
        raise ApiError(
            408,
            f"the body had not arrived after {settings.body_timeout:g} seconds",
            code="body_too_slow",
            headers={"connection": "close"},
        ) from None
    return bytes(body)


def parse(model: type[R], content_type: str, body: bytes) -> R:
    """The request in a body. Raises ApiError 415 for another content type, 400 naming what is wrong."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            415,
            f"the content type is {content_type!r}: send application/json",
            code="unsupported_content_type",
        )
    try:
        value = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    if (where := _infinite(value)) is not None:
        raise ApiError(400, f"{where} holds a number too large", param=where, code="invalid_value")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _refusal(model, error) from None


def _infinite(value: dict[str, Any]) -> str | None:
    """The parameter with a number that became infinite (1e999 is valid JSON), if one has."""
    for name, item in value.items():
        left = [item]
        while left:
            item = left.pop()
            if isinstance(item, dict | list):
                left.extend(item.values() if isinstance(item, dict) else item)
            elif isinstance(item, float) and math.isinf(item):
                return name
    return None


def _refusal(model: type[BaseModel], error: ValidationError) -> ApiError:
    """The first thing that is wrong, said in one line.

    Where a value may have one of several forms, each form has its complaint; the deepest is that of the form that
    was most likely meant."""
    details = error.errors(include_url=False)
    first = details[0]["loc"][:1]
    detail = max(
        (d for d in details if d["loc"][:1] == first), key=lambda d: len(_path(d["loc"])) if d["loc"] else 0
    )
    path = _path(detail["loc"])
    if detail["type"] == "wrong":
        context = detail.get("ctx", {})
        where = _join([*path, *context["place"]])
        return ApiError(400, f"{where}: {context['message']}", param=where, code=context["code"])
    param = _join(path) or None
    kind = next((d for d in details if d["loc"][:1] == first and d["loc"][-1:] == ("type",)), None)
    if kind is not None and isinstance(kind["input"], str):
        param = _join(_path(kind["loc"]))
        return ApiError(
            400, f"{param} is {kind['input']!r}, which {_REFUSED}", param=param, code="unsupported_parameter"
        )
    if detail["type"] == "union_tag_invalid":
        tag = detail["ctx"]["tag"]
        return ApiError(
            400, f"{param} has the type {tag!r}, which {_REFUSED}", param=param, code="unsupported_parameter"
        )
    if detail["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is unknown here: leave it out", param=param, code="unknown_parameter")
    if detail["type"] == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    field = model.model_fields.get(str(path[0])) if path else None
    extra = field.json_schema_extra if field else None
    inert = isinstance(extra, dict) and extra.get("x-inert")
    if inert or _REFUSED in detail["msg"]:
        return ApiError(400, f"{param} {_REFUSED}: leave it out", param=param, code="unsupported_parameter")
    message = detail["msg"][:1].lower() + detail["msg"][1:]
    input = detail["input"][:80] if isinstance(detail["input"], str) else detail["input"]
    # Only as much of it as is shown: it may be the whole body.
    pieces = json.JSONEncoder(ensure_ascii=False, default=str).iterencode(input)
    given = "".join(islice(pieces, 80))
    shown = given if len(given) <= 80 else given[:77] + "..."
    return ApiError(400, f"{param} is {shown}: {message}", param=param, code="invalid_value")


def _path(location: tuple[int | str, ...]) -> list[int | str]:
    """Where in the request: pydantic also names the form that it tried, such as `list[str]`, and we do not."""
    path: list[int | str] = []
    before: int | str = ""
    for part in location:
        tag = isinstance(before, int) and part in _TAGS
        if isinstance(part, int) or not (tag or _FORM.match(part)):
            path.append(part)
        before = part
    return path


_TAGS = ("message", "function_call", "function_call_output", "reasoning")
_FORM = re.compile(
    r"(str|float|int|dict|none|bool)$"
    r"|list\[|literal\[|function-|constrained-|lax-or|json-or|nullable|\[key\]|[A-Z]"
)


def _join(path: list[int | str]) -> str:
    """messages[0].content"""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
