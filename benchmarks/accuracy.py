"""Is a candidate as good as the original on the same samples, and how sure is that?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from onnx_lathe.benchmarks.metrics import Metric, default_metric, find_metric
from onnx_lathe.benchmarks.proportions import (
    clopper_pearson_upper,
    drop_upper,
    least_without_loss,
    samples_needed,
    wilson,
)
from onnx_lathe.benchmarks.result import Certificate, Interval
from onnx_lathe.benchmarks.stats import Vector, bca_bootstrap, studentized_bootstrap
from onnx_lathe.runtime.errors import SamplesError, TensorError
from onnx_lathe.runtime.samples import Array, Feeds, Samples

__all__ = ["default_metric", "judge", "predict"]

Run = Callable[[Feeds], Mapping[str, Array]]
"""Runs a model on one batch and returns its outputs by name."""
OnProgress = Callable[[int, int], None]
"""Told how many samples are done, of how many."""

_LEVELS = (0.025, 0.975, 0.95)
"""The two-sided 95 % interval and the one-sided 95 % upper bound."""


def _ignore(done: int, total: int) -> None:
    del done, total


def predict(run: Run, samples: Samples, batch: int, on_progress: OnProgress = _ignore) -> dict[str, Array]:
    """Run a model over all samples.

    Args:
        run: The model.
        samples: In order.
        batch: Samples in a batch at most.
        on_progress: Told after each batch.

    Returns:
        Each output with the samples along its first axis: an array, or, where their shapes differ from batch
        to batch, an object array ``[samples]`` of arrays. Outputs without a sample axis are left out.

    Raises:
        TensorError: No output has a sample axis.
    """
    found: dict[str, list[Array]] = {}
    lost: set[str] = set()
    done = 0
    for feeds in samples.iter_batches(batch):
        size = len(next(iter(feeds.values())))
        for name, output in run(feeds).items():
            found.setdefault(name, []).append(output)
            if output.ndim == 0 or len(output) != size:
                lost.add(name)
        done += size
        on_progress(done, len(samples))
    kept = {name: _join(parts) for name, parts in found.items() if name not in lost}
    if not kept:
        raise TensorError(
            "outputs",
            got=f"no output with an entry for each sample: {', '.join(found) or 'none at all'}",
            expected="samples along the first axis of one output",
            mend="Give the model an output whose first axis is the batch.",
        )
    return kept


def _join(parts: list[Array]) -> Array:
    if len({part.shape[1:] for part in parts}) == 1:
        return np.concatenate(parts)
    rows = [row for part in parts for row in part]
    joined = np.empty(len(rows), dtype=object)
    joined[:] = rows
    return joined


def judge(
    metric: str,
    original_outputs: Mapping[str, Array],
    candidate_outputs: Mapping[str, Array],
    samples: Samples,
    max_drop: float,
    output: str | None = None,
) -> Certificate:
    """Compare a candidate with the original, sample by sample.

    A metric that is right or wrong for each sample is bounded by `drop_upper`. A mean of other
    values is bounded by a studentized bootstrap, a metric of the whole set by a BCa bootstrap, and neither
    below the exact bound of a loss that none of the samples showed: they cannot vouch for inputs unlike
    themselves.

    Args:
        metric: A name that `find_metric` knows.
        original_outputs: By name, as `predict` returns them.
        candidate_outputs: From the same samples.
        samples: With labels, where the metric needs them.
        max_drop: The budget on 0..1.
        output: Which output is judged; the original's first where it is not named.

    Raises:
        InputError: There is no such metric.
        SamplesError: The metric needs labels and there are none, or there are fewer than two samples.
        TensorError: An output is missing or does not fit the metric, or the metric does not lie on 0..1.
    """
    rule = find_metric(metric)
    name = output or next(iter(original_outputs))
    original, candidate = (_pick(outputs, name, samples) for outputs in (original_outputs, candidate_outputs))
    truth = _truth(rule, original, samples)
    before, after = (_evaluate(rule, judged, truth) for judged in (original, candidate))
    if before.ndim == 1 and before.dtype == bool and after.dtype == bool:
        return _judge_right_or_wrong(rule, before, after, max_drop)
    if before.ndim == 1:
        columns = np.stack([before, after, before.astype(np.float64) - after])
        limits = np.stack([studentized_bootstrap(column, _LEVELS) for column in columns], axis=1)
        estimates, method = columns.mean(axis=1), "studentized bootstrap"
        return _judge_limits(rule.name, estimates, limits, max_drop, len(samples), method)

    resampled = rule.resampled((original, candidate), truth)

    def both(indices: NDArray[np.int64]) -> Vector:
        first, second = resampled(indices)
        return np.array([first, second, first - second])

    limits = bca_bootstrap(both, len(samples), _LEVELS)
    estimates = both(np.arange(len(samples)))
    return _judge_limits(rule.name, estimates, limits, max_drop, len(samples), "BCa bootstrap")


def _pick(outputs: Mapping[str, Array], name: str, samples: Samples) -> Array:
    if name not in outputs or len(outputs[name]) != len(samples):
        raise TensorError(
            f"output {name!r}",
            got=f"outputs {', '.join(outputs)} of {[len(output) for output in outputs.values()]} samples",
            expected=f"one called {name!r} of {len(samples)} samples, as the original has it",
            mend="Name an output that both models have, samples along its first axis.",
        )
    return outputs[name]


def _truth(rule: Metric, original: Array, samples: Samples) -> Array:
    if len(samples) < 2:
        raise SamplesError(
            samples.source,
            got="one sample",
            expected="at least two",
            mend="Give hundreds, to certify anything.",
        )
    if samples.labels is not None and rule.truth != "original":
        return samples.labels
    if rule.truth == "labels":
        raise SamplesError(
            samples.source,
            got="samples without labels",
            expected=f"labels, which the metric {rule.name!r} needs",
            mend="Give an array `label`, or a metric that needs none, such as argmax_agreement or mean_cosine.",
        )
    return original


def _evaluate(rule: Metric, judged: Array, truth: Array) -> Array:
    """Return ``bool [samples]``, ``float64 [samples]`` or ``float64 []``, checked to lie on 0..1."""
    found = np.asarray(rule.evaluate(judged, truth))
    values = found if found.dtype == bool else found.astype(np.float64)
    if found.shape not in ((), (len(judged),)) or not ((values >= 0.0) & (values <= 1.0)).all():
        raise TensorError(
            f"metric {rule.name}",
            got=f"shape {list(found.shape)}, from {values.min():.4g} to {values.max():.4g}",
            expected=f"one value, or {len(judged)} (one for each sample), on 0..1",
            mend="Scale the metric so that 0 is the worst and 1 the best.",
        )
    return values


def _judge_right_or_wrong(rule: Metric, before: Array, after: Array, max_drop: float) -> Certificate:
    n = len(before)
    losses, gains = int((before & ~after).sum()), int((after & ~before).sum())
    bound, method = drop_upper(losses, gains, n)
    return Certificate(
        rule.name,
        # What is its own truth scores 1 by definition.
        original=Interval(1.0, 1.0, 1.0) if rule.truth == "original" else wilson(int(before.sum()), n),
        candidate=wilson(int(after.sum()), n),
        drop=(losses - gains) / n,
        bound=bound,
        max_drop=max_drop,
        samples=n,
        needed=samples_needed(losses, gains, n, max_drop),
        losses=losses,
        gains=gains,
        method=method,
    )


def _judge_limits(metric: str, estimates: Vector, limits: Vector, max_drop: float, n: int, method: str) -> Certificate:
    """Certify from bootstraps.

    Args:
        metric: Its name.
        estimates: ``float64 [3]``: of the original, of the candidate, and their drop.
        limits: ``float64 [3, 3]``: at each of `_LEVELS`, of each of these.
        max_drop: The budget.
        n: Number of samples.
        method: How the limits were found.
    """
    original, candidate = (
        Interval(value, max(0.0, min(value, low)), min(1.0, max(value, high)))
        for value, low, high in zip(estimates[:2].tolist(), limits[0, :2].tolist(), limits[1, :2].tolist(), strict=True)
    )
    drop, seen = float(estimates[2]), float(limits[2, 2])
    needed = least_without_loss(max_drop) if drop < max_drop else None
    if needed is not None and math.isfinite(seen):
        # The bootstrapped part of the bound shrinks with the root of the number of samples.
        needed = max(needed, math.ceil(n * ((seen - drop) / (max_drop - drop)) ** 2))
    return Certificate(
        metric,
        original=original,
        candidate=candidate,
        drop=drop,
        bound=min(1.0, max(seen, clopper_pearson_upper(0, n))),
        max_drop=max_drop,
        samples=n,
        needed=needed,
        losses=None,
        gains=None,
        method=f"{method}, not below the exact bound of a loss that no sample showed",
    )
