"""The verbs that look at models: what they are, what they answer, how fast and how well."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnx_lathe.converter.cli.shared import (
    Data,
    MaxDrop,
    Metric,
    Model,
    Provider,
    Threads,
    emit,
    exit_if_missed,
    parse_dims,
)
from onnx_lathe.converter.progress import console, showing


def inspect(
    model: Model,
    dims: Annotated[
        str | None, typer.Option(help="Sizes of symbolic dimensions, such as batch=8,seq=128.", show_default="1 or 16")
    ] = None,
    threads: Threads = None,
    estimate: Annotated[bool, typer.Option(help="Estimate the latency; measures the machine for two seconds.")] = True,
) -> None:
    """Show what a model is and needs, and about how long it will take, without running it."""
    from onnx_lathe.converter.inspect import inspect, lines, table

    result = inspect(model, dims=parse_dims(dims) if dims else None, threads=threads, latency=estimate)
    for line in lines(result):
        console.print(line, markup=False, soft_wrap=True)
    if result.estimate:
        console.print(table(result.estimate))
    emit("inspect", {"model": str(model), **vars(result)})


def run(
    model: Model,
    input_file: Annotated[Path, typer.Option("--input", help="An .npz of arrays by input name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .npz to write.")],
    provider: Annotated[str | None, typer.Option(help="Where to run.", show_default="the bundle's, or cpu")] = None,
    threads: Threads = None,
    require_signature: Annotated[
        Path | None, typer.Option(help="The public key (PEM) that must have signed the bundle.")
    ] = None,
    identity: Annotated[Path | None, typer.Option(help="The age identity that opens an encrypted bundle.")] = None,
) -> None:
    """Run a model once on the arrays of an .npz."""
    from onnx_lathe.converter.run import run

    outputs = run(
        model,
        input_file,
        output,
        provider=provider,
        threads=threads,
        require_signature=require_signature,
        identity=identity,
    )
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
    from onnx_lathe.benchmarks.report.beyond import beyond
    from onnx_lathe.benchmarks.report.render import render_section
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
    console.print(render_section(beyond(result.evaluation, "A", "B")))
    emit("compare", {"certified": certificate.certified, **vars(result)})
    exit_if_missed(None if certificate.certified else "B is not certified within the budget.")


def attribute(
    a: Model,
    b: Model,
    data: Data,
    method: Annotated[
        list[str] | None,
        typer.Option(help="lime, kernel-shap or occlusion; repeatable.", show_default="all three"),
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="How many samples to explain.")] = 20,
    evaluations: Annotated[int, typer.Option(min=1, help="Perturbations for each explanation.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Fixes the samples and the perturbations.")] = 0,
    input_name: Annotated[
        str | None,
        typer.Option("--input", help="The input to explain.", show_default="what is no mask, token type or position"),
    ] = None,
    target: Annotated[
        int | None,
        typer.Option(min=0, help="The component of the output to explain.", show_default="the class that A answers"),
    ] = None,
    baseline_token: Annotated[
        int | None,
        typer.Option(min=0, help="Stands where a token is taken away.", show_default="the tokenizer's mask, or 0"),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer.json or its folder: to show tokens as text.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page (.html) to write, with all weights.")
    ] = None,
    provider: Provider = "cpu",
    threads: Threads = None,
) -> None:
    """Explain the answers of A and B, and tell whether they agree beyond the noise of explaining."""
    from onnx_lathe.benchmarks.report.agreement import agreements
    from onnx_lathe.benchmarks.report.render import render_section
    from onnx_lathe.converter.attribute import METHODS, attribute

    with showing() as progress:
        result = attribute(
            a,
            b,
            data,
            methods=tuple(dict.fromkeys(method or METHODS)),
            samples=samples,
            evaluations=evaluations,
            seed=seed,
            input_name=input_name,
            target=target,
            baseline_token=baseline_token,
            tokenizer=tokenizer,
            output=output,
            provider=provider,
            threads=threads,
            progress=progress,
        )
    console.print(render_section(agreements(result.methods, len(result.indices), evaluations)))
    emit("attribute", {"page": output, **vars(result)})


def doctor() -> None:
    """Look at the machine, the packages, onnxruntime with its providers, CUDA and torch; exit status 1 where broken."""
    from onnx_lathe.converter.doctor import doctor, table

    diagnosis = doctor()
    console.print(table(diagnosis))
    emit("doctor", {"usable": diagnosis.usable, **vars(diagnosis)})
    if not diagnosis.usable:
        raise typer.Exit(1)
