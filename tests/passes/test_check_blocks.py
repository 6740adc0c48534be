"""The oracle of weight-only quantization: what is no defect, and what is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_lathe.passes import run
from onnx_lathe.passes.quantize.check_blocks import check_weights
from onnx_lathe.passes.quantize.weight_only import QuantizeWeights
from onnx_lathe.runtime.samples import Samples
from tests import graphs

WIDE = """
wide (float[N, 128] x) => (float[N, 32] y) <float[128, 32] w> { [only] y = MatMul (x, w) }
"""


def quantized(folder: Path, text: str) -> tuple[Path, Path]:
    """Return a graph's file and its quantized one."""
    source, target = graphs.save(graphs.build(text), folder / "source.onnx"), folder / "target.onnx"
    run.apply(source, [QuantizeWeights(block=16)], target)
    return source, target


@pytest.mark.parametrize("outlier", [60.0, 1000.0])
def test_an_outlying_input_that_rounds_its_block_is_no_defect(outlier: float, tmp_path: Path) -> None:
    proto = graphs.build(WIDE)
    weight = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    weight[0] = 0.0
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    source = graphs.save(proto, tmp_path / "m.onnx")
    x = np.random.default_rng(0).standard_normal((16, 128), np.float32)
    x[:, 0] = outlier
    (done,) = run.apply(source, [QuantizeWeights()], tmp_path / "q.onnx", samples=Samples(({"x": x},)))
    assert all(check.passed for check in done.checks)


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq"])
@pytest.mark.parametrize("size", [1e-18, 1e-20, 1e-30])
def test_weights_below_the_least_scale_are_no_defect(size: float, method: str, tmp_path: Path) -> None:
    proto = graphs.build(WIDE)
    weight = numpy_helper.to_array(proto.graph.initializer[0]) * np.float32(size)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    source = graphs.save(proto, tmp_path / "m.onnx")
    # All inputs follow one another, so that GPTQ carries errors on to where they make a whole level.
    common = np.random.default_rng(0).standard_normal((64, 1), np.float32)
    samples = Samples(({"x": common * np.geomspace(1000.0, 1.0, 128, dtype=np.float32)},))
    for bits in (4, 8):
        request = QuantizeWeights(bits=bits, head_bits=bits, block=16, method=method)  # pyright: ignore[reportArgumentType]
        (done,) = run.apply(source, [request], tmp_path / "q.onnx", samples=samples)
        assert all(check.passed for check in done.checks)


def test_nodes_of_one_name_are_told_apart_by_the_oracle(tmp_path: Path) -> None:
    source, target = quantized(tmp_path, graphs.ENCODER)
    for path in (source, target):
        proto = onnx.load(path)
        for node in proto.graph.node:
            node.name = "same"
        for tensor in proto.graph.initializer:
            if tensor.name == "q_scales":
                tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
        onnx.save(proto, path)
    check = check_weights(source, target)
    assert (check.where, check.scope, check.passed) == ("qm", "7 of 7 products", False)


def test_the_oracle_finds_a_bias_that_is_wrong(tmp_path: Path) -> None:
    source, target = quantized(tmp_path, graphs.PERCEPTRON)
    wrong = onnx.load(target)
    bias = next(tensor for tensor in wrong.graph.initializer if tensor.name == "y_bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) * np.float32(0.5), bias.name))
    onnx.save(wrong, tmp_path / "wrong.onnx")
    check = check_weights(source, tmp_path / "wrong.onnx")
    assert (check.where, check.passed) == ("y", False)
