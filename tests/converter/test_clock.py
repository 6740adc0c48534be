"""The time of a search."""

import math

import pytest

from onnx_lathe.converter.compile.clock import Clock, OutOfTimeError
from onnx_lathe.converter.progress import silent


def test_a_step_that_reports_is_left_when_its_share_is_spent() -> None:
    clock = Clock(100.0)
    clock.watching(silent, 0.5)(1, 2, "early")
    with pytest.raises(OutOfTimeError):
        clock.watching(silent, 0.0)(1, 2, "late")
    assert 0.0 < clock.left(0.5) <= 50.0


def test_without_a_budget_the_time_never_ends() -> None:
    clock = Clock(math.inf)
    clock.check(0.01)
    assert clock.left(0.01) == math.inf
