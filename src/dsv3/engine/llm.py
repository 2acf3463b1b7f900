"""`LLM`: text in, text out.

It puts a checkpoint, its tokenizer and an engine together, and speaks the words that vLLM made common:

    llm = LLM("nano")
    llm.generate(["Once upon a time"], SamplingParams(max_tokens=64, temperature=0.0))[0].text
    llm.chat([{"role": "user", "content": "Hello"}])[0].text
    for output in llm.stream("Once upon a time"):
        print(output.delta, end="")

A prompt is a text, the ids of its tokens, or either in a dict as vLLM has it: `{"prompt": "Once"}`,
`{"prompt_token_ids": [0, 7]}`. What a chat template takes besides the messages goes in `chat_template_kwargs`
(`{"thinking": True}` for DeepSeek-V3.1) and `tools`.

Prompts given together run together. A stream works while it is being read; reading several at once, or
generating while one is open, moves them all along, and closing one early frees its place.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch

from dsv3.checkpoint.experts import ExpertFiles
from dsv3.checkpoint.pretrained import DeepseekV3, has_room_for, locate
from dsv3.checkpoint.reader import generation_config, open_checkpoint, read_config
from dsv3.engine.budget import parse_memory, plan
from dsv3.engine.engine import Engine, Speculation
from dsv3.engine.machine import choose_device, choose_dtype, computes_packed, suggested_threads
from dsv3.engine.offload import ExpertCache
from dsv3.engine.sampling import SamplingParams, TokenLogprobs
from dsv3.engine.sequence import FinishReason, Sequence
from dsv3.errors import CheckpointError, UserError
from dsv3.model import Transformer
from dsv3.text import Message, Tokenizer

Prompt = str | Seq[int] | Mapping[str, Any]
"""A text, the ids of its tokens, or one of these under `prompt` or `prompt_token_ids`."""


@dataclass(frozen=True)
class CompletionOutput:
    """One answer to a prompt; in a stream, what has come of it so far."""

    index: int
    """Which of the request's n answers."""
    text: str
    """Without special tokens, and up to the stop string if there was one."""
    token_ids: list[int]
    """Everything that was generated, the tokens that ended it included."""
    finish_reason: FinishReason | None
    """"stop": an end-of-text token or a stop of the request; "length": max_tokens or the context's end;
    None: not finished yet."""
    stop_reason: int | str | None = None
    """The request's own stop token or stop string that ended it."""
    logprobs: list[TokenLogprobs] | None = None
    """One for each of token_ids, where asked for."""

    @property
    def cumulative_logprob(self) -> float | None:
        """The log-probability of the whole output, where asked for."""
        return None if self.logprobs is None else sum(token.logprob for token in self.logprobs)


@dataclass(frozen=True)
class RequestOutput:
    """What came of one prompt; in a stream, what has come so far. What is said of no answer is the first one's."""

    prompt: str | None
    """The prompt's text, a chat's as the template renders it; None where token ids were given."""
    prompt_token_ids: list[int]
    """The same list in all outputs of a stream."""
    outputs: list[CompletionOutput]
    """The n answers."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One for each of prompt_token_ids, where asked for; nothing is known of the first."""
    cached_tokens: int = 0
    """How many tokens of the prompt were found in the cache."""
    delta: str = field(default="", repr=False)
    """In a stream, the text that is new; all deltas in a row are the text."""

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        return self.outputs[0].logprobs

    @property
    def cumulative_logprob(self) -> float | None:
        return self.outputs[0].cumulative_logprob


