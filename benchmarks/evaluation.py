"""Beyond one metric: what else differs between an original and a candidate on the same samples.

Shares of samples have score intervals, which stay honest where nothing changed. Every other figure is a function of
sums over samples and has a BCa bootstrap: a resample is a vector of counts times a matrix with a row for each sample,
the same counts for all figures of both models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import log_softmax, xlogy

from onnx_lathe.benchmarks.metrics import argmax_agreement, default_metric, mean_cosine, predicted_classes, to_average
from onnx_lathe.benchmarks.proportions import paired_change, wilson
from onnx_lathe.benchmarks.result import Interval
from onnx_lathe.benchmarks.stats import Vector, bca_bootstrap
from onnx_lathe.runtime.errors import TensorError
from onnx_lathe.runtime.samples import Array, Samples

BINS = 15
"""Bins of the calibration error, as in Guo et al. 2017."""

_LEVELS = (0.025, 0.975)
_LEAST_PROBABILITY = 1e-12
"""What a probability of the candidate counts as at least, so that one answer cannot make a mean infinite."""
_ROUNDING = 1e-12
"""A sum of squares about the mean below this share of the squares is rounding."""

Kind = Literal["classes", "numbers", "outputs"]
"""What the samples are judged by: labels that are classes, labels that are numbers, or only the original's outputs."""
Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Figure:
    """A figure of both models.

    Attributes:
        name: Such as "recall".
        original: The original's.
        candidate: The candidate's.
        change: ``candidate - original``, paired by sample.
        better: Whether more of it or less is better.
        share: Whether it lies on 0..1 and is told in percent.
    """

    name: str
    original: Interval
    candidate: Interval
    change: Interval
    better: Better
    share: bool


@dataclass(frozen=True)
class Distance:
    """How far the candidate's answers lie from the original's, in one figure; ``share`` as for `Figure`."""

    name: str
    value: Interval
    share: bool = False


@dataclass(frozen=True)
class ClassRecall:
    """What became of the samples of one class.

    Attributes:
        label: The class.
        samples: How many there are.
        original: Share to which the original gives its label.
        candidate: Share to which the candidate does.
        change: ``candidate - original``, paired by sample.
    """

    label: int
    samples: int
    original: Interval
    candidate: Interval
    change: Interval


@dataclass(frozen=True)
class Evaluation:
    """How a candidate differs from its original on the same samples.

    Attributes:
        kind: What the samples are judged by.
        samples: How many there are.
        figures: Of both models; empty without labels.
        distances: Between the two.
        classes: By class, the largest loss first; empty unless the labels are classes.
    """

    kind: Kind
    samples: int
    figures: tuple[Figure, ...] = ()
    distances: tuple[Distance, ...] = ()
    classes: tuple[ClassRecall, ...] = ()


@dataclass(frozen=True)
class _Scores:
    """Figures of one model that are functions of sums over samples.

    Attributes:
        rows: ``float64 [samples, k]``.
        names: Of the figures, with what is better and whether it is a share.
        compute: From the sums ``float64 [k]`` over a resample, and its size, to ``float64 [figures]``.
    """

    rows: sparse.csr_array
    names: tuple[tuple[str, Better, bool], ...]
    compute: Callable[[Vector, int], Vector]


