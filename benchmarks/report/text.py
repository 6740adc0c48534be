"""Numbers and names as the report prints them: a unit with every figure, and no more digits than the figure has."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from onnx_lathe.benchmarks.result import Comparison, Interval

ABSENT = "—"

Unit = tuple[float, str]
"""How many seconds, bytes or things one of it is, and its symbol."""

_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_COUNTS = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
_DIGITS = 3
_MOST_DIGITS = 6

# A backslash always escapes; an underscore only where it could open or close emphasis.
_MARKDOWN = re.compile(r"([\\`*~<>|&#])|(?<![A-Za-z0-9])(_)|(_)(?![A-Za-z0-9])|(\](?=[(\[:]))")


@dataclass(frozen=True)
class Cell:
    """One entry of a table.

    Attributes:
        value: What stands there.
        interval: Its interval, such as "[1.21, 1.26]"; empty where it has none.
        note: A remark on it; empty where there is none.
    """

    value: str
    interval: str = ""
    note: str = ""

    @property
    def text(self) -> str:
        """The entry on one line."""
        return " ".join(filter(None, (self.value, self.interval, f"({self.note})" if self.note else "")))


def clean(text: str) -> str:
    """Return ``text`` on one line, what cannot be seen replaced: names come from files that nobody should trust."""
    return "".join(_visible(character) for character in text)


def escape_markdown(text: str) -> str:
    """Return ``text`` so that Markdown shows it as it is, also within a table."""
    return _MARKDOWN.sub(lambda match: f"\\{match[0]}", clean(text))


def time_unit(values: Iterable[float]) -> Unit:
    """Return the unit to print times in seconds in, so that they can be compared at a glance."""
    return _common(list(values), _TIMES)


def size_unit(values: Iterable[int]) -> Unit:
    """Return the unit to print numbers of bytes in; 1 MB is 10^6 bytes."""
    return _common(list(values), _BYTES)


def duration(interval: Interval, unit: Unit | None = None) -> Cell:
    """Return a time in seconds, such as ``1.23 ms [1.21, 1.26]``; in the unit that fits it where none is given."""
    return _scaled(interval, unit or _fitting(interval.value, _TIMES))


def seconds(value: float) -> str:
    """Return a time in seconds without an interval."""
    return duration(_exact(value)).value


def size(value: int, unit: Unit | None = None) -> str:
    """Return a number of bytes, such as ``1.23 MB``; in the unit that fits it where none is given."""
    scale, symbol = unit or _fitting(value, _BYTES)
    return f"{value:,} B" if scale == 1.0 else _scaled(_exact(value), (scale, symbol)).value


def count(value: int) -> str:
    """Return a number of things: in full below a million."""
    return f"{value:,}" if value < 1_000_000 else _scaled(_exact(value), _fitting(value, _COUNTS)).value


def percent(interval: Interval) -> Cell:
    """Return a metric on 0..1, such as ``98.4 % [97.0, 99.2]``."""
    return _estimate(interval, 100.0, " %", 1)


def speed(interval: Interval) -> Cell:
    """Return a ratio of latencies, such as ``5.12x [5.01, 5.20]``."""
    return _estimate(interval, 1.0, "x", 3 if interval.value < 0.2 else 2 if interval.value < 10 else 1)


def judged_speed(comparison: Comparison) -> Cell:
    """Return a ratio of latencies, and the verdict where it is not simply faster or slower."""
    cell = speed(comparison.speed)
    plain = comparison.verdict in ("faster", "slower")
    return Cell(cell.value, cell.interval, "" if plain else comparison.verdict)


def points(value: float) -> str:
    """Return a difference of a metric on 0..1 in percentage points."""
    if not math.isfinite(value):
        return "no finite bound"
    return f"{_number(100 * value, 2)} points"


def change(interval: Interval) -> Cell:
    """Return a difference of shares on 0..1 in percentage points, such as ``-0.20 points [-0.93, 0.51]``."""
    return _estimate(interval, 100.0, " points", 2)


def slower(interval: Interval) -> Cell:
    """Return by which share something takes longer, such as ``+5.1 % [4.8, 5.4]``."""
    cell = _estimate(interval, 100.0, " %", 1)
    return Cell(("+" if interval.value > 0 else "") + cell.value, cell.interval)


def plain(interval: Interval) -> Cell:
    """Return any other estimate, its larger end with three significant digits, such as ``0.034 [0.031, 0.040]``."""
    largest = max(abs(interval.low), abs(interval.high))
    if not math.isfinite(largest) or largest == 0.0:
        return Cell(figure(interval.value))
    _, exponent = f"{largest:.{_DIGITS - 1}e}".split("e")
    return _estimate(interval, 1.0, "", max(0, _DIGITS - 1 - int(exponent)))


def limit(value: float) -> str:
    """Return a limit that a user set, in percentage points, without digits that were not given."""
    return f"{100 * value:g} point{'' if math.isclose(value, 0.01) else 's'}"


def figure(value: float) -> str:
    """Return any other number with three significant digits."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    return f"{value:.3g}"


def _visible(character: str) -> str:
    if character.isspace():
        return " "
    return "\N{REPLACEMENT CHARACTER}" if unicodedata.category(character)[0] == "C" else character


def _exact(value: float) -> Interval:
    return Interval(value, value, value)


def _fitting(value: float, units: Sequence[Unit]) -> Unit:
    """Return the largest unit in which ``value`` is at least 1."""
    return next((unit for unit in units if abs(value) >= unit[0]), units[-1])


def _common(values: Sequence[float], units: Sequence[Unit]) -> Unit:
    """Return the unit that fits the largest value, or the smallest one where they lie too far apart for that."""
    smallest, largest = min(values, default=0.0), max(values, default=0.0)
    unit = _fitting(largest, units)
    return unit if smallest >= unit[0] / 100 else _fitting(smallest, units)


def _scaled(interval: Interval, unit: Unit) -> Cell:
    scale, symbol = unit
    _, exponent = f"{interval.value / scale:.{_DIGITS - 1}e}".split("e")
    return _estimate(interval, 1.0 / scale, f" {symbol}", max(0, _DIGITS - 1 - int(exponent)))


def _estimate(interval: Interval, scale: float, unit: str, decimals: int) -> Cell:
    """Return an interval with ``decimals``, or with a few more where its two ends would look the same."""
    value, low, high = (scale * part for part in (interval.value, interval.low, interval.high))
    if low == high:
        return Cell(_number(value, decimals) + unit)
    while _number(low, decimals) == _number(high, decimals) and decimals < _MOST_DIGITS:
        decimals += 1
    return Cell(_number(value, decimals) + unit, f"[{_number(low, decimals)}, {_number(high, decimals)}]")


def _number(value: float, decimals: int) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    # Adding zero turns the "-0.00" of a tiny negative number into "0.00".
    return f"{round(value, decimals) + 0.0:,.{decimals}f}"
