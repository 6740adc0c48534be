"""How near each executed operator comes to what the machine could do.

The roofline model (Williams, Waterman, Patterson 2009, doi:10.1145/1498765.1498785): an operator takes at least its
arithmetic at the peak of its element type, and at least its bytes at the bandwidth; the longer of the two is its limit.
`onnx_lathe.benchmarks.roofline` estimates models that never ran; this judges one that was run and profiled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import onnx.defs

from onnx_lathe.benchmarks.peaks import Peaks
from onnx_lathe.runtime.profile import Operand, OperatorTime

Bound = Literal["arithmetic", "memory", "overhead", "unknown"]
"""What an operator's limit is; "overhead" where it neither multiplies nor moves anything."""

CONTAINERS = frozenset({"If", "Loop", "Scan", "SequenceMap"})
"""Operators whose time is that of the nodes inside, which are listed themselves."""

_SECOND_FACTOR = {
    **dict.fromkeys(("Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulInteger", "MatMulIntegerToFloat"), 1),
    **dict.fromkeys(("DynamicQuantizeMatMul", "MatMulNBits", "Attention", "MultiHeadAttention", "QAttention"), 1),
    **dict.fromkeys(("Conv", "FusedConv", "NhwcFusedConv", "ConvInteger", "ConvTranspose"), 1),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QGemm"), 3),
}
"""Operators whose multiply-accumulates are counted, and which input is the weight or second factor."""

_UNKNOWN = {
    *("LSTM", "GRU", "RNN", "Einsum", "DeformConv", "DFT", "STFT", "Det", "RotaryEmbedding", "LinearAttention"),
    *("QLinearConvTranspose", "CausalConvWithState", "FlexAttention"),
}
"""Operators of ONNX that may multiply much and are not counted."""

