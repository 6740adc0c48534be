from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_lathe.runtime.facts import read_facts
from onnx_lathe.runtime.needs import SESSION_BYTES, needs
from tests.graphs import LINEAR, parse, write

CHAIN = """
chain (float[n, 100] x) => (float[n, 100] y) {
  a = Abs (x)
  b = Neg (a)
  c = Concat <axis = 1> (a, b)
  d = Sqrt (c)
  s = ReduceSum <keepdims = 1> (d)
  y = Add (x, s)
}
"""


def test_a_linear_layer_in_numbers(tmp_path: Path) -> None:
    needed = needs(read_facts(write(tmp_path / "m.onnx", LINEAR), {"batch": 3}))
    assert (needed.flops, needed.not_counted, needed.unknown) == (2 * 3 * 4 * 2, {}, None)
    assert needed.load_bytes == SESSION_BYTES + 40 + 32
    assert needed.run_bytes == 48 + 24 + 24


def test_activations_live_from_their_writer_to_their_last_reader(tmp_path: Path) -> None:
    row = 3 * 100 * 4
    needed = needs(read_facts(write(tmp_path / "m.onnx", CHAIN), {"n": 3}))
    assert needed.run_bytes == row + 2 * row + 2 * row  # x is the caller's and stays; c and d while Sqrt runs


def test_weights_of_convolutions_count_twice(tmp_path: Path) -> None:
    model = parse("g (float[1, 4, 8, 8] x) => (float[1, 6, 6, 6] y) { y = Conv (x, w) }")
    model.graph.initializer.append(numpy_helper.from_array(np.ones((6, 4, 3, 3), np.float32), "w"))
    onnx.save(model, tmp_path / "m.onnx")
    weights = 4 * 6 * 4 * 9
    assert needs(read_facts(tmp_path / "m.onnx")).load_bytes == SESSION_BYTES + 3 * weights


def test_what_is_unknown_is_named(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.onnx",
        """g (float[n, 4] x, bool[n] keep) => (float[] y) {
          [cut] s = Compress <axis = 0> (x, keep)
          y = Einsum <equation = "ij,kj->ik"> (s, x)
        }""",
    )
    needed = needs(read_facts(path))
    assert (needed.flops, needed.run_bytes, needed.unknown) == (None, None, "cut (Compress)")
    assert needed.not_counted == {"Einsum": 1}
