"""Where the original runs: on the provider that was asked for or, where that does not take it whole, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from onnx_lathe.converter.compile.task import CPU, Task
from onnx_lathe.converter.stages import model_digest
from onnx_lathe.converter.workload import batches_to_time
from onnx_lathe.runtime import trial
from onnx_lathe.runtime.errors import LatheError
from onnx_lathe.runtime.samples import Array
from onnx_lathe.runtime.session import Session

_CODE = ("onnx_lathe.runtime", "onnx_lathe.converter.compile.home")


def at_home(task: Task) -> Task:
    """Return the task with the reason why its provider does not run the original whole, where that is so.

    Forms of the original may run there all the same: what a provider refuses is often a guard that a pass takes away.

    Raises:
        LatheError: The provider runs nothing at all here.
    """
    if task.provider == CPU:
        return task

    def make(folder: Path) -> str:
        del folder
        try:
            answers(task, task.original, task.provider)
        except LatheError as error:
            if not _is_alive(task.provider):
                raise
            return str(error)
        return ""

    depends = {
        "model": model_digest(task.original),
        "dims": dict(task.dims[0]),
        "samples": task.samples_digest,
        "provider": task.provider,
        "threads": task.threads,
    }
    reason = task.cache.stage("home", task.original_name, depends, _CODE, make, str).value
    return replace(task, not_at_home=reason or None)


def answers(task: Task, model: Path, provider: str, times: int = 1) -> list[Mapping[str, Array]]:
    """Return what a model answers at the first shape of a task, several times on the same input.

    Raises:
        LatheError: It does not run there, or not on these inputs.
    """
    session = Session(model, provider=provider, threads=task.threads)
    feeds = batches_to_time(model, task.samples, task.dims[0])[0]
    return [session.run(feeds) for _ in range(times)]


def refusal(task: Task, model: Path) -> str | None:
    """Return why a provider does not take a form whole; None where it does, and for the CPU, which is not asked.

    A plain session would leave what a provider does not take to the CPU, and be timed all the same.
    """
    if task.provider == CPU:
        return None
    try:
        Session(model, provider=task.provider, threads=task.threads)
    except LatheError as error:
        return str(error)
    return None


def _is_alive(provider: str) -> bool:
    """Say whether a provider runs a graph of two nodes."""
    try:
        trial.provider(provider)
    except LatheError:
        return False
    return True
