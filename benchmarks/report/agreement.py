"""How far explanations of two models agree, as a section."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_lathe.benchmarks.attribution import TOP, Agreement, MethodAgreement
from onnx_lathe.benchmarks.report import text
from onnx_lathe.benchmarks.report.document import Row, Section, Table, columns, row

_TERMS = (
    "rank correlation: Spearman's, of the weights of all features; 1 where they have the same order.",
    f"top features in both: share of the {TOP} largest weights (half of all, of fewer than {2 * TOP}) that are among "
    "the largest in both; and with the same sign: those of them that point the same way.",
    "floor: the noise floor, one model explained twice with other perturbations. A difference within it says nothing.",
    "Figures are means over samples with their 95 % intervals.",
)


def agreements(methods: Sequence[MethodAgreement], samples: int, evaluations: int) -> Section:
    """Return the agreement of each method, between the models and of A with itself."""
    figures = ("rank correlation", "top features in both", "and with the same sign")
    rows = tuple(line for each in methods for line in _rows(each))
    lead = f"{samples} samples, each explained from {evaluations} perturbations."
    table = Table(columns("method", "compared", *figures, numeric=figures), rows)
    return Section(
        "agreement", "How far the explanations agree", lead, (table,), (*(each.sentence for each in methods), *_TERMS)
    )


def _rows(method: MethodAgreement) -> tuple[Row, Row]:
    floor = _figures(method.floor) if method.random else ("1 by definition",) * 3
    return (
        row(method.method, "A and B, one seed", *_figures(method.between)),
        row(method.method, "A, two seeds: the floor" if method.random else "A: nothing is random", *floor),
    )


def _figures(found: Agreement) -> tuple[text.Cell, ...]:
    return tuple(text.plain(value) for value in (found.rank_correlation, found.top_overlap, found.sign_agreement))
