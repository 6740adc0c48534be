"""``lathe apply``: passes over a model, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from onnx_lathe.converter.data.files import load_samples
from onnx_lathe.passes import registry
from onnx_lathe.passes import run as passes_run
from onnx_lathe.passes.run import Applied
from onnx_lathe.runtime.bundle import model_file
from onnx_lathe.runtime.samples import Samples


def apply(
    model: Path,
    passes: str,
    output: Path,
    *,
    data: Path | Samples | None = None,
    on_start: Callable[[str], None] = lambda _: None,
) -> tuple[Applied, ...]:
    """Apply passes to a model and write the result; each is checked against its oracle as it runs.

    Args:
        model: An ``.onnx`` file or a bundle.
        passes: Such as ``prune{ratio=0.3},quantize-dynamic``.
        output: The ``.onnx`` file to write, whole or not at all.
        data: Calibration samples or the file that holds them.
        on_start: Called with each pass before it starts.

    Raises:
        PassSpecError: A pass or an option is unknown.
        UnsupportedModelError: A pass can do nothing to this model.
        OracleError: A pass computed something else than it must.
    """
    requests = registry.parse(passes)
    samples = load_samples(data) if isinstance(data, Path) else data
    return passes_run.apply(model_file(model), requests, output, samples=samples, on_start=on_start)
