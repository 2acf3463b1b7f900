"""Models whose answers are known: one that finds every needle, one that guesses. They run where a real one would."""

from __future__ import annotations

import random
from functools import cache

import tokenizers
import torch
from torch import Tensor

from dsv3 import LLM
from dsv3.config import PRESETS
from dsv3.model import FlatBatch, Transformer
from dsv3.text import Tokenizer
from tests.text.toy import BOS, EOS, train

VOCAB = 640


@cache
def tokenizer() -> Tokenizer:
    """The toy tokenizer, with words of the built-in text, so that its sentences are not spelt out."""
    from dsv3.eval.haystack import built_in

    sentences = built_in(random.Random(0))
    needles = [f" The secret number of the {place} is" for place in ("lighthouse", "castle", "harbour")]
    backend: tokenizers.Tokenizer = train(VOCAB - 5, [next(sentences) for _ in range(400)] + needles * 20)
    return Tokenizer(backend, {"bos_token": BOS, "eos_token": EOS})


@cache
def has_digit(token: int) -> bool:
    return any(c.isdigit() for c in tokenizer().decode([token]))


class Scripted(Transformer):
    """Keeps the tokens that it is given at each place, and looks its logits up instead of computing them."""

    def __init__(self, max_length: int = 1024) -> None:
        config = PRESETS["tiny"].replace(
            vocab_size=VOCAB, hidden_size=VOCAB, num_hidden_layers=1, max_position_embeddings=max_length
        )
        super().__init__(config)
        self.requires_grad_(False)
        torch.nn.init.eye_(self.lm_head.weight)
        self.read: dict[int, int] = {}

    def forward_flat(self, input_ids: Tensor, batch: FlatBatch) -> Tensor:
        """One sequence: hidden states are the logits themselves. In a long text only its end's are wanted."""
        hidden = torch.full((len(input_ids), VOCAB), float("nan"))
        places = batch.positions.tolist()
        self.read |= dict(zip(places, input_ids.tolist(), strict=True))
        for row, place in list(enumerate(places))[-16:]:
            hidden[row] = self.expects([self.read[i] for i in range(place + 1)])
        return hidden

    def expects(self, ids: list[int]) -> Tensor:
        """[vocab]: logits of what follows."""
        raise NotImplementedError


class Retriever(Scripted):
    """Answers with the first number in what it has read, whatever the question; then it ends."""

    def expects(self, ids: list[int]) -> Tensor:
        start = next((i for i, token in enumerate(ids) if has_digit(token)), len(ids))
        end = next((i for i in range(start, len(ids)) if not has_digit(ids[i])), len(ids))
        number = ids[max(0, start - 1) : end]  # with the space before it, which is a token of its own here
        said = next(n for n in range(len(number), -1, -1) if n == 0 or ids[-n:] == number[:n])
        logits = torch.zeros(VOCAB)
        logits[[*number, tokenizer().eos_token_id][said]] = 20.0
        return logits


class Guesser(Scripted):
    """Expects something else at random after whatever it reads, and always the same after the same."""

    def expects(self, ids: list[int]) -> Tensor:
        generator = torch.Generator().manual_seed(hash(tuple(ids[-40:])) % 2**60)
        return torch.randn(VOCAB, generator=generator)


class Silent(Scripted):
    """Finds everything equally likely."""

    def expects(self, ids: list[int]) -> Tensor:
        return torch.zeros(VOCAB)


def llm(model: Transformer) -> LLM:
    return LLM(model, tokenizer=tokenizer())
