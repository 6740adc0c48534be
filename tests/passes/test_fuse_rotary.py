"""Rotary positions as one operator: what it computes, and which rotations are left alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.fuse.rotary import FuseRotary
from onnx_lathe.passes.run import apply
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Samples
from tests import graphs
from tests.attention_graphs import ROTARY


def test_queries_and_keys_are_rotated_by_the_operator(tmp_path: Path) -> None:
    source, target = graphs.save(graphs.build(ROTARY), tmp_path / "m.onnx"), tmp_path / "fused.onnx"
    samples = Samples((tensors.random_feeds(source, {"batch": 2, "seq": 7}),), source="random")
    (applied,) = apply(source, [FuseRotary()], target, samples=samples)
    assert applied.plan == {"results": ["q", "k"]}
    model = files.load(target)
    left = Counter(node.op_type for node in model.graph)
    assert (left["RotaryEmbedding"], left["Neg"]) == (2, 0)
    edit = FuseRotary().plan(files.load(source), None, None)
    assert not edit(model).modified


def test_one_rotation_that_is_none_is_left_alone(tmp_path: Path) -> None:
    text = ROTARY.replace("Slice (q2, half, end, last)", "Slice (q2, first, half, last)")
    model = files.load(graphs.save(graphs.build(text), tmp_path / "m.onnx"))
    assert FuseRotary().plan(model, None, None).describe() == {"results": ["k"]}


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ({"(angles, angles)": "(angles, others)", "both = ": "others = Neg (angles) both = "}, "halves of its angles"),
        ({"(q_negative, q_low)": "(q_low, q_negative)", "(k_negative, k_low)": "(k_low, k_negative)"}, "no rotation"),
        ({"(cosine, heads)": "(many, heads)", "cos = Uns": "many = Expand (cosine, dims) cos = Uns"}, "from sample to"),
    ],
)
def test_other_rotations_are_refused(pairs: dict[str, str], reason: str, tmp_path: Path) -> None:
    text = ROTARY
    for old, new in pairs.items():
        text = text.replace(old, new)
    text = text.replace(
        "many =", "rows = Shape <start = 0, end = 1> (x) dims = Concat <axis = 0> (rows, heads, heads) many ="
    )
    model = files.load(graphs.save(graphs.build(text), tmp_path / "m.onnx"))
    with pytest.raises(UnsupportedModelError, match=reason):
        FuseRotary().plan(model, None, None)
