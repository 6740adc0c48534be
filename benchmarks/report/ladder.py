"""What each step gained: the ladder, its headlines, speed between steps, accuracy, distilling and training."""

from __future__ import annotations

from onnx_lathe.benchmarks.report import text
from onnx_lathe.benchmarks.report.document import Headline, Section, Table, columns, row
from onnx_lathe.benchmarks.report.model import Figure, MeasuredShape, Report, Rung
from onnx_lathe.benchmarks.report.text import ABSENT, Cell
from onnx_lathe.benchmarks.result import Certificate, Comparison, Interval, Timing
from onnx_lathe.benchmarks.stats import least_samples

_P50 = "p50: half of the calls take at most this long. p90: nine in ten do."
_BRACKETS = "Brackets: the 95 % interval of the figure before them."
_MACS = "MACs: multiply-accumulate operations of one call."
_MEMORY = "peak memory: of the whole process that runs the network, imports included. 1 MB is 10^6 bytes."
_DROP = "drop: the original's metric minus this network's, on the same samples; negative where it gained."
_CERTIFIED = "certified: with 95 % confidence the drop, were all such samples judged, is within the budget."
_FLIPS = "lost: samples that the original had right and this network has wrong. gained: the reverse."


def accuracy_of(report: Report, name: str) -> Interval | None:
    """Return a rung's metric on 0..1; None where it was not judged."""
    if name in report.certificates:
        return report.certificates[name].candidate
    others = list(report.certificates.values())
    return others[0].original if name == report.original and others else None


def timing_of(shape: MeasuredShape, name: str) -> Timing | None:
    """Return a rung's timing; None where it was not measured."""
    return next((timing for timing in shape.measurement.timings if timing.name == name), None)


def speed_of(shape: MeasuredShape, name: str) -> Comparison | None:
    """Return how a rung compares with the reference; None for the reference, and where it was not measured."""
    return next((item for item in shape.measurement.comparisons if item.name == name), None)


def reference_of(shape: MeasuredShape) -> str:
    """Return the name of the rung that the others' speed refers to."""
    return shape.measurement.timings[0].name


def file_unit(report: Report) -> text.Unit:
    """Return the unit that all file sizes are printed in."""
    return text.size_unit(rung.file_bytes for rung in report.rungs if rung.file_bytes is not None)


def headlines(report: Report) -> tuple[Headline, ...]:
    """Return the figures of what ships that count most."""
    chosen = report.chosen
    if chosen is None:
        return ()
    found: list[Headline] = []
    for shape in report.shapes:
        where = f", {shape.name}" if len(report.shapes) > 1 else ""
        comparison, timing = speed_of(shape, chosen.name), timing_of(shape, chosen.name)
        if comparison is not None:
            cell = text.speed(comparison.speed)
            label = f"speed against {comparison.against}{where}"
            found.append(Headline(label, Cell(cell.value, cell.interval, comparison.verdict)))
        if timing is not None:
            found.append(Headline(f"median latency{where}", text.duration(timing.p50, _latency_unit(shape))))
    certificate = report.certificates.get(chosen.name)
    if certificate is not None and chosen.name != report.original:
        note = f"95 % bound {text.points(certificate.bound)}, budget {text.limit(certificate.max_drop)}"
        found.append(Headline(f"drop of {certificate.metric}", Cell(text.points(certificate.drop), note=note)))
    if chosen.file_bytes is not None:
        found.append(
            Headline("file", Cell(text.size(chosen.file_bytes, file_unit(report)), note=_smaller(report, chosen)))
        )
    return tuple(found)


def ladder(report: Report) -> Section:
    """Return every rung with its figures, a table for each shape."""
    shapes = report.shapes or (None,)
    terms = ["Nothing was measured: there are no latencies."]
    if report.shapes:
        references = ", ".join(dict.fromkeys(reference_of(shape) for shape in report.shapes))
        speed = f"speed: the latency of {references} divided by this network's, from calls made in turn."
        terms = [_P50, speed, _MACS, _MEMORY, _BRACKETS]
    reasons = dict.fromkeys(why for shape in shapes for rung in report.rungs for why in _missing(report, shape, rung))
    lead = "Every step from where it started to what ships; what ships is marked." if report.chosen else ""
    tables = tuple(_ladder_table(report, shape) for shape in shapes)
    return Section("ladder", "The ladder", lead, tables, (*terms, *reasons))


