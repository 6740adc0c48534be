"""Multiply-accumulates and bytes counted by hand, and the limits that follow from them."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from onnx_lathe.benchmarks.limits import OperatorShare, executed_macs, limits, moved_bytes, total_share
from onnx_lathe.benchmarks.peaks import Peaks
from onnx_lathe.benchmarks.report.model import Report
from onnx_lathe.runtime.profile import Operand, OperatorTime
from tests.benchmarks.reports import small_report

MIB = 2**20
PEAKS = Peaks(
    threads=2,
    rates={"float32": 1e9, "uint8": 4e9, "elementwise": 1e6},
    bandwidths={64 * MIB: 1e9},
    node_seconds=0.0,
    fork_seconds=0.0,
    call_seconds=0.0,
)
"""In round numbers: one GMAC/s, four in integers, and one GB/s."""

SCALE_AND_ZERO = "float32[] uint8[]"
WEIGHT_SCALES = "float32[16] int8[16]"

PAST = "float32[2,2,3,4]"

PRODUCTS = [
    # 36 places of 16 channels, each 3 x 3 of 3 channels.
    ("Conv", "float32[1,3,8,8] float32[16,3,3,3] float32[16]", "float32[1,16,6,6]", 15_552),
    ("Conv", "float32[1,8,8,8] float32[16,2,3,3]", "float32[1,16,6,6]", 10_368),
    ("FusedConv", "float32[1,8,8,8] float32[8,1,3,3] float32[8] float32[1,8,6,6]", "float32[1,8,6,6]", 2_592),
    # 10 channels that NCHWc blocks pad to 16 are multiplied as 16.
    ("Conv", "float32[1,16,8,8] float32[16,16,1,1] float32[16]", "float32[1,16,8,8]", 16_384),
    ("NhwcFusedConv", "float16[1,8,8,3] float16[16,3,3,3]", "float16[1,6,6,16]", 15_552),
    (
        "QLinearConv",
        f"uint8[1,3,8,8] {SCALE_AND_ZERO} int8[16,3,3,3] {WEIGHT_SCALES} {SCALE_AND_ZERO} int32[16]",
        "uint8[1,16,6,6]",
        15_552,
    ),
    (
        "QLinearConv",
        f"uint8[1,8,8,3] {SCALE_AND_ZERO} int8[16,3,3,3] {WEIGHT_SCALES} {SCALE_AND_ZERO}",
        "uint8[1,6,6,16]",
        15_552,
    ),
    ("ConvInteger", "uint8[1,3,8,8] int8[16,3,3,3] uint8[]", "int32[1,16,6,6]", 15_552),
    # Each of 100 elements reaches 2 x 2 places of 3 channels, whatever the stride.
    ("ConvTranspose", "float32[1,4,5,5] float32[4,3,2,2] float32[3]", "float32[1,3,10,10]", 1_200),
    ("ConvTranspose", "float32[1,4,5] float32[4,1,2]", "float32[1,2,6]", 40),
    ("MatMul", "float32[2,5,3] float32[3,4]", "float32[2,5,4]", 120),
    ("MatMul", "float32[2,1,5,3] float32[4,3,6]", "float32[2,4,5,6]", 720),
    ("MatMul", "float32[3] float32[3,4]", "float32[4]", 12),
    ("MatMul", "float32[5,3] float32[3]", "float32[5]", 15),
    ("Gemm", "float32[5,3] float32[3,4] float32[4]", "float32[5,4]", 60),
    ("Gemm", "float32[3,5] float32[4,3] float32[4]", "float32[5,4]", 60),
    ("Gemm", "float32[4,4] float32[4,4]", "float32[4,4]", 64),
    ("FusedGemm", "float32[5,3] float32[4,3] float32[4]", "float32[5,4]", 60),
    ("FusedMatMul", "float32[2,5,3] float32[2,4,3]", "float32[2,5,4]", 120),
    ("FusedMatMul", "float32[2,3,5] float32[3,4]", "float32[2,5,4]", 120),
    # The batch stands between the sides.
    ("FusedMatMul", "float32[5,2,3] float32[2,3,4]", "float32[2,5,4]", 120),
    # Either factor is repeated over the other's batch.
    ("FusedMatMul", "float32[2,1,2,4] float32[1,2,4,3]", "float32[2,2,2,3]", 96),
    ("FusedMatMul", "float32[2,5,0] float32[2,0,4]", "float32[2,5,4]", 0),
    ("FusedMatMul", "float32[0,5,3] float32[0,3,4]", "float32[0,5,4]", 0),
    ("MatMulInteger", "uint8[5,3] int8[3,4] uint8[] int8[]", "int32[5,4]", 60),
    ("MatMulIntegerToFloat", "uint8[5,3] int8[3,4] float32[] float32[] uint8[]", "float32[5,4]", 60),
    ("DynamicQuantizeMatMul", "float32[5,3] int8[3,4] float32[] int8[]", "float32[5,4]", 60),
    ("QLinearMatMul", f"uint8[2,5,3] {SCALE_AND_ZERO} int8[3,4] float32[] int8[]", "uint8[2,5,4]", 120),
    ("QGemm", f"uint8[5,3] {SCALE_AND_ZERO} int8[3,4] float32[4] int8[4]", "float32[5,4]", 60),
    ("QGemm", f"uint8[5,3] {SCALE_AND_ZERO} int8[4,3] float32[] int8[] int32[4]", "float32[5,4]", 60),
    # Two blocks of 32 weights of 4 bits for each of 4 columns.
    ("MatMulNBits", "float32[2,5,64] uint8[4,2,16] float32[8]", "float32[2,5,4]", 2_560),
    # The projection 2*5 * 8*24, then 2*5*5 * 8 with the keys and as much with the values.
    ("Attention", "float32[2,5,8] float32[8,24] float32[24]", "float32[2,5,8]", 2_720),
    ("Attention", "float32[2,5,8] float32[8,14] float32[14] int32[2]", "float32[2,5,6]", 1_620),
    ("QAttention", "uint8[2,5,8] int8[8,24] float32[24] float32[] float32[] int32[2]", "float32[2,5,8]", 2_720),
    # 5 queries, 7 keys, 8 hidden, a batch of 2.
    ("MultiHeadAttention", "float32[2,5,8] float32[2,7,8] float32[2,7,8]", "float32[2,5,8]", 1_120),
    ("MultiHeadAttention", "float32[2,5,8] float32[2,2,7,4] float32[2,2,7,4]", "float32[2,5,8]", 1_120),
    ("MultiHeadAttention", "float32[2,5,8] float32[2,7,8] float32[2,7,8] float32[2,2,5,7]", "float32[2,5,8]", 1_120),
    # Queries in four heads of 8, keys and values in two, values of 6.
    ("Attention", "float32[2,4,5,8] float32[2,2,7,8] float32[2,2,7,6]", "float32[2,4,5,6]", 3_920),
]

UNKNOWN = [
    ("LSTM", "float32[5,2,3] float32[1,16,3] float32[1,16,4]", "float32[5,1,2,4]"),
    ("Einsum", "float32[2,3] float32[3,4]", "float32[2,4]"),
    ("GroupQueryAttention", "float32[2,5,8] float32[2,7,8] float32[2,7,8]", "float32[2,5,8]"),
    ("SomebodysOwn", "float32[2]", "float32[2]"),
    ("Gemm", "float32[5,3] float32[7,4]", "float32[5,4]"),
    ("FusedMatMul", "float32[2,5,3] float32[3]", "float32[2,5]"),
    ("MatMul", "float32[] float32[3]", "float32[3]"),
    ("Conv", "float32[1,3,8,8]", "float32[1,16,6,6]"),
    # What was there before: its length is an attribute's or a place's that the shapes do not tell.
    ("Attention", "float32[2,5,8] float32[8,24] float32[24] float32[2,2,2,3,4]", "float32[2,5,8]"),
    ("MultiHeadAttention", f"float32[2,5,8] float32[2,7,8] float32[2,7,8] {PAST} {PAST}", "float32[2,5,8]"),
    ("MultiHeadAttention", "float32[2,5,2,3,4]", "float32[2,5,8]"),
    ("MultiHeadAttention", "float32[2,5,8] float32[2,7,2,2,4]", "float32[2,5,8]"),
]


def operands(described: str) -> tuple[Operand, ...]:
    """Read ``"float32[2,3] uint8[]"``."""
    return tuple(
        Operand(dtype, tuple(int(size) for size in shape.split(",") if size))
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", described)
    )


def ran(op_type: str, inputs: str = "", outputs: str = "", seconds: float = 1.0) -> OperatorTime:
    """Return a node that the CPU executed once in a run."""
    read, written = operands(inputs), operands(outputs)
    return OperatorTime(op_type.lower(), op_type, "cpu", seconds, 1, read, written, *map(nbytes, (read, written)))


def nbytes(tensors: tuple[Operand, ...]) -> int:
    return sum(np.dtype(tensor.dtype).itemsize * math.prod(tensor.shape) for tensor in tensors)


def add(elements: int, seconds: float = 1.0) -> OperatorTime:
    """Return a sum of two tensors of float32, which moves 12 bytes an element."""
    return ran("Add", f"float32[{elements}] float32[{elements}]", f"float32[{elements}]", seconds)


def limit(operator: OperatorTime, peaks: Peaks = PEAKS) -> OperatorShare:
    return limits("model", [operator], peaks).shares[0]


@pytest.mark.parametrize(("op_type", "inputs", "outputs", "macs"), PRODUCTS)
def test_products_are_counted_from_shapes(op_type: str, inputs: str, outputs: str, macs: int) -> None:
    operator = ran(op_type, inputs, outputs)
    assert executed_macs(operator) == macs
    assert executed_macs(replace(operator, executions=5)) == 5 * macs


@pytest.mark.parametrize(("op_type", "inputs", "outputs"), UNKNOWN)
def test_what_shapes_do_not_tell_is_unknown_and_has_no_limit(op_type: str, inputs: str, outputs: str) -> None:
    found = limit(ran(op_type, inputs, outputs))
    assert (found.macs, found.limit_seconds, found.share, found.bound) == (None, None, None, "unknown")


def test_a_product_without_shapes_is_unknown() -> None:
    operator = ran("MatMul", "float32[5,3] float32[3,4]", "float32[5,4]")
    for missing in (replace(operator, inputs=None), replace(operator, outputs=None), replace(operator, outputs=())):
        assert executed_macs(missing) is None
    found = limit(replace(operator, read_bytes=None))
    assert (found.macs, found.nbytes, found.limit_seconds, found.bound) == (60, None, None, "unknown")


@pytest.mark.parametrize("op_type", ["Relu", "Softmax", "Gather", "LayerNormalization", "SkipLayerNormalization"])
def test_what_has_no_products_counts_none(op_type: str) -> None:
    assert executed_macs(ran(op_type)) == 0


@pytest.mark.parametrize(
    ("op_type", "inputs", "outputs", "moved"),
    [
        ("Add", "float32[2,3] float32[3]", "float32[2,3]", 24 + 12 + 24),
        ("Reshape", "float32[2,3] int64[1]", "float32[6]", 0),
        ("Shape", "float32[2,3]", "int64[2]", 0),
        ("Gather", "float32[1000,8] int64[2]", "float32[2,8]", 64 + 64),
        ("Gather", "float32[2] int64[100]", "float32[100]", 400 + 400),
        ("Split", "float32[8]", "float32[4] float32[4]", 32 + 32),
        ("EmbedLayerNormalization", "int32[1,2] float32[1000,8] float32[8] float32[8]", "float32[1,2,8]", 64 + 64),
    ],
)
def test_each_operand_moves_once_and_of_a_table_what_is_taken(
    op_type: str, inputs: str, outputs: str, moved: int
) -> None:
    assert moved_bytes(ran(op_type, inputs, outputs)) == moved


def test_the_longer_of_arithmetic_and_memory_is_the_limit() -> None:
    product = limit(ran("MatMul", "float32[1000,1000] float32[1000,1000]", "float32[1000,1000]", 4.0))
    assert (product.limit_seconds, product.bound, product.share) == (1.0, "arithmetic", 0.25)
    one_row = limit(ran("MatMul", "float32[1,1000] float32[1000,1000]", "float32[1,1000]"))
    assert (one_row.limit_seconds, one_row.bound) == (4_008_000 / 1e9, "memory")
    view = limit(ran("Reshape", "float32[4]", "float32[4]"))
    assert (view.limit_seconds, view.bound, view.share) == (0.0, "overhead", 0.0)
    assert limit(add(10, seconds=0.0)).share is None


@pytest.mark.parametrize(
    ("operator", "seconds", "integers"),
    [
        (ran("MatMulInteger", "uint8[1000,1000] int8[1000,1000]", "int32[1000,1000]"), 0.25, True),
        (ran("DynamicQuantizeMatMul", "float32[1000,1000] int8[1000,1000]", "float32[1000,1000]"), 0.25, True),
        (
            ran("QGemm", f"uint8[1000,1000] {SCALE_AND_ZERO} int8[1000,1000] float32[] int8[]", "float32[1000,1000]"),
            0.25,
            True,
        ),
        (ran("MatMul", "float16[1000,1000] float16[1000,1000]", "float16[1000,1000]"), 1.0, False),
        (ran("QLinearAdd", f"uint8[1000] {SCALE_AND_ZERO} uint8[1000]", "uint8[1000]"), 3005e-9, False),
    ],
)
def test_weights_of_8_bits_have_the_peak_of_integers(operator: OperatorTime, seconds: float, integers: bool) -> None:
    found = limit(operator)
    assert (found.limit_seconds, found.integers) == (pytest.approx(seconds), integers)


@pytest.mark.parametrize(("level", "seconds", "integers"), [(4, 0.25, True), (0, 1.0, False), (1, 1.0, False)])
def test_packed_weights_have_the_peak_of_what_the_node_computes_in(level: int, seconds: float, integers: bool) -> None:
    product = ran("MatMulNBits", "float32[1000,1024] uint8[1000,32,16] float32[32000]", "float32[1000,1000]")
    found = limit(replace(product, accuracy_level=level))
    assert (found.limit_seconds, found.integers) == (pytest.approx(1.024 * seconds), integers)


def test_less_moves_no_slower_than_more() -> None:
    probed = replace(PEAKS, bandwidths={MIB: 1e9, 16 * MIB: 2e9, 64 * MIB: 5e8})
    small, large = add(MIB // 12), add(64 * MIB)
    assert limit(small, probed).limit_seconds == pytest.approx(MIB / 2e9, rel=1e-4)
    assert limit(large, probed).limit_seconds == pytest.approx(12 * 64 * MIB / 5e8)
    quick = replace(probed, rates={**PEAKS.rates, "elementwise": 4e9})
    assert limit(small, quick).limit_seconds == pytest.approx(MIB / 4e9, rel=1e-4)
    assert limit(large, quick).limit_seconds == limit(large, probed).limit_seconds
    # Many executions of little are not one of much.
    often = replace(large, executions=64 * 12, read_bytes=8 * 64 * MIB, written_bytes=4 * 64 * MIB)
    assert limit(often, probed).limit_seconds == pytest.approx(12 * 64 * MIB / 2e9)


def test_nodes_elsewhere_than_on_the_cpu_have_no_limit() -> None:
    found = limit(replace(add(1000), provider="cuda"))
    assert (found.macs, found.nbytes, found.limit_seconds, found.bound) == (0, 12_000, None, "unknown")


def test_a_model_is_judged_over_the_nodes_that_are_known() -> None:
    product = ran("MatMul", "float32[1000,1000] float32[1000,1000]", "float32[1000,1000]", seconds=2.0)
    made = limits(
        "model", [add(250_000_000 // 3, 4.0), ran("LSTM", seconds=10.0), ran("Loop", seconds=90.0), product], PEAKS
    )
    assert [share.op_type for share in made.shares] == ["LSTM", "Add", "MatMul"]
    assert made.seconds == 16.0
    assert made.known == pytest.approx(6 / 16)
    assert made.share == pytest.approx((1.0 + 1.0) / 6.0)
    assert total_share([share for share in made.shares if share.op_type == "LSTM"]) is None
    assert total_share([]) is None
    assert (made.float_rate, made.integer_rate, made.bandwidth, made.threads) == (1e9, 4e9, 1e9, 2)


@pytest.mark.parametrize("container", ["If", "Loop", "Scan", "SequenceMap"])
def test_nodes_that_hold_others_are_left_out(container: str) -> None:
    made = limits("model", [ran(container)], PEAKS)
    assert (made.shares, made.seconds, made.share, made.known) == ((), 0, None, 0.0)


def test_a_report_brings_rooflines_back() -> None:
    made = limits("model", [add(1000), ran("LSTM"), ran("Reshape", "float32[4]", "float32[4]")], PEAKS)
    report = replace(small_report(), rooflines=(made,))
    assert Report.from_json(report.to_json()) == report
