"""Model files in and out of the graph form that passes edit, weights lazy."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_lathe.runtime import loading
from onnx_lathe.runtime.errors import ModelFileError
from onnx_lathe.runtime.samples import Array
from onnx_lathe.runtime.staged import staged

EXTERNAL_ABOVE_BYTES = 256 * 2**20
"""Weights of more than this in total are written beside the graph (protobuf ends at 2 GiB)."""
INLINE_BELOW_BYTES = 1024
"""Tensors below this stay in the graph: shapes and scales must be readable without the weights."""
BLOCK = 2**20
"""Elements of a weight that are looked at together."""


def load(path: Path) -> ir.Model:
    """Open a model file; external weights stay on disk until they are read.

    Raises:
        ModelFileError: The file is missing, truncated or not ONNX.
        ExternalDataError: Its weights are missing, too short or outside its folder.
    """
    loading.check_model_file(path)
    try:
        return ir.load(path)
    except ir.serde.SerdeError as error:
        raise ModelFileError(
            str(path),
            got=f"a graph that is not valid: {error.__cause__ or error}",
            expected="a graph in which each value has one name and one origin",
            mend="Export the model again; an input or output may bear the name of a value inside: rename it.",
        ) from error


def save(model: ir.Model, path: Path) -> None:
    """Write a model, whole or not at all; it may be the file that the model was loaded from.

    Weights over `EXTERNAL_ABOVE_BYTES` go to ``<name>.data`` beside it. The model in memory keeps its own tensors.
    """
    total = sum(tensor.nbytes for tensor in _initializers(model).values())
    data = f"{path.name}.data"
    with staged(path) as part:
        if total > EXTERNAL_ABOVE_BYTES:
            ir.save(model, part, external_data=data, size_threshold_bytes=INLINE_BELOW_BYTES)
        else:
            with _inline(model):
                ir.save(model, part)
    if total <= EXTERNAL_ABOVE_BYTES:
        path.with_name(data).unlink(missing_ok=True)


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

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(np.asarray(compute(view(source).numpy()), order="C"), dtype=dtype, name=name)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name)


def blocks(array: Array) -> Iterator[Array]:
    """Yield the elements of ``array`` in order, flat, `BLOCK` at a time: what is mapped is never in memory whole."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, BLOCK):
        yield flat[start : start + BLOCK]


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
