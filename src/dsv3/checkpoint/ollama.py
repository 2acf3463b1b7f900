"""A Modelfile: what Ollama wants to be told of a GGUF file.

Ollama reads the keys of the model and its tokenizer, but renders chats itself, by a template in the language of Go, and
takes its defaults of sampling from here. The one template that we write says what DeepSeek-V3's says; whether that is the
checkpoint's is found out by rendering a chat with both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dsv3.errors import UserError
from dsv3.text import Message, Tokenizer
from dsv3.text.chat import DEEPSEEK_TEMPLATE, render

TEMPLATE = (
    "{{ if .System }}{{ .System }}{{ end }}"
    "{{ range .Messages }}"
    '{{ if eq .Role "user" }}<｜User｜>{{ .Content }}'
    '{{ else if eq .Role "assistant" }}<｜Assistant｜>{{ .Content }}<｜end▁of▁sentence｜>'
    "{{ end }}{{ end }}<｜Assistant｜>"
)
"""BOS is the tokenizer's to add; system messages are joined in `.System`."""
STOPS = ("<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
_PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
    "num_predict": "max_new_tokens",
}
_CHAT: list[Message] = [
    {"role": "system", "content": "a"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
]


def modelfile(weights: str, tokenizer: Tokenizer, generation: Mapping[str, Any]) -> str:
    """The text of a Modelfile for the GGUF file of this name beside it, with defaults from a generation config.

    Raises UserError if the chat format is not DeepSeek-V3's.
    """
    variables = {**tokenizer.special_tokens, "add_generation_prompt": True}
    if tokenizer.render_chat(_CHAT) != render(DEEPSEEK_TEMPLATE, _CHAT, variables):
        raise UserError(
            "the checkpoint's chat template is not DeepSeek-V3's, the only one that dsv3 can say in Ollama's language: "
            "leave out --ollama, and write a TEMPLATE"
        )
    values = {theirs: generation.get(ours) for theirs, ours in _PARAMETERS.items()}
    numbers = {
        name: n for name, n in values.items() if isinstance(n, int | float) and not isinstance(n, bool)
    }
    return "\n".join(
        [
            f"FROM ./{weights}",
            f'TEMPLATE """{TEMPLATE}"""',
            *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in STOPS),
            *(f"PARAMETER {name} {n}" for name, n in numbers.items()),
            "",
        ]
    )
