"""What the search ships and what it refuses, with latencies that the test sets."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lathe.benchmarks.measure import Effort
from onnx_lathe.benchmarks.result import Comparison, Interval, Measurement, Timing, Verdict
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.converter.compile import build as build_module
from onnx_lathe.converter.compile import race as race_module
from onnx_lathe.converter.compile import search as search_module
from onnx_lathe.converter.compile.compile import Compiled, ship
from onnx_lathe.converter.compile.explain import Story
from onnx_lathe.converter.compile.forms import Candidate
from onnx_lathe.converter.compile.search import search
from onnx_lathe.converter.compile.space import first_forms, unfit
from onnx_lathe.converter.compile.task import Found, Parts, Task
from onnx_lathe.converter.progress import silent
from onnx_lathe.runtime.bundle import open_bundle
from onnx_lathe.runtime.errors import OracleError
from onnx_lathe.runtime.samples import Samples
from tests import graphs
from tests.benchmarks.test_limits import PEAKS


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return graphs.write(tmp_path / "linear.onnx", graphs.LINEAR)


def variant(original: Path, name: str, weight: float) -> Candidate:
    """Return a candidate that is the original with its bias shifted towards the first class."""
    model = onnx.load(original)
    for tensor in model.graph.initializer:
        if tensor.name == "b":
            tensor.float_data[0] += weight
    path = original.with_name(f"{name}.onnx")
    onnx.save(model, path)
    return Candidate(name, path, "")


def samples(count: int, seed: int) -> Samples:
    """Return samples whose label is the original's answer."""
    x = np.random.default_rng(seed).standard_normal((count, 4)).astype(np.float32)
    w = np.asarray([[1, 2], [3, 4], [5, 6], [7, 8]], np.float32)
    return Samples(({"x": x},), (x @ w + np.asarray([0.5, -0.5])).argmax(axis=1))


def timing(name: str, speed: float = 1.0) -> Timing:
    seconds = 1e-3 / speed
    value = Interval(seconds, 0.9 * seconds, 1.1 * seconds)
    return Timing(name, (((seconds,) * 5,) * 4,) * 3, p50=value, p90=value, peak_memory=10**8, start_seconds=0.1)


Measure = Callable[..., Measurement]


def measuring(speeds: Mapping[str, float], verdicts: Mapping[str, Verdict] | None = None) -> Measure:
    """Return a `measure` that finds the given speeds."""

    def measure(subjects: Sequence[Subject], effort: Effort, on_progress: object = None) -> Measurement:
        first, *others = (subject.name for subject in subjects)
        comparisons = tuple(
            Comparison(
                name,
                first,
                Interval(speeds[name], 0.95 * speeds[name], 1.05 * speeds[name]),
                (verdicts or {}).get(name, "faster" if speeds[name] > 1 else "slower"),
                "as the test says",
            )
            for name in others
        )
        timings = (timing(first), *(timing(name, speeds[name]) for name in others))
        return Measurement(timings, comparisons, (1e-3,) * 4, {})

    return measure


@pytest.fixture
def find(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Task, Found]]:
    def run(
        candidates: Sequence[Candidate], measure: Measure, *, certify: int = 400, max_drop: float = 0.01
    ) -> tuple[Task, Found]:
        monkeypatch.setattr(race_module, "measure", measure)
        monkeypatch.setattr(search_module, "measure_peaks", lambda threads: PEAKS)
        task = Task(
            original=original,
            candidates=candidates,
            parts=Parts(samples(50, 1), samples(400, 2), samples(certify, 3)),
            metric=None,
            max_drop=max_drop,
            dims=({"batch": 2},),
            provider="cpu",
            threads=1,
            time_budget=1.0,
            folder=tmp_path / "work",
        )
        return task, search(task, silent)

    return run


def refusals(found: Found) -> dict[str, str | None]:
    return {item.candidate.name: item.refusal for item in found.tried}


def test_the_fastest_that_keeps_its_accuracy_wins(original: Path, find: Callable[..., tuple[Task, Found]]) -> None:
    same, faster, lossy = (
        variant(original, "same", 1e-4),
        variant(original, "faster", 2e-4),
        variant(original, "lossy", 9),
    )
    _, found = find([same, faster, lossy], measuring({"same": 1.5, "faster": 2.0, "lossy": 3.0}))
    assert found.winner is not None
    assert found.winner.candidate == faster
    assert found.certificates["faster"].certified
    assert found.evaluation is not None
    assert found.evaluation.figures[0].original == found.certificates["faster"].original
    reasons = refusals(found)
    assert reasons["faster"] is None
    assert reasons["same"] == "faster is faster: 2.00x, this one 1.50x."
    assert "points of accuracy on the select part; 1 are allowed" in str(reasons["lossy"])
    assert "lossy" not in {timing.name for timing in found.measurements[0].timings}


def test_what_is_not_faster_is_not_shipped(original: Path, find: Callable[..., tuple[Task, Found]]) -> None:
    _, found = find([variant(original, "slow", 1e-4)], measuring({"slow": 0.8}))
    assert found.winner is None
    assert refusals(found)["slow"] == "It is not faster than the original: 0.80x in the screening."
    assert found.reason == "No candidate keeps its accuracy and is faster."


