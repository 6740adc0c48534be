"""The verbs that make a model from another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnx_lathe.converter.cli.shared import (
    DimsOption,
    MaxDrop,
    Metric,
    Model,
    OptionalData,
    Provider,
    Threads,
    emit,
    exit_if_missed,
    parse_dims,
    show_report,
)
from onnx_lathe.converter.progress import console, showing


def compile_(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the bundle.")],
    data: OptionalData = None,
    eval_data: Annotated[Path | None, typer.Option(help="Samples to judge on, instead of a part of --data.")] = None,
    max_drop: MaxDrop = 0.01,
    metric: Metric = None,
    dims: DimsOption = None,
    provider: Provider = "cpu",
    threads: Threads = None,
    time_budget: Annotated[float, typer.Option(min=1.0, help="Seconds that measuring may take.")] = 120.0,
    seed: Annotated[int, typer.Option(min=0, help="Cuts the data.")] = 0,
) -> None:
    """Find the fastest form of an ONNX model that keeps its accuracy, and write it as a bundle with its report."""
    from onnx_lathe.converter.compile.compile import compile

    with showing() as progress:
        result = compile(
            model,
            output,
            data=data,
            eval_data=eval_data,
            max_drop=max_drop,
            metric=metric,
            dims=[parse_dims(text) for text in dims or []],
            provider=provider,
            threads=threads,
            time_budget=time_budget,
            seed=seed,
            progress=progress,
        )
    show_report(result.report)
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
        for refusal in step.refused:
            console.print(f"  left alone: {refusal.operator} {refusal.node}: {refusal.reason}", markup=False)
    emit("apply", {"output": str(output), "applied": applied})


def passes() -> None:
    """List the passes with their options."""
    from onnx_lathe.passes.registry import catalogue

    entries = catalogue()
    for entry in entries:
        console.print(f"[bold]{entry.name}[/bold]  {entry.summary}")
        for option in entry.options:
            console.print(f"    {option.name} = {option.default}  ({option.kind})", markup=False)
    emit("passes", {"passes": entries})
