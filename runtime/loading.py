"""Opening model files that nobody should trust: everything is checked before anything large is allocated.

A graph names files and sizes, and a hostile one names files outside its folder and sizes that overflow. onnx itself
checks some of this while it reads weights; here it is checked for every tensor, before onnxruntime sees the file.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NoReturn

import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from onnx_lathe.runtime import external
from onnx_lathe.runtime.errors import ModelFileError
from onnx_lathe.runtime.expansion import check_sizes
from onnx_lathe.runtime.external import ExternalRange, Locate, external_range

MAX_PROTOBUF_BYTES = 2**31 - 1
"""The most that one protobuf message can hold."""
MAX_TENSOR_BYTES = 2**63 - 1
"""Sizes beyond this overflow the 64-bit arithmetic of whoever reads the file next."""
MAX_RANK = 64
"""numpy's own limit on the number of dimensions."""

_VARINT, _LENGTH = 0, 2
"""The wire types of protobuf that ``ModelProto`` uses: a number, and bytes after their length."""

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

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


SMALL_TENSOR_BYTES = 1024
"""Constants up to this may hold shapes and scales, which are read without the weights."""
VALUE_FIELDS = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
_KEPT_SKELETONS = 64
_skeletons: OrderedDict[tuple[str, int, int, int], tuple[ModelProto, Mapping[Path, tuple[int, int, int]]]] = (
    OrderedDict()
)
"""By path, inode, time and size: the graph, with the same of each file of weights beside it."""


def read_skeleton(path: Path) -> ModelProto:
    """Return the checked model without the values of its large tensors. It is shared: not to be changed.

    A file is parsed and checked once for as long as it and the weights beside it stay as they are.

    Raises:
        ModelFileError: As `check_model_file`.
        ExternalDataError: As `check_model_file`.
    """
    if not path.is_file():
        return read_graph(path)
    stat = path.stat()
    key = (str(path.resolve()), stat.st_ino, stat.st_mtime_ns, stat.st_size)
    known = _skeletons.get(key)
    if known and all(file.is_file() and _state(file) == state for file, state in known[1].items()):
        _skeletons.move_to_end(key)
        return known[0]
    model = read_graph(path)
    for tensor in tensors(model):
        if not is_external(tensor) and nbytes(tensor) > SMALL_TENSOR_BYTES:
            for field in VALUE_FIELDS:
                tensor.ClearField(field)
    # What is cleared stays in the memory of its message: only a copy is small.
    skeleton = ModelProto()
    skeleton.CopyFrom(model)
    _skeletons[key] = (skeleton, {file: _state(file) for file in weight_files(path, model)})
    while len(_skeletons) > _KEPT_SKELETONS:
        _skeletons.popitem(last=False)
    return skeleton


def _state(file: Path) -> tuple[int, int, int]:
    stat = file.lstat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def check_model_file(path: Path) -> None:
    """Check a model and the files that its graph names; no weight beside the graph is read.

    Raises:
        ModelFileError: The file is missing, a folder, empty, cut off, not ONNX or without a graph, or a tensor's
            dimensions do not fit its values.
        ExternalDataError: A weight file is missing, too short, a link, or outside the model's folder.
    """
    read_skeleton(path)


def read_graph(path: Path) -> ModelProto:
    """Return the checked model; weights that lie beside it stay there.

    Raises:
        ModelFileError: As `check_model_file`.
        ExternalDataError: As `check_model_file`.
    """
    model = _parse(path)
    _check(str(path), model, external.on_disk(path.parent))
    return model


def parse_graph(content: bytes, where: str, beside: Mapping[str, int]) -> ModelProto:
    """Return the checked model of a file that lies in memory.

    Args:
        content: The file.
        where: What to call it in messages.
        beside: The size in bytes of each file that lies beside it, by name.

    Raises:
        ModelFileError: As `check_model_file`.
        ExternalDataError: As `check_model_file`.
    """
    try:
        model = ModelProto.FromString(content)
    except DecodeError:
        _not_a_model(where, "bytes that are not ONNX", "Export or download the model again.")
    _check(where, model, external.in_memory(beside))
    return model


