"""One thing that was looked at, and asking processes that may crash or hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Literal

from onnx_lathe.runtime.errors import DependencyError

State = Literal["ok", "note", "warning", "problem"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        state: "note" is worth knowing, a "warning" costs speed, a feature or trust in figures, a "problem" makes the
            toolchain unusable.
        found: What is there, and what follows from it.
        mend: What to do about it, as an imperative sentence; "" where there is nothing to do.
    """

    name: str
    state: State
    found: str
    mend: str = ""


def ask(module: str, *arguments: str, timeout: float = 60.0) -> dict[str, Any]:
    """Run ``python -m module`` and return the JSON object that ends its stdout.

    Raises:
        DependencyError: It told an error, crashed, or did not end within ``timeout`` seconds.
    """
    # As in onnx_lathe.benchmarks.process: the child finds the very modules that the parent would.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    command = [sys.executable, "-P", "-m", module, *arguments]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        raise _failure(module, f"no answer for {timeout:g} s", command) from None
    try:
        answer = dict[str, Any](json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, TypeError, ValueError):
        raise _failure(module, _ending(done), command) from None
    if "error" in answer:
        raise DependencyError(module, **answer["error"])
    return answer


def _ending(done: subprocess.CompletedProcess[str]) -> str:
    status = done.returncode
    end = f"exit status {status}" if status >= 0 else f"killed: {signal.strsignal(-status)}"
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return f"a process that died ({end}): {said[-1]}" if said else f"a process that died ({end})"


def _failure(module: str, got: str, command: list[str]) -> DependencyError:
    tried = " ".join(["python", *command[2:]])
    return DependencyError(module, got=got, expected="an answer", mend=f"Run `{tried}` to see it fail.")