def _ladder_table(report: Report, shape: MeasuredShape | None) -> Table:
    figures = ["parameters", *(["MACs"] if shape else []), "file", *([report.metric] if report.metric else [])]
    figures += ["p50", "p90", "peak memory", "speed"] if shape else []
    rows = tuple(row(*_ladder_cells(report, shape, rung), chosen=rung.chosen) for rung in report.rungs)
    return Table(columns("network", *figures, numeric=figures), rows, shape.name if shape else "")


def _ladder_cells(report: Report, shape: MeasuredShape | None, rung: Rung) -> list[str | Cell]:
    accuracy = accuracy_of(report, rung.name)
    return [
        Cell(rung.name, note=rung.note),
        ABSENT if rung.parameters is None else text.count(rung.parameters),
        *([text.count(shape.macs[rung.name]) if rung.name in shape.macs else ABSENT] if shape else []),
        ABSENT if rung.file_bytes is None else text.size(rung.file_bytes, file_unit(report)),
        *([text.percent(accuracy) if accuracy else ABSENT] if report.metric else []),
        *(_times(shape, rung.name) if shape else []),
    ]


def _times(shape: MeasuredShape, name: str) -> list[str | Cell]:
    timing, comparison = timing_of(shape, name), speed_of(shape, name)
    if timing is None:
        return [ABSENT] * 4
    unit = _latency_unit(shape)
    return [
        text.duration(timing.p50, unit),
        text.duration(timing.p90, unit) if timing.p90 else ABSENT,
        text.size(timing.peak_memory),
        text.judged_speed(comparison) if comparison else Cell("1.00x", note="reference"),
    ]


def _latency_unit(shape: MeasuredShape) -> text.Unit:
    return text.time_unit(timing.p50.value for timing in shape.measurement.timings)


def _missing(report: Report, shape: MeasuredShape | None, rung: Rung) -> list[str]:
    """Return why figures of a rung are not there, where a reason is known."""
    timing = timing_of(shape, rung.name) if shape else None
    absent: dict[Figure, bool] = {
        "parameters": rung.parameters is None,
        "MACs": shape is not None and rung.name not in shape.macs,
        "file": rung.file_bytes is None,
        "accuracy": report.metric is not None and accuracy_of(report, rung.name) is None,
        "latency": shape is not None and timing is None,
    }
    reasons = {figure: rung.missing[figure] for figure, gone in absent.items() if gone and figure in rung.missing}
    found = [f"{ABSENT} {rung.name}, {figure}: {reason}." for figure, reason in reasons.items()]
    if timing is not None and timing.p90 is None:
        found.append(f"{ABSENT} {rung.name}, p90: it takes {least_samples(0.9)} calls, there were fewer.")
    return found


def comparisons(report: Report) -> Section | None:
    """Return who is faster than whom, with the verdict and its reason; None where nothing was compared."""
    rows = [
        row(
            item.name,
            item.against,
            *([shape.name] if len(report.shapes) > 1 else []),
            text.speed(item.speed),
            item.verdict,
            item.reason,
        )
        for shape in report.shapes
        for item in (*shape.measurement.comparisons, *shape.comparisons)
    ]
    if not rows:
        return None
    where = ["shape"] if len(report.shapes) > 1 else []
    heads = columns("network", "against", *where, "speed", "verdict", "why", numeric=("speed",))
    note = "faster, slower: beyond what the reference shows against itself, in at least four of five fresh processes."
    lead = "How many times as fast each network is, and how sure that is."
    return Section("comparisons", "Who is faster", lead, (Table(heads, tuple(rows)),), (note, _BRACKETS))


