import io
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from rich.console import Console

from onnx_lathe.benchmarks.peaks import Peaks
from onnx_lathe.converter import inspect as inspecting
from onnx_lathe.converter.inspect import inspect, lines, table
from onnx_lathe.runtime.errors import TensorError
from tests import graphs

PEAKS = Peaks(
    2, {"float32": 1e9, "elementwise": 1e9}, {1024: 1e9}, node_seconds=1e-6, fork_seconds=0.0, call_seconds=1e-5
)


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspecting, "measure_peaks", lambda threads: PEAKS)


def told(path: Path, latency: bool = True, **dims: int) -> str:
    return "\n".join(lines(inspect(path, dims=dims, latency=latency)))


def test_all_that_is_known_is_told(tmp_path: Path) -> None:
    path = graphs.write(tmp_path / "m.onnx", graphs.LINEAR)
    text = told(path, batch=3)
    assert "10 parameters" in text
    assert "weights: 40 bytes float32" in text
    assert "shapes: batch 3\n" in text
    assert "24 MACs, 48 FLOP in convolutions and matrix products; element by element work is not counted" in text
    assert "memory: about 10 MiB to load (besides onnxruntime's libraries); to run, 96 bytes of activations" in text
    assert "latency: about 0.0122 ms a call on this CPU with 2 threads, estimated" in text
    assert "on a quiet machine within a factor of" in text


def test_sizes_that_nobody_gave_are_told(tmp_path: Path) -> None:
    path = graphs.write(tmp_path / "m.onnx", graphs.LINEAR)
    assert "shapes: batch 1; assumed, --dims batch=SIZE sets them" in told(path)
    assert inspect(path).assumed == {"batch": 1}
    with pytest.raises(TensorError, match="Did you mean 'batch'"):
        inspect(path, dims={"bacth": 1})


def test_a_dimension_without_a_name_is_told(tmp_path: Path) -> None:
    path = graphs.write(tmp_path / "m.onnx", "g (float[?, 4] x) => (float[?, 4] y) { y = Relu (x) }")
    assert "input 'x' has a dimension without a name: [None, 4]; export the model with named dimensions" in told(path)


def test_shapes_that_depend_on_values_leave_a_lower_bound(tmp_path: Path) -> None:
    text = told(
        graphs.write(
            tmp_path / "m.onnx",
            """g (float[n, 4] x, bool[n] keep) => (float[] y) {
              a = Abs (x)
              [cut] s = Compress <axis = 0> (a, keep)
              y = Einsum <equation = "ij,kj->ik"> (s, x)
            }""",
        )
    )
    assert "they depend on values at cut (Compress)" in text
    assert "arithmetic: unknown in convolutions" in text
    assert "unknown arithmetic: 1 Einsum" in text
    assert "to run, unknown" in text
    assert "latency: at least" in text
    assert "without 2 nodes of unknown shapes or arithmetic: cut (Compress), Einsum_2 (Einsum)" in text


def test_without_an_estimate_the_machine_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(inspecting, "measure_peaks")
    path = graphs.write(tmp_path / "m.onnx", graphs.LINEAR)
    assert "latency" not in told(path, latency=False)


def test_operators_are_added_up(tmp_path: Path) -> None:
    made = inspect(graphs.save(graphs.build(graphs.PERCEPTRON), tmp_path / "m.onnx")).estimate
    assert made is not None
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(table(made))
    text = console.export_text()
    assert "Gemm" in text
    assert "overhead" in text
    assert "fused" not in text


def test_weights_beside_the_model_are_not_read(tmp_path: Path) -> None:
    rows = 2**20
    model = graphs.parse(f"g (float[n, 1024] x) => (float[n, {rows}] y) {{ y = MatMul (x, w) }}")
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1024, rows])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.data")
    model.graph.initializer.append(tensor)
    onnx.save(model, tmp_path / "m.onnx")
    with (tmp_path / "w.data").open("wb") as file:
        file.truncate(4 * 1024 * rows)  # 4 GiB that take no room
    found = inspect(tmp_path / "m.onnx")
    assert found.needs.load_bytes > 2 * 2**32
    assert found.estimate is not None
    assert np.isclose(found.estimate.seconds, 2**32 / 1e9 + 2**30 / 1e9, rtol=0.01)
