"""The search through the space: precision first, then each other axis on the best forms so far, then precision again.

It is a descent along one axis after another. A step is kept where a short interleaved heat shows it to be faster; what
a pass refuses costs next to nothing, and a graph that was there before is not measured again. Where a network repeats a
block, forms are drafted and compared on two of its blocks. What came out best is tried in every precision, and then
made of the whole network and judged, from the fastest on (`onnx_lathe.converter.compile.whole`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_lathe.benchmarks.result import Interval
from onnx_lathe.converter.compile.build import Built, build
from onnx_lathe.converter.compile.clock import OVER, Clock
from onnx_lathe.converter.compile.forms import PRECISION, PREPARED, REPAIR, Axis, Candidate, compose, on, variants
from onnx_lathe.converter.compile.home import refusal
from onnx_lathe.converter.compile.race import Race, Runner
from onnx_lathe.converter.compile.record import Record
from onnx_lathe.converter.compile.space import is_exact
from onnx_lathe.converter.compile.task import Task, Tried
from onnx_lathe.converter.compile.whole import Whole
from onnx_lathe.converter.progress import Progress
from onnx_lathe.converter.stages import model_digest

FIRST_SHARE, VARIED_SHARE, MEASURED_SHARE, WHOLE_SHARE = 0.2, 0.4, 0.5, 0.7
"""Of the time budget that is spent when the first forms are made, when the axes were gone through, when what they gave
was measured in every precision, and when what may ship was made whole and judged; the rest is for the confirmation."""
LEAST_STEP, LIKELY_STEP = 1.01, 1.08
"""What a step must gain at least, by its interval or, on a machine too noisy for that, by its estimate: what ships is
confirmed against the original, so that a step kept in error costs some speed and no promise."""


@dataclass(frozen=True)
class Explored:
    """What an exploration found.

    Attributes:
        tried: Every form, in the order in which it was tried.
        finalists: The names of those that may ship, the fastest first.
        notes: What is to be known of it.
        seconds: What it took.
    """

    tried: tuple[Tried, ...]
    finalists: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


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
        self._record = Record(task)
        self._whole = Whole(task, self._record, clock, progress)
        self._runners: dict[str, Runner] = {}
        self._seen = {model_digest(arena): task.original_name}

    def run(self) -> Explored:
        """Explore until the end, or until the time is over."""
        first = self._prepared()
        entered = [self._enter(candidate, FIRST_SHARE) for candidate in first]
        self._measure(entered)
        line = self._line(first)
        for name in self._task.visited if line else ():
            line = self._vary(line, name)
        if line:
            self._in_every_precision(line, first)
        finalists = self._whole.finalists([line] if line else [], WHOLE_SHARE)
        return Explored(tuple(self._record.tried.values()), tuple(finalists), self._notes())

    def _notes(self) -> tuple[str, ...]:
        tried = self._record.tried.values()
        late = sum(str(item.refusal).startswith(OVER) for item in tried)
        doubts = tuple(self._whole.doubts)
        if not late:
            return doubts
        seconds = self._task.time_budget
        return (*doubts, f"{OVER} {late} of {len(tried)} forms were done with: {seconds:g} s; more may find more.")

    # Along the axes.

    def _prepared(self) -> list[Candidate]:
        """Return the forms to begin with, without the preparation where this network gives it nothing to do."""
        candidates = list(self._task.candidates)
        prepared = [candidate for candidate in candidates if PREPARED in candidate.chosen]
        if not prepared or self._build(min(prepared, key=lambda each: len(each.chosen))).model:
            return candidates
        kept = ({**each.chosen, PREPARED: ""} for each in candidates)
        return [compose(each.base, self._task.axes, chosen) for each, chosen in zip(candidates, kept, strict=True)]

    def _line(self, first: Sequence[Candidate]) -> str:
        """Return the form to vary, the fastest; "" where there is none."""
        able = self._record.ranked(self._record.tried)
        if able:
            return able[0]
        # What computes the same as the original, perhaps because it is the same: passes are added to that.
        exact = next((candidate.name for candidate in first if not candidate.chosen.get(PRECISION)), "")
        if exact and (exact not in self._runners or exact in self._race.failed):
            self._runners[exact] = Runner(exact, self._arena, model_digest(self._arena))
        return exact

    def _vary(self, line: str, axis_name: str) -> str:
        """Try what an axis offers; return the best step where that gains, else ``line``."""
        axis = next(axis for axis in self._task.axes if axis.name == axis_name)
        forms = variants(self._record.tried[line].candidate, self._task.axes, axis, self._task.parts is not None)
        new = [form for form in forms if form.name not in self._record.tried]
        steps = [self._enter(form, VARIED_SHARE, line) for form in new]
        self._measure(steps, line)
        return self._best_step(line, [form.name for form in new], axis)

    def _best_step(self, line: str, steps: Iterable[str], axis: Axis) -> str:
        """Return the step that gains most and, where it changes answers, keeps them; ``line`` where none does."""
        tried = self._record.tried
        gains = {name: step for name in steps if (step := tried[name].step) is not None}
        for name, step in gains.items():
            if step.low < LEAST_STEP and step.value < LIKELY_STEP:
                self._record.refuse(name, f"It is {step.value:.2f}x as fast as {line}: no gain beyond noise.")
        for name in sorted(gains, key=lambda name: gains[name].value, reverse=True):
            exact = tried[name].candidate.chosen.get(axis.name, "") not in axis.lossy
            if tried[name].refusal is None and (exact or self._whole.keeps_in_float(name, WHOLE_SHARE)):
                return name
        return line

    def _in_every_precision(self, line: str, first: Sequence[Candidate]) -> None:
        """Measure what the axes gave in the other precisions that are not slower than the original, and in none."""
        chosen = self._record.tried[line].candidate.chosen
        found = {name: passes for name, passes in chosen.items() if name != REPAIR}
        entered: list[Runner | None] = []
        for each in first:
            worth = is_exact(each, self._task.original) or self._record.gain(each.name) > 1.0
            precision = {PRECISION: each.chosen.get(PRECISION, "")}
            form = compose(each.base, self._task.axes, {**each.chosen, **found, **precision})
            known = self._record.tried.get(form.name)
            if worth and form.passes and not (known and (known.speed or known.refusal)):
                entered.append(self._enter(form, MEASURED_SHARE, line))
        self._measure(entered, line)

    # One form.

    def _enter(self, candidate: Candidate, share: float, parent: str | None = None) -> Runner | None:
        """Make a form in the arena; None, with the reason on record, where it is not to be measured."""
        name = candidate.name
        known = self._record.tried.get(name, Tried(candidate))
        self._record.tried[name] = replace(known, against=parent)
        if self._clock.left(share) <= 0.0 and self._runners:
            self._record.refuse(name, f"{OVER} it was made.")
            return None
        built = self._build(candidate)
        self._record.change(name, seconds=sum(each.seconds for each in built.applied[-1:]))
        if reason := self._unfit(name, built):
            self._record.refuse(name, reason)
            return None
        assert built.model is not None, "what could not be made is unfit"
        self._runners[name] = Runner(name, built.model, built.digest)
        if self._arena == self._task.original:
            self._record.change(name, model=built.model, applied=built.applied)
        return self._runners[name]

    def _unfit(self, name: str, built: Built) -> str | None:
        """Return why a form is not to be measured; None where it is."""
        if built.model is None:
            self._record.change(name, applied=built.applied)
            return built.refusal or "It could not be made."
        if not built.changed:
            return "The passes change nothing in this graph."
        twin = self._seen.setdefault(built.digest, name)
        return f"It is the same graph as {twin}." if twin != name else refusal(self._task, built.model)

    def _build(self, candidate: Candidate) -> Built:
        """Make a form of the arena: a draft, where that is a part of the network only."""
        if candidate.base != self._task.original or self._arena == self._task.original:
            return build(self._task, candidate, self._progress)
        return build(self._task, on(candidate, self._arena), self._progress, draft=True)

    def _measure(self, entered: Sequence[Runner | None], line: str = "") -> None:
        """Measure forms beside the original, or beside ``line``, whose speed is known."""
        runners = [runner for runner in entered if runner]
        if not runners:
            return
        laps = self._race.heat(runners, MEASURED_SHARE, leader=self._runners[line] if line else None)
        known = self._record.tried[line].speed if line else ()
        whole = self._arena == self._task.original
        for name in (runner.name for runner in runners):
            if name not in laps:
                failed = self._race.failed
                self._record.refuse(name, failed.get(name) or failed.get(line) or f"{OVER} it was measured.")
                continue
            speed = tuple(_product(*pair) for pair in zip(known, laps[name], strict=True)) if known else laps[name]
            step = self._task.mean_speed(laps[name]) if line else None
            self._record.change(name, speed=speed, step=step, whole=whole)


def _product(one: Interval, other: Interval) -> Interval:
    return Interval(one.value * other.value, one.low * other.low, one.high * other.high)
