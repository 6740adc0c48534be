"""Model files in and out of the graph form that passes edit, weights lazy."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_lathe.runtime import loading, providers
from onnx_lathe.runtime.errors import ExternalDataError, ModelFileError, OutputError
from onnx_lathe.runtime.samples import Array
from onnx_lathe.runtime.staged import staged

EXTERNAL_ABOVE_BYTES = 256 * 2**20
"""Weights of more than this in total are written beside the graph (protobuf ends at 2 GiB)."""
INLINE_BELOW_BYTES = 1024
"""Tensors below this stay in the graph: shapes and scales must be readable without the weights."""
BLOCK = 2**20
"""Elements of a weight that are looked at together."""
ROWS_BYTES = 2**18
"""Bytes that are read together: with what is computed from them they fit the cache of a core."""
IN_FLIGHT_BYTES = 2**28
"""Weights that are computed and not yet written; the largest one comes on top."""


def load(path: Path) -> ir.Model:
    """Open a model file; external weights stay on disk until they are read.

    Raises:
        ModelFileError: The file is missing, truncated or not ONNX.
        ExternalDataError: Its weights are missing, too short or outside its folder.
    """
    loading.check_model_file(path)
    try:
        model = ir.load(path)
    except ir.serde.SerdeError as error:
        raise ModelFileError(
            str(path),
            got=f"a graph that is not valid: {error.__cause__ or error}",
            expected="a graph in which each value has one name and one origin",
            mend="Export the model again; an input or output may bear the name of a value inside: rename it.",
        ) from error
    _lift_external_constants(model)
    return model


def save(model: ir.Model, path: Path) -> None:
    """Write a model, whole or not at all; it may be the file that the model was loaded from.

    Weights over `EXTERNAL_ABOVE_BYTES` go to ``<name>.data`` beside it. The model in memory keeps its own tensors.

    Raises:
        OutputError: Nothing can be written there, or ``<name>.data`` is there and belongs to something else.
    """
    total = _total_bytes(model)
    owned = _owns_data(path)
    if total > EXTERNAL_ABOVE_BYTES:
        _check_free(path, owned)
    with staged(path) as part:
        if total > EXTERNAL_ABOVE_BYTES:
            ir.save(
                model,
                part,
                external_data=_data(path).name,
                size_threshold_bytes=INLINE_BELOW_BYTES,
                max_workers=providers.default_threads(),
                max_in_flight_bytes=IN_FLIGHT_BYTES,
            )
        else:
            with _inline(model):
                ir.save(model, part)
    if owned and total <= EXTERNAL_ABOVE_BYTES:
        _data(path).unlink()


def move(source: Path, path: Path) -> None:
    """Move a model that `save` wrote to another folder, under the same name, whole or not at all.

    Raises:
        OutputError: As `save`.
    """
    has_data, owned = _data(source).exists(), _owns_data(path)
    if has_data:
        _check_free(path, owned)
    with staged(path) as part:
        for file in (source, _data(source)):
            if file.exists():
                os.replace(file, part.with_name(file.name))
    if owned and not has_data:
        _data(path).unlink()


def weight_bytes(path: Path) -> int:
    """Return how many bytes the weights of a model file take, those beside it included."""
    return _total_bytes(load(path))


def lazy(
    name: str,
    source: ir.TensorProtocol,
    compute: Callable[[Array], Array],
    dtype: ir.DataType,
    shape: tuple[int, ...],
) -> ir.LazyTensor:
    """Return a tensor whose values are computed from ``source`` only while it is written or run.

    Args:
        name: The name of the new tensor.
        source: The tensor to compute from, itself perhaps lazy.
        compute: Pure numpy: the array of ``source`` in, an array of ``dtype`` and ``shape`` out.
        dtype: The element type of the result.
        shape: The dimensions of the result.
    """

    return computed(name, lambda: compute(view(source).numpy()), dtype, shape)


def computed(name: str, compute: Callable[[], Array], dtype: ir.DataType, shape: tuple[int, ...]) -> ir.LazyTensor:
    """Return a tensor as `lazy` does, whose values are computed from whatever ``compute`` reads."""

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(np.asarray(compute(), order="C"), dtype=dtype, name=name)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name)


class StreamedTensor(ir.LazyTensor):
    """A tensor whose values are computed some at a time while it is written, so that it is never in memory whole.

    Args:
        name: Its name.
        parts: Returns its elements in memory order, cut anyhow; each part is good until the next is asked for.
        dtype: Its element type, of whole bytes.
        shape: Its dimensions.
    """

    __slots__ = ("_parts",)

    def __init__(
        self, name: str, parts: Callable[[], Iterable[Array]], dtype: ir.DataType, shape: tuple[int, ...]
    ) -> None:
        super().__init__(self._joined, dtype=dtype, shape=ir.Shape(shape), name=name)
        self._parts = parts

    def tofile(self, file: Any) -> None:
        """Write the elements to an open binary file, part by part."""
        done = 0
        for part in self._parts():
            done += file.write(np.ascontiguousarray(part).data.cast("B"))
        assert done == self.nbytes, f"{self.name} is computed whole"

    def _joined(self) -> ir.TensorProtocol:
        array = np.empty(self.shape.numpy(), self.dtype.numpy())
        flat, done = array.reshape(-1), 0
        for part in self._parts():
            flat[done : done + part.size] = part.reshape(-1)
            done += part.size
        assert done == flat.size, f"{self.name} is computed whole"
        return ir.Tensor(array, dtype=self.dtype, name=self.name)


def blocks(array: Array) -> Iterator[Array]:
    """Yield the elements of ``array`` in order, flat, `BLOCK` at a time: what is mapped is never in memory whole."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, BLOCK):
        yield flat[start : start + BLOCK]


