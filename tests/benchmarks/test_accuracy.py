"""Metrics against scikit-learn and scipy, predictions in every shape, certificates."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, f1_score, r2_score

from onnx_lathe.benchmarks.accuracy import default_metric, judge, predict
from onnx_lathe.benchmarks.metrics import accuracy, argmax_agreement, f1_macro, find_metric, mean_cosine, r2, spearman
from onnx_lathe.runtime.errors import InputError, SamplesError, TensorError
from onnx_lathe.runtime.samples import Array, Feeds, Samples

SIZE = 400


def samples(labels: Array | None = None, size: int = SIZE) -> Samples:
    return Samples(({"x": np.arange(size, dtype=np.float32)[:, None]},), labels)


def classified(seed: int = 0, noise: float = 0.3) -> tuple[Array, Array, Array]:
    """Labels of 5 classes, the logits of an original, and those of a candidate near it."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, SIZE)
    logits = rng.normal(size=(SIZE, 5)) + 3 * np.eye(5)[labels]
    return labels, logits, logits + rng.normal(0, noise, logits.shape)


def test_metrics_are_scikit_learns_and_scipys():
    labels, logits, _ = classified()
    assert accuracy(logits, labels).mean() == accuracy_score(labels, logits.argmax(axis=1))
    assert f1_macro(logits, labels) == pytest.approx(f1_score(labels, logits.argmax(axis=1), average="macro"))
    scores, wanted = logits[:, 0].round(1), labels.astype(np.float64)
    assert -spearmanr(scores, wanted).statistic == pytest.approx(spearman(-scores, wanted))
    assert spearman(scores, wanted) == 0.0  # negative
    assert spearman(np.zeros(SIZE), wanted) == 0.0


@pytest.mark.parametrize("shape", [(SIZE,), (SIZE, 1), (SIZE, 7)])
def test_r2_is_scikit_learns_weighted_by_variance(shape: tuple[int, ...]):
    rng = np.random.default_rng(0)
    labels = rng.normal(3.0, rng.uniform(0.1, 5.0, shape[1:]), shape)
    output = labels + rng.normal(0, 0.5, shape)
    assert r2(output, labels) == pytest.approx(r2_score(labels, output, multioutput="variance_weighted"))
    assert r2(output.reshape(SIZE, -1), labels) == r2(output, labels)
    assert r2(-output, labels) == r2(np.full(shape, np.nan), labels) == r2(np.full(shape, np.inf), labels) == 0.0
    constant = np.zeros(shape)
    assert (r2(constant, constant), r2(output, constant)) == (1.0, 0.0)


def test_a_resample_of_r2_is_r2_of_the_resample():
    rng = np.random.default_rng(0)
    labels = rng.normal(size=(SIZE, 7))
    outputs = [labels + rng.normal(0, noise, labels.shape) for noise in (0.3, 0.6)]
    indices = rng.integers(0, SIZE, SIZE)
    found = find_metric("r2").resampled(outputs, labels)(indices)
    assert found == pytest.approx([r2(output[indices], labels[indices]) for output in outputs])


def test_f1_leaves_out_classes_that_nothing_is_of():
    assert f1_macro(np.eye(5)[[0, 0, 3, 3]], np.array([0, 0, 3, 0])) == pytest.approx(
        f1_score([0, 0, 3, 0], [0, 0, 3, 3], average="macro")
    )


def test_nan_is_always_wrong():
    logits = np.array([[1.0, 0.0], [np.nan, 0.0]])
    assert accuracy(logits, np.array([0, 0])).tolist() == [True, False]
    assert f1_macro(logits, np.array([0, 0])) == pytest.approx(2 / 3)
    assert argmax_agreement(logits, logits).tolist() == [True, False]
    assert mean_cosine(logits, logits).tolist() == [1.0, 0.0]
    assert spearman(logits[:, :1], np.array([0.0, 1.0])) == 0.0


