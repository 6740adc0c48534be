import io

import pytest
from rich.console import Console

from onnx_lathe.converter import progress


def shown(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, times: list[float]) -> str:
    """Return what three reports of one epoch and the start of another job print; ``times`` are when they come."""
    screen = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=terminal, width=100))
    clock = iter(times)
    if not terminal:
        monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.showing() as show:
        show(0, 4, "train [red]: epoch 1")
        show(1, 4, "train [red]: epoch 2")
        show(2, 4, "train [red]: epoch 3")
        show(4, 4, "train [red]: done")
    return screen.getvalue()


def test_without_a_terminal_lines_come_at_starts_and_ends_and_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = shown(monkeypatch, terminal=False, times=[100.0, 105.0, 110.0, 110.5]).splitlines()
    assert lines == ["train [red]: epoch 1", "train [red]: epoch 3", "train [red]: done"]


def test_on_a_terminal_a_bar_shows_the_text_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "train [red]: done" in shown(monkeypatch, terminal=True, times=[])
