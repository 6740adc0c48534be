"""The whole chain on a recipe small enough for a test: one epoch, narrow networks, a budget that anything keeps."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import onnx_lathe
from onnx_lathe.converter.convert import convert
from onnx_lathe.runtime.bundle import open_bundle

RECIPE = """
name = "tiny"

[data]
source = "digits"
calibrate = 32

[teacher]
network = "residual"
options = { channels = 1, classes = 10, widths = [32, 32], blocks = 1 }
training = { epochs = 1 }

[student]
network = "residual"
options = { channels = 1, classes = 10, widths = [32, 32], blocks = 1 }
training = { epochs = 1 }

[prune]
passes = "prune{ratio=0.5}"
recovery = { epochs = 1 }

[compile]
candidates = ["quantize-static"]
max_drop = 1.0
dims = { batch = 4 }
time_budget = 2
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def bundle(recipe: Path) -> Path:
    """The bundle of a whole run."""
    return convert(recipe, recipe.parent / "out" / "tiny").bundle


def test_the_bundle_holds_every_rung_with_its_figures(bundle: Path) -> None:
    report = json.loads((bundle / "report.json").read_text())
    names = [rung["name"] for rung in report["rungs"]]
    assert names[:4] == ["teacher in torch", "teacher", "student", "pruned student"]
    parameters = {rung["name"]: rung["parameters"] for rung in report["rungs"]}
    assert parameters["pruned student"] < 0.5 * parameters["student"]
    (shape,) = report["shapes"]
    timings = {timing["name"]: timing for timing in shape["measurement"]["timings"]}
    assert set(timings) == set(names)
    assert all(timing["peak_memory"] > 0 and timing["p50"]["value"] > 0 for timing in timings.values())
    assert shape["macs"]["pruned student"] < 0.5 * shape["macs"]["student"]
    assert [score["part"] for score in report["distillation"]] == ["select", "test"]
    assert [curve["name"] for curve in report["curves"]] == [
        "teacher",
        "student alone",
        "student distilled",
        "pruned student, recovering",
    ]
    assert any("quantize-static" in candidate["name"] for candidate in report["candidates"])
    assert all(edit["checks"] for edit in report["edits"] if edit["changed"])


def test_the_model_runs_in_a_plain_session_as_in_ours(bundle: Path) -> None:
    image = np.random.default_rng(0).standard_normal((3, 1, 8, 8)).astype(np.float32)
    plain = onnxruntime.InferenceSession(bundle / "model.onnx").run(None, {"image": image})
    ours = onnx_lathe.Session(bundle).run({"image": image})
    np.testing.assert_array_equal(ours["logits"], plain[0])
    assert open_bundle(bundle).manifest["recipe"]["name"] == "tiny"


def test_a_rerun_skips_every_stage(recipe: Path, bundle: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (bundle.parent / ".work").rglob("result.json")}
    told: list[str] = []
    convert(recipe, bundle, progress=lambda done, total, text: told.append(text))
    after = {path: path.stat().st_mtime_ns for path in (bundle.parent / ".work").rglob("result.json")}
    assert after == before
    assert not any("epoch" in text or "warming up" in text for text in told)


def test_ctrl_c_leaves_the_last_good_bundle(recipe: Path, bundle: Path) -> None:
    good = (bundle / "manifest.json").read_bytes()
    changed = recipe.with_name("changed.toml")
    changed.write_text(RECIPE.replace("epochs = 1 }", "epochs = 50 }"))
    command = [sys.executable, "-m", "onnx_lathe.converter", "convert", str(changed), "-o", str(bundle)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "epoch" in line:
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        printed, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert json.loads(printed.splitlines()[-1])["error"] == "Interrupted"
    assert "Traceback" not in told
    assert (bundle / "manifest.json").read_bytes() == good
    assert list((bundle.parent / ".work" / bundle.name).glob("teacher-*.part"))
