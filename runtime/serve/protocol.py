"""The Open Inference Protocol, version 2, without any server: bytes in, arrays out, and back.

Tensors are JSON, or raw bytes after the JSON, whose length is then in the header ``Inference-Header-Content-Length``
(Triton's binary tensor data extension). Sizes are compared with the bytes that are there before anything is allocated.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import numpy as np

from onnx_lathe.runtime.samples import Array
from onnx_lathe.runtime.serve import wire_bytes
from onnx_lathe.runtime.serve.datatypes import BOOL, BYTES, DTYPES, FP16, datatype
from onnx_lathe.runtime.serve.faults import RequestError, bad_request
from onnx_lathe.runtime.tensors import TensorSpec

HEADER_LENGTH = "Inference-Header-Content-Length"
PLATFORM = "onnx_onnxv1"
VERSION = "1"
"""A bundle has one version."""
MAX_RANK = 32
"""numpy could hold twice as many; no model has them."""

_UNSUPPORTED = ("sequence_id", "shared_memory_region", "classification")
"""Parameters that change what an answer means: refused, where others are ignored."""


@dataclass(frozen=True)
class Request:
    """A decoded request.

    Attributes:
        identity: The client's name of it, which is echoed; None where there is none.
        feeds: Arrays by input name, of the dtypes that were declared; not yet compared with the model.
        binary: For each requested output by name, whether its answer is binary; empty for all outputs.
        binary_default: Whether the answer of an output is binary where the request does not say.
        timeout: Seconds that the client waits; None where it does not say.
    """

    identity: str | None
    feeds: Mapping[str, Array]
    binary: Mapping[str, bool]
    binary_default: bool
    timeout: float | None


def describe(name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> dict[str, Any]:
    """Return the metadata of a model; a dimension that is not fixed is -1."""
    return {
        "name": name,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": [_describe(spec) for spec in inputs],
        "outputs": [_describe(spec) for spec in outputs],
    }


def decode(body: bytes | bytearray, header_length: str | None) -> Request:
    """Decode a request.

    Args:
        body: JSON, and binary tensors after it.
        header_length: The value of `HEADER_LENGTH`; None where all is JSON.

    Raises:
        RequestError: It is not what the protocol says.
    """
    size = _header_length(header_length, len(body))
    content = _json(bytes(body[:size]))
    parameters = _parameters(content, "the request")
    tail = memoryview(body)[size:]
    feeds: dict[str, Array] = {}
    for entry in _entries(content, "inputs"):
        name = _name(entry, "an input")
        if name in feeds:
            raise bad_request(f"input {name!r} is given twice")
        feeds[name], tail = _tensor(name, entry, tail)
    if tail:
        raise bad_request(f"{len(tail)} bytes follow the last binary tensor")
    default = _flag(parameters, "binary_data_output", False)
    binary: dict[str, bool] = {}
    for entry in _entries(content, "outputs") if content.get("outputs") is not None else ():
        name = _name(entry, "an output")
        if name in binary:
            raise bad_request(f"output {name!r} is asked for twice")
        binary[name] = _flag(_parameters(entry, f"output {name!r}"), "binary_data", default)
    identity = content.get("id")
    if identity is not None and not isinstance(identity, str):
        raise bad_request("id is not a string")
    return Request(identity, feeds, binary, default, _timeout(parameters))


def encode(name: str, request: Request, results: Mapping[str, Array]) -> tuple[bytes, int | None]:
    """Encode the answer to ``request``.

    Args:
        name: The model's.
        request: What is answered.
        results: Arrays by output name.

    Returns:
        The body, and the length of its JSON where binary tensors follow it.

    Raises:
        RequestError: An output cannot be written as JSON.
    """
    outputs: list[dict[str, Any]] = []
    tails: list[bytes] = []
    for output in request.binary or results:
        values = results[output]
        entry: dict[str, Any] = {"name": output, "datatype": datatype(_known(values)), "shape": list(values.shape)}
        if request.binary.get(output, request.binary_default):
            tail = wire_bytes.pack(values) if entry["datatype"] == BYTES else _little_endian(values)
            entry["parameters"] = {"binary_data_size": len(tail)}
            tails.append(tail)
        else:
            entry["data"] = _plain(output, values)
        outputs.append(entry)
    content: dict[str, Any] = {"model_name": name, "model_version": VERSION, "outputs": outputs}
    if request.identity is not None:
        content["id"] = request.identity
    header = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    return b"".join((header, *tails)), len(header) if tails else None


def _describe(spec: TensorSpec) -> dict[str, Any]:
    shape = [dim if isinstance(dim, int) else -1 for dim in spec.shape]
    return {"name": spec.name, "datatype": datatype(spec.dtype), "shape": shape}


def _header_length(text: str | None, body: int) -> int:
    if text is None:
        return body
    # isdecimal alone would let digits of other scripts pass, and int() a number of any length.
    if not (text.isascii() and text.isdecimal()) or len(text) > 19 or int(text) > body:
        raise bad_request(f"{HEADER_LENGTH} is {text[:40]!r}, the body has {body} bytes")
    return int(text)


def _json(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        raise bad_request("the request is not JSON") from None
    except RecursionError:
        raise bad_request("the request is JSON that is nested too deeply") from None
    if not isinstance(content, dict):
        raise bad_request("the request is not a JSON object")
    return cast("dict[str, Any]", content)


def _entries(content: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    entries = content.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in cast("list[Any]", entries)):
        raise bad_request(f"{key} is not an array of objects")
    return cast("list[dict[str, Any]]", entries)


def _name(entry: Mapping[str, Any], what: str) -> str:
    name = entry.get("name")
    if not isinstance(name, str):
        raise bad_request(f"{what} has no name")
    if len(name) > MAX_NAME:
        raise bad_request(f"{what} has a name of {len(name)} characters; {MAX_NAME} are allowed")
    return name


def _parameters(entry: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    parameters = entry.get("parameters", {})
    if not isinstance(parameters, dict):
        raise bad_request(f"parameters of {what} are not an object")
    found = cast("dict[str, Any]", parameters)
    for key in _UNSUPPORTED:
        if found.get(key):
            raise bad_request(f"{what} has the parameter {key}, which this server does not support")
    return found


def _flag(parameters: Mapping[str, Any], key: str, default: bool) -> bool:
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise bad_request(f"{key} is neither true nor false")
    return value


def _timeout(parameters: Mapping[str, Any]) -> float | None:
    """Return the seconds in ``timeout``, which is in microseconds as Triton has it; 0 says nothing."""
    value = parameters.get("timeout", 0)
    if type(value) is not int or not 0 <= value < 2**63:
        raise bad_request("timeout is not a whole number of microseconds")
    return value / 1e6 if value else None


def _tensor(name: str, entry: Mapping[str, Any], tail: memoryview) -> tuple[Array, memoryview]:
    """Return the array of an input, and what is left of the binary data."""
    what = f"input {name!r}"
    shape, kind = _shape(what, entry.get("shape")), entry.get("datatype")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise bad_request(f"{what} has datatype {str(kind)[:40]!r}; known are {', '.join(DTYPES)}")
    count, size = math.prod(shape), _parameters(entry, what).get("binary_data_size")
    if size is None:
        return _from_json(what, entry.get("data"), shape, kind), tail
    if "data" in entry:
        raise bad_request(f"{what} has both data and binary_data_size")
    if type(size) is not int or not 0 <= size <= len(tail):
        raise bad_request(f"{what} has a binary_data_size of {str(size)[:40]}; {len(tail)} bytes are left")
    raw, rest = tail[:size], tail[size:]
    if kind == BYTES:
        return wire_bytes.unpack(what, raw, count).reshape(shape), rest
    dtype = DTYPES[kind]
    if size != count * dtype.itemsize:
        raise bad_request(f"{what} has {size} bytes; {kind} of shape {shape} has {count * dtype.itemsize}")
    if kind == BOOL and (np.frombuffer(raw, np.uint8) > 1).any():
        raise bad_request(f"{what} has bytes other than 0 and 1 for {BOOL}")
    # A copy, because the tensor may begin at any byte of the body.
    return np.frombuffer(raw, dtype).astype(dtype.newbyteorder("="), copy=True).reshape(shape), rest


MAX_NAME = 1000

_SURROGATE = re.compile("[\\ud800-\\udfff]")
"""Halves of characters, which JSON can spell and UTF-8 cannot."""


def _shape(what: str, shape: Any) -> list[int]:
    if not isinstance(shape, list) or len(cast("list[Any]", shape)) > MAX_RANK:
        raise bad_request(f"{what} has no shape of at most {MAX_RANK} dimensions")
    sizes = cast("list[Any]", shape)
    sound = all(type(size) is int and 0 <= size < 2**63 for size in sizes)
    # A dimension of 0 must not hide what the others overflow, in bytes of the widest element.
    if not sound or math.prod(max(size, 1) for size in sizes) >= 2**59:
        raise bad_request(f"{what} has a shape with other than sizes in it")
    return sizes


def _from_json(what: str, data: Any, shape: list[int], kind: str) -> Array:
    if kind == FP16:
        raise bad_request(f"{what} is {FP16}, which is sent as binary data only")
    values = _flat(what, data, shape)
    wanted = {BOOL: {bool}, BYTES: {str}}.get(kind, {int, float} if kind.startswith("FP") else {int})
    if odd := set(map(type, values)) - wanted:
        raise bad_request(f"{what} has {odd.pop().__name__} values in it, not {kind}")
    if kind == BYTES and any(map(_SURROGATE.search, values)):
        raise bad_request(f"{what} has a string that is not Unicode text")
    dtype = DTYPES[kind]
    try:
        with np.errstate(over="raise"):
            # By way of float64, because only a cast between arrays reports what does not fit.
            wide = np.array(values, np.float64 if dtype.kind == "f" else dtype)
            return wide.astype(dtype.newbyteorder("="), copy=False).reshape(shape)
    except (OverflowError, FloatingPointError):
        raise bad_request(f"{what} has a number that {kind} does not hold") from None


def _flat(what: str, data: Any, shape: list[int]) -> list[Any]:
    """Return the elements of ``data`` in order, which is flat or nested as ``shape`` says."""
    if not isinstance(data, list):
        raise bad_request(f"{what} has no data")
    values, count = cast("list[Any]", data), math.prod(shape)
    if values and isinstance(values[0], list):
        fits = len(values) == (shape[0] if shape else 0)
        for size in shape[1:]:
            fits = fits and all(isinstance(row, list) and len(cast("list[Any]", row)) == size for row in values)
            if fits:
                values = list(chain.from_iterable(values))
        if not fits:
            raise bad_request(f"{what} has data that is not nested as its shape says")
    if len(values) != count:
        raise bad_request(f"{what} has {len(values)} elements; its shape has {count}")
    return values


def _known(values: Array) -> np.dtype[Any]:
    return DTYPES[BYTES] if values.dtype.kind in "OSU" else values.dtype


def _little_endian(values: Array) -> bytes:
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def _plain(name: str, values: Array) -> list[Any]:
    if values.dtype == np.float16:
        raise _only_binary(name, f"is {FP16}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise _only_binary(name, "has values that are not finite")
    return values.reshape(-1).tolist()


def _only_binary(name: str, why: str) -> RequestError:
    return bad_request(f"output {name!r} {why}: ask for it with binary_data")
