"""The tokenizer of a checkpoint: text to ids and back, exactly as the model was trained.

DeepSeek's vocabulary is a byte-level BPE: text is cut by a pattern into words, numbers and spaces, each piece
is taken as UTF-8 bytes, and pairs are merged in the order learned. No text is unknown to it, since every byte
is a token. The work is done by the `tokenizers` library from the checkpoint's `tokenizer.json`, or from
`tiktoken.model` where a checkpoint ships only that (`dsv3.text.tiktoken`); this module adds what lies beside
those files: which ids begin and end a text, the chat format, and decoding as a stream.

Whether BOS begins a plain text is the checkpoint's to say, and there are two places for it. `add_bos_token` of
tokenizer_config.json counts first: DeepSeek's files say true there and have no post-processor that would add
it. (transformers 4 read it for them; transformers 5 passes over it and gives no BOS, and SGLang puts it back.)
Where it is missing, the post-processor of tokenizer.json decides. Moonlight and Kimi have neither, and no BOS.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

import tokenizers
from tokenizers import decoders

from dsv3.config import read_optional_json
from dsv3.errors import CheckpointError, UserError
from dsv3.gguf import is_gguf
from dsv3.text.chat import DEEPSEEK_TEMPLATE, Message, check_messages, plain_messages, render, shield
from dsv3.text.stream import StreamDecoder
from dsv3.text.tiktoken import BYTE_ALPHABET, BYTES_OF, load_tiktoken
from dsv3.text.tools import READABLE

_STRAY = re.compile("([\udc80-\udcff]+)")  # bytes that are no UTF-8, as `surrogateescape` writes them
_LONG = 20_000  # characters, or ids, from which Python's lock is given up while they are worked on
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """A byte-level BPE with its special tokens and chat template."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
        add_bos_token: bool | None = None,
    ) -> None:
        """special_tokens: the text of `bos_token`, `eos_token`, `pad_token`, `unk_token`, those there are;
        eos_token_ids: ids that end a text besides `eos_token`'s; add_bos_token: whether a text that is to be
        continued begins with BOS, None: as the backend's post-processor has it."""
        if not isinstance(backend.decoder, decoders.ByteLevel):
            kind = type(backend.decoder).__name__
            raise CheckpointError(f"the tokenizer decodes with {kind}: dsv3 reads byte-level BPE tokenizers")
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        for name, token in self.special_tokens.items():
            if backend.token_to_id(token) is None:
                raise CheckpointError(f"the vocabulary lacks {name} {token!r}: correct tokenizer_config.json")
        own = [] if self.eos_token_id is None else [self.eos_token_id]
        self.eos_token_ids = tuple(dict.fromkeys([*own, *eos_token_ids]))
        """Every id that ends a text: the tokenizer's own first, then the model's."""
        if add_bos_token is None:
            add_bos_token = backend.encode("").ids[:1] == [self.bos_token_id]
        self.add_bos_token = add_bos_token

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read the tokenizer files of a checkpoint's folder, or the keys of a GGUF file; raises CheckpointError if they
        are missing or broken."""
        if is_gguf(Path(folder)):
            from dsv3.text.gguf import tokenizer_from_gguf

            return cast(Self, tokenizer_from_gguf(folder))
        try:
            return cls._read(Path(folder))
        except OSError as error:
            raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from None

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a tokenizer.json by itself: its text, without roles for its special tokens or a chat format."""
        try:
            return cls(_backend(Path(path)))
        except OSError as error:
            raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from None

    @classmethod
    def _read(cls, folder: Path) -> Self:
        config = read_optional_json(folder / "tokenizer_config.json", CheckpointError)
        special_tokens = _special_tokens(
            config, read_optional_json(folder / "special_tokens_map.json", CheckpointError)
        )
        if (path := folder / "tokenizer.json").exists():
            backend = _backend(path)
        elif (path := folder / "tiktoken.model").exists():
            backend = load_tiktoken(path, config.get("added_tokens_decoder") or {})
        else:
            raise CheckpointError(f"{folder} has neither tokenizer.json nor tiktoken.model: copy one there")

        # Older folders name the ids in the model's config alone.
        models = [
            read_optional_json(folder / name, CheckpointError)
            for name in ("generation_config.json", "config.json")
        ]
        ids = {name: [i for model in models for i in _ids(model.get(f"{name}_id"))] for name in _NAMED}
        for name in ("bos_token", "eos_token", "pad_token"):
            if name not in config and name not in special_tokens and ids[name]:
                token = backend.id_to_token(ids[name][0])
                if token is not None:
                    special_tokens[name] = token
        add_bos = config.get("add_bos_token")
        return cls(
            backend,
            special_tokens,
            ids["eos_token"],
            _chat_template(folder, config),
            add_bos if isinstance(add_bos, bool) else None,
        )

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows, special ones included; models often have room for more."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._special_id("pad_token")

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    # Text ----------------------------------------------------------------------------------------------

    def encode(self, text: str, add_bos: bool = False, allow_special: bool = True) -> list[int]:
        """The ids of a text. With `allow_special=False`, `<｜User｜>` and its like are ordinary characters.

        add_bos: put the id that begins a text in front, if the tokenizer has one and the text does not.
        """
        backend, renumbered = (self.backend, {}) if allow_special else self._plain
        try:
            if len(text) < _LONG:
                ids = backend.encode(text, add_special_tokens=False).ids
            else:  # a batch leaves other threads running, which a single text does not
                ids = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError:
            if not isinstance(text, str):
                raise
            raise UserError("the text is not valid Unicode: it holds half a surrogate pair") from None
        if renumbered:
            ids = [renumbered.get(i, i) for i in ids]
        bos = self.bos_token_id
        return [bos, *ids] if add_bos and bos is not None and ids[:1] != [bos] else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are no character give U+FFFD, ids that are no token give nothing."""
        ids = list(ids)
        if len(ids) < _LONG:
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return self.backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0]

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of any bytes, UTF-8 or not; nothing in them is a special token.

        What is no UTF-8 becomes one token per byte. `decode_bytes` gives the bytes back.
        """
        ids: list[int] = []
        # Split by a group, pieces alternate: text, stray bytes, text, ...
        for i, piece in enumerate(_STRAY.split(data.decode("utf-8", "surrogateescape"))):
            if i % 2:
                ids += [self._byte_ids[byte] for byte in piece.encode("utf-8", "surrogateescape")]
            else:
                ids += self.encode(piece, allow_special=False)
        return ids

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of ids, special tokens by their names; ids that are no token give nothing."""
        return b"".join(map(self.token_bytes, ids))

    def stream(self, skip_special_tokens: bool = True, keep: Iterable[int] = ()) -> StreamDecoder:
        """A decoder that takes ids one at a time and gives whole characters.

        keep: special tokens that stay in the text although others are left out, as `readable_ids`.
        """
        skipped = self.special_ids.difference(keep) if skip_special_tokens else frozenset[int]()
        return StreamDecoder(lambda token_id: b"" if token_id in skipped else self.token_bytes(token_id))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that an id stands for: part of a character, several, or a special token's name."""
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(BYTES_OF[c] for c in token)
        except KeyError:  # an added token is kept as it is written, not in the byte alphabet
            return token.encode()

    @cached_property
    def _byte_ids(self) -> list[int]:
        """The id of the token that is byte 0, byte 1, ..."""
        ids = [self.backend.token_to_id(BYTE_ALPHABET[byte]) for byte in range(256)]
        if None in ids:
            raise CheckpointError(f"the vocabulary has no token for the byte {ids.index(None):#04x}")
        return [i for i in ids if i is not None]

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Added tokens that decoding leaves out."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Added tokens that are markup: no text that a person writes is one of them."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if _is_markup(token))

    @cached_property
    def readable_ids(self) -> frozenset[int]:
        """The markers of tool calls and reasoning (`dsv3.text.tools`), those that the vocabulary has."""
        ids = map(self.backend.token_to_id, READABLE)
        return frozenset(token_id for token_id in ids if token_id is not None)

    @cached_property
    def _plain(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """The same BPE without markup, and the right ids of the added tokens that stay, which it renumbers.

        The model is shared, not copied. Added words such as V2-Lite's "ø" are text, and stay.
        """
        plain = tokenizers.Tokenizer(self.backend.model)
        if self.backend.normalizer is not None:
            plain.normalizer = self.backend.normalizer
        if self.backend.pre_tokenizer is not None:
            plain.pre_tokenizer = self.backend.pre_tokenizer
        added = self.backend.get_added_tokens_decoder()
        plain.add_tokens([token for token in added.values() if not _is_markup(token)])
        ids = {token.content: i for i, token in added.items()}
        return plain, {new: ids[token.content] for new, token in plain.get_added_tokens_decoder().items()}

    # Chat ----------------------------------------------------------------------------------------------

    def render_chat(
        self, messages: Sequence[Message], /, add_generation_prompt: bool = True, **template_kwargs: Any
    ) -> str:
        """The text of a chat in the checkpoint's own format, else in DeepSeek-V3's.

        template_kwargs go to the checkpoint's template (`thinking=True`, `tools=[...]`). The text is for
        reading: special tokens that it was given spelled out look real in it; `encode_chat` tells them apart.
        Raises UserError if a message is malformed or the template refuses it.
        """
        check_messages(messages)
        messages = plain_messages(messages)
        if self.chat_template is None and self.backend.token_to_id("<｜User｜>") is None:
            raise UserError(
                "this checkpoint has no chat template, and its vocabulary lacks '<｜User｜>' of DeepSeek's: "
                "it can continue text, not chat"
            )
        variables = {"tools": None, "documents": None, **self.special_tokens, **template_kwargs}
        variables["add_generation_prompt"] = add_generation_prompt
        return render(self.chat_template or DEEPSEEK_TEMPLATE, messages, variables)

    def encode_chat(
        self,
        messages: Sequence[Message],
        /,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> list[int]:
        """The ids of a chat. Only the template writes control tokens: those it is given stay plain text.

        continue_final_message: end within the last message, an assistant's, so that what follows goes on with it; without
        add_generation_prompt. Raises UserError where that cannot be."""
        check_messages(messages)
        messages = plain_messages(messages)
        shielded, kwargs, marker = shield(messages, template_kwargs, self._control)
        if continue_final_message:
            shielded[-1] = _open_ended(shielded[-1], len(messages) - 1, 2 * marker)
        text = self.render_chat(shielded, add_generation_prompt, **kwargs)
        if continue_final_message:
            text, found, _ = text.rpartition(2 * marker)
            if not found:
                raise UserError(
                    "the chat template leaves out the end of the last message: it cannot be continued"
                )
        if marker not in text:
            return self.encode(text)
        ids: list[int] = []
        # Split by a group, pieces alternate: text, control token, text, ... Added tokens part the words
        # around them, so encoding the pieces one by one gives the ids of the whole.
        for i, piece in enumerate(self._control.split(text)):
            ids += self.encode(piece.replace(marker, ""), allow_special=bool(i % 2))
        return ids

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Matches every added token that is markup."""
        added = self.backend.get_added_tokens_decoder().values()
        longest_first = sorted(
            (t.content for t in added if t.content and _is_markup(t)), key=len, reverse=True
        )
        return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


def _open_ended(message: Message, place: int, mark: str) -> Message:
    """The message, with a mark where it ends."""
    content = message["content"]
    if message["role"] != "assistant" or content is None or "tool_calls" in message:
        raise UserError(
            f"messages[{place}] is not to be continued: that needs a turn of the assistant, with content and without calls"
        )
    return cast(Message, {**message, "content": content + mark})


def _backend(path: Path) -> tokenizers.Tokenizer:
    content = path.read_bytes()
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path} is broken ({error}): download it again") from None


def _is_markup(token: tokenizers.AddedToken) -> bool:
    """Whether an added token is flagged special, or in brackets as `<think>` is."""
    return token.special or re.fullmatch(r"<.+>|\[.+\]|◁.+▷", token.content) is not None


def _special_tokens(*configs: dict[str, Any]) -> dict[str, str]:
    """The text of each named token from the first file that has it: a string, or an object with `content`."""
    found: dict[str, str] = {}
    for config in configs:
        for name in _NAMED:
            value = config.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found.setdefault(name, text)
    return found


def _ids(value: Any) -> list[int]:
    """`eos_token_id` and its like: one id, several, or none."""
    return [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The template's own file, else the config's: a string, or a list of named ones, of which `default`."""
    if (path := folder / "chat_template.jinja").exists():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not UTF-8 text ({error}): download it again") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
        if template is None:
            raise CheckpointError(f"{folder}: of the chat templates {list(named)} none is named 'default'")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{folder}: chat_template in tokenizer_config.json is no string and no list")
    return template
