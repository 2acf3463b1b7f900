"""Checkpoints with a tokenizer, for tests of GGUF; and llama.cpp's server, for those that have it run what we wrote."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from torch import Tensor

from dsv3.text import Tokenizer
from dsv3.text.bpe import save_tokenizer, train_tokenizer
from tests.checkpoint import released

VOCAB = 420
"""Ids that the models here have; the tokenizer knows fewer."""

TEXTS = [
    "Once upon a time there was a little fox. It's a fine day, isn't it?\n\nHe lived in the woods.\n",
    "def fox(size):\n    if size > 12:\n        return [den.append(size)];\n\n\nprint(fox(1234567))\n",
    "从前有一只小狐狸，住在河边的树林里。\n它说：“早上好！”二〇二四年12月",
    "café naïve; emoji 🙂🦊👩‍👩‍👧‍👦 🇫🇷 ❤️ #️⃣ and e\u0301, кошка, ねこカタカナー々, नमस्ते क्षि 한국어\r\n",
    "  a  b\t\tc \n d \u00a0e\u3000f\u200bg\x85h\x0bi   ",
    "$100 + €20 = £? 3.14159, ٣٤٥٦ Ⅻ ½ 1,000,000.00 https://a.org/b?c=d&e=f#g user@mail.de C:\\dir ```~~~ “—…”",
    "<｜User｜>Hi<｜Assistant｜>Hello<think>hm</think><｜end▁of▁sentence｜>",
    "self.size_of+=other->next[i]::value; don't I'LL 'tis 𠀀𪜀 㐀 龥龦 ™©",
]


@cache
def tokenizer() -> tokenizers.Tokenizer:
    return train_tokenizer(TEXTS * 3, 400)


def write(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Path:
    """A released folder (`tests.checkpoint.released`) with a tokenizer beside the weights."""
    released.write(folder, config, weights)
    save_tokenizer(folder, tokenizer())
    return folder


@cache
def parts_of_characters() -> list[int]:
    """Ids that are not whole characters: llama-server tells no probabilities of a token while text is incomplete."""
    tokens = Tokenizer(tokenizer())
    return [i for i in range(VOCAB) if "\ufffd" in tokens.token_bytes(i).decode(errors="replace")]


def spread(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with larger matrices, so that attention and experts tell, and biases that choose experts."""
    return {
        name: tensor * 8 if tensor.dim() == 2 and "embed" not in name and "head" not in name else tensor
        for name, tensor in weights.items()
    }


def binary() -> str:
    """The path of llama-server; skips the test that asks where there is none."""
    found = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
    if found is None or not Path(found).is_file():
        pytest.skip("no llama-server: name llama.cpp's by LLAMA_SERVER, or put it on PATH")
    return found


class Server:
    """A llama-server that runs one GGUF file."""

    def __init__(self, url: str) -> None:
        self.url = url

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def tokenize(self, text: str) -> list[int]:
        return list(self.post("/tokenize", content=text, parse_special=True, add_special=False)["tokens"])

    def next_tokens(
        self, prompt: list[int], new: int, forbidden: Sequence[int] = (), top: int = 8
    ) -> tuple[list[int], list[dict[int, float]]]:
        """The likeliest token, `new` times over, but none that is forbidden; and each time the log-probabilities of
        the `top` likeliest before any was forbidden."""
        answer = self.post(
            "/completion",
            prompt=prompt,
            n_predict=new,
            n_probs=top,
            temperature=0.0,
            ignore_eos=True,
            logit_bias=[[i, False] for i in forbidden],
            return_tokens=True,
        )
        places = answer["completion_probabilities"]
        return answer["tokens"], [{e["id"]: e["logprob"] for e in place["top_logprobs"]} for place in places]


@contextmanager
def serve(model: Path, *arguments: str) -> Iterator[Server]:
    """Run a file in float32 throughout: no flash attention in half precision, no half-precision cache."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    exact = ["-ctk", "f32", "-ctv", "f32", "-fa", "off", "-c", "1024", "-np", "1", "-t", "2", "--no-warmup"]
    command = [binary(), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), *exact, *arguments]
    log = model.with_suffix(".log")
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            server = Server(f"http://127.0.0.1:{port}")
            _wait(server, process, log)
            yield server
        finally:
            process.terminate()
            process.wait(30)


def _wait(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, f"llama-server ended:\n{log.read_text()[-3000:]}"
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise AssertionError(f"llama-server did not start:\n{log.read_text()[-3000:]}")


def worst(ours: Tensor, theirs: dict[int, float]) -> float:
    """The largest difference of a log-probability. ours: logits [vocab]."""
    expected = torch.log_softmax(ours.double(), dim=-1)
    return max(abs(float(expected[i]) - value) for i, value in theirs.items())
