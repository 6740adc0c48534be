"""Mixed precision: the fewest layers to keep float so that the whole model keeps its accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Certified = Callable[[Sequence[str]], bool]
"""Says whether the model with these layers float, and all others quantized together, keeps its accuracy."""


@dataclass(frozen=True)
class Mixture:
    """Which layers stay float.

    Attributes:
        exclude: Their names, for the option ``exclude``.
        certified: Whether the model with these layers float was certified.
        reason: Why these, in a sentence.
        tried: How many layers were float in each model that was judged, and whether it was certified.
    """

    exclude: tuple[str, ...]
    certified: bool
    reason: str
    tried: tuple[tuple[int, bool], ...]


def fewest_float(layers: Sequence[str], certified: Certified) -> Mixture:
    """Find the fewest of the first ``layers`` to keep float, by binary search: some ``log2`` of their number of trials.

    Errors of layers do not add, so each trial judges the joint model, and what is returned as certified was. The search
    supposes that more float layers never lose more; where that fails, fewer might do. At least one layer is quantized:
    the float model is no mixture. Where nothing is certified the mixture with the most float layers is returned.

    Args:
        layers: The names of all that are quantized, that which should stay float first (`sensitivity` sorts them so).
        certified: Judges a mixture; given layers in this order.
    """
    names = tuple(dict.fromkeys(layers))
    tried: list[tuple[int, bool]] = []

    def keeps(count: int) -> bool:
        tried.append((count, certified(names[:count])))
        return tried[-1][1]

    if keeps(0):
        return Mixture((), True, "All layers are quantized, and the accuracy is kept.", tuple(tried))
    failing, keeping = 0, len(names)
    while keeping - failing > 1:
        middle = (failing + keeping) // 2
        if keeps(middle):
            keeping = middle
        else:
            failing = middle
    of_all = f"of {len(names)} layers"
    if keeping < len(names):
        reason = f"{keeping} {of_all} stay float; with {failing} the accuracy was not certified."
        return Mixture(names[:keeping], True, reason, tuple(tried))
    reason = f"No mixture was certified, not even with {failing} {of_all} float; that one is the nearest."
    return Mixture(names[:failing], False, reason, tuple(tried))
