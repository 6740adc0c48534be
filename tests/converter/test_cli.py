"""The command as users meet it: what it prints, its exit status, and its errors."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_lathe.converter import bench
from onnx_lathe.converter.cli import main as cli
from onnx_lathe.passes.registry import PASSES
from tests import graphs


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return graphs.write(tmp_path / "linear.onnx", graphs.LINEAR)


def lathe(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any], str]:
    """Run the command in this process; return its exit status, its JSON and what it told people."""
    sys.argv = ["lathe", *map(str, arguments)]
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, json.loads(printed.out.splitlines()[-1]), printed.err


def test_run_writes_the_outputs(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    x = np.asarray([[1.0, 0.0, 0.0, 1.0]], np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    status, result, _ = lathe(capsys, "run", model, "--input", tmp_path / "x.npz", "-o", tmp_path / "y.npz")
    assert status == 0
    assert result["schema"] == "onnx-lathe/run/1"
    assert result["outputs"] == {"y": {"dtype": "float32", "shape": [1, 2]}}
    np.testing.assert_allclose(np.load(tmp_path / "y.npz")["y"], [[8.5, 9.5]])


def test_inspect_counts_parameters_and_macs(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    status, result, told = lathe(capsys, "inspect", model, "--dims", "batch=3", "--no-estimate")
    assert status == 0
    assert result["facts"]["parameters"] == 10
    assert result["facts"]["macs"] == 3 * 4 * 2
    assert "10 parameters" in told


def test_passes_lists_each_pass_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    status, result, told = lathe(capsys, "passes")
    assert status == 0
    names = [entry["name"] for entry in result["passes"]]
    assert names == list(PASSES)
    assert all(entry["summary"] for entry in result["passes"])
    assert all(name in told for name in names)
    assert "on [batch * tokens, hidden]" in told, "brackets are text, not markup"


def test_apply_writes_the_model_and_tells_the_oracle(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    status, result, told = lathe(capsys, "apply", model, "quantize-dynamic", "-o", tmp_path / "out.onnx")
    assert status == 0
    assert result["applied"][0]["changed"]
    assert "oracle:" in told
    assert (tmp_path / "out.onnx").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["apply", "MODEL", "quantise-dynamic", "-o", "OUT"], "Did you mean 'quantize-dynamic'?"),
        (["apply", "MODEL", "prune{ratoi=0.3}", "-o", "OUT"], "Did you mean 'ratio'?"),
        (["apply", "MODEL", "prune{ratio=2}", "-o", "OUT"], "prune{ratio}"),
        (["apply", "MODEL", "prune{ratio}", "-o", "OUT"], "an option without a value"),
        (["apply", "MODEL", "quantize-static", "-o", "OUT"], "--data"),
        (["inspect", "missing.onnx"], "missing.onnx"),
        (["inspect", "MODEL", "--dims", "batch"], "NAME=SIZE"),
        (["inspect", "MODEL", "--dims", "bacth=2"], "Did you mean 'batch'?"),
        (["convert", "missing.toml"], "no such file"),
        (["bench", "MODEL", "--provider", "cudaa"], "provider"),
        (["bench", "MODEL", "--fail-over", "much", "--against", "MODEL"], "--fail-over: got 'much', expected a share"),
        (["bench", "MODEL", "-o", "MODEL"], "a file that is there already, expected a new one"),
        (["bench", "MODEL", "--append", "."], "Is a directory, expected a file to append to"),
        (
            ["bench", "MODEL", "--against", "missing.json"],
            "missing.json: got No such file or directory, expected a",
        ),
        (["bench", "MODEL", "--dims", "bacth=2"], "Did you mean 'batch'?"),
        (["bench", "MODEL", "--scenario", "server"], "--rate: got no rate and no bound of the latency, expected one"),
        (["bench", "MODEL", "--scenario", "offline", "--against", "MODEL"], "--against goes with --scenario single-st"),
        (
            ["bench", "MODEL", "--scenario", "offline", "--rate", "9"],
            "--rate goes with --scenario server, not with off",
        ),
        (["bench", "MODEL", "--latency-bound", "9"], "--latency-bound goes with --scenario server, not with single"),
        (
            ["bench", "MODEL", "--scenario", "offline", "-o", "MODEL"],
            "a file that is there already, expected a new one",
        ),
        (["report", "missing.jsonl"], "missing.jsonl: got No such file or directory, expected results as"),
        (["compile", "MODEL", "-o", "OUT", "--data", "missing.npz"], "missing.npz"),
        (["inspekt", "MODEL"], "inspekt"),
        (["inspect"], "Missing"),
    ],
)
def test_bad_input_is_one_message_and_status_2(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    before = set(tmp_path.iterdir())
    places = {"MODEL": model, "OUT": tmp_path / "out.onnx"}
    status, result, told = lathe(capsys, *(places.get(argument, argument) for argument in arguments))
    assert status == 2
    assert result["exit_status"] == 2
    assert message in result["message"]
    assert "Traceback" not in told
    assert {path for path in tmp_path.iterdir() if path.name != ".work"} == before


def test_an_interruption_promises_only_what_every_verb_keeps(
    capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", measure)
    status, result, told = lathe(capsys, "bench", model)
    assert (status, result["error"]) == (130, "Interrupted")
    assert result["message"] == "interrupted; the same command goes on, or begins anew where the verb keeps nothing"
    assert "Traceback" not in told


def test_a_file_that_is_not_onnx(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "text.onnx"
    path.write_text("not a model")
    status, result, _ = lathe(capsys, "inspect", path)
    assert status == 2
    assert result["error"] == "ModelFileError"
    assert str(path) in result["message"]


def test_compile_without_data_ships_only_exact_forms(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    status, result, told = lathe(capsys, "compile", model, "-o", tmp_path / "bundle", "--time-budget", 4)
    assert status == 0
    assert result["status"] in ("original kept", "exact")
    assert {path.name for path in (tmp_path / "bundle").iterdir()} == {
        "model.onnx",
        "session.toml",
        "manifest.json",
        "report.html",
        "report.json",
        "report.md",
    }
    assert "accuracy was not judged" in (tmp_path / "bundle" / "report.md").read_text()
    assert told


WITHOUT_TORCH = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "torch" else self.finder.find_spec(name, path, target)

sys.meta_path = [Hiding(finder) for finder in sys.meta_path]
from onnx_lathe.converter.cli import main as cli
sys.argv = ["lathe", *sys.argv[1:]]
cli.main()
"""


