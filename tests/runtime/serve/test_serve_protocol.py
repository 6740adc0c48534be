import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.serve import protocol, wire_bytes
from onnx_lathe.runtime.serve.datatypes import DTYPES, check_datatypes, datatype
from onnx_lathe.runtime.serve.faults import RequestError
from onnx_lathe.runtime.tensors import STRING, TensorSpec


def request(tail: bytes = b"", **entry: Any) -> protocol.Request:
    content = {"inputs": [{"name": "x", "shape": [2, 2], "datatype": "FP32", **entry}]}
    header = json.dumps(content).encode()
    return protocol.decode(header + tail, str(len(header)) if tail else None)


@pytest.mark.parametrize("kind", [kind for kind in DTYPES if kind not in ("BYTES", "FP16")])
@pytest.mark.parametrize("binary", [False, True])
def test_every_type_goes_through_json_and_binary(kind: str, binary: bool) -> None:
    values = np.array([[0, 1, 1], [1, 0, 1]]).astype(DTYPES[kind])
    if DTYPES[kind].kind in "iuf":
        values[0, 0] = np.iinfo(values.dtype).max if DTYPES[kind].kind in "iu" else 0.5
    wanted = protocol.Request("id", {}, {"y": binary}, False, None)
    body, length = protocol.encode("m", wanted, {"y": values})
    content = json.loads(body[:length])
    assert (content["id"], content["model_name"], content["model_version"]) == ("id", "m", "1")
    back = {"inputs": content["outputs"]}
    header = json.dumps(back).encode()
    decoded = protocol.decode(header + body[length:] if length else header, str(len(header)) if length else None)
    np.testing.assert_array_equal(decoded.feeds["y"], values)
    assert decoded.feeds["y"].dtype == values.dtype
    assert decoded.feeds["y"].flags.aligned


def test_half_floats_are_binary_only() -> None:
    values = np.array([[0.5, 2], [3, 4]], np.float16)
    decoded = request(values.tobytes(), datatype="FP16", parameters={"binary_data_size": 8})
    np.testing.assert_array_equal(decoded.feeds["x"], values)
    with pytest.raises(RequestError, match="input 'x' is FP16, which is sent as binary data only"):
        request(datatype="FP16", data=[1, 2, 3, 4])
    with pytest.raises(RequestError, match="output 'y' is FP16: ask for it with binary_data"):
        protocol.encode("m", protocol.Request(None, {}, {}, False, None), {"y": values})


def test_json_holds_no_nan() -> None:
    with pytest.raises(RequestError, match="output 'y' has values that are not finite: ask for it with binary_data"):
        protocol.encode("m", protocol.Request(None, {}, {}, False, None), {"y": np.array([np.nan], np.float32)})


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=20))
def test_strings_survive_the_wire(texts: list[str]) -> None:
    values = np.array([*texts, ""], object)
    unpacked = wire_bytes.unpack("x", memoryview(wire_bytes.pack(values)), len(values))
    assert unpacked.tolist() == values.tolist()


@given(st.binary(max_size=60), st.integers(0, 6))
def test_any_bytes_are_strings_or_refused(raw: bytes, count: int) -> None:
    try:
        values = wire_bytes.unpack("x", memoryview(raw), count)
    except RequestError:
        return
    assert wire_bytes.pack(values) == raw


@given(st.binary(max_size=200), st.none() | st.text(max_size=5))
def test_any_bytes_are_a_request_or_refused(body: bytes, length: str | None) -> None:
    with pytest.raises(RequestError):
        protocol.decode(body, length)


