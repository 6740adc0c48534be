import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnx_lathe.runtime.errors import ExternalDataError, InputError, ModelFileError
from onnx_lathe.runtime.facts import read_facts
from onnx_lathe.runtime.loading import (
    check_model_file,
    constants,
    external_files,
    make_inline,
    read_graph,
    read_skeleton,
)
from onnx_lathe.runtime.tensors import random_feeds
from tests.graphs import LINEAR, parse, write

WEIGHTS = np.arange(12, dtype=np.float32).reshape(3, 4)


def external_model(folder: Path, **changes: str | None) -> Path:
    """Write a model whose 48 bytes of weights lie in ``w.data`` after 16 others; ``changes`` replace what it says."""
    tensor = numpy_helper.from_array(WEIGHTS, "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": "w.data", "offset": "16", "length": "48"} | changes
    for key, value in entries.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    model = parse("g (float[batch, 3] x) => (float[batch, 4] y) { y = MatMul(x, w) }")
    model.graph.initializer.append(tensor)
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "w.data").write_bytes(bytes(16) + WEIGHTS.tobytes())
    onnx.save(model, folder / "model" / "m.onnx")
    return folder / "model" / "m.onnx"


def test_a_sound_model_passes_and_its_graph_comes_without_the_weights_beside_it(tmp_path: Path) -> None:
    path = external_model(tmp_path)
    check_model_file(path)
    (tensor,) = read_graph(path).graph.initializer
    assert tensor.raw_data == b""
    assert external_files(path) == (path.parent / "w.data",)
    make_inline(path, tensor)
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), WEIGHTS)
    assert external_files(write(tmp_path / "inline.onnx", LINEAR)) == ()


def test_a_skeleton_is_read_once_until_the_model_or_its_weights_change(tmp_path: Path) -> None:
    large = helper.make_tensor("large", TensorProto.FLOAT, [400], np.arange(400, dtype=np.float32).tobytes(), raw=True)
    model = external_model(tmp_path)
    graph = onnx.load(model, load_external_data=False)
    graph.graph.initializer.append(large)
    onnx.save(graph, model)
    first = read_skeleton(model)
    assert [list(tensor.dims) for tensor in first.graph.initializer] == [[3, 4], [400]]
    assert not first.graph.initializer[1].raw_data
    assert read_skeleton(model) is first
    assert len(read_graph(model).graph.initializer[1].raw_data) == 1600
    (model.parent / "w.data").write_bytes(bytes(10))
    with pytest.raises(ExternalDataError, match=r"tensor 'w'"):
        read_skeleton(model)
    (model.parent / "w.data").unlink()
    with pytest.raises(ExternalDataError, match=r"tensor 'w'"):
        check_model_file(model)


def test_offset_and_length_may_be_left_out(tmp_path: Path) -> None:
    path = external_model(tmp_path, offset=None, length=None)
    check_model_file(path)


def test_a_file_that_two_tensors_share_is_named_once(tmp_path: Path) -> None:
    path = external_model(tmp_path)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer.add().CopyFrom(model.graph.initializer[0])
    model.graph.initializer[1].name = "w2"
    onnx.save(model, path)
    assert external_files(path) == (path.parent / "w.data",)


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "a folder"),
        (lambda path: path.write_bytes(b""), "an empty file"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)), "bytes that are not ONNX"),
        (lambda path: path.write_bytes(b"PK\x03\x04" * 20), "bytes that are not ONNX"),
        (lambda path: onnx.save(onnx.ModelProto(ir_version=10), path), "no graph with an output"),
    ],
)
def test_what_is_not_a_model_is_named(tmp_path: Path, make: Callable[[Path], object], got: str) -> None:
    path = tmp_path / "m.onnx"
    make(path)
    with pytest.raises(ModelFileError, match=f"m.onnx: got {got}.*expected an ONNX model"):
        check_model_file(path)


