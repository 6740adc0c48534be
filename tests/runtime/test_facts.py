from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_lathe.runtime.errors import ModelFileError, TensorError
from onnx_lathe.runtime.facts import NodeFacts, read_facts
from tests.graphs import HEADER, LINEAR, parse, write


def with_weights(model: onnx.ModelProto, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    """Add float32 initializers of ones."""
    model.graph.initializer.extend(
        numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in shapes.items()
    )
    return model


def save(folder: Path, model: onnx.ModelProto) -> Path:
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def test_a_linear_layer_in_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", LINEAR)
    facts = read_facts(path, {"batch": 3})
    assert facts.parameters == 4 * 2 + 2
    assert facts.file_bytes == path.stat().st_size
    assert (facts.opset, facts.operators, facts.dims) == (20, {"MatMul": 1, "Add": 1}, {"batch": 3})
    assert facts.macs == 3 * 4 * 2
    assert facts.nodes == (
        NodeFacts("product", "MatMul", 24, 32, 3 * 4 * 4 + 3 * 2 * 4, "float32", 4, reads=("x",), writes=("h",)),
        NodeFacts("sum", "Add", 0, 8, 2 * 3 * 2 * 4, "float32", 0, reads=("h",), writes=("y",)),
    )
    assert facts.weights == {"float32": 40}
    assert facts.activations == {"x": 48, "h": 24, "y": 24}
    assert [(spec.name, spec.shape) for spec in (*facts.inputs, *facts.outputs)] == [
        ("x", ("batch", 4)),
        ("y", ("batch", 2)),
    ]


@pytest.mark.parametrize(
    ("body", "x", "shapes", "macs"),
    [
        ("y = Conv <pads = [1, 1, 1, 1]> (x, w)", "2, 4, 8, 8", {"w": (6, 4, 3, 3)}, 2 * 6 * 64 * 4 * 9),
        ("y = Conv <group = 4, strides = [2, 2]> (x, w)", "1, 4, 9, 9", {"w": (8, 1, 3, 3)}, 8 * 16 * 9),
        ("y = Conv (x, w, b)", "1, 4, 9", {"w": (5, 4, 2), "b": (5,)}, 5 * 8 * 4 * 2),
        ("y = ConvTranspose <strides = [2, 2]> (x, w)", "1, 4, 5, 5", {"w": (4, 3, 2, 2)}, 4 * 25 * 3 * 4),
        ("y = Gemm <transB = 1> (x, w, b)", "7, 4", {"w": (3, 4), "b": (3,)}, 7 * 4 * 3),
        ("y = Gemm <transA = 1> (x, w)", "4, 7", {"w": (4, 3)}, 7 * 4 * 3),
        ("y = MatMul (x, w)", "2, 5, 7, 4", {"w": (4, 3)}, 2 * 5 * 7 * 4 * 3),
        ("y = MatMul (x, w)", "2, 7, 4", {"w": (2, 4, 3)}, 2 * 7 * 4 * 3),
        ("y = MatMul (x, w)", "4", {"w": (4,)}, 4),
        ("t = Transpose <perm = [0, 2, 1]> (x) y = MatMul (x, t)", "2, 7, 4", {}, 2 * 7 * 4 * 7),
        ("y = Relu (x)", "2, 7, 4", {}, 0),
        ('y = Einsum <equation = "ij,jk->ik"> (x, w)', "7, 4", {"w": (4, 3)}, None),
    ],
)
def test_multiply_accumulates_by_hand(
    tmp_path: Path, body: str, x: str, shapes: dict[str, tuple[int, ...]], macs: int | None
) -> None:
    model = with_weights(parse(f"g (float[{x}] x) => (float[] y) {{ {body} }}"), **shapes)
    facts = read_facts(save(tmp_path, model))
    assert facts.macs == macs
    assert facts.parameters == sum(int(np.prod(shape)) for shape in shapes.values())


CONV = """
conv (float[n, 4, 8, 8] x) => (float[n, 6, 6, 6] y) {
  c = Conv <kernel_shape = [3, 3]> (x, w, b)
  y = Relu (c)
}
"""
CONV_QDQ = """
conv (float[n, 4, 8, 8] x) => (float[n, 6, 6, 6] y)
<float s = {0.1}, uint8 z = {128}, int8 zw = {0}, int32 zb = {0}> {
  [qx] xq = QuantizeLinear (x, s, z)
  [dqx] xr = DequantizeLinear (xq, s, z)
  [dqw] wr = DequantizeLinear (w, s, zw)
  [dqb] br = DequantizeLinear (b, s, zb)
  [conv] c = Conv <kernel_shape = [3, 3]> (xr, wr, br)
  [qc] cq = QuantizeLinear (c, s, z)
  [dqc] cr = DequantizeLinear (cq, s, z)
  [relu] y = Relu (cr)
}
"""
CONV_OPERATORS = """
conv (uint8[n, 4, 8, 8] x) => (float[n, 6, 6, 6] y)
<float s = {0.1}, uint8 z = {128}, int8 zw = {0}> {
  q = QLinearConv (x, s, z, w, s, zw, s, z, b)
  y = DequantizeLinear (q, s, z)
}
"""


def integer_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.initializer.extend(
        (
            numpy_helper.from_array(np.ones((6, 4, 3, 3), np.int8), "w"),
            numpy_helper.from_array(np.ones(6, np.int32), "b"),
        )
    )
    return model


def test_quantized_forms_count_as_their_float_form(tmp_path: Path) -> None:
    plain = read_facts(save(tmp_path, with_weights(parse(CONV), w=(6, 4, 3, 3), b=(6,))))
    assert (plain.parameters, plain.macs) == (222, 6 * 36 * 36)
    qdq = read_facts(save(tmp_path, integer_weights(parse(CONV_QDQ))))
    assert (qdq.parameters, qdq.macs) == (plain.parameters, plain.macs)
    operators = read_facts(save(tmp_path, integer_weights(parse(CONV_OPERATORS))))
    assert (operators.parameters, operators.macs) == (plain.parameters, plain.macs)


def test_a_node_between_quantizations_works_on_what_is_stored(tmp_path: Path) -> None:
    by_name = {node.name: node for node in read_facts(save(tmp_path, integer_weights(parse(CONV_QDQ)))).nodes}
    assert by_name["conv"].dtype == "uint8"
    assert by_name["conv"].weight_bytes == 6 * 4 * 9 + 6 * 4
    assert by_name["conv"].activation_bytes == 4 * 64 + 6 * 36
    assert (by_name["conv"].reads, by_name["conv"].writes, by_name["conv"].summed) == (("xq",), ("cq",), 36)
    assert {name: by_name[name].activation_bytes for name in ("dqx", "dqw", "dqb", "qc", "dqc")} == dict.fromkeys(
        ("dqx", "dqw", "dqb", "qc", "dqc"), 0
    )
    assert by_name["qx"].activation_bytes == 4 * 64 * (4 + 1)
    assert by_name["relu"].activation_bytes == 6 * 36 * (1 + 4)


def test_the_dynamic_form_counts_as_its_float_form(tmp_path: Path) -> None:
    model = parse("""
        g (float[n, 4] x) => (float[n, 3] y) <float sw = {0.1}, int8 zw = {0}> {
          q, s, z = DynamicQuantizeLinear (x)
          p = MatMulInteger (q, w, z, zw)
          f = Cast <to = 1> (p)
          both = Mul (s, sw)
          y = Mul (f, both)
        }
    """)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((4, 3), np.int8), "w"))
    facts = read_facts(save(tmp_path, model), {"n": 5})
    assert (facts.parameters, facts.macs) == (12, 5 * 4 * 3)
    assert facts.nodes[1].dtype == "uint8"


