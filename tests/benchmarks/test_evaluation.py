"""Figures against scikit-learn and against definitions written out, and what odd outputs do."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import (
    f1_score,
    mean_absolute_error,
    precision_score,
    r2_score,
    recall_score,
    root_mean_squared_error,
)

from onnx_lathe.benchmarks.evaluation import (
    BINS,
    Evaluation,
    Figure,
    are_probabilities,
    calibration_error,
    evaluate,
    probabilities,
)
from onnx_lathe.runtime.errors import TensorError
from onnx_lathe.runtime.samples import Array, Samples

SIZE = 500


def samples(labels: Array | None = None, size: int = SIZE) -> Samples:
    return Samples(({"x": np.zeros((size, 1), np.float32)},), labels)


def classified(noise: float = 0.5, classes: int = 4) -> tuple[Array, Array, Array]:
    """Labels, the logits of an original, and those of a candidate near it."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, SIZE)
    logits = rng.normal(size=(SIZE, classes)) + 2 * np.eye(classes)[labels]
    return labels, logits, logits + rng.normal(0, noise, logits.shape)


def figures(found: Evaluation) -> dict[str, Figure]:
    return {figure.name: figure for figure in found.figures}


def distances(found: Evaluation) -> dict[str, float]:
    return {distance.name: distance.value.value for distance in found.distances}


def test_classes_are_scored_as_scikit_learn_scores_them() -> None:
    labels, logits, near = classified()
    # A class that is answered and never labelled counts as 0, as with zero_division=0.
    logits, near = (np.concatenate([scores, np.zeros((SIZE, 1))], axis=1) for scores in (logits, near))
    logits[0, 4] = near[0, 4] = 99.0
    found = evaluate({"y": logits}, {"y": near}, samples(labels))
    for output, side in ((logits, "original"), (near, "candidate")):
        answers = output.argmax(axis=1)
        arguments = {"average": "macro", "zero_division": 0.0}
        wanted = {
            "accuracy": (answers == labels).mean(),
            "precision": precision_score(labels, answers, **arguments),
            "recall": recall_score(labels, answers, **arguments),
            "F1": f1_score(labels, answers, **arguments),
        }
        seen = {name: getattr(figure, side).value for name, figure in figures(found).items()}
        assert {name: seen[name] for name in wanted} == pytest.approx(wanted)
    for figure in found.figures:
        for interval in (figure.original, figure.candidate, figure.change):
            assert interval.low < interval.value < interval.high
        assert figure.change.value == pytest.approx(figure.candidate.value - figure.original.value)


def by_hand(chances: Array, labels: Array) -> float:
    """The calibration error as its definition reads, bin by bin."""
    confidence, right = chances.max(axis=1), chances.argmax(axis=1) == labels
    total = 0.0
    for number in range(BINS):
        here = (confidence > number / BINS) & (confidence <= (number + 1) / BINS)
        if here.any():
            total += here.mean() * abs(right[here].mean() - confidence[here].mean())
    return total


def test_calibration_follows_its_definition_for_logits_and_probabilities_alike() -> None:
    labels, logits, near = classified()
    chances = softmax(logits, axis=1)
    assert calibration_error(chances.max(axis=1), logits.argmax(axis=1) == labels) == pytest.approx(
        by_hand(chances, labels)
    )
    of_logits = evaluate({"y": logits}, {"y": near}, samples(labels))
    of_chances = evaluate({"y": chances}, {"y": softmax(near, axis=1)}, samples(labels))
    error = figures(of_logits)["expected calibration error"]
    assert error.candidate.value == pytest.approx(by_hand(softmax(near, axis=1), labels))
    same = figures(of_chances)["expected calibration error"]
    assert asdict(error.change) == pytest.approx(asdict(same.change))
    divergence = "Kullback-Leibler divergence"
    assert distances(of_logits)[divergence] == pytest.approx(distances(of_chances)[divergence])
    assert are_probabilities(chances)
    assert not are_probabilities(logits)
    assert probabilities(logits, given=False) == pytest.approx(chances)


