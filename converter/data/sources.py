"""Where the samples of a recipe come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np

from onnx_lathe.converter.data import synthetic
from onnx_lathe.converter.data.files import load_samples
from onnx_lathe.converter.named import load_callable
from onnx_lathe.runtime.errors import RecipeError, SamplesError
from onnx_lathe.runtime.samples import Samples

DIGITS_MEAN, DIGITS_STD = 0.3053, 0.3760
"""Of the pixels of scikit-learn's digits, scaled to 0..1."""

_KEY = "data.source"


def load_source(source: str, recipe_folder: Path) -> Samples:
    """Return the labelled samples that a recipe names.

    Args:
        source: ``digits``: scikit-learn's digits, input ``image`` float32 ``[1797, 1, 8, 8]``, standardized
            by `DIGITS_MEAN` and `DIGITS_STD`; or ``regression{samples=2000,...}``, made by
            `onnx_lathe.converter.data.synthetic.Regression`; or an ``.npz``; or ``module:callable`` returning
            `Samples`.
        recipe_folder: The folder that the path of an ``.npz`` is relative to, and where a module may lie.

    Raises:
        RecipeError: There is no such source.
        SamplesError: What it gives is not a sample set, or has no labels: classes (integers from 0), or finite
            numbers ``float [samples]`` or ``[samples, outputs]``.
    """
    if source == "digits":
        return _digits()
    made = synthetic.parse(source, _KEY)
    if made is not None:
        return made.make()
    if source.endswith(".npz"):
        samples = load_samples(recipe_folder / source)
    elif ":" in source:
        samples = load_callable(source, _KEY, recipe_folder)()
        if not isinstance(samples, Samples):
            raise SamplesError(
                f"{_KEY}: {source}",
                got=f"a {type(samples).__name__}",
                expected="onnx_lathe.runtime.samples.Samples",
                mend="Return Samples((arrays_by_input_name,), labels).",
            )
    else:
        raise RecipeError(
            _KEY,
            got=repr(source),
            expected="'digits', 'regression{...}', the path of an .npz, or module:callable",
            mend="Change the value.",
        )
    _check_labels(samples)
    return samples


def _digits() -> Samples:
    # Imported here because it takes a second, and only this source needs it.
    from sklearn.datasets import load_digits

    digits = cast(Any, load_digits())
    images = (digits.images[:, np.newaxis] / 16.0 - DIGITS_MEAN) / DIGITS_STD
    return Samples(({"image": images.astype(np.float32)},), digits.target.astype(np.int64), "digits")


def _check_labels(samples: Samples) -> None:
    labels = samples.labels
    if labels is None:
        got = "no labels"
    elif labels.dtype.kind in "iu" and labels.ndim == 1 and labels.min() >= 0:
        return
    elif labels.dtype.kind == "f" and labels.ndim in (1, 2):
        if np.isfinite(labels).all():
            return
        got = "NaN or infinity"
    else:
        got = f"{labels.dtype} labels {list(labels.shape)} from {labels.min()} to {labels.max()}"
    raise SamplesError(
        f"{samples.source}: label",
        got=got,
        expected="a class for each sample, as integers from 0, or finite floats [samples] or [samples, outputs]",
        mend="Add the labels as the array 'label'.",
    )