def test_a_cut_off_file_says_how_much_is_missing(tmp_path: Path) -> None:
    graph_last = onnx.ModelProto(ir_version=10, graph=parse(LINEAR).graph).SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(graph_last[:-20])
    with pytest.raises(ModelFileError, match="cut off: at least 20 bytes are missing, expected an ONNX model"):
        check_model_file(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"location": "absent.data"}, "no file 'absent.data' beside the model.*Put 'absent.data' into the folder"),
        ({"location": "../secret"}, r"'../secret', which leaves the model's folder"),
        ({"location": "sub/../../secret"}, "leaves the model's folder"),
        ({"location": "..\\\\secret"}, "leaves the model's folder"),
        ({"location": "/etc/passwd"}, "'/etc/passwd', expected the name of a file beside the model"),
        ({"location": "C:\\\\secret"}, "expected the name of a file beside the model"),
        ({"location": ""}, "'', expected the name of a file beside the model"),
        ({"location": "*/_ORT_MEM_ADDR_/*"}, "no file .* beside the model"),
        ({"location": "."}, "not a plain file"),
        ({"offset": "17"}, "bytes 17 to 65 of w.data, which has 64, expected a range inside the file"),
        ({"offset": "99999999999999999999"}, "the offset '99999999999999999999', expected a number of bytes"),
        ({"offset": "-16"}, "the offset '-16', expected a number of bytes"),
        ({"length": "4"}, "a length of 4 bytes, expected 48, what its dimensions and type take"),
        ({"length": "9223372036854775807"}, "a length of 9223372036854775807 bytes, expected 48"),
    ],
)
def test_weights_beside_a_model_are_checked(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(64))
    changes = {key: value.replace("\\\\", "\\") for key, value in changes.items()}
    with pytest.raises(ExternalDataError, match=f"m.onnx: tensor 'w': got .*{message}"):
        check_model_file(external_model(tmp_path, **changes))


@pytest.mark.parametrize(("link", "kind"), [(os.symlink, "a symbolic link"), (os.link, "a hard link")])
def test_links_are_refused(tmp_path: Path, link: Callable[[Path, Path], None], kind: str) -> None:
    path = external_model(tmp_path)
    outside = tmp_path / "secret"
    (path.parent / "w.data").rename(outside)
    link(outside, path.parent / "w.data")
    with pytest.raises(ExternalDataError, match=f"'w.data', {kind}, expected .*Put a copy of the file"):
        check_model_file(path)


def test_a_linked_folder_is_refused(tmp_path: Path) -> None:
    path = external_model(tmp_path, location="sub/w.data")
    (tmp_path / "outside").mkdir()
    (path.parent / "w.data").rename(tmp_path / "outside" / "w.data")
    (path.parent / "sub").symlink_to(tmp_path / "outside")
    with pytest.raises(ExternalDataError, match=r"'sub/w.data', a symbolic link"):
        check_model_file(path)


@pytest.mark.parametrize(
    ("dims", "got"),
    [
        ([-1, 4], r"dimensions \[-1, 4\]"),
        ([2**62, 2**62], r"dimensions \[4611686018427387904, 4611686018427387904\]"),
        ([1] * 65, r"dimensions \[1, 1, 1, 1, 1, 1, 1, 1, ...\]"),
        ([3, 5], "48 bytes, expected 60 bytes"),
        ([2**40], "48 bytes, expected 4398046511104 bytes"),
    ],
)
def test_dimensions_must_be_sound_and_filled(tmp_path: Path, dims: list[int], got: str) -> None:
    model = parse("g (float[batch, 3] x) => (float[batch, 4] y) { y = MatMul(x, w) }")
    tensor = numpy_helper.from_array(WEIGHTS, "w")
    tensor.dims[:] = dims
    model.graph.initializer.append(tensor)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match=f"tensor 'w': got {got}"):
        check_model_file(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "tensor",
    [
        helper.make_tensor("t", TensorProto.FLOAT, [2, 2], [1, 2, 3, 4]),
        helper.make_tensor("t", TensorProto.BFLOAT16, [3], [1, 2, 3]),
        helper.make_tensor("t", TensorProto.INT4, [3], [1, 2, 3]),
        helper.make_tensor("t", TensorProto.UINT4, [5], b"\x21\x43\x05", raw=True),
        helper.make_tensor("t", TensorProto.COMPLEX64, [2], [1 + 2j, 3j]),
        helper.make_tensor("t", TensorProto.STRING, [2], [b"a", b"b"]),
        helper.make_tensor("t", TensorProto.BOOL, [], [True]),
        helper.make_tensor("t", TensorProto.FLOAT, [0, 4], []),
    ],
    ids=lambda tensor: TensorProto.DataType.Name(tensor.data_type),
)
def test_every_way_to_hold_values_is_counted_right(tmp_path: Path, tensor: TensorProto) -> None:
    model = parse(LINEAR)
    model.graph.initializer.append(tensor)
    onnx.save(model, tmp_path / "m.onnx")
    check_model_file(tmp_path / "m.onnx")
    if len(tensor.dims) and tensor.dims[0]:
        model.graph.initializer[-1].dims[0] += 2
        onnx.save(model, tmp_path / "m.onnx")
        with pytest.raises(ModelFileError, match=r"tensor 't': got .* (bytes|values), expected"):
            check_model_file(tmp_path / "m.onnx")


