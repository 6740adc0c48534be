"""The studies that show what a verdict is worth: ``python -m tests.studies verdicts MODEL... --file FILE``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tests.studies import coverage, verdicts

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
def simulate(quick: Annotated[bool, typer.Option(help="Some seconds, proves little.")] = False) -> None:
    """Simulate how often intervals and certificates cover."""
    sys.exit(coverage.main(["--quick"] if quick else []))


if __name__ == "__main__":
    app()
