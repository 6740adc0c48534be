"""Bounds of accuracy and of its drop: against exact and published values, and by simulation."""

import functools

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest

from onnx_lathe.benchmarks.proportions import (
    clopper_pearson_upper,
    drop_upper,
    least_without_loss,
    paired_change,
    samples_needed,
    tango_upper,
    wilson,
)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (7, 10), (10, 10), (450, 500)])
def test_shares_have_the_intervals_that_scipy_gives(successes: int, n: int):
    found = wilson(successes, n)
    wanted = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    exact = binomtest(successes, n, alternative="less").proportion_ci(0.95, method="exact")
    assert clopper_pearson_upper(successes, n) == pytest.approx(exact.high)


def test_without_a_loss_the_bound_is_the_rule_of_three():
    bound, method = drop_upper(0, 0, 500)
    assert bound == pytest.approx(1 - 0.05 ** (1 / 500))
    assert method.startswith("Clopper-Pearson")
    assert least_without_loss(bound + 1e-9) == 500
    assert [least_without_loss(drop) for drop in (0.0, 0.01, 1.0)] == [None, 299, 1]


def test_tangos_interval_is_the_published_one():
    # Airway hyper-responsiveness before and after transplantation, 21 children, 1 and 7 discordant: -0.517 to -0.026
    # (Fagerland, Lydersen & Laake 2014, Statistics in Medicine 33, p. 2850, table IX).
    assert tango_upper(1, 7, 21, 0.975) == pytest.approx(-0.026, abs=5e-4)
    assert -tango_upper(7, 1, 21, 0.975) == pytest.approx(-0.517, abs=5e-4)


@pytest.mark.parametrize(("losses", "gains", "n"), [(3, 1, 50), (40, 20, 160), (5, 9, 1000)])
def test_at_tangos_bound_the_score_is_the_normal_quantile(losses: int, gains: int, n: int):
    bound = tango_upper(losses, gains, n)

    def unlikely(gain: float) -> float:
        same = 1 - 2 * gain - bound
        return -(losses * np.log(gain + bound) + gains * np.log(gain) + (n - losses - gains) * np.log(same))

    reach = (max(0.0, -bound) + 1e-9, (1 - bound) / 2 - 1e-9)
    gain = minimize_scalar(unlikely, bounds=reach, method="bounded", options={"xatol": 1e-12}).x
    score = (losses - gains - n * bound) / np.sqrt(n * (2 * gain + bound - bound**2))
    assert score == pytest.approx(-1.6449, abs=1e-3)


@pytest.mark.parametrize("n", [100, 500, 2000])
@pytest.mark.parametrize(("loss", "gain"), [(0.01, 0.0), (0.01, 0.005), (0.02, 0.02), (0.05, 0.03), (0.1, 0.02)])
def test_the_bound_covers_the_drop_in_95_of_100_sets(loss: float, gain: float, n: int):
    @functools.cache
    def bound(losses: int, gains: int) -> float:
        return drop_upper(losses, gains, n)[0]

    drawn = np.random.default_rng(6).multinomial(n, [loss, gain, 1 - loss - gain], size=2000)
    covered = np.mean([bound(int(losses), int(gains)) >= loss - gain for losses, gains, _ in drawn])
    assert covered >= 0.94


@pytest.mark.parametrize(("losses", "gains"), [(0, 0), (3, 0), (3, 2), (0, 4)])
def test_as_many_samples_as_needed_just_certify(losses: int, gains: int):
    needed = samples_needed(losses, gains, 500, 0.01)
    assert needed is not None
    assert drop_upper(losses * needed / 500, gains * needed / 500, needed)[0] <= 0.01
    fewer = needed - 1
    assert drop_upper(losses * fewer / 500, gains * fewer / 500, fewer)[0] > 0.01


def test_no_number_of_samples_certifies_less_than_what_was_lost():
    assert samples_needed(5, 0, 500, 0.01) is None
    assert samples_needed(0, 0, 500, 0.0) is None
    assert samples_needed(1, 0, 1000, 0.001000001) is None  # some trillions would


def test_a_change_is_bounded_on_both_sides():
    found = paired_change(12, 5, 200)
    assert found.value == pytest.approx(-7 / 200)
    assert found.low == pytest.approx(-tango_upper(12, 5, 200, 0.975))
    assert found.high == pytest.approx(tango_upper(5, 12, 200, 0.975))
    mirrored = paired_change(5, 12, 200)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))
    unchanged = paired_change(0, 0, 200)
    assert (-unchanged.low, unchanged.high) == pytest.approx([1 - 0.025 ** (1 / 200)] * 2)


def test_the_interval_of_a_change_covers_it_in_95_of_100_sets():
    rng = np.random.default_rng(0)
    covered = 0
    for losses, gains, _ in rng.multinomial(150, [0.06, 0.03, 0.91], 400):
        found = paired_change(int(losses), int(gains), 150)
        covered += found.low <= -0.03 <= found.high
    assert covered >= 0.95 * 400 - 3 * np.sqrt(400 * 0.95 * 0.05)
