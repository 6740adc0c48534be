"""Attention as one operator: each form on each spelling, what it computes, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.fuse.attention import Form, FuseAttention
from onnx_lathe.passes.fuse.masks import FoldMasks
from onnx_lathe.passes.fuse.rotary import FuseRotary
from onnx_lathe.passes.run import apply
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Samples
from onnx_lathe.runtime.session import Session
from tests import graphs
from tests.attention_graphs import EXPORTED, MERGED, ROTARY, SCRIPTED, padded

OPERATOR: dict[Form, str] = {"multi-head": "MultiHeadAttention", "packed": "Attention", "standard": "Attention"}


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in files.load(path).graph)


def encoder_samples() -> Samples:
    mask = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], np.int64)
    return Samples(({"ids": np.arange(10).reshape(2, 5), "mask": mask},), source="two sentences")


@pytest.mark.parametrize("form", OPERATOR)
@pytest.mark.parametrize(
    ("graph", "samples"),
    [(EXPORTED, padded()), (SCRIPTED, padded()), (graphs.ENCODER, encoder_samples())],
    ids=["exported", "scripted", "encoder"],
)
@pytest.mark.parametrize("folded", [True, False], ids=["folded", "as-it-is"])
def test_one_operator_computes_it(graph: str, samples: Samples, form: Form, folded: bool, tmp_path: Path) -> None:
    if graph is SCRIPTED and (form == "packed" or not folded):
        pytest.skip("refused: see test_what_is_refused")
    source, target = graphs.save(graphs.build(graph), tmp_path / "m.onnx"), tmp_path / "fused.onnx"
    before = [FoldMasks()] if folded and graph is not graphs.ENCODER else []
    applied = apply(source, [*before, FuseAttention(form)], target, samples=samples)[-1]
    assert not applied.refused
    left = operators(target)
    assert left[OPERATOR[form]] == 1
    assert left.keys().isdisjoint({"Softmax", "Transpose", "IsNaN"})
    assert left["MatMul"] == operators(source)["MatMul"] - (5 if form == "packed" else 2)
    feeds = samples.batches[0]
    want, got = Session(source).run(feeds), Session(target).run(feeds)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("form", OPERATOR)
def test_one_layer_that_makes_queries_keys_and_values(form: Form, tmp_path: Path) -> None:
    source, target = graphs.save(graphs.build(MERGED), tmp_path / "m.onnx"), tmp_path / "fused.onnx"
    samples = Samples((tensors.random_feeds(source, {"batch": 2, "seq": 7}),), source="random")
    apply(source, [FuseAttention(form)], target, samples=samples)
    left = operators(target)
    assert (left[OPERATOR[form]], left["Softmax"], left["Transpose"]) == (1, 0, 0)
    assert (left["Gemm"], left["Split"]) == ((0, 0) if form == "packed" else (1, 1))


@pytest.mark.parametrize("form", ["multi-head", "standard"])
@pytest.mark.parametrize("rotary", [True, False])
def test_repeated_heads_of_keys_and_rotary_positions(form: Form, rotary: bool, tmp_path: Path) -> None:
    source, target = graphs.save(graphs.build(ROTARY), tmp_path / "m.onnx"), tmp_path / "fused.onnx"
    samples = Samples((tensors.random_feeds(source, {"batch": 2, "seq": 7}),), source="random")
    requests = [*([FuseRotary()] if rotary else []), FuseAttention(form)]
    apply(source, requests, target, samples=samples)
    left = operators(target)
    assert (left[OPERATOR[form]], left["Softmax"], left["RotaryEmbedding"]) == (1, 0, 2 if rotary else 0)
    if form == "standard":
        # It repeats heads itself, and takes tokens as they are rotated.
        assert (left["Expand"], left["Transpose"]) == (0, 0 if rotary else 4)


def test_applying_the_edit_twice_changes_nothing_more(tmp_path: Path) -> None:
    model = files.load(graphs.save(graphs.build(EXPORTED), tmp_path / "m.onnx"))
    edit = FuseAttention().plan(model, None, None)
    assert edit.describe() == {"form": "multi-head", "softmaxes": ["p"]}
    assert edit(model).modified
    assert not edit(model).modified


SECOND_READER = (
    "y = MatMul (c2, wo)",
    "seen = MatMul (c2, wo) peak = ReduceMax <keepdims = 0> (p) y = Add (seen, peak)",
)


@pytest.mark.parametrize(
    ("graph", "form", "old", "new", "reason"),
    [
        (EXPORTED, "multi-head", *SECOND_READER, "reads its probabilities|read by others"),
        (
            EXPORTED,
            "multi-head",
            "p = Softmax <axis = -1>",
            "p = Softmax <axis = 2>",
            "its Softmax is not over the keys",
        ),
        (EXPORTED, "multi-head", "masked = Add (scores, bias)", "masked = Max (scores, bias)", "Max stands between"),
        (EXPORTED, "packed", "MatMul (x, wk)", "MatMul (t, wk)", "not made of one tensor"),
        (SCRIPTED, "multi-head", "", "", "a row may be masked whole to minus infinity: nothing bounds 'bias'"),
        (graphs.LINEAR, "multi-head", "", "", "no Softmax at all"),
        (
            graphs.HALF,
            "multi-head",
            "[fc] logits = Gemm",
            "[s] t = Softmax (f) [fc] logits = Gemm",
            "Flatten stands between",
        ),
    ],
)
def test_what_is_refused(graph: str, form: Form, old: str, new: str, reason: str, tmp_path: Path) -> None:
    text = graph.replace(old, new) if old else graph
    text = text.replace("k0 = MatMul (t", "t = Tanh (x) k0 = MatMul (t")
    model = files.load(graphs.save(graphs.build(text), tmp_path / "m.onnx"))
    with pytest.raises(UnsupportedModelError, match=reason):
        FuseAttention(form).plan(model, None, None)


def test_one_of_two_is_refused_with_its_reason(tmp_path: Path) -> None:
    text = EXPORTED.replace("=> (float[batch, seq, 32] y)", "=> (float[batch, seq, 32] y, float[batch, seq, 32] other)")
    text = text.replace("  y = MatMul (c2, wo)", "  y = MatMul (c2, wo)\n  [lone] other = Softmax <axis = -1> (x)")
    model = files.load(graphs.save(graphs.build(text), tmp_path / "m.onnx"))
    (refusal,) = FuseAttention().plan(model, None, None).refused
    expected = ("lone", "Softmax", "its input is no masked product of queries and keys")
    assert (refusal.node, refusal.operator, refusal.reason) == expected


def test_values_that_a_mask_silences_are_no_product_with_a_weight(tmp_path: Path) -> None:
    model = files.load(graphs.save(graphs.build(SCRIPTED), tmp_path / "m.onnx"))
    FoldMasks().plan(model, None, None)(model)
    with pytest.raises(UnsupportedModelError, match="not each the product of a tensor with a weight"):
        FuseAttention("packed").plan(model, None, None)


def test_the_standard_operator_needs_a_set_that_means_the_same(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]>\n' + EXPORTED
    model = files.load(graphs.save(graphs.build(text), tmp_path / "m.onnx"))
    with pytest.raises(UnsupportedModelError, match="got operator set 17, expected operator set 20 or newer"):
        FuseAttention("standard").plan(model, None, None)
