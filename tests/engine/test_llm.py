"""`LLM` from a checkpoint folder: text in, text out, streams, stops, defaults."""

from __future__ import annotations

import json
import shutil
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3 import LLM, DeepseekV3, SamplingParams
from dsv3.checkpoint import convert, open_checkpoint
from dsv3.checkpoint.memory import weight_bytes
from dsv3.checkpoint.pretrained import layouts, loaded_bytes
from dsv3.config import PRESETS, ModelConfig
from dsv3.engine.grammar import StructuredOutput
from dsv3.engine.llm import read_generation_config
from dsv3.engine.machine import choose_device, choose_dtype, computes_packed
from dsv3.errors import CheckpointError, UserError
from dsv3.text import Tokenizer
from dsv3.text.tools import CALLS_BEGIN, tool_use
from tests.text import toy

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
HOT = SamplingParams(temperature=2.0, max_tokens=24, seed=5)
PROMPTS = [
    "Once upon a time",
    "The fox",
    "从前有一只小狐狸",
    "good morning, how are you? I'm well, thank you",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a random model that speaks the toy tokenizer's language."""
    config = PRESETS["tiny"].replace(vocab_size=toy.train().get_vocab_size(), eos_token_id=1)
    model = DeepseekV3(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
        model.embed_tokens.weight.normal_(generator=generator)
    path = tmp_path_factory.mktemp("models") / "toy"
    model.save_pretrained(path, format="fp32")
    return toy.save(path)


@pytest.fixture
def llm(folder: Path) -> LLM:
    return LLM(folder, dtype="float32", max_num_seqs=3)


def test_generate_is_the_models_argmax(llm: LLM, folder: Path) -> None:
    model = DeepseekV3.from_pretrained(folder, torch.float32)
    outputs = llm.generate(PROMPTS, GREEDY)
    assert [output.prompt for output in outputs] == PROMPTS
    for output, prompt in zip(outputs, PROMPTS, strict=True):
        ids = llm.tokenizer.encode(prompt, add_bos=True)
        assert output.prompt_token_ids == ids
        with torch.no_grad():
            logits = model(torch.tensor([ids + output.token_ids])).logits[0]
        assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == output.token_ids
        assert output.text == llm.tokenizer.decode(output.token_ids)
        assert output.finish_reason in ("stop", "length")
        assert (len(output.token_ids) == 24) == (output.finish_reason == "length")
        assert output.logprobs is None and output.cumulative_logprob is None


def test_one_prompt_many_and_token_ids(llm: LLM) -> None:
    (text,) = llm.generate(PROMPTS[0], GREEDY)
    ids = text.prompt_token_ids
    (one,) = llm.generate(ids, GREEDY)
    many = llm.generate([ids, PROMPTS[0], tuple(ids)], GREEDY)
    assert one.prompt is None and many[0].prompt is None and many[1].prompt == PROMPTS[0]
    assert {output.text for output in (text, one, *many)} == {text.text}
    assert llm.generate([], GREEDY) == []
    as_vllm_has_it = llm.generate([{"prompt": PROMPTS[0]}, {"prompt_token_ids": ids}], GREEDY)
    assert as_vllm_has_it == [text, one]
    assert llm.generate({"prompt_token_ids": ids}, GREEDY) == [one]
    assert list(llm.stream({"prompt": PROMPTS[0]}, GREEDY))[-1].text == text.text


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (None, "a prompt is a NoneType: give a text"),
        (b"fox", "a prompt is a bytes"),
        ([PROMPTS[1], 5], "a prompt is a int"),
        ([[1, True]], "a prompt is a list"),
        ([[]], "the prompt is empty"),
        (torch.tensor([1, 2]), "a prompt is a Tensor"),
        ({"text": "fox"}, "a prompt is a dict of 'text': give a text"),
        ({"prompt": "fox", "prompt_token_ids": [1]}, "a dict of 'prompt', 'prompt_token_ids'"),
        ({"prompt": [1, 2]}, "a dict of 'prompt'"),
        ({"prompt_token_ids": "fox"}, "a dict of 'prompt_token_ids'"),
        ([{}], "a prompt is a dict"),
    ],
)
def test_prompts_that_are_none(llm: LLM, prompts: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        llm.generate(prompts, GREEDY)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("params", [{"max_tokens": 3}, {}, [{"max_tokens": 3}], 5])
def test_params_that_are_none(llm: LLM, params: Any) -> None:
    with pytest.raises(UserError, match=r"sampling_params is a (dict|int): give a SamplingParams"):
        llm.generate(PROMPTS[0], params)
    if not isinstance(params, list):
        with pytest.raises(UserError, match=r"sampling_params is a (dict|int)"):
            llm.stream(PROMPTS[0], params)


@pytest.mark.parametrize("begins", [True, False])
def test_a_prompt_begins_as_the_checkpoint_wants(llm: LLM, begins: bool) -> None:
    tokenizer = Tokenizer(toy.train(), {"bos_token": toy.BOS, "eos_token": toy.EOS}, add_bos_token=begins)
    (output,) = LLM(llm.model, tokenizer=tokenizer).generate("The fox", GREEDY)
    assert (output.prompt_token_ids[0] == tokenizer.bos_token_id) == begins


def test_a_prompt_that_brings_its_own_beginning_gets_no_second(llm: LLM) -> None:
    (output,) = llm.generate(toy.BOS + PROMPTS[0], GREEDY)
    assert output.prompt_token_ids == llm.tokenizer.encode(PROMPTS[0], add_bos=True)


def test_params_for_each(llm: LLM) -> None:
    each = [SamplingParams(temperature=0.0, max_tokens=n, stop_token_ids=[]) for n in (3, 1, 2)]
    outputs = llm.generate(PROMPTS[:3], each)
    assert [len(output.token_ids) for output in outputs] == [3, 1, 2]
    with pytest.raises(UserError, match="2 sampling_params for 3 prompts"):
        llm.generate(PROMPTS[:3], each[:2])


def test_chat(llm: LLM) -> None:
    fox = [{"role": "user", "content": "Who are you?"}]
    system = [{"role": "system", "content": "Be brief."}, *fox]
    (one,) = llm.chat(fox, GREEDY)
    assert one.prompt == f"{toy.BOS}{toy.USER}Who are you?{toy.ASSISTANT}"
    assert one.prompt_token_ids == llm.tokenizer.encode_chat(fox)
    both = llm.chat([fox, system], GREEDY)
    assert both[0] == one
    assert "Be brief." in str(both[1].prompt)
    assert one.text == llm.generate(one.prompt_token_ids, GREEDY)[0].text


TEMPLATE = (
    "{{ bos_token }}{{ messages[0].content }}{{ ' thinking' if thinking }}{{ tools | tojson if tools }}"
)


def test_what_the_template_takes_besides_the_messages(llm: LLM) -> None:
    tokenizer = Tokenizer(toy.train(), {"bos_token": toy.BOS, "eos_token": toy.EOS}, chat_template=TEMPLATE)
    chatty = LLM(llm.model, tokenizer=tokenizer)
    fox, tools = [{"role": "user", "content": "fox"}], [{"name": "find"}]
    asked: dict[str, Any] = {"tools": tools, "chat_template_kwargs": {"thinking": True}}
    (plain,), (both,) = chatty.chat(fox, GREEDY), chatty.chat(fox, GREEDY, **asked)
    assert plain.prompt == toy.BOS + "fox"
    assert both.prompt == toy.BOS + 'fox thinking[{"name": "find"}]'
    assert both.prompt_token_ids == tokenizer.encode(both.prompt)
    assert list(chatty.stream_chat(fox, GREEDY, **asked))[-1].prompt == both.prompt
    for wrong in (["thinking"], {1: True}, {"messages": []}):
        with pytest.raises(UserError):
            chatty.chat(fox, GREEDY, chat_template_kwargs=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("messages", [None, "hello", 5, [None], []])
def test_chats_that_are_none(llm: LLM, messages: Any) -> None:
    with pytest.raises(UserError, match=r"^messages"):
        llm.chat(messages, GREEDY)


# Streams ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [GREEDY, HOT, SamplingParams(seed=1, temperature=1.5, stop=["e", "狐"])])
def test_a_stream_says_what_generate_says(llm: LLM, params: SamplingParams) -> None:
    for prompt in PROMPTS:
        (expected,) = llm.generate(prompt, params)
        outputs = list(llm.stream(prompt, params))
        assert [o.text for o in outputs] == list(accumulate(o.delta for o in outputs))
        assert all(o.finish_reason is None and o.delta for o in outputs[:-1])
        last = outputs[-1]
        assert (last.text, last.token_ids, last.finish_reason) == (
            expected.text,
            expected.token_ids,
            expected.finish_reason,
        )


def test_stream_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Tell me about a fox."}]
    outputs = list(llm.stream_chat(messages, GREEDY))
    assert "".join(o.delta for o in outputs) == llm.chat(messages, GREEDY)[0].text


def test_a_long_prompt_is_not_copied_for_each_token(llm: LLM) -> None:
    first, *later = llm.stream(PROMPTS[0], GREEDY)
    assert later and all(output.prompt_token_ids is first.prompt_token_ids for output in later)
    assert first.prompt_token_ids == llm.tokenizer.encode(PROMPTS[0], add_bos=True)
    assert first.token_ids == later[-1].token_ids[: len(first.token_ids)], "what has come stays as it was"


def test_closing_a_stream_frees_its_row(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=400, stop_token_ids=[])
    stream = llm.stream(PROMPTS[0], params)
    next(stream)
    assert len(llm.engine.scheduler.running) == 1
    stream.close()
    assert not llm.engine.unfinished
    never_read = llm.stream(PROMPTS[0], params)
    never_read.close()
    assert not llm.engine.unfinished


def test_streams_side_by_side_and_generate_between(llm: LLM) -> None:
    alone = [llm.generate(prompt, GREEDY)[0].text for prompt in PROMPTS]
    streams = [llm.stream(prompt, GREEDY) for prompt in PROMPTS]  # one more than there are rows
    texts = ["" for _ in streams]
    waiting = list(range(len(streams)))
    while waiting:
        for i in list(waiting):
            output = next(streams[i], None)
            if output is None:
                waiting.remove(i)
            else:
                texts[i] += output.delta
        assert llm.generate("The", SamplingParams(temperature=0.0, max_tokens=2))[0].token_ids
    assert texts == alone
    assert not llm.engine.unfinished


# Stops --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 3, 4, 5, 6])
def test_stop_strings_across_token_borders(llm: LLM, seed: int) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=40, seed=seed, stop_token_ids=[])
    (plain,) = llm.generate("The fox", params)
    stop = plain.text[5:9]
    assert len(stop) == 4
    with_stop = SamplingParams(temperature=1.0, max_tokens=40, seed=seed, stop=["never said", stop])
    (cut,) = llm.generate("The fox", with_stop)
    assert cut.text == plain.text[: plain.text.find(stop)]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == plain.token_ids[: len(cut.token_ids)]
    assert stop in llm.tokenizer.decode(cut.token_ids), "the tokens are all that was generated"
    assert stop not in llm.tokenizer.decode(cut.token_ids[:-1]), "and it ends as soon as the stop is complete"
    assert stop not in llm.tokenizer.decode(cut.token_ids[-1:]), "this test is about several tokens"
    for output in llm.stream("The fox", with_stop):
        assert cut.text.startswith(output.text), "nothing of the stop string may be shown on the way"


def test_end_of_text_ends_and_is_not_in_the_text(llm: LLM) -> None:
    hot = [SamplingParams(temperature=3.0, max_tokens=400, seed=seed) for seed in range(20)]
    ended = [o for o in llm.generate([PROMPTS[1]] * 20, hot) if o.finish_reason == "stop"]
    assert ended, "with 400 draws out of 389 words each, some end"
    for output in ended:
        assert output.token_ids[-1] == llm.tokenizer.eos_token_id
        assert llm.tokenizer.eos_token_id not in output.token_ids[:-1]
        assert toy.EOS not in output.text


def test_logprobs(llm: LLM) -> None:
    (output,) = llm.generate(PROMPTS[0], SamplingParams(temperature=1.0, seed=1, max_tokens=5, logprobs=2))
    assert output.logprobs is not None and output.cumulative_logprob is not None
    assert [t.token_id for t in output.logprobs] == output.token_ids
    assert all(len(t.top) == 2 for t in output.logprobs)
    with torch.no_grad():
        logits = llm.model(torch.tensor([output.prompt_token_ids + output.token_ids])).logits[0]
    start = len(output.prompt_token_ids) - 1
    expected = (
        logits[start:-1].log_softmax(-1).gather(1, torch.tensor(output.token_ids).unsqueeze(1)).squeeze(1)
    )
    assert [t.logprob for t in output.logprobs] == pytest.approx(expected.tolist(), abs=1e-4)
    assert output.cumulative_logprob == pytest.approx(expected.sum().item(), abs=1e-3)


# What goes wrong harms nobody else ----------------------------------------------------------------------


def test_a_wrong_prompt_stops_none_of_the_others(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], GREEDY)
    text = next(stream).delta
    with pytest.raises(UserError, match="the prompt has 600 tokens"):
        llm.generate([PROMPTS[1], [5] * 600], GREEDY)
    with pytest.raises(UserError, match="a prompt is a int"):
        llm.generate([PROMPTS[1], 5], GREEDY)  # type: ignore[list-item]
    with pytest.raises(UserError, match="role 'fox'"):
        llm.chat([{"role": "fox", "content": "x"}])
    with pytest.raises(UserError, match="600 tokens"):
        llm.stream([5] * 600, GREEDY)
    assert len(llm.engine.scheduler.running) == 1 and not llm.engine.scheduler.waiting
    text += "".join(output.delta for output in stream)
    assert text == llm.generate(PROMPTS[0], GREEDY)[0].text


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_generate_leaves_nothing_behind(
    llm: LLM, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = llm.generate(PROMPTS, GREEDY)
    calls = iter(range(100))
    forward = llm.model.forward_flat

    def failing(*args: object) -> torch.Tensor:
        if next(calls) == 4:
            raise error
        return forward(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as broken:
        broken.setattr(llm.model, "forward_flat", failing)
        with pytest.raises(error):
            llm.generate(PROMPTS, GREEDY)
    assert not llm.engine.unfinished
    assert llm.generate(PROMPTS, GREEDY) == before


# Where the model and its defaults come from -------------------------------------------------------------


def test_default_params_come_from_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    assert LLM(copy).default_params == SamplingParams()
    written = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": None,
        "max_new_tokens": 7,
        "_x": 1,
    }
    (copy / "generation_config.json").write_text(json.dumps(written | {"eos_token_id": [1, 300]}))
    llm = LLM(copy, dtype="float32")
    assert llm.default_params == SamplingParams(temperature=0.6, top_p=0.95, max_tokens=7)
    assert llm.engine.end_ids == {1, 300}
    assert len(llm.generate(PROMPTS[0])[0].token_ids) <= 7


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", "holds a list"),
        ('{"top_p": 3}', "is not a generation config"),
        ('{"temperature": "warm"}', "is not a generation config"),
    ],
)
def test_a_broken_generation_config_is_named(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"generation_config\.json {says}"):
        read_generation_config(tmp_path)


