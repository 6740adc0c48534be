from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_lathe.runtime.difference import GraphDifference, NodeChange, StoredForm, WeightChange, difference
from onnx_lathe.runtime.errors import ModelFileError
from tests.graphs import LINEAR, parse, write

UNNAMED = "g (float[2] x) => (float[2] y) { a = Relu(x) b = Abs(a) c = Neg(b) y = Exp(c) }"


def differ(folder: Path, before: str, after: str) -> GraphDifference:
    return difference(write(folder / "before.onnx", before), write(folder / "after.onnx", after))


def test_nothing_differs_from_itself(tmp_path: Path) -> None:
    found = differ(tmp_path, LINEAR, LINEAR)
    assert found.empty
    assert (found.nodes_kept, found.weights_kept) == (2, 2)
    assert (found.weight_bytes_before, found.weight_bytes_after) == (40, 40)


def test_a_quantized_product_is_found_again_with_its_weight(tmp_path: Path) -> None:
    quantized = """
        linear (float[batch, 4] x) => (float[batch, 2] y)
        <int8[4, 2] wq = {1, 2, 3, 4, 5, 6, 7, 8}, float s = {0.5}, float[2] b = {0.5, -0.5}>
        {
          q, xs, xz = DynamicQuantizeLinear(x)
          i = MatMulInteger(q, wq, xz)
          f = Cast <to = 1> (i)
          h = Mul(f, s)
          [sum] y = Add(h, b)
        }
    """
    found = differ(tmp_path, LINEAR, quantized)
    assert set(found.nodes) == {
        NodeChange("MatMul", "MatMulInteger", (), ("product",)),
        NodeChange(None, "DynamicQuantizeLinear", (), ("DynamicQuantizeLinear 0",)),
        NodeChange(None, "Cast", (), ("Cast 2",)),
        NodeChange(None, "Mul", (), ("Mul 3",)),
    }
    assert found.nodes_kept == 1
    assert found.weights == (
        WeightChange(StoredForm("float", (4, 2), 32), StoredForm("int8", (4, 2), 8), ("w",)),
        WeightChange(None, StoredForm("float", (), 4), ("s",)),
    )
    assert (found.operators_before, found.operators_after["MatMulInteger"]) == ({"MatMul": 1, "Add": 1}, 1)


def test_a_weight_behind_its_dequantization_is_the_same_weight(tmp_path: Path) -> None:
    qdq = """
        linear (float[batch, 4] x) => (float[batch, 2] y)
        <int8[4, 2] wq = {1, 2, 3, 4, 5, 6, 7, 8}, float s = {0.5}, float[2] b = {0.5, -0.5}>
        { wr = DequantizeLinear(wq, s) [product] h = MatMul(x, wr) [sum] y = Add(h, b) }
    """
    found = differ(tmp_path, LINEAR, qdq)
    assert NodeChange("MatMul", "MatMul", ("reads DequantizeLinear",), ("product",)) in found.nodes
    assert WeightChange(StoredForm("float", (4, 2), 32), StoredForm("int8", (4, 2), 8), ("w",)) in found.weights


def test_other_names_alone_are_no_difference(tmp_path: Path) -> None:
    renamed = "g (float[2] x) => (float[2] out) { p = Relu(x) q = Abs(p) r = Neg(q) out = Exp(r) }"
    found = differ(tmp_path, UNNAMED, renamed)
    assert found.empty
    assert found.nodes_kept == 4


def test_an_unnamed_node_that_is_gone_has_its_operator_and_number(tmp_path: Path) -> None:
    shorter = "g (float[2] x) => (float[2] y) { p = Relu(x) r = Neg(p) y = Exp(r) }"
    found = differ(tmp_path, UNNAMED, shorter)
    assert set(found.nodes) == {
        NodeChange("Abs", None, (), ("Abs 1",)),
        NodeChange("Neg", "Neg", ("reads Relu",), ("Neg 2",)),
    }


def test_attributes_count_unless_they_only_spell_out_the_default(tmp_path: Path) -> None:
    graph = "g (float[2, 2] x) => (float[2, 2] y) { [n] y = Gemm ATTRIBUTES (x, x) }"
    plain = graph.replace("ATTRIBUTES", "<alpha = 1.0>")
    assert differ(tmp_path, plain, graph.replace("ATTRIBUTES", "")).empty
    found = differ(tmp_path, plain, graph.replace("ATTRIBUTES", "<alpha = 2.0>"))
    assert found.nodes == (NodeChange("Gemm", "Gemm", ("attribute alpha",), ("n",)),)


def test_a_pruned_weight_has_another_shape_and_its_file_is_never_read(tmp_path: Path) -> None:
    paths: list[Path] = []
    for name, width in (("before", 512), ("after", 384)):
        model = parse(f"g (float[n, 256] x) => (float[n, {width}] y) {{ [p] y = MatMul(x, w) }}")
        model.graph.initializer.append(numpy_helper.from_array(np.ones((256, width), np.float32), "w"))
        paths.append(tmp_path / f"{name}.onnx")
        onnx.save(model, paths[-1], save_as_external_data=True, location=f"{name}.data", size_threshold=0)
        (tmp_path / f"{name}.data").chmod(0)
    found = difference(paths[0], paths[1], ("dense", "pruned"))
    assert (found.before, found.after, found.nodes) == ("dense", "pruned", ())
    shapes = StoredForm("float", (256, 512), 524_288), StoredForm("float", (256, 384), 393_216)
    assert found.weights == (WeightChange(*shapes, ("w",)),)


def test_nodes_inside_a_branch_are_compared_too(tmp_path: Path) -> None:
    text = """
        g (bool c, float[2] x) => (float[2] y) {
          [choice] y = If (c) <
            then_branch = a () => (float[2] t) { [inner] t = OPERATOR(x) },
            else_branch = b () => (float[2] e) { [other] e = Neg(x) }
          >
        }
    """
    found = differ(tmp_path, text.replace("OPERATOR", "Relu"), text.replace("OPERATOR", "Abs"))
    assert found.nodes == (NodeChange("Relu", "Abs", (), ("inner",)),)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="got no such file"):
        difference(write(tmp_path / "m.onnx", LINEAR), tmp_path / "absent.onnx")