def evaluate(
    original_outputs: Mapping[str, Array], candidate_outputs: Mapping[str, Array], samples: Samples
) -> Evaluation:
    """Compare the original's first output with the candidate's of that name, sample by sample.

    - Where labels are classes and the output gives scores ``[samples, classes]`` or classes ``[samples]``: accuracy;
      precision, recall and F1 as means over classes (scikit-learn's ``macro`` with ``zero_division=0``); the expected
      calibration error; flips; recall by class.
    - Where labels are numbers and the output has as many: mean absolute error, root of the mean squared error, R2
      (scikit-learn's ``variance_weighted``).
    - In any case how far the outputs lie apart; for scores also the share of other answers, and the mean divergence
      of Kullback and Leibler, ``sum p log(p / q)`` in nats, of the candidate's probabilities q from the original's p.

    Scores on 0..1 whose rows sum to 1 are probabilities, others are logits.

    Args:
        original_outputs: By name, as `onnx_lathe.benchmarks.accuracy.predict` returns them.
        candidate_outputs: From the same samples.
        samples: At least two, with labels or without.

    Raises:
        TensorError: The candidate lacks that output, or gives it another shape.
    """
    name, original = next(iter(original_outputs.items()))
    candidate = candidate_outputs.get(name)
    if candidate is None or candidate.shape != original.shape:
        raise TensorError(
            f"output {name!r}",
            got="no such output" if candidate is None else f"shape {list(candidate.shape)}",
            expected=f"shape {list(original.shape)}, as the original has it",
            mend="Compare models with the same outputs.",
        )
    both = (original, candidate)
    labels, kind = samples.labels, _kind(original, samples.labels)
    finite = original.dtype != object and all(bool(np.isfinite(output).all()) for output in both)
    scored = kind == "classes" or default_metric(replace(samples, labels=None), {name: original}) == "argmax_agreement"
    shares, means = _distances(original, candidate, scored=scored, finite=finite)
    figures: tuple[Figure, ...] = ()
    classes: tuple[ClassRecall, ...] = ()
    scores: tuple[_Scores, ...] = ()
    if kind == "classes" and labels is not None:
        before, after = (predicted_classes(output) == labels for output in both)
        figures = (_accuracy(before, after),)
        shares = [*_flips(before, after), *shares]
        classes = _by_class(labels, before, after)
        calibrated = finite and original.ndim == 2
        # Decided once, on the original: an approximation of a Softmax need not sum to 1.
        given = calibrated and are_probabilities(original)
        scores = tuple(_class_scores(output, labels, calibrated=calibrated, given=given) for output in both)
    elif kind == "numbers" and labels is not None and finite:
        scores = tuple(_number_scores(output, labels) for output in both)
    bootstrapped, averages = _bootstrap(scores, means, len(samples))
    return Evaluation(kind, len(samples), (*figures, *bootstrapped), (*shares, *averages), classes)


def probabilities(output: Array, *, given: bool) -> NDArray[np.float64]:
    """Return the probabilities ``[..., classes]`` that scores are (``given``), or whose logits they are."""
    return np.exp(_log_probabilities(output, given=given))


def are_probabilities(output: Array) -> bool:
    """Return whether scores ``[..., classes]`` lie on 0..1 and sum to 1 along the last axis."""
    return bool(output.min() >= 0 and output.max() <= 1 and np.allclose(output.sum(axis=-1), 1.0, atol=1e-3))


def calibration_error(confidence: Vector, right: Array) -> float:
    """Return the expected calibration error, ``sum |B| / n |accuracy(B) - confidence(B)|`` over `BINS` equal bins B.

    Guo, Pleiss, Sun & Weinberger 2017, On Calibration of Modern Neural Networks, equation 3; a bin is open on the left.

    Args:
        confidence: ``float64 [samples]`` on 0..1: the largest probability of each sample.
        right: ``bool [samples]``: whether that class is the label.
    """
    return _calibration(_calibration_rows(confidence, right).sum(axis=0), len(confidence))


def _kind(output: Array, labels: Array | None) -> Kind:
    if labels is None or output.dtype == object:
        return "outputs"
    if labels.dtype.kind in "iub":
        scored = output.ndim == 2 and output.shape[1] > 1
        return "classes" if scored or (output.ndim == 1 and output.dtype.kind in "iub") else "outputs"
    return "numbers" if output.size == labels.size and output.dtype.kind == "f" else "outputs"


def _accuracy(before: Array, after: Array) -> Figure:
    n, losses, gains = len(before), int((before & ~after).sum()), int((after & ~before).sum())
    change = paired_change(losses, gains, n)
    return Figure("accuracy", wilson(int(before.sum()), n), wilson(int(after.sum()), n), change, "higher", share=True)


