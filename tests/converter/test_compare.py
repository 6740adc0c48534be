"""``lathe compare`` with every kind of label, and what it prints."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lathe.converter.cli import main as cli
from onnx_lathe.converter.compare import compare
from onnx_lathe.runtime.samples import Array, Samples
from tests import graphs

SIZE = 400
W = np.asarray([[1, 2], [3, 4], [5, 6], [7, 8]], np.float32)


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A linear model and one whose first output is a little larger."""
    original = graphs.write(tmp_path / "a.onnx", graphs.LINEAR)
    shifted = onnx.load(original)
    next(tensor for tensor in shifted.graph.initializer if tensor.name == "b").float_data[0] += 0.05
    onnx.save(shifted, tmp_path / "b.onnx")
    return original, tmp_path / "b.onnx"


def inputs() -> Array:
    return np.random.default_rng(0).standard_normal((SIZE, 4)).astype(np.float32)


def answers() -> Array:
    return inputs() @ W + np.asarray([0.5, -0.5], np.float32)


def test_classes(models: tuple[Path, Path]) -> None:
    result = compare(*models, Samples(({"x": inputs()},), answers().argmax(axis=1)))
    assert result.certificate.metric == "accuracy"
    assert result.evaluation.kind == "classes"
    accuracy = result.evaluation.figures[0]
    assert (accuracy.original, accuracy.candidate) == (result.certificate.original, result.certificate.candidate)
    assert accuracy.change.value == pytest.approx(-result.certificate.drop)
    assert [item.samples for item in result.evaluation.classes] != []


def test_numbers(models: tuple[Path, Path]) -> None:
    labels = answers().astype(np.float64) + np.random.default_rng(1).normal(0, 0.1, (SIZE, 2))
    result = compare(*models, Samples(({"x": inputs()},), labels))
    assert result.certificate.metric == "r2"
    assert result.certificate.certified
    figures = {figure.name: figure for figure in result.evaluation.figures}
    assert figures["R2"].original.value == pytest.approx(result.certificate.original.value)
    assert figures["mean absolute error"].change.low > 0
    distances = {distance.name: distance.value.value for distance in result.evaluation.distances}
    assert distances["mean absolute difference"] == pytest.approx(0.025, rel=1e-3)


def test_no_labels(models: tuple[Path, Path]) -> None:
    result = compare(*models, Samples(({"x": inputs()},)), max_drop=0.05)
    assert result.evaluation.kind == "outputs"
    assert "cosine" in [distance.name for distance in result.evaluation.distances]


@pytest.mark.parametrize(("max_drop", "status"), [(0.2, 0), (0.0, 3)])
def test_the_command_prints_figures_and_ends_with_json(
    models: tuple[Path, Path],
    max_drop: float,
    status: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    np.savez(tmp_path / "data.npz", x=inputs(), label=answers().argmax(axis=1))
    arguments = ["compare", *models, "--data", tmp_path / "data.npz", "--max-drop", max_drop]
    monkeypatch.setattr(sys, "argv", ["lathe", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert ended.value.code == status
    result = json.loads(printed.out.splitlines()[-1])
    assert result["schema"] == "onnx-lathe/compare/1"
    assert result["certified"] == (status == 0)
    assert [figure["name"] for figure in result["evaluation"]["figures"]][:2] == ["accuracy", "precision"]
    assert len(result["facts"]) == 2
    assert "expected calibration error" in printed.err
    assert "right before, wrong after" in printed.err
