"""What goes into a model: its declared inputs, checks of arrays against them, and arrays to try it with."""

from __future__ import annotations

import difflib
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import ModelProto, ValueInfoProto

from onnx_lathe.runtime import loading
from onnx_lathe.runtime.errors import ModelFileError, SamplesError, TensorError, UnsupportedModelError
from onnx_lathe.runtime.samples import Array, Feeds, Samples
from onnx_lathe.runtime.staged import staged

BATCH_SIZE = 2
"""Size of a symbolic first dimension that nobody gave: more than one, so that a mixed-up batch shows."""
OTHER_SIZE = 16
"""Size of any other symbolic dimension that nobody gave."""
TOKENS = 1000
"""Random integers lie under this, and under the number of rows of the table that they index."""

MAX_RANDOM_BYTES = 2**32
"""The largest random input: a graph or a user may name sizes that no memory holds."""

STRING = np.dtype(object)
"""How the dtype of a string tensor is written; arrays of ``str`` and ``bytes`` fit it too."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a model.

    Attributes:
        name: Its name.
        dtype: Element type; `STRING` for strings.
        shape: A number where a dimension is fixed, its name where it is symbolic, None where nothing is known. Empty
            for a scalar, and where the graph does not even say how many dimensions there are.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


def input_specs(model: ModelProto, where: str) -> tuple[TensorSpec, ...]:
    """Return the inputs that a run must be given: those without an initializer of the same name.

    Raises:
        UnsupportedModelError: An input is a sequence, a map or an optional; ``where`` is the model for the message.
    """
    initialized = {tensor.name for tensor in model.graph.initializer}
    return tuple(_spec(value, where) for value in model.graph.input if value.name not in initialized)


def output_specs(model: ModelProto, where: str) -> tuple[TensorSpec, ...]:
    """Return the outputs of a model.

    Raises:
        UnsupportedModelError: An output is a sequence, a map or an optional; ``where`` is the model for the message.
    """
    return tuple(_spec(value, where) for value in model.graph.output)


def check_feeds(specs: Sequence[TensorSpec], feeds: Mapping[str, ArrayLike]) -> dict[str, Array]:
    """Return ``feeds`` as arrays after checking them by name, dtype, rank and dimensions; nothing is cast.

    Raises:
        TensorError: An input is missing or unknown, has another dtype, rank or size than the model declares, or two
            inputs disagree about a symbolic dimension.
    """
    known = [spec.name for spec in specs]
    check_names("input", feeds, known)
    if missing := [name for name in known if name not in feeds]:
        raise TensorError(
            f"input {missing[0]!r}",
            got=f"no array; arrays were given for {', '.join(feeds) or 'nothing'}",
            expected=f"arrays for {', '.join(known)}",
            mend=f"Add an array for {missing[0]!r}.",
        )
    sizes: dict[str, tuple[int, str]] = {}
    arrays: dict[str, Array] = {}
    for spec in specs:
        array = _as_array(spec, feeds[spec.name])
        _check_dtype(spec, array)
        _check_shape(spec, array, sizes)
        arrays[spec.name] = array
    return arrays


def check_names(kind: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Check that each of ``names`` is one of ``known`` (inputs, outputs or dimensions, as ``kind`` says).

    Raises:
        TensorError: One is not; the message suggests a near one.
    """
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise TensorError(
                f"{kind} {name!r}",
                got=f"an unknown {kind}",
                expected=f"one of {', '.join(known)}" if known else f"none: the model has no such {kind}",
                mend=f"Did you mean {near[0]!r}?" if near else f"Leave {name!r} out.",
            )


def first_batch(model: Path, samples: Samples | None, count: int) -> Feeds:
    """Return one batch that fits ``model``: its first ``count`` samples, or random inputs where there are none.

    Where the model's batch is fixed the batch has that size, samples repeated in order where there are too few.
    Where the shapes of samples differ, those of the first one's shape are taken.

    Raises:
        SamplesError: ``samples`` lack an input of the model.
        TensorError: A sample does not fit the model.
    """
    if samples is None:
        return random_feeds(model)
    specs = input_specs(loading.read_skeleton(model), str(model))
    if missing := [spec.name for spec in specs if spec.name not in samples.names]:
        raise SamplesError(
            samples.source,
            got=f"arrays for {', '.join(samples.names)}",
            expected=f"arrays for {', '.join(spec.name for spec in specs)}",
            mend=f"Add an array for {missing[0]!r}.",
        )
    fixed = next((spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], int)), None)
    batches = samples.first(fixed or count).batches
    alike = [batch for batch in batches if _row_shapes(batch, specs) == _row_shapes(batches[0], specs)]
    joined = {spec.name: np.concatenate([batch[spec.name] for batch in alike]) for spec in specs}
    length = min(len(array) for array in joined.values())
    indices = np.arange(fixed or length) % length
    return check_feeds(specs, {name: array[indices] for name, array in joined.items()})


