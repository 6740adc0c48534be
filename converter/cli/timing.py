"""The verbs that time models: side by side, under load, against a baseline, and over time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    from onnx_lathe.converter.results import Outputs
    from onnx_lathe.converter.workload import Workload

_SINGLE = "single-stream"

Models = Annotated[list[Path], typer.Argument(help="Models; each is compared with the first.", show_default=False)]
EachThreads = Annotated[
    list[int] | None, typer.Option(min=1, help="Threads of a session; repeatable.", show_default="all allowed cores")
]
TimeBudget = Annotated[
    float, typer.Option(min=1.0, help="Seconds for each shape and number of threads, one query after the other.")
]
Profile = Annotated[
    bool, typer.Option(help="Also run the models under the profiler, to tell how near to the machine's peaks.")
]
HowQueriesCome = Annotated[
    Literal["single-stream", "offline", "server"],
    typer.Option(help="One query after the other, all at once, or as they arrive (after MLPerf)."),
]
Streams = Annotated[int, typer.Option(min=1, help="Queries served at a time (offline, server).")]
Rate = Annotated[float | None, typer.Option(help="Queries that arrive per second (server).")]
Bound = Annotated[
    float | None,
    typer.Option(help="Milliseconds that p99 must keep (server); without --rate the highest rate is looked for."),
]
Against = Annotated[
    Path | None, typer.Option(help="A baseline: a model, measured in the same run, or the .json of an earlier result.")
]
FailOver = Annotated[
    str, typer.Option(help="Exit status 3 where a model is not shown to be at most so much slower, such as 5%.")
]
AcrossEnvironments = Annotated[
    bool, typer.Option("--across-environments", help="Compare with a result of another machine or version too.")
]
ResultFile = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="The .json to write, never overwritten; after an interruption it goes on."),
]
History = Annotated[Path | None, typer.Option(help="The .jsonl to append the result to, for `lathe report`.")]


@dataclass(frozen=True)
class _Gate:
    """The baseline that models are held against, and the share by which they may be slower."""

    against: Path | None
    limit: float
    anywhere: bool


@dataclass(frozen=True)
class _Load:
    """How queries come: how many are served at a time, and of a server the rate and the bound in milliseconds."""

    scenario: str
    streams: int
    rate: float | None
    bound: float | None


def bench(
    models: Models,
    dims: DimsOption = None,
    data: OptionalData = None,
    provider: Provider = "cpu",
    threads: EachThreads = None,
    time_budget: TimeBudget = 30.0,
    profile: Profile = True,
    scenario: HowQueriesCome = _SINGLE,
    streams: Streams = 1,
    rate: Rate = None,
    latency_bound: Bound = None,
    against: Against = None,
    fail_over: FailOver = "5%",
    across_environments: AcrossEnvironments = False,
    output: ResultFile = None,
    append: History = None,
) -> None:
    """Measure models interleaved in fresh processes, with intervals and a verdict."""
    from onnx_lathe.converter.results import Outputs
    from onnx_lathe.converter.workload import Workload

    workload = Workload([parse_dims(text) for text in dims or []], data, provider, threads or [])
    outputs = Outputs(output, append)
    server = {"--rate": rate, "--latency-bound": latency_bound}
    if scenario == _SINGLE:
        _refuse(scenario, "server", server)
        gate = _Gate(against, parse_share("--fail-over", fail_over), across_environments)
        _bench_alone(models, workload, time_budget, profile, gate, outputs)
    else:
        _refuse(scenario, _SINGLE, {"--against": against})
        _refuse(scenario, "server", server if scenario == "offline" else {})
        _bench_load(models, workload, _Load(scenario, streams, rate, latency_bound), outputs)


def report(
    file: Annotated[
        Path, typer.Argument(help="What `lathe bench --append` or `-o` wrote: a .jsonl or .json.", show_default=False)
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The page (.html) to write.")] = None,
) -> None:
    """Show the history of a file of results, and where a model became slower or the machine another."""
    from onnx_lathe.benchmarks.report.history import changes, history
    from onnx_lathe.converter.results import write_history

    results = write_history(file, output)
    for section in history(results):
        _show(section)
    emit("report", {"page": output, "results": len(results), "changes": changes(results)})


def _bench_alone(
    models: list[Path], workload: Workload, time_budget: float, profiled: bool, gate: _Gate, outputs: Outputs
) -> None:
    """Measure one query after the other, and hold the models against the baseline."""
    from onnx_lathe.benchmarks.report.timing import gates, latencies
    from onnx_lathe.converter import results
    from onnx_lathe.converter.bench import bench

    against, anywhere = gate.against, gate.anywhere
    baseline = results.read_baseline(against, across_environments=anywhere) if against is not None else None
    outputs.check()
    # A model is measured in the same run, which is worth more than any record.
    first = [against] if against is not None and baseline is None else []
    with showing() as progress:
        suite = bench(
            [*first, *models],
            workload,
            time_budget=time_budget,
            profiled=profiled,
            baseline=baseline,
            work=outputs.work,
            progress=progress,
        )
    for case in suite.cases:
        _show(latencies(case))
    found = results.gate(suite, baseline, gate.limit, across_environments=anywhere) if against is not None else ()
    if against is not None:
        _show(gates(found, gate.limit))
    outputs.save(suite)
    emit("bench", {**vars(suite), "gates": found}, version=2)
    missed = [f"{each.model} in {each.case}: {each.outcome}, {each.reason}" for each in found if each.outcome != "kept"]
    exit_if_missed("; ".join(missed) or None)


def _bench_load(models: list[Path], workload: Workload, load: _Load, outputs: Outputs) -> None:
    """Measure the scenarios in which queries come from several sides."""
    from onnx_lathe.benchmarks.queueing import LatencyBound
    from onnx_lathe.benchmarks.report.load import bounds_missed, under_load
    from onnx_lathe.converter.bench import bench_offline, bench_server

    outputs.check()
    bound = None if load.bound is None else LatencyBound(load.bound / 1e3)
    with showing() as progress:
        if load.scenario == "offline":
            suite = bench_offline(models, workload, streams=load.streams, work=outputs.work, progress=progress)
        else:
            suite = bench_server(
                models,
                workload,
                streams=load.streams,
                rate=load.rate,
                bound=bound,
                work=outputs.work,
                progress=progress,
            )
    for case in suite.cases:
        _show(under_load(case))
    outputs.save(suite)
    emit("load", vars(suite))
    exit_if_missed("; ".join(missed for case in suite.cases for missed in bounds_missed(case.result)) or None)


def _refuse(scenario: str, home: str, options: Mapping[str, object]) -> None:
    """Refuse options that belong to the scenario ``home`` and say nothing in this one."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise typer.BadParameter(f"{given[0]} goes with --scenario {home}, not with {scenario}")


def _show(section: Section) -> None:
    from onnx_lathe.benchmarks.report.render import render_section

    console.print(render_section(section))