def accuracy(report: Report) -> Section | None:
    """Return what each rung costs in accuracy; None where it was not judged."""
    if not report.certificates:
        return None
    names = [rung.name for rung in report.rungs if rung.name in report.certificates]
    names += [name for name in report.certificates if name not in names]
    chosen = report.chosen
    rows = tuple(
        row(*_judged(report, name, report.certificates[name]), chosen=chosen is not None and name == chosen.name)
        for name in names
    )
    figures = (report.metric or "metric", "drop", "95 % bound", "budget", "samples", "lost", "gained")
    heads = columns("network", *figures, "verdict", numeric=figures)
    methods = dict.fromkeys(report.certificates[name].method for name in names if name != report.original)
    notes = [_DROP, _CERTIFIED, _FLIPS, _BRACKETS, *(f"The bound: {method}." for method in methods)]
    notes += [note for name in names if (note := _needed(name, report.certificates[name]))]
    lead = f"Judged on samples that no decision was made on, against {report.original}."
    return Section("accuracy", "What it costs in accuracy", lead, (Table(heads, rows),), tuple(notes))


def _judged(report: Report, name: str, certificate: Certificate) -> list[str | Cell]:
    if name == report.original:
        absent = [ABSENT] * 3
        samples = f"{certificate.samples:,}"
        return [name, text.percent(certificate.candidate), *absent, samples, ABSENT, ABSENT, "the original"]
    return [
        name,
        text.percent(certificate.candidate),
        text.points(certificate.drop),
        text.points(certificate.bound),
        text.limit(certificate.max_drop),
        f"{certificate.samples:,}",
        ABSENT if certificate.losses is None else f"{certificate.losses:,}",
        ABSENT if certificate.gains is None else f"{certificate.gains:,}",
        "certified" if certificate.certified else "not certified",
    ]


def _needed(name: str, certificate: Certificate) -> str:
    if certificate.certified:
        return ""
    if certificate.needed is None:
        return f"{name}: at this drop no number of samples within reach would certify it."
    return f"{name}: at this drop it would take about {certificate.needed:,} samples to certify."


def distillation(report: Report) -> Section | None:
    """Return what distilling gained; None where nothing was distilled."""
    if not report.distillation:
        return None
    rows = tuple(
        row(
            score.part,
            text.percent(score.teacher) if score.teacher else ABSENT,
            text.percent(score.alone),
            text.percent(score.distilled),
            text.points(score.distilled.value - score.alone.value),
        )
        for score in report.distillation
    )
    figures = ("teacher", "student alone", "student distilled", "gain")
    table = Table(columns("part of the data", *figures, numeric=figures), rows)
    lead = "The same small network, trained once on the labels alone and once to follow the teacher as well."
    return Section("distillation", "What distilling gained", lead, (table,), (_BRACKETS,))


def training(report: Report) -> Section | None:
    """Return how each network was trained; None where none was."""
    if not report.curves:
        return None
    rows = tuple(
        row(
            curve.name,
            f"{len(curve.losses)}",
            text.figure(curve.losses[0]) if curve.losses else ABSENT,
            text.figure(curve.losses[-1]) if curve.losses else ABSENT,
            f"{100 * curve.scores[-1]:.1f} %" if curve.scores else ABSENT,
            f"{100 * max(curve.scores):.1f} %" if curve.scores else ABSENT,
            curve.scored_on,
        )
        for curve in report.curves
    )
    figures = ("epochs", "first loss", "last loss", "last score", "best score")
    heads = columns("network", *figures, "scored on", numeric=figures)
    notes = (
        f"score: {report.metric or 'the metric'} after an epoch. epoch: once over all training samples.",
        "A distilled network minimizes another loss than one trained on labels: compare scores, not losses.",
    )
    return Section("training", "Training", "How the networks learned.", (Table(heads, rows),), notes)


def _smaller(report: Report, chosen: Rung) -> str:
    """Return how the size of the file compares with the original's."""
    size = next((rung.file_bytes for rung in report.rungs if rung.name == report.original), None)
    if not size or not chosen.file_bytes or chosen.name == report.original:
        return ""
    ratio = size / chosen.file_bytes
    smaller = ratio >= 1.0
    return f"{ratio if smaller else 1 / ratio:.1f} times {'smaller' if smaller else 'larger'} than {report.original}"