def test_packed_four_bit_weights_count_as_what_they_stand_for(tmp_path: Path) -> None:
    model = parse("""
        g (float[n, 64] x) => (float[n, 8] y) {
          y = com.microsoft.MatMulNBits <K = 64, N = 8, bits = 4, block_size = 32> (x, w, s)
        }
    """)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((8, 2, 16), np.uint8), "w"))
    facts = read_facts(save(tmp_path, with_weights(model, s=(16,))), {"n": 5})
    assert (facts.parameters, facts.macs) == (64 * 8, 5 * 64 * 8)
    assert facts.nodes[0].weight_bytes == 64 * 8 // 2 + 16 * 4


def test_shapes_that_the_model_computes_are_followed(tmp_path: Path) -> None:
    model = with_weights(
        parse("""
            g (float[batch, seq, 6] x) => (float[] y) {
              shape = Shape (x)
              axis = Constant <value = int64 {1}> ()
              rows = Gather (shape, axis)
              zero = Constant <value = int64 {0}> ()
              one = Constant <value = int64 {1}> ()
              two = Constant <value = int64[1] {2}> ()
              half = Div (rows, one)
              places = Range (zero, half, one)
              table = Gather (words, places)
              first = Shape <end = 2> (x)
              heads = Concat <axis = 0> (first, two, rest)
              split = Reshape (x, heads)
              sum = Add (x, table)
              y = MatMul (sum, w)
            }
        """),
        words=(32, 6),
        w=(6, 5),
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array([3]), "rest"))
    facts = read_facts(save(tmp_path, model), {"batch": 2, "seq": 9})
    assert facts.macs == 2 * 9 * 6 * 5
    assert all(node.activation_bytes is not None for node in facts.nodes)
    assert facts.parameters == 32 * 6 + 6 * 5


