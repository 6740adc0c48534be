"""Repeated blocks: which are found, and that what is left computes what a network of so many blocks does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.blocks import Blocks, find_blocks, write_shortened
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.session import Session
from tests import graphs

BLOCK = """
  m{0} = MatMul (x{0}, w{0})
  r{0} = Relu (m{0})
  x{1} = Add (x{0}, r{0})
"""


def network(count: int, block: str = BLOCK, inputs: str = "", outputs: str = "", tail: str = "y = Tanh (x{0})") -> str:
    """Return a network of ``count`` blocks; ``{0}`` is the number of a block and ``{1}`` the next one."""
    numbers = range(count)
    weights = ", ".join(f"float[4, 4] w{number}" for number in numbers)
    given = "".join(inputs.format(number, number + 1) for number in numbers)
    kept = "".join(outputs.format(number, number + 1) for number in numbers)
    body = "".join(block.format(number, number + 1) for number in numbers)
    return f"""
    deep (float[n, 4] x{given}) => (float[n, 4] y{kept})
    <{weights}>
    {{
      x0 = Neg (x)
      {body}
      {tail.format(count)}
    }}
    """


def saved(text: str, path: Path) -> Path:
    return graphs.save(graphs.build(text), path)


def blocks_of(text: str) -> Blocks | None:
    return find_blocks(ir.serde.deserialize_model(graphs.build(text)).graph)


def test_the_blocks_that_are_left_compute_as_a_network_of_so_many(tmp_path: Path) -> None:
    deep, short = saved(network(6), tmp_path / "deep.onnx"), tmp_path / "short.onnx"
    share = write_shortened(deep, short)
    assert share == pytest.approx((1 + 2 * 3 + 1) / (1 + 6 * 3 + 1))
    wanted = files.load(saved(network(2), tmp_path / "two.onnx"))
    for name, value in files.load(deep).graph.initializers.items():
        if name in wanted.graph.initializers:
            wanted.graph.initializers[name].const_value = value.const_value
    files.save(wanted, tmp_path / "two.onnx")
    assert set(files.load(short).graph.initializers) == {"w0", "w1"}
    feeds = tensors.random_feeds(deep)
    got, want = (Session(path).run(feeds)["y"] for path in (short, tmp_path / "two.onnx"))
    np.testing.assert_array_equal(got, want)


def test_the_last_block_may_be_the_output_and_keeps_its_name(tmp_path: Path) -> None:
    text = network(5, tail="").replace("x5", "y").replace("float[n, 4] y0", "float[n, 4] y")
    deep, short = saved(text, tmp_path / "deep.onnx"), tmp_path / "short.onnx"
    assert write_shortened(deep, short) is not None
    outputs = files.load(short).graph.outputs
    assert [(value.name, str(value.shape)) for value in outputs] == [("y", "[n,4]")]
    assert Session(short).run(tensors.random_feeds(short))["y"].shape[1] == 4


def test_caches_of_removed_blocks_go(tmp_path: Path) -> None:
    block = """
      p{0} = Add (x{0}, past{0})
      m{0} = MatMul (p{0}, w{0})
      now{0} = Relu (m{0})
      x{1} = Add (x{0}, now{0})
    """
    text = network(4, block, inputs=", float[n, 4] past{0}", outputs=", float[n, 4] now{0}")
    deep, short = saved(text, tmp_path / "deep.onnx"), tmp_path / "short.onnx"
    assert write_shortened(deep, short) is not None
    graph = files.load(short).graph
    assert [value.name for value in graph.inputs] == ["x", "past0", "past1"]
    assert [value.name for value in graph.outputs] == ["y", "now0", "now1"]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_blocks_are_left_alone(count: int, tmp_path: Path) -> None:
    target = tmp_path / "short.onnx"
    assert write_shortened(saved(network(count), tmp_path / "deep.onnx"), target) is None
    assert not target.exists()


def test_a_first_block_of_another_kind_stands_before() -> None:
    text = network(5).replace("r0 = Relu", "r0 = Sigmoid")
    # A block may begin at any of its nodes: the earliest is the Add of the first one.
    assert blocks_of(text) == Blocks(start=3, period=3, count=4)


def test_blocks_of_another_width_are_others() -> None:
    text = (
        network(5)
        .replace("float[4, 4] w2", "float[4, 8] w2, float[8, 4] v2")
        .replace("m2 = MatMul (x2, w2)", "u2 = MatMul (x2, w2)\n m2 = MatMul (u2, v2)")
    )
    assert blocks_of(text) is None


def test_what_reads_an_inner_block_from_outside_forbids() -> None:
    assert blocks_of(network(5, tail="z = Add (x3, x{0})\n y = Tanh (z)")) is None


def test_blocks_that_read_two_back_go_in_pairs() -> None:
    back = "m{0} = MatMul (x{0}, w{0})\n r{0} = Relu (m{0})\n b{0} = Add (x{0}, r{0})\n"
    lines = [
        back.format(number) + f"x{number + 1} = Add (b{number}, {f'b{number - 2}' if number > 1 else 'x0'})"
        for number in range(6)
    ]
    text = network(6, block="").replace("y = Tanh", "\n".join(lines) + "\n y = Tanh")
    assert blocks_of(text) == Blocks(start=1, period=8, count=3)


def test_shapes_that_differ_are_no_repetition() -> None:
    constants = "".join(f", int64[2] s{number} = {{{-1 if number % 2 else 0}, 4}}" for number in range(5))
    text = network(5).replace("float[4, 4] w4>", "float[4, 4] w4" + constants + ">")
    for number in range(5):
        text = text.replace(f"r{number} = Relu (m{number})", f"r{number} = Reshape (m{number}, s{number})")
    assert blocks_of(text) is None
