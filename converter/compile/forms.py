"""Forms of a graph: the axes along which it may differ, and what each can be."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class Candidate:
    """A form to try.

    Attributes:
        name: How the report calls it.
        base: The model that the passes start from.
        passes: The passes as text; empty for the base as it is.
        chosen: What it is along each axis, by the axis' name; empty for a form that was given as it is.
    """

    name: str
    base: Path
    passes: str
    chosen: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Axis:
    """A place in the order of passes, and what may stand there; nothing may always.

    Attributes:
        name: What its passes decide.
        exact: Passes as text that compute the same: they may be tried without data.
        lossy: Passes that want data to be judged.
        after_integers: Whether it pays only beside a quantization to integers.
        instead: What to try in place of a choice that loses too much.
    """

    name: str
    exact: tuple[str, ...] = ()
    lossy: tuple[str, ...] = ()
    after_integers: bool = False
    instead: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    def choices(self, with_data: bool) -> tuple[str, ...]:
        """Return what may stand there."""
        return (*self.exact, *(self.lossy if with_data else ()))

    def among(self, known: Collection[str]) -> Axis:
        """Return the axis with those alternatives alone whose passes are all known by name."""
        exact, lossy = (
            tuple(passes for passes in offered if set(_NAMES.findall(passes)) <= set(known))
            for offered in (self.exact, self.lossy)
        )
        return replace(self, exact=exact, lossy=lossy)


_NAMES = re.compile(r"(?:^|,)([a-z-]+)(?=[{,]|$)")
"""The names of passes in text; options lie in braces and hold no comma."""

PRECISION = "precision"
"""The axis whose forms are made first: every other one is tried on the best of them."""
PREPARED = "prepared"
"""The axis of what every form begins with where it applies: it only takes work away."""
REPAIR = "repair"
"""The axis that is tried on forms that lose too much."""


def compose(base: Path, axes: Sequence[Axis], chosen: Mapping[str, str]) -> Candidate:
    """Return the form with these passes, in the order of ``axes``."""
    kept = {axis.name: chosen[axis.name] for axis in axes if chosen.get(axis.name)}
    passes = ",".join(kept.values())
    return Candidate(passes, base, passes, kept)


def variants(candidate: Candidate, axes: Sequence[Axis], axis: Axis, with_data: bool) -> Iterator[Candidate]:
    """Yield the forms that differ from ``candidate`` along ``axis`` alone."""
    present = candidate.chosen.get(axis.name, "")
    if axis.after_integers and not candidate.chosen.get(PRECISION):
        return
    for passes in ("", *axis.choices(with_data)):
        form = compose(candidate.base, axes, {**candidate.chosen, axis.name: passes})
        if passes != present and form.passes:
            yield form


def gentler(candidate: Candidate, axes: Sequence[Axis]) -> Iterator[Candidate]:
    """Yield forms that are about as fast as ``candidate`` and may lose less: repaired, or rounded otherwise."""
    for axis in axes:
        if axis.name == REPAIR:
            yield from variants(candidate, axes, axis, with_data=True)
        for passes in axis.instead.get(candidate.chosen.get(axis.name, ""), ()):
            yield compose(candidate.base, axes, {**candidate.chosen, axis.name: passes})


def on(candidate: Candidate, base: Path) -> Candidate:
    """Return the same form of another model."""
    return replace(candidate, base=base)
