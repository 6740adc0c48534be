"""`compile` from bad input to bundle: what is refused at once, what is told, and what always comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnx_lathe.benchmarks.measure import Effort
from onnx_lathe.benchmarks.result import Measurement
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.converter.cli.shared import parse_weighted_dims
from onnx_lathe.converter.compile import compile as module
from onnx_lathe.converter.compile import race as race_module
from onnx_lathe.converter.compile import search as search_module
from onnx_lathe.converter.compile.compile import Compiled, compile
from onnx_lathe.converter.compile.space import first_forms
from onnx_lathe.converter.workload import as_they_come, batches_to_time
from onnx_lathe.runtime import providers
from onnx_lathe.runtime.bundle import open_bundle
from onnx_lathe.runtime.errors import InputError, LatheError, ModelFileError, ProviderError, TensorError
from onnx_lathe.runtime.samples import Samples
from tests import graphs
from tests.benchmarks.test_limits import PEAKS
from tests.converter.test_search import measuring


class Everything(dict[str, float]):
    """The same speed for every subject."""

    def __missing__(self, key: str) -> float:
        return 2.0


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return graphs.write(tmp_path / "linear.onnx", graphs.LINEAR)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two forms and one axis: what these tests are about does not depend on the space."""
    monkeypatch.setattr(module, "first_forms", lambda *given: first_forms(*given)[:2])
    monkeypatch.setattr(module, "VISITED", ("skips",))


