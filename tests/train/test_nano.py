"""The program that trains nano: schedules, data, runs that are killed and go on, and what it says when it cannot."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer

from dsv3 import LLM, DeepseekV3, SamplingParams
from dsv3.checkpoint.names import table
from dsv3.checkpoint.shards import read_header
from dsv3.config import PRESETS
from dsv3.data.nano_sources import SPECIALS
from dsv3.model import Transformer
from dsv3.quant.fp8 import quantize_blocks
from dsv3.train import nano
from dsv3.train.nano import ChatData, PretrainData, Run, Stage, main
from tests.text.toy import train as toy_tokenizer

SOURCE = Path(__file__).parents[2] / "src"
STEP = 8 * 512  # tokens
VOCAB = PRESETS["tiny"].vocab_size


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as dsv3.data.nano writes it, of made-up tokens that the `tiny` preset knows."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    stream = (np.cumsum(rng.integers(1, 4, 10 * STEP)) % VOCAB).astype(np.uint16)
    np.save(folder / "pretrain.npy", stream)
    rows = 13
    tokens = stream[: rows * 513].reshape(rows, 513)
    segment = np.repeat(np.arange(1, 28, dtype=np.uint8), 19)
    np.savez(
        folder / "sft.npz",
        tokens=tokens,
        mask=(np.arange(513) % 19 > 9).astype(np.uint8) * np.ones((rows, 1), np.uint8),
        segment=np.tile(segment, (rows, 1)),
    )
    held = stream[-1500:]
    np.savez(
        folder / "heldout.npz",
        novels_tokens=held[:900],
        novels_bytes=np.int64(3000),
        stories_tokens=held[900:],
        stories_bytes=np.int64(2000),
    )
    return folder


def command(*args: object) -> list[str]:
    return [str(arg) for arg in (*args, "--preset", "tiny")]


def pretrain(data: Path, run: Path, steps: int, *more: object) -> None:
    assert main(command("pretrain", data, run, "--tokens", steps * STEP, *more)) == 0


def state(run: Path, stage: str = "pretrain") -> dict[str, torch.Tensor]:
    return load_file(run / stage / "state.safetensors")


def saved_step(run: Path, stage: str = "pretrain") -> int:
    with safe_open(run / stage / "state.safetensors", framework="pt") as file:
        return int(file.metadata()["step"])


def log(run: Path, stage: str = "pretrain") -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / stage / "log.jsonl").read_text().splitlines()]


def assert_same_end(one: Path, other: Path, stage: str = "pretrain") -> None:
    """Masters, moments and biases to the bit, and the same log but for the time it took."""
    a, b = state(one, stage), state(other, stage)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, {different[0]} first"
    logs = [[{k: v for k, v in r.items() if k != "seconds"} for r in log(run, stage)] for run in (one, other)]
    assert logs[0] == logs[1]


# Schedules ---------------------------------------------------------------------------------------------

STAGE = Stage(
    tokens=100 * STEP, peak_lr=1.0, final_lr=0.1, warmup=0.1, decay=0.4, mtp_from=0.5, mtp_weight=(0.3, 0.1)
)


def test_rate_warms_up_stays_and_falls_along_a_cosine() -> None:
    assert [STAGE.lr(done) for done in (0.0, 0.025, 0.05)] == pytest.approx([0.0, 0.25, 0.5])
    assert {STAGE.lr(done) for done in (0.1, 0.2, 0.45, 0.6)} == {1.0}
    falling = [STAGE.lr(0.6 + 0.4 * share) for share in (0.25, 0.5, 0.75, 1.0)]
    assert falling == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * x)) for x in (0.25, 0.5, 0.75, 1)])
    assert falling[1] == pytest.approx(0.55) and falling[-1] == pytest.approx(0.1)
    assert STAGE.lr(1.5) == pytest.approx(0.1), "past the end it stays where it is"


def test_mtp_weight_comes_in_and_is_lowered_when_the_rate_falls() -> None:
    assert [STAGE.mtp(done) for done in (0, 0.49, 0.5, 0.59, 0.61, 1)] == [0, 0, 0.3, 0.3, 0.1, 0.1]


def test_steps() -> None:
    assert STAGE.steps == 100
    assert dataclasses.replace(STAGE, tokens=1).steps == 1, "a run has at least one step"


def test_the_log_shows_schedules_and_loads_and_the_biases_stop(data: Path, tmp_path: Path) -> None:
    stage = dataclasses.replace(STAGE, tokens=10 * STEP, peak_lr=1e-2, gamma=0.25, gamma_until=0.5)
    run = Run(tmp_path, "pretrain", "tiny")
    nano.train(run, stage, PretrainData(data))
    records = log(tmp_path)
    assert [r["lr"] for r in records] == [stage.lr(i / 10) for i in range(10)]
    assert [r["tokens"] for r in records] == [STEP * (i + 1) for i in range(10)]
    assert [r["mtp"] is None for r in records] == [True] * 5 + [False] * 5
    assert records[-1]["loss"] < records[0]["loss"] - 0.1, "it learns"
    for name, bias in run.model.named_buffers():
        moves = bias / 0.25
        assert torch.equal(moves, moves.round()), "biases move by gamma"
        trained = name.startswith("layers")  # the module comes in when gamma is already zero
        assert (0 < moves.abs().max() <= 5) if trained else not moves.any(), name


# Data --------------------------------------------------------------------------------------------------


def test_pretraining_rows_share_one_token_and_go_on_where_the_last_ended(data: Path) -> None:
    stream = torch.from_numpy(np.load(data / "pretrain.npy").astype(np.int64))
    source = PretrainData(data)
    batches = [source.batch(step, STAGE).tokens for step in range(3)]
    assert all(batch.shape == (8, 513) for batch in batches)
    rows = torch.cat(batches)
    assert torch.equal(rows[1:, 0], rows[:-1, -1]), "the last target is the next input"
    assert torch.equal(rows[:, :-1].flatten(), stream[: 3 * STEP])


def test_skip_leaves_out_what_was_read(data: Path) -> None:
    whole, rest = PretrainData(data), PretrainData(data, skip=2 * STEP)
    assert torch.equal(rest.batch(1, STAGE).tokens, whole.batch(3, STAGE).tokens)


def test_a_stream_that_ends_starts_again(data: Path) -> None:
    source = PretrainData(data)
    stream = source.tokens.astype(np.int64)
    for step in range(30):
        tokens = source.batch(step, STAGE).tokens[:, :-1].flatten().numpy()
        start = step * STEP % (len(stream) - STEP)
        assert (tokens == stream[start : start + STEP]).all()


@pytest.mark.parametrize("batch", [4, 8, 30])
def test_chat_epochs_are_permutations(data: Path, batch: int) -> None:
    """Whatever the batch: 13 rows divide into none of these."""
    source, stage = ChatData(data), dataclasses.replace(STAGE, rows=batch)
    number = {row.tobytes(): i for i, row in enumerate(source.tokens.astype(np.int64))}
    order = [number[row.numpy().tobytes()] for step in range(13) for row in source.batch(step, stage).tokens]
    epochs = [order[at : at + 13] for at in range(0, 13 * batch, 13)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs), "an epoch reads every row once"
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "each in an order of its own"


def test_chat_batches_keep_rows_together(data: Path) -> None:
    with np.load(data / "sft.npz") as arrays:
        rows = {
            arrays["tokens"][i].astype(np.int64).tobytes(): (arrays["mask"][i], arrays["segment"][i])
            for i in range(13)
        }
    batch = ChatData(data).batch(5, STAGE)
    assert batch.loss_mask is not None and batch.segments is not None and batch.loss_mask.dtype == torch.bool
    for tokens, mask, segment in zip(batch.tokens, batch.loss_mask, batch.segments, strict=True):
        wanted = rows[tokens.numpy().tobytes()]
        assert (mask.numpy() == wanted[0]).all() and (segment.numpy() == wanted[1]).all()


# Going on ----------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_to_the_same_bits(data: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle, at no chosen moment; every checkpoint seen on the way is whole."""
    steps = 16
    pretrain(data, tmp_path / "whole", steps)
    run = tmp_path / "killed"
    args = command("pretrain", data, run, "--tokens", steps * STEP, "--save-every", 0)
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "dsv3.train.nano", *args]
    process = subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 240
        while not (run / "pretrain/state.safetensors").exists() or saved_step(run) < 4:
            assert process.poll() is None, f"it ended: {process.communicate()[0].decode()}"
            assert time.monotonic() < deadline, "no checkpoint in four minutes"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    at = saved_step(run)
    assert 4 <= at < steps
    assert {name: t.shape for name, t in state(run).items()} == {
        name: t.shape for name, t in state(tmp_path / "whole").items()
    }
    again = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith(f"going on from step {at}\n")
    assert_same_end(tmp_path / "whole", run)


