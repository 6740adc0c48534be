"""Bounds of values: what is proven of masks, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.fuse.intervals import Interval, interval
from tests import graphs

INFINITY = float("inf")
LOWEST = -3.4028234663852886e38
HEADER = """bounds (bool[N] flag, int64[N] number, float[N] real) => (float[N] out)
<float none = {0.0}, float low = {-3.4028234663852886e38}, float[1] never = {-inf}, float one = {1.0},
 int64 zero = {0}, int64 step = {1}, int64 limit = {9}, bool yes = {1}>
"""


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("v = Where (flag, none, low)", Interval(LOWEST, 0.0)),
        ("v = Where (flag, none, never)", Interval(-INFINITY, 0.0)),
        ("a = Where (flag, none, low) v = Add (a, a)", Interval(-INFINITY, 0.0)),
        ("v = Where (yes, one, low)", Interval(1.0, 1.0)),
        ("n = Shape (flag) m = Squeeze (n) r = Range (zero, m, step) v = GreaterOrEqual (r, zero)", Interval(1.0, 1.0)),
        ("r = Abs (number) v = LessOrEqual (r, limit)", Interval(0.0, 1.0)),
        ("f = Cast <to = 1> (flag) s = Sub (one, f) v = Mul (s, low)", Interval(LOWEST, 0.0)),
        ("f = Cast <to = 1> (number) v = Mul (f, low)", Interval(-INFINITY, INFINITY)),
        ("v = Add (real, none)", None),
        ("n = Not (flag) v = And (n, yes)", Interval(0.0, 1.0)),
        ("f = Cast <to = 1> (number) v = Cast <to = 9> (f)", Interval(0.0, 1.0)),
    ],
)
def test_bounds_follow_from_the_operators(nodes: str, expected: Interval | None, tmp_path: Path) -> None:
    text = f"{HEADER}{{\n{nodes}\nlast = Cast <to = 1> (v)\nout = Add (last, real)\n}}"
    model = files.load(graphs.save(graphs.build(text), tmp_path / "m.onnx"))
    value = next(node.outputs[0] for node in model.graph if node.outputs[0].name == "v")
    assert interval(value) == expected
