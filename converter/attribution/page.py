"""The page that shows explanations side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from onnx_lathe.benchmarks.attribution import MethodAgreement
from onnx_lathe.benchmarks.report import text
from onnx_lathe.benchmarks.report.agreement import agreements
from onnx_lathe.benchmarks.report.document import Document, Headline, Section, Strip
from onnx_lathe.benchmarks.report.render import render_page
from onnx_lathe.benchmarks.report.text import Cell
from onnx_lathe.converter.attribution import pictures
from onnx_lathe.converter.attribution.features import Explained

if TYPE_CHECKING:
    from onnx_lathe.converter.attribute import Attribution, Explanations

MOST_SHOWN = 12
"""Samples that the page shows."""


def page(result: Attribution, samples: Sequence[Explained], found: Mapping[str, Explanations], a: str, b: str) -> str:
    """Return the page: the figures, and the samples on which the models agree least, with all weights."""
    seeded = [each for each in result.methods if each.random] or list(result.methods)
    differs = any(each.differs for each in seeded)
    ranks = np.array([each.by_sample for each in result.methods]).mean(axis=0)
    order = np.argsort(ranks, kind="stable")[:MOST_SHOWN].tolist()
    shown = Section(
        "samples",
        "Samples",
        f"The {len(order)} of {len(samples)} samples on which the explanations agree least.",
        notes=(
            "blue: speaks for the answer. orange: speaks against it. The stronger the colour the larger the weight; A "
            "and B share one scale for each sample and method.",
        ),
        strips=tuple(_strip(result, samples, found, number) for number in order),
    )
    return render_page(
        Document(
            title="Do the two models answer for the same reasons?",
            status="differ" if differs else "agree",
            meaning="by more than the noise floor" if differs else "as far as the noise floor lets see",
            verdict=_verdict([each.method for each in seeded if each.differs]),
            reason=f"A: {a}. B: {b}.",
            headlines=tuple(_headline(each) for each in result.methods),
            warnings=(),
            sections=(agreements(result.methods, len(samples), result.evaluations), shown),
        )
    )


def _verdict(differing: Sequence[str]) -> str:
    if not differing:
        return "Under the same perturbations B's explanations lie no further from A's than A's own under others."
    names = ", ".join(differing)
    return f"Under the same perturbations B's explanations lie further from A's than A's own under others ({names})."


def _headline(found: MethodAgreement) -> Headline:
    cell = text.plain(found.between.rank_correlation)
    floor = f"noise floor {text.plain(found.floor.rank_correlation).value}" if found.random else "nothing is random"
    return Headline(f"rank correlation, {found.method}", Cell(cell.value, cell.interval, floor))


def _strip(result: Attribution, samples: Sequence[Explained], found: Mapping[str, Explanations], number: int) -> Strip:
    sample = samples[number]
    panels = [pictures.plain(sample)] if sample.kind == "image" else []
    for method, each in found.items():
        pair = each.original[number], each.candidate[number]
        largest = max(float(np.abs(weights).max()) for weights in pair)
        panels += [
            pictures.weighed(sample, weights, largest, f"{method}, {model}")
            for model, weights in zip("AB", pair, strict=True)
        ]
    ranks = ", ".join(f"{each.method} {each.by_sample[number]:.3f}" for each in result.methods)
    title = f"sample {sample.index}, component {result.targets[number]} of {result.output}"
    return Strip(title, f"rank correlation: {ranks}", tuple(panels))
