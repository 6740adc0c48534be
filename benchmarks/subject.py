"""How to start what is measured, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Start = Callable[..., Callable[[], object]]
"""Prepares everything (loads the model, makes the inputs) and returns the call to be timed: one inference."""


@dataclass(frozen=True)
class Subject:
    """Something to measure: a name, and the function that a worker process calls to prepare it.

    Attributes:
        name: How tables and reports call it.
        start: A `Start` as ``module:function``, imported in the worker.
        arguments: Its keyword arguments, JSON-able.
    """

    name: str
    start: str
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
