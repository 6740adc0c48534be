"""The verbs that take a recipe."""

from __future__ import annotations

from onnx_lathe.converter.cli.shared import DEFAULT_RECIPE, Output, Recipe, emit, exit_if_missed, show_report
from onnx_lathe.converter.progress import showing


def convert(recipe: Recipe = DEFAULT_RECIPE, output: Output = None) -> None:
    """Train, distil, export, prune, quantize and measure what a recipe says, and write the bundle with its report."""
    from onnx_lathe.converter.convert import convert

    with showing() as progress:
        result = convert(recipe, output, progress=progress)
    show_report(result.report)
    emit("convert", result.summary())
    exit_if_missed(result.limit_missed)


def train(recipe: Recipe = DEFAULT_RECIPE, output: Output = None) -> None:
    """Train the teacher of a recipe, and the student alone."""
    from onnx_lathe.converter.convert import train

    with showing() as progress:
        emit("train", train(recipe, output, progress=progress))


def distill(recipe: Recipe = DEFAULT_RECIPE, output: Output = None) -> None:
    """Train the student of a recipe from its teacher."""
    from onnx_lathe.converter.convert import distill

    with showing() as progress:
        emit("distill", distill(recipe, output, progress=progress))


def export(recipe: Recipe = DEFAULT_RECIPE, output: Output = None) -> None:
    """Export the teacher and the distilled student of a recipe to ONNX."""
    from onnx_lathe.converter.convert import export

    with showing() as progress:
        emit("export", export(recipe, output, progress=progress))