def _check(where: str, model: ModelProto, locate: Locate) -> None:
    if not model.HasField("graph") or not model.graph.output:
        _not_a_model(where, "no graph with an output", "Export the model again.")
    for text in _names(model):
        if not isinstance(text, str):
            _not_a_model(where, f"a name that is not UTF-8, {text!r}", "Export or download the model again.")
    _check_arity(where, model)
    for tensor in tensors(model):
        _check_tensor(where, tensor, locate)
    check_sizes(where, model)


def external_files(path: Path) -> tuple[Path, ...]:
    """Return the files beside a model that hold its weights, each once, in the order that the graph names them.

    Raises:
        ModelFileError: As `check_model_file`.
        ExternalDataError: As `check_model_file`.
    """
    return weight_files(path, read_skeleton(path))


def weight_files(path: Path, model: ModelProto) -> tuple[Path, ...]:
    """Return what `external_files` does, for a model that is parsed already."""
    ranges = (_range_on_disk(path, tensor) for tensor in tensors(model) if is_external(tensor))
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
    found = _range_on_disk(path, tensor)
    with found.file.open("rb") as file:
        file.seek(found.offset)
        tensor.raw_data = file.read(found.length)
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")


def _range_on_disk(path: Path, tensor: TensorProto) -> ExternalRange:
    where = f"{path}: tensor {tensor.name!r}"
    return external_range(where, tensor, nbytes(tensor), external.on_disk(path.parent))


def _check_tensor(where: str, tensor: TensorProto, locate: Locate) -> None:
    """Check that the dimensions of a tensor are sound and that its values are there."""
    where = f"{where}: tensor {tensor.name!r}"
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
        external_range(where, tensor, nbytes(tensor), locate)
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


def _parse(path: Path) -> ModelProto:
    if not path.exists():
        _not_a_model(str(path), "no such file", "Give the path of a model.")
    if path.is_dir():
        _not_a_model(str(path), "a folder", "Give the path of the .onnx file in it.")
    size = path.stat().st_size
    if size == 0:
        _not_a_model(str(path), "an empty file", "Export or download the model again.")
    if size > MAX_PROTOBUF_BYTES:
        _not_a_model(
            str(path), f"{size} bytes, more than protobuf can hold", "Save the model with its weights beside it."
        )
    try:
        model = ModelProto.FromString(path.read_bytes())
    except PermissionError:
        _not_a_model(str(path), "a file that you may not read", "Change its permissions.")
    except DecodeError:
        if pickled := _pickled(path):
            _not_a_model(str(path), pickled, "Export it to ONNX, with torch.onnx.export say; it was not opened.")
        missing = _missing_bytes(path, size)
        got = f"a file that was cut off: at least {missing} bytes are missing" if missing else "bytes that are not ONNX"
        _not_a_model(str(path), got, "Export or download the model again.")
    return model


def _pickled(path: Path) -> str | None:
    """Say what a file is that holds pickled Python objects, which run code as they are opened; None for another."""
    with path.open("rb") as file:
        start = file.read(4)
    if start == _ZIP and path.suffix.lower() in _TORCH_SUFFIXES:
        return "a file of torch, Python objects in a pickle"
    return "a pickle of Python objects" if start[:1] == _PICKLE else None


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


def _check_arity(where: str, model: ModelProto) -> None:
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
                f"{where}: node {node.name!r} ({node.op_type})",
                got=f"{len(node.input)} inputs and {len(node.output)} outputs",
                expected=f"at least {schema.min_input} and {schema.min_output}",
                mend="The file is corrupt: export or download it again.",
            )


def _not_a_model(where: str, got: str, mend: str) -> NoReturn:
    raise ModelFileError(where, got=got, expected="an ONNX model", mend=mend)


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
