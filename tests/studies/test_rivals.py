"""The rules of other tools, on made data, and what is timed for them. No timing is asserted."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from onnx_lathe.benchmarks.subject import Subject
from tests.studies import rivals
from tests.studies.rivals import asv_verdict, pytest_benchmark_slower, separate

TEN = np.linspace(1.0, 1.009, 10)


@pytest.mark.parametrize(
    ("statistic", "percent", "slower"),
    [("mean", 5, True), ("mean", 6, False), ("min", 2, False), ("min", 1, False), ("median", 2, True)],
)
def test_pytest_benchmark_looks_at_one_statistic_and_a_percentage(statistic: str, percent: float, slower: bool):
    a = {"mean": 1.0, "min": 1.0, "median": 1.0}
    b = {"mean": 1.055, "min": 0.9, "median": 1.03}
    assert pytest_benchmark_slower(a, b, statistic, percent) == slower


def test_pytest_benchmark_allows_what_is_exactly_the_percentage():
    assert not pytest_benchmark_slower({"mean": 1.0}, {"mean": 1.5}, "mean", 50)


@pytest.mark.parametrize(
    ("ratio", "factor", "verdict"),
    [
        (1.2, 1.1, "slower"),
        (1.05, 1.1, "no difference"),
        (1.05, 1.02, "slower"),
        (1 / 1.2, 1.1, "faster"),
        (1 / 1.05, 1.1, "no difference"),
        (1.0, 1.02, "no difference"),
    ],
)
def test_asv_wants_the_medians_to_differ_by_a_factor(ratio: float, factor: float, verdict: str):
    # Odd steps: the exact test must meet no ties.
    assert asv_verdict(TEN.tolist(), (ratio * TEN + 1e-5).tolist(), factor) == verdict


def test_asv_wants_its_rank_test_to_tell_them_apart():
    a = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9]
    b = [1.05, 1.15, 1.25, 1.35, 1.95, 2.05, 2.15, 2.25, 2.35, 2.45]
    assert np.median(b) / np.median(a) > 1.1
    assert asv_verdict(a, b, 1.1) == "no difference"
    # Three samples a side can never differ at 0.2 %: the least p is 1 / 10.
    assert asv_verdict([1.0, 1.1, 1.2], [2.0, 2.1, 2.2], 1.1) == "no difference"


def test_each_rival_gets_its_fresh_processes_and_its_samples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    monkeypatch.setattr(rivals, "_ROUND_SECONDS", 0.001)
    monkeypatch.setattr(rivals, "_SAMPLE_SECONDS", 0.001)
    log = tmp_path / "calls"
    found = separate(Subject("a", "subjects:record", {"name": "a", "log": str(log)}))
    calls = Counter(line.split()[1] for line in log.read_text().splitlines())
    assert len(calls) == 3  # one for pytest-benchmark, two for asv
    assert min(calls.values()) >= 5
    assert len(found.asv) == 10
    assert set(found.benchmark) == {"mean", "min", "median"}
    assert 0.0 < found.benchmark["min"] <= found.benchmark["median"]