def test_a_gain_within_noise_is_not_shipped(original: Path, find: Callable[..., tuple[Task, Found]]) -> None:
    task, found = find([variant(original, "perhaps", 1e-4)], measuring({"perhaps": 1.02}, {"perhaps": "no difference"}))
    assert found.winner is None
    assert "it is not faster beyond noise: at batch 2 1.02x [0.97, 1.07]" in found.reason
    bundle = ship(task, found, task.original.parent / "bundle", Story("t", "c"))
    assert bundle.report.status == "original kept"
    assert (bundle.bundle / "model.onnx").read_bytes() == task.original.read_bytes()
    assert [rung.name for rung in bundle.report.rungs] == ["original", "perhaps"]
    assert bundle.report.evaluation is None


def test_the_same_graph_is_not_tried_twice(original: Path, find: Callable[..., tuple[Task, Found]]) -> None:
    twins = [variant(original, "one", 1e-4), variant(original, "two", 1e-4)]
    _, found = find(twins, measuring({"one": 2.0}))
    assert refusals(found) == {"one": None, "two": "It is the same graph as one."}


def test_too_few_samples_are_said_with_the_number_it_takes(
    original: Path, find: Callable[..., tuple[Task, Found]]
) -> None:
    task, found = find([variant(original, "fast", 1e-4)], measuring({"fast": 2.0}), certify=40)
    shipped: Compiled = ship(task, found, task.original.parent / "bundle", Story("t", "c"))
    assert shipped.report.status == "uncertified"
    assert shipped.limit_missed is not None
    assert "not certified within 1 points: its 95 % bound is 7.22 with 40 samples" in shipped.limit_missed
    assert "about 299 samples" in shipped.limit_missed


def test_a_second_search_measures_nothing_anew(original: Path, find: Callable[..., tuple[Task, Found]]) -> None:
    candidates = [variant(original, "fast", 1e-4)]
    task, first = find(candidates, measuring({"fast": 2.0}))
    _, second = find(candidates, measuring({"fast": 0.5}))
    assert second == first
    bundle = ship(task, second, task.original.parent / "bundle", Story("t", "c")).bundle
    assert "## Beyond accuracy" in (bundle / "report.md").read_text()
    assert open_bundle(bundle).manifest["status"] == "certified"


def test_a_form_that_fails_its_oracle_is_refused_and_the_search_goes_on(
    original: Path, find: Callable[..., tuple[Task, Found]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OracleError("p on m.onnx", got="3 steps", expected="at most 1", mend="Report it.")

    monkeypatch.setattr(build_module.passes_run, "apply", fail)
    _, found = find([Candidate("bad", original, "cleanup"), variant(original, "good", 1e-4)], measuring({"good": 2.0}))
    assert found.winner is not None
    assert (found.winner.candidate.name, refusals(found)["bad"]) == (
        "good",
        "p on m.onnx: got 3 steps, expected at most 1. Report it.",
    )


def test_integers_are_not_tried_on_cuda(original: Path) -> None:
    assert unfit(Candidate("a", original, "cleanup"), "cuda") is None
    reason = unfit(Candidate("b", original, "cleanup,quantize-static"), "cuda")
    assert reason is not None
    assert reason.startswith("quantize-static is not for CUDA: that provider has no INT8 kernels")
    assert unfit(Candidate("c", original, "cleanup,quantize-static"), "cpu") is None


def test_dynamic_integers_are_not_tried_on_openvino(original: Path) -> None:
    reason = unfit(Candidate("a", original, "cleanup,quantize-dynamic"), "OpenVINOExecutionProvider")
    assert reason is not None
    assert reason.startswith("quantize-dynamic is not for OpenVINO: that provider computes MatMulInteger in float")
    assert unfit(Candidate("b", original, "cleanup,quantize-static"), "openvino") is None


def test_a_half_model_is_also_widened_on_a_cpu_and_with_data(tmp_path: Path) -> None:
    half = graphs.save(graphs.build(graphs.HALF), tmp_path / "half.onnx")
    full = graphs.save(graphs.build(graphs.CONV_CHAIN), tmp_path / "full.onnx")
    names = [each.passes for each in first_forms(half, with_data=True)]
    prepared = "cleanup,fold-masks"
    assert names[:3] == [prepared, f"widen,{prepared}", f"widen,{prepared},quantize-dynamic"]
    assert all(name.startswith("widen,cleanup") for name in names[1:])
    for others in (
        first_forms(full, with_data=True),
        first_forms(half, with_data=False),
        first_forms(half, with_data=True, provider="cuda"),
    ):
        assert not any("widen" in each.passes for each in others)


def test_a_pass_that_cannot_be_applied_is_a_reason_not_an_error(
    original: Path, find: Callable[..., tuple[Task, Found]]
) -> None:
    _, found = find([Candidate("cut", original, "prune{ratio=0.5}")], measuring({}))
    assert found.winner is None
    assert "nothing to cut" in str(refusals(found)["cut"])
