"""Has a model become slower than it may? Against a model measured in the same run, or against a recorded result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from onnx_lathe.benchmarks import canary, environment
from onnx_lathe.benchmarks.limits import ModelRoofline
from onnx_lathe.benchmarks.result import Interval, Measurement, Timing
from onnx_lathe.benchmarks.stats import shift
from onnx_lathe.benchmarks.suite import Case, Conditions, Suite
from onnx_lathe.runtime.errors import InputError

Outcome = Literal["kept", "regressed", "inconclusive"]
"""Of a limit; what is not shown to be kept does not pass."""


@dataclass(frozen=True)
class OperatorChange:
    """What the nodes of one operator took before and take now, in seconds a run under the profiler."""

    op_type: str
    before: float
    now: float


@dataclass(frozen=True)
class Gate:
    """One model in one case, against its baseline.

    Attributes:
        case: The conditions in words.
        model: The model judged.
        baseline: What it is compared with.
        slowdown: Share by which it is slower (0.05: 5 %; negative: faster) with its 95 % interval.
        outcome: "kept": the interval lies within the limit. "regressed": it lies beyond. Else "inconclusive".
        reason: Why.
        operators: Where the time went, the largest change first; empty where there is no profile of both.
    """

    case: str
    model: str
    baseline: str
    slowdown: Interval
    outcome: Outcome
    reason: str
    operators: tuple[OperatorChange, ...] = ()


def gate_measured(suite: Suite, limit: float) -> tuple[Gate, ...]:
    """Judge every model against the first of the same interleaved run.

    Args:
        suite: The baseline's model is its first.
        limit: The share by which a model may be slower.
    """
    gates: list[Gate] = []
    for case in suite.cases:
        for comparison in case.measurement.comparisons:
            speed = comparison.speed
            slowdown = Interval(1.0 / speed.value - 1.0, 1.0 / speed.high - 1.0, 1.0 / speed.low - 1.0)
            outcome, reason = _decide(slowdown, limit, _unsteady(case.measurement))
            changes = operator_changes(case.roofline(comparison.against), case.roofline(comparison.name))
            gates.append(
                Gate(case.title, comparison.name, comparison.against, slowdown, outcome, reason, changes),
            )
    return tuple(gates)


def gate_recorded(baseline: Suite, suite: Suite, limit: float, *, anywhere: bool = False) -> tuple[Gate, ...]:
    """Judge every model against the same one of an earlier result.

    The medians of fresh processes of two runs are compared (`shift`); a machine whose clock or load differs from
    that of the baseline, by the canary, makes the outcome inconclusive. A baseline measured in the same run tells more.

    Args:
        baseline: The earlier result.
        suite: The result judged.
        limit: The share by which a model may be slower.
        anywhere: Compare results of unlike environments too.

    Raises:
        InputError: The environments differ, or the baseline lacks a model or a case.
    """
    if not anywhere:
        check_environment(baseline, suite.cases[0].measurement.environment)
    names = _pairs(baseline, [model.name for model in suite.models])
    gates: list[Gate] = []
    for case in suite.cases:
        then = _same_case(baseline, case.conditions)
        for name, before in names.items():
            found = slowdown(then.measurement.timing(before), case.measurement.timing(name))
            outcome, reason = _decide(found, limit, apart(then.measurement, case.measurement))
            changes = operator_changes(then.roofline(before), case.roofline(name))
            source = f"{before} of {baseline.taken}"
            gates.append(Gate(case.title, name, source, found, outcome, reason, changes))
    return tuple(gates)


def operator_changes(before: ModelRoofline | None, now: ModelRoofline | None) -> tuple[OperatorChange, ...]:
    """Return the time of each operator in two profiles, the largest change first; nothing without both."""
    if before is None or now is None:
        return ()
    then, later = _by_operator(before), _by_operator(now)
    changes = [OperatorChange(kind, then.get(kind, 0.0), later.get(kind, 0.0)) for kind in {**then, **later}]
    return tuple(sorted(changes, key=lambda change: abs(change.now - change.before), reverse=True))


def _by_operator(roofline: ModelRoofline) -> Mapping[str, float]:
    total: dict[str, float] = defaultdict(float)
    for share in roofline.shares:
        total[share.op_type] += share.seconds
    return total


def _decide(slowdown: Interval, limit: float, doubt: str | None) -> tuple[Outcome, str]:
    if doubt is not None:
        return "inconclusive", doubt
    if slowdown.high <= limit:
        most = f"at most {slowdown.high:.1%} slower" if slowdown.high >= 0 else f"at least {-slowdown.high:.1%} faster"
        return "kept", f"{most}, with 95 % confidence"
    if slowdown.low > limit:
        return "regressed", f"at least {slowdown.low:.1%} slower, with 95 % confidence"
    return (
        "inconclusive",
        f"from {slowdown.low:.1%} to {slowdown.high:.1%} slower, which holds the limit: measure longer",
    )


def _unsteady(measurement: Measurement) -> str | None:
    drifted = canary.drift(measurement.canary)
    return f"the machine drifted by {drifted:.1%} while it was measured" if drifted > canary.MAX_DRIFT else None


def apart(then: Measurement, now: Measurement) -> str | None:
    """Return why two runs cannot be compared; None where they can."""
    for when, measurement in (("the baseline", then), ("this run", now)):
        drifted = canary.drift(measurement.canary)
        if drifted > canary.MAX_DRIFT:
            return f"the machine drifted by {drifted:.1%} during {when}"
    ratio = float(np.median(now.canary) / np.median(then.canary))
    if max(ratio, 1.0 / ratio) > 1.0 + canary.MAX_DRIFT:
        return f"a fixed kernel takes {ratio:.2f} times what it took in the baseline: the machine is not in that state"
    return None


def slowdown(before: Timing, now: Timing) -> Interval:
    """Return the share by which ``now`` is slower, from the medians of fresh processes of two runs (`shift`)."""
    medians = [[float(np.log(np.median(np.concatenate(p)))) for p in timing.blocks] for timing in (now, before)]
    found = shift(medians[0], medians[1])
    return Interval(*(float(np.expm1(part)) for part in (found.value, found.low, found.high)))


def check_environment(baseline: Suite, here: Mapping[str, Any]) -> None:
    """Refuse a baseline that was measured elsewhere.

    Raises:
        InputError: What differs between its environment and ``here``.
    """
    unlike = environment.differs(baseline.cases[0].measurement.environment, here)
    if unlike:
        raise InputError(
            f"baseline of {baseline.taken}",
            got=f"another environment ({'; '.join(unlike)})",
            expected="the one of this run",
            mend="Measure the baseline again here, give its model instead of its result, or say --across-environments.",
        )


def check_covers(baseline: Suite, models: Sequence[str], conditions: Sequence[Conditions]) -> None:
    """Refuse, before anything is measured, a baseline that lacks a model or a case of what is to be measured.

    Raises:
        InputError: It lacks one.
    """
    _pairs(baseline, models)
    for each in conditions:
        _same_case(baseline, each)


def _pairs(baseline: Suite, here: Sequence[str]) -> dict[str, str]:
    """Return for each model the one of the baseline: of the same name, else the only one."""
    there = [model.name for model in baseline.models]
    if len(there) == len(here) == 1:
        return {here[0]: there[0]}
    missing = [name for name in here if name not in there]
    if missing:
        raise InputError(
            f"baseline of {baseline.taken}",
            got=f"results of {', '.join(there)}",
            expected=f"also of {missing[0]}",
            mend="Bench the models of the baseline, or measure it again.",
        )
    return {name: name for name in here}


def _same_case(baseline: Suite, conditions: Conditions) -> Case:
    for then in baseline.cases:
        if then.conditions == conditions:
            return then
    raise InputError(
        f"baseline of {baseline.taken}",
        got=f"cases {'; '.join(then.title for then in baseline.cases)}",
        expected=conditions.title,
        mend="Bench the shapes, threads and provider of the baseline, or measure it again.",
    )
