"""The ranges of values as a file that people can read, edit and use again: JSON with a schema, sorted by name."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from onnx_lathe.runtime.errors import InputError
from onnx_lathe.runtime.staged import staged

SCHEMA = "onnx-lathe/ranges/1"
_MEND = "Mend the entry, or delete the file so that the ranges are observed anew."


@dataclass(frozen=True)
class ValueRange:
    """The range of a value.

    Attributes:
        low: The least number that the levels cover.
        high: The largest one.
        seen_low: The least number seen; None where the value was always empty.
        seen_high: The largest one, likewise.
    """

    low: float
    high: float
    seen_low: float | None = None
    seen_high: float | None = None


@dataclass(frozen=True)
class Ranges:
    """The ranges of a graph's values.

    Attributes:
        method: How they were chosen, such as "percentile 99.99".
        samples: How many samples were run.
        values: The ranges by the name of the value.
    """

    method: str
    samples: int
    values: Mapping[str, ValueRange]


def write(ranges: Ranges, path: Path) -> None:
    """Write a file of ranges, whole or not at all.

    Raises:
        OutputError: Nothing can be written there.
    """
    values = {name: dataclasses.asdict(value) for name, value in sorted(ranges.values.items())}
    content = {"schema": SCHEMA, "method": ranges.method, "samples": ranges.samples, "values": values}
    with staged(path) as part:
        part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def read(
    path: Path, known: Collection[str], needed: Collection[str], method: str | None = None
) -> dict[str, tuple[float, float]]:
    """Return low and high of the values ``needed`` as a file gives them.

    Args:
        path: The file.
        known: All values of the graph; others must not be in the file.
        needed: Those that must be.
        method: How they must have been chosen; None takes all.

    Raises:
        InputError: The file cannot be read, its ranges were chosen in another way, or a value in it is unknown,
            missing, upside down or not finite.
    """
    ranges = _load(path)
    if method not in (None, ranges.method):
        raise InputError(
            str(path),
            got=f"ranges that were chosen by {ranges.method!r}",
            expected=f"by {method!r}, as the request asks",
            mend="Delete the file so that the ranges are observed anew, or leave the option ranges out to take them.",
        )
    values = ranges.values
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else _MEND
            raise InputError(f"{path}: {name!r}", got="an unknown name", expected="a value of the graph", mend=hint)
        if not (math.isfinite(value.low) and math.isfinite(value.high) and value.low <= value.high):
            raise InputError(
                f"{path}: {name!r}",
                got=f"low {value.low:g} and high {value.high:g}",
                expected="finite numbers, low not above high",
                mend=_MEND,
            )
    if missing := [name for name in needed if name not in values]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            str(path),
            got=f"no range of {missing[0]!r}{more}",
            expected="one of each value that is rounded",
            mend="Add it, or delete the file so that the ranges are observed anew.",
        )
    return {name: (values[name].low, values[name].high) for name in needed}


def _load(path: Path) -> Ranges:
    def unreadable(got: str) -> InputError:
        return InputError(str(path), got=got, expected=f"JSON of schema {SCHEMA!r}", mend=_MEND)

    try:
        content: Any = json.loads(path.read_text())
    except OSError as error:
        raise unreadable(f"a file that cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise unreadable(f"no JSON ({error})") from None
    schema = cast("dict[str, Any]", content).pop("schema", None) if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise unreadable(f"schema {schema!r}")
    try:
        return TypeAdapter(Ranges).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise unreadable(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None
