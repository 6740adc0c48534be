"""What each layer costs when it alone is quantized, and what it gains, as a section and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx_lathe.benchmarks.report import text
from onnx_lathe.benchmarks.report.document import Document, Row, Section, Table, columns, row
from onnx_lathe.benchmarks.report.plots import ACCENT, QUIET, Plot, Value, escape, plain_layout
from onnx_lathe.benchmarks.report.text import ABSENT, clean

_KEY = "sensitivity"
_SHOWN = 40
"""Layers that the plot shows: those that should stay float first."""
_ROW_PIXELS = 22

_TERMS = (
    "Each layer is quantized alone, all else stays float. Errors of layers do not add: judge the whole model.",
    "SQNR: signal-to-quantization-noise ratio of the output that suffers most; 6 dB less is twice the error.",
    "KL: mean Kullback-Leibler divergence of the answers from the float model's; given where an output is logits or "
    "probabilities.",
    "time saved: of the layer's own kernels in one run by onnxruntime's profiler, without the rounding between layers; "
    "negative where the integer kernel is slower.",
    "Order: what should stay float first is first, by cost (KL, else noise) for each second saved where all are known, "
    "else by cost.",
)


@dataclass(frozen=True)
class LayerCost:
    """What quantizing one layer costs and gains.

    Attributes:
        layer: Its name.
        operator: Its operator.
        sqnr_db: Signal-to-quantization-noise ratio in dB of the output that suffers most.
        kl: Mean divergence of the answers in nats; None where no output is a distribution.
        gain: Seconds of a run that it saves; None where unknown.
    """

    layer: str
    operator: str
    sqnr_db: float
    kl: float | None = None
    gain: float | None = None


def sensitivities(layers: Sequence[LayerCost], samples: int) -> Section:
    """Return the layers as a section, in the order given."""
    figures = ("SQNR", "KL", "time saved")
    rows = tuple(_row(layer) for layer in layers)
    table = Table(columns("layer", "operator", *figures, numeric=figures), rows)
    lead = f"{len(layers):,} layers, each quantized alone and run on {samples:,} samples."
    return Section(_KEY, "What each layer costs", lead, (table,), _TERMS)


def sensitivity_document(model: str, passes: str, layers: Sequence[LayerCost], samples: int) -> Document:
    """Return the page."""
    first = layers[0]
    return Document(
        title=f"Sensitivity of {model}",
        status=f"{len(layers):,} layers",
        meaning=f"{passes}, one layer at a time",
        verdict=f"Keep {first.layer} ({first.operator}) float first.",
        reason="",
        headlines=(),
        warnings=(),
        sections=(sensitivities(layers, samples),),
    )


def sensitivity_plots(layers: Sequence[LayerCost]) -> dict[str, tuple[Plot, ...]]:
    """Return the plot of the first layers, and where gains are known that of cost against gain."""
    gaining = [layer for layer in layers if layer.gain is not None]
    return {_KEY: (_noises(layers[:_SHOWN]), *((_trade_off(gaining),) if gaining else ()))}


def _row(layer: LayerCost) -> Row:
    kl = ABSENT if layer.kl is None else text.figure(layer.kl)
    gain = ABSENT if layer.gain is None else text.seconds(layer.gain)
    return row(layer.layer, layer.operator, f"{layer.sqnr_db:.1f} dB", kl, gain)


def _noises(layers: Sequence[LayerCost]) -> Plot:
    # A category that occurs twice would be one row: layers may share a name.
    rows = list(range(len(layers)))
    bars: Value = {
        "type": "bar",
        "orientation": "h",
        "y": rows,
        "x": [layer.sqnr_db for layer in layers],
        "marker": {"color": [ACCENT if number == 0 else QUIET for number in rows]},
        "text": [escape(f"{layer.operator} {layer.layer}") for layer in layers],
        "hovertemplate": "%{text}<br>%{x:.1f} dB<extra></extra>",
        "textposition": "none",
    }
    layout = plain_layout(90 + _ROW_PIXELS * len(layers), "signal-to-quantization-noise ratio (dB)", "")
    layout["yaxis"] |= {
        "autorange": "reversed",
        "showgrid": False,
        "tickmode": "array",
        "tickvals": rows,
        "ticktext": [escape(layer.layer) for layer in layers],
    }
    layout["showlegend"] = False
    note = "Shorter is worse. From the top: what should stay float first."
    return Plot("Each layer quantized alone", note, {"data": [bars], "layout": layout})


def _trade_off(layers: Sequence[LayerCost]) -> Plot:
    scale, unit = text.time_unit(abs(layer.gain or 0.0) for layer in layers)
    dots: Value = {
        "type": "scatter",
        "mode": "markers",
        "x": [(layer.gain or 0.0) / scale for layer in layers],
        "y": [layer.sqnr_db for layer in layers],
        "marker": {"color": ACCENT, "size": 8, "opacity": 0.7},
        "text": [escape(f"{layer.operator} {layer.layer}") for layer in layers],
        "hovertemplate": f"%{{text}}<br>saves %{{x:.3g}} {clean(unit)}, %{{y:.1f}} dB<extra></extra>",
    }
    layout = plain_layout(420, f"time saved ({unit})", "SQNR (dB)")
    layout["showlegend"] = False
    note = "Up and to the right: quantize. Down and to the left: keep float."
    return Plot("Cost against gain", note, {"data": [dots], "layout": layout})
