"""What a run says of itself: a line of JSON for each step, and a line of text for whoever watches.

`metrics.jsonl` in the run's folder is the record. Each line is one step's `StepMetrics` and is flushed before the
next step begins, so a killed run loses at most the line it was writing: the log may run ahead of the last
checkpoint, never fall behind. When the run goes on, what it wrote after that checkpoint is cut off, as it
will be written again. `dsv3.train.plots` makes pictures of the file, and anything that reads JSON can follow it:

    tail -f RUN/pretrain/metrics.jsonl | jq -c '[.step, .loss]'

Where TensorBoard is installed the same numbers go to `tensorboard/` beside it; nothing depends on that.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from dsv3.errors import UserError

FILE = "metrics.jsonl"
COLUMNS = 120
_DIGITS = 9  # as many as tell any two float32 numbers apart: a run that goes on writes the same lines
_WINDOW = 50  # steps over which the time that is left is estimated


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimiser step. Losses are in nats per token; schedules have the values that the step used."""

    step: int
    """Steps done, this one included."""
    tokens: int
    """Tokens trained on so far, this step's included."""
    loss: float
    mtp: float | None = None
    """None where the MTP modules did not run."""
    balance: float = 0.0
    """The sequence-wise balance loss before alpha, summed over layers."""
    norm: float
    """The gradient's, before it was clipped."""
    lr: float
    batch: int
    """Sequences."""
    gamma: float = 0.0
    mtp_weight: float = 0.0
    load: float = 1.0
    """Tokens of the busiest expert over the mean expert's, in the worst layer: 1 is even."""
    loads: Mapping[int, float] | None = None
    """The same for each MoE layer."""
    dropped: int = 0
    """Choices of experts that no expert was given."""
    tokens_per_second: float
    flops_share: float | None = None
    """Of what the machine reaches in matrix products (`dsv3.train.flops`); None where that is not known."""
    seconds: float
    """Spent on all steps so far, in all sittings."""

    def to_json(self) -> str:
        """One line. What is no finite number becomes null: JSON has no other word for it."""
        values = {name: _plain(value) for name, value in dataclasses.asdict(self).items()}
        if self.loads is None:
            del values["loads"]
        return json.dumps(values, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of a metrics file, without a last line that is half written.

    Runs differ in what they write, so look keys up with a default. Raises UserError if it is no such file.
    """
    try:
        return [values for _, values in _lines(path)]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name the metrics of a run that has taken a step") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each whole line with what it says."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                values = json.loads(line)
                if not isinstance(values["step"], int):
                    raise TypeError
            except (ValueError, TypeError, KeyError, RecursionError):
                raise UserError(f"{path}:{number} is no line of metrics: remove that line") from None
            yield line, values


class MetricsLog:
    """The open `metrics.jsonl` of one run, in the one process that writes it."""

    def __init__(self, folder: Path, step: int = 0, tensorboard: bool = True) -> None:
        """step: where the run stands; lines of later steps are cut off. tensorboard: write there too, if there is one.

        Raises UserError if the folder cannot be written to.
        """
        self.path = folder / FILE
        partial = self.path.with_suffix(".partial")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with partial.open("w", encoding="utf-8") as kept:
                if self.path.exists():
                    kept.writelines(line for line, values in _lines(self.path) if values["step"] <= step)
            os.replace(partial, self.path)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            problem = error.strerror or str(error)
            raise UserError(f"{folder} cannot be written to ({problem}): name another folder") from None
        self._board = _tensorboard(folder / "tensorboard", step) if tensorboard else None

    def write(self, metrics: StepMetrics) -> None:
        """Record one step. From here on it outlives the process (a machine that loses power may lose it)."""
        self._file.write(metrics.to_json() + "\n")
        self._file.flush()
        if self._board is not None:
            _write_board(self._board, metrics)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _tensorboard(folder: Path, step: int) -> Any:
    """A writer that hides what was written after `step`; None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def _write_board(board: Any, metrics: StepMetrics) -> None:
    for name, value in dataclasses.asdict(metrics).items():
        if isinstance(value, int | float) and name != "step":
            board.add_scalar(name, value, metrics.step)
    for layer, load in (metrics.loads or {}).items():
        board.add_scalar(f"loads/{layer}", load, metrics.step)


class Progress:
    """Shows a run to whoever watches.

    On a terminal there is one line that changes with every step, and stays every `every` steps; elsewhere (a file,
    a pipe) there are plain lines every `every` steps. The first and the last step are always shown.
    """

    def __init__(self, total_tokens: int, every: int = 20, out: TextIO | None = None) -> None:
        """total_tokens: where the run ends; in tokens, since a batch that grows makes steps slower.

        out: where to, by default standard error.
        """
        self.total_tokens = total_tokens
        self.every = max(1, every)
        self.out = sys.stderr if out is None else out
        self._live = self.out.isatty()
        self._open = False
        self._first = True
        self._recent: deque[tuple[int, float]] = deque(maxlen=_WINDOW)

    def show(self, metrics: StepMetrics, steps: int) -> None:
        """steps: how many there will be in all, as far as one knows now."""
        self._recent.append((metrics.tokens, metrics.seconds))
        last = metrics.tokens >= self.total_tokens
        stays = self._first or last or metrics.step % self.every == 0
        self._first = False
        if not (stays or self._live):
            return
        line = progress_line(metrics, steps, self._seconds_left())
        if self._live:
            width = shutil.get_terminal_size((COLUMNS, 24)).columns - 1
            line = f"\r\x1b[K{line[:width]}"
        self.out.write(line + ("\n" if stays else ""))
        self.out.flush()
        self._open = not stays

    def close(self) -> None:
        """End the line that is still changing, if there is one."""
        if self._open:
            self.out.write("\n")
            self.out.flush()
            self._open = False

    def _seconds_left(self) -> float | None:
        """From the speed of the last steps; None after the first."""
        (tokens, seconds), (now, later) = self._recent[0], self._recent[-1]
        if now == tokens:
            return None
        return max(0, self.total_tokens - now) * (later - seconds) / (now - tokens)


def progress_line(metrics: StepMetrics, steps: int, seconds_left: float | None = None) -> str:
    """One step in less than 120 columns; steps: how many there will be in all.

    Where all of it would take more, the balance loss is left out, then that of MTP, then the norm.
    """
    parts = {
        "step": f"step {metrics.step}/{steps}",
        "loss": f"loss {metrics.loss:.3f}",
        "mtp": "" if metrics.mtp is None else f"mtp {metrics.mtp:.2f}",
        "balance": f"bal {_digits(metrics.balance, 3)}",
        "norm": f"norm {_digits(metrics.norm, 2)}",
        "lr": f"lr {metrics.lr:.1e}",
        "load": f"load {_digits(metrics.load, 3)}",
        "dropped": f"dropped {_short(metrics.dropped)}",
        "speed": f"{_short(metrics.tokens_per_second)} tok/s",
        "share": "" if metrics.flops_share is None else f"{metrics.flops_share:.0%} peak",
        "left": "" if seconds_left is None else f"{duration(seconds_left)} left",
    }
    for least_needed in ("balance", "mtp", "norm", ""):
        line = "  ".join(filter(None, parts.values()))
        if len(line) < COLUMNS or not least_needed:
            break
        del parts[least_needed]
    return line


def _digits(x: float, n: int) -> str:
    """So many digits, zeros at the end included: 1.00, 12.3, 123."""
    return f"{x:#.{n}g}".removesuffix(".")


def _short(n: float) -> str:
    return f"{n / 1e6:,.1f}M" if n >= 1e6 else f"{n:,.0f}"


def duration(seconds: float) -> str:
    """A span of time in the unit one would say it in: 40 s, 12.3 min, 3.2 h, 54.1 days."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    for limit, per, unit in ((100 * 60, 60, "min"), (72 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / per:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"
