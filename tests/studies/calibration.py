"""What calibrating takes beside running the same 512 images: ``python -m tests.studies.calibration MODEL...``.

Every method runs in a process of its own. "plain" is the float model in a plain session on the same batches, before and
after each method, so that both see the same machine.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from onnx_lathe.passes import files
from onnx_lathe.passes.quantize.scheme import Ranges
from onnx_lathe.passes.quantize.static import QuantizeStatic
from onnx_lathe.passes.taps import BATCH
from onnx_lathe.runtime.samples import Samples
from onnx_lathe.runtime.session import Session

IMAGES = 512
SIZE = 224
METHODS: dict[str, Ranges] = {name: name for name in get_args(Ranges)}
PLAIN = "plain"


@dataclass(frozen=True)
class Row:
    """What one method took.

    Attributes:
        network: The model's name.
        method: The method.
        seconds: Of loading, placing, observing and choosing.
        plain_seconds: Of loading and running the same images; the mean of a run before and one after.
        added_bytes: Peak memory above that of the plain run, which holds the same images.
    """

    network: str
    method: str
    seconds: float
    plain_seconds: float
    added_bytes: int


def images(model: Path) -> Samples:
    """Return normal random images for the one input of ``model``."""
    name = files.load(model).graph.inputs[0].name or ""
    pixels = np.random.default_rng(0).standard_normal((IMAGES, 3, SIZE, SIZE), np.float32)
    return Samples(({name: pixels},))


def take(model: Path, method: str) -> None:
    """Do what is measured, in this process, and print the seconds and the peak of memory in bytes."""
    samples = images(model)
    begin = time.perf_counter()
    if method == PLAIN:
        session = Session(model)
        for feeds in samples.iter_batches(BATCH):
            session.run(feeds)
    else:
        QuantizeStatic(ranges=METHODS[method]).plan(files.load(model), samples, None)
    seconds = time.perf_counter() - begin
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sys.stdout.write(f"{seconds} {peak}\n")


def run(models: Sequence[Path], methods: Sequence[str]) -> Iterator[Row]:
    """Measure each method on each model."""
    for model in models:
        before, memory = _measure(model, PLAIN)
        for method in methods:
            seconds, peak = _measure(model, method)
            after, _ = _measure(model, PLAIN)
            yield Row(model.stem, method, seconds, (before + after) / 2, peak - memory)
            before = after


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown."""
    lines = ["| network | ranges | seconds | plain run | ratio | memory above it |", "|---|---|---:|---:|---:|---:|"]
    for row in rows:
        ratio = row.seconds / row.plain_seconds
        lines.append(
            f"| {row.network} | {row.method} | {row.seconds:.1f} | {row.plain_seconds:.1f} | {ratio:.2f} "
            f"| {row.added_bytes / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def _measure(model: Path, method: str) -> tuple[float, int]:
    command = [sys.executable, "-m", "tests.studies.calibration", "--take", method, str(model)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(printed[0]), int(printed[1])


if __name__ == "__main__":
    if sys.argv[1] == "--take":
        take(Path(sys.argv[3]), sys.argv[2])
    else:
        chosen = [name for name in sys.argv[1:] if name in METHODS] or list(METHODS)
        given = [Path(name) for name in sys.argv[1:] if name not in METHODS]
        sys.stdout.write(table(list(run(given, chosen))) + "\n")
