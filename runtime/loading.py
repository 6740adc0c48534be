"""Opening model files that nobody should trust: everything is checked before anything large is allocated.

A graph names files and sizes, and a hostile one names files outside its folder and sizes that overflow. onnx itself
checks some of this while it reads weights; here it is checked for every tensor, before onnxruntime sees the file.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO, NoReturn

import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from onnx_lathe.runtime.errors import ExternalDataError, ModelFileError

MAX_PROTOBUF_BYTES = 2**31 - 1
"""The most that one protobuf message can hold."""
MAX_TENSOR_BYTES = 2**63 - 1
"""Sizes beyond this overflow the 64-bit arithmetic of whoever reads the file next."""
MAX_RANK = 64
"""numpy's own limit on the number of dimensions."""

_VARINT, _LENGTH = 0, 2
"""The wire types of protobuf that ``ModelProto`` uses: a number, and bytes after their length."""

_BITS = {
    **dict.fromkeys(("UINT2", "INT2"), 2),
    **dict.fromkeys(("UINT4", "INT4", "FLOAT4E2M1"), 4),
    **dict.fromkeys(("FLOAT6E2M3", "FLOAT6E3M2"), 6),
    **dict.fromkeys(("UINT8", "INT8", "BOOL"), 8),
    **dict.fromkeys(("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0"), 8),
    **dict.fromkeys(("UINT16", "INT16", "FLOAT16", "BFLOAT16"), 16),
    **dict.fromkeys(("UINT32", "INT32", "FLOAT"), 32),
    **dict.fromkeys(("UINT64", "INT64", "DOUBLE", "COMPLEX64"), 64),
    "COMPLEX128": 128,
}
"""Bits of one element by name of its type; elements under 8 bits are packed (onnx.proto, ``raw_data``)."""


@dataclass(frozen=True)
class ExternalRange:
    """Where the values of a tensor lie.

    Attributes:
        file: The file beside the model.
        offset: First byte.
        length: Number of bytes.
    """

    file: Path
    offset: int
    length: int


def check_model_file(path: Path) -> None:
    """Check a model and the files that its graph names; no weight beside the graph is read.

    Raises:
        ModelFileError: The file is missing, a folder, empty, cut off, not ONNX or without a graph, or a tensor's
            dimensions do not fit its values.
        ExternalDataError: A weight file is missing, too short, a link, or outside the model's folder.
    """
    read_graph(path)


def read_graph(path: Path) -> ModelProto:
    """Return the checked model; weights that lie beside it stay there.

    Raises:
        ModelFileError: As `check_model_file`.
        ExternalDataError: As `check_model_file`.
    """
    model = _parse(path)
    for text in _names(model):
        if not isinstance(text, str):
            _not_a_model(path, f"a name that is not UTF-8, {text!r}", "Export or download the model again.")
    _check_arity(path, model)
    for tensor in tensors(model):
        check_tensor(path, tensor)
    return model


def external_files(path: Path) -> tuple[Path, ...]:
    """Return the files beside a model that hold its weights, each once, in the order that the graph names them.

    Raises:
        ModelFileError: As `check_model_file`.
        ExternalDataError: As `check_model_file`.
    """
    return weight_files(path, read_graph(path))


def weight_files(path: Path, model: ModelProto) -> tuple[Path, ...]:
    """Return what `external_files` does, for a model that is parsed already."""
    ranges = (external_range(path, tensor) for tensor in tensors(model) if is_external(tensor))
    return tuple(dict.fromkeys(found.file for found in ranges))


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield ``graph`` and every graph inside it (the branches of an If, the body of a Loop or Scan)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            inner = (attribute.g,) if attribute.HasField("g") else attribute.graphs
            for subgraph in inner:
                yield from graphs(subgraph)


def nodes(model: ModelProto) -> Iterator[NodeProto]:
    """Yield every node: of the graph, of graphs inside it and of the model's own functions."""
    for graph in graphs(model.graph):
        yield from graph.node
    for function in model.functions:
        for node in function.node:
            yield node
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    yield from chain.from_iterable(inner.node for inner in graphs(graph))


def tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yield every tensor that holds values: initializers (dense and sparse) and attributes of nodes, at any depth."""
    for graph in graphs(model.graph):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def constants(model: ModelProto) -> Iterator[tuple[str, TensorProto]]:
    """Yield name and value of each constant: initializers and Constant nodes, at any depth."""
    for graph in graphs(model.graph):
        sparse = (tensor.values for tensor in graph.sparse_initializer)
        yield from ((tensor.name, tensor) for tensor in chain(graph.initializer, sparse))
    for node in nodes(model):
        if node.op_type == "Constant":
            yield from ((node.output[0], value.t) for value in node.attribute if value.HasField("t"))


def is_external(tensor: TensorProto) -> bool:
    """Say whether the values of ``tensor`` lie in a file beside the model."""
    return tensor.data_location == TensorProto.EXTERNAL


def elements(tensor: TensorProto) -> int:
    """Return the number of elements of ``tensor``: 1 for a scalar."""
    return math.prod(tensor.dims)


def nbytes(tensor: TensorProto) -> int:
    """Return the bytes that the values of ``tensor`` take."""
    return byte_size(elements(tensor), tensor.data_type)


def byte_size(count: int, data_type: int) -> int:
    """Return the bytes of ``count`` elements of an ONNX type, packed where one is under 8 bits; 0 for strings."""
    return -(-count * _BITS.get(TensorProto.DataType.Name(data_type), 0) // 8)


def make_inline(path: Path, tensor: TensorProto) -> None:
    """Read the values of an external tensor of the model at ``path`` into the graph.

    Raises:
        ExternalDataError: They are not where and as they must be.
    """
    found = external_range(path, tensor)
    with found.file.open("rb") as file:
        file.seek(found.offset)
        tensor.raw_data = file.read(found.length)
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")


def check_tensor(path: Path, tensor: TensorProto) -> None:
    """Check that the dimensions of a tensor are sound and that its values are there.

    Raises:
        ModelFileError: The type is unknown, a dimension is negative, the size overflows, or the values do not fill it.
        ExternalDataError: The values lie beside the model, and not where and as they must.
    """
    where = f"{path}: tensor {tensor.name!r}"
    if tensor.data_type not in TensorProto.DataType.values() or tensor.data_type == TensorProto.UNDEFINED:
        raise ModelFileError(
            where,
            got=f"element type {tensor.data_type}",
            expected="a type that ONNX defines",
            mend="Update onnx, or export the model again.",
        )
    shape = list(tensor.dims)
    if len(shape) > MAX_RANK or any(dim < 0 for dim in shape) or nbytes(tensor) > MAX_TENSOR_BYTES:
        raise ModelFileError(
            where,
            got=f"dimensions {_short(shape)}",
            expected=f"at most {MAX_RANK} dimensions, none negative, under 2^63 bytes in all",
            mend="The file is corrupt or hostile: get it again from a source that you trust.",
        )
    if is_external(tensor):
        external_range(path, tensor)
    else:
        _check_inline(where, tensor)


def _check_inline(where: str, tensor: TensorProto) -> None:
    bits = _BITS.get(TensorProto.DataType.Name(tensor.data_type), 0)
    count = elements(tensor)
    if tensor.HasField("raw_data"):
        got, low, high, unit = len(tensor.raw_data), nbytes(tensor), nbytes(tensor), "bytes"
    else:
        complex_parts = 2 if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else 1
        got, unit = len(getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type))), "values"
        high = count * complex_parts
        low = nbytes(tensor) if 0 < bits < 8 else high
    if not low <= got <= high:
        raise ModelFileError(
            where,
            got=f"{got} {unit}",
            expected=f"{high} {unit} for the dimensions {_short(list(tensor.dims))}",
            mend="The file is corrupt: export or download it again.",
        )


def external_range(path: Path, tensor: TensorProto) -> ExternalRange:
    """Return where the values of an external tensor lie, checked."""
    where = f"{path}: tensor {tensor.name!r}"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    file = _external_file(where, path.parent, entries.get("location", ""))
    size = file.stat().st_size
    want = nbytes(tensor)
    offset = _whole_number(where, "offset", entries.get("offset", "0"))
    length = _whole_number(where, "length", entries.get("length", str(want)))
    if length != want:
        _refuse(where, f"a length of {length} bytes", f"{want}, what its dimensions and type take")
    if offset + length > size:
        _refuse(
            where,
            f"bytes {offset} to {offset + length} of {file.name}, which has {size}",
            "a range inside the file",
        )
    return ExternalRange(file, offset, length)


def _external_file(where: str, folder: Path, location: str) -> Path:
    """Return the file that a graph calls ``location``, which must be a plain file inside ``folder``."""
    windows = PureWindowsPath(location)
    if not location or "\0" in location or location.startswith(("/", "\\")) or windows.drive or windows.is_absolute():
        _refuse(where, f"the weight file {location!r}", "the name of a file beside the model")
    if ".." in PurePosixPath(location).parts or ".." in windows.parts:
        _refuse(where, f"the weight file {location!r}, which leaves the model's folder", "a file inside it")
    file = folder / location
    try:
        status = file.lstat()
    except OSError:
        raise ExternalDataError(
            where,
            got=f"no file {location!r} beside the model",
            expected="the weights that the graph names",
            mend=f"Put {location!r} into the folder of the model.",
        ) from None
    if stat.S_ISLNK(status.st_mode) or not file.resolve().is_relative_to(folder.resolve()):
        _refuse(where, f"the weight file {location!r}, a symbolic link", "a plain file", link=True)
    if not stat.S_ISREG(status.st_mode):
        _refuse(where, f"{location!r}, which is not a plain file", "a plain file with the weights")
    if status.st_nlink > 1:
        _refuse(where, f"the weight file {location!r}, a hard link", "a file of its own", link=True)
    return file


def _whole_number(where: str, key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        _refuse(where, f"the {key} {text[:40]!r}", "a number of bytes")
    return int(text)


def _refuse(where: str, got: str, expected: str, *, link: bool = False) -> NoReturn:
    mend = (
        "Put a copy of the file in place of the link."
        if link
        else "The files are corrupt or hostile: export or download the model again from a source that you trust."
    )
    raise ExternalDataError(where, got=got, expected=expected, mend=mend)


def _parse(path: Path) -> ModelProto:
    if not path.exists():
        _not_a_model(path, "no such file", "Give the path of a model.")
    if path.is_dir():
        _not_a_model(path, "a folder", "Give the path of the .onnx file in it.")
    size = path.stat().st_size
    if size == 0:
        _not_a_model(path, "an empty file", "Export or download the model again.")
    if size > MAX_PROTOBUF_BYTES:
        _not_a_model(path, f"{size} bytes, more than protobuf can hold", "Save the model with its weights beside it.")
    try:
        model = ModelProto.FromString(path.read_bytes())
    except PermissionError:
        _not_a_model(path, "a file that you may not read", "Change its permissions.")
    except DecodeError:
        missing = _missing_bytes(path, size)
        got = f"a file that was cut off: at least {missing} bytes are missing" if missing else "bytes that are not ONNX"
        _not_a_model(path, got, "Export or download the model again.")
    if not model.HasField("graph") or not model.graph.output:
        _not_a_model(path, "no graph with an output", "Export the model again.")
    return model


def _names(model: ModelProto) -> Iterator[object]:
    """Yield the names in a graph; protobuf gives bytes instead of text for one that is not UTF-8."""
    for graph in graphs(model.graph):
        for value in chain(graph.input, graph.output, graph.value_info):
            yield value.name
            yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)
    for node in nodes(model):
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
    for tensor in tensors(model):
        yield tensor.name
        yield from chain.from_iterable((entry.key, entry.value) for entry in tensor.external_data)
    yield from (opset.domain for opset in model.opset_import)


def _check_arity(path: Path, model: ModelProto) -> None:
    """Check that ONNX's own operators have the inputs and outputs that they must have."""
    version = next((opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")), 0)
    for node in nodes(model):
        if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type):
            continue
        try:
            schema = onnx.defs.get_schema(node.op_type, version, "")
        except onnx.defs.SchemaError:  # an operator of a later opset than the model's: onnxruntime says so
            continue
        if len(node.input) < schema.min_input or len(node.output) < schema.min_output:
            raise ModelFileError(
                f"{path}: node {node.name!r} ({node.op_type})",
                got=f"{len(node.input)} inputs and {len(node.output)} outputs",
                expected=f"at least {schema.min_input} and {schema.min_output}",
                mend="The file is corrupt: export or download it again.",
            )


def _not_a_model(path: Path, got: str, mend: str) -> NoReturn:
    raise ModelFileError(str(path), got=got, expected="an ONNX model", mend=mend)


def _missing_bytes(path: Path, size: int) -> int:
    """Return how far the last field of the message reaches beyond the end of the file, by its own declared length."""
    with path.open("rb") as file:
        while (key := _varint(file)) is not None and key >> 3 in ModelProto.DESCRIPTOR.fields_by_number:
            value, wire_type = _varint(file), key & 7
            if value is None or wire_type not in (_VARINT, _LENGTH):
                return 0
            end = file.tell() + (value if wire_type == _LENGTH else 0)
            if end > size:
                return end - size
            file.seek(end)
    return 0


def _varint(file: BinaryIO) -> int | None:
    """Read one protobuf varint (at most 10 bytes of 7 bits, lowest first); None at the end of the file."""
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return None


def _short(shape: list[int]) -> str:
    return f"[{', '.join(map(str, shape[:8]))}{', ...' if len(shape) > 8 else ''}]"
