"""The verbs that time models: side by side, under load, against a baseline, and over time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from onnx_lathe.converter.cli.shared import (
    DimsOption,
    OptionalData,
    Provider,
    emit,
    exit_if_missed,
    parse_dims,
    parse_share,
)
from onnx_lathe.converter.progress import console, showing

if TYPE_CHECKING:
    from onnx_lathe.benchmarks.report.document import Section

_SINGLE, _OFFLINE, _SERVER = "single-stream", "offline", "server"


def bench(
    models: Annotated[list[Path], typer.Argument(help="Models; each is compared with the first.", show_default=False)],
    dims: DimsOption = None,
    data: OptionalData = None,
    provider: Provider = "cpu",
    threads: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Threads of a session; repeatable.", show_default="all allowed cores"),
    ] = None,
    time_budget: Annotated[
        float, typer.Option(min=1.0, help="Seconds for each shape and number of threads, one query after the other.")
    ] = 30.0,
    profile: Annotated[
        bool, typer.Option(help="Also run the models under the profiler, to tell how near to the machine's peaks.")
    ] = True,
    scenario: Annotated[
        Literal["single-stream", "offline", "server"],
        typer.Option(help="One query after the other, all at once, or as they arrive (after MLPerf)."),
    ] = _SINGLE,
    streams: Annotated[int, typer.Option(min=1, help="Queries served at a time (offline, server).")] = 1,
    rate: Annotated[float | None, typer.Option(help="Queries that arrive per second (server).")] = None,
    latency_bound: Annotated[
        float | None,
        typer.Option(help="Milliseconds that p99 must keep (server); without --rate the highest rate is looked for."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="A baseline: a model, measured in the same run, or the .json of an earlier result."),
    ] = None,
    fail_over: Annotated[
        str, typer.Option(help="Exit status 3 where a model is not shown to be at most so much slower, such as 5%.")
    ] = "5%",
    across_environments: Annotated[
        bool, typer.Option("--across-environments", help="Compare with a result of another machine or version too.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The .json to write, which is never overwritten.")
    ] = None,
    append: Annotated[Path | None, typer.Option(help="The .jsonl to append the result to, for `lathe report`.")] = None,
) -> None:
    """Measure models interleaved in fresh processes, with intervals and a verdict."""
    shapes = [parse_dims(text) for text in dims or []]
    if scenario != _SINGLE:
        _refuse_with(scenario, {"--against": against, "--output": output, "--append": append})
        _bench_load(scenario, models, shapes, data, provider, threads or [], streams, rate, latency_bound)
        return
    from onnx_lathe.benchmarks.report.timing import gates, latencies
    from onnx_lathe.converter.bench import bench, check_outputs, gate, read_baseline, save

    limit = parse_share("--fail-over", fail_over)
    baseline = read_baseline(against, across_environments=across_environments) if against is not None else None
    check_outputs(output, append)
    # A model is measured in the same run, which is worth more than any record.
    first = [against] if against is not None and baseline is None else []
    with showing() as progress:
        suite = bench(
            [*first, *models],
            dims=shapes,
            data=data,
            provider=provider,
            threads=threads or [],
            time_budget=time_budget,
            profiled=profile,
            progress=progress,
        )
    for case in suite.cases:
        _show(latencies(case))
    found = gate(suite, baseline, limit, across_environments=across_environments) if against is not None else ()
    if against is not None:
        _show(gates(found, limit))
    save(suite, output, append)
    emit("bench", {**vars(suite), "gates": found}, version=2)
    missed = [f"{each.model} in {each.case}: {each.outcome}, {each.reason}" for each in found if each.outcome != "kept"]
    exit_if_missed("; ".join(missed) or None)


def report(
    file: Annotated[Path, typer.Argument(help="A .jsonl that `lathe bench --append` wrote.", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The page (.html) to write.")] = None,
) -> None:
    """Show the history of a file of results, and where a model became slower or the machine another."""
    from onnx_lathe.benchmarks.report.history import changes, history
    from onnx_lathe.converter.bench import write_history

    suites = write_history(file, output)
    for section in history(suites):
        _show(section)
    emit("report", {"page": output, "results": len(suites), "changes": changes(suites)})


def _bench_load(
    scenario: str,
    models: list[Path],
    shapes: list[dict[str, int]],
    data: Path | None,
    provider: str,
    threads: list[int],
    streams: int,
    rate: float | None,
    latency_bound: float | None,
) -> None:
    """Measure the scenarios in which queries come from several sides."""
    from onnx_lathe.benchmarks.queueing import LatencyBound
    from onnx_lathe.benchmarks.report import timing
    from onnx_lathe.converter import bench

    bound = None if latency_bound is None else LatencyBound(latency_bound / 1e3)
    sections: list[Section] = []
    missed: list[str] = []
    with showing() as progress:
        if scenario == _OFFLINE:
            found = bench.bench_offline(
                models,
                dims=shapes,
                data=data,
                provider=provider,
                threads=threads,
                streams=streams,
                progress=progress,
            )
            sections = [timing.throughputs(case.title, result) for case, result in found]
        else:
            found = bench.bench_server(
                models,
                dims=shapes,
                data=data,
                provider=provider,
                threads=threads,
                streams=streams,
                rate=rate,
                bound=bound,
                progress=progress,
            )
            for case, result in found:
                sections.append(timing.under_load(case.title, result))
                missed += timing.bounds_missed(result)
    for section in sections:
        _show(section)
    results = [{"case": case, "result": result} for case, result in found]
    emit("bench", {"scenario": scenario, "cases": results}, version=2)
    exit_if_missed("; ".join(missed) or None)


def _refuse_with(scenario: str, options: dict[str, Path | None]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise typer.BadParameter(f"{given[0]} goes with --scenario {_SINGLE}, not with {scenario}")


def _show(section: Section) -> None:
    from onnx_lathe.benchmarks.report.render import render_section

    console.print(render_section(section))