def test_flips_go_both_ways_and_the_worst_class_comes_first() -> None:
    labels, logits, near = classified()
    found = evaluate({"y": logits}, {"y": near}, samples(labels))
    before, after = logits.argmax(axis=1) == labels, near.argmax(axis=1) == labels
    seen = distances(found)
    assert seen["right before, wrong after"] == (before & ~after).mean() > 0
    assert seen["wrong before, right after"] == (after & ~before).mean() > 0
    assert seen["other answer"] == (logits.argmax(axis=1) != near.argmax(axis=1)).mean()
    changes = [item.change.value for item in found.classes]
    assert changes == sorted(changes)
    worst = found.classes[0]
    here = labels == worst.label
    assert worst.samples == here.sum()
    assert worst.original.value == before[here].mean()
    assert worst.change.value == pytest.approx(after[here].mean() - before[here].mean())
    assert worst.change.low < worst.change.value < worst.change.high


def test_the_divergence_is_the_mean_of_scipys() -> None:
    from scipy.stats import entropy

    _, logits, near = classified()
    found = evaluate({"logits": logits}, {"logits": near}, samples())
    wanted = np.mean([entropy(*pair) for pair in zip(softmax(logits, axis=1), softmax(near, axis=1), strict=True)])
    assert distances(found)["Kullback-Leibler divergence"] == pytest.approx(wanted)
    assert (found.kind, found.figures, found.classes) == ("outputs", (), ())
    assert list(distances(found)) == [
        *("other answer", "largest difference", "Kullback-Leibler divergence", "cosine", "mean absolute difference"),
    ]


def test_equal_models_differ_in_nothing() -> None:
    labels, logits, _ = classified()
    found = evaluate({"y": logits}, {"y": logits.copy()}, samples(labels))
    assert all(figure.change.value == 0.0 for figure in found.figures)
    # Nothing changed among 500 samples: that rules out no more than this.
    assert figures(found)["accuracy"].change.high == pytest.approx(1 - 0.025 ** (1 / SIZE))
    assert distances(found) == {
        "right before, wrong after": 0.0,
        "wrong before, right after": 0.0,
        "other answer": 0.0,
        "largest difference": 0.0,
        "Kullback-Leibler divergence": pytest.approx(0.0, abs=1e-12),
        "cosine": pytest.approx(1.0),
        "mean absolute difference": 0.0,
    }
    json.dumps(asdict(found), allow_nan=False)


@pytest.mark.parametrize("outputs", [1, 3])
def test_numbers_are_scored_as_scikit_learn_scores_them(outputs: int) -> None:
    rng = np.random.default_rng(1)
    labels = 100.0 + rng.normal(size=(SIZE, outputs)) * np.arange(1, outputs + 1)
    original = (labels + rng.normal(0, 0.3, labels.shape)).astype(np.float32)
    candidate = (original + rng.normal(0, 0.2, labels.shape)).astype(np.float32)
    found = evaluate({"y": original}, {"y": candidate}, samples(labels[:, 0] if outputs == 1 else labels))
    assert found.kind == "numbers"
    wanted = {
        "mean absolute error": mean_absolute_error(labels, candidate),
        "root mean squared error": root_mean_squared_error(labels.ravel(), candidate.ravel()),
        "R2": r2_score(labels, candidate, multioutput="variance_weighted"),
    }
    assert {name: figure.candidate.value for name, figure in figures(found).items()} == pytest.approx(wanted, rel=1e-5)
    gap = np.abs(candidate.astype(np.float64) - original)
    assert distances(found)["mean absolute difference"] == pytest.approx(gap.mean())
    assert distances(found)["largest difference"] == pytest.approx(gap.max())
    assert figures(found)["mean absolute error"].change.low > 0  # the noise that was added


