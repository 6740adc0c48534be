"""The confirmation: what came out best, in fresh processes and on the certify part, until one form keeps its promise.

Forms are taken from the fastest on; each that fails, in speed or in accuracy, gives way to the next while time is left.
The certify part decides over one form that loses something and no more: judged on it again and again, one of several
that lose too much would pass in the end by luck, and 95 % would not be 95 %. After it only forms that compute the same
as the original are left to ship. That they do was checked as they were made; their certificates are for the reader.
Speed is measured anew for each form: of a few looks each has its own chance of 1 % to call a form faster that is not.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from onnx_lathe.benchmarks.evaluation import Evaluation
from onnx_lathe.benchmarks.measure import FINAL
from onnx_lathe.benchmarks.result import Certificate, Comparison, Measurement
from onnx_lathe.benchmarks.verdict import EQUAL
from onnx_lathe.converter.compile.build import build
from onnx_lathe.converter.compile.certify import Judge, judge_of, judged
from onnx_lathe.converter.compile.explore import LEAST_STEP, Explored
from onnx_lathe.converter.compile.front import pick
from onnx_lathe.converter.compile.race import side_by_side
from onnx_lathe.converter.compile.record import gain
from onnx_lathe.converter.compile.space import is_exact
from onnx_lathe.converter.compile.task import Rung, Task, Tried
from onnx_lathe.converter.progress import Progress
from onnx_lathe.converter.stages import model_digest
from onnx_lathe.runtime.errors import LatheError, MeasurementError, OutputError

LEAST_SHARE = 0.05
"""Of the time budget that must be left for one more form to be confirmed: about what three fresh processes take."""


@dataclass(frozen=True)
class Look:
    """What one form was seen to do in fresh processes and on the certify part.

    Attributes:
        name: Of the form; None for the original and the rungs alone.
        refusal: Why it is not shipped; None where it may be.
        measurements: At each shape; empty where it could not be measured.
        certificates: Of the original, the rungs and, where its speed was confirmed, the form, by name.
        evaluation: What else differs between the original and the form; None where that was not judged.
        seconds: What measuring took.
        decided: Whether the certify part has decided over the form.
    """

    name: str | None
    refusal: str | None = None
    measurements: Sequence[Measurement] = ()
    certificates: Mapping[str, Certificate] = field(default_factory=dict[str, Certificate])
    evaluation: Evaluation | None = None
    seconds: float = 0.0
    decided: bool = False


def confirm(task: Task, explored: Explored, seconds: float, progress: Progress) -> tuple[Look, ...]:
    """Look at forms in turn until one may ship; the last look tells whether one does, and the first is at the fastest.

    Args:
        task: What is searched for.
        explored: What may ship, the fastest first.
        seconds: That the measurements may take together.
        progress: Told what is done.

    Raises:
        LatheError: The original or a rung cannot be measured or judged.
        InputError: The form to pick is none of those that were tried.
    """
    judge = judge_of(task, task.parts.certify) if task.parts else None
    looks: list[Look] = []
    judged_on: str | None = None
    for item in _in_turn(task, explored):
        name, exact = item.candidate.name, is_exact(item.candidate, task.original)
        if looks and seconds < LEAST_SHARE * task.time_budget:
            looks.append(Look(name, "The time budget was spent before it was confirmed."))
            continue
        if judged_on and not exact:
            looks.append(Look(name, f"The certify part has decided over {judged_on}: it does so once."))
            continue
        look = _look(task, made(task, item, progress), judge, seconds, progress)
        looks.append(look)
        if look.refusal is None:
            break
        seconds -= look.seconds
        judged_on = judged_on or (name if look.decided and not exact else None)
    if not any(look.measurements for look in looks):
        looks.insert(0, _look(task, None, judge, seconds, progress))
    return tuple(looks)


def made(task: Task, tried: Tried, progress: Progress) -> Tried:
    """Return a form with its file, made whole where it was not, or where the cache has dropped it since."""
    if tried.model is not None and tried.model.is_file():
        return tried
    built = build(task, tried.candidate, progress)
    return replace(tried, model=built.model, applied=built.applied, refusal=built.refusal)


def _in_turn(task: Task, explored: Explored) -> list[Tried]:
    """Return what to confirm: the form that was picked, or the finalists, and the fastest exact form after them."""
    by_name = {item.candidate.name: item for item in explored.tried}
    if task.pick is not None:
        return [by_name[pick(task, explored.tried)]]
    chosen = [by_name[name] for name in explored.finalists]
    if any(is_exact(item.candidate, task.original) for item in chosen) or not chosen:
        return chosen
    exact = [item for item in explored.tried if item.refusal is None and is_exact(item.candidate, task.original)]
    able = [item for item in exact if gain(task, item.speed) > 1.0]
    return [*chosen, *sorted(able, key=lambda item: -gain(task, item.speed))[:1]]


def _look(task: Task, form: Tried | None, judge: Judge | None, seconds: float, progress: Progress) -> Look:
    """Measure the original, the rungs and a form, and judge them where the form is as fast as it has to be."""
    name = form.candidate.name if form else None
    if form is not None and form.model is None:
        return Look(name, form.refusal or "It could not be made of the whole network.")
    began = time.monotonic()
    try:
        measurements = _measure(task, form, seconds, progress)
    except MeasurementError as error:
        if name is None or error.where != name or name in {rung.name for rung in task.rungs}:
            raise
        return Look(name, f"It could not be measured: {error}", seconds=time.monotonic() - began)
    taken = time.monotonic() - began
    refusal = None if name is None or task.pick is not None else too_slow(task, name, measurements)
    look = Look(name, refusal, measurements, seconds=taken)
    return look if judge is None else _judged(task, look, form, judge, progress)


def _measure(task: Task, form: Tried | None, seconds: float, progress: Progress) -> Sequence[Measurement]:
    rungs = _with(task, form)
    budget = max(0.0, seconds) / len(task.dims)
    effort = replace(FINAL, time_budget=min(budget, FINAL.time_budget), most_time=min(budget, FINAL.most_time))
    digests = [model_digest(rung.model) if rung.model else str(rung.subject) for rung in rungs]
    digests = [model_digest(task.original), *digests]
    return side_by_side(task, "measure", task.original, rungs, digests, effort, progress)


def _with(task: Task, form: Tried | None) -> list[Rung]:
    """Return the rungs, and the form where it is none of them."""
    rungs = list(task.rungs)
    if form is not None and form.model and form.candidate.name not in {rung.name for rung in rungs}:
        rungs.append(Rung(form.candidate.name, form.model))
    return rungs


def _judged(task: Task, look: Look, form: Tried | None, judge: Judge, progress: Progress) -> Look:
    """Add the certificates to a look; a form whose speed has failed does not get to see the certify part."""
    rungs = [Rung(task.original_name, task.original), *(_with(task, None if look.refusal else form))]
    certificates: dict[str, Certificate] = {}
    evaluation = None
    for rung in rungs:
        if rung.model is None:
            continue
        try:
            found = judged(task, judge, rung.name, rung.model, progress, beyond=rung.name == look.name)
        except OutputError:
            raise
        except LatheError as error:
            if rung.name != look.name or rung in task.rungs:
                raise
            return replace(look, certificates=certificates, refusal=f"It could not be judged: {error}")
        certificates[rung.name] = found.certificate
        evaluation = found.evaluation or evaluation
    look = replace(look, certificates=certificates, evaluation=evaluation)
    if look.refusal or task.pick is not None:
        return look
    return replace(look, refusal=_loses(task, look), decided=look.name in certificates)


def _loses(task: Task, look: Look) -> str | None:
    certificate = look.certificates.get(look.name) if look.name else None
    if certificate is None or certificate.drop <= task.max_drop:
        return None
    return (
        f"On the certify part it loses {100 * certificate.drop:.2f} points of {certificate.metric}; "
        f"{100 * task.max_drop:g} are allowed."
    )


def too_slow(task: Task, name: str, measurements: Sequence[Measurement]) -> str | None:
    """Return why a form is not as fast as it has to be, in fresh processes; None where it is."""
    comparisons = [measurement.speed(name) for measurement in measurements]
    for dims, comparison in zip(task.dims, comparisons, strict=True):
        doubtful = comparison.verdict == "inconclusive" and comparison.speed.low < 1.0 - EQUAL
        if comparison.verdict == "slower" or doubtful:
            return (
                f"In fresh processes at {task.shape_name(dims)} it may be slower: {speed_text(comparison)}, "
                f"{comparison.reason}."
            )
    mean = task.mean_speed([comparison.speed for comparison in comparisons])
    if mean.low < LEAST_STEP or all(comparison.verdict != "faster" for comparison in comparisons):
        where = "; ".join(
            f"at {task.shape_name(dims)} {speed_text(comparison)}, {comparison.reason}"
            for dims, comparison in zip(task.dims, comparisons, strict=True)
        )
        return f"In fresh processes it is not faster beyond noise: {where}."
    return None


def speed_text(comparison: Comparison) -> str:
    """Return a speed with its interval in words."""
    speed = comparison.speed
    return f"{speed.value:.2f}x [{speed.low:.2f}, {speed.high:.2f}] the speed of {comparison.against}"