def test_a_generation_config_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be read"):
        read_generation_config(tmp_path)


def test_dtype_device_and_length(folder: Path) -> None:
    llm = LLM(str(folder), dtype="bfloat16", device="cpu", max_model_len=30)
    assert llm.model.lm_head.weight.dtype is torch.bfloat16
    assert llm.engine.runner.cache[0].dtype is torch.bfloat16
    assert llm.max_model_len == 30
    (output,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=None, temperature=0.0))
    assert output.finish_reason == "stop" or len(output.prompt_token_ids + output.token_ids) == 30
    assert LLM(folder).max_model_len == PRESETS["tiny"].max_position_embeddings


def test_devices_and_dtypes() -> None:
    cpu = torch.device("cpu")
    assert choose_device("cpu") == choose_device(cpu) == cpu
    assert choose_dtype(torch.float32, cpu) is choose_dtype("fp32", cpu) is torch.float32
    assert choose_dtype("torch.bfloat16", cpu) is choose_dtype("bf16", cpu) is torch.bfloat16
    for wrong in (None, "tpu", "meta", 1.5, torch.device("meta")):
        with pytest.raises(UserError, match="device is"):
            choose_device(wrong)  # type: ignore[arg-type]
    for wrong in (None, "int8", torch.int8, torch.float16, "fp16", {}):
        with pytest.raises(UserError, match="dtype is"):
            choose_dtype(wrong, cpu)  # type: ignore[arg-type]


