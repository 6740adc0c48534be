"""What compilations to one output remember of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from onnx_lathe.benchmarks import history
from onnx_lathe.benchmarks.measure import Effort
from onnx_lathe.benchmarks.report.model import Report
from onnx_lathe.benchmarks.result import Certificate, Interval, Measurement
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.converter.compile import race as race_module
from onnx_lathe.converter.compile import search as search_module
from onnx_lathe.converter.compile.compile import Compiled, compile
from onnx_lathe.converter.compile.forms import Candidate
from onnx_lathe.converter.compile.history import FILE, SHIPPED, remembered
from onnx_lathe.converter.compile.task import Found, Task, Tried
from tests import graphs
from tests.benchmarks.suites import suite
from tests.benchmarks.test_limits import PEAKS


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return graphs.write(tmp_path / "linear.onnx", graphs.LINEAR)


def task(original: Path, folder: Path) -> Task:
    folder.mkdir(exist_ok=True)
    return Task(original, (), None, None, 0.01, ({"batch": 2},), "cpu", 1, 1.0, folder)


def found(original: Path, seconds: float, *, form: str | None, accuracy: float | None = None) -> Found:
    """A search in which the original took 1 ms, and ``form`` ships, if any."""
    seen = suite("", {"original": 0.001, **({form: seconds} if form else {})}).cases[0].measurement
    winner = Tried(Candidate(form, original, ""), model=original) if form else None
    interval = None if accuracy is None else Interval(accuracy, accuracy - 0.1, accuracy + 0.1)
    judged = form or "original"
    certificates = {judged: Certificate("f1", interval, interval, 0, 0, 0.01, 9, None, 0, 0, "m")} if interval else {}
    return Found(winner, winner, "", [], "f1", certificates, [seen])


def test_what_ships_is_followed_whatever_its_form(original: Path, tmp_path: Path) -> None:
    job = task(original, tmp_path / "work")
    for each in (
        found(original, 0.001, form=None),
        found(original, 0.0005, form="one", accuracy=0.8),
        found(original, 0.0004, form="another", accuracy=0.7),
    ):
        past, doubts = remembered(job, each)
        assert doubts == ()
    first, shipped = history.series(past)
    assert (first.model, shipped.model) == ("original", SHIPPED)
    assert [point.latency.value for point in shipped.points] == [0.001, 0.0005, 0.0004]
    assert [point.verdict for point in shipped.points] == ["first", "faster", "faster"]
    assert [point.accuracy and point.accuracy.value for point in shipped.points] == [None, 0.8, 0.7]
    assert [comparison.name for comparison in past[-1].cases[0].measurement.comparisons] == [SHIPPED]


def test_the_same_measurement_is_remembered_once(original: Path, tmp_path: Path) -> None:
    job, same = task(original, tmp_path / "work"), found(original, 0.0005, form="one")
    once, _ = remembered(job, same)
    assert remembered(job, same) == (once, ())
    assert len(once) == 1


def test_another_accuracy_of_the_same_measurement_is_remembered(original: Path, tmp_path: Path) -> None:
    job = task(original, tmp_path / "work")
    for accuracy in (0.8, 0.7, 0.7):
        past, doubts = remembered(job, found(original, 0.0005, form="one", accuracy=accuracy))
        assert doubts == ()
    _, shipped = history.series(past)
    assert [point.accuracy and point.accuracy.value for point in shipped.points] == [0.8, 0.7]


def test_an_unbounded_accuracy_is_remembered(original: Path, tmp_path: Path) -> None:
    job, unbounded = task(original, tmp_path / "work"), found(original, 0.0005, form="one", accuracy=0.8)
    interval = Interval(0.8, float("-inf"), 1.0)
    certificates = {name: replace(each, candidate=interval) for name, each in unbounded.certificates.items()}
    for _ in range(2):
        past, doubts = remembered(job, replace(unbounded, certificates=certificates))
        assert doubts == ()
    assert [each.model(SHIPPED).accuracy for each in past] == [interval]


def measuring(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    def measure(subjects: Sequence[Subject], effort: Effort, on_progress: object = None) -> Measurement:
        return suite("", {subject.name: seconds for subject in subjects}).cases[0].measurement

    monkeypatch.setattr(race_module, "measure", measure)
    monkeypatch.setattr(search_module, "measure_peaks", lambda threads: PEAKS)


def made(original: Path, out: Path, budget: float) -> tuple[Compiled, Report]:
    """Compile, and read the report back; another budget measures anew."""
    compiled = compile(original, out, time_budget=budget, threads=1)
    return compiled, Report.from_json((out / "report.json").read_text())


def test_a_second_compilation_shows_the_first_and_a_skipped_one_adds_nothing(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    measuring(monkeypatch, 0.001)
    for _ in range(2):
        _, report = made(original, out, 1.0)
        assert len(report.history) == 1
        assert "Latency over time" not in (out / "report.md").read_text()
    measuring(monkeypatch, 0.002)
    compiled, report = made(original, out, 2.0)
    assert len(report.history) == 2
    assert report == compiled.report
    told = (out / "report.md").read_text()
    assert "## Latency over time" in told
    assert "2 results made here" in told
    assert "+100.0 %" in told
    assert 'data-section="history"' in (out / "report.html").read_text()
    assert not list(out.glob("*.jsonl"))


@pytest.mark.parametrize("line", ['{"schema": "onnx-lathe/bench/1"}\n', '{"schema": '])
def test_a_history_that_cannot_be_read_is_told_and_costs_no_bundle(
    line: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    measuring(monkeypatch, 0.001)
    made(original, out, 1.0)
    file = tmp_path / ".work" / "bundle" / FILE
    with file.open("a") as stream:
        stream.write(line)
    before = file.read_bytes()
    measuring(monkeypatch, 0.002)
    _, report = made(original, out, 2.0)
    assert len(report.history) == 1
    (warning,) = [each for each in report.warnings if "history" in each]
    assert warning.startswith("The history is not shown, and nothing was added to it: ")
    assert f"{FILE}, line 2" in warning
    assert file.read_bytes() == before
