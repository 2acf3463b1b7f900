"""What a number of bytes is spent on, for a model whose routed experts are read when they are needed.

Counted is what the process takes beyond Python, torch, and what they load: weights that every token needs, the latent
cache, what a step has in memory for a while, and with all that is left slots for experts. The first follow from the
checkpoint to the byte, the working memory is an estimate from above, so that the budget is kept. Pages that the system
keeps of files are its own, and it gives them up when anybody needs memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import psutil
import torch

from dsv3.checkpoint.experts import ExpertFiles
from dsv3.checkpoint.memory import token_bytes
from dsv3.checkpoint.pretrained import layouts, loaded_bytes
from dsv3.config import ModelConfig
from dsv3.errors import UserError, size
from dsv3.kernels.inference import BLOCK
from dsv3.kernels.native import library

CACHE_PART = 8
"""Contexts get this part of what the weights that stay leave, if nobody says how long they shall be."""
SHORTEST = 512
"""Tokens of context that there must be room for, if the model knows so many."""
FEWEST = 64
"""Tokens to a step to which steps are cut where working memory is short."""
SPARE = 32_000_000
"""Bytes for what is not counted one by one: Python's objects, the heap's holes, stacks of threads."""


@dataclass(frozen=True)
class Budget:
    """What a number of bytes is spent on; the experts' slots get what is left."""

    resident: int
    """Bytes of weights that stay."""
    working: int
    """Bytes that a step needs for a while, those for long contexts included."""
    cache_tokens: int
    """Room in the latent cache."""
    cache: int
    """Bytes of that."""
    batched_tokens: int
    """Tokens to a step."""
    slots: int


def parse_memory(memory: str | int) -> int:
    """Bytes of "12GB" or "12G" (decimal), "12GiB", "500MB" or a number. Raises UserError."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b|([kmgt]))?", str(memory).strip().lower())
    found = 0
    if match is not None:
        power = " kmgt".index(match[2] or match[4] or " ")
        found = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if found <= 0:
        raise UserError(f"memory is {memory!r}: give a size such as 12GB, 12GiB or 800MB")
    return found


def plan(
    files: ExpertFiles,
    memory: int,
    device: torch.device,
    *,
    packed: bool,
    max_model_len: int | None,
    max_num_seqs: int,
    max_batched_tokens: int,
    cache_tokens: int | None,
    drafts: int,
) -> Budget:
    """Spend `memory` bytes on a model whose experts are read when they are needed.

    packed: whether weights that stay do so as they are stored; the other arguments are the engine's. What is left to
    choose of them is chosen: a context of CACHE_PART of what the weights leave, steps that take a quarter of that at
    most. On a GPU, which has all else, only slots are paid for. Raises UserError if it is more than the machine has, or so
    little that nothing works; then it says how much would.
    """
    checkpoint, dtype = files.checkpoint, files.dtype
    config = checkpoint.config
    there = psutil.virtual_memory().total
    if memory > there:
        raise UserError(f"memory is {size(memory)}, but this machine has {size(there)}: give less")
    rest = checkpoint.without_experts()
    resident = of_token = expanded = 0
    if device.type == "cpu":
        resident = loaded_bytes(rest, layouts(rest) if packed else {}, dtype)
        of_token = token_bytes(config, dtype, mtp=drafts > 0)
        expanded = _expanded_bytes(config, dtype)
    if not len(files):
        raise UserError(
            f"memory is {size(memory)}: {checkpoint.folder.name} has no routed experts that could stay on disk"
        )
    longest = max_model_len or config.max_position_embeddings

    def blocks(tokens: int) -> int:
        return -(-(tokens + 2 * drafts) // BLOCK) * BLOCK

    def step(batched: int) -> int:
        """Bytes that it has in memory for a while. On a GPU the machine's own memory has the experts' share alone."""
        if not resident:
            return _expert_bytes(config, dtype, batched)
        return _working_bytes(config, dtype, batched, max_num_seqs * (1 + drafts))

    def spent(batched: int, context: int, room: int) -> Budget:
        working = SPARE + step(batched) + context * expanded
        working += _shared_bytes(config, dtype, context, max_num_seqs) if resident else 0
        left = memory - resident - working - room * of_token
        return Budget(resident, working, room, room * of_token, batched, max(left // files.slot_bytes, 0))

    few = min(FEWEST, max_batched_tokens)
    short = max_model_len or min(SHORTEST, longest)
    least = spent(few, min(short, cache_tokens or short), cache_tokens or blocks(short))
    if least.slots < config.num_experts_per_tok:
        needed = resident + least.working + least.cache + config.num_experts_per_tok * files.slot_bytes
        raise UserError(
            f"memory is {size(memory)}: {checkpoint.folder.name} needs {size(needed)} at least, {size(resident)} for weights "
            f"that every token reads, {size(least.working + least.cache)} to work with and for {least.cache_tokens} tokens of "
            f"context, and {size(files.slot_bytes)} for each of {config.num_experts_per_tok} experts"
        )
    batched = max_batched_tokens
    while batched > few and step(batched) > (memory - resident) // 4:
        batched //= 2
    share = (memory - resident) // CACHE_PART
    context = min(max(share // max(of_token + expanded, 1), short), longest)
    room = blocks(context)
    if context == longest:  # and what is left of the share remembers what was said before
        more = min((share - context * expanded) // max(of_token, 1), 2 * max_num_seqs * room)
        room = max(room, more // BLOCK * BLOCK)
    if cache_tokens is not None:
        context, room = min(context, cache_tokens), cache_tokens
    chosen = spent(max(batched, few), context, room)
    return chosen if chosen.slots >= config.num_experts_per_tok else least


def _expanded_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Of keys and values of all heads for one token of context: a prompt's attention may expand them, a layer at a time."""
    of_head = (
        2 * (config.qk_nope_head_dim + config.v_head_dim) + 2 * config.qk_head_dim + 2 * config.v_head_dim
    )
    return config.num_attention_heads * of_head * dtype.itemsize


