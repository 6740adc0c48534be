"""What a network is trained for: the labels it learns, its loss, and the score on 0..1 that judges it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn import functional

from onnx_lathe.converter.recipe import TrainingOptions
from onnx_lathe.runtime.errors import RecipeError, SamplesError
from onnx_lathe.runtime.samples import Array, Samples


class Objective(ABC):
    """Either of `Classification` and `Regression`."""

    @abstractmethod
    def labels(self, samples: Samples) -> Array:
        """Return the labels, of the dtype that the loss takes.

        Raises:
            SamplesError: There are none, or of another kind.
        """

    @abstractmethod
    def check(self, samples: Samples, outputs: object) -> None:
        """Check that the network's outputs for the first few samples fit the labels of all.

        Raises:
            RecipeError: The network returns something else.
            SamplesError: A label lies outside what the network can say.
        """

    @abstractmethod
    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss over the samples, a scalar."""

    @abstractmethod
    def errors(self, outputs: Array, labels: Array) -> float:
        """Return the errors of the outputs, summed over the samples, in the unit of `worst`."""

    @abstractmethod
    def worst(self, labels: Array) -> float:
        """Return the errors that score 0."""

    @abstractmethod
    def spell(self, score: float) -> str:
        """Return a score for people."""

    def score(self, errors: float, labels: Array) -> float:
        """Return ``1 - errors / worst``, at least 0: what `errors` over all samples are worth."""
        worst = self.worst(labels)
        return max(0.0, (worst - errors) / worst) if worst > 0.0 else float(errors == 0.0)


@dataclass(frozen=True)
class Classification(Objective):
    """A class for each sample: cross entropy; the score is the share of correct answers.

    Attributes:
        label_smoothing: The share of each label that is spread over all classes.
    """

    label_smoothing: float = 0.0

    def labels(self, samples: Samples) -> Array:
        """Return ``int64 [n]``."""
        labels = samples.labels
        if labels is None or labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise _wrong_labels(samples, "a class for each sample, as integers", "mse")
        return labels.astype(np.int64)

    def check(self, samples: Samples, outputs: object) -> None:
        """Check that the outputs are logits ``[n, classes]`` with a place for each label."""
        if not isinstance(outputs, Tensor) or outputs.ndim != 2:
            raise _wrong_outputs(outputs, "one tensor of logits [n, classes]", "Return the logits alone from forward.")
        labels, classes = self.labels(samples), outputs.shape[1]
        if labels.min() < 0 or labels.max() >= classes:
            raise SamplesError(
                f"{samples.source}: label",
                got=f"classes {labels.min()} to {labels.max()}",
                expected=f"0 to {classes - 1}: the network has {classes} classes",
                mend="Set the network's number of classes to that of the data.",
            )

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy of logits ``[n, classes]`` and ``int64 [n]``."""
        return functional.cross_entropy(outputs, labels, label_smoothing=self.label_smoothing)

    def errors(self, outputs: Array, labels: Array) -> float:
        """Return the number of wrong answers."""
        return float((outputs.argmax(axis=1) != labels).sum())

    def worst(self, labels: Array) -> float:
        """Return the number of samples."""
        return float(len(labels))

    def spell(self, score: float) -> str:
        """Return the share in percent."""
        return f"{100 * score:.1f} % correct"


@dataclass(frozen=True)
class Regression(Objective):
    """Numbers for each sample: mean squared error; the score is R^2, and 0 where that is negative.

    R^2 of several outputs is one minus the sum of all squared errors over the sum of all squared deviations from
    the mean of each output, so that an output counts by its variance.
    """

    def labels(self, samples: Samples) -> Array:
        """Return ``float32 [n]`` or ``[n, outputs]``."""
        labels = samples.labels
        if labels is None or labels.dtype.kind != "f":
            raise _wrong_labels(samples, "numbers for each sample, as floats", "cross_entropy")
        return labels.astype(np.float32)

    def check(self, samples: Samples, outputs: object) -> None:
        """Check that the outputs have the shape of the labels: torch would stretch ``[n]`` to ``[n, n]``."""
        wanted = self.labels(samples).shape[1:]
        if not isinstance(outputs, Tensor) or outputs.shape[1:] != wanted:
            shape = ", ".join(["n", *map(str, wanted)])
            raise _wrong_outputs(
                outputs, f"one tensor [{shape}], as the labels", "Give network and labels the same number of outputs."
            )

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean squared error of two tensors of one shape."""
        return functional.mse_loss(outputs, labels)

    def errors(self, outputs: Array, labels: Array) -> float:
        """Return the sum of squared errors."""
        return float(np.square(outputs.astype(np.float64) - labels).sum())

    def worst(self, labels: Array) -> float:
        """Return the sum of squared errors of the mean."""
        exact = labels.astype(np.float64)
        return float(np.square(exact - exact.mean(axis=0)).sum())

    def spell(self, score: float) -> str:
        """Return R^2."""
        return f"R2 {score:.3f}"


def objective_of(options: TrainingOptions) -> Objective:
    """Return what a training with these options is for."""
    return Classification(options.label_smoothing) if options.loss == "cross_entropy" else Regression()


def objective_for(samples: Samples) -> Objective:
    """Return what the labels of samples are for: floats are numbers, all else are classes."""
    return Regression() if samples.labels is not None and samples.labels.dtype.kind == "f" else Classification()


def _wrong_labels(samples: Samples, expected: str, other_loss: str) -> SamplesError:
    labels = samples.labels
    return SamplesError(
        f"{samples.source}: label",
        got="no labels" if labels is None else f"{labels.dtype} labels {list(labels.shape)}",
        expected=expected,
        mend="Add the array 'label'." if labels is None else f"Convert them, or train with loss = {other_loss!r}.",
    )


def _wrong_outputs(outputs: object, expected: str, mend: str) -> RecipeError:
    shape = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    return RecipeError("network", got=f"an output {shape}", expected=expected, mend=mend)
