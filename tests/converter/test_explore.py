"""What the search makes of judgements, of forms that die, and of drafts; latencies are those that the test sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_lathe.benchmarks.measure import Effort
from onnx_lathe.benchmarks.result import Measurement
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.converter.compile import build as build_module
from onnx_lathe.converter.compile import race as race_module
from onnx_lathe.converter.compile import search as search_module
from onnx_lathe.converter.compile import whole as whole_module
from onnx_lathe.converter.compile.build import DRAFT_SAMPLES, build
from onnx_lathe.converter.compile.forms import Candidate
from onnx_lathe.converter.compile.race import write_feeds
from onnx_lathe.converter.compile.search import search
from onnx_lathe.converter.compile.task import Found, Task
from onnx_lathe.converter.progress import silent
from onnx_lathe.passes import run as passes_run
from onnx_lathe.passes.run import Applied
from onnx_lathe.runtime.errors import MeasurementError
from onnx_lathe.runtime.samples import Samples
from tests.benchmarks.test_limits import PEAKS
from tests.converter.test_space import by_operators, skipping_task


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setattr(race_module, "measure", by_operators)
    monkeypatch.setattr(search_module, "measure_peaks", lambda threads: PEAKS)
    return skipping_task(tmp_path)


def losing(monkeypatch: pytest.MonkeyPatch, loses: Callable[[str], bool]) -> list[str]:
    """Let forms lose half by their names; return the names that are judged, as they are."""
    judged, names = whole_module.judged, list[str]()

    def judge(task: Task, judge: object, name: str, *others: Any) -> object:
        names.append(name)
        found = judged(task, judge, name, *others)  # pyright: ignore[reportArgumentType]
        return replace(found, certificate=replace(found.certificate, drop=0.5 if loses(name) else 0.0))

    monkeypatch.setattr(whole_module, "judged", judge)
    monkeypatch.setattr(whole_module, "mixed_candidates", lambda *_: [])
    return names


def reasons(found: Found) -> dict[str, str]:
    return {item.candidate.name: str(item.refusal) for item in found.tried}


def test_what_loses_is_repaired_and_what_rounds_alike_is_not_made_again(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = losing(monkeypatch, lambda name: "quantize-dynamic" in name and "smooth" not in name)
    found = search(task, silent)
    assert found.winner is not None
    assert found.winner.candidate.name == "cleanup,smooth{alpha=search},keep-skip-apart,quantize-dynamic"
    assert names[:2] == ["cleanup,keep-skip-apart,quantize-dynamic", found.winner.candidate.name]
    assert "cleanup,quantize-dynamic" not in names
    assert reasons(found)["cleanup,quantize-dynamic"] == (
        "It rounds as cleanup,keep-skip-apart,quantize-dynamic does, which loses too much."
    )
    assert reasons(found)[names[0]].startswith("It loses 50.00 points of mean_cosine on the select part")


def test_where_all_that_rounds_loses_the_same_graph_ships_in_float(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    losing(monkeypatch, lambda name: "quantize" in name)
    found = search(task, silent)
    assert found.winner is not None
    assert found.winner.candidate.name == "cleanup,keep-skip-apart"
    assert found.winner.speed[0].value == pytest.approx(1.25)
    assert found.winner.whole


def test_an_exact_form_stands_by_unjudged_where_the_time_is_over(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    losing(monkeypatch, lambda name: "quantize" in name)
    left = {"seconds": 1000.0}

    class Stopped(search_module.Clock):
        def left(self, share: float = 1.0) -> float:
            return left["seconds"]

    def then_over(name: str) -> bool:
        left["seconds"] = -1.0
        return "quantize" in name

    monkeypatch.setattr(search_module, "Clock", Stopped)
    names = losing(monkeypatch, then_over)
    found = search(task, silent)
    assert len(names) == 1
    assert found.winner is not None
    assert found.winner.candidate.name == "cleanup,keep-skip-apart"
    assert found.winner.certificate is None
    assert found.certificates["cleanup,keep-skip-apart"].drop <= 1e-6


def test_a_form_that_dies_as_the_one_to_compare_with_ends_its_heat_alone(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(subjects: Sequence[Subject], effort: Effort, on_progress: object = None) -> Measurement:
        if subjects[0].name == "cleanup,quantize-dynamic":
            raise MeasurementError(subjects[0].name, got="a crash", expected="none", mend="Report it.")
        return by_operators(subjects, effort, on_progress)

    monkeypatch.setattr(race_module, "measure", dying)
    found = search(task, silent)
    assert found.winner is not None
    assert found.winner.candidate.name == "cleanup,quantize-dynamic"
    assert "cleanup,quantize-dynamic: got a crash" in reasons(found)["cleanup,keep-skip-apart,quantize-dynamic"]


def test_a_draft_is_made_of_few_samples_and_unchecked(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    apply = passes_run.apply

    def spy(*arguments: Any, samples: Samples, **options: Any) -> Sequence[Applied]:
        (applied,) = apply(*arguments, samples=samples, **options)
        seen.append((len(samples), len(applied.checks)))
        return (applied,)

    monkeypatch.setattr(build_module.passes_run, "apply", spy)
    form = Candidate("static", task.original, "quantize-static")
    draft, whole = (build(task, form, silent, draft=draft) for draft in (True, False))
    assert draft.model != whole.model
    (few, unchecked), (many, checked) = seen
    assert (few, unchecked, many) == (DRAFT_SAMPLES, 0, 32)
    assert checked > 0


def test_a_heat_runs_half_of_the_batches_that_come(task: Task, tmp_path: Path) -> None:
    batches = tuple({"x": np.zeros((2, 4 + number, 64), np.float32)} for number in range(4))
    coming = replace(task, dims=({},), measured=Samples(batches))
    shapes = [
        [np.load(file)["x"].shape[1] for file in write_feeds(coming, task.original, 0, tmp_path, most)]
        for most in (None, 2)
    ]
    assert shapes == [[4, 5, 6, 7], [4, 6]]
