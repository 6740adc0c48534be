"""Agreement of explanations whose agreement is known."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from onnx_lathe.benchmarks.attribution import agree, rank_correlation, sign_agreement, top_features, top_overlap
from onnx_lathe.benchmarks.stats import Vector


def weights(seed: int, samples: int = 12, features: int = 20) -> list[Vector]:
    return list(np.random.default_rng(seed).normal(size=(samples, features)))


def near(found: list[Vector], noise: float, seed: int) -> list[Vector]:
    rng = np.random.default_rng(seed)
    return [each + rng.normal(0, noise, each.shape) for each in found]


def test_rank_correlation_is_scipys() -> None:
    one, other = weights(0, samples=2)
    assert rank_correlation(one, other) == pytest.approx(spearmanr(one, other).statistic)
    tied = one.round(0)
    assert rank_correlation(tied, other) == pytest.approx(spearmanr(tied, other).statistic)


def test_rank_correlation_where_nothing_varies() -> None:
    flat, steep = np.zeros(4), np.arange(4.0)
    assert rank_correlation(flat, flat) == 1.0
    assert rank_correlation(flat, steep) == rank_correlation(steep, flat) == 0.0
    assert rank_correlation(steep, -steep) == -1.0
    assert rank_correlation(steep, np.exp(steep)) == 1.0


def test_top_features_are_the_largest_in_size() -> None:
    assert set(top_features(np.array([0.0, -9, 1, 8, 0, 7, -6, 5, 0, 0]))) == {1, 3, 5, 6, 7}
    assert top_features(np.array([1.0, -1, 1, 1])).tolist() == [0, 1]  # half of four; the first of equals


def test_overlap_and_sign_count_top_features() -> None:
    one = np.array([9.0, 8, 0, 0, 0, 0])
    assert top_overlap(one, np.array([9.0, 0, 8, 0, 0, 7])) == pytest.approx(2 / 3)  # 0 and 2
    other = np.array([9.0, -8, 7, 0, 0, 0])
    assert top_overlap(one, other) == 1.0
    assert sign_agreement(one, other) == pytest.approx(1 / 3)


def test_equal_explanations_agree_exactly() -> None:
    found = agree("lime", weights(0), weights(0), near(weights(0), 0.3, 1))
    for interval in vars(found.between).values():
        assert (interval.value, interval.low, interval.high) == (1.0, 1.0, 1.0)
    assert not found.differs
    assert "differ from A's by no more than the noise floor" in found.sentence


def test_a_difference_beyond_the_floor_is_called_one() -> None:
    original = weights(0)
    found = agree("lime", original, near(original, 2.0, 1), near(original, 0.1, 2))
    assert found.differs
    assert found.between.rank_correlation.high < found.floor.rank_correlation.low
    assert found.shift.value == pytest.approx(found.floor.rank_correlation.value - found.between.rank_correlation.value)
    assert (
        "lime: B's explanations differ from A's by more than the noise floor: mean rank correlation" in found.sentence
    )
    assert len(found.by_sample) == 12


def test_a_difference_within_the_floor_is_none() -> None:
    original = weights(0)
    found = agree("lime", original, near(original, 1.0, 1), near(original, 1.0, 2))
    assert not found.differs
    noisy = agree("lime", original, original, weights(9))
    assert "That floor is low: with more evaluations the method would be steadier." in noisy.sentence


def test_a_method_without_chance_has_a_floor_of_one() -> None:
    original = weights(0)
    same = agree("occlusion", original, original, None)
    assert same.floor.rank_correlation.value == 1.0
    assert same.sentence.startswith("occlusion: B's explanations are A's; nothing is random in it")
    other = agree("occlusion", original, near(original, 0.1, 1), None)
    assert not other.random
    assert other.differs
    assert "its noise floor is 1 and every difference is real" in other.sentence
