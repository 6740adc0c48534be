"""Padding left out: how many rows are computed, what is returned for padded places, and which graphs are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.fuse.padding import DropPadding, PaddingDropped
from onnx_lathe.passes.quantize.dynamic import QuantizeDynamic
from onnx_lathe.passes.quantize.static import QuantizeStatic
from onnx_lathe.passes.run import apply
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.profile import optimized_operators
from onnx_lathe.runtime.samples import Array, Samples
from onnx_lathe.runtime.session import Session
from tests import graphs, tolerances

MASKED = graphs.ENCODER.replace("low = {-1000.0}", "low = {-100000.0}, int64[1] last = {2}, int64 first = {0}")
MEAN = "[mean] m = ReduceMean <keepdims = 0> (r2, sequence)"
MASKED_MEAN = """[column] mc = Unsqueeze (mf, last)
  [weighted] wr = Mul (r2, mc)
  [sum] rs = ReduceSum <keepdims = 0> (wr, sequence)
  [count] rc = ReduceSum <keepdims = 0> (mc, sequence)
  [mean] m = Div (rs, rc)"""
FIRST = "[first] m = Gather <axis = 1> (r2, first)"
SCORES = "[masked] sm = Add (sc, ml)"
ENDINGS = {
    "masked mean": MASKED.replace(MEAN, MASKED_MEAN),
    "first token": MASKED.replace(MEAN, FIRST),
    "each token": MASKED.replace(MEAN, "[rows] m = Identity (r2)").replace(
        "[batch, 3] logits", "[batch, seq, 3] logits"
    ),
}
CAUSAL = MASKED.replace(
    SCORES,
    """[length] dims = Shape <start = 1> (ids)
  [scalar] length = Squeeze (dims)
  [positions] at = Range (first, length, step)
  [queries] query = Unsqueeze (at, sequence)
  [after] later = Less (query, at)
  [hidden] hide = Where (later, lowest, nothing)
  [both] bias = Add (ml, hide)
  [masked] sm = Add (sc, bias)""",
).replace("int64 first = {0}", "int64 first = {0}, int64 step = {1}, float lowest = {-100000.0}, float nothing = {0.0}")

WINDOW = CAUSAL.replace(
    "[after] later = Less (query, at)",
    """[apart] apart = Sub (query, at)
  [distance] distance = Abs (apart)
  [after] later = Greater (distance, width)""",
).replace("int64 step = {1}", "int64 step = {1}, int64 width = {40}")
"""Attention to 40 tokens on each side: in short sentences it hides nothing."""

IDS = np.arange(24, dtype=np.int64).reshape(3, 8)
RIGHT = np.array([[1] * 3 + [0] * 5, [1] * 8, [1] + [0] * 7], np.int64)
LEFT = RIGHT[:, ::-1].copy()


def saved(text: str, folder: Path) -> Path:
    return graphs.save(graphs.build(text), folder / "source.onnx")


def dropped(source: Path, folder: Path) -> tuple[Path, PaddingDropped]:
    model = files.load(source)
    edit = DropPadding().plan(model, None, None)
    assert isinstance(edit, PaddingDropped)
    assert edit(model).modified
    assert not edit(model).modified
    target = folder / "target.onnx"
    files.save(model, target)
    onnx.checker.check_model(target, full_check=True)
    return target, edit


def observed(path: Path, value: str, mask: Array) -> Array:
    """Return a value from inside of a model."""
    model = onnx.load(path)
    model.graph.output.append(onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None))
    onnx.save(model, path.with_name("observed.onnx"))
    return Session(path.with_name("observed.onnx")).run({"ids": IDS, "mask": mask})[value]


@pytest.mark.parametrize("ending", ENDINGS)
def test_real_tokens_alone_are_computed_and_nothing_else_changes(ending: str, tmp_path: Path) -> None:
    source = saved(ENDINGS[ending], tmp_path)
    target, edit = dropped(source, tmp_path)
    for mask, rows in ((RIGHT, 12), (LEFT, 14), (np.ones_like(RIGHT), 24)):
        feeds = {"ids": IDS, "mask": mask}
        want, got = Session(source, optimize=False).run(feeds)["logits"], Session(target).run(feeds)["logits"]
        if ending == "each token":
            want = np.where(mask[:, :, None] != 0, want, 0)
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerances.REORDERED * np.abs(want).max())
        # On the left the first place of a sentence is kept though it is padding.
        assert observed(target, "um", mask).shape == (rows, 96)
    assert all(check.passed for check in edit.check(source, target, {"ids": IDS, "mask": RIGHT}))


@pytest.mark.parametrize("text", [CAUSAL, WINDOW], ids=["causal", "window"])
def test_attention_that_hides_more_than_padding_is_followed_too(text: str, tmp_path: Path) -> None:
    source = saved(text.replace(MEAN, MASKED_MEAN), tmp_path)
    target, edit = dropped(source, tmp_path)
    assert all(check.passed for check in edit.check(source, target, {"ids": IDS, "mask": RIGHT}))


def test_sentences_of_padding_alone_are_computed_without_an_error(tmp_path: Path) -> None:
    source = saved(ENDINGS["each token"], tmp_path)
    target, _ = dropped(source, tmp_path)
    nothing = Session(target).run({"ids": IDS, "mask": np.zeros_like(RIGHT)})["logits"]
    assert nothing.shape == (3, 8, 3)
    assert not nothing.any()
    # The others do not feel it.
    one = RIGHT * np.array([[0], [1], [1]])
    feeds = {"ids": IDS, "mask": one}
    want, got = Session(source).run(feeds)["logits"], Session(target).run(feeds)["logits"]
    np.testing.assert_allclose(got[1], want[1], rtol=0, atol=tolerances.REORDERED * np.abs(want).max())


def test_what_stands_in_padded_places_never_matters(tmp_path: Path) -> None:
    target, _ = dropped(saved(ENDINGS["masked mean"], tmp_path), tmp_path)
    session = Session(target)
    one = session.run({"ids": IDS, "mask": LEFT})["logits"]
    other = session.run({"ids": np.where(LEFT != 0, IDS, 99), "mask": LEFT})["logits"]
    np.testing.assert_array_equal(one, other)


def test_integer_products_take_the_real_tokens(tmp_path: Path) -> None:
    source, target = saved(ENDINGS["masked mean"], tmp_path), tmp_path / "target.onnx"
    samples = Samples(({"ids": IDS, "mask": RIGHT},))
    apply(source, [DropPadding(), QuantizeDynamic()], target, samples=samples)
    found = optimized_operators(target)
    assert found.get("MatMulIntegerToFloat", 0) + found.get("DynamicQuantizeMatMul", 0) == 7
    assert not {"Gemm", "SkipLayerNormalization"} & set(found)


def test_static_integer_products_take_the_real_tokens_too(tmp_path: Path) -> None:
    source, target = saved(ENDINGS["masked mean"], tmp_path), tmp_path / "target.onnx"
    samples = Samples(({"ids": IDS, "mask": RIGHT},))
    apply(source, [DropPadding(), QuantizeStatic()], target, samples=samples)
    found = optimized_operators(target)
    assert found.get("QGemm") == 7, found
    assert "Gemm" not in found


@pytest.mark.parametrize(("split_heads", "transposes"), [(True, 0), (False, 4)])
def test_heads_are_split_and_joined_by_the_gathers_or_left_as_they_are(
    split_heads: bool, transposes: int, tmp_path: Path
) -> None:
    source, target = saved(ENDINGS["each token"], tmp_path), tmp_path / "target.onnx"
    (applied,) = apply(source, [DropPadding(split_heads=split_heads)], target)
    assert all(check.passed for check in applied.checks)
    model = files.load(target)
    # Keys are still turned for their product, which onnxruntime does inside of it.
    assert optimized_operators(target).get("Transpose", 0) == transposes
    assert {value.name for value in model.graph.outputs} == {"logits"}
    assert len(applied.plan["splits"]) == (3 if split_heads else 0)
    assert len(applied.plan["joins"]) == (1 if split_heads else 0)


REFUSED = {
    "a mean over padding": (MASKED, "ReduceMean 'mean' joins tokens without regard to the mask"),
    "a bias that hides too little": (
        graphs.ENCODER,
        "Softmax 'weights' joins tokens without regard to the mask",
    ),
    "scores without the mask": (
        MASKED.replace(SCORES, "[masked] sm = Identity (sc)"),
        "Softmax 'weights' joins tokens without regard to the mask",
    ),
    "a mask the wrong way round": (
        MASKED.replace("Sub (one, mw)", "Identity (mw)"),
        "Softmax 'weights' joins tokens without regard to the mask",
    ),
    "a mask of other keys": (
        MASKED.replace("Unsqueeze (mf, mask_axes)", "Unsqueeze (mf, query_axes)").replace(
            "int64[2] mask_axes = {1, 2}", "int64[2] mask_axes = {1, 2}, int64[2] query_axes = {1, 3}"
        ),
        "Softmax 'weights' joins tokens without regard to the mask",
    ),
    "the first token of causal attention": (CAUSAL.replace(MEAN, FIRST), "Gather 'first' takes the first token"),
    "the first token of attention in a window": (WINDOW.replace(MEAN, FIRST), "Gather 'first' takes the first token"),
    "the last token": (
        MASKED.replace(MEAN, FIRST).replace("int64 first = {0}", "int64 first = {-1}"),
        "Gather 'first' joins tokens without regard to the mask",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tokens_that_padding_could_change_are_refused(case: str, tmp_path: Path) -> None:
    text, reason = REFUSED[case]
    model = files.load(saved(text, tmp_path))
    with pytest.raises(UnsupportedModelError) as caught:
        DropPadding().plan(model, None, None)
    assert f"with 'mask' as the mask, {reason}" in str(caught.value)


def test_a_model_without_a_mask_or_of_an_old_opset_is_refused(tmp_path: Path) -> None:
    convolutions = files.load(graphs.save(graphs.build(graphs.CONV_CHAIN), tmp_path / "c.onnx"))
    with pytest.raises(UnsupportedModelError, match=r"drop-padding: got no input \[batch, tokens\] of free sizes"):
        DropPadding().plan(convolutions, None, None)
    old = files.load(graphs.save(graphs.build(graphs.OLD_INPUTS), tmp_path / "o.onnx"))
    with pytest.raises(UnsupportedModelError, match="drop-padding: got opset 9, expected opset 11 or later"):
        DropPadding().plan(old, None, None)


def test_the_oracle_sees_padded_places_that_are_not_zero(tmp_path: Path) -> None:
    source = saved(ENDINGS["each token"], tmp_path)
    target, edit = dropped(source, tmp_path)
    unfinished = files.load(source)
    PaddingDropped(edit.mask, edit.region, {})(unfinished)
    files.save(unfinished, target)
    assert not edit.check(source, target, {"ids": IDS, "mask": RIGHT})[0].passed
