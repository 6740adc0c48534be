"""The verbs that look at models: what they are, what they answer, how fast and how well."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter

from onnx_lathe.converter.cli.shared import (
    Data,
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
)
from onnx_lathe.converter.progress import console, showing


def inspect(model: Model, dims: DimsOption = None) -> None:
    """Show what a model is: inputs, outputs, operators, parameters, MACs, size."""
    from onnx_lathe.converter.inspect import inspect

    facts = inspect(model, dims=parse_dims(dims[0]) if dims else None)
    console.print(f"{facts.parameters:,} parameters, {facts.file_bytes:,} bytes, opset {facts.opset}", markup=False)
    macs = "unknown: give --dims for the symbolic dimensions" if facts.macs is None else f"{facts.macs:,}"
    console.print(f"MACs: {macs}", markup=False)
    for spec in facts.inputs:
        console.print(f"  input  {spec.name}: {spec.dtype} {list(spec.shape)}", markup=False)
    for spec in facts.outputs:
        console.print(f"  output {spec.name}: {spec.dtype} {list(spec.shape)}", markup=False)
    for operator, count in sorted(facts.operators.items(), key=lambda item: -item[1]):
        console.print(f"  {count:5d} {operator}", markup=False)
    emit("inspect", {"model": str(model), "facts": facts})


def run(
    model: Model,
    input_file: Annotated[Path, typer.Option("--input", help="An .npz of arrays by input name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .npz to write.")],
    provider: Annotated[str | None, typer.Option(help="Where to run.", show_default="the bundle's, or cpu")] = None,
    threads: Threads = None,
) -> None:
    """Run a model once on the arrays of an .npz."""
    from onnx_lathe.converter.run import run

    outputs = run(model, input_file, output, provider=provider, threads=threads)
    shapes = {name: {"dtype": str(array.dtype), "shape": list(array.shape)} for name, array in outputs.items()}
    for name, shape in shapes.items():
        console.print(f"{name}: {shape['dtype']} {shape['shape']}", markup=False)
    emit("run", {"output": str(output), "outputs": shapes})


def compare(
    a: Model,
    b: Model,
    data: Data,
    max_drop: MaxDrop = 0.01,
    metric: Metric = None,
    provider: Provider = "cpu",
    threads: Threads = None,
) -> None:
    """Judge B against A on the same samples; exit status 3 where B is not certified within the budget."""
    from onnx_lathe.converter.compare import compare

    result = compare(a, b, data, metric=metric, max_drop=max_drop, provider=provider, threads=threads)
    certificate = result.certificate
    console.print(
        f"{certificate.metric}: A {certificate.original.value:.4f}, B {certificate.candidate.value:.4f}; drop "
        f"{100 * certificate.drop:.2f} points, at most {100 * certificate.bound:.2f} with 95 % confidence "
        f"({certificate.samples} samples, {certificate.method})",
        markup=False,
    )
    for name, value in result.sqnr.items():
        console.print(f"{name}: {value:.1f} dB signal to noise", markup=False)
    emit(
        "compare",
        {"certified": certificate.certified, **TypeAdapter(type(result)).dump_python(result, mode="json")},
    )
    exit_if_missed(None if certificate.certified else "B is not certified within the budget.")


def bench(
    models: Annotated[list[Path], typer.Argument(help="Models; each is compared with the first.", show_default=False)],
    dims: DimsOption = None,
    data: OptionalData = None,
    provider: Provider = "cpu",
    threads: Threads = None,
    time_budget: Annotated[float, typer.Option(min=1.0, help="Seconds for each shape.")] = 30.0,
) -> None:
    """Measure models interleaved in fresh processes, with intervals and a verdict."""
    from onnx_lathe.converter.bench import bench, reasons, table

    with showing() as progress:
        measurements = bench(
            models,
            dims=[parse_dims(text) for text in dims or []],
            data=data,
            provider=provider,
            threads=threads,
            time_budget=time_budget,
            progress=progress,
        )
    for shape, measurement in measurements:
        console.print(table(shape, measurement))
        for line in reasons(measurement):
            console.print(line, markup=False, highlight=False)
    emit(
        "bench",
        {"shapes": [{"dims": shape, "measurement": measurement} for shape, measurement in measurements]},
    )