@pytest.fixture
def twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A world in which every form is twice as fast as the original."""
    monkeypatch.setattr(race_module, "measure", measuring(Everything()))
    monkeypatch.setattr(search_module, "measure_peaks", lambda threads: PEAKS)


def samples(count: int = 60) -> Samples:
    return Samples(({"x": np.random.default_rng(0).standard_normal((count, 4)).astype(np.float32)},))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"dims": [{"foo": 1}]}, TensorError, "dimension 'foo': got an unknown dimension, expected one of batch"),
        ({"dims": [{"batch": 0}]}, TensorError, "dimension 'batch': got 0, expected a size of at least 1"),
        ({"metric": "nope"}, InputError, "metric 'nope': got an unknown metric"),
        ({"time_budget": 0.0}, InputError, "time budget: got 0 seconds, expected a positive number of seconds"),
        ({"time_budget": float("nan")}, InputError, "time budget: got nan seconds"),
        ({"dims": [{"batch": 2}], "weights": [1.0, 2.0]}, InputError, "expected a positive number for each shape"),
        ({"dims": [{"batch": 2}], "weights": [0.0]}, InputError, r"weights: got \[0.0\] for 1 shapes"),
        ({"provider": ["cpu", "nope"]}, ProviderError, "provider 'nope': got a provider that this onnxruntime"),
        ({"data": Samples(({"x": np.zeros((9, 3), np.float32)},))}, TensorError, "expected 4 along axis 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    options: dict[str, Any], kind: type[LatheError], message: str, original: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        compile(original, tmp_path / "bundle", **options)
    assert not (tmp_path / "bundle").exists()
    assert not (tmp_path / ".work").exists()


def test_data_whose_later_batches_do_not_fit_are_refused_at_once(original: Path, tmp_path: Path) -> None:
    ragged = Samples(tuple({"x": np.zeros((9, width), np.float32)} for width in (4, 3)))
    with pytest.raises(TensorError, match="expected 4 along axis 1"):
        compile(original, tmp_path / "bundle", data=ragged)


def test_a_model_that_does_not_run_is_an_error_of_its_own(tmp_path: Path) -> None:
    node = helper.make_node("Unheard", ["x"], ["y"], "odd", domain="example.com")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    graph = helper.make_graph([node], "custom", values[:1], values[1:])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("example.com", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "custom.onnx")
    with pytest.raises(ModelFileError, match="Unheard"):
        compile(tmp_path / "custom.onnx", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


BRANCHES = """
branches (float[batch, 4] x, bool flag) => (float[batch, 4] y)
{
  y = If (flag) <
    then_branch = then () => (float[batch, 4] a) { a = Relu (x) },
    else_branch = other () => (float[batch, 4] b) { b = Neg (x) }
  >
}
"""


@pytest.mark.usefixtures("twice")
def test_control_flow_comes_out_as_it_is(tmp_path: Path) -> None:
    model = graphs.write(tmp_path / "branches.onnx", BRANCHES)
    made = compile(model, tmp_path / "bundle", threads=1)
    assert made.report.status in ("original kept", "exact")
    assert open_bundle(tmp_path / "bundle").model.is_file()


@pytest.mark.usefixtures("twice")
def test_a_budget_of_nothing_may_be_kept_but_not_certified(original: Path, tmp_path: Path) -> None:
    made = compile(original, tmp_path / "bundle", data=samples(), max_drop=0.0, threads=1)
    assert made.report.status in ("original kept", "uncertified")


def test_a_machine_whose_load_changes_gives_the_original(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsteady(subjects: Sequence[Subject], effort: Effort, on_progress: object = None) -> Measurement:
        others = [subject.name for subject in subjects[1:]]
        found = measuring(Everything(), dict.fromkeys(others, "inconclusive"))(subjects, effort, on_progress)
        return replace(found, canary=(1e-3, 1e-3, 5e-3, 5e-3))

    monkeypatch.setattr(race_module, "measure", unsteady)
    monkeypatch.setattr(search_module, "measure_peaks", lambda threads: PEAKS)
    made = compile(original, tmp_path / "bundle", data=samples(), max_drop=0.5, threads=1)
    assert made.report.status == "original kept"
    assert "not faster beyond noise" in made.found.reason
    assert any("inconclusive" in warning for warning in made.report.warnings)


@pytest.mark.usefixtures("twice")
def test_a_provider_that_takes_nothing_is_told_and_left(original: Path, tmp_path: Path) -> None:
    made = compile(original, tmp_path / "bundle", provider="all", threads=1)
    assert open_bundle(tmp_path / "bundle").provider == "cpu"
    left = [note for note in made.found.notes if note.startswith("Left out:")]
    assert len(left) == len(providers.available()) - 1


def test_the_fastest_of_several_providers_is_recorded(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_providers", lambda asked: list(asked))
    monkeypatch.setattr(race_module, "measure", measuring(Everything()))
    monkeypatch.setattr(search_module, "measure_peaks", lambda threads: PEAKS)
    monkeypatch.setattr(module, "at_home", lambda task: task)
    search = search_module.search
    monkeypatch.setattr(module, "search", lambda task, progress: search(replace(task, provider="cpu"), progress))
    made = compile(original, tmp_path / "bundle", provider=["cpu", "other"], threads=1)
    assert 'provider = "other"' in (tmp_path / "bundle" / "session.toml").read_text()
    assert any(note.startswith("Of several providers other was chosen") for note in made.found.notes)


@pytest.mark.usefixtures("twice")
def test_the_report_tells_steps_and_the_front(original: Path, tmp_path: Path) -> None:
    made: Compiled = compile(original, tmp_path / "bundle", data=samples(), max_drop=0.5, threads=1)
    assert made.front
    told = (tmp_path / "bundle" / "report.md").read_text()
    assert "| form | status | speed | step | drop | time | front | why |" in told
    assert made.summary()["front"] == made.front
    assert {item.on_front for item in made.report.candidates} == {True, False}


def test_weights_are_spelled_behind_the_shape() -> None:
    assert parse_weighted_dims("batch=8,seq=128") == ({"batch": 8, "seq": 128}, 1.0)
    assert parse_weighted_dims("batch=1@2.5") == ({"batch": 1}, 2.5)
    for text in ("batch=1@", "batch=1@0", "batch=1@-1", "batch=1@many", "batch=1@inf"):
        with pytest.raises(InputError, match="expected a positive number after the @"):
            parse_weighted_dims(text)


def test_data_that_differ_are_measured_as_they_come(tmp_path: Path) -> None:
    model = graphs.write(
        tmp_path / "tokens.onnx", "tokens (float[batch, seq] x) => (float[batch, seq] y) { y = Relu (x) }"
    )
    ragged = Samples(tuple({"x": np.ones((4, width), np.float32)} for width in range(3, 12)))
    shapes = [batch["x"].shape for batch in batches_to_time(model, ragged, {})]
    assert shapes == [(4, 3), (4, 6), (4, 8), (4, 11)]
    assert [batch["x"].shape for batch in batches_to_time(model, ragged, {"batch": 2})] == [(2, 3)]
    assert [batch["x"].shape for batch in batches_to_time(model, ragged, {"batch": 2, "seq": 7})] == [(2, 7)]
    alike = Samples(tuple({"x": np.ones((4, 5), np.float32)} for _ in range(3)))
    assert len(as_they_come(alike)) == 1
    assert [batch["x"].shape for batch in batches_to_time(model, alike, {})] == [(1, 5)]
