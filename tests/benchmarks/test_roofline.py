from dataclasses import replace
from pathlib import Path

import pytest

from onnx_lathe.benchmarks import peaks as measured
from onnx_lathe.benchmarks.peaks import Peaks, measure_peaks
from onnx_lathe.benchmarks.roofline import Estimate, estimate
from onnx_lathe.runtime.errors import InputError
from onnx_lathe.runtime.facts import read_facts
from tests import graphs

PEAKS = Peaks(
    threads=2,
    rates={
        "float32": 1e9,
        "uint8": 4e9,
        "integer-convolution": 5e8,
        "few-products": 1e8,
        "elementwise": 1e7,
        "function": 5e6,
        "normalization": 4e6,
        "skip-normalization": 1e6,
        "transpose": 8e6,
    },
    bandwidths={1024: 4e6, 1024**2: 1e6},
    node_seconds=1e-6,
    fork_seconds=0.0,
    call_seconds=1e-5,
)
"""Slow in round numbers."""


FREE_MEMORY = replace(PEAKS, bandwidths={1: 1e15}, rates={**PEAKS.rates, "elementwise": 1e15})


def estimated(folder: Path, text: str, dims: dict[str, int] | None = None, peaks: Peaks = PEAKS) -> Estimate:
    graphs.save(graphs.build(text), folder / "m.onnx")
    return estimate(read_facts(folder / "m.onnx", dims), peaks)


def test_arithmetic_and_memory_by_hand(tmp_path: Path) -> None:
    made = estimated(
        tmp_path,
        """g (float[n, 512] x) => (float[n, 512] z, float[n, 512] y) {
          [product] z = MatMul (x, x)
          [add] y = Add (z, z)
        }""",
        {"n": 512},
    )
    by_name = {node.name: node for node in made.nodes}
    square = 4 * 512 * 512
    assert by_name["product"].seconds == pytest.approx(max(512**3 / 1e9, 2 * square / 1e6) + 1e-6)
    assert by_name["product"].bound == "memory"
    assert by_name["add"].seconds == pytest.approx(2 * square / 1e6 + 1e-6)
    assert made.seconds == pytest.approx(1e-5 + sum(node.seconds for node in made.nodes))
    assert [node.name for node in made.nodes] == ["product", "add"]
    assert made.unknown == ()


def test_bandwidth_lies_between_the_sizes_measured() -> None:
    assert PEAKS.bandwidth(1) == PEAKS.bandwidth(0) == 4e6
    assert PEAKS.bandwidth(32 * 1024) == pytest.approx(2.5e6)
    assert PEAKS.bandwidth(2**30) == 1e6
    assert PEAKS.rate("int8") == 4e9
    assert PEAKS.rate("float64") == 1e9


def test_what_runs_with_the_node_before_takes_no_time(tmp_path: Path) -> None:
    made = estimated(
        tmp_path,
        """g (float[1, 1, 8, 8] x) => (float[1, 64, 6, 6] y, float[1, 64, 6, 6] v) <float[64, 1, 3, 3] w> {
          [conv] c = Conv (x, w)
          [relu] y = Relu (c)
          [conv2] d = Conv (x, w)
          [read_twice] e = Relu (d)
          [sum] v = Add (d, e)
          [view] u = Flatten (v)
        }""",
        peaks=FREE_MEMORY,
    )
    by_name = {node.name: node for node in made.nodes}
    assert (by_name["relu"].seconds, by_name["relu"].bound) == (0.0, "fused")
    assert by_name["read_twice"].bound == "overhead"
    assert by_name["view"].seconds == 1e-6
    assert by_name["conv"].seconds == pytest.approx(9 * 64 * 36 / 1e8 + 1e-6)
    assert by_name["conv"].bound == "arithmetic"


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("g (float[1, 64] x) => (float[1, 64] y) <float[64, 64] w> { y = MatMul (x, w) }", 1e9),
        ("g (uint8[1, 64] x) => (int32[1, 64] y) <int8[64, 64] w> { y = MatMulInteger (x, w) }", 4e9),
        ("g (uint8[1, 64, 1] x) => (int32[1, 64, 1] y) <int8[64, 64, 1] w> { y = ConvInteger (x, w) }", 5e8),
        ("g (float[1, 64, 1] x) => (float[1, 64, 1] y) <float[64, 64, 1] w> { y = Conv (x, w) }", 1e9),
    ],
)
def test_products_have_the_peak_of_their_type(tmp_path: Path, text: str, rate: float) -> None:
    assert estimated(tmp_path, text, peaks=FREE_MEMORY).nodes[0].seconds == pytest.approx(
        64 * 64 / rate + 1e-6, rel=1e-3
    )


