"""A model whose experts lie on disk says what it says with all of them in memory, and keeps to its budget."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3 import LLM, DeepseekV3, SamplingParams
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.experts import ExpertFiles, Key
from dsv3.checkpoint.hub import resolve
from dsv3.checkpoint.reader import open_checkpoint
from dsv3.cli.main import main
from dsv3.config import PRESETS
from dsv3.engine import offload
from dsv3.engine.async_engine import AsyncEngine
from dsv3.engine.budget import parse_memory, plan
from dsv3.engine.llm import RequestOutput
from dsv3.engine.offload import ExpertCache
from dsv3.errors import CheckpointError, UserError
from dsv3.kernels.native import library
from dsv3.model.stored import Expert
from dsv3.server.metrics import Metrics
from dsv3.text import Tokenizer
from tests.text import toy

native = pytest.mark.skipif(library() is None, reason="needs the native kernels")

CONFIG = PRESETS["nano"].replace(
    vocab_size=512, num_hidden_layers=3, n_routed_experts=32, n_group=4, max_position_embeddings=512
)
EXPERTS = 3 * 32  # of two layers and the MTP module
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, logprobs=2, ignore_eos=True)
MEASURED = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PROMPTS = [[7 * i % 500 for i in range(200)], [1, 2, 3], [30, 20, 10, 5], list(range(40))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same random model in several formats."""
    top = tmp_path_factory.mktemp("models")
    model = DeepseekV3(CONFIG)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1, generator=generator)
        model.embed_tokens.weight.normal_(generator=generator)
    model.save_pretrained(top / "fp32", format="fp32")
    toy.save(top / "fp32")
    for to in ("bf16", "fp8", "int8", "int4", "mixed"):
        convert(top / "fp32", top / to, to)
    model = DeepseekV3(CONFIG.replace(kv_lora_rank=256, num_nextn_predict_layers=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1, generator=generator)
    model.save_pretrained(top / "like V3", format="fp8")  # whose prompts do not attend over latents
    toy.save(top / "like V3")
    return {folder.name: folder for folder in top.iterdir()}


def load(
    folder: Path,
    slots: int | None,
    dtype: torch.dtype = torch.bfloat16,
    speculation: Any = "off",
    **kwargs: Any,
) -> LLM:
    """With so many slots for experts; None: everything in memory."""
    mtp = speculation != "off"
    experts = None
    if slots is not None:
        checkpoint = open_checkpoint(folder)
        experts = ExpertCache(ExpertFiles(checkpoint if mtp else checkpoint.without_mtp(), dtype), slots)
    packed = dtype == torch.bfloat16 and library() is not None
    model = DeepseekV3.from_pretrained(folder, dtype, mtp=mtp, packed=packed, experts=experts)
    llm = LLM(model, tokenizer=Tokenizer.from_pretrained(folder), speculation=speculation, **kwargs)
    llm.experts = experts
    return llm


def said(outputs: list[RequestOutput]) -> tuple[list[list[int]], torch.Tensor]:
    """Tokens, and the log-probabilities of these and the likeliest others."""
    top = [[sorted(t.top.values()) for t in o.logprobs or ()] for o in outputs]
    return [output.token_ids for output in outputs], torch.tensor(top, dtype=torch.float64)


def check_same(llm: LLM, whole: LLM) -> None:
    (tokens, logprobs), (wanted, wanted_logprobs) = (said(x.generate(PROMPTS, GREEDY)) for x in (llm, whole))
    assert tokens == wanted
    if whole.model.batch_invariant:
        assert torch.equal(logprobs, wanted_logprobs)
    else:
        near = 1e-4 if whole.model.embed_tokens.weight.dtype == torch.float32 else 0.05
        torch.testing.assert_close(logprobs, wanted_logprobs, atol=near, rtol=near)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8", "int8", "int4", "mixed", "like V3"])
def test_says_the_same_as_in_memory(folders: dict[str, Path], name: str) -> None:
    """Prompts of 200 tokens touch more experts than there are slots; the others run beside them."""
    llm = load(folders[name], EXPERTS // 8, max_batched_tokens=128)
    check_same(llm, load(folders[name], None, max_batched_tokens=128))
    assert llm.experts is not None and llm.experts.slots == EXPERTS // 8
    assert len(llm.experts._laid) <= EXPERTS // 8, "all layers' experts lie alike: a slot is laid out once"
    reads = llm.experts.reads
    assert reads.cached and reads.missed and reads.nbytes
    assert library() is None or reads.foretold


@pytest.mark.parametrize("slots", [1, 3, 1000])
def test_any_number_of_slots(folders: dict[str, Path], slots: int) -> None:
    check_same(load(folders["fp8"], slots), load(folders["fp8"], None))


@pytest.mark.parametrize("name", ["bf16", "int4"])
def test_speculation(folders: dict[str, Path], name: str) -> None:
    llm = load(folders[name], 12, speculation=2)
    check_same(llm, load(folders[name], None, speculation=2))
    assert llm.engine.drafted_tokens


@pytest.mark.parametrize("name", ["fp32", "fp8", "int4"])
def test_without_native_kernels(folders: dict[str, Path], name: str) -> None:
    """Through the modules, in float32; what is packed stays so in its slot."""
    llm = load(folders[name], 10, torch.float32)
    check_same(llm, load(folders[name], None, torch.float32))
    assert llm.experts is not None and llm.experts.reads.missed


def test_each_expert_is_read_once_where_all_fit(folders: dict[str, Path]) -> None:
    llm = load(folders["bf16"], EXPERTS)
    cache = llm.experts
    assert cache is not None
    llm.generate(PROMPTS, GREEDY)
    used, first = len(cache._slot), cache.reads.nbytes
    assert used <= 2 * 32
    assert first == used * 3 * CONFIG.hidden_size * CONFIG.moe_intermediate_size * 2
    assert cache.reads.missed + cache.reads.foretold + cache.reads.wasted >= used
    llm.engine.manager.__init__(llm.engine.manager.total)  # type: ignore[misc]
    llm.generate(PROMPTS, GREEDY)
    assert cache.reads.nbytes == first


def test_the_engine_starts_anew_after_an_interruption(folders: dict[str, Path]) -> None:
    """What is under way when Ctrl-C comes does no harm to what comes next."""
    llm = load(folders["int4"], 6)
    cache = llm.experts
    assert cache is not None
    arrive, left = cache._arrive, [30]

    def interrupted(key: Key) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        arrive(key)

    cache._arrive = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY)
    check_same(llm, load(folders["int4"], None))


@native
def test_reads_ahead_what_will_be_wanted() -> None:
    """Of what nano's layers lack, the layer before has foretold most (chance would be a quarter)."""
    llm = load(resolve("nano"), 24, max_num_seqs=1)
    llm.generate("Once upon a time", SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True))
    assert llm.experts is not None
    reads = llm.experts.reads
    assert reads.foretold > 0.4 * (reads.foretold + reads.missed), str(reads)
    assert "read ahead" in str(reads)


