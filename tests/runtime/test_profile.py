import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from onnx_lathe.runtime.errors import InputError, ModelFileError, TensorError
from onnx_lathe.runtime.profile import Operand, OperatorTime, optimized_operators, profile
from tests.graphs import HEADER, LINEAR, build, save, write

X = {"x": np.ones((2, 4), np.float32)}


def test_each_node_has_a_time_and_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    times = profile(write(tmp_path / "m.onnx", LINEAR), X, threads=1, runs=3)
    assert [(time.op_type, time.provider) for time in times] == [("Gemm", "cpu")]
    assert all(time.seconds > 0 for time in times)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_node_in_a_loop_adds_up(tmp_path: Path) -> None:
    text = """
        g (float[2] x) => (float[2] y) <int64 trips = {5}, bool go = {1}> {
          y = Loop (trips, go, x) <
            body = once (int64 i, bool c, float[2] a) => (bool d, float[2] b) { d = Identity(c) b = Exp(a) }
          >
        }
    """
    times = profile(write(tmp_path / "m.onnx", text), {"x": np.zeros(2, np.float32)}, runs=2)
    assert {"Loop", "Exp"} <= {time.op_type for time in times}


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", LINEAR)
    with pytest.raises(InputError, match="runs: got 0, expected at least 1"):
        profile(path, X, runs=0)
    with pytest.raises(TensorError, match="input 'x': got dtype float64, expected float32"):
        profile(path, {"x": np.ones((2, 4))})
    with pytest.raises(ModelFileError, match="got no such file"):
        optimized_operators(tmp_path / "absent.onnx")