def lathe_without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_compile_works_where_torch_is_not_installed(model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.standard_normal((40, 4)).astype(np.float32))
    done = lathe_without_torch(
        "compile", model, "--data", tmp_path / "data.npz", "-o", tmp_path / "bundle", "--time-budget", 4
    )
    assert done.returncode in (0, 3), done.stderr
    assert (tmp_path / "bundle" / "model.onnx").is_file()


def test_training_without_torch_says_what_to_install() -> None:
    done = lathe_without_torch("train")
    assert done.returncode == 2
    assert 'pip install "onnx-lathe[train]"' in done.stderr


def test_bench_keeps_a_result_holds_it_against_a_baseline_and_reports_its_history(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    baseline, results, page = tmp_path / "base.json", tmp_path / "h.jsonl", tmp_path / "h.html"
    quick = ("--threads", "1", "--time-budget", "1", "--dims", "batch=2")
    status, result, told = lathe(capsys, "bench", model, *quick, "-o", baseline, "--append", results)
    assert (status, result["schema"]) == (0, "onnx-lathe/bench/2")
    case = result["cases"][0]
    assert case["conditions"]["dims"]["batch"] == 2
    assert [roofline["name"] for roofline in case["rooflines"]] == [str(model)]
    assert "cold start" in told
    status, result, told = lathe(
        capsys, "bench", model, *quick, "--append", results, "--against", baseline, "--fail-over", "100%"
    )
    # On a busy machine the outcome may be that nothing can be told.
    outcome = result["gates"][0]["outcome"]
    assert (status == 0) == (outcome == "kept")
    assert status == 0 or "limit missed" in told
    status, result, _ = lathe(capsys, "report", results, "-o", page)
    assert (status, result["results"]) == (0, 2)
    assert "Latency over time" in page.read_text()


@pytest.mark.parametrize("options", [("offline",), ("server", "--rate", "200")])
def test_bench_measures_and_keeps_what_it_finds_under_load(
    capsys: pytest.CaptureFixture[str],
    model: Path,
    options: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "FINAL", replace(bench.FINAL, processes=1, rounds=6, block_seconds=0.005))
    monkeypatch.setattr(bench, "Traffic", partial(bench.Traffic, queries=20, runs=2))
    kept, page = tmp_path / "kept.json", tmp_path / "kept.html"
    load = ("--threads", "1", "--scenario", *options)
    status, result, told = lathe(capsys, "bench", model, *load, "-o", kept, "--append", tmp_path / "h.jsonl")
    assert (status, result["scenario"]) == (0, options[0])
    assert result["cases"][0]["result"]["subjects"][0]["name"] == str(model)
    assert options[0] in told
    assert json.loads(kept.read_text())["schema"] == "onnx-lathe/load/1"
    assert (tmp_path / "h.jsonl").read_bytes() == kept.read_bytes()
    status, result, told = lathe(capsys, "report", kept, "-o", page)
    assert (status, result["results"]) == (0, 1)
    assert options[0] in told
    assert "Under load" in page.read_text()
