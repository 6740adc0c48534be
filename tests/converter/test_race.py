"""What may be in memory together as forms are measured."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from onnx_lathe.benchmarks.measure import FINAL, Effort
from onnx_lathe.benchmarks.result import Measurement
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.converter.compile import race as race_module
from onnx_lathe.converter.compile.clock import Clock
from onnx_lathe.converter.compile.race import Race, Runner, side_by_side
from onnx_lathe.converter.compile.task import Rung, Task
from onnx_lathe.converter.progress import silent
from onnx_lathe.runtime.facts import file_bytes
from tests import graphs
from tests.converter.test_search import measuring

GROUPS = list[tuple[list[str], bool]]
"""The names that were measured together, and whether one at a time."""


@pytest.fixture
def task(tmp_path: Path) -> Task:
    original = graphs.write(tmp_path / "linear.onnx", graphs.LINEAR)
    return Task(
        original=original,
        candidates=(),
        parts=None,
        metric=None,
        max_drop=0.01,
        dims=({},),
        provider="cpu",
        threads=1,
        time_budget=60.0,
        folder=tmp_path / "work",
    )


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> GROUPS:
    seen: GROUPS = []

    def measure(subjects: Sequence[Subject], effort: Effort, on_progress: object = None) -> Measurement:
        names = [subject.name for subject in subjects]
        seen.append((names, effort.apart))
        return measuring(dict.fromkeys(names, 1.0))(subjects, effort, on_progress)

    monkeypatch.setattr(race_module, "measure", measure)
    return seen


@pytest.fixture
def with_room(task: Task, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return what leaves free memory for so many models of the task's size."""

    def leave(models: float) -> None:
        bytes_each = race_module._GROWN * file_bytes(task.original) / race_module._MEMORY_SHARE
        free = SimpleNamespace(available=bytes_each * models)
        monkeypatch.setattr(race_module.psutil, "virtual_memory", lambda: free)

    return leave


@pytest.mark.parametrize(("models", "apart"), [(2.1, False), (1.9, True), (0.1, True)])
def test_a_final_of_models_that_do_not_fit_together_runs_one_at_a_time(
    models: float, apart: bool, task: Task, groups: GROUPS, with_room: Callable[[float], None]
) -> None:
    with_room(models)
    side_by_side(task, "measure", task.original, [Rung("form", task.original)], ["a", "b"], FINAL, silent)
    assert groups == [(["original", "form"], apart)]


def test_a_limit_of_the_container_counts_as_free_memory_does(
    task: Task, groups: GROUPS, with_room: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(100.0)
    monkeypatch.setattr(race_module.cgroups, "memory_limits", lambda: iter([file_bytes(task.original)]))
    side_by_side(task, "measure", task.original, [Rung("form", task.original)], ["a", "b"], FINAL, silent)
    assert groups == [(["original", "form"], True)]


def test_what_was_judged_before_makes_room_for_what_is_measured(
    task: Task, groups: GROUPS, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: list[int] = []
    monkeypatch.setattr(race_module.memory, "give_back", lambda: before.append(len(groups)))
    side_by_side(task, "measure", task.original, [Rung("form", task.original)], ["a", "b"], FINAL, silent)
    assert before == [0]
    assert len(groups) == 1


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (4.1, [(["original", "a", "b", "c"], False)]),
        (3.1, [(["original", "a", "b"], False), (["original", "c"], False)]),
        (1.1, [(["original", name], True) for name in "abc"]),
    ],
)
def test_a_heat_is_cut_into_groups_that_fit(
    models: float, expected: GROUPS, task: Task, groups: GROUPS, with_room: Callable[[float], None]
) -> None:
    with_room(models)
    race = Race(task, task.original, Clock(60.0), silent)
    race.heat([Runner(name, task.original, name) for name in "abc"], 1.0)
    assert groups == expected
