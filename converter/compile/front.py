"""The Pareto front of a search: the forms of which none is both faster and nearer to the original."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_lathe.converter.compile.record import gain
from onnx_lathe.converter.compile.task import Task, Tried
from onnx_lathe.runtime.errors import InputError


def front(task: Task, tried: Sequence[Tried]) -> list[Tried]:
    """Return the forms that no other one beats in both speed and drop, the fastest first.

    A form without a certificate is exact where there is no data, and not known well enough to lie on it where there is;
    nor is one whose speed was measured on two blocks only, which does not compare with speeds of whole networks.
    """
    points = [(item, gain(task, item.speed), _drop(task, item)) for item in tried if item.speed and item.whole]
    known = [(item, speed, drop) for item, speed, drop in points if drop is not None and speed > 1.0]
    best = [
        (item, speed)
        for item, speed, drop in known
        if not any(other >= speed and less <= drop and (other, less) != (speed, drop) for _, other, less in known)
    ]
    return [item for item, _ in sorted(best, key=lambda pair: -pair[1])]


def pick(task: Task, tried: Sequence[Tried]) -> str:
    """Return the name of the form that the task picks, checked: any that was made and measured.

    Raises:
        InputError: There is no such form.
    """
    able = [item.candidate.name for item in tried if item.speed]
    if task.pick in able:
        return task.pick
    points = ", ".join(repr(item.candidate.name) for item in front(task, tried))
    known = task.pick in [item.candidate.name for item in tried]
    raise InputError(
        "--pick",
        got=f"{task.pick!r}, " + ("which could not be made or measured" if known else "which was not tried"),
        expected=f"a form on the front of speed and accuracy: {points or 'none is faster than the original'}",
        mend="Name one of them; the report lists every form.",
    )


def _drop(task: Task, item: Tried) -> float | None:
    if task.parts is None:
        return 0.0
    return item.certificate.drop if item.certificate else None
