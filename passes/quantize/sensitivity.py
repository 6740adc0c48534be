"""What each layer of a quantization costs by itself, judged by the outputs, without labels.

Each layer is rounded alone, everything else stays float, and all run on the same samples. Errors of layers do not add:
a mixture that is chosen by these figures must be judged as a whole (`onnx_lathe.passes.quantize.mixture`).
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes import files
from onnx_lathe.passes.edit import Edit
from onnx_lathe.passes.quantize.divergence import Difference, looks_like_classes
from onnx_lathe.passes.quantize.dynamic import QuantizeDynamic
from onnx_lathe.passes.quantize.layers import label, result_name
from onnx_lathe.passes.quantize.observe import progress
from onnx_lathe.passes.quantize.static import QuantizeStatic
from onnx_lathe.passes.request import Request
from onnx_lathe.passes.taps import BATCH, feeds_of
from onnx_lathe.runtime.errors import PassSpecError, UnsupportedModelError
from onnx_lathe.runtime.samples import Array, Samples
from onnx_lathe.runtime.session import Session
from onnx_lathe.runtime.staged import staged

SAMPLES = 128
"""Samples that each layer is judged on, where nothing else is asked."""

Gain = Callable[[str], float | None]
"""The seconds of a run that quantizing a layer saves, by its name; None where unknown. Given by who can measure."""


@dataclass(frozen=True)
class OutputDifference:
    """How far an output lies from the float model's when one layer is rounded.

    Attributes:
        name: The output.
        sqnr_db: Signal-to-quantization-noise ratio in dB.
        kl: Mean Kullback-Leibler divergence of a row in nats; None where the output is no distribution.
    """

    name: str
    sqnr_db: float
    kl: float | None


@dataclass(frozen=True)
class LayerSensitivity:
    """What quantizing one layer costs, and gains.

    Attributes:
        layer: Its name, as the option ``exclude`` takes it.
        operator: Its operator.
        outputs: How far each output of real numbers lies from the float model's.
        gain: Seconds of a run that it saves; None where unknown.
    """

    layer: str
    operator: str
    outputs: tuple[OutputDifference, ...]
    gain: float | None = None

    @property
    def cost(self) -> float:
        """How much the outputs suffer: the largest divergence, or of no distribution the largest share of noise."""
        divergences = [output.kl for output in self.outputs if output.kl is not None]
        return max(divergences) if divergences else max(10 ** (-output.sqnr_db / 10) for output in self.outputs)

    @property
    def priority(self) -> float:
        """The cost for each second saved, infinite where none is: what is highest should be float first."""
        if self.gain is None:
            return self.cost
        return self.cost / self.gain if self.gain > 0.0 else math.inf


def sensitivity(
    source: Path,
    request: Request,
    samples: Samples,
    *,
    count: int = SAMPLES,
    gain: Gain | None = None,
    threads: int | None = None,
) -> tuple[LayerSensitivity, ...]:
    """Return what each layer that ``request`` quantizes costs by itself, that which should stay float first.

    Ranges are observed once, on all samples. The weights are on disk once, and no more than one quantized session is
    open at a time. Steps are told to `onnx_lathe.passes.quantize.observe.progress`.

    Args:
        source: A float model.
        request: A static or dynamic quantization.
        samples: Calibrate the static one, and judge.
        count: The samples to judge on, the first of ``samples``.
        gain: What a layer saves; only used where it is known of all.
        threads: Of the sessions; None for all allowed cores.

    Raises:
        PassSpecError: ``request`` is another pass.
        UnsupportedModelError: There is nothing to quantize, or no output of real numbers.
        SamplesError: The samples do not fit the model.
    """
    model = files.load(source)
    edits = _single_edits(model, request, samples)
    nodes = {result_name(node): node for node in model.graph.all_nodes()}
    judged = samples.first(count)
    report = progress.get()
    found: list[LayerSensitivity] = []
    with tempfile.TemporaryDirectory(prefix="lathe-sensitivity-") as folder:
        trial = _Trial(source, judged, Path(folder), threads)
        for number, (result, edit) in enumerate(edits.items()):
            node = nodes[result]
            report(number, len(edits), f"quantize {label(node)} alone")
            gained = None if gain is None else gain(label(node))
            found.append(LayerSensitivity(label(node), node.op_type, trial.run(edit), gained))
    return rank(found)


def rank(layers: Sequence[LayerSensitivity]) -> tuple[LayerSensitivity, ...]:
    """Return layers in the order in which they should stay float; by cost alone unless all gains are known."""
    known = all(layer.gain is not None for layer in layers)

    def key(layer: LayerSensitivity) -> tuple[float, float, str]:
        return (-(layer.priority if known else layer.cost), -layer.cost, layer.layer)

    return tuple(sorted(layers, key=key))


def _single_edits(model: ir.Model, request: Request, samples: Samples) -> Mapping[str, Edit]:
    """Return for each layer, by its result, the edit that quantizes it alone."""
    if isinstance(request, QuantizeStatic):
        return request.plan_each(model, samples)
    if isinstance(request, QuantizeDynamic):
        whole = request.plan(model, samples, None)
        layers = {name: dataclasses.replace(whole, layers=(name,), tables=()) for name in whole.layers}
        return layers | {name: dataclasses.replace(whole, layers=(), tables=(name,)) for name in whole.tables}
    raise PassSpecError(
        f"pass {request.name!r}",
        got="a pass that rounds no layer by itself",
        expected="quantize-static or quantize-dynamic",
        mend="Give one of these two.",
    )


class _Trial:
    """The float model's outputs, and what they become under an edit.

    Weights that an edit leaves alone are read from one file, and the float outputs lie on disk: neither is ever in
    memory whole or written again.
    """

    def __init__(self, source: Path, samples: Samples, folder: Path, threads: int | None) -> None:
        self._samples, self._folder, self._threads = samples, folder, threads
        self._shared = folder / "model.onnx"
        with staged(self._shared) as part:
            ir.save(files.load(source), part, external_data="weights", size_threshold_bytes=files.INLINE_BELOW_BYTES)
        self._classes: dict[str, bool] = {}
        for number, outputs in enumerate(self._outputs(self._shared)):
            real = {name: array for name, array in outputs.items() if array.dtype.kind == "f"}
            for place, (name, array) in enumerate(real.items()):
                np.save(self._wanted(number, place), array)
                self._classes[name] = self._classes.get(name, True) and looks_like_classes(name, array)
        if not self._classes:
            raise UnsupportedModelError(
                str(source),
                got="no output of real numbers",
                expected="logits, probabilities or other numbers, by which an error can be told",
                mend="Export the model without its last ArgMax.",
            )

    def run(self, edit: Edit) -> tuple[OutputDifference, ...]:
        """Return how far each output lies from the float model's after ``edit``."""
        model = files.load(self._shared)
        edit(model)
        target = self._folder / "edited.onnx"
        ir.save(model, target)
        differences = {name: Difference(classes=classes) for name, classes in self._classes.items()}
        for number, outputs in enumerate(self._outputs(target)):
            for place, (name, difference) in enumerate(differences.items()):
                difference.update(np.load(self._wanted(number, place), mmap_mode="r"), outputs[name])
        return tuple(OutputDifference(name, each.sqnr_db, each.kl) for name, each in differences.items())

    def _outputs(self, path: Path) -> Iterator[Mapping[str, Array]]:
        session = Session(path, threads=self._threads)
        for feeds in feeds_of(files.load(path), self._samples, BATCH):
            yield session.run(feeds)

    def _wanted(self, number: int, place: int) -> Path:
        return self._folder / f"{number}-{place}.npy"
