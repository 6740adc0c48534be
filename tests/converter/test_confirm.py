"""What is confirmed, in which turn and within which time; latencies are those that the test sets."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onnx_lathe.benchmarks.measure import FINAL, Effort
from onnx_lathe.benchmarks.result import Interval, Measurement
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.converter.compile import build as build_module
from onnx_lathe.converter.compile import confirm as confirm_module
from onnx_lathe.converter.compile import mixed as mixed_module
from onnx_lathe.converter.compile import race as race_module
from onnx_lathe.converter.compile import search as search_module
from onnx_lathe.converter.compile.certify import judge_of
from onnx_lathe.converter.compile.confirm import confirm
from onnx_lathe.converter.compile.explore import Explored
from onnx_lathe.converter.compile.forms import Candidate
from onnx_lathe.converter.compile.front import front
from onnx_lathe.converter.compile.mixed import mixed_candidates
from onnx_lathe.converter.compile.race import side_by_side
from onnx_lathe.converter.compile.search import search
from onnx_lathe.converter.compile.space import is_exact
from onnx_lathe.converter.compile.task import Parts, Rung, Task, Tried
from onnx_lathe.converter.progress import silent
from onnx_lathe.runtime.samples import Samples
from tests import graphs
from tests.benchmarks.test_limits import PEAKS
from tests.converter.test_search import measuring, refusals, samples, variant

Measure = Callable[..., Measurement]


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return graphs.write(tmp_path / "linear.onnx", graphs.LINEAR)


def clear(part: Samples) -> Samples:
    """Return the samples whose class a small shift of the bias leaves as it is."""
    margins = np.abs(1.0 - part.batches[0]["x"].sum(axis=1))
    return part.take(np.flatnonzero(margins > 0.8))


@pytest.fixture
def task(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """Return a task on whose select part a shift by 0.5 loses nothing, and much on its certify part."""
    monkeypatch.setattr(search_module, "measure_peaks", lambda threads: PEAKS)

    def by_name(candidate: Candidate, original: Path) -> bool:
        del original
        return candidate.name == "exact"

    monkeypatch.setattr(confirm_module, "is_exact", by_name)
    return Task(
        original=original,
        candidates=(variant(original, "lossy", 0.5), variant(original, "less", 0.3), variant(original, "exact", 1e-6)),
        parts=Parts(samples(50, 1), clear(samples(400, 2)), samples(400, 3)),
        metric=None,
        max_drop=0.01,
        dims=({"batch": 2},),
        provider="cpu",
        threads=1,
        time_budget=1000.0,
        folder=tmp_path / "work",
    )


SPEEDS = {"lossy": 3.0, "less": 2.0, "exact": 1.5}


def stages(screening: Mapping[str, float], final: Mapping[str, float], efforts: list[Effort] | None = None) -> Measure:
    """Return a `measure` that finds other speeds in fresh processes than in a screening."""

    def measure(subjects: Sequence[Subject], effort: Effort, on_progress: object = None) -> Measurement:
        confirming = effort.processes == FINAL.processes
        if confirming and efforts is not None:
            efforts.append(effort)
        return measuring(final if confirming else screening)(subjects, effort, on_progress)

    return measure


def test_where_the_fastest_loses_too_much_when_certified_the_exact_form_ships(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race_module, "measure", stages(SPEEDS, SPEEDS))
    found = search(task, silent)
    assert found.winner is not None
    assert found.winner.candidate.name == "exact"
    reasons = refusals(found)
    assert str(reasons["lossy"]).startswith("On the certify part it loses ")
    assert reasons["less"] == "The certify part has decided over lossy: it does so once."
    assert set(found.certificates) == {"original", "exact"}
    assert found.certificates["exact"].drop == 0.0
    assert found.evaluation is not None
    assert search(task, silent) == found


def test_where_the_fastest_is_not_fast_when_confirmed_the_next_may_see_the_certify_part(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race_module, "measure", stages(SPEEDS, {**SPEEDS, "lossy": 0.9}))
    found = search(replace(task, max_drop=0.2), silent)
    assert found.winner is not None
    assert found.winner.candidate.name == "less"
    reasons = refusals(found)
    assert str(reasons["lossy"]).startswith("In fresh processes at batch 2 it may be slower: 0.90x")
    assert str(reasons["exact"]).startswith("less is faster: ")


def test_where_none_is_confirmed_the_original_ships_for_the_reason_of_the_fastest(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race_module, "measure", stages(SPEEDS, {**SPEEDS, "exact": 0.9}))
    found = search(task, silent)
    assert found.winner is None
    assert found.leader is not None
    assert found.leader.candidate.name == "lossy"
    assert found.reason.startswith("On the certify part it loses ")
    assert str(refusals(found)["exact"]).startswith("In fresh processes at batch 2 it may be slower")


def explored(task: Task) -> Explored:
    tried = tuple(Tried(each, model=each.base, speed=(Interval(2.0, 1.9, 2.1),)) for each in task.candidates)
    return Explored(tried, tuple(each.name for each in task.candidates))


def test_the_fastest_exact_form_is_confirmed_though_it_is_no_finalist(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race_module, "measure", stages(SPEEDS, SPEEDS))
    looks = confirm(task, replace(explored(task), finalists=("lossy",)), 1000.0, silent)
    assert [look.name for look in looks] == ["lossy", "exact"]
    assert looks[-1].refusal is None


def test_no_further_form_is_confirmed_when_the_time_is_spent(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race_module, "measure", stages(SPEEDS, SPEEDS))
    first, *others = confirm(task, explored(task), 0.04 * task.time_budget, silent)
    assert str(first.refusal).startswith("On the certify part it loses ")
    assert {look.refusal for look in others} == {"The time budget was spent before it was confirmed."}


@pytest.mark.parametrize(("took", "budget", "left"), [(150.0, 170.0, 51.0), (119.0, 170.0, 51.0), (84.0, 120.0, 36.0)])
def test_the_confirmation_has_the_time_that_exploring_leaves(
    took: float, budget: float, left: float, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    efforts: list[Effort] = []
    monkeypatch.setattr(race_module, "measure", stages(SPEEDS, SPEEDS, efforts))

    def in_time(task: Task, progress: object) -> Explored:
        del progress
        return replace(explored(task), seconds=took)

    monkeypatch.setattr(search_module, "_explored", in_time)
    search(replace(task, time_budget=budget), silent)
    assert efforts[0].most_time == pytest.approx(left)
    assert efforts[0].time_budget == pytest.approx(min(left, FINAL.time_budget))


def test_a_form_that_cannot_be_judged_gives_way(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race_module, "measure", stages(SPEEDS, SPEEDS))
    judged = confirm_module.judged

    def fail(task: Task, judge: object, name: str, *others: object, **options: object) -> object:
        if name == "lossy":
            raise build_module.LatheError("lossy", got="NaN", expected="numbers", mend="Leave it out.")
        return judged(task, judge, name, *others, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(confirm_module, "judged", fail)
    first, second, *_ = confirm(replace(task, max_drop=0.2), explored(task), 1000.0, silent)
    assert first.refusal == "It could not be judged: lossy: got NaN, expected numbers. Leave it out."
    assert (second.name, second.refusal) == ("less", None)


def test_a_defect_of_a_pass_costs_that_form_alone_and_is_told(
    task: Task, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(race_module, "measure", stages(SPEEDS, SPEEDS))
    monkeypatch.setattr(build_module.passes_run, "apply", fail)
    bad = [Candidate("bad", task.original, "cleanup"), Candidate("theirs", task.original, "optimize-onnxscript")]
    with caplog.at_level(logging.WARNING):
        found = search(replace(task, candidates=(*bad, task.candidates[2])), silent)
    assert found.winner is not None
    reasons = refusals(found)
    start = "This is a defect of the pass cleanup: IndexError: list index out of range (test_confirm.py:"
    assert str(reasons["bad"]).startswith(start)
    assert "defect of the pass optimize-onnxscript, which runs the optimizer of onnxscript: Index" in str(
        reasons["theirs"]
    )
    assert start in caplog.text
    assert "Traceback (most recent call last)" in caplog.text


def test_a_defect_while_mixing_costs_the_mixture_alone(
    task: Task, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("no such layer")

    assert task.parts is not None
    judge = judge_of(task, task.parts.select)
    certificate = judge.certificate(judge.outputs(task.original))
    rounded = Tried(Candidate("q", task.original, "quantize-dynamic"), certificate=replace(certificate, drop=0.5))
    monkeypatch.setattr(mixed_module, "sensitivity", fail)
    assert mixed_candidates(task, [rounded], judge, silent) == []
    assert "defect of mixing precisions in q: AssertionError: no such layer" in caplog.text


def test_a_form_is_exact_by_all_of_its_passes_and_from_the_original_alone(original: Path, tmp_path: Path) -> None:
    assert is_exact(Candidate("a", original, "cleanup,fold-masks,fuse-attention{form=packed}"), original)
    assert not is_exact(Candidate("b", original, "cleanup,quantize-dynamic"), original)
    assert not is_exact(Candidate("c", original, "cleanup,drop-padding"), original)
    assert not is_exact(Candidate("d", tmp_path / "pruned.onnx", "cleanup"), original)


def test_speeds_of_two_blocks_are_on_no_front(task: Task) -> None:
    plain = replace(task, parts=None)
    fast, slow = explored(task).tried[:2]
    fast = replace(fast, speed=(Interval(9.0, 8.9, 9.1),), whole=False)
    assert front(plain, [fast, slow]) == [slow]


def test_a_rung_that_is_no_onnx_file_runs_all_batches_of_the_data_as_they_come(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Subject] = []

    def measure(subjects: Sequence[Subject], effort: Effort, on_progress: object = None) -> Measurement:
        seen.extend(subjects)
        return measuring({"torch": 1.0})(subjects, effort, on_progress)

    monkeypatch.setattr(race_module, "measure", measure)
    data = Samples(tuple({"x": np.zeros((size, 4), np.float32)} for size in (2, 3)))
    varied = replace(task, measured=data, dims=({},))
    rung = Rung("torch", subject=Subject("t", "module:start", {}))
    side_by_side(varied, "measure", task.original, [rung], ["a", "b"], FINAL, silent)
    plain, other = seen
    assert other.arguments["feeds"] == plain.arguments["feeds"]
    assert len(other.arguments["feeds"]) == 2