def test_a_shape_that_depends_on_values_makes_the_sum_unknown(tmp_path: Path) -> None:
    model = with_weights(
        parse("g (float[n, 4] x, bool[n] keep) => (float[] y) { s = Compress <axis = 0> (x, keep) y = MatMul (s, w) }"),
        w=(4, 3),
    )
    facts = read_facts(save(tmp_path, model))
    assert facts.macs is None
    assert facts.nodes[1] == NodeFacts("MatMul_1", "MatMul", None, 48, None, "float32", 4, ("s",), ("y",))
    assert facts.activations == {"x": 16, "keep": 1, "s": None, "y": None}


def test_branches_and_functions_are_counted(tmp_path: Path) -> None:
    model = parse(
        """
        g (bool c, float[2] x) => (float[2] y) {
          t = my.twice (x)
          y = If (c) <
            then_branch = then () => (float[2] a) { w = Constant <value = float[2] {1, 2}> () a = Add(t, w) },
            else_branch = other () => (float[2] b) { b = Neg(t) }
          >
        }
        <domain: "my", opset_import: ["": 20]>
        twice (v) => (r) { w = Constant <value = float[2] {1, 2}> () r = Mul(v, w) }
        """,
        HEADER.replace("]>", ', "my": 1]>'),
    )
    facts = read_facts(save(tmp_path, model))
    assert facts.operators == {"Constant": 2, "Mul": 1, "If": 1, "Add": 1, "Neg": 1}
    assert facts.parameters == 4
    assert facts.macs is None


def test_weights_beside_the_model_are_counted_and_not_read(tmp_path: Path) -> None:
    rows = 2**20
    model = parse(f"g (float[n, 1024] x) => (float[n, {rows}] y) {{ y = MatMul (x, w) }}")
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1024, rows])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.data")
    model.graph.initializer.append(tensor)
    path = save(tmp_path, model)
    with (tmp_path / "w.data").open("wb") as file:
        file.truncate(4 * 1024 * rows)  # 4 GiB that take no room
    facts = read_facts(path)
    assert facts.parameters == facts.macs == 2**30
    assert facts.file_bytes == path.stat().st_size + 2**32
    assert facts.nodes[0].weight_bytes == 2**32


def test_small_constants_beside_the_model_are_read_for_their_shapes(tmp_path: Path) -> None:
    model = with_weights(
        parse("g (float[n, 8] x) => (float[] y) { r = Reshape (x, shape) y = MatMul (r, w) }"), w=(4, 3)
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 2, 4]), "shape"))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
    assert read_facts(tmp_path / "m.onnx", {"n": 5}).macs == 5 * 2 * 4 * 3


def test_masks_indices_and_scalars_are_no_parameters(tmp_path: Path) -> None:
    model = parse(LINEAR)
    for name, kind, dims in (
        ("mask", TensorProto.BOOL, [9]),
        ("rows", TensorProto.INT64, [9]),
        ("half", TensorProto.FLOAT, []),
    ):
        model.graph.initializer.append(helper.make_tensor(name, kind, dims, [1] * (dims[0] if dims else 1)))
    assert read_facts(save(tmp_path, model)).parameters == 10


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", LINEAR)
    with pytest.raises(
        TensorError, match=r"dimension 'bach': got an unknown dimension, expected one of batch. Did you mean"
    ):
        read_facts(path, {"bach": 1})
    write(path, LINEAR, '<ir_version: 10, opset_import: ["other": 1]>')
    with pytest.raises(ModelFileError, match=r"m.onnx: got a graph that onnx refuses: .*No opset import for domain"):
        read_facts(path)


def test_a_graph_that_reference_operators_cannot_run_stays_unknown(tmp_path: Path) -> None:
    model = parse("""
        g (float[n, 4] x, bool[n] keep) => (float[] y) {
          s = Shape (x)
          far = Constant <value = int64 {9}> ()
          bad = Gather (s, far)
          y = Compress <axis = 0> (x, keep)
        }
    """)
    facts = read_facts(save(tmp_path, model))
    assert facts.macs == 0
    assert facts.nodes[3].activation_bytes is None
