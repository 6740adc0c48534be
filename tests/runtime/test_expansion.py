"""Sizes that a graph asks for by its constants: what is refused before anything runs, and what honest models do."""

from pathlib import Path

import onnx
import pytest

from onnx_lathe.runtime.errors import ModelFileError
from onnx_lathe.runtime.loading import check_model_file
from tests.graphs import parse, write

ASKS_FOR_TOO_MUCH = {
    "ConstantOfShape": "h = ConstantOfShape (big) y = ReduceSum <keepdims = 0> (h)",
    "Expand": "h = Expand (x, big) y = ReduceSum <keepdims = 0> (h)",
    "Tile": "h = Tile (x, big) y = ReduceSum <keepdims = 0> (h)",
    "Range": "h = Range (zero, huge, one) c = Cast <to = 1> (h) y = ReduceSum <keepdims = 0> (c)",
    "Pad": "h = Pad (x, big) y = ReduceSum <keepdims = 0> (h)",
    "RandomNormal": "h = RandomNormal <shape = [1048576, 1048576]> () y = ReduceSum <keepdims = 0> (h)",
}


@pytest.mark.parametrize("operator", ASKS_FOR_TOO_MUCH)
def test_a_few_bytes_that_ask_for_terabytes_are_refused(operator: str, tmp_path: Path) -> None:
    text = f"""
    g (float[1] x) => (float y)
    <int64[2] big = {{1099511627776, 1048576}}, int64 zero = {{0}}, int64 huge = {{1099511627776}}, int64 one = {{1}}>
    {{ {ASKS_FOR_TOO_MUCH[operator]} }}
    """
    path = write(tmp_path / "m.onnx", text)
    with pytest.raises(
        ModelFileError, match=rf"\({operator}\): got constants that ask for \d+ elements, expected at m"
    ):
        check_model_file(path)


def test_a_constant_node_and_a_branch_are_looked_into(tmp_path: Path) -> None:
    text = """
    g (bool c) => (float[a, b] y)
    {
      y = If (c) <
        then_branch = t () => (float[a, b] p) {
          s = Constant <value_ints = [1048576, 1048576]> ()
          p = ConstantOfShape (s)
        },
        else_branch = e () => (float[a, b] q) { r = Constant <value_ints = [1, 1]> () q = ConstantOfShape (r) }
      >
    }
    """
    with pytest.raises(ModelFileError, match=r"ConstantOfShape\): got constants that ask for 1099511627776 elements"):
        check_model_file(write(tmp_path / "m.onnx", text))


def test_declared_dimensions_that_overflow_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", "g (float[4294967296, 4294967296] x) => (float[n] y) { y = Flatten (x) }")
    with pytest.raises(ModelFileError, match=r"'x': got dimensions \[4294967296, 4294967296\], expected none negative"):
        check_model_file(path)


def test_what_models_ask_for_passes(tmp_path: Path) -> None:
    text = """
    g (float[n, 4] x) => (float[n, 8] y)
    <int64[2] repeats = {1, 2}, int64[2] shape = {-1, 8}, int64[4] pads = {0, 0, 0, 0}, int64[2] same = {0, 0}>
    { t = Tile (x, repeats) r = Reshape (t, shape) p = Pad (r, pads) y = Reshape (p, same) }
    """
    check_model_file(write(tmp_path / "m.onnx", text))


def with_functions(calls: dict[str, list[str]], path: Path) -> Path:
    """Write a model of functions that call others by name; one that calls none is a Relu."""
    model = parse("g (float[n] x) => (float[n] y) { y = Relu (x) }")
    model.graph.node[0].op_type, model.graph.node[0].domain = next(iter(calls)), "own"
    model.opset_import.add(domain="own", version=1)
    for name, called in calls.items():
        nodes, value = [], "a"
        for number, inner in enumerate(called or ["Relu"]):
            nodes.append(onnx.helper.make_node(inner, [value], [f"{number}"], domain="own" if called else ""))
            value = f"{number}"
        imports = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("own", 1)]
        model.functions.append(onnx.helper.make_function("own", name, ["a"], [value], nodes, imports))
    onnx.save(model, path)
    return path


def test_functions_that_grow_exponentially_are_refused(tmp_path: Path) -> None:
    calls = {f"f{level}": [f"f{level + 1}"] * 2 for level in range(30)} | {"f30": []}
    with pytest.raises(ModelFileError, match=r"m.onnx: got functions that come to 1073741824 nodes, expected at most"):
        check_model_file(with_functions(calls, tmp_path / "m.onnx"))
    check_model_file(with_functions({"f0": ["f1", "f1"], "f1": []}, tmp_path / "few.onnx"))


def test_a_function_that_calls_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ModelFileError, match=r"function 'f0': got a function that calls itself, expected none that does"
    ):
        check_model_file(with_functions({"f0": ["f1"], "f1": ["f0"]}, tmp_path / "m.onnx"))


def test_graphs_nested_without_end_are_refused(tmp_path: Path) -> None:
    graph = parse("g (bool c, float[n] x) => (float[n] y) { y = Relu (x) }").graph.SerializeToString()

    def field(number: int, content: bytes) -> bytes:
        size, length = b"", len(content)
        while length >= 0x80:
            size, length = size + bytes([length & 0x7F | 0x80]), length >> 7
        return bytes([number << 3 | 2]) + size + bytes([length]) + content

    for _ in range(200):
        attribute = field(1, b"then_branch") + field(6, graph) + b"\xa0\x01\x05"
        graph = field(1, field(1, b"c") + field(2, b"y") + field(4, b"If") + field(5, attribute)) + field(
            12, field(1, b"y")
        )
    (tmp_path / "m.onnx").write_bytes(b"\x08\x0a" + field(7, graph))
    with pytest.raises(ModelFileError, match="got bytes that are not ONNX"):
        check_model_file(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "body",
    [
        "h = Constant <value_int = 1099511627776> () r = Range (zero, h, one) c = Cast <to = 1> (r) y = ReduceSum (c)",
        "r = Resize (x, , scales) y = ReduceSum (r)",
        "r = HannWindow (huge) y = ReduceSum (r)",
    ],
)
def test_other_ways_to_spell_a_size_are_read(body: str, tmp_path: Path) -> None:
    text = f"""
    g (float[1, 1, 1, 1] x) => (float[n] y)
    <int64 zero = {{0}}, int64 one = {{1}}, int64 huge = {{1099511627776}}, float[4] scales = {{1, 1, 1e6, 1e6}}>
    {{ {body} }}
    """
    with pytest.raises(ModelFileError, match="got constants that ask for 10"):
        check_model_file(write(tmp_path / "m.onnx", text))


def test_a_long_chain_of_functions_is_refused(tmp_path: Path) -> None:
    calls = {f"f{level}": [f"f{level + 1}"] for level in range(1200)} | {"f1200": []}
    with pytest.raises(ModelFileError, match=r"m.onnx: got functions that call each other \d+ deep, expected at most"):
        check_model_file(with_functions(calls, tmp_path / "m.onnx"))