def random_feeds(model: Path, dims: Mapping[str, int] | None = None, seed: int = 0) -> Feeds:
    """Return inputs of the right dtype and shape: normal floats, and integers that are plausible.

    Integers that index a table are rows of it; what is called a mask is all ones, a token type all zeros, a position
    counts up. Equal arguments give equal arrays.

    Args:
        model: An ``.onnx`` file.
        dims: Sizes of symbolic dimensions by name; for the others `BATCH_SIZE` (first axis) and `OTHER_SIZE`.
        seed: Another seed gives other values.

    Raises:
        TensorError: ``dims`` names a dimension that the model does not have, a size is under 1, or an input would take
            more than `MAX_RANDOM_BYTES`.
    """
    graph = loading.read_skeleton(model)
    specs = input_specs(graph, str(model))
    sizes = bind_dims(specs, dims)
    rows = _table_rows(graph)
    generator = np.random.default_rng(seed)
    return {spec.name: _random(spec, sizes, rows.get(spec.name, TOKENS), generator) for spec in specs}


def bind_dims(specs: Sequence[TensorSpec], dims: Mapping[str, int] | None, batch: int = BATCH_SIZE) -> dict[str, int]:
    """Return a size for every symbolic dimension of ``specs``.

    A name in ``dims`` has that size; another has ``batch`` where it stands on the first axis of an input, else
    `OTHER_SIZE`.

    Raises:
        TensorError: ``dims`` names a dimension that there is not, or a size is under 1.
    """
    sizes: dict[str, int] = {}
    for spec in specs:
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str):
                sizes.setdefault(dim, OTHER_SIZE if axis else batch)
    check_names("dimension", dims or {}, list(sizes))
    for name, size in (dims or {}).items():
        if size < 1:
            raise TensorError(
                f"dimension {name!r}",
                got=str(size),
                expected="a size of at least 1",
                mend="Give a positive size.",
            )
    return sizes | dict(dims or {})


def save_npz(path: Path, arrays: Feeds) -> None:
    """Write arrays by name as an uncompressed ``.npz``, whole or not at all; strings as numpy's own, never pickled."""
    # numpy.savez takes the names as keyword arguments, and cannot write an array called `file`.
    with staged(path) as part, zipfile.ZipFile(part, "w") as archive:
        for name, values in arrays.items():
            plain = values.astype(str) if values.dtype == object else values
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, plain, allow_pickle=False)