def test_work_is_shared_among_threads_where_that_pays(tmp_path: Path) -> None:
    text = "g (float[1, 64] x) => (float[1, 64] y) <float[64, 64] w> { y = MatMul (x, w) }"
    alone = 64 * 64 / 1e9
    for fork, seconds in ((alone / 4, alone * 1.25), (alone * 9, alone * 2)):
        peaks = replace(FREE_MEMORY, fork_seconds=fork)
        made = estimated(tmp_path, text, peaks=peaks)
        assert made.nodes[0].seconds == pytest.approx(seconds + 1e-6, rel=1e-3)


def test_a_normalization_after_a_sum_has_its_own_rate(tmp_path: Path) -> None:
    made = estimated(
        tmp_path,
        """g (float[2, 8, 64] x, float[2, 8, 64] z, float[64] w) => (float[2, 8, 64] y, float[2, 8, 64] v) {
          [sum] s = Add (x, z)
          [after] y = LayerNormalization (s, w)
          [alone] v = LayerNormalization (x, w)
        }""",
    )
    by_name = {node.name: node.seconds for node in made.nodes}
    nbytes = 2 * 4 * 2 * 8 * 64 + 4 * 64
    assert by_name["after"] == pytest.approx(nbytes / 1e6 + 1e-6)
    assert by_name["alone"] < by_name["after"]


def test_a_table_is_not_read_whole(tmp_path: Path) -> None:
    made = estimated(
        tmp_path, "g (int64[1, 4] ids) => (float[1, 4, 32] y) <float[1000, 32] table> { y = Gather (table, ids) }"
    )
    assert made.seconds < 4 * 32 * 1000 / 4e6


def test_unknown_nodes_are_named_and_not_summed(tmp_path: Path) -> None:
    made = estimated(
        tmp_path, "g (float[n, 4] x, bool[n] keep) => (float[m, 4] y) { [cut] y = Compress <axis = 0> (x, keep) }"
    )
    assert [(node.name, node.bound, node.seconds) for node in made.unknown] == [("cut", "unknown", 0.0)]
    assert made.seconds == PEAKS.call_seconds


def test_peaks_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "PROBE_SECONDS", 0.001)
    found = measure_peaks(1)
    assert found.threads == 1
    assert found.rates.keys() == PEAKS.rates.keys()
    assert all(rate > 0 for rate in (*found.rates.values(), *found.bandwidths.values()))
    assert list(found.bandwidths) == sorted(found.bandwidths)
    assert found.call_seconds > 0
    assert found.fork_seconds >= 0
    with pytest.raises(InputError, match="threads: got 0"):
        measure_peaks(0)


@pytest.mark.parametrize(("probe", "work"), [(105e-6, 100e-6), (8e-6, 4e-6)])
def test_a_rate_is_without_what_a_call_costs(probe: float, work: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def best(path: Path, text: str, threads: int) -> float:
        return probe if "Sqrt" not in text else 5e-6 if "t1 =" not in text else 5e-6 + 64 * 1e-7

    monkeypatch.setattr(measured, "_best", best)
    found = measure_peaks(1)
    assert found.rate("float32") == pytest.approx(128 * 768 * 768 / work)
    assert found.bandwidth(2**20) == pytest.approx(2**20 / work)
    assert (found.node_seconds, found.call_seconds) == (pytest.approx(1e-7), pytest.approx(4.9e-6))