def test_mtp_modules_are_loaded_where_they_are_of_use(folder: Path) -> None:
    assert PRESETS["tiny"].num_nextn_predict_layers > 0, "the checkpoint has them"
    assert len(LLM(folder).model.mtp) == PRESETS["tiny"].num_nextn_predict_layers
    assert len(LLM(folder, speculation="off").model.mtp) == 0


def test_a_model_already_in_place(llm: LLM) -> None:
    other = LLM(llm.model, tokenizer=llm.tokenizer)
    assert other.model is llm.model
    assert other.generate(PROMPTS[0], GREEDY) == llm.generate(PROMPTS[0], GREEDY)
    with pytest.raises(UserError, match="tokenizer is None"):
        LLM(llm.model)


def test_of_a_hub_model_that_does_not_fit_no_weight_is_downloaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that does fit is downloaded, and answers as from its folder."""
    asked: list[bool] = []

    def snapshot_download(repo: str, **kwargs: Any) -> str:
        asked.append("*.safetensors" not in kwargs["ignore_patterns"])
        return str(folder)

    def on_hub() -> LLM:
        return LLM("org/model", dtype="float32", device="cpu")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    expected = LLM(folder, dtype="float32").generate(PROMPTS[0], GREEDY)
    assert asked == [], "a folder needs no hub"
    with monkeypatch.context() as small:
        small.setattr("dsv3.checkpoint.memory.free_memory", lambda device: 1000)
        with pytest.raises(
            CheckpointError, match=r"^the model needs .* as float32, but 1\.0 kB are free on cpu"
        ):
            on_hub()
    assert asked == [False]
    assert on_hub().generate(PROMPTS[0], GREEDY) == expected
    assert asked == [False, False, True]


def test_the_mtp_modules_need_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine does not load them: what is enough for the main model is enough."""
    config = ModelConfig.from_json(folder / "config.json")
    main = weight_bytes(config.replace(num_nextn_predict_layers=0), torch.float32)
    assert main < weight_bytes(config, torch.float32)
    monkeypatch.setattr("dsv3.checkpoint.memory.free_memory", lambda device: main)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **kwargs: str(folder))
    for model in (folder, "org/model"):
        LLM(model, dtype="float32", device="cpu")
    monkeypatch.setattr("dsv3.checkpoint.memory.free_memory", lambda device: main - 1)
    for model in (folder, "org/model"):
        with pytest.raises(CheckpointError, match="the model needs"):
            LLM(model, dtype="float32", device="cpu")


