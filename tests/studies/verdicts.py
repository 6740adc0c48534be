"""Real verdicts of known truth: a model against itself, on an idle and a busy machine, and against a slowed copy.

Each verdict is a line of a file of its own; what is there already is not done again. None is begun before the machine
is quiet: other processes leave it alone, and a fixed kernel takes the same time again and again, which it does not
where other guests of the host want its cores. One during which strangers used the machine is kept, but marked as
disturbed, and taken again: its truth is not known. Beside some of them stands what the rivals (`tests.studies.rivals`)
see in the same minute.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
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

RIVALS = 30
"""Beside the first so many verdicts of a kind."""

QUIET = 0.1
"""Cores that processes other than the study's may use on average, the share stolen by the host included."""
STEADY = 1.1
"""What the slow songs of the canary (their ninth decile) may take, in medians, for the machine to be steady."""
_PATIENCE = 1800.0
"""Seconds to wait for the machine to become quiet, before a verdict is taken all the same."""
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
        most: Seconds in all where it is inconclusive then.
    """

    name: str
    count: int
    slower: float
    busy: bool
    seconds: float
    most: float


KINDS = (
    Kind("idle", 300, 0.0, False, 8.0, 20.0),
    Kind("5 % slower", 60, 0.05, False, 10.0, 30.0),
    Kind("3 % slower", 60, 0.03, False, 10.0, 30.0),
    Kind("busy", 60, 0.0, True, 8.0, 20.0),
)


def run(models: Sequence[Path], file: Path, kinds: Sequence[Kind] = KINDS) -> None:
    """Take the verdicts that ``file`` lacks, a tenth of each kind at a time, and append each as a line of JSON."""
    _cut_to_whole_lines(file)
    done = {(entry["kind"], entry["index"]) for entry in read(file) if not entry["disturbed"]}
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
            while True:
                await_quiet()
                entry = take(kind, index, model, feeds[model])
                with file.open("a") as stream:
                    stream.write(json.dumps({"kind": kind.name, "index": index, "model": model.stem, **entry}) + "\n")
                if not entry["disturbed"]:
                    break


def read(file: Path) -> list[dict[str, Any]]:
    """Return what was taken so far; a line that an interrupt cut short is left out."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _cut_to_whole_lines(file: Path) -> None:
    """Take away the line that an interrupt cut short: what is appended must not join it."""
    if file.exists():
        # In place and never longer: what was taken in hours must outlast whatever happens here.
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)


def take(kind: Kind, index: int, model: Path, feeds: Path) -> dict[str, Any]:
    """Take one verdict, and time the same subjects as the rivals do."""
    start = "tests.studies.subjects:slowed"
    subjects = [
        Subject(name, start, {"model": str(model), "feeds": str(feeds), "by": by})
        for name, by in (("a", 0.0), ("b", kind.slower))
    ]
    began, strangers = time.monotonic(), strangers_seconds()
    with _other_core(kind.busy):
        found = measure(subjects, replace(FINAL, time_budget=kind.seconds, most_time=kind.most))
    seconds = time.monotonic() - began
    strangers = (strangers_seconds() - strangers) / seconds
    rivals = [asdict(separate(subject)) for subject in subjects] if index < RIVALS else []
    comparison = found.comparisons[0]
    return {
        "verdict": comparison.verdict,
        "reason": comparison.reason,
        "speed": list(asdict(comparison.speed).values()),
        "seconds": round(seconds, 1),
        "processes": len(found.timings[0].blocks),
        "drift": round(canary.drift(found.canary), 4),
        "strangers": round(strangers, 3),
        "disturbed": strangers > QUIET,
        "rivals": rivals,
    }


def strangers_seconds() -> float:
    """Return the CPU seconds since boot that neither the machine idled nor this process and its dead children used."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    total = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return total - sum(each.ru_utime + each.ru_stime for each in own)


def await_quiet() -> None:
    """Wait until others leave the machine alone for three seconds in a row, but not forever."""
    began, quiet = time.monotonic(), 0
    while quiet < 3 and time.monotonic() - began < _PATIENCE:
        before, songs = strangers_seconds(), _sing(1.0)
        alone = strangers_seconds() - before <= QUIET
        quiet = quiet + 1 if alone and np.quantile(songs, 0.9) <= STEADY * np.median(songs) else 0


def _sing(seconds: float) -> list[float]:
    began, songs = time.monotonic(), [canary.sing()]
    while time.monotonic() - began < seconds:
        songs.append(canary.sing())
    return songs


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
    disturbed = Counter(entry["verdict"] for entry in entries if entry["disturbed"])
    entries = [entry for entry in entries if not entry["disturbed"]]
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
    counted = ", ".join(f"{verdict} {count}" for verdict, count in sorted(disturbed.items()))
    note = f"Disturbed, and taken again: {disturbed.total()}" + (f" ({counted})." if counted else ".")
    return "\n".join([*lines, "", note, "", *_rivals(entries, kinds)])


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
