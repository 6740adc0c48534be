"""The study of compile: forms are made once, failures are told, cases are done once. No timing is asserted."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_lathe.benchmarks.measure import Effort
from onnx_lathe.benchmarks.result import Certificate, Comparison, Interval, Measurement, Timing
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.errors import MeasurementError
from tests import graphs
from tests.studies import compiled, made, rival_compilers
from tests.studies.cases import CASES, NETWORKS, Case, Network, Places, load, part_folder
from tests.studies.made import OURS, Form, rival, stored_bytes, watched

TINY = Network("tiny", "lines")
CASE = Case("tiny", {"batch": 2}, 2.0)
BUDGET = compiled.Budget(1.0, 1.0, 1)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """A folder with a network of one layer and its data, and an interpreter that has onnxruntime and no rival."""
    monkeypatch.setitem(NETWORKS, "tiny", TINY)
    found = Places(tmp_path, tmp_path, tmp_path, tmp_path / "environments")
    graphs.write(found.model("tiny"), graphs.LINEAR)
    for seed, part in enumerate(("calibrate", "choose", "judge")):
        folder = part_folder(found, TINY, part)
        folder.mkdir(parents=True)
        for number in range(2):
            values = np.random.default_rng((seed, number)).standard_normal((8, 4), np.float32)
            tensors.save_npz(folder / f"{number}.npz", {"x": values})
    python = found.interpreter("tools")
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return found


def test_every_case_is_there_once_and_its_tools_are_written():
    assert len({case.title for case in CASES}) == len(CASES)
    for case in CASES:
        assert case.network in NETWORKS
        assert set(case.tools) <= set(rival_compilers.TOOLS)
        assert not case.dims or "seq" in case.dims or case.dims == {"batch": 1}


def test_a_rivals_kind_is_read_from_its_text():
    kind, none = rival_compilers.Kind("bert:12:384"), rival_compilers.Kind("")
    assert (kind.type, kind.heads, kind.hidden) == ("bert", 12, 384)
    assert (none.type, none.heads, none.hidden) == ("", 0, 0)


def test_a_command_is_watched_to_its_end():
    done = watched([sys.executable, "-S", "-c", "x = b'1' * 50_000_000"])
    assert done.failure is None
    assert done.seconds > 0
    assert 50_000_000 < done.peak_bytes < 500_000_000


def test_what_a_failed_command_said_last_is_kept():
    failed = watched([sys.executable, "-S", "-c", "import sys; print('first', file=sys.stderr); sys.exit('last')"])
    assert failed.failure == "last"
    assert watched([sys.executable, "-S", "-c", "raise SystemExit(7)"]).failure == "exit status 7"


def test_a_command_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(made, "_PATIENCE", 0.2)
    assert watched([sys.executable, "-S", "-c", "import time; time.sleep(60)"]).failure == "not done after 0.2 s"


def test_a_rival_makes_a_form_once(places: Places):
    form = rival("ort-dynamic", TINY, places)
    assert form.failure is None
    assert form.model is not None
    assert form.size == stored_bytes(Path(form.model)) > 0
    Path(form.model).unlink()
    assert rival("ort-dynamic", TINY, places) == form


def test_why_a_rival_makes_none_is_kept(places: Places):
    form = rival("no-such-tool", TINY, places)
    assert (form.model, form.size) == (None, None)
    assert form.failure == "KeyError: 'no-such-tool'"
    assert rival("no-such-tool", TINY, places) == form


def test_a_rival_without_its_interpreter_is_left_out(places: Places, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "_judged", lambda _case, form, *_: form)
    monkeypatch.setattr(compiled, "rival", lambda tool, *_: Form(tool))
    monkeypatch.setitem(NETWORKS, "tiny", Network("tiny", "lines", "bert:12:384"))
    (places.folder / "rivals" / "tiny").mkdir(parents=True)
    found = compiled._rivals(Case("tiny", {}, 2.0, full=True), places, print)
    assert [form.name for form in found] == ["ort-dynamic", "nncf-openvino", "nncf", "onnxsim", compiled.TORCH]


def test_the_size_of_a_model_has_the_weights_beside_it(tmp_path: Path):
    for name, size in (("m.onnx", 3), ("m.onnx.data", 5), ("other.onnx", 7), ("i.xml", 11), ("i.bin", 13)):
        (tmp_path / name).write_bytes(b"0" * size)
    assert stored_bytes(tmp_path / "m.onnx") == 8
    assert stored_bytes(tmp_path / "i.xml") == 24


def test_a_form_is_judged_by_the_part_that_nobody_has_seen(places: Places, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "_original_outputs", compiled._original_outputs.__wrapped__)
    judged = compiled._judged(CASE, Form("same", str(places.model("tiny"))), places, print)
    assert judged.certificate["drop"] == 0.0
    assert judged.certificate["samples"] == len(load(places, TINY, "judge")) == 16
    broken = places.folder / "broken.onnx"
    broken.write_bytes(b"no model")
    failed = compiled._judged(CASE, Form("broken", str(broken)), places, print)
    assert str(failed.failure).startswith("made, but it does not run: ")


def test_what_cannot_be_started_is_left_out_of_the_run(places: Places, monkeypatch: pytest.MonkeyPatch):
    asked: list[list[str]] = []

    def measure(subjects: Sequence[Subject], effort: Effort, on_progress: Callable[[str, float], None]) -> Measurement:
        del effort, on_progress
        asked.append([subject.name for subject in subjects])
        if "lame" in asked[-1]:
            raise MeasurementError("lame", got="a worker that died", expected="one that lives", mend="Look.")
        return measured(*asked[-1])

    monkeypatch.setattr(compiled, "measure", measure)
    model = str(places.model("tiny"))
    forms = [Form(OURS, model), Form("lame", model), Form("never made", failure="no reason")]
    rows = compiled._timed(CASE, forms, places, BUDGET, print)
    assert asked == [[compiled.ORIGINAL, OURS, "lame"], [compiled.ORIGINAL, OURS]]
    assert [row.failure for row in rows] == [None, None, "made, but it does not run: a worker that died", "no reason"]
    assert [row.latency for row in rows] == [0.5, 0.5, None, None]


def test_that_the_original_cannot_be_started_is_an_error(places: Places, monkeypatch: pytest.MonkeyPatch):
    def measure(*_: object) -> Measurement:
        raise MeasurementError(compiled.ORIGINAL, got="a worker that died", expected="one that lives", mend="Look.")

    monkeypatch.setattr(compiled, "measure", measure)
    with pytest.raises(MeasurementError, match="a worker that died"):
        compiled._timed(CASE, [], places, BUDGET, print)


def test_batches_as_they_come_are_run_as_they_come(places: Places):
    assert len(compiled._feeds(CASE, places)) == 1
    files = compiled._feeds(Case("tiny", {}, 2.0), places)
    assert [len(tensors.load_npz(Path(file))["x"]) for file in files] == [8, 8]


def test_a_case_is_done_once(places: Places, monkeypatch: pytest.MonkeyPatch):
    shown: list[str] = []

    def show(case: Case, *_: object) -> dict[str, Any]:
        shown.append(case.title)
        return {"case": case.title}

    monkeypatch.setattr(compiled, "_show", show)
    file = places.folder / "out" / "results.jsonl"
    other = Case("tiny", {"batch": 3}, 2.0)
    assert [row["case"] for row in compiled.run([CASE], places, file, BUDGET, print)] == ["tiny, 2"]
    assert [row["case"] for row in compiled.run([CASE, other], places, file, BUDGET, print)] == ["tiny, 2", "tiny, 3"]
    assert shown == ["tiny, 2", "tiny, 3"]
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"case": title} for title in shown]


def test_what_is_left_is_told_where_a_goal_is_missed(places: Places):
    form = Form(**form_of(OURS, 1.5, 0.0)), str(places.model("tiny"))
    missed = replace(form[0], model=form[1])
    left = compiled._left(CASE, missed, places, BUDGET)
    assert set(left) <= {"MatMul", "Add", "Gemm", "FusedMatMul"}
    assert sum(left.values()) == pytest.approx(1.0)
    assert compiled._left(Case("tiny", {"batch": 2}, 1.5), missed, places, BUDGET) == {}
    assert compiled._left(CASE, None, places, BUDGET) == {}
    row = {
        "case": "tiny, 2",
        "goal": 2.0,
        "provider_goal": None,
        "forms": [asdict(missed)],
        "left": {"A": 0.9, "B": 0.01},
    }
    assert compiled.table([row]).endswith("The goal is missed; what is left of ours: A 90%.")


def measured(*names: str) -> Measurement:
    """A measurement in which all are equal."""
    interval = Interval(0.5, 0.4, 0.6)
    timings = tuple(Timing(name, (((0.5,),),), interval, None, 1, 0.0) for name in names)
    against = {"against": names[0], "speed": Interval(2.0, 1.9, 2.1), "reason": "it is"}
    comparisons = tuple(Comparison(name, verdict="faster", **against) for name in names[1:])
    return Measurement(timings, comparisons, (), {})


def form_of(name: str, speed: float, drop: float, note: str = "") -> dict[str, Any]:
    """A row of the results."""
    whole = Interval(1.0, 1.0, 1.0)
    found = Certificate("mean_cosine", whole, whole, drop, drop, 0.01, 320, None, None, None, "")
    comparison = Comparison(name, "", Interval(speed, speed - 0.1, speed + 0.1), "faster", "")
    kept = Form(name, "m.onnx", None, 3.0, 10**9, 10**6, note, asdict(found), asdict(comparison), 0.002)
    return asdict(kept)


def test_the_table_names_the_best_that_keeps_its_accuracy():
    forms = [
        asdict(Form(compiled.ORIGINAL, "m.onnx", latency=0.004)),
        form_of(OURS, 3.1, 0.001, "cleanup,quantize-dynamic{operators=MatMul|Gemm}"),
        form_of("ort-dynamic", 1.8, 0.002),
        form_of("olive", 2.5, 0.2),
        form_of("nncf-openvino", 3.4, 0.02),
        asdict(Form("nncf", failure="it | died", seconds=2.0)),
    ]
    text = compiled.table([{"case": "tiny, 2", "goal": 3.0, "provider_goal": None, "forms": forms, "left": {}}])
    lines = text.splitlines()
    assert lines[2] == (
        "| tiny, 2 | 3.10x | 3.0x | yes: 0.10 (0.10) | 1.80x ort-dynamic | 3.40x nncf-openvino, loses 2.00 (2.00) |"
    )
    assert "| onnxruntime, fp32 | 1.00x | 4.00 ms |  |  |  |  |  |" in lines
    assert (
        "| onnx-lathe `cleanup,quantize-dynamic{operators=MatMul, Gemm}` | 3.10x [3.00, 3.20] | 2.00 ms | 1.0000 "
        "| 0.10 (0.10) | 1 MB | 3 s | 1000 MB |"
    ) in lines
    assert "| nncf | failed: it / died | | | | | 2 s |  |" in lines
    assert len({line.count("|") for line in lines[6:]}) == 1
