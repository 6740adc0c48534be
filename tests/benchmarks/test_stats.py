"""Intervals keep their coverage, and agree with scipy or a printed source where there is one."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from onnx_lathe.benchmarks.stats import (
    bca_bootstrap,
    beyond_p_value,
    hodges_lehmann,
    holm,
    least_samples,
    mean_beyond_p_value,
    mean_interval,
    percentile,
    studentized_bootstrap,
)
from onnx_lathe.runtime.errors import MeasurementError


@pytest.mark.parametrize(("quantile", "least"), [(0.5, 11), (0.9, 64), (0.95, 130), (0.99, 662), (0.999, 6636)])
def test_a_percentile_needs_as_many_values_as_mlperfs_bound_says(quantile: float, least: int):
    assert least_samples(quantile) == least
    assert scipy_stats.binom.cdf(1, least, 1 - quantile) <= 0.01 < scipy_stats.binom.cdf(1, least - 1, 1 - quantile)


def test_a_percentile_of_too_few_values_is_refused():
    assert percentile(range(64), 0.9).value == pytest.approx(56.7)
    with pytest.raises(MeasurementError, match=r"p90: got 63 values, expected at least 64\. Measure for longer"):
        percentile(range(63), 0.9)


@pytest.mark.parametrize(("quantile", "n"), [(0.5, 11), (0.5, 100), (0.9, 64), (0.99, 700)])
def test_order_statistics_hold_the_quantile_of_any_distribution(quantile: float, n: int):
    rng = np.random.default_rng(1)
    truth = -np.log(1 - quantile)
    found = [percentile(rng.exponential(size=n), quantile) for _ in range(1000)]
    # At least 95 % by construction; three standard errors of a simulation of 1,000 allow for 93 %.
    assert np.mean([each.low <= truth <= each.high for each in found]) > 0.93
    assert all(each.low <= each.value <= each.high for each in found)


def test_hodges_lehmann_is_the_median_of_walsh_averages_with_the_signed_rank_interval():
    found = hodges_lehmann([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    walsh = sorted((a + b) / 2 for i, a in enumerate([1, 2, 4, 8, 16, 32]) for b in [1, 2, 4, 8, 16, 32][i:])
    assert found.value == np.median(walsh)
    # With 6 differences P(T+ <= 0) = 1/64 is the only tail under 2.5 %: the interval is the range.
    assert (found.low, found.high) == (1.0, 32.0)
    with pytest.raises(ValueError, match="needs 6 differences, not 5"):
        hodges_lehmann([1.0] * 5)


@pytest.mark.parametrize("n", [8, 20])
def test_hodges_lehmann_covers_the_centre_and_inverts_the_test(n: int):
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(1000):
        differences = rng.standard_t(3, size=n) + 0.3
        interval = hodges_lehmann(differences)
        covered += interval.low <= 0.3 <= interval.high
        assert (beyond_p_value(differences, 0.0) <= 0.05) == (interval.low > 0 or interval.high < 0)
    assert 0.93 < covered / 1000 < 0.98


def test_the_p_value_beyond_a_margin_is_wilcoxons():
    differences = np.random.default_rng(3).normal(0.2, 0.3, 15)
    wanted = scipy_stats.wilcoxon(differences - 0.05, alternative="greater", method="exact").pvalue
    assert beyond_p_value(differences, 0.05) == pytest.approx(2 * wanted)
    assert beyond_p_value(-differences, 0.05) == pytest.approx(2 * wanted)
    assert beyond_p_value(differences, 0.2) == 1.0


def test_the_mean_has_students_interval():
    values = [1.0, 2.0, 4.0]
    low, high = scipy_stats.t.interval(0.95, 2, np.mean(values), scipy_stats.sem(values))
    found = mean_interval(values)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_studentized_bootstrap_covers_the_mean_of_skewed_values():
    rng = np.random.default_rng(4)
    bounds = [studentized_bootstrap(rng.exponential(size=80), [0.95])[0] for _ in range(150)]
    # 95 %, less three standard errors of a simulation of 150.
    assert np.mean(np.array(bounds) >= 1.0) > 0.89


def test_a_mean_that_too_few_samples_differ_from_has_no_bound():
    values = np.zeros(100)
    assert studentized_bootstrap(values + 0.3, [0.025, 0.95]).tolist() == [0.3, 0.3]
    values[0] = 1.0  # 37 % of all resamples miss it and have no spread
    assert studentized_bootstrap(values, [0.95])[0] == np.inf


def test_bca_agrees_with_scipys_and_repeats_itself():
    values = np.random.default_rng(5).exponential(size=60)

    def mean_and_spread(indices: np.ndarray) -> np.ndarray:
        return np.array([values[indices].mean(), values[indices].std()])

    found = bca_bootstrap(mean_and_spread, 60, [0.025, 0.975])
    for column, statistic in enumerate((np.mean, np.std)):
        wanted = scipy_stats.bootstrap((values,), statistic, n_resamples=5000, method="BCa", rng=0).confidence_interval
        # A resampled quantile moves by some hundredths between 1,000 and 5,000 resamples.
        assert found[:, column] == pytest.approx([wanted.low, wanted.high], abs=0.05)
    assert np.array_equal(found, bca_bootstrap(mean_and_spread, 60, [0.025, 0.975]))


def test_bca_of_what_does_not_vary_is_that():
    assert bca_bootstrap(lambda indices: np.array([0.5]), 10, [0.025, 0.975]).tolist() == [[0.5], [0.5]]


def test_the_p_value_of_a_mean_beyond_a_margin_is_students():
    values = np.array([0.02, 0.05, 0.03, 0.04, 0.06])
    wanted = float(scipy_stats.ttest_1samp(values, 0.01, alternative="greater").pvalue)
    assert mean_beyond_p_value(values, 0.01) == pytest.approx(2 * wanted)
    assert mean_beyond_p_value(-values, 0.01) == pytest.approx(2 * wanted)
    assert mean_beyond_p_value(values, 0.2) == 1.0
    assert (mean_beyond_p_value([0.1, 0.1], 0.01), mean_beyond_p_value([0.01, 0.01], 0.1)) == (0.0, 1.0)
