"""What holds for every pass on every graph: it plans or refuses, and what it does is checked, complete and once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.fuse.attention import FuseAttention
from onnx_lathe.passes.fuse.gelu import Gelu
from onnx_lathe.passes.fuse.normalization import FuseNormalization
from onnx_lathe.passes.prune.request import Prune
from onnx_lathe.passes.prune.sparsify import Sparsify
from onnx_lathe.passes.quantize.dynamic import QuantizeDynamic
from onnx_lathe.passes.quantize.static import QuantizeStatic
from onnx_lathe.passes.quantize.weight_only import QuantizeWeights
from onnx_lathe.passes.registry import PASSES, build, parse, spell, to_json
from onnx_lathe.passes.repair.adaround import RoundWeights
from onnx_lathe.passes.repair.correct import CorrectBiases
from onnx_lathe.passes.repair.smooth import Smooth
from onnx_lathe.passes.request import Request
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.errors import UnsupportedModelError
from tests import graphs

REQUESTS: list[Request] = [
    *(request() for request in PASSES.values()),
    Prune(ratio=0.4, multiple=4),
    Prune(ratio=0.4, multiple=1, importance="magnitude", reconstruct=False),
    Prune(ratio=0.4, multiple=4, importance="interaction"),
    Prune(threshold=1.0, multiple=2, importance="std"),
    QuantizeStatic(weight_exponent=-4),
    QuantizeDynamic(weight_exponent=-4, weight_bits=7),
    Sparsify(rule="magnitude", ratio=0.3),
    FuseAttention("standard"),
    FuseNormalization("skip"),
    Gelu("erf"),
    Gelu("quick"),
    Smooth(alpha="search", insert=False),
    CorrectBiases(per_channel=False, weight_bits=7, rounds=1),
    RoundWeights(weight_exponent=-4, iterations=20),
    QuantizeWeights(bits=4, block=16),
    QuantizeWeights(bits=4, block=32, method="hqq", symmetric=True, power_of_two=True),
    QuantizeWeights(bits=8, block=16, method="gptq", activation_order=True),
]
EVERY_REQUEST = pytest.mark.parametrize("request_", REQUESTS, ids=spell)
EVERY_GRAPH = pytest.mark.parametrize("graph", graphs.GRAPHS)


def signature(model: onnx.ModelProto) -> tuple[list[bytes], list[bytes]]:
    """Return inputs and outputs as bytes: names, types, dimensions and order."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value.SerializeToString() for value in model.graph.input if value.name not in weights]
    return inputs, [value.SerializeToString() for value in model.graph.output]


@EVERY_GRAPH
@EVERY_REQUEST
def test_contract(request_: Request, graph: str, tmp_path: Path) -> None:
    source = graphs.save(graphs.build(graphs.GRAPHS[graph]), tmp_path / "source.onnx")
    samples = graphs.samples_for(source)
    model = files.load(source)
    before = tmp_path / "before.onnx"
    files.save(model, before)
    try:
        edit = request_.plan(model, samples, None)
    except UnsupportedModelError:
        return
    planned = tmp_path / "planned.onnx"
    files.save(model, planned)
    assert planned.read_bytes() == before.read_bytes(), "planning changed the graph"

    modified = edit(model).modified
    after = tmp_path / "after.onnx"
    files.save(model, after)
    assert modified == (after.read_bytes() != before.read_bytes())
    onnx.checker.check_model(after, full_check=True)
    assert signature(onnx.load(after)) == signature(onnx.load(before))
    for check in edit.check(source, after, tensors.first_batch(source, samples, 4)):
        assert not np.isnan(check.measured)
        assert check.passed, check

    assert not edit(model).modified
    again = tmp_path / "again.onnx"
    files.save(model, again)
    assert again.read_bytes() == after.read_bytes(), "the second application changed the graph"


@EVERY_REQUEST
def test_a_request_is_its_text_and_its_json(request_: Request) -> None:
    assert parse(spell(request_)) == (request_,)
    options = to_json(request_)
    assert build(options.pop("pass"), options) == request_
