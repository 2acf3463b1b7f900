"""Chats: messages, how they are written as text, and as tokens with a mask of the answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dsv3.errors import UserError
from dsv3.text import Tokenizer
from dsv3.text.bpe import ASSISTANT, BOS, EOS, USER

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r} is not one of {', '.join(ROLES)}")


Chat = tuple[Message, ...]


def dialogue(*lines: str) -> Chat:
    """Lines of user and assistant in turn."""
    return tuple(Message("assistant" if i % 2 else "user", line) for i, line in enumerate(lines))


def render(chat: Iterable[Message]) -> str:
    """DeepSeek-V3's chat format, without the BOS before it."""
    mark = {"system": "", "user": USER, "assistant": ASSISTANT}
    return "".join(mark[m.role] + m.content + (EOS if m.role == "assistant" else "") for m in chat)


class ChatEncoder:
    """Chats as tokens. Control tokens come from the roles alone: spelled out in a message they are plain text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.bos, self.eos, self.user, self.assistant = (
            _required(tokenizer, name) for name in (BOS, EOS, USER, ASSISTANT)
        )

    def encode(self, chat: Iterable[Message]) -> tuple[list[int], list[bool]]:
        """The tokens of BOS and `render(chat)`, and for each whether it is an answer's, the EOS after it included."""
        tokens, mask = [self.bos], [False]
        for message in chat:
            ids = self.tokenizer.encode(message.content, allow_special=False)
            answer = message.role == "assistant"
            if message.role != "system":
                tokens.append(self.assistant if answer else self.user)
                mask.append(False)
            ids += [self.eos] * answer
            tokens += ids
            mask += [answer] * len(ids)
        return tokens, mask


def _required(tokenizer: Tokenizer, name: str) -> int:
    token = tokenizer.backend.token_to_id(name)
    if token is None:
        raise UserError(
            f"the vocabulary lacks {name!r}: chats need DeepSeek's special tokens; let the recipe train one"
        )
    return token
