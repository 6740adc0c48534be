"""The command ``lathe``: a thin face on the public functions.

Text for people goes to stderr; the last line of stdout is one JSON object with the schema ``onnx-lathe/VERB/1``. Exit
status: 0 done; 1 failed; 2 bad usage or input; 3 done, but a limit that the user set was missed; 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter
from typer.exceptions import TyperException

from onnx_lathe.converter.progress import console, showing
from onnx_lathe.runtime.errors import InputError, LatheError

LIMIT_MISSED = 3
INTERRUPTED = 130

app = typer.Typer(
    help="From a trained network to the fastest ONNX model that keeps its accuracy on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[Path, typer.Argument(help="An .onnx file or a bundle.", show_default=False)]
Recipe = Annotated[Path, typer.Argument(help="A recipe (TOML).")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="The folder of the bundle.", show_default="out/NAME")
]
Data = Annotated[
    Path,
    typer.Option("--data", help="Samples: an .npz (arrays by input name, optional label) or a folder of them."),
]
OptionalData = Annotated[Path | None, typer.Option("--data", help="Samples: an .npz or a folder of them.")]
DimsOption = Annotated[
    list[str] | None,
    typer.Option("--dims", help="A shape to be fast at, such as batch=8,seq=128; repeatable."),
]
Provider = Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of a session.", show_default="all allowed cores")]
Metric = Annotated[
    str | None,
    typer.Option(help="accuracy, f1_macro, spearman, cosine, ...", show_default="what fits the data"),
]
MaxDrop = Annotated[float, typer.Option(min=0.0, max=1.0, help="How much of the metric (0..1) may be lost.")]

DEFAULT_RECIPE = Path("recipes/digits.toml")


@app.command()
def convert(recipe: Recipe = DEFAULT_RECIPE, output: Output = None) -> None:
    """Train, distil, export, prune, quantize and measure what a recipe says, and write the bundle with its report."""
    from onnx_lathe.converter.convert import convert

    with showing() as progress:
        result = convert(recipe, output, progress=progress)
    _show_report(result.report)
    _emit("convert", result.summary())
    _exit_if_missed(result.limit_missed)


@app.command()
def train(recipe: Recipe = DEFAULT_RECIPE, output: Output = None) -> None:
    """Train the teacher of a recipe, and the student alone."""
    from onnx_lathe.converter.convert import train

    with showing() as progress:
        _emit("train", train(recipe, output, progress=progress))


@app.command()
def distill(recipe: Recipe = DEFAULT_RECIPE, output: Output = None) -> None:
    """Train the student of a recipe from its teacher."""
    from onnx_lathe.converter.convert import distill

    with showing() as progress:
        _emit("distill", distill(recipe, output, progress=progress))


@app.command()
def export(recipe: Recipe = DEFAULT_RECIPE, output: Output = None) -> None:
    """Export the teacher and the distilled student of a recipe to ONNX."""
    from onnx_lathe.converter.convert import export

    with showing() as progress:
        _emit("export", export(recipe, output, progress=progress))


@app.command(name="compile")
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
            dims=[_dims(text) for text in dims or []],
            provider=provider,
            threads=threads,
            time_budget=time_budget,
            seed=seed,
            progress=progress,
        )
    _show_report(result.report)
    _emit("compile", result.summary())
    _exit_if_missed(result.limit_missed)


@app.command()
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
    _emit("apply", {"output": str(output), "applied": applied})


@app.command()
def passes() -> None:
    """List the passes with their options."""
    from onnx_lathe.passes.registry import catalogue

    entries = catalogue()
    for entry in entries:
        console.print(f"[bold]{entry.name}[/bold]  {entry.summary}")
        for option in entry.options:
            console.print(f"    {option.name} = {option.default}  ({option.kind})", markup=False)
    _emit("passes", {"passes": entries})


@app.command()
def inspect(model: Model, dims: DimsOption = None) -> None:
    """Show what a model is: inputs, outputs, operators, parameters, MACs, size."""
    from onnx_lathe.converter.inspect import inspect

    facts = inspect(model, dims=_dims(dims[0]) if dims else None)
    console.print(f"{facts.parameters:,} parameters, {facts.file_bytes:,} bytes, opset {facts.opset}", markup=False)
    macs = "unknown: give --dims for the symbolic dimensions" if facts.macs is None else f"{facts.macs:,}"
    console.print(f"MACs: {macs}", markup=False)
    for spec in facts.inputs:
        console.print(f"  input  {spec.name}: {spec.dtype} {list(spec.shape)}", markup=False)
    for spec in facts.outputs:
        console.print(f"  output {spec.name}: {spec.dtype} {list(spec.shape)}", markup=False)
    for operator, count in sorted(facts.operators.items(), key=lambda item: -item[1]):
        console.print(f"  {count:5d} {operator}", markup=False)
    _emit("inspect", {"model": str(model), "facts": facts})


@app.command()
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
    _emit("run", {"output": str(output), "outputs": shapes})


@app.command()
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
    _emit(
        "compare",
        {"certified": certificate.certified, **TypeAdapter(type(result)).dump_python(result, mode="json")},
    )
    _exit_if_missed(None if certificate.certified else "B is not certified within the budget.")


@app.command()
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
            dims=[_dims(text) for text in dims or []],
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
    _emit(
        "bench",
        {"shapes": [{"dims": shape, "measurement": measurement} for shape, measurement in measurements]},
    )


def main() -> None:
    """Run the command; errors become one line on stderr and an exit status, never a traceback."""
    try:
        status: Any = app(standalone_mode=False)
    except LatheError as error:
        status = _fail(type(error).__name__, str(error), error.exit_status)
    except TyperException as error:
        status = _fail("UsageError", error.format_message() or "wrong usage", InputError.exit_status)
    except KeyboardInterrupt:
        status = INTERRUPTED
    # typer turns an interruption of a verb into this status.
    if status == INTERRUPTED:
        _fail("Interrupted", "interrupted; the last bundle is as it was, and the same command goes on", INTERRUPTED)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(kind: str, message: str, status: int) -> int:
    console.print("[bold red]error:[/bold red] ", end="")
    console.print(message, markup=False, highlight=False, soft_wrap=True)
    _emit("error", {"error": kind, "message": message, "exit_status": status})
    return status


def _emit(verb: str, value: dict[str, Any]) -> None:
    content = {"schema": f"onnx-lathe/{verb}/1", **value}
    content = TypeAdapter(dict[str, Any]).dump_python(content, mode="json", fallback=str)
    print(json.dumps(content))  # noqa: T201


def _show_report(report: Any) -> None:
    from onnx_lathe.benchmarks.report.render import render_terminal

    console.print(render_terminal(report))


def _exit_if_missed(limit: str | None) -> None:
    if limit is not None:
        console.print(f"limit missed: {limit}", markup=False)
        raise typer.Exit(LIMIT_MISSED)


def _dims(text: str) -> dict[str, int]:
    """Return the sizes that ``batch=8,seq=128`` spells."""
    sizes: dict[str, int] = {}
    for item in text.split(","):
        name, sign, size = item.strip().partition("=")
        if not sign or not name or not size.isdecimal() or int(size) < 1:
            raise InputError(
                "--dims",
                got=repr(item),
                expected="NAME=SIZE with a size of at least 1",
                mend="Write --dims batch=8,seq=128.",
            )
        sizes[name] = int(size)
    return sizes