_CONTRIBUTED = {
    *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization", "BiasGelu"),
    *("EmbedLayerNormalization", "FastGelu", "QuickGelu", "BiasSoftmax", "BiasDropout", "QLinearAdd", "QLinearMul"),
    *("QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "QLinearConcat", "QLinearWhere", "QLinearReduceMean"),
    *("QLinearAveragePool", "QLinearGlobalAveragePool", "ReorderInput", "ReorderOutput", "NhwcMaxPool"),
}
"""Operators of onnxruntime's own that have no products to count."""

_VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size", "Dropout"}
"""Operators that move no values on the CPU."""
_SELECTING = {"Gather", "GatherElements", "GatherND", "Slice", "Split", "Compress", "EmbedLayerNormalization"}
"""Operators that read only part of their input, about as much as they write."""

_INTEGERS = {"int8", "uint8"}
_COMPUTES_INT8 = 4
"""The ``accuracy_level`` at which MatMulNBits rounds its input to int8; at all others it computes in floats."""

_ELEMENTWISE_BYTES = 3 * 4 * 512 * 768
"""What the peak of elementwise work moves: less than that can be expected to move as fast."""


@dataclass(frozen=True)
class OperatorShare:
    """How near one executed node came to its limit.

    Attributes:
        node: Its name in the graph that onnxruntime optimized.
        op_type: Its operator.
        macs: Multiply-accumulates of one run, as executed: of padded channels too; None where unknown.
        nbytes: Bytes read and written in one run, each operand once; None where unknown.
        seconds: Measured, of one run.
        limit_seconds: The least that the peaks allow; None where it is unknown, or did not run on the CPU.
        bound: What that limit is.
        integers: Whether its peak is that of uint8 products with int8 weights.
    """

    node: str
    op_type: str
    macs: int | None
    nbytes: int | None
    seconds: float
    limit_seconds: float | None
    bound: Bound
    integers: bool = False

    @property
    def share(self) -> float | None:
        """The limit divided by the measured time, 1 at the limit; None where unknown.

        Over 1 where the peaks were measured too low for it: noise on the machine meanwhile, operands that stay in a
        nearer cache than the bandwidth's smallest probe, a tensor read twice that moves once, or a product of a form
        that runs faster than the probe's.
        """
        return None if self.limit_seconds is None or self.seconds <= 0 else self.limit_seconds / self.seconds


@dataclass(frozen=True)
class ModelRoofline:
    """How near a model that was run came to what the machine could do.

    Attributes:
        name: The model.
        shares: Of each executed node, the longest first.
        float_rate: The measured peak of float32 products, multiply-accumulates a second.
        integer_rate: That of uint8 products with int8 weights.
        bandwidth: Bytes a second at which the largest weights probed are read, from memory where caches are smaller.
        threads: That the peaks were measured with.
    """

    name: str
    shares: tuple[OperatorShare, ...]
    float_rate: float
    integer_rate: float
    bandwidth: float
    threads: int

    @property
    def seconds(self) -> float:
        """The measured time of all nodes."""
        return sum(item.seconds for item in self.shares)

    @property
    def share(self) -> float | None:
        """Limit divided by measured time, over the nodes whose limit is known; None where none is."""
        return total_share(self.shares)

    @property
    def known(self) -> float:
        """The part of the measured time, on 0..1, that `share` is about."""
        known = sum(item.seconds for item in self.shares if item.limit_seconds is not None)
        return known / self.seconds if self.seconds else 0.0


def total_share(items: Sequence[OperatorShare]) -> float | None:
    """Return the share of the limit of several nodes together, of those whose limit is known; None where none is."""
    known = [(item.limit_seconds, item.seconds) for item in items if item.limit_seconds is not None]
    measured = sum(seconds for _, seconds in known)
    return sum(limit for limit, _ in known) / measured if measured > 0 else None


def limits(name: str, operators: Sequence[OperatorTime], peaks: Peaks) -> ModelRoofline:
    """Return how near each executed node came to its limit; nodes that only hold others are left out."""
    found = [_share(item, peaks) for item in operators if item.op_type not in CONTAINERS]
    shares = tuple(sorted(found, key=lambda item: item.seconds, reverse=True))
    return ModelRoofline(
        name,
        shares,
        peaks.rate("float32"),
        peaks.rate("uint8"),
        peaks.bandwidth(max(peaks.bandwidths)),
        peaks.threads,
    )


def executed_macs(operator: OperatorTime) -> int | None:
    """Return the multiply-accumulates of one run of an executed node, from its shapes; None where unknown.

    Attributes are not known here: a sequence's past, transposed factors and groups show in the shapes, or make it None.
    """
    op_type = operator.op_type
    if op_type not in _SECOND_FACTOR:
        return 0 if op_type in _CONTRIBUTED or (onnx.defs.has(op_type) and op_type not in _UNKNOWN) else None
    place = _SECOND_FACTOR[op_type]
    if not operator.inputs or not operator.outputs or len(operator.inputs) <= place:
        return None
    first, second, result = operator.inputs[0].shape, operator.inputs[place].shape, operator.outputs[0].shape
    if "Attention" in op_type:
        macs = _attention(operator.inputs, result)
    elif op_type == "ConvTranspose":  # each element of the input reaches one patch of each output channel
        macs = math.prod(first) * math.prod(second[1:])
    elif "Conv" in op_type:  # the weight is [channels out, channels in / groups, kernel ...]
        macs = math.prod(result) * math.prod(second[1:])
    else:
        summed = _summed(op_type, first, second, result)
        macs = None if summed is None else math.prod(result) * summed
    return None if macs is None else operator.executions * macs


def moved_bytes(operator: OperatorTime) -> int | None:
    """Return the bytes that an executed node has to move in one run; None where unknown."""
    if operator.op_type in _VIEWS:
        return 0
    if operator.read_bytes is None or operator.written_bytes is None:
        return None
    read, written = operator.read_bytes, operator.written_bytes
    return written + (min(read, written) if operator.op_type in _SELECTING else read)


def _share(operator: OperatorTime, peaks: Peaks) -> OperatorShare:
    macs, nbytes = executed_macs(operator), moved_bytes(operator)
    integers = bool(macs) and _in_integers(operator)
    limit: float | None = None
    bound: Bound = "unknown"
    if operator.provider == "cpu" and macs is not None and nbytes is not None:
        computing = macs / peaks.rate("uint8" if integers else "float32")
        moving = nbytes / _bandwidth(peaks, nbytes // operator.executions)
        limit = max(computing, moving)
        bound = "overhead" if limit == 0 else "arithmetic" if computing > moving else "memory"
    return OperatorShare(operator.node, operator.op_type, macs, nbytes, operator.seconds, limit, bound, integers)


def _bandwidth(peaks: Peaks, nbytes: int) -> float:
    """Return the bytes a second of the fastest probe that moved as much or more: less moves no slower."""
    larger = [rate for size, rate in peaks.bandwidths.items() if size >= nbytes]
    elementwise = [peaks.rate("elementwise")] if nbytes <= _ELEMENTWISE_BYTES else []
    return max([peaks.bandwidth(nbytes), *larger, *elementwise])


def _in_integers(operator: OperatorTime) -> bool:
    """Return whether products of integers are computed: where the weight is of 8 bits, or the node asks for them.

    The weight of MatMulNBits is packed into bytes whatever it computes in.
    """
    if operator.op_type == "MatMulNBits":
        return operator.accuracy_level == _COMPUTES_INT8
    place = _SECOND_FACTOR[operator.op_type]
    return operator.inputs is not None and operator.inputs[place].dtype in _INTEGERS


def _summed(op_type: str, first: tuple[int, ...], second: tuple[int, ...], result: tuple[int, ...]) -> int | None:
    """Return how many products each element of a matrix product sums; either factor may be transposed."""
    if op_type not in ("Gemm", "FusedGemm", "QGemm", "FusedMatMul"):
        return first[-1] if first else None
    if 0 in result:
        return 0
    if min(len(first), len(second), len(result)) < 2:
        return None
    *batch, height, width = result
    factors = ((first, height), (second, width))
    if all(side in shape[-2:] for shape, side in factors):
        sums = {math.prod(shape[-2:]) // side for shape, side in factors}
    else:  # onnxruntime also fuses transposes that move the batch between a factor's two sides
        sums = {math.prod(shape) // (math.prod(batch) * side) for shape, side in factors}
    return sums.pop() if len(sums) == 1 else None


def _attention(inputs: Sequence[Operand], result: tuple[int, ...]) -> int | None:
    """Return the multiply-accumulates of the products with keys and values, and of the projection where there is one.

    Masked products count: kernels compute them.
    """
    first, second = inputs[0].shape, inputs[1].shape
    if len(first) == 3 and len(second) == 2:  # onnxruntime's own, with the weight [hidden, queries + keys + values]
        if any(len(operand.shape) > 4 for operand in inputs):
            return None
        batch, length, _ = first
        queries = (second[1] - result[-1]) // 2
        return batch * length * math.prod(second) + batch * length**2 * (queries + result[-1])
    wide = [operand for operand in inputs[3:] if len(operand.shape) == 4]
    if len(first) not in (3, 4) or len(second) not in (3, 4) or len(wide) > 1:
        return None
    return second[-2] * (math.prod(first) + math.prod(result))
