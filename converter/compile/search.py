"""The search: explore the forms, confirm the fastest in fresh processes, certify it.

Decisions fall on the select part of the data; the certify part decides over one form alone
(`onnx_lathe.converter.compile.confirm`). Every step is a stage of the cache: a search that was interrupted goes on
where it stopped, and one that ended is not made again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnx_lathe.benchmarks.limits import ModelRoofline
from onnx_lathe.benchmarks.peaks import measure_peaks
from onnx_lathe.converter.compile.arena import arena, random_answer
from onnx_lathe.converter.compile.clock import Clock
from onnx_lathe.converter.compile.confirm import Look, confirm, made, speed_text
from onnx_lathe.converter.compile.explore import WHOLE_SHARE, Explored, Explorer
from onnx_lathe.converter.compile.record import gain
from onnx_lathe.converter.compile.task import Found, Task, Tried
from onnx_lathe.converter.progress import Progress
from onnx_lathe.converter.roofline import roofline
from onnx_lathe.converter.stages import model_digest
from onnx_lathe.converter.workload import batches_to_time

_CODE = ("onnx_lathe.passes", "onnx_lathe.runtime", "onnx_lathe.benchmarks", "onnx_lathe.converter")
_ROOFLINE_CODE = ("onnx_lathe.benchmarks", "onnx_lathe.converter.roofline", "onnx_lathe.runtime")


def search(task: Task, progress: Progress) -> Found:
    """Find the fastest candidate that keeps its accuracy; the original where none does.

    Raises:
        LatheError: The original itself cannot be run, or not on these inputs.
        InputError: The form to pick is none of those that were tried.
    """
    explored = _explored(task, progress)
    looks = _confirmed(task, explored, progress)
    shown = _shown(looks)
    leader = _leader(task, explored, shown.name or next((look.name for look in looks if look.name), None), progress)
    tried = [_conclude(task, item, leader, looks) for item in explored.tried]
    leader = leader and replace(
        leader, refusal=next(look.refusal for look in looks if look.name == leader.candidate.name)
    )
    winner = leader if leader and leader.refusal is None else None
    refusal = next((look.refusal for look in looks if look.refusal), "No candidate keeps its accuracy and is faster.")
    return Found(
        winner,
        leader,
        _praise(task, winner, shown) if winner else " ".join((refusal, *explored.notes)),
        [leader if leader and item.candidate == leader.candidate else item for item in tried],
        next((each.metric for each in shown.certificates.values()), None),
        shown.certificates,
        shown.measurements,
        shown.evaluation,
        _rooflines(task, leader, progress),
        (*task.notes, *explored.notes),
    )


def _leader(task: Task, explored: Explored, name: str | None, progress: Progress) -> Tried | None:
    """Return the form that the report is about, with its file."""
    return next((made(task, item, progress) for item in explored.tried if item.candidate.name == name), None)


def _shown(looks: Sequence[Look]) -> Look:
    """Return the look that the report is about: at what ships, or else at the fastest that could be measured."""
    ships = next((look for look in looks if look.name and look.refusal is None), None)
    return ships or next(look for look in looks if look.measurements)


def _explored(task: Task, progress: Progress) -> Explored:
    """Return what the exploration finds, or what it found before."""
    clock = Clock(task.time_budget if task.axes else math.inf)

    def make(folder: Path) -> Explored:
        del folder
        if doubt := random_answer(task):
            return Explored((), notes=(doubt,))
        began = time.monotonic()
        where = arena(task)
        found = Explorer(task, where.model, clock, progress).run()
        return replace(found, notes=(*found.notes, *where.notes), seconds=time.monotonic() - began)

    return task.cache.stage("search", task.original_name, _depends(task), _CODE, make, Explored).value


def _confirmed(task: Task, explored: Explored, progress: Progress) -> tuple[Look, ...]:
    """Return what the confirmation finds, or what it found before, within the time that exploring has left."""

    def make(folder: Path) -> tuple[Look, ...]:
        del folder
        left = task.time_budget - min(explored.seconds, WHOLE_SHARE * task.time_budget)
        return confirm(task, explored, left, progress)

    depends = {
        "search": _depends(task),
        "certify": task.parts.certify.digest() if task.parts else None,
        "rungs": [[each.name, model_digest(each.model) if each.model else str(each.subject)] for each in task.rungs],
        "pick": task.pick,
        "finalists": list(explored.finalists),
        "seconds": explored.seconds,
    }
    return task.cache.stage("confirm", task.original_name, depends, _CODE, make, tuple[Look, ...]).value


def _depends(task: Task) -> dict[str, Any]:
    parts = task.parts
    return {
        "original": model_digest(task.original),
        "candidates": [[each.name, model_digest(each.base), each.passes] for each in task.candidates],
        "axes": [str(axis) for axis in task.axes],
        "visited": list(task.visited),
        "parts": [each.digest() for each in (parts.calibrate, parts.select)] if parts else None,
        "measured": task.samples_digest,
        "metric": task.metric,
        "max_drop": task.max_drop,
        "dims": [dict(dims) for dims in task.dims],
        "weights": list(task.weights),
        "provider": task.provider,
        "home": task.home,
        "threads": task.threads,
        "time_budget": task.time_budget,
    }


def _rooflines(task: Task, leader: Tried | None, progress: Progress) -> Sequence[ModelRoofline]:
    """Return how near the original and the leader come to what the machine could do at the first shape."""
    models = {task.original_name: task.original}
    if leader is not None and leader.model is not None:
        models[leader.candidate.name] = leader.model
    if task.provider != "cpu":
        return ()

    def make(folder: Path) -> tuple[ModelRoofline, ...]:
        del folder
        progress(0, 1, "profile")
        peaks = measure_peaks(task.threads)
        feeds = batches_to_time(task.original, task.samples, task.dims[0])[0]
        return tuple(
            roofline(name, model, feeds, task.provider, task.threads, peaks=peaks) for name, model in models.items()
        )

    depends = {
        "models": [[name, model_digest(model)] for name, model in models.items()],
        "dims": dict(task.dims[0]),
        "samples": task.samples_digest,
        "threads": task.threads,
    }
    name = task.original_name
    return task.cache.stage("roofline", name, depends, _ROOFLINE_CODE, make, tuple[ModelRoofline, ...]).value


def _conclude(task: Task, item: Tried, leader: Tried | None, looks: Sequence[Look]) -> Tried:
    """Return a form with the reason why it does not ship, where it was not refused before."""
    if item.refusal is not None:
        return item
    looked = next((look for look in looks if look.name == item.candidate.name), None)
    if looked is not None:
        return replace(item, refusal=looked.refusal)
    if leader is None:
        return replace(item, refusal="No candidate keeps its accuracy and is faster.")
    if task.pick is not None:
        return replace(item, refusal=f"{leader.candidate.name} was picked.")
    if not item.speed:
        return replace(item, refusal=f"It was not measured; {leader.candidate.name} ships.")
    return replace(
        item,
        refusal=f"{leader.candidate.name} is faster: {gain(task, leader.speed):.2f}x, "
        f"this one {gain(task, item.speed):.2f}x.",
    )


def _praise(task: Task, winner: Tried, look: Look) -> str:
    name = winner.candidate.name
    speeds = ", ".join(
        f"{speed_text(measurement.speed(name))} at {task.shape_name(dims)}"
        for dims, measurement in zip(task.dims, look.measurements, strict=True)
    )
    certificate = look.certificates.get(name)
    judged = "accuracy was not judged (no data), the rewrite is exact"
    if certificate is not None:
        state = "certified" if certificate.certified else "not certified"
        judged = (
            f"{certificate.metric} drops by {100 * certificate.drop:.2f} points, {state} within "
            f"{100 * task.max_drop:g} (95 % bound {100 * certificate.bound:.2f})"
        )
    picked = "; picked by hand" if task.pick is not None else ""
    return f"{name}: {speeds}; {judged}{picked}."
