"""A run's record and its progress lines: what is written, what a resumed run keeps, what a watcher sees."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.errors import UserError
from dsv3.train.metrics import (
    FILE,
    MetricsLog,
    Progress,
    StepMetrics,
    duration,
    progress_line,
    read_metrics,
)


def metrics(step: int = 120, **changes: Any) -> StepMetrics:
    values: dict[str, Any] = {
        "step": step,
        "tokens": step * 1000,
        "loss": 3.2141,
        "mtp": 3.41,
        "balance": 1.02,
        "norm": 0.41,
        "lr": 2e-3,
        "batch": 8,
        "load": 1.31,
        "tokens_per_second": 4812.4,
        "flops_share": 0.312,
        "seconds": step * 2.0,
    }
    return StepMetrics(**(values | changes))


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is not installed: importing a module that is None raises ImportError."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def test_each_step_is_a_line_of_json_that_is_there_at_once(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "run" / "phase") as log:
        log.write(metrics(1, loads={1: 1.5, 2: 1.25}))
        assert [s["step"] for s in read_metrics(log.path)] == [1], "flushed before the log is closed"
        log.write(metrics(2, mtp=None))
    first, second = read_metrics(tmp_path / "run" / "phase" / FILE)
    assert first["loads"] == {"1": 1.5, "2": 1.25} and "loads" not in second
    assert second["mtp"] is None and second["lr"] == 2e-3 and second["tokens"] == 2000
    assert not list((tmp_path / "run" / "phase").glob("*.partial"))


def test_float32_numbers_come_back_to_the_bit(tmp_path: Path) -> None:
    values = torch.randn(200).mul(3).exp()
    for value in values.tolist():
        written = json.loads(metrics(loss=value).to_json())["loss"]
        assert torch.tensor(written) == torch.tensor(value), f"{value!r} came back as {written!r}"


def test_what_is_no_number_is_null() -> None:
    line = metrics(norm=float("inf"), loss=float("nan"), loads={1: float("nan")}).to_json()
    values = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert values["norm"] is None and values["loss"] is None and values["loads"] == {"1": None}


def test_a_run_that_goes_on_cuts_off_what_it_will_write_again(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.write(metrics(step, loss=1.0))
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 6, "loss"')  # killed here
    with MetricsLog(tmp_path, step=3) as log:
        log.write(metrics(4, loss=2.0))
    assert [(s["step"], s["loss"]) for s in read_metrics(tmp_path / FILE)] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 2.0),
    ]


def test_a_new_run_starts_an_empty_log(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(metrics(1).to_json() + "\n")
    MetricsLog(tmp_path).close()
    assert (tmp_path / FILE).read_text() == ""


def test_the_last_line_may_be_half_written_but_no_other(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_text(metrics(1).to_json() + "\n" + '{"step": 2, "lo')
    assert [s["step"] for s in read_metrics(path)] == [1]
    for broken in ("{}\n", "[1]\n", '"step"\n', "\0\0\0\n", '{"step": 2, "lo\n'):
        path.write_text(metrics(1).to_json() + "\n" + broken + metrics(3).to_json() + "\n")
        with pytest.raises(UserError, match=rf"{FILE}:2 .*remove that line"):
            read_metrics(path)


def test_problems_of_the_folder_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to.*name another folder"):
        MetricsLog(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="does not exist"):
        read_metrics(tmp_path / FILE)


def test_tensorboard_gets_the_same_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, float, int]] = []
    opened: list[tuple[str, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            opened.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            opened.append(("closed", 0))

    module: Any = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with MetricsLog(tmp_path, step=6) as log:
        log.write(metrics(7, mtp=None, loads={3: 1.5}))
    assert opened == [(str(tmp_path / "tensorboard"), 7), ("closed", 0)]
    assert ("loss", 3.2141, 7) in written and ("loads/3", 1.5, 7) in written
    assert not any(name in ("mtp", "step") for name, _, _ in written)
    MetricsLog(tmp_path / "without", tensorboard=False).close()
    assert len(opened) == 2


# What a watcher sees -----------------------------------------------------------------------------------


def test_a_progress_line_says_it_all() -> None:
    assert progress_line(metrics(), 4882) == (
        "step 120/4882  loss 3.214  mtp 3.41  bal 1.02  norm 0.41  lr 2.0e-03  load 1.31  dropped 0  4,812 tok/s"
        "  31% peak"
    )
    assert progress_line(metrics(), 4882, 738) == (
        "step 120/4882  loss 3.214  mtp 3.41  norm 0.41  lr 2.0e-03  load 1.31  dropped 0  4,812 tok/s  31% peak"
        "  12.3 min left"
    ), "with the balance loss it would be too wide"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropped": 123_456, "balance": 123.4, "norm": 0.00041, "load": 12.34, "loss": 11.214, "mtp": 13.41},
        {"tokens_per_second": 48_122_222.0, "norm": 1234.5},
        {"mtp": None, "flops_share": None},
    ],
)
def test_a_progress_line_is_narrower_than_120_columns(changes: dict[str, Any]) -> None:
    for step, steps in ((1, 9), (4880, 4882), (1_036_132, 1_036_133)):
        line = progress_line(metrics(step, **changes), steps, 54 * 86400)
        assert len(line) < 120, line
        assert (
            f"step {step}/{steps}" in line and "loss" in line and "tok/s" in line and "54.0 days left" in line
        )
        assert f"dropped {changes.get('dropped', 0):,}" in line


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (99.4, "99 s"), (738, "12.3 min"), (6000, "1.7 h"), (54.1 * 86400, "54.1 days")],
)
def test_duration(seconds: float, said: str) -> None:
    assert duration(seconds) == said


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_plain_lines_every_few_steps() -> None:
    out = io.StringIO()
    progress = Progress(23_000, every=10, out=out)
    for step in range(1, 24):
        progress.show(metrics(step), 23)
    progress.close()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/23", "10/23", "20/23", "23/23"]
    assert "left" not in lines[0], "after one step one cannot know"
    assert lines[1].endswith("26 s left") and lines[-1].endswith("0 s left"), "2 s for each 1,000 tokens"
    assert "\r" not in out.getvalue() and "\x1b" not in out.getvalue()


def test_a_terminal_has_one_line_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    out = Terminal()
    progress = Progress(100_000, every=10, out=out)
    for step in range(1, 13):
        progress.show(metrics(step), 100)
    assert out.getvalue().count("\n") == 2, "the first step and the tenth stay"
    shown = out.getvalue().replace("\n", "").split("\r\x1b[K")
    assert len(shown) == 13 and max(map(len, shown)) < 60, "a line that wraps cannot be written over"
    progress.close()
    progress.close()
    assert out.getvalue().count("\n") == 3
