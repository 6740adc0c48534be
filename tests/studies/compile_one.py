"""One compilation in a process of its own, so that its time and memory can be told: ``python -m ... JOB.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnx_lathe


def main(job: Path) -> None:
    """Compile as ``job`` says: its keys are the arguments of `onnx_lathe.compile`, paths as text."""
    told: dict[str, Any] = json.loads(job.read_text())
    paths = {key: Path(told.pop(key)) for key in ("model", "output", "data", "eval_data")}
    onnx_lathe.compile(**paths, **told)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
