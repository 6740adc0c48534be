"""``lathe sensitivity``: its result, its files, and the times of kernels by layer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_lathe.benchmarks import schema
from onnx_lathe.converter.cli import main as cli
from onnx_lathe.converter.gains import layer_gains, layer_seconds
from onnx_lathe.converter.sensitivity import SCHEMA, Sensitivity, sensitivity
from onnx_lathe.passes import run
from onnx_lathe.passes.registry import parse
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.errors import PassSpecError
from onnx_lathe.runtime.profile import OperatorTime
from tests import graphs


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return graphs.save(graphs.build(graphs.PERCEPTRON), tmp_path / "perceptron.onnx")


@pytest.mark.parametrize("passes", ["quantize-static", "quantize-dynamic"])
@pytest.mark.parametrize("graph", ["PERCEPTRON", "RESIDUAL", "ENCODER", "CLASSIFIER"])
def test_every_layer_is_found_in_both_profiles(graph: str, passes: str, tmp_path: Path) -> None:
    source = graphs.save(graphs.build(getattr(graphs, graph)), tmp_path / "model.onnx")
    samples = graphs.samples_for(source)
    quantized = tmp_path / "quantized.onnx"
    (applied,) = run.apply(source, parse(passes), quantized, samples=samples)
    gains = layer_gains(source, quantized, tensors.first_batch(source, samples, 2), threads=1)
    layers: list[Any] = applied.plan["layers"]
    results: list[str] = [layer["result"] if passes == "quantize-static" else layer for layer in layers]
    named = {node.output[0]: node.name for node in graphs.build(getattr(graphs, graph)).graph.node}
    assert {named[result] for result in results} <= set(gains)
    assert all(abs(seconds) < 1.0 for seconds in gains.values())


def test_kernels_are_known_by_what_they_were_made_of() -> None:
    kernels = {
        "stem_token_1": 1.0,
        "x_nchwc": 2.0,
        "fused first/MatMulAddFusion": 4.0,
        "/block/fc_sums_MatMulInteger": 8.0,
        "/block/fc_scaled_Mul": 16.0,
        "a_nchwc_token_3": 32.0,
        "someone else's": 64.0,
    }
    names = {"stem": "stem", "x": "stem", "first": "first", "/block/fc": "fc", "a_nchwc": "a"}
    times = [OperatorTime(node, "Conv", "cpu", seconds) for node, seconds in kernels.items()]
    assert layer_seconds(names, times) == {"stem": 3.0, "first": 4.0, "fc": 24.0, "a": 32.0}


def test_the_files_say_what_is_returned(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "sensitivity.json"
    told: list[str] = []
    result = sensitivity(
        source,
        graphs.samples_for(source),
        "quantize-static{ranges=mse}",
        output=output,
        samples=6,
        threads=1,
        progress=lambda _, __, text: told.append(text),
    )
    assert {layer.layer for layer in result.layers} == {"first", "second", "third"}
    assert all(layer.gain is not None for layer in result.layers)
    assert (result.samples, result.passes) == (6, "quantize-static{ranges=mse}")
    assert schema.load(Sensitivity, SCHEMA, output.read_text(), str(output)) == result
    page = output.with_suffix(".html").read_text()
    assert "Sensitivity of perceptron.onnx" in page
    assert sorted(path.name for path in output.parent.iterdir()) == ["sensitivity.html", "sensitivity.json"]
    # One calibration serves the plan of each layer and the whole model that is profiled.
    assert told.count("observe values") == len(list(graphs.samples_for(source).iter_batches(8)))
    assert "quantize first alone" in told


def test_several_passes_are_refused(source: Path) -> None:
    with pytest.raises(PassSpecError, match="got 2 passes, expected quantize-static or quantize-dynamic alone"):
        sensitivity(source, graphs.samples_for(source), "cleanup,quantize-static")


def test_the_verb(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays: dict[str, Any] = {"x": np.random.default_rng(0).normal(size=(12, 24)).astype(np.float32)}
    np.savez(tmp_path / "data.npz", **arrays)
    sys.argv = ["lathe", "sensitivity", str(source), "--data", str(tmp_path / "data.npz"), "--no-gain"]
    sys.argv += ["--passes", "quantize-dynamic"]
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert ended.value.code == 0
    assert result["schema"] == "onnx-lathe/sensitivity/1"
    assert [layer["gain"] for layer in result["layers"]] == [None] * 3
    assert "second" in printed.err
    assert "dB" in printed.err
