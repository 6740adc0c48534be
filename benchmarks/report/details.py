"""How it came about: the forms tried, what each pass did, operators, the machine, the method."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

from onnx_lathe.benchmarks.canary import drift
from onnx_lathe.benchmarks.report import text
from onnx_lathe.benchmarks.report.document import Section, Table, columns, row
from onnx_lathe.benchmarks.report.model import CandidateResult, MeasuredShape, OracleCheck, Report
from onnx_lathe.benchmarks.report.text import ABSENT, Cell

_TAKING_TURNS = (
    "Every network runs in fresh processes of its own. They take turns in short blocks, A B C C B A, so that whatever "
    "changes in the machine meets all of them alike, and only one works at a time.",
    "Intervals are 95 %: of p50 and p90 by order statistics; of a speed from the ratios of paired blocks "
    "(Hodges-Lehmann), the wider of that over pairs and that over processes.",
)
_NODES_SHOWN = 3


def _screened(item: CandidateResult, shape: int) -> str | Cell:
    if shape >= len(item.speed):
        return ABSENT
    speed = f"{item.speed[shape]:.2f}x"
    return speed if item.whole else Cell(speed, note="of two blocks")


def candidates(report: Report) -> Section | None:
    """Return every form tried and what became of it; None where none was."""
    if not report.candidates:
        return None
    shapes = [f"speed, {shape.name}" for shape in report.shapes] if len(report.shapes) > 1 else ["speed"]
    rows = tuple(
        row(
            item.name,
            item.status,
            *(_screened(item, index) for index in range(len(shapes))),
            ABSENT if item.step is None else Cell(text.speed(item.step).text, note=f"of {item.against}"),
            ABSENT if item.drop is None else text.points(item.drop),
            ABSENT if item.seconds is None else text.seconds(item.seconds),
            "yes" if item.on_front else "",
            item.reason,
            chosen=item.status == "kept",
        )
        for item in report.candidates
    )
    figures = (*shapes, "step", "drop", "time")
    heads = columns("form", "status", *figures, "front", "why", numeric=figures)
    notes = (
        "speed: in a short screening; the ladder's is measured again, for longer. Of two blocks of the network where "
        "that is said: such a form is on no front.",
        "step: the speed against the form that it differs from by one pass, over all shapes.",
        "drop: on the part of the data that forms are chosen on.",
        "time: what its last pass took, its check included.",
        "front: no other form is both faster and nearer to the original; `--pick` ships any form by its name.",
        "kept: it ships. refused: it was made, and something else is better. failed: it could not be made.",
    )
    return Section("candidates", "Forms that were tried", "", (Table(heads, rows),), notes, folded=True)


def edits(report: Report) -> Section | None:
    """Return what each pass did, left alone, and how it was checked; None where there was no pass."""
    if not report.edits:
        return None
    done = tuple(
        row(
            edit.target,
            edit.request,
            "changed" if edit.changed else "nothing to change",
            f"{len(edit.left_alone):,}",
            text.seconds(edit.seconds),
        )
        for edit in report.edits
    )
    figures = ("nodes left alone", "time")
    tables = [Table(columns("made", "pass", "graph", *figures, numeric=figures), done, "What each pass did")]
    checks = tuple(
        row(
            edit.target,
            edit.request,
            Cell(check.what, note=check.scope),
            _measured(check),
            _limit(check),
            check.where,
        )
        for edit in report.edits
        for check in edit.checks
    )
    if checks:
        heads = columns("made", "pass", "compared", "worst", "limit", "at", numeric=("worst", "limit"))
        tables.append(Table(heads, checks, "Does the graph compute what it must?"))
    alone = _left_alone(report)
    if alone.rows:
        tables.append(alone)
    lead = "Every pass is checked as it runs against a graph that says what the result must be."
    return Section("edits", "What the passes did", lead, tuple(tables), folded=True)


def operators(report: Report) -> Section | None:
    """Return how many nodes of each operator every rung has in its file and when it runs; None where unknown."""
    tables = [table for table in (_in_files(report), _executed(report)) if table.rows]
    lead = "Nodes by operator type; onnxruntime fuses some of a file before it runs it."
    return Section("operators", "Operators", lead, tuple(tables), folded=True) if tables else None


def environment(report: Report) -> Section | None:
    """Return where it was measured; None where nothing was measured or recorded."""
    if not report.shapes or not report.shapes[0].measurement.environment:
        return None
    rows = tuple(
        row(key.replace("_", " "), text.size(value) if key == "memory" and isinstance(value, int) else _plain(value))
        for key, value in report.shapes[0].measurement.environment.items()
    )
    note = "Latencies hold for this machine; on another, measure again."
    return Section(
        "environment", "Machine and versions", "", (Table(columns("what", "measured on"), rows),), (note,), folded=True
    )


def method(report: Report) -> Section | None:
    """Return how it was measured; None where there is nothing to tell."""
    notes = [*(_TAKING_TURNS if report.shapes else ()), *(_counted(shape) for shape in report.shapes), *report.method]
    return Section("method", "How it was measured", notes=tuple(notes), folded=True) if notes else None


def reproduce(report: Report) -> Section | None:
    """Return what makes the report again; None where no command does."""
    if not report.command:
        return None
    return Section("reproduce", "Do it again", code=report.command, folded=True)


def _in_files(report: Report) -> Table:
    counts = {rung.name: rung.operators for rung in report.rungs if rung.operators}
    return _counted_operators(counts, "In the model file")


def _executed(report: Report) -> Table:
    counts = {rung.name: rung.executed for rung in report.rungs if rung.executed}
    return _counted_operators(counts, "What onnxruntime makes of it and runs")


def _counted_operators(counts: Mapping[str, Mapping[str, int]], caption: str) -> Table:
    """Return a column for each model, the most frequent operators first."""
    most = Counter[str]()
    for operators in counts.values():
        most |= Counter(operators)
    kinds = sorted(most, key=lambda kind: (-most[kind], kind))
    rows = [row(kind, *(f"{operators.get(kind, 0):,}" for operators in counts.values())) for kind in kinds]
    rows += [row("all nodes", *(f"{sum(operators.values()):,}" for operators in counts.values()))] if counts else []
    return Table(columns("operator", *counts, numeric=counts), tuple(rows), caption)


def _left_alone(report: Report) -> Table:
    """Group what passes left alone by pass, operator and reason."""
    groups: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for edit in report.edits:
        for item in edit.left_alone:
            groups[edit.target, edit.request, item.operator, item.reason].append(item.node)
    rows = tuple(row(*key[:3], f"{len(nodes):,}", key[3], _some(nodes)) for key, nodes in groups.items())
    return Table(
        columns("made", "pass", "operator", "nodes", "why", "which", numeric=("nodes",)), rows, "What they left alone"
    )


def _some(nodes: Sequence[str]) -> str:
    rest = len(nodes) - _NODES_SHOWN
    return ", ".join(nodes[:_NODES_SHOWN]) + (f" and {rest:,} more" if rest > 0 else "")


def _measured(check: OracleCheck) -> str:
    return f"{text.figure(check.measured)} {check.unit}"


def _limit(check: OracleCheck) -> str:
    return f"{'at least' if check.unit == 'dB' else 'at most'} {text.figure(check.limit)} {check.unit}"


def _plain(value: object) -> str:
    """Return a value of the environment as a reader writes it."""
    if value is None:
        return ABSENT
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in cast("Mapping[str, Any]", value).items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item) for item in cast("Sequence[Any]", value))
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _counted(shape: MeasuredShape) -> str:
    """Return how much was measured at a shape, and how steady the machine was."""
    processes = max(len(timing.blocks) for timing in shape.measurement.timings)
    blocks = sum(len(process) for timing in shape.measurement.timings for process in timing.blocks)
    calls = sum(len(block) for timing in shape.measurement.timings for process in timing.blocks for block in process)
    started = f"{processes} fresh process{'es' if processes > 1 else ''} of each network"
    counted = f"{shape.name}: {started}, {blocks:,} blocks, {calls:,} calls in all"
    if len(shape.measurement.canary) < 3:
        return f"{counted}."
    return f"{counted}; a fixed kernel timed in between drifted by {100 * drift(shape.measurement.canary):.1f} %."
