"""The verbs that make a model from another."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from onnx_lathe.converter.cli.shared import (
    MaxDrop,
    Metric,
    Model,
    OptionalData,
    Threads,
    WeightedDimsOption,
    emit,
    exit_if_missed,
    parse_weighted_dims,
    show_report,
    show_search,
)
from onnx_lathe.converter.progress import console, showing


def compile_(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the bundle.")],
    data: OptionalData = None,
    eval_data: Annotated[Path | None, typer.Option(help="Samples to judge on, instead of a part of --data.")] = None,
    max_drop: MaxDrop = 0.01,
    metric: Metric = None,
    dims: WeightedDimsOption = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            help="Where to run: cpu, cuda, ...; repeatable, or all: the fastest is taken.", show_default="cpu"
        ),
    ] = None,
    threads: Threads = None,
    time_budget: Annotated[
        float, typer.Option(min=1.0, help="Seconds that making, judging and measuring forms may take.")
    ] = 150.0,
    seed: Annotated[int, typer.Option(min=0, help="Cuts the data.")] = 0,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print every form that was tried, and why it lost.")
    ] = False,
    pick: Annotated[
        str | None,
        typer.Option(help="Ship this form, by the name that the report gives it.", show_default="the fastest"),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Keeps what is made for the next time.", show_default=".work/cache beside the output"),
    ] = None,
) -> None:
    """Find the fastest form of an ONNX model that keeps its accuracy, and write it as a bundle with its report."""
    from onnx_lathe.converter.compile.compile import compile

    shapes = [parse_weighted_dims(text) for text in dims or []]
    with showing() as progress:
        result = compile(
            model,
            output,
            data=data,
            eval_data=eval_data,
            max_drop=max_drop,
            metric=metric,
            dims=[sizes for sizes, _ in shapes],
            weights=[weight for _, weight in shapes],
            provider=provider or "cpu",
            threads=threads,
            time_budget=time_budget,
            seed=seed,
            pick=pick,
            cache=cache,
            progress=progress,
        )
    show_report(result.report)
    if explain:
        show_search(result.report)
    emit("compile", result.summary())
    exit_if_missed(result.limit_missed)


def apply(
    model: Model,
    passes: Annotated[str, typer.Argument(help="Such as 'prune{ratio=0.3},quantize-dynamic'; see `lathe passes`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .onnx file to write.")],
    data: OptionalData = None,
) -> None:
    """Apply passes to a model; each is checked against its oracle as it runs."""
    from onnx_lathe.converter.apply import apply

    with showing() as progress:
        applied = apply(model, passes, output, data=data, on_start=lambda text: progress(0, 1, f"apply {text}"))
    for step in applied:
        state = "changed the graph" if step.changed else "changed nothing"
        console.print(f"{step.request}: {state} in {step.seconds:.1f} s", markup=False)
        for check in step.checks:
            console.print(
                f"  oracle: {check.measured:.3g} {check.unit}, limit {check.limit:.3g} ({check.what}, {check.scope})",
                markup=False,
            )
        for (operator, reason), count in Counter((each.operator, each.reason) for each in step.refused).items():
            console.print(f"  left alone: {count} {operator}: {reason}", markup=False)
    emit("apply", {"output": str(output), "applied": applied})


def passes() -> None:
    """List the passes with their options."""
    from onnx_lathe.passes.registry import catalogue

    entries = catalogue()
    for entry in entries:
        console.print(f"[bold]{entry.name}[/bold]  {escape(entry.summary)}")
        for option in entry.options:
            console.print(f"    {option.name} = {option.default}  ({option.kind})", markup=False)
    emit("passes", {"passes": entries})
