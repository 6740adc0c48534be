"""What is known of every form while a search is on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from onnx_lathe.benchmarks.result import Interval
from onnx_lathe.converter.compile.task import Task, Tried


class Record:
    """The forms that were tried, and their order.

    Args:
        task: What is searched for.

    Attributes:
        tried: By name, in the order in which they were tried.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self.tried: dict[str, Tried] = {}

    def change(self, name: str, **fields: Any) -> None:
        """Put on record what became known of a form; ``fields`` are those of `Tried`."""
        self.tried[name] = replace(self.tried[name], **fields)

    def refuse(self, name: str, reason: str) -> None:
        """Put on record why a form does not ship."""
        self.change(name, refusal=reason)

    def gain(self, name: str) -> float:
        """Return the speed of a form over all shapes; 0.0 where it was not measured."""
        return gain(self._task, self.tried[name].speed) if name in self.tried else 0.0

    def ranked(self, names: Iterable[str]) -> list[str]:
        """Return those of ``names`` that were measured and not refused, the fastest first."""
        able = [name for name in dict.fromkeys(names) if name in self.tried]
        able = [name for name in able if self.tried[name].speed and not self.tried[name].refusal]
        return sorted(able, key=self.gain, reverse=True)

    def fast_enough(self, name: str) -> bool:
        """Say whether a form is faster over all shapes and slower at none, and put on record where it is not."""
        speed = self.tried[name].speed
        if not speed or self.tried[name].refusal is not None:
            return False
        slowest = min(each.value for each in speed)
        if self.gain(name) <= 1.0 or any(each.high < 1.0 for each in speed):
            self.refuse(name, f"It is not faster than the original: {slowest:.2f}x in the screening.")
            return False
        return True


def gain(task: Task, speed: Sequence[Interval]) -> float:
    """Return the weighted geometric mean of the speeds at each shape; 0.0 where nothing was measured."""
    return task.mean_speed(speed).value if speed else 0.0
