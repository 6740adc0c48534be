"""Calibration for pruning: what consumers read, as moments, and the weights that least squares makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnx_lathe.passes import files
from onnx_lathe.passes.edit import Refusal
from onnx_lathe.passes.prune.apply import Kept, Refit
from onnx_lathe.passes.prune.groups import Consumer, dims, is_weight, tensor_of
from onnx_lathe.passes.prune.reconstruct import Moments, least_squares, patches
from onnx_lathe.passes.taps import tap
from onnx_lathe.runtime.samples import Array, Samples

BATCH = 16
ROWS = 16_384
"""Rows of ``X`` for each consumer, drawn evenly from all batches."""
MAX_COLUMNS = 8_192
"""Wider consumers are left as the cut made them: their Gram matrix alone would take more than half a gigabyte."""
PORTION_BYTES = 2**30
"""Statistics of consumers in memory at once; consumers beyond that wait for another run over the samples."""


@dataclass
class Refitted:
    """New values of consumers' weights and biases, already cut, by initializer."""

    values: dict[str, Array] = field(default_factory=dict[str, Array])
    refits: list[Refit] = field(default_factory=list[Refit])
    refused: list[Refusal] = field(default_factory=list[Refusal])


def energies(model: ir.Model, consumers: Sequence[Consumer], samples: Samples) -> dict[Consumer, NDArray[np.float64]]:
    """Return what each entry brings to each consumer: its variance where a bias takes its mean, else its mean square.

    Args:
        model: The graph.
        consumers: Nodes that sum over channels.
        samples: What to run.

    Raises:
        SamplesError: ``samples`` do not fit the model.
    """
    count = dict.fromkeys(consumers, 0)
    total = {consumer: np.zeros(_entries(consumer)) for consumer in consumers}
    square = {consumer: np.zeros(_entries(consumer)) for consumer in consumers}
    for values in tap(model, _names(consumers), samples, BATCH):
        for consumer in consumers:
            array = np.moveaxis(values[consumer.data.name or ""], consumer.data_axis, -1)
            rows = array.reshape(-1, array.shape[-1]).astype(np.float64)
            count[consumer] += len(rows)
            total[consumer] += rows.sum(axis=0)
            square[consumer] += np.square(rows).sum(axis=0)
    mean = {consumer: total[consumer] / count[consumer] for consumer in consumers}
    return {
        consumer: square[consumer] / count[consumer]
        - (np.square(mean[consumer]) if bias_of(consumer) is not None else 0.0)
        for consumer in consumers
    }


def refit(model: ir.Model, consumers: Sequence[Consumer], kept: Kept, samples: Samples) -> Refitted:
    """Return the weights with which consumers of cut channels come nearest to what they computed before.

    Args:
        model: The graph before the cut.
        consumers: The nodes that sum over cut channels.
        kept: What stays of each initializer.
        samples: What to run.

    Raises:
        SamplesError: ``samples`` do not fit the model.
    """
    done = Refitted()
    able: list[Consumer] = []
    for consumer in consumers:
        reason = form_obstacle(consumer) or _obstacle(consumer)
        if reason is None:
            able.append(consumer)
        else:
            done.refused.append(refused(consumer, f"no least squares {reason}"))
    for part in portions(able, lambda consumer: 8 * _columns(consumer) ** 2):
        moments = {consumer: Moments.zeros(_columns(consumer)) for consumer in part}
        for consumer, rows in stream(model, part, samples):
            moments[consumer].add(rows)
        for consumer in part:
            _solve(consumer, moments[consumer], kept, done)
    return done


def stream(model: ir.Model, consumers: Sequence[Consumer], samples: Samples) -> Iterator[tuple[Consumer, Array]]:
    """Yield what consumers multiply with their weights, ``[rows, columns]``, batch by batch: about `ROWS` for each.

    Raises:
        SamplesError: ``samples`` do not fit the model.
    """
    limit = math.ceil(ROWS / sum(1 for _ in samples.iter_batches(BATCH)))
    generator = np.random.default_rng(0)
    for values in tap(model, _names(consumers), samples, BATCH):
        for consumer in consumers:
            yield consumer, _rows(consumer, values[consumer.data.name or ""], limit, generator)


def portions(consumers: Sequence[Consumer], needed: Callable[[Consumer], int]) -> Iterator[list[Consumer]]:
    """Yield the consumers in order, as many at a time as `PORTION_BYTES` holds, at least one.

    Args:
        consumers: In order.
        needed: The bytes that one needs.
    """
    portion: list[Consumer] = []
    held = 0
    for consumer in consumers:
        if portion and held + needed(consumer) > PORTION_BYTES:
            yield portion
            portion, held = [], 0
        portion.append(consumer)
        held += needed(consumer)
    if portion:
        yield portion


