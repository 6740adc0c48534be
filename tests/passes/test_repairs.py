"""Repairs as a user puts them before a quantization: by name, in one line, each checked with its oracle."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnx_lathe.passes.registry import parse
from onnx_lathe.passes.run import apply
from tests import graphs, repairs
from tests.tolerances import QUANTIZED_DB

ANYWHERE = (
    "equalize,quantize-static",
    "correct-biases,quantize-static",
    "round-weights{iterations=100},quantize-static",
)
WITH_PRODUCTS = (
    "smooth{alpha=search},quantize-static",
    "round-weights{iterations=100},quantize-dynamic",
    "equalize,smooth,round-weights{iterations=100},quantize-static",
)
CASES = [
    *((spec, graph) for spec in ANYWHERE for graph in ("BOTTLENECK", "PERCEPTRON", "ENCODER")),
    *((spec, graph) for spec in WITH_PRODUCTS for graph in ("PERCEPTRON", "ENCODER")),
]


@pytest.mark.parametrize(("spec", "graph"), CASES)
def test_repairs_stand_before_a_quantization(spec: str, graph: str, tmp_path: Path):
    path = repairs.source(tmp_path, getattr(graphs, graph))
    data, target = graphs.samples_for(path), tmp_path / "target.onnx"
    applied = apply(path, parse(spec), target, samples=data)
    assert all(item.changed and item.checks for item in applied)
    assert repairs.difference_db(path, target, data) > QUANTIZED_DB
