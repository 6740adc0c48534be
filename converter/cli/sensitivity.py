"""The verb that tells what each layer costs when it is quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnx_lathe.converter.cli.shared import Data, Model, Threads, emit
from onnx_lathe.converter.progress import console, showing


def sensitivity(
    model: Model,
    data: Data,
    passes: Annotated[str, typer.Option(help="quantize-static or quantize-dynamic, with options.")] = "quantize-static",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The .json to write; a page (.html) goes beside it.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many samples to judge each layer on.")] = 128,
    gain: Annotated[bool, typer.Option(help="Profile both models, to tell what each layer saves.")] = True,
    threads: Threads = None,
) -> None:
    """Quantize each layer alone: how far the outputs move, what it saves, and what should stay float first."""
    from onnx_lathe.benchmarks.report.render import render_section
    from onnx_lathe.benchmarks.report.sensitivity import sensitivities
    from onnx_lathe.converter.sensitivity import sensitivity

    with showing() as progress:
        result = sensitivity(
            model,
            data,
            passes,
            output=output,
            samples=samples,
            gain=gain,
            threads=threads,
            progress=progress,
        )
    console.print(render_section(sensitivities(result.layers, result.samples)))
    emit("sensitivity", {"output": output, **vars(result)})
