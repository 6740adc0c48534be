"""``lathe doctor``: can this machine do it, and what would do it good?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from onnx_lathe.benchmarks.environment import describe
from onnx_lathe.converter.diagnosis import accelerators, hardware, software
from onnx_lathe.converter.diagnosis.check import Check

_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        checks: Each thing that was looked at.
        environment: The machine as measurements record it (`onnx_lathe.benchmarks.environment`).
    """

    checks: tuple[Check, ...]
    environment: Mapping[str, Any]

    @property
    def usable(self) -> bool:
        """Whether the toolchain works here: nothing found is a problem."""
        return all(check.state != "problem" for check in self.checks)


def doctor() -> Diagnosis:
    """Look at the machine, the packages, onnxruntime with its providers, CUDA and torch.

    Providers and torch are tried out in processes of their own, which may crash or hang without harm. Nothing is
    changed. It takes a few seconds.
    """
    return Diagnosis((*hardware.checks(), *software.checks(), *accelerators.checks()), describe())


def table(diagnosis: Diagnosis) -> Table:
    """Return a diagnosis for people."""
    result = Table(show_lines=False)
    for heading in ("", "state", "found", "mend"):
        result.add_column(heading, overflow="fold")
    for check in diagnosis.checks:
        state = Text(check.state, style=_STYLES[check.state])
        result.add_row(Text(check.name), state, Text(check.found), Text(check.mend))
    return result
