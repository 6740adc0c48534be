"""The first runs of a model: they warm it up, and show whether joining requests changes their answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from onnx_lathe.runtime import parity, tensors
from onnx_lathe.runtime.errors import TensorError
from onnx_lathe.runtime.samples import Array, Feeds
from onnx_lathe.runtime.session import Session
from onnx_lathe.runtime.tensors import STRING, TensorSpec

MAX_BYTES = 2**28
"""The largest input that a model is warmed up with."""
SAME_DB = 40.0
"""Signal to noise (dB) above which two answers are the same but for the order of float arithmetic, which may tip a
value over the edge of one integer step. What the rows of a batch share costs far more, because the rows of the probe
differ by `SPREAD`."""
SPREAD = 32.0

_ALONE = "requests run one by one: "


def has_batch_axis(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Say whether the first axis of every input and output is symbolic."""
    return all(spec.shape and not isinstance(spec.shape[0], int) for spec in (*inputs, *outputs))


def warm_up(session: Session) -> str | None:
    """Run a model for the first time; where it has a batch axis, also two requests joined and each alone.

    Returns:
        Why requests must not be joined; None where they may be.
    """
    run, inputs = session.run, session.inputs
    joins = has_batch_axis(inputs, session.outputs) and not session.scales_by_run
    pair = [_request(inputs, seed, scale) for seed, scale in ((0, 1.0), (1, SPREAD))]
    try:
        alone = [run(feeds, ()) for feeds in (pair if joins else pair[:1])]
        if session.scales_by_run:
            return f"{_ALONE}dynamic quantization rounds all rows of a run on one scale"
        if not joins:
            return f"{_ALONE}an input or output has no symbolic first axis"
        whole = run({name: np.concatenate([feeds[name] for feeds in pair]) for name in pair[0]}, ())
    except TensorError as error:
        return f"{_ALONE}the model did not run on random inputs ({error.got})"
    for row, answer in enumerate(alone):
        if changed := _changed(answer, whole, row):
            return f"{_ALONE}joined with another, a request gets another {changed!r}"
    return None


def _changed(answer: Mapping[str, Array], whole: Mapping[str, Array], row: int) -> str | None:
    """Return the output whose row differs in the joined run, if one does."""
    for name, values in answer.items():
        joined = whole[name]
        if not values.ndim or len(values) != 1 or len(joined) != 2:
            return name
        part = joined[row : row + 1]
        if values.dtype.kind == "f":
            same = np.array_equal(values, part, equal_nan=True) or parity.sqnr_db(values, part) >= SAME_DB
        else:
            same = np.array_equal(values, part)
        if not same:
            return name
    return None


def _request(inputs: Sequence[TensorSpec], seed: int, scale: float) -> Feeds:
    """Return one row of inputs: normal floats times ``scale``, and integers under 2, rows of any table."""
    sizes = tensors.bind_dims(inputs, None, batch=1)
    generator = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for spec in inputs:
        shape = tuple(
            dim if isinstance(dim, int) else sizes[dim] if dim else tensors.OTHER_SIZE if axis else 1
            for axis, dim in enumerate(spec.shape)
        )
        if math.prod(shape) * spec.dtype.itemsize > MAX_BYTES:
            raise TensorError(
                f"input {spec.name!r}",
                got=f"shape {list(shape)} for one row",
                expected=f"at most {MAX_BYTES} bytes",
                mend="Serve a smaller model.",
            )
        if spec.dtype == STRING:
            feeds[spec.name] = np.full(shape, f"text {seed}", object)
        elif spec.dtype.kind == "f":
            feeds[spec.name] = (generator.standard_normal(shape) * scale).astype(spec.dtype)
        elif "mask" in spec.name.lower():
            feeds[spec.name] = np.ones(shape, spec.dtype)
        else:
            feeds[spec.name] = generator.integers(0, 2, shape).astype(spec.dtype)
    return feeds
