"""How far the work is: a callback that every stage takes, and its face on the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

Progress = Callable[[int, int, str], None]
"""Told ``(done, total, text)``: steps done, steps in all, what is being done. 0 done starts something."""

_PLAIN_WIDTH = 120

console = Console(stderr=True, width=None if sys.stderr.isatty() else _PLAIN_WIDTH)
"""Where text for people goes; into a file or a pipe it is 120 columns wide."""

_PLAIN_SECONDS = 10.0


def silent(done: int, total: int, text: str) -> None:
    """Show nothing."""
    del done, total, text


@contextmanager
def showing() -> Generator[Progress]:
    """Show progress on stderr: a bar on a terminal, else a line at each start and end and every 10 s."""
    if not console.is_terminal:
        yield _plain()
        return
    columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("")

        def show(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, description=text.replace("[", r"\["))

        yield show


def _plain() -> Progress:
    printed_text, printed_at = "", 0.0

    def show(done: int, total: int, text: str) -> None:
        nonlocal printed_text, printed_at
        now = time.monotonic()
        due = done in (0, total) or now - printed_at >= _PLAIN_SECONDS
        if due and text != printed_text:
            console.print(text, markup=False, highlight=False, soft_wrap=True)
            printed_text, printed_at = text, now

    return show