@pytest.mark.parametrize(
    ("entry", "tail", "message"),
    [
        ({"data": [1, 2, 3]}, b"", "input 'x' has 3 elements; its shape has 4"),
        ({"data": [[1, 2], [3]]}, b"", "input 'x' has data that is not nested as its shape says"),
        ({"data": [[[1], [2]], [[3], [4]]]}, b"", "input 'x' has list values in it, not FP32"),
        ({"data": [1, 2, 3, "4"]}, b"", "input 'x' has str values in it, not FP32"),
        ({"data": [1, 2, 3, True]}, b"", "input 'x' has bool values in it, not FP32"),
        ({"data": [1, 2, 3, 0.5], "datatype": "INT64"}, b"", "input 'x' has float values in it, not INT64"),
        ({"data": [1, 2, 3, 256], "datatype": "UINT8"}, b"", "input 'x' has a number that UINT8 does not hold"),
        ({"data": [1, 2, 3, 1e39]}, b"", "input 'x' has a number that FP32 does not hold"),
        ({"data": [1, 2, 3, 10**400]}, b"", "input 'x' has a number that FP32 does not hold"),
        ({"data": None}, b"", "input 'x' has no data"),
        ({"data": [], "shape": [0, 2**62]}, b"", "input 'x' has a shape with other than sizes in it"),
        ({"data": ["a", "b", "c", "\ud800"], "datatype": "BYTES"}, b"", "input 'x' has a string that is not Unicode"),
        ({"shape": [2**62, 2**62], "data": []}, b"", "input 'x' has a shape with other than sizes in it"),
        ({"shape": [-1, 2], "data": []}, b"", "input 'x' has a shape with other than sizes in it"),
        ({"shape": [1] * 33, "data": [1]}, b"", "input 'x' has no shape of at most 32 dimensions"),
        ({"shape": [2**40], "data": [1]}, b"", "input 'x' has 1 elements; its shape has 1099511627776"),
        ({"datatype": "FP8", "data": []}, b"", "input 'x' has datatype 'FP8'; known are BOOL"),
        ({"parameters": {"binary_data_size": 17}}, bytes(16), "has a binary_data_size of 17; 16 bytes are left"),
        ({"parameters": {"binary_data_size": -1}}, bytes(16), "has a binary_data_size of -1; 16 bytes are left"),
        ({"parameters": {"binary_data_size": True}}, bytes(16), "has a binary_data_size of True"),
        ({"parameters": {"binary_data_size": 12}}, bytes(16), "has 12 bytes; FP32 of shape"),
        ({"parameters": {"binary_data_size": 16}}, bytes(20), "4 bytes follow the last binary tensor"),
        ({"parameters": {"binary_data_size": 16}, "data": []}, bytes(16), "both data and binary_data_size"),
        ({"datatype": "BOOL", "parameters": {"binary_data_size": 4}}, b"\0\1\2\0", "bytes other than 0 and 1"),
        ({"parameters": {"shared_memory_region": "r"}, "data": []}, b"", "the parameter shared_memory_region"),
        ({"parameters": []}, b"", "parameters of input 'x' are not an object"),
        ({"name": 3}, b"", "an input has no name"),
    ],
)
def test_a_wrong_tensor_is_refused_with_the_reason(entry: dict[str, Any], tail: bytes, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        request(tail, **entry)
    assert message in caught.value.message
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "0 bytes, too few for 4 elements"),
        (struct.pack("<I", 2**32 - 1) + bytes(12), "a length of 4294967295 at element 0; 12 bytes are left"),
        (bytes(20), "4 bytes after its 4 elements"),
        (struct.pack("<I", 1) + b"\xff" + bytes(12), "an element that is not UTF-8"),
        (struct.pack("<I", 8) + bytes(8) + bytes(4), "ends before element 2 of 4"),
    ],
)
def test_wrong_lengths_of_strings_are_refused(raw: bytes, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        wire_bytes.unpack("x", memoryview(raw), 4)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("body", "length", "message"),
    [
        (b"{", None, "not JSON"),
        (b"[]", None, "not a JSON object"),
        (b"[" * 100_000, None, "nested too deeply"),
        (b'{"inputs": 3}', None, "inputs is not an array of objects"),
        (b'{"inputs": [], "id": 3}', None, "id is not a string"),
        (b'{"inputs": [], "outputs": [{"name": "y"}, {"name": "y"}]}', None, "output 'y' is asked for twice"),
        (b'{"inputs": [], "parameters": {"timeout": -1}}', None, "timeout is not a whole number of microseconds"),
        (b'{"inputs": [], "parameters": {"sequence_id": 7}}', None, "the parameter sequence_id"),
        (b'{"inputs": [], "parameters": {"binary_data_output": 1}}', None, "binary_data_output is neither"),
        (b"{}", "3", "Inference-Header-Content-Length is '3', the body has 2 bytes"),
        (b"{}", "-1", "Inference-Header-Content-Length is '-1', the body has 2 bytes"),
        (b"{}", "9" * 5000, "the body has 2 bytes"),
    ],
)
def test_a_wrong_request_is_refused_with_the_reason(body: bytes, length: str | None, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        protocol.decode(body, length)
    assert message in caught.value.message


def test_two_inputs_share_the_binary_data_in_order() -> None:
    def entry(name: str) -> dict[str, Any]:
        return {"name": name, "shape": [2], "datatype": "INT16", "parameters": {"binary_data_size": 4}}

    header = json.dumps({"inputs": [entry("a"), entry("b")], "parameters": {"timeout": 1500}}).encode()
    decoded = protocol.decode(header + np.arange(4, dtype=np.int16).tobytes(), str(len(header)))
    assert {name: values.tolist() for name, values in decoded.feeds.items()} == {"a": [0, 1], "b": [2, 3]}
    assert decoded.timeout == 0.0015


def test_a_type_without_a_name_is_refused_before_serving() -> None:
    assert datatype(STRING) == "BYTES"
    with pytest.raises(UnsupportedModelError, match=r"m: 'z': got dtype complex64, expected one that can be served"):
        check_datatypes("m", [TensorSpec("z", np.dtype(np.complex64), ())])