class Killed(Exception):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Have the process stop dead within the step after `step`, once its gradients are there."""
    steps = iter(range(step))

    def accumulate(self: nano.MasterAdamW) -> None:
        if next(steps, None) is None:
            raise Killed
        original(self)

    original = nano.MasterAdamW.accumulate
    monkeypatch.setattr(nano.MasterAdamW, "accumulate", accumulate)


def test_the_log_of_a_run_that_went_on_has_each_step_once(data: Path, tmp_path: Path) -> None:
    pretrain(data, tmp_path / "whole", 6)
    run = tmp_path / "killed"
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            pretrain(data, run, 6, "--save-every", 0)
    assert saved_step(run) == 3
    assert [r["step"] for r in log(run)] == [1, 2, 3], "the log is on disk before its checkpoint is"
    with (run / "pretrain/log.jsonl").open("a") as file:  # as from steps after the last save, cut off in one
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    pretrain(data, run, 6)
    assert [r["step"] for r in log(run)] == [1, 2, 3, 4, 5, 6]
    assert_same_end(tmp_path / "whole", run)
    seconds = [r["seconds"] for r in log(run)]
    assert seconds == sorted(seconds), "time goes on as well"


def test_a_run_killed_before_its_first_save_starts_its_log_anew(data: Path, tmp_path: Path) -> None:
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain/log.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    pretrain(data, tmp_path, 2)
    assert [r["step"] for r in log(tmp_path)] == [1, 2]


def test_a_checkpoint_is_whole_or_the_last_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(data, tmp_path, 2)
    before = (tmp_path / "pretrain/state.safetensors").read_bytes()

    def half(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(before[: len(before) // 2])
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(nano, "save_file", half)
        with pytest.raises(Killed):
            pretrain(data, tmp_path, 4)
    assert (tmp_path / "pretrain/state.safetensors").read_bytes() == before
    pretrain(data, tmp_path, 4)
    assert saved_step(tmp_path) == 4
    assert sorted(p.name for p in (tmp_path / "pretrain").iterdir()) == ["log.jsonl", "state.safetensors"]


def test_a_finished_run_is_left_as_it_is(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(data, tmp_path, 2)
    before = state(tmp_path)
    pretrain(data, tmp_path, 2)
    assert "going on from step 2" in capsys.readouterr().out
    assert all(torch.equal(before[name], t) for name, t in state(tmp_path).items())
    assert [r["step"] for r in log(tmp_path)] == [1, 2]


def test_a_loss_that_is_no_number_ends_the_run_and_leaves_its_checkpoint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(data, tmp_path, 2)
    before = state(tmp_path)
    monkeypatch.setattr(Stage, "lr", lambda *_: math.inf)
    assert main(command("pretrain", data, tmp_path, "--tokens", 6 * STEP)) == 1
    assert "error: the loss is nan at step 3" in capsys.readouterr().err
    assert all(torch.equal(before[name], tensor) for name, tensor in state(tmp_path).items())


def test_chat_tuning_starts_from_the_pretrained_weights(data: Path, tmp_path: Path) -> None:
    pretrain(data, tmp_path, 3)
    seen = {}

    def remember(run: Run, *_: object) -> None:
        seen["run"] = run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nano, "train", remember)
        assert main(command("sft", data, tmp_path)) == 0
    base, run = state(tmp_path), seen["run"]
    assert run.step == 0 and not run.optimizer.adamw.state, "a new stage, with fresh moments"
    assert all(torch.equal(m, base[f"master.{name}"]) for name, m in run.optimizer.masters.items())
    assert all(torch.equal(b, base[f"buffer.{name}"]) for name, b in run.model.named_buffers())
    assert any(b.any() for b in run.model.buffers())

    assert main(command("sft", data, tmp_path, "--tokens", 2 * STEP)) == 0
    tuned = state(tmp_path, "sft")
    assert len(log(tmp_path, "sft")) == 2
    assert not torch.equal(tuned["master.lm_head.weight"], base["master.lm_head.weight"])
    biases = [name for name in base if name.startswith("buffer.")]
    assert all(torch.equal(tuned[name], base[name]) for name in biases), "the recipe leaves biases alone here"


# From and to checkpoint folders ------------------------------------------------------------------------


@pytest.fixture
def speaking(monkeypatch: pytest.MonkeyPatch, data: Path) -> Tokenizer:
    """A tokenizer in the data folder, and the tiny preset with its vocabulary."""
    tokenizer = toy_tokenizer()
    tokenizer.save(str(data / "tokenizer.json"))
    config = PRESETS["tiny"].replace(vocab_size=tokenizer.get_vocab_size())
    monkeypatch.setitem(PRESETS, "tiny", config)
    return tokenizer


@pytest.mark.usefixtures("speaking")
def test_export_writes_a_checkpoint_that_speaks(data: Path, tmp_path: Path) -> None:
    pretrain(data, tmp_path, 3)
    out = tmp_path / "exported"
    assert main(command("export", data, tmp_path, out, "--stage", "pretrain")) == 0
    config = PRESETS["tiny"]
    header = read_header(out / "model.safetensors")
    for name, piece in table(config).items():
        eight_bits = header[name].dtype == torch.float8_e4m3fn
        assert eight_bits == piece.in_fp8 == (name + "_scale_inv" in header), name

    run = Run(tmp_path, "pretrain", "tiny")
    run.load(run.checkpoint)
    model = DeepseekV3.from_pretrained(out)
    assert model.config.replace(inert={}) == config.replace(inert={})
    trained = run.weights()
    stored = load_file(out / "model.safetensors")
    for piece in table(config).values():
        if piece.in_fp8:  # of the float32 masters, not of the rounded model
            assert torch.equal(stored[piece.name], quantize_blocks(piece.of(trained[piece.parameter]))[0])
    for name, weight in model.state_dict().items():
        error = float((weight.float() - trained[name].float()).norm() / trained[name].float().norm())
        assert error < 0.04, f"{name} is off by {error:.1%}"
    for name, bias in model.named_buffers():
        assert torch.equal(bias, trained[name]) and bias.dtype == torch.float32 and bias.any(), name

    llm = LLM(out)
    assert (llm.default_params.temperature, llm.default_params.top_p) == (0.6, 0.9)
    (output,) = llm.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=4, temperature=0))
    assert output.prompt == "<｜begin▁of▁sentence｜><｜User｜>Hello<｜Assistant｜>"
    assert 1 <= len(output.token_ids) <= 4
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 1
    assert set(llm.tokenizer.eos_token_ids) == {1}
    assert (out / "tokenizer.json").read_bytes() == (data / "tokenizer.json").read_bytes()


def test_a_run_starts_from_a_checkpoint_folder(data: Path, tmp_path: Path) -> None:
    model = DeepseekV3(PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(77))
    for bias in model.buffers():
        bias.normal_()
    model.save_pretrained(tmp_path / "checkpoint", format="fp32")
    seen = {}

    def remember(run: Run, *_: object) -> None:
        seen["run"] = run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nano, "train", remember)
        init = ("--init", tmp_path / "checkpoint")
        assert main(command("pretrain", data, tmp_path / "run", *init)) == 0
    run = seen["run"]
    assert run.step == 0 and not run.optimizer.adamw.state
    for name, p in model.named_parameters():
        assert torch.equal(run.optimizer.masters[name], p), name
        assert torch.equal(run.model.get_parameter(name), p.bfloat16()), name
    for name, bias in model.named_buffers():
        assert torch.equal(run.model.get_buffer(name), bias), name


def test_bits_per_byte_is_what_it_says(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """-log2 of each token's probability given those before it in its window, special tokens left out."""
    pretrain(data, tmp_path, 2)
    capsys.readouterr()
    assert main(command("evaluate", data, tmp_path, "--stage", "pretrain")) == 0
    found = json.loads(capsys.readouterr().out)

    run = Run(tmp_path, "pretrain", "tiny")
    run.load(run.checkpoint)
    with np.load(data / "heldout.npz") as arrays:
        for kind, size in (("novels", 3000), ("stories", 2000)):
            ids = arrays[f"{kind}_tokens"].astype(np.int64).tolist()
            assert any(i < len(SPECIALS) for i in ids)
            bits = 0.0
            for start in range(0, len(ids) - 1, 512):
                window = ids[start : start + 513]
                with torch.no_grad():
                    probabilities = run.model(torch.tensor([window[:-1]])).logits[0].double().softmax(-1)
                for i, target in enumerate(window[1:]):
                    if target >= len(SPECIALS):
                        bits -= math.log2(float(probabilities[i, target]))
            assert found[kind] == pytest.approx(bits / size, abs=1e-3), kind
    assert found.keys() == {"novels", "stories"}


