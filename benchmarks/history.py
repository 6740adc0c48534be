"""Results over time: a file to which each result is appended as a line, and each one held against the one before."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from onnx_lathe.benchmarks import environment, schema
from onnx_lathe.benchmarks.gate import apart, slowdown
from onnx_lathe.benchmarks.load_suite import LoadSuite
from onnx_lathe.benchmarks.result import Interval, Measurement
from onnx_lathe.benchmarks.suite import Case, Suite
from onnx_lathe.benchmarks.verdict import EQUAL
from onnx_lathe.runtime.errors import InputError

Result = Suite | LoadSuite
"""What one ``lathe bench`` found, alone or under load."""

BETWEEN_RUNS = 0.02
"""What two runs of one file may differ by, apart from what their processes do: they did not take turns."""


@dataclass(frozen=True)
class Point:
    """One model in one result.

    Attributes:
        taken: When, in UTC.
        latency: p50 in seconds.
        accuracy: What it was judged by, on 0..1; None where it was not judged.
        metric: The name of that; empty where it was not judged.
        comparable: Whether the environment is that of the result before; the first is.
        change: Share by which it is slower than in the result before; None where they cannot be compared.
        verdict: "slower" or "faster" beyond noise, "no difference", "inconclusive", "first" or "not compared".
        reason: Why.
    """

    taken: str
    latency: Interval
    accuracy: Interval | None
    metric: str
    comparable: bool
    change: Interval | None
    verdict: str
    reason: str


@dataclass(frozen=True)
class Series:
    """A model in a case over time, the oldest result first."""

    case: str
    model: str
    points: tuple[Point, ...]


def series(suites: Sequence[Suite]) -> tuple[Series, ...]:
    """Return every model in every case over time; the order is that of their first results."""
    found: dict[tuple[str, str], list[tuple[Suite, Case]]] = defaultdict(list)
    for suite in suites:
        for case in suite.cases:
            for model in suite.models:
                found[case.title, model.name].append((suite, case))
    return tuple(
        Series(title, name, tuple(_point(name, before, now) for before, now in pairwise([None, *entries]) if now))
        for (title, name), entries in found.items()
    )


def _point(name: str, before: tuple[Suite, Case] | None, now: tuple[Suite, Case]) -> Point:
    suite, case = now
    model, latency = suite.model(name), case.measurement.timing(name).p50
    return Point(suite.taken, latency, model.accuracy, model.metric, *_against(name, before, now))


def _against(
    name: str, before: tuple[Suite, Case] | None, now: tuple[Suite, Case]
) -> tuple[bool, Interval | None, str, str]:
    """Return whether a result can be compared with the one before, the change, the verdict, and why."""
    if before is None:
        return True, None, "first", ""
    (earlier, then), (suite, case) = before, now
    unlike = environment.differs(then.measurement.environment, case.measurement.environment)
    if unlike:
        return False, None, "not compared", "; ".join(unlike)
    change = slowdown(then.measurement.timing(name), case.measurement.timing(name))
    doubt = apart(then.measurement, case.measurement)
    if doubt is not None:
        return True, change, "inconclusive", doubt
    changed = "changed file" if earlier.model(name).sha256 != suite.model(name).sha256 else "same file"
    return True, change, _judge(change), changed


def _judge(change: Interval) -> str:
    if change.low > BETWEEN_RUNS:
        return "slower"
    if change.high < -BETWEEN_RUNS:
        return "faster"
    return "no difference" if max(-change.low, change.high) <= EQUAL else "inconclusive"


def medians_only(measurement: Measurement) -> Measurement:
    """Return a measurement with the median of each process for its values: all that two runs are compared by."""
    timings = tuple(
        replace(timing, blocks=tuple(((float(np.median(np.concatenate(process))),),) for process in timing.blocks))
        for timing in measurement.timings
    )
    return replace(measurement, timings=timings)


def append(file: Path, suite: Result) -> None:
    """Append a result as one line, by one write: what is there stays as it is.

    Raises:
        InputError: The file cannot be written, or its last line was cut short.
    """
    with _appending(file) as stream:
        stream.write((suite.to_json() + "\n").encode())


def check(file: Path) -> None:
    """Find out before anything is measured that a result could be appended.

    Raises:
        InputError: As `append`.
    """
    there = file.exists()
    with _appending(file):
        pass
    if not there:
        file.unlink()


@contextmanager
def _appending(file: Path) -> Generator[BinaryIO]:
    try:
        with file.open("ab+") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    raise _broken(f"{file}, last line", "a line that was cut short")
            yield stream
    except OSError as error:
        raise InputError(
            str(file), got=error.strerror or str(error), expected="a file to append to", mend="Name another file."
        ) from None


def read(file: Path) -> tuple[Result, ...]:
    """Return all results, in order.

    Raises:
        InputError: The file is missing or empty, or a line cannot be read; it is named.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        got = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
        raise _broken(str(file), got or str(error)) from None
    if not lines:
        raise InputError(
            str(file), got="no result", expected="at least one", mend="Append one with `lathe bench --append`."
        )
    return tuple(_parse(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1))


def _parse(line: str, source: str) -> Result:
    kinds: dict[str, type[Result]] = {kind.SCHEMA: kind for kind in (Suite, LoadSuite)}
    return schema.load_any(
        kinds, line, source, mend="Measure again, with `lathe bench --append`, or take the line out."
    )


def _broken(where: str, got: str) -> InputError:
    return InputError(
        where,
        got=got,
        expected="results as `lathe bench --append` writes them, one a line",
        mend="Take the broken line out, or name another file.",
    )
