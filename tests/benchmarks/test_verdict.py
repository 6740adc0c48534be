"""Verdicts on synthetic blocks: what is called faster, and what is not."""

from collections.abc import Sequence

import numpy as np
import pytest

from onnx_lathe.benchmarks import canary
from onnx_lathe.benchmarks.result import Comparison, Interval, Timing
from onnx_lathe.benchmarks.verdict import compare, noise_floor

STEADY = [1.0] * 9


def timing(name: str, medians: Sequence[Sequence[float]]) -> Timing:
    """A subject whose blocks have these medians, ``[process][block]``."""
    blocks = tuple(tuple((median,) * 3 for median in process) for process in medians)
    return Timing(name, blocks, Interval(1.0, 1.0, 1.0), None, 0, 0.0)


def simulate(rng: np.random.Generator, ratio: float, processes: int, blocks: int) -> list[Timing]:
    """Two subjects with 1 % noise from process to process and from block to block, on a machine that slows down."""
    drift = np.linspace(0.0, 0.02, processes * blocks).reshape(processes, blocks)

    def log_medians() -> np.ndarray:
        return drift + rng.normal(0, 0.01, (processes, 1)) + rng.normal(0, 0.01, (processes, blocks))

    return [timing("a", np.exp(log_medians()).tolist()), timing("b", (np.exp(log_medians()) / ratio).tolist())]


def judge(ratio: float, seed: int, processes: int = 5, blocks: int = 4) -> Comparison:
    return compare(simulate(np.random.default_rng(seed), ratio, processes, blocks), STEADY)[0]


def test_against_itself_nothing_is_faster_or_slower():
    verdicts = [judge(1.0, seed).verdict for seed in range(300)]
    assert verdicts.count("faster") + verdicts.count("slower") <= 3  # 1 %; two-sided 5 % intervals beyond a margin
    assert verdicts.count("no difference") > 200


def test_a_tenth_is_found_and_its_interval_holds_it():
    found = [judge(1.1, seed) for seed in range(100)]
    assert [each.verdict for each in found].count("faster") >= 95
    assert np.mean([each.speed.low <= 1.1 <= each.speed.high for each in found]) >= 0.9
    slower = judge(1 / 1.1, 0)
    assert slower.verdict == "slower"
    assert slower.reason == "beyond the noise, 1.0%, in 5 of 5 fresh processes"


def test_one_process_is_said_to_be_one():
    found = judge(1.5, 0, processes=1, blocks=12)
    assert found.verdict == "faster"
    assert found.reason.endswith("in one process, not confirmed in fresh ones")


def test_less_than_one_percent_is_noise_however_precise():
    found = compare([timing("a", [[1.0] * 12]), timing("b", [[1 / 1.009] * 12])], STEADY)[0]
    assert (found.verdict, found.reason) == ("no difference", "not beyond the noise, 1.0%")
    assert found.speed.value == pytest.approx(1.009)


def test_the_noise_is_what_the_reference_differs_from_itself():
    unsteady = timing("a", [[1.0, 1.06] * 6])
    assert noise_floor(unsteady) == pytest.approx(np.log(1.06))
    found = compare([unsteady, timing("b", [[1 / 1.02, 1.06 / 1.02] * 6])], STEADY)[0]
    assert (found.verdict, found.reason) == ("no difference", "not beyond the noise, 6.0%")


@pytest.mark.parametrize(
    ("agreeing", "verdict", "reason"),
    [
        (9, "faster", "beyond the noise, 1.0%, in 9 of 10 fresh processes"),
        (7, "inconclusive", "seen in only 7 of 10 fresh processes"),
    ],
)
def test_a_difference_must_recur_in_most_processes(agreeing: int, verdict: str, reason: str):
    medians = [[1 / 1.2] * 4] * agreeing + [[1.01] * 4] * (10 - agreeing)
    found = compare([timing("a", [[1.0] * 4] * 10), timing("b", medians)], STEADY)[0]
    assert (found.verdict, found.reason) == (verdict, reason)


def test_an_imprecise_interval_is_inconclusive_not_equal():
    found = compare([timing("a", [[1.0] * 12]), timing("b", [[0.8, 1.2] * 6])], STEADY)[0]
    assert found.verdict == "inconclusive"
    assert found.reason == "the interval reaches both into the noise, 1.0%, and beyond 3%"


def test_many_subjects_ask_for_more_evidence():
    reference, other = timing("a", [[1.0] * 12]), timing("b", [[1 / 1.2] * 12])
    assert compare([reference, other], STEADY)[0].verdict == "faster"
    # Twelve blocks that all agree have p = 2 / 2^12; thirty times that is over 1 %.
    found = compare([reference] + [other] * 30, STEADY)
    reason = "too few processes, or too unlike each other, for so many subjects (adjusted p = 0.015)"
    assert {(each.verdict, each.reason) for each in found} == {("inconclusive", reason)}


def test_on_an_unsteady_machine_only_more_than_its_drift_counts():
    drifted = [1.0] * 6 + [1.2] * 3
    subjects = [timing("a", [[1.0] * 4] * 5)]
    subjects += [timing(name, [[1 / ratio] * 4] * 5) for name, ratio in (("same", 1.0), ("some", 1.1), ("much", 2.0))]
    same, some, much = compare(subjects, drifted)
    reason = "not beyond the drift of a fixed kernel on this unsteady machine, 20.0%"
    assert (same.verdict, same.reason) == ("inconclusive", reason)
    assert (some.verdict, some.reason) == ("inconclusive", reason)
    assert much.verdict == "faster"


def test_the_drift_is_that_of_the_thirds_and_forgives_one_outlier():
    assert canary.drift([1.0, 1.0, 1.0, 1.04, 1.04, 1.04, 1.02, 1.02, 1.02]) == pytest.approx(0.04)
    assert canary.drift([1.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]) == 0.0
    assert canary.sing() > 0.0