def test_a_checkpoint_is_evaluated_as_it_would_be_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = DeepseekV3(PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(5))
    model.save_pretrained(tmp_path / "checkpoint", format="fp8")
    assert main(command("evaluate", data, tmp_path / "checkpoint")) == 0
    found = json.loads(capsys.readouterr().out)
    stored = DeepseekV3.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    assert found == {kind: round(bits, 4) for kind, bits in nano.bits_per_byte(stored, data).items()}


def test_an_even_guess_costs_log2_of_the_vocabulary(data: Path) -> None:
    model = Transformer(PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with np.load(data / "heldout.npz") as arrays:
        counted = int((arrays["novels_tokens"][1:] >= len(SPECIALS)).sum())
    assert nano.bits_per_byte(model, data)["novels"] == pytest.approx(counted * 8 / 3000)
    assert nano.bits_per_byte(model, data, seq=100)["novels"] == pytest.approx(counted * 8 / 3000)


# What it says when it cannot ---------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Run a command that must fail with one line; returns the line."""
    capsys.readouterr()
    assert main(command(*args)) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_missing_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str) -> None:
    said = refused(capsys, stage, tmp_path / "nowhere", tmp_path / "run")
    assert "nowhere" in said and "python -m dsv3.data.nano" in said
    assert not (tmp_path / "run").exists()