def test_agreement_and_cosine_by_sample():
    original = np.array([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    candidate = np.array([[[0.9, 0.1], [0.2, 0.1]], [[2.0, 0.0], [2.0, 0.0]]])
    assert argmax_agreement(candidate, original).tolist() == [0.5, 1.0]
    first = 1.0 / np.sqrt(2 * 0.87) * (0.9 + 0.1)
    assert mean_cosine(candidate, original).tolist() == pytest.approx([first, 1.0])
    assert mean_cosine(np.zeros((2, 3)), np.array([[0.0] * 3, [1.0] * 3])).tolist() == [1.0, 0.0]


def test_outputs_of_all_batches_are_joined_and_progress_is_told():
    seen: list[tuple[int, int]] = []
    outputs = predict(
        lambda feeds: {"y": 2 * feeds["x"], "size": np.array(len(feeds["x"]))},
        samples(size=10),
        4,
        lambda done, total: seen.append((done, total)),
    )
    assert seen == [(4, 10), (8, 10), (10, 10)]
    assert list(outputs) == ["y"]  # `size` has no sample axis
    assert outputs["y"][:, 0].tolist() == [2.0 * number for number in range(10)]


def test_outputs_of_changing_shape_are_kept_by_sample():
    batches: tuple[Feeds, ...] = ({"x": np.ones((3, 4))}, {"x": np.ones((2, 7))})
    outputs = predict(lambda feeds: {"y": feeds["x"]}, Samples(batches), 2)
    assert [row.shape for row in outputs["y"]] == [(4,), (4,), (4,), (7,), (7,)]
    certificate = judge("mean_cosine", outputs, outputs, Samples(batches), 0.9)
    assert (certificate.drop, certificate.candidate.value) == (0.0, 1.0)


def test_a_model_without_a_sample_axis_is_refused():
    with pytest.raises(TensorError, match="no output with an entry for each sample: total"):
        predict(lambda feeds: {"total": feeds["x"].sum()}, samples(), 100)


def test_equal_outputs_are_certified_as_far_as_the_samples_reach():
    labels, logits, _ = classified()
    certificate = judge("accuracy", {"logits": logits}, {"logits": logits}, samples(labels), 0.01)
    assert (certificate.drop, certificate.losses, certificate.gains) == (0.0, 0, 0)
    assert certificate.bound == pytest.approx(1 - 0.05 ** (1 / SIZE))
    assert certificate.certified
    assert certificate.needed == 299
    tighter = judge("accuracy", {"logits": logits}, {"logits": logits}, samples(labels), 0.005)
    assert not tighter.certified
    assert tighter.needed == 598


def test_losses_and_gains_are_counted_by_sample():
    labels, logits, near = classified()
    certificate = judge("accuracy", {"logits": logits}, {"logits": near}, samples(labels), 0.5)
    right, still = logits.argmax(axis=1) == labels, near.argmax(axis=1) == labels
    assert certificate.losses == int((right & ~still).sum()) > 0
    assert certificate.gains == int((~right & still).sum()) > 0
    assert certificate.drop == pytest.approx(right.mean() - still.mean())
    assert certificate.drop < certificate.bound < 0.1
    assert certificate.original.low < right.mean() < certificate.original.high
    assert certificate.method.startswith("Tango")


def test_agreement_can_only_be_lost():
    _, logits, near = classified()
    certificate = judge("argmax_agreement", {"logits": logits}, {"logits": near}, samples(), 0.5)
    assert certificate.original.value == certificate.original.low == 1.0
    assert certificate.gains == 0
    assert certificate.losses == int((logits.argmax(axis=1) != near.argmax(axis=1)).sum())


@pytest.mark.parametrize("metric", ["mean_cosine", "f1_macro", "spearman", "r2"])
def test_other_metrics_are_bounded_by_a_bootstrap(metric: str):
    labels, logits, near = classified()
    output, other, data = logits, near, samples(labels)
    if metric == "spearman":
        output, other = (array @ np.arange(5.0) for array in (logits, near))
    if metric == "r2":
        data = samples(np.eye(5)[labels] * 3.0)
    found = judge(metric, {"y": output}, {"y": other}, data, 0.05)
    assert found.original.low <= found.original.value <= found.original.high
    assert found.candidate.low < found.candidate.value < found.candidate.high
    assert found.drop == pytest.approx(found.original.value - found.candidate.value)
    assert max(found.drop, 1 - 0.05 ** (1 / SIZE)) <= found.bound < found.drop + 0.05
    assert (found.losses, found.gains) == (None, None)
    assert found == judge(metric, {"y": output}, {"y": other}, data, 0.05)


def test_a_bootstrap_cannot_vouch_for_what_no_sample_showed():
    _, logits, _ = classified()
    found = judge("mean_cosine", {"y": logits}, {"y": logits + 1e-9}, samples(), 0.005)
    assert found.bound == pytest.approx(1 - 0.05 ** (1 / SIZE))
    assert not found.certified
    assert found.needed == 598
    _, _, far = classified(noise=3.0)
    assert judge("mean_cosine", {"y": logits}, {"y": far}, samples(), 0.005).needed is None


def test_the_bootstrapped_bound_of_a_mean_covers_the_drop():
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(60):
        candidate = np.stack([np.ones(80), rng.exponential(0.2, 80)], axis=1)  # cosine 1 / sqrt(1 + x^2)
        original = np.tile([1.0, 0.0], (80, 1))
        covered += judge("mean_cosine", {"y": original}, {"y": candidate}, samples(size=80), 0.5).bound >= DROP
    assert covered >= 53  # 95 %, less three standard errors of a simulation of 60


DROP = 1 - np.mean(1 / np.sqrt(1 + np.random.default_rng(8).exponential(0.2, 1_000_000) ** 2))


def test_the_first_output_is_judged_unless_another_is_named():
    labels, logits, near = classified()
    original, candidate = {"a": logits, "b": logits}, {"b": logits, "a": near}
    assert judge("accuracy", original, candidate, samples(labels), 0.01).drop != 0.0
    assert judge("accuracy", original, candidate, samples(labels), 0.01, output="b").drop == 0.0
    with pytest.raises(TensorError, match="output 'c': got outputs a, b"):
        judge("accuracy", original, candidate, samples(labels), 0.01, output="c")


def test_the_default_metric_fits_the_data():
    labels, logits, _ = classified()
    outputs: Mapping[str, Array] = {"logits": logits}
    assert default_metric(samples(labels), outputs) == "accuracy"
    assert default_metric(samples(logits + 0.5), outputs) == "r2"
    assert default_metric(samples(labels + 0.5), {"score": labels + 0.4}) == "r2"
    assert default_metric(samples(labels + 0.5), {"similarity": labels / 5.0}) == "spearman"
    assert default_metric(samples(), outputs) == "argmax_agreement"
    assert default_metric(samples(), {"y": np.full((SIZE, 4), 0.25)}) == "argmax_agreement"
    assert default_metric(samples(), {"embedding": logits}) == "mean_cosine"


USERS = """
import numpy as np

def top2(output, labels):
    return (np.argsort(output, axis=1)[:, -2:] == labels[:, None]).any(axis=1)

def percent(output, labels):
    return 100.0 * (output.argmax(axis=1) == labels).mean()

def whole(output, labels):
    return (output.argmax(axis=1) == labels).mean()
"""


def test_a_users_metric_may_be_by_sample_or_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "users_metrics.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    labels, logits, near = classified()
    arguments = ({"y": logits}, {"y": near}, samples(labels), 0.05)
    assert judge("users_metrics:top2", *arguments).losses is not None
    assert judge("users_metrics:whole", *arguments).drop == pytest.approx(judge("accuracy", *arguments).drop)
    with pytest.raises(TensorError, match=r"users_metrics:percent: got shape \[\], .*expected one value, or 400"):
        judge("users_metrics:percent", *arguments)
    with pytest.raises(InputError, match="no attribute 'nothing'"):
        find_metric("users_metrics:nothing")


def test_what_cannot_be_judged_is_refused():
    labels, logits, _ = classified()
    outputs = {"y": logits}
    with pytest.raises(InputError, match=r"metric 'acuracy': got an unknown metric, expected one of accuracy, f1"):
        judge("acuracy", outputs, outputs, samples(labels), 0.01)
    with pytest.raises(SamplesError, match="got samples without labels, expected labels, which the metric 'accuracy'"):
        judge("accuracy", outputs, outputs, samples(), 0.01)
    with pytest.raises(SamplesError, match="got one sample, expected at least two"):
        judge("mean_cosine", {"y": logits[:1]}, {"y": logits[:1]}, samples(size=1), 0.01)
    with pytest.raises(TensorError, match=r"output of shape \[400, 5\] .*expected one score for each sample"):
        judge("spearman", outputs, outputs, samples(labels), 0.01)
    with pytest.raises(TensorError, match=r"metric r2: got an output of shape \[400, 5\] .* labels \[400\]"):
        judge("r2", outputs, outputs, samples(labels), 0.01)
    with pytest.raises(TensorError, match="expected scores"):
        judge("accuracy", {"y": logits[:, :1]}, {"y": logits[:, :1]}, samples(labels), 0.01)


def test_a_class_that_is_called_minus_one_is_averaged() -> None:
    labels, answers = np.array([-1, -1, 1, 1, 1]), np.array([-1, 1, 1, 1, -1])
    assert f1_macro(answers, labels) == pytest.approx(f1_score(labels, answers, average="macro"))