def rows(tensor: ir.TensorProtocol, start: int, stop: int) -> Iterator[tuple[int, Array]]:
    """Yield rows ``start .. stop`` of a stored tensor, some at a time, each part with the number of its first row.

    External values are read and not mapped: mapped pages count as memory of the process until they are unmapped.
    A part is good until the next is asked for.

    Args:
        tensor: Of at least one dimension, its elements of whole bytes.
        start: The first row along the first axis.
        stop: One behind the last.
    """
    shape = tensor.shape.numpy()
    row = math.prod(shape[1:])
    size = tensor.dtype.itemsize
    step = max(1, ROWS_BYTES // max(1, int(row * size)))
    if not isinstance(tensor, ir.ExternalTensor):
        array = tensor.numpy()
        yield from ((first, array[first : min(first + step, stop)]) for first in range(start, stop, step))
        return
    buffer = np.empty((min(step, stop - start), *shape[1:]), tensor.dtype.numpy())
    with Path(tensor.path).open("rb", buffering=0) as file:
        file.seek((tensor.offset or 0) + int(start * row * size))
        for first in range(start, stop, step):
            part = buffer[: min(step, stop - first)]
            _read_into(file, part.reshape(-1).view(np.uint8).data, tensor)
            yield first, part


def _read_into(file: RawIOBase, target: memoryview, tensor: ir.ExternalTensor) -> None:
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])
        if not count:
            raise ExternalDataError(
                tensor.path,
                got=f"{done} bytes of a part of tensor {tensor.name!r}",
                expected=f"{len(target)}",
                mend="The file was cut off while it was read: give it again.",
            )
        done += count


def view(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Return an external tensor anew, mapped for itself: pages of a shared one stay in memory once they are read."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    return ir.ExternalTensor(
        tensor.location,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name or "",
        base_dir=tensor.base_dir,
    )


def _data(path: Path) -> Path:
    """Return the file of the weights beside a model."""
    return path.with_name(f"{path.name}.data")


def _owns_data(path: Path) -> bool:
    """Say whether the file of weights beside ``path`` is there and is that of the model at ``path``."""
    if not _data(path).exists() or not path.is_file():
        return False
    try:
        return _data(path).resolve() in {file.resolve() for file in loading.external_files(path)}
    except ModelFileError:
        return False


def _check_free(path: Path, owned: bool) -> None:
    """Refuse to write weights over a file that is not those of the model that is replaced."""
    if _data(path).exists() and not owned:
        raise OutputError(
            str(_data(path)),
            got="a file that is there and is not that of a model called " + path.name,
            expected="a free name for the weights, which are too many for the graph's own file",
            mend="Give another output, or remove that file if no model needs it.",
        )


def _lift_external_constants(model: ir.Model) -> None:
    """Make initializers of Constant nodes whose values lie in a file: only those are found, moved and inlined."""
    for graph in model.graphs():
        for node in [node for node in graph if node.op_type == "Constant" and node.domain == ""]:
            attribute = node.attributes.get("value")
            if attribute is None or attribute.is_ref() or not isinstance(attribute.value, ir.ExternalTensor):
                continue
            old, tensor = node.outputs[0], attribute.value
            tensor.name = old.name or ""
            lifted = ir.Value(name=old.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            ir.convenience.replace_all_uses_with(old, lifted, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            graph.register_initializer(lifted)


def _total_bytes(model: ir.Model) -> int:
    return sum(tensor.nbytes for tensor in _initializers(model).values())


def _initializers(model: ir.Model) -> dict[ir.Value, ir.TensorProtocol]:
    """Return every initializer, those of subgraphs too, with its tensor."""
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    return {value: value.const_value for value in values if value.const_value is not None}


@contextmanager
def _inline(model: ir.Model) -> Generator[None]:
    """Let external tensors be written into the graph: as they are they would name a file that the new place lacks."""
    external = {
        value: tensor for value, tensor in _initializers(model).items() if isinstance(tensor, ir.ExternalTensor)
    }
    try:
        for value, tensor in external.items():
            value.const_value = ir.Tensor(view(tensor).numpy(), dtype=tensor.dtype, name=tensor.name)
        yield
    finally:
        for value, tensor in external.items():
            value.const_value = tensor