BROKEN = {
    "empty": lambda whole: b"",
    "cut off": lambda whole: whole[: len(whole) // 2],
    "something else": lambda whole: b"Once upon a time there was a fox.",
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize(("stage", "name"), [("pretrain", "pretrain.npy"), ("sft", "sft.npz")])
def test_broken_data_is_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, name: str, how: str
) -> None:
    (tmp_path / name).write_bytes(BROKEN[how]((data / name).read_bytes()))
    said = refused(capsys, stage, tmp_path, tmp_path / "run")
    assert f"{name} is broken" in said and "python -m dsv3.data.nano" in said


def test_data_that_does_not_fit_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "pretrain.npy", np.zeros(STEP, np.uint16))
    said = refused(capsys, "pretrain", tmp_path, tmp_path / "run")
    assert "4096 tokens" in said and "4097" in said
    np.save(tmp_path / "pretrain.npy", np.full(2 * STEP, 5000, np.uint16))
    assert "token 5000" in refused(capsys, "pretrain", tmp_path, tmp_path / "run")
    np.savez(tmp_path / "sft.npz", tokens=np.zeros((4, 513), np.uint16))
    assert "'mask'" in refused(capsys, "sft", tmp_path, tmp_path / "run")
    empty = {name: np.zeros((0, 513), np.uint16) for name in ("tokens", "mask", "segment")}
    np.savez(tmp_path / "sft.npz", **empty)
    assert "no rows" in refused(capsys, "sft", tmp_path, tmp_path / "run")