def _working_bytes(config: ModelConfig, dtype: torch.dtype, tokens: int, rows: int) -> int:
    """What a step of so many tokens has in memory at once at most, and then logits of so many rows."""
    number, hidden = dtype.itemsize, config.hidden_size
    native = _native(dtype)
    heads = config.qk_head_dim * 4 + config.v_head_dim * 3
    attention = tokens * config.num_attention_heads * heads * number
    if native:
        heads = config.qk_head_dim + 2 * config.kv_lora_rank + config.qk_rope_head_dim + config.v_head_dim
        attention = max(attention, min(tokens, 512) * config.num_attention_heads * heads * number)
    stream = tokens * hidden * (4 + 6 * number) + (0 if native else 2 * SPARE)  # what oneDNN builds and keeps
    return stream + _expert_bytes(config, dtype, tokens) + attention + max(rows, 64) * config.vocab_size * 12


def _expert_bytes(config: ModelConfig, dtype: torch.dtype, tokens: int) -> int:
    """The part of that which experts and other feed-forwards take."""
    number, hidden, width = dtype.itemsize, config.hidden_size, config.moe_intermediate_size
    dense = max(config.intermediate_size, width * (config.n_shared_experts or 0))
    native = _native(dtype)
    together = min(tokens, 1024) if native else tokens  # kernels/inference.cpp takes them in pieces
    one = hidden + 2 * dense + config.num_experts_per_tok * (hidden + width) * (1 if native else 2)
    return together * 2 * one * number + (0 if native else 3 * hidden * width * number)


def _shared_bytes(config: ModelConfig, dtype: torch.dtype, context: int, sequences: int) -> int:
    """What threads that share long contexts in decoding may take (PagedAttention in kernels/inference.cpp)."""
    if not _native(dtype):
        return 0
    rows = min(sequences * config.num_attention_heads, 256 * torch.get_num_threads())
    return min(rows * (context // 512) * (config.kv_lora_rank + 17) * 4, 1 << 26)


def _native(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and library() is not None
