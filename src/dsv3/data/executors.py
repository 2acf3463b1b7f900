"""Where the steps of a build run: datatrove's executors, for one machine, Slurm or Ray.

A build is a chain of pipelines, each for so many tasks. Which executor runs them changes nothing in what they
write: tasks are fixed by the recipe and the files, not by the number of workers. datatrove marks each task that is
done, and one that is done is not done again.

datatrove writes logs to the terminal, with bars of its own. Here they go to files (`logs/` of each step), and the
terminal belongs to whoever asked for the build.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import multiprocess
from datatrove.executor import LocalPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger

from dsv3.data.manifest import DataError

Place = Literal["local", "slurm", "ray"]


@dataclass(frozen=True)
class Stage:
    """One link of the chain: a pipeline, and how many tasks it is cut into."""

    name: str
    pipeline: tuple[PipelineStep, ...]
    tasks: int


class QuietLocalExecutor(LocalPipelineExecutor):  # type: ignore[misc]
    """datatrove's local executor without its words on the terminal."""

    def run(self) -> Any:
        # Workers are forked from a server; it imports what they need once, not each of them anew.
        multiprocess.get_context(self.start_method).set_forkserver_preload(["dsv3.data.build"])
        with _silence():
            return super().run()

    def _run_for_rank(self, *args: Any, **kwargs: Any) -> Any:
        with _silence():
            return super()._run_for_rank(*args, **kwargs)


@contextlib.contextmanager
def _silence() -> Any:
    logger.remove()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        try:
            yield
        finally:
            logger.remove()  # datatrove has put its own back, onto what is closed now


def make_executors(
    stages: Sequence[Stage], logs: Path, place: Place, workers: int, options: Mapping[str, Any]
) -> list[PipelineExecutor]:
    """An executor for each stage. On Slurm and Ray each waits for the one before it."""
    made: list[PipelineExecutor] = []
    kind = _kind(place)
    for stage in stages:
        where = {
            "pipeline": list(stage.pipeline),
            "tasks": stage.tasks,
            "logging_dir": str(logs / stage.name),
        }
        if place == "local":
            made.append(kind(**where, workers=min(workers, stage.tasks)))
            continue
        if place == "slurm":
            where |= {
                "job_name": f"dsv3-data-{stage.name}",
                "slurm_logs_folder": str(logs / stage.name / "slurm"),
            }
        try:
            made.append(
                kind(**{**where, "workers": workers, "depends": made[-1] if made else None, **options})
            )
        except TypeError as problem:
            raise DataError(
                f"the recipe's `{place}` settings do not fit datatrove's executor: {problem}"
            ) from None
    return made


def _kind(place: Place) -> Callable[..., PipelineExecutor]:
    if place == "local":
        return QuietLocalExecutor
    if place == "slurm":
        from datatrove.executor import SlurmPipelineExecutor

        return SlurmPipelineExecutor  # type: ignore[no-any-return]
    try:
        from datatrove.executor.ray import RayPipelineExecutor
    except ImportError as problem:
        raise DataError(f"the Ray executor needs Ray ({problem}): pip install 'ray[default]'") from None
    return RayPipelineExecutor  # type: ignore[no-any-return]