def load_npz(path: Path) -> dict[str, Array]:
    """Read what `save_npz` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _spec(value: ValueInfoProto, where: str) -> TensorSpec:
    if not value.type.HasField("tensor_type"):
        kind = (value.type.WhichOneof("value") or "value without a type").replace("_", " ").removesuffix(" type")
        raise UnsupportedModelError(
            f"{where}: {value.name!r}",
            got=f"a {kind}",
            expected="a tensor",
            mend="Export the model so that its inputs and outputs are tensors (scikit-learn: zipmap=False).",
        )
    declared = value.type.tensor_type
    if declared.elem_type not in onnx.TensorProto.DataType.values() or not declared.elem_type:
        raise ModelFileError(
            f"{where}: {value.name!r}",
            got=f"element type {declared.elem_type}",
            expected="a type that ONNX defines",
            mend="Export the model again.",
        )
    if declared.elem_type == onnx.TensorProto.STRING:
        dtype = STRING
    else:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(declared.elem_type))
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in declared.shape.dim)
    return TensorSpec(value.name, dtype, shape)


def _as_array(spec: TensorSpec, values: ArrayLike) -> Array:
    try:
        return np.asarray(values)
    except ValueError:
        raise TensorError(
            f"input {spec.name!r}",
            got="rows of different lengths",
            expected=f"an array of shape {_shape_text(spec)}",
            mend="Pad the rows to one length.",
        ) from None


def _check_dtype(spec: TensorSpec, array: Array) -> None:
    fits = array.dtype.kind in "OSU" if spec.dtype == STRING else array.dtype == spec.dtype
    if not fits:
        expected = "str" if spec.dtype == STRING else str(spec.dtype)
        raise TensorError(
            f"input {spec.name!r}",
            got=f"dtype {array.dtype}",
            expected=expected,
            mend=f"Convert it: array.astype({expected!r}).",
        )


def _check_shape(spec: TensorSpec, array: Array, sizes: dict[str, tuple[int, str]]) -> None:
    """Compare a shape with its declaration; ``sizes`` collects size and first input of each symbolic dimension."""
    if not spec.shape:
        return
    if array.ndim != len(spec.shape):
        raise TensorError(
            f"input {spec.name!r}",
            got=f"shape {list(array.shape)}",
            expected=f"{len(spec.shape)} dimensions, {_shape_text(spec)}",
            mend="Add or remove dimensions; a single sample needs a batch dimension of 1.",
        )
    for axis, (size, declared) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if isinstance(declared, int) and size != declared:
            raise TensorError(
                f"input {spec.name!r}",
                got=f"shape {list(array.shape)}",
                expected=f"{declared} along axis {axis} of {_shape_text(spec)}",
                mend="Give an array of that shape, or export the model with a dynamic dimension there.",
            )
        if isinstance(declared, str):
            first, other = sizes.setdefault(declared, (size, spec.name))
            if size != first:
                raise TensorError(
                    f"input {spec.name!r}",
                    got=f"{size} along {declared!r} (axis {axis})",
                    expected=f"{first}, as in {other!r}",
                    mend=f"Give every input the same size along {declared!r}.",
                )


def _shape_text(spec: TensorSpec) -> str:
    return f"[{', '.join('?' if dim is None else str(dim) for dim in spec.shape)}]"


def _random(spec: TensorSpec, sizes: Mapping[str, int], rows: int, generator: np.random.Generator) -> Array:
    shape = tuple(
        dim if isinstance(dim, int) else sizes[dim] if dim else OTHER_SIZE if axis else BATCH_SIZE
        for axis, dim in enumerate(spec.shape)
    )
    size = math.prod(shape) * spec.dtype.itemsize
    if size > MAX_RANDOM_BYTES:
        raise TensorError(
            f"input {spec.name!r}",
            got=f"shape {list(shape)}, {size} bytes",
            expected=f"at most {MAX_RANDOM_BYTES} bytes of random values",
            mend="Give smaller sizes for its symbolic dimensions.",
        )
    name = spec.name.lower()
    if spec.dtype == STRING:
        return np.full(shape, "text")
    if spec.dtype.kind == "b" or "mask" in name:
        return np.ones(shape, spec.dtype)
    if spec.dtype.kind in "iu" and "position" in name:
        return np.broadcast_to(np.arange(shape[-1]) if shape else 0, shape).astype(spec.dtype)
    if spec.dtype.kind in "iu" and "type" in name:
        return np.zeros(shape, spec.dtype)
    if spec.dtype.kind in "iu":
        high = max(1, min(rows, TOKENS, int(np.iinfo(spec.dtype).max)))
        return generator.integers(0, high, shape).astype(spec.dtype)
    return generator.standard_normal(shape).astype(spec.dtype)


def _row_shapes(batch: Feeds, specs: Sequence[TensorSpec]) -> list[tuple[int, ...]]:
    return [batch[spec.name].shape[1:] for spec in specs]


def _table_rows(model: ModelProto) -> dict[str, int]:
    """Return, for each input that indexes a constant table by Gather, how many rows the smallest such table has."""
    tables = dict(loading.constants(model))
    source = {value.name: value.name for value in model.graph.input}
    rows: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in tables:
            tables[node.output[0]] = tables[node.input[0]]
        elif node.op_type in ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze") and node.input[0] in source:
            source[node.output[0]] = source[node.input[0]]
        elif node.op_type == "Gather" and node.input[0] in tables and node.input[1] in source:
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
            name = source[node.input[1]]
            rows[name] = min(tables[node.input[0]].dims[axis], rows.get(name, TOKENS))
    return rows
