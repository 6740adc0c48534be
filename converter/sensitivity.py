"""``lathe sensitivity``: what each layer costs when it is quantized, and what it gains."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from onnx_lathe.benchmarks import schema
from onnx_lathe.benchmarks.report.render import render_page
from onnx_lathe.benchmarks.report.sensitivity import LayerCost, sensitivity_document, sensitivity_plots
from onnx_lathe.converter.data.files import load_samples
from onnx_lathe.converter.gains import layer_gains
from onnx_lathe.converter.progress import Progress, silent
from onnx_lathe.passes import registry
from onnx_lathe.passes import run as passes_run
from onnx_lathe.passes.quantize import observe
from onnx_lathe.passes.quantize import sensitivity as layers
from onnx_lathe.passes.quantize.static import QuantizeStatic
from onnx_lathe.passes.request import Request
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.bundle import model_file
from onnx_lathe.runtime.errors import PassSpecError
from onnx_lathe.runtime.samples import Samples
from onnx_lathe.runtime.staged import staged

SCHEMA = "onnx-lathe/sensitivity/1"


@dataclass(frozen=True)
class Sensitivity:
    """What each layer costs and gains.

    Attributes:
        model: The float model.
        passes: The quantization.
        samples: How many samples each layer was judged on.
        layers: That which should stay float first.
    """

    model: str
    passes: str
    samples: int
    layers: tuple[LayerCost, ...]


def sensitivity(
    model: Path,
    data: Path | Samples,
    passes: str = "quantize-static",
    *,
    output: Path | None = None,
    samples: int = layers.SAMPLES,
    gain: bool = True,
    threads: int | None = None,
    progress: Progress = silent,
) -> Sensitivity:
    """Quantize each layer alone and say how far the outputs then lie from the float model's.

    Args:
        model: A float ``.onnx`` file or a bundle.
        data: Samples, which calibrate and judge, or the file that holds them; labels are not looked at.
        passes: ``quantize-static`` or ``quantize-dynamic``, with options.
        output: The ``.json`` to write; a page of the same name goes beside it. None to write nothing.
        samples: How many samples to judge on.
        gain: Whether the float model and the quantized one are profiled, to tell what each layer saves.
        threads: Of the sessions; None for all allowed cores.
        progress: Told what is being done.

    Raises:
        PassSpecError: ``passes`` is not one quantization of layers.
        UnsupportedModelError: There is nothing to quantize.
        SamplesError: The samples do not fit the model.
    """
    source, given = model_file(model), load_samples(data) if isinstance(data, Path) else data
    requests = registry.parse(passes)
    if len(requests) != 1:
        raise PassSpecError(
            "--passes",
            got=f"{len(requests)} passes",
            expected="quantize-static or quantize-dynamic alone",
            mend="Apply the others first with `lathe apply`.",
        )
    with _reporting(progress), tempfile.TemporaryDirectory(prefix="lathe-gain-") as folder:
        request = _calibrated_once(requests[0], Path(folder))
        gains = _gains(source, request, given, Path(folder), threads) if gain else None
        found = layers.sensitivity(source, request, given, count=samples, gain=gains, threads=threads)
    result = Sensitivity(str(model), registry.spell(requests), min(samples, len(given)), tuple(map(_cost, found)))
    if output is not None:
        _write(result, output)
    return result


def _calibrated_once(request: Request, folder: Path) -> Request:
    """Return a static quantization that keeps its ranges, so that the whole model needs no second calibration."""
    if isinstance(request, QuantizeStatic) and request.ranges_file is None:
        return dataclasses.replace(request, ranges_file=str(folder / "ranges.json"))
    return request


def _gains(
    source: Path, request: Request, samples: Samples, folder: Path, threads: int | None
) -> Callable[[str], float | None]:
    """Return what tells the seconds that a layer saves; both models are profiled when it is first asked."""

    @cache
    def measured() -> dict[str, float]:
        quantized = folder / "quantized.onnx"
        passes_run.apply(source, [request], quantized, samples=samples)
        return layer_gains(source, quantized, tensors.first_batch(source, samples, 1), threads)

    return lambda layer: measured().get(layer)


def _cost(layer: layers.LayerSensitivity) -> LayerCost:
    divergences = [output.kl for output in layer.outputs if output.kl is not None]
    return LayerCost(
        layer.layer,
        layer.operator,
        min(output.sqnr_db for output in layer.outputs),
        max(divergences, default=None),
        layer.gain,
    )


def _write(result: Sensitivity, output: Path) -> None:
    page = sensitivity_document(Path(result.model).name, result.passes, result.layers, result.samples)
    with staged(output) as part:
        part.write_text(schema.dump(result, SCHEMA) + "\n")
        part.with_suffix(".html").write_text(render_page(page, sensitivity_plots(result.layers)))


@contextmanager
def _reporting(progress: Progress) -> Generator[None]:
    token = observe.progress.set(progress)
    try:
        yield
    finally:
        observe.progress.reset(token)
