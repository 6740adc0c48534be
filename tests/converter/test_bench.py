"""``lathe bench`` as a function: what is refused before it measures, and that it goes on after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_lathe.benchmarks import process
from onnx_lathe.benchmarks.measure import Effort
from onnx_lathe.benchmarks.result import Measurement
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.benchmarks.suite import Suite
from onnx_lathe.converter import bench as module
from onnx_lathe.converter.bench import bench, bench_offline, bench_server
from onnx_lathe.converter.results import Outputs, read_baseline
from onnx_lathe.converter.workload import Dims, Workload, batch_to_time
from onnx_lathe.runtime.errors import BundleError, InputError, TensorError
from onnx_lathe.runtime.samples import Samples
from onnx_lathe.runtime.session import start_plain
from tests import graphs
from tests.benchmarks.suites import offline, server, suite

NO_INPUTS = "no_inputs () => (float[2, 2] y) { y = RandomNormal <shape = [2, 2]> () }"
SCALAR = "scalar (float x) => (float y) { y = Relu (x) }"
SEQUENCE = "sequence (float[batch, seq] x) => (float[batch, seq] y) { y = Relu (x) }"
ROWS = Samples(({"x": np.arange(80, dtype=np.float32).reshape(16, 5)},))
TWO = Workload(dims=[{"batch": 1}, {"batch": 2}], threads=[1])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return graphs.write(tmp_path / "linear.onnx", graphs.LINEAR)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing is measured; what would be is written down."""
    names: list[str] = []

    def measure(subjects: Sequence[Subject], effort: Effort, on_progress: object) -> Measurement:
        names.extend(Path(subject.arguments["feeds"]).stem for subject in subjects)
        taken = suite("", {subject.name: 0.001 for subject in subjects}).cases[0].measurement
        return replace(taken, canary=tuple(0.001 * len(names) for _ in taken.canary))

    monkeypatch.setattr(module, "measure", measure)
    return names


def quick(models: Sequence[Path], work: Path | None, workload: Workload = TWO, **options: Any) -> Suite:
    return bench(models, workload, profiled=False, work=work, **options)


