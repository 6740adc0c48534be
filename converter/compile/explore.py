"""The search through the space: the best precision first, then each other axis on the best forms so far.

It is a descent along one axis after another. A step is kept where a short interleaved heat shows it to be faster beyond
noise; what a pass refuses costs next to nothing, and a graph that was there before is not measured again. Where a
network repeats a block, forms are made and compared on two of its blocks, and only those that come out best are made
of the whole network. Accuracy is judged on the whole network: of the forms to begin with from the fastest on until
enough of them pass, and of all that may ship.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_lathe.benchmarks.measure import SCREEN
from onnx_lathe.benchmarks.result import Interval
from onnx_lathe.converter.compile.build import Built, build
from onnx_lathe.converter.compile.certify import judged, select_judge
from onnx_lathe.converter.compile.clock import Clock, OutOfTimeError
from onnx_lathe.converter.compile.forms import PRECISION, PREPARED, Axis, Candidate, compose, gentler, on, variants
from onnx_lathe.converter.compile.mixed import mixed_candidates
from onnx_lathe.converter.compile.race import Lap, Race, Runner
from onnx_lathe.converter.compile.task import Task, Tried
from onnx_lathe.converter.progress import Progress
from onnx_lathe.converter.stages import model_digest
from onnx_lathe.passes import registry
from onnx_lathe.runtime.errors import LatheError, OracleError, OutputError

FIRST_SHARE, JUDGED_SHARE, VARIED_SHARE, WHOLE_SHARE = 0.2, 0.4, 0.65, 0.8
"""Of the time budget that is spent when the first forms are made, when they are judged, when the axes were gone
through, and when what may ship was made whole; the rest is for the final measurement."""
FINALISTS = 3
LEAST_STEP = 1.01
"""What a step must gain at least, by its interval: less is noise."""
_NEAR = 0.95
"""A second form is varied too where it is at least so fast as the first."""
_OVER = "The time budget was spent before"


@dataclass(frozen=True)
class Explored:
    """What an exploration found.

    Attributes:
        tried: Every form, in the order in which it was tried.
        finalists: The names of those that may ship, the fastest first.
        notes: What is to be known of it.
    """

    tried: tuple[Tried, ...]
    finalists: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Explorer:
    """Explores for one task.

    Args:
        task: What is searched for.
        arena: The model to compare forms of: the original, or a part of it.
        clock: The time that is left.
        progress: Told what is done.
    """

    def __init__(self, task: Task, arena: Path, clock: Clock, progress: Progress) -> None:
        self._task, self._arena, self._clock, self._progress = task, arena, clock, progress
        self._race = Race(task, arena, clock, progress)
        self._judge = select_judge(task) if task.parts else None
        self._first: Sequence[Candidate] = ()
        self._doubts: list[str] = []
        self._tried: dict[str, Tried] = {}
        self._runners: dict[str, Runner] = {}
        self._seen = {model_digest(arena): task.original_name}

    def run(self) -> Explored:
        """Explore until the end, or until the time is over."""
        self._begin()
        lines = self._lines()
        for name in self._task.visited:
            lines = self._vary(lines, name)
        finalists = self._finalists(lines)
        return Explored(tuple(self._tried.values()), tuple(finalists), self._notes())

    def _notes(self) -> tuple[str, ...]:
        late = sum(str(item.refusal).startswith(_OVER) for item in self._tried.values())
        if not late:
            return tuple(self._doubts)
        seconds = self._task.time_budget
        return (
            *self._doubts,
            f"{_OVER} {late} of {len(self._tried)} forms were done with: {seconds:g} s; more may find more.",
        )

    # Along the axes.

    def _begin(self) -> None:
        """Make the forms to begin with, measure all, and judge those that count."""
        self._first = self._prepared()
        first = [self._enter(candidate, FIRST_SHARE) for candidate in self._first]
        self._measure([], [runner for runner in first if runner], VARIED_SHARE)
        self._judge_first()
        passing = [each for each in self._tried.values() if each.certificate and not each.refusal]
        if self._judge is None or any(each.candidate.chosen.get(PRECISION) for each in passing):
            return
        watching = self._clock.watching(self._progress, JUDGED_SHARE)
        try:
            mixed = mixed_candidates(self._task, list(self._tried.values()), self._judge, watching)
        except OutOfTimeError:
            return
        except OracleError as error:
            self._doubts.append(f"No mixture of precisions was tried: {error}")
            return
        again = self._enlarge() if mixed and self._arena != self._task.original else []
        entered = [self._enter(candidate, VARIED_SHARE) for candidate in mixed]
        self._measure([], [*again, *(runner for runner in entered if runner)], VARIED_SHARE)
        for candidate in mixed:
            self._judge_whole(candidate.name, VARIED_SHARE)

    def _prepared(self) -> list[Candidate]:
        """Return the forms to begin with, without the preparation where this network gives it nothing to do."""
        candidates = list(self._task.candidates)
        prepared = [candidate for candidate in candidates if PREPARED in candidate.chosen]
        if not prepared or self._build(min(prepared, key=lambda each: len(each.chosen)), self._arena).model:
            return candidates
        kept = ({**each.chosen, PREPARED: ""} for each in candidates)
        return [compose(each.base, self._task.axes, chosen) for each, chosen in zip(candidates, kept, strict=True)]

    def _enlarge(self) -> list[Runner]:
        """Compare whole networks from now on, for what leaves layers of theirs in float is no form of a part.

        Speeds of parts are forgotten; the forms that may ship, which were made whole to be judged, are returned to be
        measured again.
        """
        self._arena = self._task.original
        self._race = Race(self._task, self._arena, self._clock, self._progress)
        self._runners.clear()
        self._seen = {model_digest(self._arena): self._task.original_name}
        for name, tried in self._tried.items():
            self._tried[name] = replace(tried, speed=(), step=None)
            if tried.certificate and tried.model and not tried.refusal:
                digest = model_digest(tried.model)
                self._seen[digest] = name
                self._runners[name] = Runner(name, tried.model, digest)
        return list(self._runners.values())

    def _judge_first(self) -> None:
        """Judge the forms from the fastest on: all that were given, or until two kinds that may ship are found."""
        kinds: set[str] = set()
        best = 0.0
        for name in self._ranked(self._tried):
            gain = self._gain(name)
            if self._task.axes and (gain < max(1.0, _NEAR * best) or len(kinds) > 1):
                break
            # Without one that passes there is nothing to vary: that is worth the time of the axes.
            share = JUDGED_SHARE if kinds else WHOLE_SHARE
            if self._judge_whole(name, share) or self._gentler(name, share):
                best = max(best, gain)
                kinds.add(_kind(self._tried[name].candidate))

    def _gentler(self, name: str, share: float) -> bool:
        """Where a form loses too much, try what may lose less at its speed; return whether any of that may ship."""
        tried = self._tried[name]
        if tried.certificate is None:
            return False
        for candidate in gentler(tried.candidate, self._task.axes):
            runner = None if candidate.name in self._tried else self._enter(candidate, share)
            if runner and self._judge_whole(runner.name, share):
                self._measure([], [runner], VARIED_SHARE)
                return bool(self._tried[runner.name].speed)
        return False

    def _lines(self) -> list[str]:
        """Return the forms to vary: the fastest that may ship, and the fastest of another kind that is nearly so."""
        able = [name for name in self._ranked(self._tried) if self._judge is None or self._tried[name].certificate]
        if not able:
            # What computes the same as the original, perhaps because it is the same.
            exact = [candidate for candidate in self._first if not candidate.chosen.get(PRECISION)]
            return self._standing(exact[:1])
        first = able[0]
        others = [name for name in able if _kind(self._tried[name].candidate) != _kind(self._tried[first].candidate)]
        return [first, *[name for name in others if self._gain(name) >= _NEAR * self._gain(first)][:1]]

    def _standing(self, candidates: Sequence[Candidate]) -> list[str]:
        """Enter the original as the form that passes are added to, where cleaning it changes nothing."""
        for candidate in candidates:
            self._runners.setdefault(candidate.name, Runner(candidate.name, self._arena, model_digest(self._arena)))
        return [candidate.name for candidate in candidates]

    def _vary(self, lines: Sequence[str], axis_name: str) -> list[str]:
        """Try what an axis offers on each line; return the lines, each with its best step where that gains."""
        axis = next(axis for axis in self._task.axes if axis.name == axis_name)
        steps: list[Runner] = []
        for line in lines:
            for candidate in variants(self._tried[line].candidate, self._task.axes, axis, self._task.parts is not None):
                runner = None if candidate.name in self._tried else self._enter(candidate, VARIED_SHARE, line)
                steps += [runner] if runner else []
        if not steps:
            return list(lines)
        self._measure([replace(self._runners[line], parent=None) for line in lines], steps, VARIED_SHARE)
        new = [self._best_step(line, [step.name for step in steps if step.parent == line], axis) for line in lines]
        fastest = max(self._gain(name) for name in new)
        return [name for name in new if self._gain(name) >= _NEAR * fastest]

    def _best_step(self, line: str, steps: Iterable[str], axis: Axis) -> str:
        """Return the step that gains most and, where it rounds, keeps the accuracy; ``line`` where none does."""
        gains = {name: step for name in steps if (step := self._tried[name].step) is not None}
        for name, step in gains.items():
            if step.low < LEAST_STEP:
                self._refuse(name, f"It is {step.value:.2f}x as fast as {line}: no gain beyond noise.")
        for name in sorted(gains, key=lambda name: gains[name].value, reverse=True):
            tried = self._tried[name]
            exact = tried.candidate.chosen.get(axis.name, "") not in axis.lossy
            if tried.refusal is None and (exact or self._judge_whole(name, WHOLE_SHARE)):
                return name
        return line

    # One form.

    def _enter(self, candidate: Candidate, share: float, parent: str | None = None) -> Runner | None:
        """Make a form in the arena; None, with the reason on record, where it is not to be measured."""
        self._tried[candidate.name] = Tried(candidate, against=parent)
        if self._clock.left(share) <= 0.0 and self._runners:
            self._refuse(candidate.name, f"{_OVER} it was made.")
            return None
        built = self._build(candidate, self._arena if candidate.base == self._task.original else candidate.base)
        name = candidate.name
        seconds = sum(each.seconds for each in built.applied[-1:])
        self._tried[name] = replace(self._tried[name], seconds=seconds)
        if built.model is None:
            self._tried[name] = replace(self._tried[name], applied=built.applied)
            self._refuse(name, built.refusal or "It could not be made.")
            return None
        if not built.changed:
            self._refuse(name, "The passes change nothing in this graph.")
            return None
        twin = self._seen.setdefault(built.digest, name)
        if twin != name:
            self._refuse(name, f"It is the same graph as {twin}.")
            return None
        self._runners[name] = Runner(name, built.model, built.digest, parent)
        if self._arena == self._task.original:
            self._tried[name] = replace(self._tried[name], model=built.model, applied=built.applied)
        return self._runners[name]

    def _build(self, candidate: Candidate, base: Path) -> Built:
        return build(self._task, on(candidate, base), self._progress)

    def _measure(self, leaders: Sequence[Runner], runners: Sequence[Runner], share: float) -> None:
        if not runners:
            return
        laps = self._race.heat(leaders, runners, share)
        for runner in runners:
            self._note(runner.name, laps.get(runner.name))

    def _note(self, name: str, lap: Lap | None) -> None:
        if lap is not None:
            self._tried[name] = replace(self._tried[name], speed=lap.speed, step=lap.step)
        else:
            self._refuse(name, self._race.failed.get(name, f"{_OVER} it was measured."))

    def _judge_whole(self, name: str, share: float) -> bool:
        """Make a form of the whole network and judge it; return whether it may ship."""
        tried = self._tried[name]
        if tried.refusal is not None:
            return False
        if self._clock.left(share) <= 0.0:
            self._refuse(name, f"{_OVER} it was judged.")
            return False
        built = self._build(tried.candidate, tried.candidate.base)
        if built.model is None:
            self._refuse(name, built.refusal or "It could not be made of the whole network.")
            return False
        tried = self._tried[name] = replace(tried, model=built.model, applied=built.applied)
        if self._judge is None or tried.certificate is not None:
            return True
        watching = self._clock.watching(self._progress, WHOLE_SHARE)
        try:
            certificate = judged(self._task, self._judge, name, built.model, watching).certificate
        except OutOfTimeError:
            self._refuse(name, f"{_OVER} it was judged.")
            return False
        except OutputError:
            raise
        except LatheError as error:
            self._refuse(name, str(error))
            return False
        self._tried[name] = replace(tried, certificate=certificate)
        if certificate.drop > self._task.max_drop:
            self._refuse(
                name,
                f"It loses {100 * certificate.drop:.2f} points of {certificate.metric} on the select part; "
                f"{100 * self._task.max_drop:g} are allowed.",
            )
            return False
        return True

    def _refuse(self, name: str, reason: str) -> None:
        self._tried[name] = replace(self._tried[name], refusal=reason)

    # What comes out best.

    def _finalists(self, lines: Sequence[str]) -> list[str]:
        """Make what came out best of the whole network, judge it, and return it, the fastest first."""
        able = self._ranked([*lines, *self._tried])
        chosen = [name for name in able if self._fast_enough(name)]
        if self._task.axes:
            passing: list[str] = []
            for name in chosen:
                if len(passing) < FINALISTS and self._judge_whole(name, WHOLE_SHARE):
                    passing.append(name)
            chosen = passing
        chosen = [name for name in chosen if self._judge is None or self._tried[name].certificate]
        if len(chosen) < 2 and self._arena == self._task.original:
            return chosen
        return self._final_heat(chosen)

    def _final_heat(self, names: Sequence[str]) -> list[str]:
        """Measure whole networks, for longer; return those that are faster, the fastest first."""
        race = Race(self._task, self._task.original, self._clock, self._progress)
        runners = [Runner(name, model, model_digest(model)) for name in names if (model := self._tried[name].model)]
        laps = race.heat([], runners, WHOLE_SHARE, SCREEN) if runners else {}
        for name in laps:
            self._tried[name] = replace(self._tried[name], speed=laps[name].speed)
        for name in race.failed:
            self._refuse(name, race.failed[name])
        return [name for name in self._ranked(names) if self._fast_enough(name)]

    def _fast_enough(self, name: str) -> bool:
        """Say whether a form is faster over all shapes and slower at none, and put on record where it is not."""
        speed = self._tried[name].speed
        if not speed or self._tried[name].refusal is not None:
            return False
        slowest = min(each.value for each in speed)
        if self._gain(name) <= 1.0 or any(each.high < 1.0 for each in speed):
            self._refuse(name, f"It is not faster than the original: {slowest:.2f}x in the screening.")
            return False
        return True

    def _ranked(self, names: Iterable[str]) -> list[str]:
        """Return those of ``names`` that were measured and not refused, the fastest first."""
        able = [name for name in dict.fromkeys(names) if self._tried[name].speed and not self._tried[name].refusal]
        return sorted(able, key=self._gain, reverse=True)

    def _gain(self, name: str) -> float:
        return gain(self._task, self._tried[name].speed)


def gain(task: Task, speed: Sequence[Interval]) -> float:
    """Return the weighted geometric mean of the speeds at each shape; 0.0 where nothing was measured."""
    return task.mean_speed(speed).value if speed else 0.0


def _kind(candidate: Candidate) -> str:
    """Return the name of the pass that decides a form's precision, the last; empty for a form without passes."""
    return registry.parse(candidate.passes)[-1].name if candidate.passes else ""