def test_an_unknown_element_type_is_refused(tmp_path: Path) -> None:
    model = parse(LINEAR)
    model.graph.initializer[0].data_type = 999
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match="tensor 'w': got element type 999, expected a type that ONNX defines"):
        check_model_file(tmp_path / "m.onnx")


def test_a_node_without_its_inputs_is_refused(tmp_path: Path) -> None:
    model = parse(LINEAR)
    del model.graph.node[0].input[1:]
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(
        ModelFileError, match=r"node 'product' \(MatMul\): got 1 inputs and 1 outputs, expected at least 2"
    ):
        check_model_file(tmp_path / "m.onnx")


def test_names_must_be_text(tmp_path: Path) -> None:
    path = external_model(tmp_path)
    whole = path.read_bytes()
    for name in (b"MatMul", b"batch", b"w.data"):
        path.write_bytes(whole.replace(name, b"\xff" + name[1:]))
        with pytest.raises(ModelFileError, match=rf"got a name that is not UTF-8, b'\\xff{name[1:].decode()}'"):
            check_model_file(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_bytes_are_refused_or_read_but_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(external_model(tmp_path).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "model" / "damaged.onnx"
    path.write_bytes(damaged[: data.draw(st.integers(1, len(damaged)))])
    for read in (check_model_file, read_facts, random_feeds):
        with contextlib.suppress(InputError):
            read(path)


def test_tensors_inside_branches_are_checked_too(tmp_path: Path) -> None:
    model = parse("""
        g (bool c, float[2] x) => (float[2] y) {
          y = If (c) <
            then_branch = then () => (float[2] a) { w = Constant <value = float[2] {1, 2}> () a = Add(x, w) },
            else_branch = other () => (float[2] b) { b = Identity(x) }
          >
        }
    """)
    inner = next(attribute.g for attribute in model.graph.node[0].attribute if attribute.name == "then_branch")
    assert [name for name, _ in constants(model)] == ["w"]
    inner.node[0].attribute[0].t.dims[0] = 3
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match="2 values, expected 3 values"):
        check_model_file(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("name", "start", "got"),
    [
        ("m.pt", b"PK\x03\x04", "a file of torch, Python objects in a pickle"),
        ("m.bin", b"PK\x03\x04", "a file of torch, Python objects in a pickle"),
        ("m.pkl", b"\x80\x04\x95", "a pickle of Python objects"),
        ("m.onnx", b"\x80\x02}", "a pickle of Python objects"),
    ],
)
def test_a_pickle_is_named_and_not_opened(name: str, start: bytes, got: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(start + bytes(range(256)))
    with pytest.raises(ModelFileError, match=f"{name}: got {got}, expected an ONNX model. Export it to ONNX"):
        check_model_file(tmp_path / name)


def test_external_data_says_nothing_that_onnx_does_not_define(tmp_path: Path) -> None:
    with pytest.raises(
        ExternalDataError, match=r"'w': got the entry 'owner' of external data, expected each of location"
    ):
        check_model_file(external_model(tmp_path, owner="me"))
    path = external_model(tmp_path)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data.add(key="offset", value="0")
    onnx.save(model, path)
    with pytest.raises(ExternalDataError, match="got the entry 'offset' of external data"):
        check_model_file(path)
