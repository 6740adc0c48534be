"""A report, set in parts: what every rendering shows, in one order."""

from __future__ import annotations

from collections.abc import Mapping

from onnx_lathe.benchmarks.report import beyond, details, difference, history, ladder, roofline
from onnx_lathe.benchmarks.report.document import Document
from onnx_lathe.benchmarks.report.model import Report, Status

MEANINGS: Mapping[Status, str] = {
    "certified": "with 95 % confidence the drop is within the budget",
    "uncertified": "the drop found is within the budget, its 95 % bound is not",
    "exact": "only exact rewrites, accuracy was not judged",
    "original kept": "nothing tried was better, the model is unchanged",
}


def document(report: Report) -> Document:
    """Set ``report``: sections that have nothing to tell are left out."""
    parts = (
        ladder.ladder(report),
        ladder.comparisons(report),
        ladder.accuracy(report),
        beyond.shipped(report),
        ladder.distillation(report),
        ladder.training(report),
        details.candidates(report),
        details.edits(report),
        details.operators(report),
        roofline.roofline(report),
        difference.graph_difference(report),
        history.report_history(report),
        details.environment(report),
        details.method(report),
        details.reproduce(report),
    )
    return Document(
        title=report.title,
        status=report.status,
        meaning=MEANINGS[report.status],
        verdict=report.verdict,
        reason=report.reason,
        headlines=ladder.headlines(report),
        warnings=report.warnings,
        sections=tuple(part for part in parts if part is not None),
    )