def _flips(before: Array, after: Array) -> list[Distance]:
    n = len(before)
    return [
        Distance("right before, wrong after", wilson(int((before & ~after).sum()), n), share=True),
        Distance("wrong before, right after", wilson(int((after & ~before).sum()), n), share=True),
    ]


def _by_class(labels: Array, before: Array, after: Array) -> tuple[ClassRecall, ...]:
    found: list[ClassRecall] = []
    for label in np.unique(labels).tolist():
        here = labels == label
        recall = _accuracy(before[here], after[here])
        found.append(ClassRecall(label, int(here.sum()), recall.original, recall.candidate, recall.change))
    return tuple(sorted(found, key=lambda item: item.change.value))


def _class_scores(output: Array, labels: Array, *, calibrated: bool, given: bool) -> _Scores:
    answers = predicted_classes(output)
    classes, codes = np.unique(np.concatenate([labels, answers]), return_inverse=True)
    truth, predicted = np.split(codes, 2)
    width, averaged = len(classes), to_average(classes, labels)
    rows: list[sparse.csr_array] = [
        _one_hot(predicted, width, answers == labels),
        _one_hot(truth, width, np.ones(len(labels), bool)),
        _one_hot(predicted, width, np.ones(len(labels), bool)),
    ]
    names: list[tuple[str, Better, bool]] = [(name, "higher", True) for name in ("precision", "recall", "F1")]
    if calibrated:
        confidence = probabilities(output, given=given).max(axis=1)
        rows.append(sparse.csr_array(_calibration_rows(confidence, answers == labels)))
        names.append(("expected calibration error", "lower", True))

    def compute(sums: Vector, size: int) -> Vector:
        hits, real, answered = sums[: 3 * width].reshape(3, width)
        here = (real + answered > 0) & averaged
        hits, real, answered = hits[here], real[here], answered[here]
        found = [hits / np.maximum(answered, 1), hits / np.maximum(real, 1), 2 * hits / (real + answered)]
        error = [_calibration(sums[3 * width :], size)] if calibrated else []
        return np.array([*(values.mean() for values in found), *error])

    return _Scores(sparse.hstack(rows, format="csr"), tuple(names), compute)


def _one_hot(codes: Array, width: int, kept: Array) -> sparse.csr_array:
    rows = np.flatnonzero(kept)
    return sparse.csr_array((np.ones(len(rows)), (rows, codes[rows])), shape=(len(codes), width))


def _calibration_rows(confidence: Vector, right: Array) -> NDArray[np.float64]:
    """Return ``float64 [samples, 2 BINS]``: whether it is right, and its confidence, each in the column of its bin."""
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    rows = np.zeros((len(confidence), 2, BINS))
    rows[np.arange(len(bins)), 0, bins] = right
    rows[np.arange(len(bins)), 1, bins] = confidence
    return rows.reshape(len(confidence), -1)


def _calibration(sums: Vector, size: int) -> float:
    right, confidence = sums.reshape(2, BINS)
    return float(np.abs(right - confidence).sum() / size)


def _number_scores(output: Array, labels: Array) -> _Scores:
    wanted = labels.reshape(len(labels), -1).astype(np.float64)
    # Centred, so that the sum of squares about the mean loses no digits.
    wanted, error = wanted - wanted.mean(axis=0), output.reshape(wanted.shape).astype(np.float64) - wanted
    squares = [np.square(values).sum(axis=1, keepdims=True) for values in (error, wanted)]
    rows = np.concatenate([np.abs(error).mean(axis=1, keepdims=True), *squares, wanted], axis=1)

    def compute(sums: Vector, size: int) -> Vector:
        absolute, squared, square, total = sums[0], sums[1], sums[2], sums[3:]
        spread = square - np.square(total).sum() / size
        # Labels that do not vary are met exactly or not at all.
        r2 = 1.0 - squared / spread if spread > _ROUNDING * square else float(squared == 0.0)
        return np.array([absolute / size, np.sqrt(squared / (size * wanted.shape[1])), r2])

    names: tuple[tuple[str, Better, bool], ...] = (
        ("mean absolute error", "lower", False),
        ("root mean squared error", "lower", False),
        ("R2", "higher", False),
    )
    return _Scores(sparse.csr_array(rows), names, compute)


