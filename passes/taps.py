"""Reading values inside a graph while it runs: for calibration, and for least squares after a cut."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from onnx_lathe.passes import files
from onnx_lathe.runtime.errors import SamplesError, TensorError
from onnx_lathe.runtime.samples import Array, Feeds, Samples
from onnx_lathe.runtime.session import Session

BATCH = 8
"""The most samples in one run of who reads much: all values of a batch are in memory together."""

T = TypeVar("T")


def need_samples(name: str, samples: Samples | None, purpose: str, otherwise: str = "") -> Samples:
    """Return ``samples``, or raise SamplesError where there are none.

    Args:
        name: The pass.
        samples: What the user gave.
        purpose: What they are for, as in "from which ...".
        otherwise: What to do without any, as in ", or use ...".
    """
    if samples is None:
        raise SamplesError(
            name,
            got="no samples",
            expected=f"calibration samples, {purpose}",
            mend=f"Give some hundred typical samples with --data{otherwise}.",
        )
    return samples


def not_finite_on(where: str) -> SamplesError:
    """Return the error for a value that is NaN or infinite as a network runs on samples, called ``where``."""
    return SamplesError(
        where,
        got="NaN or infinity as the network runs",
        expected="finite values",
        mend="Check that the samples are prepared as in training and that the float model is sound.",
    )


def check_finite(found: Array, name: str, samples: Samples) -> None:
    """Raise SamplesError where what was found of the value called ``name`` on ``samples`` is not finite."""
    if not np.isfinite(found).all():
        raise not_finite_on(f"{samples.source}: value {name!r}")


def portions(items: Iterable[T], size: Callable[[T], int], budget: int) -> Iterator[list[T]]:
    """Yield items in order, as many together as the budget holds by their sizes, and at least one."""
    portion: list[T] = []
    used = 0
    for item in items:
        needed = size(item)
        if portion and used + needed > budget:
            yield portion
            portion, used = [], 0
        portion.append(item)
        used += needed
    if portion:
        yield portion


def tap(model: ir.Model, names: Sequence[str], samples: Samples, batch: int = 16) -> Iterator[dict[str, Array]]:
    """Yield what the values called ``names`` are, batch by batch, as ``model`` runs on ``samples``.

    One batch is in memory at a time; ``model`` is not changed. Where the graph's own first dimension is a number,
    batches have that size and what is left over at the end is not run.

    Args:
        model: The graph.
        names: Values of the main graph: inputs, or results of nodes.
        samples: What to run; arrays that the graph has no input for are ignored.
        batch: The most samples in one run.

    Raises:
        SamplesError: ``samples`` lack an input of the graph or do not fit it.
    """
    return _run(model, names, feeds_of(model, samples, batch), samples.source)


def sizes(model: ir.Model, names: Sequence[str], samples: Samples) -> dict[str, int]:
    """Return how many bytes each value called ``names`` takes in a run of one sample (or of one batch that is fixed).

    The sample is the first of those with the most elements. The values themselves leave the run nowhere: only their
    shapes do.

    Raises:
        SamplesError: As of `tap`.
    """
    runs = feeds_of(model, samples, 1)
    feeds = max(runs, key=lambda feeds: sum(array.size for array in feeds.values()))
    inner = [name for name in names if name not in feeds]
    found = {name: feeds[name].nbytes for name in names if name in feeds}
    if inner:
        measured = expose(model, inner)
        values = list(measured.graph.outputs)
        nodes = [ir.node("Shape", [value]) for value in values]
        measured.graph.extend(nodes)
        for number, node in enumerate(nodes):
            node.outputs[0].name = f"lathe_shape_{number}"
            node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        measured.graph.outputs[:] = [node.outputs[0] for node in nodes]
        with _session(measured) as session:
            shapes = _results(session, feeds, samples.source)
        for name, value, node in zip(inner, values, nodes, strict=True):
            item = (value.dtype or ir.DataType.FLOAT).itemsize
            found[name] = int(item * math.prod(int(dim) for dim in shapes[node.outputs[0].name or ""]))
    return {name: found[name] for name in names}


def feeds_of(model: ir.Model, samples: Samples, batch: int) -> Iterator[Feeds]:
    """Return the runs that `tap` makes: an array for each input, at most ``batch`` samples, or as many as are fixed.

    Raises:
        SamplesError: ``samples`` lack an input of the graph, or make no batch that is fixed.
    """
    inputs = tuple(value.name or "" for value in model.graph.inputs if not value.is_initializer())
    if missing := [name for name in inputs if name not in samples.names]:
        raise SamplesError(
            samples.source,
            got=f"arrays for {', '.join(samples.names)}",
            expected=f"arrays for {', '.join(inputs)}",
            mend=f"Add an array for {missing[0]!r}.",
        )
    fixed = _fixed_batch(model)
    if fixed is not None and all(len(feeds[inputs[0]]) < fixed for feeds in samples.iter_batches(fixed)):
        raise SamplesError(
            samples.source,
            got=f"batches of fewer than {fixed} samples",
            expected=f"at least {fixed}: the model's batch is fixed",
            mend="Give more samples, or export the model with a dynamic batch.",
        )
    runs = ({name: arrays[name] for name in inputs} for arrays in samples.iter_batches(fixed or batch))
    return (feeds for feeds in runs if fixed is None or len(feeds[inputs[0]]) == fixed)


def _run(model: ir.Model, names: Sequence[str], runs: Iterator[Feeds], source: str) -> Iterator[dict[str, Array]]:
    inputs = {value.name for value in model.graph.inputs if not value.is_initializer()}
    inner = [name for name in names if name not in inputs]
    with _session(expose(model, inner)) if inner else nullcontext() as session:
        for feeds in runs:
            values = dict(feeds) if session is None else {**feeds, **_results(session, feeds, source)}
            yield {name: values[name] for name in names}


@contextmanager
def _session(model: ir.Model) -> Generator[Session]:
    with tempfile.TemporaryDirectory(prefix="lathe-taps-") as folder:
        target = Path(folder) / "model.onnx"
        files.save(model, target)
        yield Session(target)


def _results(session: Session, feeds: Feeds, source: str) -> dict[str, Array]:
    try:
        return session.run(feeds)
    except TensorError as error:
        raise SamplesError(
            f"{source}: {error.where}", got=error.got, expected=error.expected, mend=error.mend
        ) from None


def expose(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """Return a copy of ``model`` whose outputs are the results called ``names``, each with a type."""
    copy = model.clone()
    results = {value.name: value for node in copy.graph for value in node.outputs}
    tapped = [results[name] for name in names]
    if any(value.type is None for value in tapped):
        ShapeInferencePass(check_type=False, strict_mode=False)(copy)
    for value in tapped:
        if value.type is None:
            # Only results of operators that onnx has no schema for are left; onnxruntime checks this type as it loads.
            value.type = ir.TensorType(ir.DataType.FLOAT)
    copy.graph.outputs[:] = tapped
    return copy


def _fixed_batch(model: ir.Model) -> int | None:
    """Return the first dimension of the inputs where it is a number."""
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        first = value.shape.dims[0] if value.shape is not None and len(value.shape) else None
        if isinstance(first, int):
            return first
    return None
