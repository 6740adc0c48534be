"""The loop between edits: plan, apply, check against the oracle, say what was refused."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_lathe.passes import files, registry
from onnx_lathe.passes.edit import Edit, Refusal
from onnx_lathe.passes.oracle import Check
from onnx_lathe.passes.request import Request, Score
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.errors import OracleError
from onnx_lathe.runtime.samples import Samples
from onnx_lathe.runtime.staged import folder_beside

CHECK_SAMPLES = 4
"""Samples that the oracle runs: it compares arithmetic with arithmetic, so a few suffice."""

WHOLE_MODEL_BYTES = 2**29
"""Weights up to this many bytes are run whole by the oracle, before and after the edit."""


@dataclass(frozen=True)
class Applied:
    """What one request did to the graph.

    Attributes:
        request: The request as text.
        changed: Whether the serialized graph differs.
        plan: What was decided, as JSON.
        refused: What was left alone, and why.
        checks: The comparisons with the oracle; empty where nothing changed.
        seconds: Planning, editing, writing and checking together.
    """

    request: str
    changed: bool
    plan: Mapping[str, Any]
    refused: Sequence[Refusal]
    checks: Sequence[Check]
    seconds: float


def apply(
    source: Path,
    requests: Sequence[Request],
    output: Path,
    *,
    samples: Samples | None = None,
    score: Score | None = None,
    on_start: Callable[[str], None] = lambda _: None,
    checked: bool = True,
    large_whole: bool = True,
) -> tuple[Applied, ...]:
    """Apply ``requests`` in order to the model at ``source`` and write ``output``, whole or not at all.

    Args:
        source: An ``.onnx`` file.
        requests: What to do, in order.
        output: The file to write.
        samples: Calibration data, also what the oracle runs; without it the oracle runs random inputs.
        score: Judges a candidate file, for requests that search.
        on_start: Called with each request's text before it starts.
        checked: Whether edits are compared with their oracle; not for a draft that is timed and thrown away.
        large_whole: Whether a model over `WHOLE_MODEL_BYTES` is run whole where an edit has no oracle for parts of it;
            not where whoever asks compares the answers with the original's on data of his own.

    Raises:
        UnsupportedModelError: A request can do nothing to this model.
        OracleError: An edit computed something else than it must; nothing is written.
    """
    done: list[Applied] = []
    with folder_beside(output) as folder:
        current = source
        for number, request in enumerate(requests):
            on_start(registry.spell(request))
            target = folder / f"{number}" / output.name
            applied = _apply_one(current, request, target, samples, score, checked=checked, large_whole=large_whole)
            current = target if applied.changed else current
            done.append(applied)
        if current == source:
            files.save(files.load(current), output)
        else:
            files.move(current, output)
    return tuple(done)


def _apply_one(
    source: Path,
    request: Request,
    target: Path,
    samples: Samples | None,
    score: Score | None,
    *,
    checked: bool,
    large_whole: bool,
) -> Applied:
    start = time.perf_counter()
    model = files.load(source)
    edit = request.plan(model, samples, score)
    changed = edit(model).modified
    checks: Sequence[Check] = ()
    if changed:
        files.save(model, target)
        checks = _check(edit, source, target, samples, large_whole=large_whole) if checked else ()
        for check in checks:
            if not check.passed:
                shutil.rmtree(target.parent)
                raise OracleError(
                    f"{registry.spell(request)} on {source.name}, at {check.where}",
                    got=f"{check.measured:.3g} {check.unit} ({check.what}, {check.scope})",
                    expected=f"{'at least' if check.unit == 'dB' else 'at most'} {check.limit:.3g}",
                    mend=f"This is a defect of {request.maker}: please report it with the model; leave the pass out "
                    "meanwhile.",
                )
    return Applied(
        request=registry.spell(request),
        changed=changed,
        plan=edit.describe(),
        refused=edit.refused,
        checks=checks,
        seconds=time.perf_counter() - start,
    )


def _check(edit: Edit, source: Path, target: Path, samples: Samples | None, *, large_whole: bool) -> Sequence[Check]:
    """Compare with the oracle: the whole model, or where that would take too much memory such parts as the edit can."""
    if files.weight_bytes(source) > WHOLE_MODEL_BYTES:
        parts = edit.check_parts(source, target)
        if parts is not None or not large_whole:
            return parts or ()
    return edit.check(source, target, tensors.first_batch(source, samples, CHECK_SAMPLES))
