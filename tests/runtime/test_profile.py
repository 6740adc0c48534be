import tempfile
from pathlib import Path

import numpy as np
import pytest

from onnx_lathe.runtime.errors import InputError, ModelFileError, TensorError
from onnx_lathe.runtime.profile import optimized_operators, profile
from tests.graphs import LINEAR, write

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