def interrupted_after(cases: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Interrupt the next bench after so many cases; what is returned lets later ones end."""
    whole, left = module.measure, [cases]

    def measure(*arguments: Any) -> Measurement:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return whole(*arguments)

    monkeypatch.setattr(module, "measure", measure)
    return lambda: monkeypatch.setattr(module, "measure", whole)


def interrupt(model: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bench two cases and interrupt the second."""
    go_on = interrupted_after(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        quick([model], work)
    go_on()


def test_an_interrupted_bench_goes_on(
    model: Path, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = Outputs(tmp_path / "results" / "r.json")
    assert outputs.work is not None
    interrupt(model, outputs.work, monkeypatch)
    told: list[str] = []
    found = quick([model], outputs.work, progress=lambda done, total, text: told.append(text))
    assert measured == ["feeds-0", "feeds-1"]
    assert told == ["batch 1, 1 thread, cpu: measured before"]
    assert [case.conditions.dims for case in found.cases] == [{"batch": 1}, {"batch": 2}]
    assert [case.measurement.canary[0] for case in found.cases] == [0.001, 0.002]
    outputs.save(found)
    assert list((tmp_path / "results").iterdir()) == [outputs.file]
    assert read_baseline(tmp_path / "results" / "r.json", across_environments=True) == found


@pytest.mark.parametrize("changed", ["model", "option", "environment"])
def test_what_changed_is_measured_anew(
    changed: str, model: Path, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    interrupt(model, work, monkeypatch)
    options = {"time_budget": 7.0} if changed == "option" else {}
    if changed == "model":
        graphs.write(model, graphs.LINEAR.replace("0.5, -0.5", "0.5, -0.4"))
    if changed == "environment":
        here = module.environment.describe()
        monkeypatch.setattr(module.environment, "describe", lambda: {**here, "kernel": "another"})
    quick([model], work, **options)
    assert measured == ["feeds-0", "feeds-0", "feeds-1"]


def test_the_load_of_the_machine_starts_nothing_anew(
    model: Path, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(model, tmp_path / "work", monkeypatch)
    here = module.environment.describe()
    monkeypatch.setattr(module.environment, "describe", lambda: {**here, "load": 17.0})
    quick([model], tmp_path / "work")
    assert measured == ["feeds-0", "feeds-1"]


def test_nothing_is_kept_without_a_place_for_it(model: Path, tmp_path: Path, measured: list[str]) -> None:
    quick([model], None)
    quick([model], None)
    assert len(measured) == 4
    assert list(tmp_path.iterdir()) == [model]


def test_two_runs_do_not_share_their_cases(model: Path, tmp_path: Path, measured: list[str]) -> None:
    with module.locked(tmp_path / "work"), pytest.raises(BundleError, match="another run is at work"):
        quick([model], tmp_path / "work")
    assert measured == []


def test_load_goes_on_too(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[str] = []
    monkeypatch.setattr(module, "measure_offline", lambda *_, **__: served.append("offline") or offline())
    monkeypatch.setattr(module, "measure_server", lambda *_: served.append("server") or server())
    for _ in range(2):
        found = bench_offline([model], TWO, work=tmp_path / "offline")
        assert [case.result for case in found.cases] == [offline()] * 2
    for _ in range(2):
        found = bench_server([model], TWO, rate=10.0, work=tmp_path / "server")
        assert [case.result for case in found.cases] == [server()] * 2
    assert served == ["offline"] * 2 + ["server"] * 2


@pytest.mark.parametrize(
    ("workload", "names", "message"),
    [
        (TWO, ["linear.onnx"], r"got cases batch 1, 1 thread, cpu, expected batch 2, 1 thread, cpu"),
        (Workload([{"batch": 1}], threads=[1, 2]), ["linear.onnx"], "expected batch 1, 2 threads, cpu"),
        (Workload([{"batch": 1}], threads=[1]), ["other.onnx", "third.onnx"], "got results of .*, expected also of"),
    ],
)
def test_a_baseline_that_lacks_something_is_refused_before_a_worker_is_started(
    workload: Workload,
    names: list[str],
    message: str,
    model: Path,
    measured: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    renamed = [graphs.write(model.with_name(name), graphs.LINEAR) for name in names]
    baseline = quick([model], None, Workload([{"batch": 1}], threads=[1]))
    monkeypatch.undo()
    started: list[object] = []
    monkeypatch.setattr(process.subprocess, "Popen", lambda *command, **_: started.append(command))
    with pytest.raises(InputError, match=message):
        bench(renamed, workload, baseline=baseline)
    assert started == []


def test_data_are_run_in_batches_of_the_sizes_asked_for(tmp_path: Path) -> None:
    model = graphs.write(tmp_path / "sequence.onnx", SEQUENCE)
    with Workload([{"batch": 3}, {}], ROWS, threads=[1]).cases(model) as cases:
        titles = [conditions.title for conditions, _ in cases]
        fed = [module.tensors.load_npz(feeds)["x"] for _, feeds in cases]
    assert titles == ["batch 3, 1 thread, cpu", "default shape, 1 thread, cpu"]
    for array, rows in zip(fed, (3, 1), strict=True):
        np.testing.assert_array_equal(array, ROWS.batches[0]["x"][:rows])


@pytest.mark.parametrize(
    ("graph", "dims", "named", "expected"),
    [
        (SEQUENCE, {"seq": 3}, "seq", "only 'batch', the batch"),
        (SEQUENCE, {"batch": 2, "seq": 9}, "seq", "only 'batch', the batch"),
        (SEQUENCE, {"bacth": 2}, "bacth", "only 'batch', the batch"),
        (SEQUENCE.replace("batch, seq", "16, 5"), {"batch": 2}, "batch", "no size: the batch of this model is fixed"),
        (NO_INPUTS, {"batch": 2}, "batch", "no size: the batch of this model is fixed or unnamed"),
    ],
)
def test_data_take_no_other_dimension_than_the_batch(
    graph: str, dims: Dims, named: str, expected: str, tmp_path: Path, measured: list[str]
) -> None:
    model = graphs.write(tmp_path / "m.onnx", graph)
    message = (
        f"dimension '{named}': got a size for it together with data, which have a shape of their own, "
        rf"expected {expected}.*\. Leave --data out to run random values of that shape, or leave '{named}' out"
    )
    with pytest.raises(TensorError, match=message):
        quick([model], None, Workload([dims], ROWS))
    assert measured == []


def test_a_batch_has_the_shape_asked_for_whether_data_have_it_or_not(tmp_path: Path) -> None:
    model = graphs.write(tmp_path / "sequence.onnx", SEQUENCE)
    for dims, shape in (({}, (1, 5)), ({"batch": 3}, (3, 5)), ({"seq": 3}, (2, 3)), ({"batch": 4, "seq": 9}, (4, 9))):
        assert batch_to_time(model, ROWS, dims)["x"].shape == shape


@pytest.mark.parametrize(("graph", "samples"), [(graphs.LINEAR, 2), (SCALAR, 1), (NO_INPUTS, 1)])
def test_a_query_holds_a_batch_of_samples(
    graph: str, samples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = graphs.write(tmp_path / "m.onnx", graph)
    counts: list[int] = []
    monkeypatch.setattr(
        module, "measure_offline", lambda *_, samples_per_query, **__: counts.append(samples_per_query) or offline()
    )
    dims = [{"batch": 2}] if graph == graphs.LINEAR else []
    for _ in range(2):
        bench_offline([model], Workload(dims, threads=[1]), work=tmp_path / "work")
    assert counts == [samples]


def test_a_model_without_inputs_runs(tmp_path: Path) -> None:
    model = graphs.write(tmp_path / "m.onnx", NO_INPUTS)
    with Workload(threads=[1]).cases(model) as [(conditions, feeds)]:
        assert start_plain(str(model), str(feeds), threads=conditions.threads)()


def test_a_result_that_the_history_cannot_take_is_not_kept(model: Path, tmp_path: Path, measured: list[str]) -> None:
    history = tmp_path / "h.jsonl"
    outputs = Outputs(tmp_path / "r.json", history)
    assert outputs.work is not None
    found = quick([model], outputs.work)
    history.mkdir()
    with pytest.raises(InputError, match=r"h\.jsonl: got Is a directory, expected a file to append to"):
        outputs.save(found)
    assert not (tmp_path / "r.json").exists()
    history.rmdir()
    outputs.check()
    again = quick([model], outputs.work)
    assert measured == ["feeds-0", "feeds-1"]
    outputs.save(again)
    assert (tmp_path / "r.json").read_text() == history.read_text()
    assert not outputs.work.exists()


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "r.json", tmp_path / "h.jsonl")
    outputs.save(suite("", {"m": 0.001}))
    assert json.loads((tmp_path / "r.json").read_text())["schema"] == "onnx-lathe/bench/2"
    for act in (outputs.check, lambda: outputs.save(suite("", {"m": 0.002}))):
        with pytest.raises(InputError, match=r"r\.json: got a file that is there already, expected a new one"):
            act()
    assert len((tmp_path / "h.jsonl").read_text().splitlines()) == 1
