"""How near a model comes to what this machine could do: it is run under the profiler and judged by measured peaks."""

from __future__ import annotations

from pathlib import Path

from onnx_lathe.benchmarks.limits import ModelRoofline, limits
from onnx_lathe.benchmarks.peaks import Peaks
from onnx_lathe.runtime.bundle import model_file
from onnx_lathe.runtime.profile import profile
from onnx_lathe.runtime.samples import Feeds


def roofline(
    name: str, model: Path, feeds: Feeds, provider: str = "cpu", threads: int | None = None, *, peaks: Peaks
) -> ModelRoofline:
    """Run a model under the profiler and return how near each operator comes to its limit.

    Args:
        name: What the report calls the model.
        model: An ``.onnx`` file or a bundle.
        feeds: Its inputs.
        provider: Where it runs; operators elsewhere than on the CPU, which the peaks are of, have no limit.
        threads: Of the session; None for all allowed cores. The peaks should be of as many.
        peaks: What this machine reaches (`onnx_lathe.benchmarks.peaks.measure_peaks`).

    Raises:
        TensorError: ``feeds`` do not fit the model.
        ProviderError: The provider is not there.
    """
    return limits(name, profile(model_file(model), feeds, provider, threads), peaks)