def test_labels_that_never_vary_leave_nothing_to_explain() -> None:
    labels = np.full(SIZE, 0.1)
    met = evaluate({"y": labels}, {"y": labels + 0.1}, samples(labels))
    assert figures(met)["R2"].original.value == 1.0
    assert figures(met)["R2"].candidate.value == 0.0


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    covered = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        truth = rng.normal(size=100)
        original = truth + rng.normal(0, 0.5, 100)
        candidate = truth + rng.exponential(0.5, 100)  # mean |error| 0.5
        change = figures(evaluate({"y": original}, {"y": candidate}, samples(truth, 100)))["mean absolute error"].change
        covered += change.low <= 0.5 - 0.5 * np.sqrt(2 / np.pi) <= change.high
    assert covered >= 34  # 95 %, less three standard errors of a simulation of 40


def test_answers_at_many_positions_count_by_share() -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(60, 7, 5))
    found = evaluate({"logits": logits}, {"logits": logits + rng.normal(0, 0.3, logits.shape)}, samples(size=60))
    assert 0.0 < distances(found)["share of other answers"] < 0.3
    assert distances(found)["Kullback-Leibler divergence"] > 0.0
    labelled = evaluate({"logits": logits}, {"logits": logits}, samples(np.zeros(60, np.int64), 60))
    assert labelled.kind == "outputs"  # a label for each sample does not fit an answer for each position


def test_classes_instead_of_scores_have_no_probabilities() -> None:
    labels, logits, near = classified()
    found = evaluate({"y": logits.argmax(axis=1)}, {"y": near.argmax(axis=1)}, samples(labels))
    assert list(figures(found)) == ["accuracy", "precision", "recall", "F1"]
    assert list(distances(found)) == ["right before, wrong after", "wrong before, right after", "other answer"]


def test_outputs_of_changing_shape_have_a_cosine() -> None:
    ragged = np.empty(3, dtype=object)
    ragged[:] = [np.ones(2), np.ones(3), np.arange(4.0)]
    assert distances(evaluate({"y": ragged}, {"y": ragged}, samples(size=3))) == {"cosine": pytest.approx(1.0)}


def test_an_answer_that_is_not_finite_is_wrong_and_counted() -> None:
    labels, logits, near = classified()
    near[:10] = np.nan
    found = evaluate({"y": logits}, {"y": near}, samples(labels))
    assert distances(found)["not finite"] == 10 / SIZE
    assert "expected calibration error" not in figures(found)
    assert figures(found)["F1"].candidate.value < figures(found)["F1"].original.value
    json.dumps(asdict(found), allow_nan=False)
    numbers = evaluate({"y": logits[:, 0]}, {"y": near[:, 0]}, samples(labels + 0.5))
    assert (numbers.figures, distances(numbers)) == ((), {"not finite": 10 / SIZE})


def test_models_with_other_outputs_are_refused() -> None:
    _, logits, _ = classified()
    with pytest.raises(TensorError, match="output 'y': got no such output, expected shape"):
        evaluate({"y": logits}, {"z": logits}, samples())
    with pytest.raises(TensorError, match=r"got shape \[500, 3\], expected shape \[500, 4\], as the original has it"):
        evaluate({"y": logits}, {"y": logits[:, :3]}, samples())


def test_an_approximate_softmax_stays_probabilities() -> None:
    generator = np.random.default_rng(0)
    chances = np.exp(generator.standard_normal((400, 10)) * 2)
    chances /= chances.sum(axis=1, keepdims=True)
    rounded = np.round(chances * 127) / 127
    samples = Samples(({"x": np.zeros((400, 1), np.float32)},), chances.argmax(axis=1))
    found = evaluate({"y": chances}, {"y": rounded}, samples)
    error = next(figure for figure in found.figures if figure.name == "expected calibration error")
    assert abs(error.change.value) < 0.02
