"""Metrics on 0..1: what a model's outputs are worth against the labels, or against the original's outputs.

A metric is a function of the judged output and the truth. What it returns says how it may be bounded:

- ``bool [samples]``: right or wrong for each sample; the metric is the share of right ones.
- ``float [samples]``: a value on 0..1 for each sample; the metric is their mean.
- ``float``: a value on 0..1 of the whole set, which no sample owns a part of.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from onnx_lathe.benchmarks.stats import Vector
from onnx_lathe.runtime.errors import InputError, TensorError
from onnx_lathe.runtime.samples import Array, Samples

Evaluate = Callable[[Array, Array], Any]
"""``(output, truth) -> bool [samples] | float [samples] | float``."""
Resampled = Callable[[NDArray[np.int64]], Sequence[float]]
"""Of the indices of a resample: the metric of each of several outputs on it."""


@dataclass(frozen=True)
class Metric:
    """A metric and what it holds an output against.

    Attributes:
        name: How it is called.
        evaluate: Given the output (samples along the first axis, an object array where their shapes differ)
            and the truth.
        truth: ``labels``; or ``original``, its output, which then scores 1 by definition; or ``any``: the
            labels where there are some.
        prepare: For a metric of the whole set that is slow to evaluate: given several outputs and the truth, what
            a bootstrap then calls thousands of times instead.
    """

    name: str
    evaluate: Evaluate
    truth: Literal["labels", "original", "any"]
    prepare: Callable[[Sequence[Array], Array], Resampled] | None = None

    def resampled(self, outputs: Sequence[Array], truth: Array) -> Resampled:
        """Return what gives the metric of each of ``outputs`` on a resample of the samples."""
        if self.prepare is not None:
            return self.prepare(outputs, truth)
        return lambda indices: [float(self.evaluate(output[indices], truth[indices])) for output in outputs]


def accuracy(output: Array, labels: Array) -> Array:
    """Return for each sample whether it is given its label.

    Args:
        output: Scores ``float [samples, classes]`` or classes ``int [samples]``. A NaN among scores is wrong.
        labels: ``int [samples]``.
    """
    return predicted_classes(output) == labels


def f1_macro(output: Array, labels: Array) -> float:
    """Return the mean over classes of F1 = 2 TP / (2 TP + FP + FN).

    Classes neither labelled nor predicted are left out. This is scikit-learn's ``f1_score(average="macro")``, written
    out because a bootstrap asks for it thousands of times and that takes 3 ms a call.

    Args:
        output: As for `accuracy`.
        labels: ``int [samples]``.
    """
    classes, codes = np.unique(np.concatenate([labels, predicted_classes(output)]), return_inverse=True)
    truth, predicted = np.split(codes, 2)
    hits = np.bincount(truth[truth == predicted], minlength=len(classes))
    sizes = np.bincount(truth, minlength=len(classes)) + np.bincount(predicted, minlength=len(classes))
    return float((2.0 * hits / sizes)[to_average(classes, labels)].mean())


def spearman(output: Array, labels: Array) -> float:
    """Return Spearman's rank correlation of scores and labels.

    0 where it is negative, where scores or labels do not vary, and where a score is NaN.

    Args:
        output: Scores ``float [samples]`` or ``[samples, 1]``.
        labels: ``float [samples]``.
    """
    if output.size != len(labels):
        raise _misfit("spearman", output, "one score for each sample")
    scores: Vector = output.reshape(-1).astype(np.float64)
    wanted: Vector = labels.astype(np.float64)
    if np.isnan(scores).any() or np.ptp(scores) == 0.0 or np.ptp(wanted) == 0.0:
        return 0.0
    return max(0.0, float(np.corrcoef(rankdata(scores), rankdata(wanted))[0, 1]))


def _prepare_r2(outputs: Sequence[Array], labels: Array) -> Resampled:
    """Reduce outputs to one squared residual a sample: a resample then costs one product with the labels.

    With ``c`` the mean of all labels, ``SS_tot = sum ||y - c||^2 - n ||mean(y) - c||^2``.
    """
    rows = len(labels)
    for output in outputs:
        if output.dtype == object or output.size != labels.size or len(output) != rows:
            raise _misfit("r2", output, f"one number for each of the labels {list(labels.shape)}")
    truth: NDArray[np.float64] = labels.reshape(rows, -1).astype(np.float64)
    residuals = [np.square(output.reshape(rows, -1).astype(np.float64) - truth).sum(axis=1) for output in outputs]
    truth -= truth.mean(axis=0)
    energy = np.square(truth).sum(axis=1)

    def score(residual: float, total: float) -> float:
        if not math.isfinite(residual):
            return 0.0
        if total <= 0.0:
            return float(residual == 0.0)
        return max(0.0, 1.0 - residual / total)

    def resampled(indices: NDArray[np.int64]) -> Sequence[float]:
        times = np.bincount(indices, minlength=rows).astype(np.float64)
        total = float(times @ energy - np.square(times @ truth).sum() / len(indices))
        return [score(float(times @ residual), total) for residual in residuals]

    return resampled


def r2(output: Array, labels: Array) -> float:
    """Return the coefficient of determination ``1 - SS_res / SS_tot``, both summed over all outputs.

    This weighs each output by its variance: scikit-learn's ``r2_score(multioutput="variance_weighted")``, but 0 where
    that is negative (worse than the labels' mean) or a number is not finite.

    Args:
        output: ``float [samples]`` or ``[samples, outputs]``.
        labels: ``float`` of the same shape; an axis of one output may be left out.
    """
    return _prepare_r2([output], labels)(np.arange(len(labels)))[0]


def argmax_agreement(output: Array, original: Array) -> Array:
    """Return where the largest entries along the last axis lie at the same place.

    Args:
        output: ``float [samples, ..., classes]``. A NaN agrees with nothing, nor does another shape.
        original: Of the same shape.

    Returns:
        ``bool [samples]`` for ``[samples, classes]``, else ``float [samples]``: the share of a sample's positions.
    """
    if output.dtype != object and output.ndim == 2:
        return _agree(output, original)
    pairs = zip(output, original, strict=True)
    return np.array([one.shape == other.shape and float(_agree(one, other).mean()) for one, other in pairs], float)


def mean_cosine(output: Array, original: Array) -> Array:
    """Return the cosine between each sample's output and the original's, both flattened: ``float [samples]``.

    0 where it is negative. Two outputs of zeros have 1; NaN or another shape has 0.
    """
    return np.array([_cosine(one, other) for one, other in zip(output, original, strict=True)])


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", accuracy, "labels"),
        Metric("f1_macro", f1_macro, "labels"),
        Metric("spearman", spearman, "labels"),
        Metric("r2", r2, "labels", _prepare_r2),
        Metric("argmax_agreement", argmax_agreement, "original"),
        Metric("mean_cosine", mean_cosine, "original"),
    )
}


def find_metric(name: str) -> Metric:
    """Return a metric by its name, or a user's function of output and labels by ``module:callable``.

    Raises:
        InputError: There is no such metric, module or function.
    """
    if name in METRICS:
        return METRICS[name]
    module, _, function = name.partition(":")
    if not module or not function:
        raise InputError(
            f"metric {name!r}",
            got="an unknown metric",
            expected=f"one of {', '.join(METRICS)}, or module:callable",
            mend="Correct the name.",
        )
    try:
        evaluate = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"metric {name!r}",
            got=str(error),
            expected="a function that can be imported",
            mend="Check the name, and that its folder is on PYTHONPATH.",
        ) from None
    return Metric(name, cast("Evaluate", evaluate), "any")


def default_metric(samples: Samples, outputs: Mapping[str, Array]) -> str:
    """Return the name of the metric that fits the data.

    Labels that are whole numbers: accuracy. Other labels: R^2, or Spearman where the original predicts one number a
    sample on another scale than the labels', so that R^2 would find nothing to lose. Without labels argmax agreement
    where the first output looks like a classifier's (its name says so, or its rows are probabilities), else mean
    cosine.

    Args:
        samples: With labels or without.
        outputs: The original's, by name.
    """
    name, output = next(iter(outputs.items()))
    if samples.labels is not None:
        if samples.labels.dtype.kind in "iub":
            return "accuracy"
        return "spearman" if output.size == len(samples) and r2(output, samples.labels) == 0.0 else "r2"
    if output.dtype == object or output.ndim < 2 or output.shape[-1] < 2:
        return "mean_cosine"
    named = any(word in name.lower() for word in ("logit", "prob", "class"))
    probable = output.min() >= 0 and np.allclose(output.sum(axis=-1), 1.0, atol=1e-3)
    return "argmax_agreement" if named or probable else "mean_cosine"


def predicted_classes(output: Array) -> NDArray[np.int64]:
    """Return the index of the largest entry along the last axis; -1, which is no class, where one is NaN."""
    if output.dtype.kind in "iub" and output.ndim == 1:
        return output
    if output.dtype == object or output.ndim < 2 or output.shape[-1] < 2:
        raise _misfit("classes", output, "scores [samples, classes] of two classes or more")
    return np.where(np.isnan(output).any(axis=-1), np.int64(-1), output.argmax(axis=-1))


def to_average(classes: Array, labels: Array) -> NDArray[np.bool_]:
    """Return which classes a mean over classes takes: -1, which stands for a NaN, only where it is a label."""
    return (classes != -1) | np.isin(classes, labels)


def _agree(one: Array, other: Array) -> NDArray[np.bool_]:
    chosen = predicted_classes(one)
    return (chosen == predicted_classes(other)) & (chosen >= 0)


def _cosine(one: Array, other: Array) -> float:
    a, b = np.ravel(one).astype(np.float64), np.ravel(other).astype(np.float64)
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return 0.0
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    if norms == 0.0:
        return float(not a.any() and not b.any())
    return float(np.clip(a @ b / norms, 0.0, 1.0))


def _misfit(metric: str, output: Array, expected: str) -> TensorError:
    return TensorError(
        f"metric {metric}",
        got=f"an output of shape {list(output.shape)} and dtype {output.dtype}",
        expected=expected,
        mend="Name another metric, or the output that it is meant for.",
    )