@pytest.mark.parametrize("value", ["0", "-4096", "nan", "inf"])
def test_tokens_must_be_a_positive_number(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    said = refused(capsys, "pretrain", data, tmp_path, f"--tokens={value}")
    assert f"--tokens is {float(value):g}" in said and "at least 1" in said
    assert not list(tmp_path.iterdir())


def test_a_negative_skip_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--skip is -1" in refused(capsys, "pretrain", data, tmp_path, "--skip=-1")


def test_words_for_numbers_are_wrong_use(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command("pretrain", data, tmp_path, "--tokens", "many"))
    assert ended.value.code == 2
    assert re.search(r"error: argument --tokens: .*'many'\n$", capsys.readouterr().err)


def test_a_run_folder_that_cannot_be_written_is_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    said = refused(capsys, "pretrain", data, tmp_path / "file", "--tokens", STEP)
    assert "file/pretrain cannot be written to (Not a directory)" in said
    (tmp_path / "run/pretrain/log.jsonl").mkdir(parents=True)
    assert "cannot be written to" in refused(capsys, "pretrain", data, tmp_path / "run", "--tokens", STEP)


def test_a_folder_of_another_shape_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = DeepseekV3(PRESETS["tiny"].replace(num_hidden_layers=2))
    other.init_weights()
    other.save_pretrained(tmp_path / "other")
    said = refused(capsys, "pretrain", data, tmp_path / "run", "--init", tmp_path / "other")
    assert "other is a model of another shape than tiny" in said
    assert "nowhere does not exist" in refused(
        capsys, "pretrain", data, tmp_path / "run", "--init", tmp_path / "nowhere"
    )
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_shape_or_broken_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(data, tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setitem(PRESETS, "tiny", PRESETS["tiny"].replace(hidden_size=40))
        assert "another shape than tiny" in refused(capsys, "pretrain", data, tmp_path, "--tokens", STEP)
    checkpoint = tmp_path / "pretrain/state.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert "state.safetensors is broken" in refused(capsys, "pretrain", data, tmp_path, "--tokens", STEP)


def test_what_is_not_trained_yet_is_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert "run `pretrain` first" in refused(capsys, "sft", data, run)
    assert "train the stage 'sft' first" in refused(capsys, "evaluate", data, run)
    assert "train the stage 'pretrain' first" in refused(
        capsys, "export", data, run, tmp_path / "out", "--stage", "pretrain"
    )
    assert "export needs the folder" in refused(capsys, "export", data, run)
    assert not run.exists(), "asking makes nothing"


def test_evaluate_and_export_name_what_the_data_lack(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, bare = tmp_path / "run", tmp_path / "bare"
    bare.mkdir()
    pretrain(data, run, 1)
    stage = ("--stage", "pretrain")
    assert "heldout.npz does not exist" in refused(capsys, "evaluate", bare, run, *stage)
    np.savez(bare / "heldout.npz", novels_tokens=np.full(20, 300, np.uint16), novels_bytes=np.int64(60))
    assert "token 300" in refused(capsys, "evaluate", bare, run, *stage)
    assert "tokenizer.json does not exist" in refused(capsys, "export", bare, run, tmp_path / "out", *stage)
    assert not (tmp_path / "out").exists()
    (bare / "tokenizer.json").write_text("{}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/poem.txt").write_text("keep me")
    assert "neither empty nor a checkpoint" in refused(capsys, "export", bare, run, tmp_path / "full", *stage)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["poem.txt"]
