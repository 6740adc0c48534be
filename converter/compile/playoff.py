"""Which of several providers runs what was found for it the fastest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onnx_lathe.benchmarks.measure import FINAL
from onnx_lathe.converter.compile.explore import LEAST_STEP
from onnx_lathe.converter.compile.race import side_by_side
from onnx_lathe.converter.compile.task import Found, Rung, Task, shipped_provider
from onnx_lathe.converter.progress import Progress
from onnx_lathe.converter.stages import model_digest
from onnx_lathe.runtime.errors import MeasurementError

_SHARE = 0.2
"""Of the time budget that the play-off may take, beside the searches."""


def play_off(searches: Sequence[tuple[Task, Found]], progress: Progress) -> tuple[Task, Found]:
    """Return the search whose outcome is the fastest, measured side by side.

    The first where none is beyond noise, or where they cannot all be run together, which a note then says.
    """
    if len(searches) == 1:
        return searches[0]
    (task, found), *others = searches
    rungs = [_shipped(each, result) for each, result in searches]
    budget = _SHARE * task.time_budget / len(task.dims)
    effort = replace(FINAL, time_budget=min(budget, FINAL.time_budget), most_time=0.0)
    digests = [f"{each.provider}:{model_digest(each_model)}" for each in rungs if (each_model := each.model)]
    first = rungs[0].model
    assert first is not None, "what ships is a file"
    away = None if found.winner else task.not_at_home
    named = replace(task, original_name=_name(task), not_at_home=away)
    try:
        measurements = side_by_side(named, "play-off", first, rungs[1:], digests, effort, progress)
    except MeasurementError as error:
        note = f"{task.provider} was taken: its outcome could not be compared with the others'. {error}"
        return task, replace(found, notes=(*found.notes, note))
    best, fastest = (task, found), LEAST_STEP
    outcomes: list[str] = []
    for each, result in others:
        speed = task.mean_speed([measurement.speed(_name(each)).speed for measurement in measurements])
        outcomes.append(f"{_name(each)} {speed.value:.2f}x [{speed.low:.2f}, {speed.high:.2f}]")
        if speed.low > fastest:
            best, fastest = (each, result), speed.low
    note = f"Of several providers {best[0].provider} was chosen; against {_name(task)}: {', '.join(outcomes)}."
    return best[0], replace(best[1], notes=(*best[1].notes, note))


def _name(task: Task) -> str:
    return f"what ships on {task.provider}"


def _shipped(task: Task, found: Found) -> Rung:
    model = found.winner.model if found.winner and found.winner.model else task.original
    return Rung(_name(task), model, provider=shipped_provider(task, found))