# Slots ---------------------------------------------------------------------------------------------------------------


class Files:
    """Stands in for `ExpertFiles`: says what was read, and may hold reads up or let them fail."""

    layers = 2
    slot_bytes = 64
    form = dict.fromkeys(range(10), 0)

    def __init__(self) -> None:
        self.seen: list[Key] = []
        self.go = threading.Event()
        self.go.set()
        self.broken: set[Key] = set()

    def __len__(self) -> int:
        return 100

    def lay(self, layer: int, slot: torch.Tensor) -> Expert:
        return Expert(slot[:32], slot[32:])

    def read(self, key: Key, into: Expert) -> int:
        self.go.wait(10)
        self.seen.append(key)
        if key in self.broken:
            raise CheckpointError(f"{key} is broken")
        for part in (into.gate_up, into.down):
            assert isinstance(part, torch.Tensor)
            part.fill_(10 * key[0] + key[1])
        return 64


def ask(cache: ExpertCache, layer: int, *experts: int) -> list[list[int]]:
    """The waves in which they come; each has to hold what it should."""
    waves = []
    for wave in cache.waves(layer, experts):
        for number, expert in wave.items():
            assert isinstance(expert.down, torch.Tensor)
            assert set(expert.down.tolist()) == {10 * layer + number}
        waves.append(list(wave))
    return waves


def fake(slots: int) -> tuple[ExpertCache, Files]:
    files = Files()
    return ExpertCache(files, slots), files  # type: ignore[arg-type]


