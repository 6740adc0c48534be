"""Real verdicts of known truth: a model against itself, on an idle and a busy machine, and against a slowed copy.

Each verdict is a line of a file of its own; what is there already is not done again. Beside some of them stands what
the rivals (`tests.studies.rivals`) see in the same minute.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnx_lathe.benchmarks import canary
from onnx_lathe.benchmarks.measure import FINAL, measure
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.runtime import machine, tensors
from tests.studies.rivals import asv_verdict, pytest_benchmark_slower, separate

RIVALS = 60
"""Beside so many verdicts of a kind."""

_BUSY = "import numpy as np\na = np.ones((64, 64), np.float32)\nwhile True: a @ a"


@dataclass(frozen=True)
class Kind:
    """Verdicts of one truth.

    Attributes:
        name: Of the kind.
        count: How many are wanted.
        slower: By which share the second subject is slower.
        busy: Whether another process keeps a core busy.
        seconds: Time budget of a verdict.
    """

    name: str
    count: int
    slower: float
    busy: bool
    seconds: float


KINDS = (
    Kind("idle", 300, 0.0, False, 8.0),
    Kind("5 % slower", 60, 0.05, False, 20.0),
    Kind("3 % slower", 60, 0.03, False, 20.0),
    Kind("busy", 60, 0.0, True, 8.0),
)


def run(models: Sequence[Path], file: Path, kinds: Sequence[Kind] = KINDS) -> None:
    """Take the verdicts that ``file`` lacks, a tenth of each kind at a time, and append each as a line of JSON."""
    _cut_to_whole_lines(file)
    done = {(entry["kind"], entry["index"]) for entry in read(file)}
    wanted = sorted(
        ((10 * index // kind.count, number, index) for number, kind in enumerate(kinds) for index in range(kind.count))
    )
    with tempfile.TemporaryDirectory(prefix="lathe-study-") as folder:
        feeds = {model: Path(folder) / f"{number}.npz" for number, model in enumerate(models)}
        for model, target in feeds.items():
            tensors.save_npz(target, tensors.random_feeds(model, {}))
        for _, number, index in wanted:
            kind, model = kinds[number], models[index % len(models)]
            if (kind.name, index) in done:
                continue
            entry = take(kind, index, model, feeds[model])
            with file.open("a") as stream:
                stream.write(json.dumps({"kind": kind.name, "index": index, "model": model.stem, **entry}) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """Return what was taken so far; a line that an interrupt cut short is left out."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _cut_to_whole_lines(file: Path) -> None:
    """Take away the line that an interrupt cut short: what is appended must not join it."""
    if file.exists():
        content = file.read_bytes()
        file.write_bytes(content[: content.rfind(b"\n") + 1])


def take(kind: Kind, index: int, model: Path, feeds: Path) -> dict[str, Any]:
    """Take one verdict, and time the same subjects as the rivals do."""
    start = "tests.studies.subjects:slowed"
    subjects = [
        Subject(name, start, {"model": str(model), "feeds": str(feeds), "by": by})
        for name, by in (("a", 0.0), ("b", kind.slower))
    ]
    load = machine.load()
    with _other_core(kind.busy):
        began = time.monotonic()
        found = measure(subjects, replace(FINAL, time_budget=kind.seconds))
        seconds = time.monotonic() - began
        rivals = [asdict(separate(subject)) for subject in subjects] if index < RIVALS else []
    comparison = found.comparisons[0]
    return {
        "verdict": comparison.verdict,
        "reason": comparison.reason,
        "speed": list(asdict(comparison.speed).values()),
        "seconds": round(seconds, 1),
        "processes": len(found.timings[0].blocks),
        "drift": round(canary.drift(found.canary), 4),
        "load": load,
        "rivals": rivals,
    }


@contextmanager
def _other_core(busy: bool) -> Generator[None]:
    """Keep the last core busy, or leave it alone."""
    if not busy:
        yield
        return
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", _BUSY], env=environment) as process:
        os.sched_setaffinity(process.pid, {machine.allowed_cores()[-1]})
        try:
            yield
        finally:
            process.kill()


def table(entries: Sequence[Mapping[str, Any]], kinds: Sequence[Kind] = KINDS) -> str:
    """Return the verdicts of each kind, counted, and those of the rivals, as Markdown."""
    lines = [
        "| kind | verdicts | faster | slower | no difference | inconclusive | median speed | worst | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for kind in kinds:
        chosen = [entry for entry in entries if entry["kind"] == kind.name]
        if not chosen:
            continue
        counts = [
            sum(entry["verdict"] == verdict for entry in chosen)
            for verdict in ("faster", "slower", "no difference", "inconclusive")
        ]
        speeds = np.array([entry["speed"][0] for entry in chosen])
        worst = float(np.abs(1.0 / speeds - 1.0 - kind.slower).max())
        figures = [len(chosen), *counts, f"{np.median(speeds):.4f}", f"{100 * worst:.1f} points"]
        seconds = max(entry["seconds"] for entry in chosen)
        lines.append(f"| {kind.name} | " + " | ".join(map(str, figures)) + f" | {seconds} at most |")
    return "\n".join([*lines, "", *_rivals(entries, kinds)])


def _rivals(entries: Sequence[Mapping[str, Any]], kinds: Sequence[Kind]) -> list[str]:
    """Return how often each rule calls the second subject slower (and, by asv, faster)."""
    rules = {
        **{
            f"pytest-benchmark {statistic}:{percent}%": (statistic, percent)
            for statistic in ("mean", "median", "min")
            for percent in (5, 2)
        },
        **{f"asv factor {factor}": factor for factor in (1.1, 1.05, 1.02)},
    }
    paired = {kind.name: [e for e in entries if e["kind"] == kind.name and e["rivals"]] for kind in kinds}
    shown = [name for name, chosen in paired.items() if chosen]
    lines = [f"| rule: slower / faster | {' | '.join(f'{name} ({len(paired[name])})' for name in shown)} |"]
    lines.append("|---|" + "---:|" * len(shown))
    ours = {name: [entry["verdict"] for entry in paired[name]] for name in shown}
    cells = [f"{ours[name].count('slower')} / {ours[name].count('faster')}" for name in shown]
    lines.append(f"| onnx-lathe | {' | '.join(cells)} |")
    for rule, setting in rules.items():
        cells = [_counted(paired[name], setting) for name in shown]
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    return lines


def _counted(entries: Sequence[Mapping[str, Any]], setting: tuple[str, int] | float) -> str:
    pairs = [entry["rivals"] for entry in entries]
    if isinstance(setting, tuple):
        statistic, percent = setting
        found = [pytest_benchmark_slower(a["benchmark"], b["benchmark"], statistic, percent) for a, b in pairs]
        return f"{sum(found)} / it has none"
    verdicts = [asv_verdict(a["asv"], b["asv"], setting) for a, b in pairs]
    return f"{verdicts.count('slower')} / {verdicts.count('faster')}"