def _distances(
    original: Array, candidate: Array, *, scored: bool, finite: bool
) -> tuple[list[Distance], list[tuple[str, Vector]]]:
    """Return distances that are known whole, and those that are means of values ``float64 [samples]``."""
    n = len(original)
    known: list[Distance] = []
    means: list[tuple[str, Vector]] = []
    if scored:
        same = argmax_agreement(candidate, original) if original.ndim > 1 else candidate == original
        if same.dtype == bool:
            known.append(Distance("other answer", wilson(int((~same).sum()), n), share=True))
        else:
            means.append(("share of other answers", 1.0 - same))
    if not finite:
        if original.dtype != object:
            bad = ~np.isfinite(candidate.reshape(n, -1)).all(axis=1)
            known.append(Distance("not finite", wilson(int(bad.sum()), n), share=True))
        else:
            means.append(("cosine", mean_cosine(candidate, original)))
        return known, means
    if original.dtype.kind != "f":
        return known, means
    if scored:
        means.append(("Kullback-Leibler divergence", _divergence(original, candidate)))
    if original[0].size > 1:
        means.append(("cosine", mean_cosine(candidate, original)))
    gap = np.abs(candidate.astype(np.float64) - original.astype(np.float64)).reshape(n, -1)
    largest = float(gap.max())
    means.append(("mean absolute difference", gap.mean(axis=1)))
    known.append(Distance("largest difference", Interval(largest, largest, largest)))
    return known, means


def _divergence(original: Array, candidate: Array) -> Vector:
    """Return the mean divergence over the positions of each sample."""
    given = are_probabilities(original)
    p, log_q = np.exp(_log_probabilities(original, given=given)), _log_probabilities(candidate, given=given)
    return (xlogy(p, p) - p * log_q).sum(axis=-1).reshape(len(original), -1).mean(axis=1)


def _log_probabilities(output: Array, *, given: bool) -> NDArray[np.float64]:
    wide = output.astype(np.float64)
    if not given:
        return np.maximum(log_softmax(wide, axis=-1), np.log(_LEAST_PROBABILITY))
    # An approximation of a Softmax need not sum to 1 exactly.
    return np.log(np.maximum(wide / wide.sum(axis=-1, keepdims=True), _LEAST_PROBABILITY))


def _bootstrap(
    scores: Sequence[_Scores], means: Sequence[tuple[str, Vector]], n: int
) -> tuple[tuple[Figure, ...], tuple[Distance, ...]]:
    """Bootstrap the scores of both models, their changes and some means over the same resamples."""
    if not scores and not means:
        return (), ()
    transposed = [score.rows.T.tocsr() for score in scores]
    values = np.stack([value for _, value in means], axis=1) if means else np.empty((n, 0))

    def statistic(indices: NDArray[np.int64]) -> Vector:
        counts, size = np.bincount(indices, minlength=n).astype(np.float64), len(indices)
        found = [score.compute(rows @ counts, size) for score, rows in zip(scores, transposed, strict=True)]
        return np.concatenate([*found, *([found[1] - found[0]] if found else []), counts @ values / size])

    estimates, limits = statistic(np.arange(n)), bca_bootstrap(statistic, n, _LEVELS)
    intervals = [
        Interval(value, min(value, low), max(value, high))
        for value, low, high in zip(estimates.tolist(), *limits.tolist(), strict=True)
    ]
    names = scores[0].names if scores else ()
    k = len(names)
    figures = tuple(
        Figure(name, intervals[i], intervals[k + i], intervals[2 * k + i], better, share)
        for i, (name, better, share) in enumerate(names)
    )
    return figures, tuple(Distance(name, value) for (name, _), value in zip(means, intervals[3 * k :], strict=True))
