"""How the samples of a recipe are cut: nothing is judged on what it was fitted to."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from onnx_lathe.converter.recipe import DataOptions
from onnx_lathe.runtime.errors import SamplesError
from onnx_lathe.runtime.samples import Array, Samples


def stratified(samples: Samples, options: DataOptions, seed: int) -> dict[str, Samples]:
    """Cut labelled samples at random into parts that hold the classes, where there are some, in equal proportions.

    Args:
        samples: With a class for each sample (integers) or numbers (floats).
        options: The shares of select and test; the rest is train.
        seed: Another seed gives another cut.

    Returns:
        ``train``, ``select`` and ``test``, which share no sample, and ``calibrate``: as many of train as the
        options say (all, where there are fewer), drawn at random.

    Raises:
        SamplesError: There are no labels, or too few samples of a class for three parts.
    """
    labels = samples.labels
    if labels is None:
        raise SamplesError(
            samples.source,
            got="no labels",
            expected="a class, or numbers, for each sample",
            mend="Add them as the array 'label'.",
        )
    held_out = options.select + options.test
    train, held = _cut(samples, np.arange(len(samples)), held_out, seed)
    select, test = _cut(samples, held, options.test / held_out, seed)
    drawn = np.random.default_rng(seed).permutation(train)[: options.calibrate]
    parts = {"train": train, "select": select, "test": test, "calibrate": drawn}
    return {name: samples.take(np.sort(indices)) for name, indices in parts.items()}


def _cut(
    samples: Samples, indices: NDArray[np.int64], share: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut ``indices`` in two, ``share`` of them on the second side."""
    from sklearn import model_selection

    labels = cast(Array, samples.labels)[indices]
    has_classes = labels.dtype.kind != "f"
    try:
        first, second = cast(Any, model_selection).train_test_split(
            indices, test_size=share, random_state=seed, stratify=labels if has_classes else None
        )
    except ValueError as error:
        if not has_classes:
            raise SamplesError(
                samples.source,
                got=f"{len(samples)} samples for train, select and test ({error})",
                expected="enough for every part",
                mend="Give more samples, or change data.select and data.test.",
            ) from error
        classes, counts = np.unique(labels, return_counts=True)
        rarest = int(counts.argmin())
        raise SamplesError(
            f"{samples.source}: label",
            got=f"{counts[rarest]} samples of class {classes[rarest]} for train, select and test ({error})",
            expected="enough of each class for every part",
            mend="Give more samples of that class, or change data.select and data.test.",
        ) from error
    return first, second
