"""The studies that show what a verdict is worth: ``python -m tests.studies verdicts MODEL... --file FILE``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tests.studies import compiled, coverage, large, verdicts
from tests.studies.cases import CASES, Places

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


_FOLDER = Path("out/studies/compiled")


@app.command("compiled")
def show_compiled(
    data: Annotated[Path, typer.Option(help="Folder of images and sentences as parquet files.")],
    models: Annotated[Path, typer.Option(help="Folder of the trained networks.")],
    rivals: Annotated[Path, typer.Option(help="Folder of the rivals' virtual environments.")],
    folder: Annotated[Path, typer.Option(help="Where networks, data and forms are made: 5 GB.")] = _FOLDER,
    results: Annotated[Path, typer.Option(help="Where results are kept; it goes on from there.")] = _FOLDER
    / "results.jsonl",
    only: Annotated[list[str] | None, typer.Option(help="Cases whose title begins so; all without.")] = None,
    search: Annotated[float, typer.Option(help="Seconds of a search.")] = 60.0,
    measure: Annotated[float, typer.Option(help="Seconds of the final run of a case.")] = 30.0,
    threads: Annotated[int | None, typer.Option(help="Of every runtime; all cores without.")] = None,
    prepare: Annotated[bool, typer.Option(help="Make networks, data and the rivals' forms, and stop.")] = False,
) -> None:
    """Compile networks beside the rivals and other runtimes: speed, accuracy, size, seconds and memory."""
    chosen = [case for case in CASES if not only or case.title.startswith(tuple(only))]
    places = Places(folder, data, models, rivals)
    if prepare:
        compiled.make_rivals(chosen, places, _say)
        return
    budget = compiled.Budget(search, measure, threads)
    typer.echo(compiled.table(list(compiled.run(chosen, places, results, budget, _say))))


@app.command("compiled-zoo")
def show_zoo(
    folder: Annotated[Path, typer.Option(help="Where networks and bundles are made: 3 GB.")] = _FOLDER / "zoo",
    results: Annotated[Path, typer.Option(help="Where results are kept; it goes on from there.")] = _FOLDER
    / "zoo.jsonl",
    only: Annotated[list[str] | None, typer.Option(help="Architectures; all without.")] = None,
    search: Annotated[float, typer.Option(help="Seconds of a search.")] = 25.0,
    measure: Annotated[float, typer.Option(help="Seconds to measure a result in.")] = 6.0,
    prepare: Annotated[bool, typer.Option(help="Make the networks and their data, and stop.")] = False,
) -> None:
    """Compile many architectures with a short budget: none slower, the median, how many stay as they are."""
    # Its networks need packages that nothing else here does.
    from tests.studies import compiled_zoo

    names = only or list(compiled_zoo.ARCHITECTURES)
    if prepare:
        for name in names:
            _say(str(compiled_zoo.prepare(name, folder)))
        return
    rows = list(compiled_zoo.run(names, folder, results, search, measure, _say))
    typer.echo(compiled_zoo.table(rows))


def _say(text: str) -> None:
    typer.echo(text, err=True)


if __name__ == "__main__":
    app()