@pytest.mark.skipif(
    not computes_packed(torch.bfloat16, torch.device("cpu")), reason="needs the native kernels"
)
def test_packed_models_need_what_they_are_packed_in(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With their MTP modules, too; in a folder as from the hub, where the index tells how much it is."""
    packed = tmp_path / "int4"
    convert(folder, packed, "int4", max_shard_size=1 << 16)
    checkpoint = open_checkpoint(packed)
    whole, main = (
        loaded_bytes(part, layouts(part), torch.bfloat16) for part in (checkpoint, checkpoint.without_mtp())
    )
    assert main < whole < weight_bytes(checkpoint.without_mtp().config, torch.bfloat16)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **kwargs: str(packed))
    for free, modules in ((whole, 1), (whole - 1, 0), (main, 0)):
        monkeypatch.setattr("dsv3.checkpoint.memory.free_memory", lambda device, free=free: free)
        for model in (packed, "org/model"):
            llm = LLM(model, dtype="bfloat16", device="cpu", cache_tokens=1024)
            assert llm.model.config.num_nextn_predict_layers == modules
    monkeypatch.setattr("dsv3.checkpoint.memory.free_memory", lambda device: main - 1)
    for model in (packed, "org/model"):
        with pytest.raises(CheckpointError, match="the model, packed as it is, needs"):
            LLM(model, dtype="bfloat16", device="cpu")


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        LLM(tmp_path / "nowhere")


def test_a_small_model_decodes_with_one_thread_and_reads_with_all(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = [4]
    monkeypatch.setattr("torch.get_num_threads", lambda: threads[-1])
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    other = LLM(llm.model, tokenizer=llm.tokenizer)
    other.use_threads()
    assert threads == [4, 1]
    other.generate([[5] * 200], SamplingParams(max_tokens=5, temperature=0.0))
    assert threads == [4, 1, 4, 1], "for the step that reads the prompt, and not for those that decode"


def test_guesses_change_no_call_that_is_held(folder: Path) -> None:
    """Text, calls that may follow it, calls in place of a form: with the MTP module's guesses as without."""
    pytest.importorskip("xgrammar")
    parameters = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}
    calls = tool_use([tool]).held
    begins = toy.train().encode("<").ids[0]
    forms: list[dict[str, Any]] = [
        {"structured": StructuredOutput(tool_calls=calls)},
        {"structured": StructuredOutput(tool_calls=calls, choice=("fox",)), "logit_bias": {begins: 100}},
    ]
    found = []
    for speculation in ("off", 1, 3):
        llm = LLM(folder, dtype="float32", max_num_seqs=3, speculation=speculation)
        params = [
            SamplingParams(max_tokens=120, temperature=t, seed=5, **form)
            for form in forms
            for t in (0.0, 1.5)
        ]
        found.append([output.text for output in llm.generate(PROMPTS[:1] * len(params), params)])
        assert (llm.engine.drafted_tokens > 0) == (speculation != "off")
    assert found[0] == found[1] == found[2]
    assert all(text.startswith(CALLS_BEGIN) for text in found[0][2:]), "a call, which the form was not"
