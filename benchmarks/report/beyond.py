"""What else differs between the original and what ships, besides the metric."""

from __future__ import annotations

from onnx_lathe.benchmarks.evaluation import Distance, Evaluation, Figure
from onnx_lathe.benchmarks.report import text
from onnx_lathe.benchmarks.report.document import Section, Table, columns, row
from onnx_lathe.benchmarks.report.model import Report
from onnx_lathe.benchmarks.report.text import Cell

_CLASSES_SHOWN = 10

_TERMS = {
    "precision": "precision, recall, F1: means over classes, each counting alike (macro).",
    "expected calibration error": "expected calibration error: how far confidence and accuracy lie apart, as the mean "
    "over samples in 15 equal bins of confidence; at 0 of the answers given with 80 % confidence 80 % are right.",
    "mean absolute error": "mean absolute error, root mean squared error: in the unit of the labels.",
    "R2": "R2: the share of the labels' variance that the answers explain; 1 is best.",
    "Kullback-Leibler divergence": "Kullback-Leibler divergence: of the probabilities from the original's, in nats, "
    "mean over samples; 0 where they are the same.",
    "cosine": "cosine: between the outputs for a sample, mean over samples; 1 where they point the same way.",
    "largest difference": "difference: between single numbers of the outputs.",
}
_CHANGE = "change: paired by sample, with its 95 % interval; without one where no sample changed the figure."


def shipped(report: Report) -> Section | None:
    """Return what else differs between the original and what ships; None where nothing ships or nothing was judged."""
    if report.evaluation is None or report.chosen is None:
        return None
    return beyond(report.evaluation, report.original, report.chosen.name)


def beyond(evaluation: Evaluation, original: str, candidate: str) -> Section:
    """Return an evaluation as a section; ``original`` and ``candidate`` are what the two are called."""
    tables: list[Table] = []
    if evaluation.figures:
        figures = (original, candidate, "change")
        rows = tuple(row(item.name, *_both(item), _changed(item), item.better) for item in evaluation.figures)
        tables.append(Table(columns("figure", *figures, "better", numeric=figures), rows))
    distances = tuple(row(item.name, _distance(item)) for item in evaluation.distances)
    caption = f"How far the answers of {candidate} lie from those of {original}"
    tables.append(Table(columns("distance", "value", numeric=("value",)), distances, caption))
    if evaluation.classes:
        tables.append(_classes(evaluation, original, candidate))
    names = [item.name for item in (*evaluation.figures, *evaluation.distances)]
    notes = [*([_CHANGE] if evaluation.figures else []), *(_TERMS[name] for name in names if name in _TERMS)]
    if len(evaluation.classes) > 1:
        notes.append("by class: one class is always the worst; of many, some seem to change by chance alone.")
    lead = f"On the same {evaluation.samples:,} samples."
    return Section("beyond", "Beyond accuracy", lead, tuple(tables), tuple(notes))


def _classes(evaluation: Evaluation, original: str, candidate: str) -> Table:
    shown = evaluation.classes[:_CLASSES_SHOWN]
    rest = len(evaluation.classes) - len(shown)
    caption = "Share of each class that is given its label" + (f", the {len(shown)} with the most loss" if rest else "")
    figures = ("samples", original, candidate, "change")
    rows = tuple(
        row(
            f"class {item.label}",
            f"{item.samples:,}",
            text.percent(item.original),
            text.percent(item.candidate),
            text.change(item.change),
        )
        for item in shown
    )
    return Table(columns("class", *figures, numeric=figures), rows, caption)


def _both(item: Figure) -> tuple[Cell, Cell]:
    show = text.percent if item.share else text.plain
    return show(item.original), show(item.candidate)


def _changed(item: Figure) -> Cell:
    return text.change(item.change) if item.share else text.plain(item.change)


def _distance(item: Distance) -> Cell:
    return text.percent(item.value) if item.share else text.plain(item.value)
