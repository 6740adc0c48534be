"""Weights of all layers as one form, their largest entries by channel, and channels scaled. Pure numpy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_lathe.runtime.samples import Array

Vector = NDArray[np.float64]
PIECE = 2**22
"""Entries of a weight that are looked at together."""


@dataclass(frozen=True)
class Form:
    """How a weight is laid out.

    Attributes:
        groups: Parts of the channels of a Conv, each of which sees itself alone; 1 for products.
        inputs_first: Whether the first axis runs over inputs (MatMul, and Gemm that does not transpose).
    """

    groups: int = 1
    inputs_first: bool = False


def kernels(weight: Array, form: Form) -> Array:
    """Return a view of ``weight`` as ``[groups, outputs of a group, inputs of a group, taps]``."""
    if form.inputs_first:
        return weight.T[None, :, :, None]
    return weight.reshape(form.groups, weight.shape[0] // form.groups, weight.shape[1], -1)


def inputs_of(shape: tuple[int, ...], form: Form) -> int:
    """Return how many input channels a weight of ``shape`` has."""
    return shape[0] if form.inputs_first else form.groups * shape[1]


def largest_by_output(weight: Array, form: Form, factors: Vector) -> Vector:
    """Return ``max |w|`` of each output, ``[outputs]``, with each input multiplied by ``factors [inputs]``."""
    whole = kernels(weight, form)
    scale = factors.reshape(form.groups, 1, whole.shape[2])
    largest = [(np.abs(piece).max(axis=3, initial=0.0) * scale[at]).max(axis=2) for at, piece in _pieces(whole)]
    return np.concatenate(largest, axis=0 if form.groups > 1 else 1).reshape(-1).astype(np.float64)


def largest_by_input(weight: Array, form: Form, factors: Vector) -> Vector:
    """Return ``max |w|`` of each input, ``[inputs]``, with each output multiplied by ``factors [outputs]``."""
    whole = kernels(weight, form)
    scale = factors.reshape(form.groups, whole.shape[1], 1)
    largest = np.zeros((form.groups, whole.shape[2]))
    start = 0
    for at, piece in _pieces(whole):
        part = np.abs(piece).max(axis=3, initial=0.0)
        if form.groups > 1:
            largest[at] = (part * scale[at]).max(axis=1)
        else:
            largest = np.maximum(largest, (part * scale[:, start : start + part.shape[1]]).max(axis=1))
            start += part.shape[1]
    return largest.reshape(-1)


def scaled(weight: Array, form: Form, outputs: Vector | None, inputs: Vector | None) -> Array:
    """Return a weight whose output and input channels are multiplied by factors, in its own type and layout.

    Args:
        weight: As its operator reads it.
        form: Its layout.
        outputs: ``[outputs]``, or None to leave them.
        inputs: ``[inputs]``, or None to leave them.
    """
    result = np.array(weight, order="C")
    whole = kernels(result, form)
    if outputs is not None:
        whole *= outputs.reshape(form.groups, -1, 1, 1).astype(weight.dtype)
    if inputs is not None:
        whole *= inputs.reshape(form.groups, 1, -1, 1).astype(weight.dtype)
    return result


def _pieces(whole: Array) -> Iterator[tuple[slice, Array]]:
    """Yield ``whole`` in pieces of groups, or of outputs where there is one group, with the groups of each."""
    axis = 0 if len(whole) > 1 else 1
    step = max(1, PIECE * whole.shape[axis] // max(whole.size, 1))
    for start in range(0, whole.shape[axis], step):
        piece = slice(start, start + step)
        yield (piece, whole[piece]) if axis == 0 else (slice(None), whole[:, piece])


def mean_response(weight: Array, form: Form, means: Vector) -> Vector:
    """Return what each output is where every input is its mean, ``[outputs]``.

    For a Conv that is exact inside; at a border with padding the mean of the inputs is another.
    """
    sums = kernels(weight, form).sum(axis=3, dtype=np.float64)
    return (sums @ means.reshape(form.groups, -1, 1)).reshape(-1)