def test_the_optimized_graph_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", LINEAR)
    assert optimized_operators(path) == {"Gemm": 1}
    assert optimized_operators(path, optimize=False) == {"MatMul": 1, "Add": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_integer_kernels_show_in_the_optimized_graph(tmp_path: Path) -> None:
    text = """
        g (float[n, 4] x) => (float[n, 2] y)
        <float s = {0.1}, uint8 z = {128}, float sw = {0.5}, int8 zw = {0}, int8[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}>
        {
          xq = QuantizeLinear (x, s, z)
          xr = DequantizeLinear (xq, s, z)
          wr = DequantizeLinear (w, sw, zw)
          p = MatMul (xr, wr)
          pq = QuantizeLinear (p, s, z)
          y = DequantizeLinear (pq, s, z)
        }
    """
    counted = optimized_operators(write(tmp_path / "m.onnx", text))
    assert counted == {"QuantizeLinear": 1, "QLinearMatMul": 1, "DequantizeLinear": 1}


def only(times: Sequence[OperatorTime], op_type: str) -> OperatorTime:
    (found,) = (time for time in times if time.op_type == op_type)
    return found


def test_a_node_has_the_shapes_and_bytes_of_what_it_reads_and_writes(tmp_path: Path) -> None:
    text = """
        g (float[n, 2, 6] x) => (float[n, 3, 4] y) <float[3, 2, 3] w, float[3] b> { y = Conv (x, w, b) }
    """
    path = save(build(text), tmp_path / "m.onnx")
    conv = only(profile(path, {"x": np.ones((5, 2, 6), np.float32)}, runs=2), "Conv")
    shapes = ((5, 2, 6), (3, 2, 3), (3,))
    assert conv.inputs == tuple(Operand("float32", shape) for shape in shapes)
    assert conv.outputs == (Operand("float32", (5, 3, 4)),)
    assert (conv.read_bytes, conv.written_bytes) == (4 * (60 + 18 + 3), 4 * 60)
    assert conv.executions == 1


def test_channels_that_blocks_pad_count_as_executed(tmp_path: Path) -> None:
    text = "g (float[n, 2, 4, 4] x) => (float[n, 3, 2, 2] y) <float[3, 2, 3, 3] w> { y = Conv (x, w) }"
    path = save(build(text), tmp_path / "m.onnx")
    conv = only(profile(path, {"x": np.ones((5, 2, 4, 4), np.float32)}, runs=2), "Conv")
    assert conv.inputs is not None
    assert conv.outputs is not None
    channels = conv.inputs[1].shape[0]
    assert channels in {3, 8, 16}, "as they are, or as wide as AVX2 and AVX-512 are"
    assert [operand.shape for operand in (conv.inputs[1], *conv.outputs)] == [
        (channels, 2, 3, 3),
        (5, channels, 2, 2),
    ]
    assert conv.written_bytes == 4 * 5 * channels * 4


def test_weights_that_kernels_repack_are_seen(tmp_path: Path) -> None:
    text = """
        g (uint8[n, 2, 4, 4] x) => (uint8[n, 3, 2, 2] y)
        <float s = {0.1}, uint8 z = {128}, int8 zw = {0}, int8[3, 2, 3, 3] w> {
          y = QLinearConv (x, s, z, w, s, zw, s, z)
        }
    """
    path = save(build(text), tmp_path / "m.onnx")
    conv = only(profile(path, {"x": np.ones((5, 2, 4, 4), np.uint8)}, runs=2), "QLinearConv")
    assert conv.inputs is not None
    assert conv.outputs is not None
    assert conv.inputs[3] == Operand("int8", (3, 2, 3, 3))
    assert [operand.dtype for operand in (*conv.inputs[:3], *conv.outputs)] == ["uint8", "float32", "uint8", "uint8"]
    assert (conv.read_bytes, conv.written_bytes) == (160 + 54 + 3 * 4 + 3, 60)


def test_a_fused_product_in_integers_has_the_weight_second(tmp_path: Path) -> None:
    text = """
        g (float[n, 4] x) => (float[n, 2] y) <float ws = {0.5}, int8 wz = {0}, int8[4, 2] w> {
          q, s, z = DynamicQuantizeLinear (x)
          p = MatMulInteger (q, w, z, wz)
          f = Cast <to = 1> (p)
          t = Mul (s, ws)
          y = Mul (f, t)
        }
    """
    path = save(build(text), tmp_path / "m.onnx")
    product = only(profile(path, {"x": np.ones((3, 4), np.float32)}, runs=2), "DynamicQuantizeMatMul")
    assert product.inputs is not None
    assert product.inputs[:2] == (Operand("float32", (3, 4)), Operand("int8", (4, 2)))
    assert product.outputs == (Operand("float32", (3, 2)),)


def test_executions_that_differ_have_bytes_and_no_shapes(tmp_path: Path) -> None:
    text = """
        g (float[2] x) => (float[m] y) <int64 trips = {3}, bool go = {1}> {
          y = Loop (trips, go, x) <
            body = once (int64 i, bool c, float[k] a) => (bool d, float[l] b) {
              d = Identity (c)
              e = Exp (x)
              b = Concat <axis = 0> (a, e)
            }
          >
        }
    """
    times = profile(write(tmp_path / "m.onnx", text), {"x": np.zeros(2, np.float32)}, runs=2)
    same, longer = only(times, "Exp"), only(times, "Concat")
    assert (same.executions, longer.executions) == (3, 3)
    assert (same.inputs, same.outputs) == ((Operand("float32", (2,)),),) * 2
    assert (same.read_bytes, same.written_bytes) == (3 * 8, 3 * 8)
    assert (longer.inputs, longer.outputs) == (None, None)
    assert (longer.read_bytes, longer.written_bytes) == (8 * (2 + 3 + 4), 8 * (2 + 3 + 4))


NBITS = """
g (float[1, 64] x) => (float[1, 8] y) <uint8[8, 2, 16] w, float[16] s> {{
  [packed] y = com.microsoft.MatMulNBits <K = 64, N = 8, bits = 4, block_size = 32{level}> (x, w, s)
}}
"""


@pytest.mark.parametrize(("spelled", "level"), [(", accuracy_level = 4", 4), (", accuracy_level = 1", 1), ("", 0)])
def test_packed_weights_tell_what_they_are_computed_in(spelled: str, level: int, tmp_path: Path) -> None:
    path = save(build(f"{HEADER}\n{NBITS.format(level=spelled)}"), tmp_path / "m.onnx")
    times = profile(path, {"x": np.ones((1, 64), np.float32)}, runs=1)
    assert only(times, "MatMulNBits").accuracy_level == level


def test_what_is_fused_to_packed_weights_is_computed_in_int8(tmp_path: Path) -> None:
    text = """
        g (float[1, 64] x) => (float[1, 32] y) <int4[64, 32] q, float[2, 32] s> {
          w = DequantizeLinear <axis = 0, block_size = 32> (q, s)
          y = MatMul (x, w)
        }
    """
    levels = onnx.helper.make_tensor("q", onnx.TensorProto.INT4, [64, 32], np.ones(64 * 32, np.int8))
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {text}')
    del model.graph.value_info[:]
    model.graph.initializer.extend([levels, onnx.numpy_helper.from_array(np.ones((2, 32), np.float32), "s")])
    times = profile(save(model, tmp_path / "m.onnx"), {"x": np.ones((1, 64), np.float32)}, runs=1)
    assert [(time.op_type, time.accuracy_level) for time in times] == [("MatMulNBits", 4)]
