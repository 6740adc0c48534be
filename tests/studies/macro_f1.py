"""Macro F1 of simulated classifiers: its true drop, and the bound that `judge` gives, without `judge`'s other work."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_lathe.benchmarks.stats import bca_bootstrap

Classes = NDArray[np.int64]
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """Two classifiers: an error goes to any other class alike, and the second errs anew in some of the samples.

    Attributes:
        name: For tables.
        frequencies: Of the classes, ``[classes]``.
        error: Share of samples that the original has wrong.
        change: Share of samples in which the candidate takes another class than the original, any alike.
    """

    name: str
    frequencies: tuple[float, ...]
    error: float
    change: float

    def joint(self) -> Vector:
        """Return the chance of (label, original's class, candidate's class), ``float64 [classes] * 3``."""
        count = len(self.frequencies)

        def moved(share: float) -> Vector:
            return np.full((count, count), share / (count - 1)) + np.eye(count) * (1 - share - share / (count - 1))

        return np.einsum("t,to,oc->toc", np.array(self.frequencies), moved(self.error), moved(self.change))

    def drop(self) -> float:
        """Return the true drop."""
        before, after = f1_of_cells(self.joint())
        return float(before - after)

    def draw(self, rng: np.random.Generator, n: int) -> tuple[Classes, Classes, Classes]:
        """Return labels, the original's classes and the candidate's, ``int64 [n]`` each."""
        joint = self.joint()
        cells = rng.choice(joint.size, n, p=joint.ravel())
        labels, original, candidate = (axis.astype(np.int64) for axis in np.unravel_index(cells, joint.shape))
        return labels, original, candidate


CASES = (
    Case("3 classes alike", (1 / 3, 1 / 3, 1 / 3), error=0.1, change=0.05),
    Case("5 classes, rarest 3 %", (0.5, 0.25, 0.15, 0.07, 0.03), error=0.15, change=0.05),
    Case("10 classes alike", (0.1,) * 10, error=0.2, change=0.1),
)


def f1_of_cells(cells: Vector) -> Vector:
    """Return the macro F1 of both classifiers from counts or chances ``[classes] * 3``, as `f1_macro` defines it."""
    labels = cells.sum(axis=(1, 2))
    found: list[float] = []
    for pairs in (cells.sum(axis=2), cells.sum(axis=1)):
        sizes = labels + pairs.sum(axis=0)
        found.append(float((2 * np.diagonal(pairs)[sizes > 0] / sizes[sizes > 0]).mean()))
    return np.array(found)


def bound(labels: Classes, original: Classes, candidate: Classes) -> float:
    """Return the one-sided 95 % BCa bound of the drop of macro F1, the same that `judge` bootstraps."""
    count = int(max(labels.max(), original.max(), candidate.max())) + 1
    shape = (count, count, count)
    codes = np.ravel_multi_index((labels, original, candidate), shape)

    def drop(indices: NDArray[np.int64]) -> Vector:
        cells = np.bincount(codes[indices], minlength=count**3).reshape(shape)
        before, after = f1_of_cells(cells.astype(np.float64))
        return np.array([before - after])

    return float(bca_bootstrap(drop, len(labels), (0.95,))[0, 0])
