"""The studies that show what a verdict is worth: ``python -m tests.studies verdicts MODEL... --file FILE``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tests.studies import coverage, large, verdicts

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command("verdicts")
def take_verdicts(
    models: Annotated[list[Path], typer.Argument(help="Small and middle models, used in turn.")],
    file: Annotated[Path, typer.Option(help="Where the verdicts are kept; it goes on from there.")],
) -> None:
    """Take hundreds of verdicts of known truth; some hours, resumable."""
    verdicts.run(models, file)
    typer.echo(verdicts.table(verdicts.read(file)))


@app.command("table")
def show(file: Annotated[Path, typer.Argument(help="A file of verdicts.")]) -> None:
    """Count the verdicts taken so far."""
    typer.echo(verdicts.table(verdicts.read(file)))


@app.command("coverage")
def simulate(
    quick: Annotated[bool, typer.Option(help="Few simulations: proves nothing, and never fails.")] = False,
    output: Annotated[Path, typer.Option(help="Folder of coverage.jsonl and coverage.md.")] = Path("out/studies"),
) -> None:
    """Simulate how often intervals and certificates cover; some minutes."""
    rows = coverage.run(coverage.QUICK if quick else coverage.FULL, output)
    typer.echo(coverage.table(rows))
    if not quick and not all(row.kept for row in rows):
        raise typer.Exit(1)


@app.command("large")
def quantize_large(
    folder: Annotated[Path, typer.Option(help="Scratch space: 11 GB.")] = Path("out/studies/large"),
    form: Annotated[list[str] | None, typer.Option(help="Passes to apply.")] = None,
    only: Annotated[int | None, typer.Option(help="One size alone, from 0.")] = None,
) -> None:
    """Quantize decoders of 0.1 to 2 billion parameters, and tell time and memory."""
    sizes = large.SIZES if only is None else large.SIZES[only : only + 1]
    typer.echo(large.table(list(large.run(sizes, form or large.FORMS, folder))))


@app.command("accuracy")
def compare_quantizers(
    models: Annotated[Path, typer.Option(help="Folder of the trained networks.")],
    data: Annotated[Path, typer.Option(help="Folder of their data.")],
    rivals: Annotated[
        Path | None, typer.Option(help="A Python with onnxruntime and nncf; without it ours alone.")
    ] = None,
    only: Annotated[str | None, typer.Option(help="One network alone.")] = None,
) -> None:
    """Quantize trained networks by every form and every rival: accuracy, flips and speed; needs pyarrow as well."""
    # Its data needs packages that nothing else here does.
    from tests.studies import accuracy

    chosen = [network for network in accuracy.NETWORKS if only in (None, network.name)]

    def say(text: str) -> None:
        typer.echo(text, err=True)

    typer.echo(accuracy.table([row for each in chosen for row in accuracy.run(each, models, data, rivals, say)]))


if __name__ == "__main__":
    app()