def test_the_least_used_makes_room() -> None:
    """What is used often outlasts a run of others, more of them than there are slots."""
    cache, files = fake(4)
    for _ in range(5):
        ask(cache, 0, 1, 2)
    for e in range(3, 9):
        ask(cache, 0, e)
    assert ask(cache, 0, 1, 2) == [[1, 2]]
    assert files.seen.count((0, 1)) == files.seen.count((0, 2)) == 1


def test_old_uses_count_less() -> None:
    cache, files = fake(1)
    for _ in range(50):
        ask(cache, 0, 1)
    for _ in range(50 * offload.HALF_LIFE * files.layers):
        cache._count([])
    ask(cache, 0, 2)
    ask(cache, 0, 2)
    assert cache._heat[0, 2] > cache._heat[0, 1]


def test_waves_come_in_order_and_only_once() -> None:
    cache, files = fake(6)
    assert ask(cache, 0, *range(9)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert sorted(files.seen) == [(0, e) for e in range(9)]
    assert ask(cache, 1) == [[]]


def test_guesses_take_no_slot_that_is_in_use() -> None:
    cache, _ = fake(4)
    for wave in cache.waves(0, [1, 2, 3]):
        cache.foretell(1, [1, 2, 3])
        assert set(wave) == {1, 2, 3}
    ask(cache, 1, 1)
    assert (cache.reads.foretold, cache.reads.missed) == (1, 3)
    assert len(cache._slot) + len(cache._free) == 4


def test_guesses_in_vain_are_called_off() -> None:
    cache, files = fake(20)
    files.go.clear()
    cache.foretell(1, list(range(20)))  # more than are read at once
    threading.Timer(0.1, files.go.set).start()
    ask(cache, 1, 19, 0)
    assert cache.reads.foretold == 2 and cache.reads.missed == 0
    assert len(files.seen) < 20
    assert len(cache._slot) + len(cache._free) == 20


def test_a_read_that_fails_is_told_to_who_asks() -> None:
    cache, files = fake(3)
    files.broken = {(0, 2), (1, 1)}
    cache.foretell(1, [1])
    with pytest.raises(CheckpointError, match="broken"):
        ask(cache, 0, 1, 2)
    with pytest.raises(CheckpointError, match="broken"):
        ask(cache, 1, 1)
    files.broken.clear()
    assert ask(cache, 0, 1, 2) == [[1, 2]]
    assert ask(cache, 1, 1) == [[1]]
    assert len(cache._slot) + len(cache._free) == 3


def test_a_file_that_is_cut_off_while_running(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    convert(folders["bf16"], folder, "bf16")
    llm = load(folder, 4)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    os.truncate(file, len(content) // 2)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors ends at .* within model\.layers\..*: get it again"
    ):
        llm.generate(PROMPTS, GREEDY)
    with file.open("r+b") as again:
        again.write(content)
    check_same(llm, load(folder, None))


# The budget ----------------------------------------------------------------------------------------------------------


def test_memory_is_a_size() -> None:
    wanted: dict[str | int, float] = {
        "12GB": 12e9,
        "1.5 GiB": 1.5 * 2**30,
        "800mb": 8e8,
        "4096": 4096,
        10**9: 1e9,
    }
    assert {text: parse_memory(text) for text in wanted} == wanted
    for wrong in ("", "much", "-1GB", "0", "12 parsecs", "1e999GB", "nanGB", "9" * 310):
        with pytest.raises(UserError, match="give a size such as 12GB"):
            parse_memory(wrong)


def test_too_little_says_the_least(folders: dict[str, Path]) -> None:
    few: dict[str, Any] = {"max_num_seqs": 1, "max_batched_tokens": 32, "max_model_len": 100}
    with pytest.raises(UserError, match=r"fp8 needs .* MB at least, .* for weights") as caught:
        LLM(folders["fp8"], memory="5MB", **few)
    found = re.search(r"needs ([\d.]+) MB", str(caught.value))
    assert found is not None
    least = float(found[1])
    llm = LLM(folders["fp8"], memory=f"{least + 0.1:.1f}MB", **few)
    assert len(llm.generate([[1, 2, 3]], GREEDY)[0].token_ids) == 16
    with pytest.raises(UserError, match="at least"):
        LLM(folders["fp8"], memory=f"{least - 0.2:.1f}MB", **few)


def test_on_a_gpu_memory_is_for_slots_alone(folders: dict[str, Path]) -> None:
    files = ExpertFiles(open_checkpoint(folders["bf16"]).without_mtp(), torch.bfloat16)
    limits: dict[str, Any] = {
        "max_model_len": None,
        "max_num_seqs": 2,
        "max_batched_tokens": 64,
        "cache_tokens": None,
    }
    more = {"packed": False, "drafts": 0} | limits
    budgets = [plan(files, 2 * 10**8, torch.device(name), **more) for name in ("cpu", "cuda")]
    assert budgets[1].resident == budgets[1].cache == 0
    assert budgets[1].working < budgets[0].working, "attention and logits are the GPU's own"
    assert budgets[1].slots > budgets[0].slots > 64


def test_the_command_line_and_the_metrics(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(*flags: str) -> str:
        command = ["chat", str(folders["int4"]), "-p", "fox", "--max-tokens", "8", "--temperature", "0"]
        assert main([*command, *flags]) == 0
        return capsys.readouterr().out

    assert answer("--memory", "160MB") == answer()
    llm = LLM(folders["int4"], memory="160MB", max_num_seqs=2)
    llm.generate([[1, 2, 3]], GREEDY)
    page = Metrics(AsyncEngine(llm).stats).page().decode()
    assert llm.experts is not None
    shown = dict(line.split() for line in page.splitlines() if line.startswith("dsv3_expert"))
    assert float(shown["dsv3_expert_bytes_read_total"]) == llm.experts.reads.nbytes > 0
    assert float(shown["dsv3_experts_missing_total"]) == llm.experts.reads.missed > 0


def test_what_cannot_be(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this machine has"):
        LLM(folders["fp8"], memory="900TB")
    with pytest.raises(UserError, match="in memory already"):
        LLM(DeepseekV3(PRESETS["tiny"]), tokenizer=Tokenizer.from_pretrained(folders["fp8"]), memory="1GB")
    dense = DeepseekV3(PRESETS["tiny"].replace(first_k_dense_replace=3, num_nextn_predict_layers=0))
    dense.save_pretrained(tmp_path / "dense")
    toy.save(tmp_path / "dense")
    with pytest.raises(UserError, match="no routed experts"):
        LLM(tmp_path / "dense", memory="1GB")


_MEASURED = """
import json, sys
from pathlib import Path
import torch
from dsv3 import LLM, SamplingParams
from dsv3.checkpoint.reader import open_checkpoint
from dsv3.kernels.native import library
from dsv3.text import Tokenizer

def status(name):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name))
    return int(line.split()[1]) * 1024

folder, memory = sys.argv[1:]
torch.set_num_threads(1)
library(), Tokenizer.from_pretrained(folder), open_checkpoint(folder)  # which make torch import the rest of itself
before = status("VmRSS")
llm = LLM(folder, memory=int(memory), max_num_seqs=2)
prompts = [list(range(1, 401)), [5, 6, 7]]
outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
print(json.dumps([status("VmHWM") - before, llm.experts.slots, [o.token_ids for o in outputs]]))
"""


@native
def test_memory_is_kept(tmp_path: Path) -> None:
    """Measured from outside: what the process takes at most beyond what Python and torch take anyway."""
    config = CONFIG.replace(
        hidden_size=512, moe_intermediate_size=512, n_routed_experts=96, num_nextn_predict_layers=0
    )
    model = DeepseekV3(config).to(torch.bfloat16)
    model.init_weights()
    model.save_pretrained(tmp_path / "large")
    toy.save(tmp_path / "large")
    del model
    of_expert, memory = 3 * 512 * 512 * 2, 75_000_000
    assert 2 * 96 * of_expert > 4 * memory

    command = [sys.executable, "-c", _MEASURED, str(tmp_path / "large"), str(memory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, slots, tokens = json.loads(done.stdout)
    assert slots * of_expert < peak < memory
    assert slots >= 8
    whole = LLM(tmp_path / "large", max_num_seqs=2).generate([list(range(1, 401)), [5, 6, 7]], MEASURED)
    assert tokens == [output.token_ids for output in whole]