class LLM:
    """A model one can ask.

    default_params are what a request without params gets: SamplingParams' own, and over them those of the
    checkpoint's `generation_config.json`, if it has one.
    """

    def __init__(
        self,
        model: str | Path | Transformer = "nano",
        *,
        tokenizer: Tokenizer | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_batched_tokens: int = 2048,
        cache_tokens: int | None = None,
        memory: str | int | None = None,
        prefix_caching: bool = True,
        speculation: Speculation = "auto",
        deterministic: bool = False,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        """model: "nano", a checkpoint folder, a hub id, or a Transformer already in place with its tokenizer.

        dtype "auto" is bfloat16 where the hardware or our own kernels multiply it, else float32; device "auto" is the GPU if
        there is one; speculation "auto" loads the MTP modules if they fit as well.
        memory: bytes, or a size such as "12GB", to keep to: what a token needs stays in memory, routed experts are read
        from disk when they are needed, and `experts` counts how often (`dsv3.engine.offload`; speculation "auto" is off
        then, for guesses read experts too). On a GPU it is what the experts may take of main memory. `Engine` explains the rest. Raises UserError for what cannot be loaded or does not fit; from
        the hub it is not even downloaded, if the small files tell (`dsv3.checkpoint.pretrained.locate`).
        """
        self.default_params = SamplingParams()
        self.experts: ExpertCache | None = None
        if not isinstance(model, Transformer):
            place = choose_device(device)
            number = choose_dtype(dtype, place)
            packed = computes_packed(number, place)
            folder = locate(model, number, place, packed, whole=memory is None)
            read_config(folder)  # before the tokenizer, which would be missed in whatever is no checkpoint
            tokenizer = tokenizer or Tokenizer.from_pretrained(folder)
            self.default_params = read_generation_config(folder)
            if memory is None:
                mtp = speculation != "off"
                if speculation == "auto":
                    mtp = has_room_for(folder, number, place, packed)
            else:
                checkpoint = open_checkpoint(folder)
                mtp = speculation not in ("auto", "off", 0)
                speculation = speculation if mtp else "off"
                files = ExpertFiles(checkpoint if mtp else checkpoint.without_mtp(), number)
                budget = plan(
                    files,
                    parse_memory(memory),
                    place,
                    packed=packed,
                    max_model_len=max_model_len,
                    max_num_seqs=max_num_seqs,
                    max_batched_tokens=max_batched_tokens,
                    cache_tokens=cache_tokens,
                    drafts=speculation if isinstance(speculation, int) else 0,
                )
                max_batched_tokens = budget.batched_tokens
                if place.type == "cpu":
                    cache_tokens = budget.cache_tokens
                self.experts = ExpertCache(files, budget.slots)
            model = DeepseekV3.from_pretrained(
                folder, number, place, progress, mtp=mtp, packed=packed, experts=self.experts
            )
        elif memory is not None:
            raise UserError(
                f"memory is {memory!r}: that is for checkpoints, not for a model that is in memory already"
            )
        elif tokenizer is None:
            raise UserError("tokenizer is None: a model that is not a checkpoint folder needs one given")
        self.model = model
        self.tokenizer = tokenizer
        self.engine = Engine(
            model,
            tokenizer,
            end_ids=tokenizer.eos_token_ids,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens,
            cache_tokens=cache_tokens,
            prefix_caching=prefix_caching,
            speculation=speculation,
            deterministic=deterministic,
            seed=seed,
        )

    @property
    def max_model_len(self) -> int:
        """The longest prompt and output together, in tokens."""
        return self.engine.max_model_len

    def use_threads(self, threads: int | None = None) -> None:
        """Set how many threads torch takes on a CPU; None: what is good for a model of this size.

        A small model decodes with one, while steps that read long prompts take all there are.
        """
        every = torch.get_num_threads()
        torch.set_num_threads(threads or suggested_threads(self.model))
        self.engine.reading_threads = threads or every

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue one prompt or several, with the same params or one each; outputs in the prompts' order."""
        together: list[Any] = list(prompts) if _is_several(prompts) else [prompts]
        return self._run([self._encode(prompt) for prompt in together], sampling_params)

    def chat(
        self,
        messages: Seq[Message] | Seq[Seq[Message]],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        tools: Seq[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several at once; outputs in their order.

        tools and chat_template_kwargs are the template's variables, in every conversation.
        """
        one = not isinstance(messages, Seq) or all(isinstance(message, Mapping) for message in messages)
        conversations: list[Any] = [messages] if one else list(messages)
        variables = _variables(tools, chat_template_kwargs)
        return self._run([self._encode_chat(chat, variables) for chat in conversations], sampling_params)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Continue a prompt, giving each new piece of text as it comes; the last output has a finish_reason.

        What is wrong with the request is raised here, not at the first piece.
        """
        return self._follow(*self._encode(prompt), sampling_params)

    def stream_chat(
        self,
        messages: Seq[Message],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Seq[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """Answer a conversation as a stream; see `stream` and `chat`."""
        variables = _variables(tools, chat_template_kwargs)
        return self._follow(*self._encode_chat(messages, variables), sampling_params)

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        text: object = prompt
        ids: object = prompt
        if isinstance(prompt, Mapping):
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if isinstance(text, str) and (text is prompt or len(prompt) == 1):
            return text, self.tokenizer.encode(text, add_bos=self.tokenizer.add_bos_token)
        if _are_ids(ids) and (ids is prompt or len(prompt) == 1):
            return None, list(ids)
        keys = f" of {', '.join(map(repr, prompt))}" if isinstance(prompt, Mapping) else ""
        raise UserError(
            f"a prompt is a {type(prompt).__name__}{keys}: give a text, a list of token ids, "
            "{'prompt': text} or {'prompt_token_ids': ids}"
        )

    def _encode_chat(self, messages: Seq[Message], variables: dict[str, Any]) -> tuple[str, list[int]]:
        text = self.tokenizer.render_chat(messages, **variables)
        return text, self.tokenizer.encode_chat(messages, **variables)

    def _run(
        self, prompts: list[tuple[str | None, list[int]]], params: SamplingParams | Seq[SamplingParams] | None
    ) -> list[RequestOutput]:
        if isinstance(params, Seq):
            each = list(params)
        else:
            each = [self.default_params if params is None else params] * len(prompts)
        if len(each) != len(prompts):
            raise UserError(
                f"there are {len(each)} sampling_params for {len(prompts)} prompts: give one, or one each"
            )
        # All are checked before the first is added: a wrong one costs nobody anything.
        requests = [self.engine.sequences(ids, p) for (_, ids), p in zip(prompts, each, strict=True)]
        sequences = [sequence for request in requests for sequence in request]
        try:
            for sequence in sequences:
                self.engine.add(sequence)
            for sequence in sequences:
                while not sequence.finished:
                    self.engine.step()
        finally:
            for sequence in sequences:
                self.engine.abort(sequence)
        return [_output(text, request) for (text, _), request in zip(prompts, requests, strict=True)]

    def _follow(
        self, text: str | None, prompt_ids: list[int], params: SamplingParams | None
    ) -> Generator[RequestOutput, None, None]:
        params = self.default_params if params is None else params
        request = self.engine.sequences(prompt_ids, params)
        if len(request) > 1:
            raise UserError(f"n is {params.n}: a stream is of one answer; use generate or chat for several")
        (sequence,) = request

        def pieces() -> Generator[RequestOutput, None, None]:
            shown = 0
            self.engine.add(sequence)
            try:
                while True:
                    if not sequence.finished and len(sequence.output.text) == shown:
                        self.engine.step()
                    output = _output(text, request, shown)
                    shown = len(output.text)
                    if output.delta or sequence.finished:
                        yield output
                    if output.finish_reason is not None:
                        return
            finally:
                self.engine.abort(sequence)

        return pieces()


def _output(prompt: str | None, request: list[Sequence], shown: int = 0) -> RequestOutput:
    first = request[0]
    return RequestOutput(
        prompt=prompt,
        prompt_token_ids=first.prompt_ids,
        outputs=[
            CompletionOutput(
                index=index,
                text=sequence.output.text,
                token_ids=sequence.output_ids,
                finish_reason=sequence.finish_reason,
                stop_reason=sequence.stop_reason,
                logprobs=None if sequence.params.logprobs is None else list(sequence.logprobs),
            )
            for index, sequence in enumerate(request)
        ],
        prompt_logprobs=None if first.params.prompt_logprobs is None else list(first.prompt_logprobs),
        cached_tokens=first.cached_tokens,
        delta=first.output.text[shown:],
    )


def read_generation_config(folder: Path) -> SamplingParams:
    """The default params of a checkpoint, from its `generation_config.json` if it has one.

    Like vLLM, we take the numbers and leave `do_sample` aside. Raises CheckpointError if the file is broken.
    """
    path = folder / "generation_config.json"
    values = generation_config(folder)
    found = {name: values.get(key) for name, key in _GENERATION_KEYS.items()}
    try:
        return SamplingParams(**{name: value for name, value in found.items() if value is not None})
    except UserError as error:
        raise CheckpointError(f"{path} is not a generation config ({error}): mend it or remove it") from None


_GENERATION_KEYS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_tokens": "max_new_tokens",
}


def _variables(tools: Seq[Mapping[str, Any]] | None, kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a chat template is given besides the messages."""
    if kwargs is None:
        return {"tools": tools}
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise UserError(
            f"chat_template_kwargs is {kwargs!r}: give a dict of the template's variables by name"
        )
    return {"tools": tools, **kwargs}


def _is_several(prompts: object) -> bool:
    return _is_list(prompts) and not (prompts and _are_ids(prompts))


def _are_ids(prompt: object) -> TypeGuard[Seq[int]]:
    return _is_list(prompt) and all(type(token_id) is int for token_id in prompt)


def _is_list(value: object) -> TypeGuard[Seq[Any]]:
    return isinstance(value, Seq) and not isinstance(value, str | bytes | bytearray)
