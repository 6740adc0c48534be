"""The time that a search may take."""

from __future__ import annotations

import time

from onnx_lathe.converter.progress import Progress

OVER = "The time budget was spent before"


class OutOfTimeError(Exception):
    """A step was left because the time of the search is over; what was found before counts."""


class Clock:
    """Counts from its making.

    Args:
        seconds: The time budget.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._began = time.monotonic()

    def left(self, share: float = 1.0) -> float:
        """Return the seconds until ``share`` of the budget is spent; negative beyond."""
        return self._began + share * self.seconds - time.monotonic()

    def check(self, share: float) -> None:
        """Leave the step at work where ``share`` of the budget is spent.

        Raises:
            OutOfTimeError: It is.
        """
        if self.left(share) <= 0.0:
            raise OutOfTimeError

    def watching(self, progress: Progress, share: float) -> Progress:
        """Return a progress that leaves the step which reports to it when ``share`` of the budget is spent."""

        def show(done: int, total: int, text: str) -> None:
            progress(done, total, text)
            self.check(share)

        return show
