"""Forms of the whole network: made, judged on the select part, and measured for the last time before the confirmation.

Whether a form keeps its accuracy depends on what rounds in it, not on how the rest of the graph is written: once one
form has lost too much, others that round alike are not made.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx_lathe.benchmarks.measure import SCREEN
from onnx_lathe.converter.compile.build import build
from onnx_lathe.converter.compile.certify import judged, select_judge
from onnx_lathe.converter.compile.clock import OVER, Clock, OutOfTimeError
from onnx_lathe.converter.compile.forms import PRECISION, REPAIR, Candidate, compose, gentler
from onnx_lathe.converter.compile.mixed import mixed_candidates
from onnx_lathe.converter.compile.race import Race, Runner
from onnx_lathe.converter.compile.record import Record
from onnx_lathe.converter.compile.space import is_exact
from onnx_lathe.converter.compile.task import Task, Tried
from onnx_lathe.converter.progress import Progress
from onnx_lathe.converter.stages import model_digest
from onnx_lathe.runtime.errors import LatheError, OutputError

FINALISTS = 2
"""Forms that are made whole where they keep their accuracy; beside them one that computes the same as the original."""

_GRACE = 0.15
"""Of the time budget that judging may take beyond what making forms may: what is made is not thrown away."""


class Whole:
    """Makes and judges forms of the whole network.

    Args:
        task: What is searched for.
        record: Of the forms, and where what becomes of them is put.
        clock: The time that is left.
        progress: Told what is done.

    Attributes:
        doubts: What could not be tried, a sentence each.
    """

    def __init__(self, task: Task, record: Record, clock: Clock, progress: Progress) -> None:
        self._task, self._record, self._clock, self._progress = task, record, clock, progress
        self._judge = select_judge(task) if task.parts else None
        self._lost: dict[tuple[str, ...], str] = {}
        self.doubts: list[str] = []

    def keeps_in_float(self, name: str, share: float) -> bool:
        """Say whether a form keeps its accuracy but for its rounding, and refuse it where it does not.

        Args:
            name: Of a form that was measured.
            share: Of the time budget that may be spent before it is judged.
        """
        if self._judge is None:
            return True
        candidate = self._record.tried[name].candidate
        chosen = {axis: passes for axis, passes in candidate.chosen.items() if axis not in (PRECISION, REPAIR)}
        plain = compose(candidate.base, self._task.axes, chosen)
        self._record.tried.setdefault(plain.name, Tried(plain))
        if self._keeps(plain.name, share):
            return True
        if plain.name != name:
            self._record.refuse(name, f"{plain.name}: {self._record.tried[plain.name].refusal}")
        return False

    def finalists(self, lines: Sequence[str], share: float) -> list[str]:
        """Make what came out best of the whole network, judge it, and return what may ship, the fastest first.

        Args:
            lines: The forms at the end of the axes, which come first among equals.
            share: Of the time budget that may be spent when the last is judged.
        """
        able = [name for name in self._record.ranked([*lines, *self._record.tried]) if self._record.fast_enough(name)]
        passing: list[str] = []
        # Without axes forms were given, and all are judged.
        most = FINALISTS if self._task.axes else len(able)
        for name in able:
            if len(passing) < most and (found := self._passing(name, share)):
                passing.append(found)
        if not any(self._rounds(name) for name in passing):
            passing += self._mixed(share)
        if not any(self._is_exact(name) for name in passing):
            exact = [name for name in able if self._is_exact(name) and self._record.tried[name].refusal is None]
            passing += [name for name in exact[:1] if self._stands_by(name, share)]
        return self._measured(list(dict.fromkeys(passing)), share)

    def _passing(self, name: str, share: float) -> str | None:
        """Return a form that keeps its accuracy, or what rounds more gently in its place; None where neither does."""
        if self._keeps(name, share):
            return name
        tried = self._record.tried[name]
        if tried.certificate is None or not self._task.axes:
            return None
        for candidate in gentler(tried.candidate, self._task.axes):
            if candidate.name not in self._record.tried:
                # About as fast: what is shipped is measured again, whole.
                self._record.tried[candidate.name] = Tried(candidate, against=name, speed=tried.speed, whole=False)
                if self._keeps(candidate.name, share):
                    return candidate.name
        return None

    def _stands_by(self, name: str, share: float) -> bool:
        """Make a form that computes the same as the original; judge it where there is time, for that it must not be."""
        if self._clock.left(share) > 0.0:
            return self._keeps(name, share)
        return self._made(name)

    def _keeps(self, name: str, share: float) -> bool:
        """Make a form of the whole network and judge it; return whether it may ship."""
        tried = self._record.tried[name]
        if tried.refusal is not None:
            return False
        if tried.certificate is not None:
            return True
        rounding = self._rounding(tried.candidate)
        if other := self._lost.get(rounding):
            self._record.refuse(name, f"It rounds as {other} does, which loses too much.")
            return False
        if self._clock.left(share) <= 0.0:
            # One that computes the same may stand by unjudged.
            if not self._is_exact(name):
                self._record.refuse(name, f"{OVER} it was judged.")
            return False
        return self._made(name) and (self._judge is None or self._judged(name, rounding, share))

    def _made(self, name: str) -> bool:
        built = build(self._task, self._record.tried[name].candidate, self._progress)
        if built.model is None:
            self._record.refuse(name, built.refusal or "It could not be made of the whole network.")
            return False
        self._record.change(name, model=built.model, applied=built.applied)
        return True

    def _judged(self, name: str, rounding: tuple[str, ...], share: float) -> bool:
        tried = self._record.tried[name]
        assert self._judge is not None, "there is data to judge by"
        assert tried.model is not None, "it was made"
        watching = self._clock.watching(self._progress, share + _GRACE)
        try:
            certificate = judged(self._task, self._judge, name, tried.model, watching).certificate
        except OutOfTimeError:
            self._record.refuse(name, f"{OVER} it was judged.")
            return False
        except OutputError:
            raise
        except LatheError as error:
            self._record.refuse(name, str(error))
            return False
        self._record.change(name, certificate=certificate)
        if certificate.drop <= self._task.max_drop:
            return True
        self._lost[rounding] = name
        self._record.refuse(
            name,
            f"It loses {100 * certificate.drop:.2f} points of {certificate.metric} on the select part; "
            f"{100 * self._task.max_drop:g} are allowed.",
        )
        return False

    def _rounding(self, candidate: Candidate) -> tuple[str, ...]:
        """Return what decides the accuracy of a form: all of it, where its passes belong to no axes."""
        if not candidate.chosen:
            return (candidate.name,)
        chosen = {axis.name: candidate.chosen.get(axis.name, "") for axis in self._task.axes}
        return tuple("" if chosen[axis.name] in axis.exact else chosen[axis.name] for axis in self._task.axes)

    def _rounds(self, name: str) -> bool:
        chosen = self._record.tried[name].candidate.chosen
        return bool(chosen.get(PRECISION)) if chosen else True

    def _is_exact(self, name: str) -> bool:
        return is_exact(self._record.tried[name].candidate, self._task.original)

    def _mixed(self, share: float) -> list[str]:
        """Return forms with some layers in float, where all rounded together lose too much."""
        if self._judge is None or not self._task.axes:
            return []
        tried = self._record.tried
        watching = self._clock.watching(self._progress, share)
        try:
            found = mixed_candidates(self._task, list(tried.values()), self._judge, watching)
        except OutOfTimeError:
            return []
        except OutputError:
            raise
        except LatheError as error:
            self.doubts.append(f"No mixture of precisions was tried: {error}")
            return []
        for candidate in found:
            tried[candidate.name] = Tried(candidate)
        return [candidate.name for candidate in found if self._keeps(candidate.name, share)]

    def _measured(self, names: Sequence[str], share: float) -> list[str]:
        """Measure whole networks, for longer; return those that are faster, the fastest first."""
        tried = self._record.tried
        race = Race(self._task, self._task.original, self._clock, self._progress)
        runners = [Runner(name, model, model_digest(model)) for name in names if (model := tried[name].model)]
        laps = race.heat(runners, share, effort=SCREEN)
        for name in laps:
            self._record.change(name, speed=laps[name], whole=True)
        for name in race.failed:
            self._record.refuse(name, race.failed[name])
        # What there was no time for has the speed of drafts, which does not compare with that of whole networks.
        late = [name for name in names if name not in laps and name not in race.failed]
        order = [*self._record.ranked(laps), *self._record.ranked(late)]
        return [name for name in order if self._record.fast_enough(name)]