def refused(consumer: Consumer, reason: str) -> Refusal:
    """Return the statement that something is not done for ``consumer``."""
    name = consumer.node.name or consumer.node.outputs[0].name or ""
    return Refusal(name, consumer.node.op_type, f"{consumer.weight.name}: {reason}")


def matrix_of(weight: Array, axis: int) -> Array:
    """Return a consumer's weight, which sums over ``axis``, as ``[columns, outputs]``."""
    return weight.reshape(len(weight), -1).T if axis == 1 else weight


def bias_of(consumer: Consumer) -> ir.Value | None:
    """Return the initializer ``[outputs]`` that is added to a consumer's outputs, where it is used for nothing else."""
    node = consumer.node
    if node.op_type == "MatMul":
        readers = list(node.outputs[0].consumers())
        alone = len(readers) == 1 and not node.outputs[0].is_graph_output()
        candidates = list(readers[0].inputs) if alone and readers[0].op_type == "Add" else []
    else:
        plain = node.attributes.get_float("alpha", 1.0) == node.attributes.get_float("beta", 1.0) == 1.0
        candidates = list(node.inputs[2:3]) if plain else []
    outputs = (_shape(consumer)[1 - consumer.axis],)
    for value in candidates:
        if value is not None and is_weight(value) and len(value.uses()) == 1 and dims(value) == outputs:
            return value
    return None


def form_obstacle(consumer: Consumer) -> str | None:
    """Return why a consumer's inputs cannot be read as rows, if that is so."""
    node, weight = consumer.node, consumer.weight
    stacked = node.op_type != "Conv" and len(_shape(consumer)) != 2
    if node.inputs[1] is not weight or consumer.data_axis == 0 or stacked:
        return "for this form of the operator"
    if node.op_type == "Conv" and node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "with automatic padding"
    return f"for weights of type {weight.dtype}" if weight.dtype != ir.DataType.FLOAT else None


def _obstacle(consumer: Consumer) -> str | None:
    """Return why least squares cannot be done for a consumer whose inputs can be read, if that is so."""
    if len(consumer.weight.uses()) > 1:
        return "for a weight that is used more than once"
    if _columns(consumer) > MAX_COLUMNS:
        return f"over {_columns(consumer)} columns, more than {MAX_COLUMNS}"
    return None


def _rows(consumer: Consumer, data: Array, limit: int, generator: np.random.Generator) -> Array:
    """Return what a consumer multiplies with its weight, ``[rows, columns]``."""
    if consumer.node.op_type == "Conv":
        attributes = consumer.node.attributes
        kernel = _shape(consumer)[2:]
        ones = (1,) * len(kernel)
        return patches(
            data,
            kernel,
            attributes.get_ints("strides", ones),
            attributes.get_ints("pads", (0,) * 2 * len(kernel)),
            attributes.get_ints("dilations", ones),
            limit,
            generator,
        )
    rows = data.reshape(-1, data.shape[-1])
    return rows if len(rows) <= limit else rows[generator.choice(len(rows), limit, replace=False)]


def _solve(consumer: Consumer, moments: Moments, kept: Kept, done: Refitted) -> None:
    """Add a consumer's new weight and bias to ``done``."""
    name = consumer.weight.name or ""
    weight = files.view(tensor_of(consumer.weight)).numpy()
    outputs = kept[name].get(1 - consumer.axis, range(weight.shape[1 - consumer.axis]))
    weight = weight.take(outputs, axis=1 - consumer.axis)
    matrix = matrix_of(weight, consumer.axis)
    taps = len(matrix) // weight.shape[consumer.axis]
    stay = np.asarray(kept[name][consumer.axis], dtype=np.int64)
    columns = (stay.reshape(-1, 1) * taps + np.arange(taps, dtype=np.int64)).ravel()
    bias = bias_of(consumer)
    solution = least_squares(moments, matrix.astype(np.float64), columns, has_bias=bias is not None)
    shape = [len(stay) if axis == consumer.axis else length for axis, length in enumerate(weight.shape)]
    solved = solution.weight.T if consumer.axis == 1 else solution.weight
    done.values[name] = solved.reshape(shape).astype(weight.dtype)
    done.refits.append(Refit(name, solution.cut_error, solution.error))
    if bias is not None:
        before = tensor_of(bias).numpy().take(outputs)
        done.values[bias.name or ""] = (before + solution.shift).astype(before.dtype)


def _names(consumers: Sequence[Consumer]) -> list[str]:
    return list(dict.fromkeys(consumer.data.name or "" for consumer in consumers))


def _shape(consumer: Consumer) -> tuple[int, ...]:
    return tuple(tensor_of(consumer.weight).shape.numpy())


def _entries(consumer: Consumer) -> int:
    return _shape(consumer)[consumer.axis]


def _columns(consumer: Consumer) -> int:
    """Return how many numbers one output is summed from."""
    shape = _shape(consumer)
    return math.prod(shape) // shape[1 - consumer.axis]
