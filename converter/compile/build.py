"""Making forms: each pass a stage, so that what several forms begin with is made once."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from onnx_lathe.converter.compile.forms import Candidate
from onnx_lathe.converter.compile.space import unfit
from onnx_lathe.converter.compile.task import Task
from onnx_lathe.converter.progress import Progress
from onnx_lathe.converter.stages import model_digest
from onnx_lathe.passes import registry
from onnx_lathe.passes import run as passes_run
from onnx_lathe.passes.request import Request
from onnx_lathe.passes.run import Applied
from onnx_lathe.runtime import loading, tensors
from onnx_lathe.runtime.bundle import file_digest
from onnx_lathe.runtime.errors import LatheError, OutputError
from onnx_lathe.runtime.tensors import TensorSpec

_CODE = ("onnx_lathe.passes", "onnx_lathe.runtime", "onnx_lathe.converter.compile.build")
MODEL = "model.onnx"
DRAFT_SAMPLES = 8
"""That a draft is calibrated with: which ranges it has does not change how fast it is."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What became of one pass.

    Attributes:
        applied: What it did; empty where it was refused.
        digest: Of the model that it made; None where it changed nothing or was refused.
        refusal: Why there is no model.
    """

    applied: tuple[Applied, ...] = ()
    digest: str | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class Built:
    """A form that was made, or why it was not.

    Attributes:
        model: Its file; None where it could not be made.
        digest: Of the file and of the weights beside it.
        applied: What each pass did.
        refusal: Why it could not be made.
        changed: Whether it differs from the model that its passes started from.
    """

    model: Path | None
    digest: str
    applied: tuple[Applied, ...] = ()
    refusal: str | None = None
    changed: bool = True


def build(task: Task, candidate: Candidate, progress: Progress, *, draft: bool = False) -> Built:
    """Make a form, or find it in the cache. What a pass refuses is a reason here, not an error, and so
    is a defect of a pass: one form must not cost the others.

    Args:
        task: What is searched for.
        candidate: The form.
        progress: Told what is done.
        draft: Whether it is only timed, never shipped: it is calibrated with few samples, and its oracles do not run.

    Raises:
        OutputError: There is no room for it.
    """
    if reason := unfit(candidate, task.provider):
        return Built(None, "", refusal=reason)
    model, digest = candidate.base, model_digest(candidate.base)
    applied: list[Applied] = []
    for request in registry.parse(candidate.passes) if candidate.passes else ():
        progress(0, 1, f"{candidate.name}: {registry.spell(request)}")
        folder, step = _apply(task, model, digest, request, draft=draft)
        applied += step.applied
        if step.refusal is not None:
            return Built(None, "", tuple(applied), step.refusal)
        if step.digest is not None:
            model, digest = folder / MODEL, step.digest
    changed = model != candidate.base or not candidate.passes
    if model != candidate.base and (reason := _other_interface(candidate.base, model)):
        return Built(None, "", tuple(applied), reason)
    return Built(model, digest, tuple(applied), changed=changed)


def _apply(task: Task, model: Path, digest: str, request: Request, *, draft: bool) -> tuple[Path, Step]:
    calibrate = task.parts.calibrate if task.parts else None
    if calibrate is not None and draft:
        calibrate = calibrate.first(DRAFT_SAMPLES)
    text = registry.spell(request)

    def make(folder: Path) -> Step:
        target = folder / MODEL
        try:
            # With data a form is judged against the original: a large one need not be run for each of its passes.
            alone = task.parts is None
            (applied,) = passes_run.apply(
                model, [request], target, samples=calibrate, checked=not draft, large_whole=alone
            )
            made = model_digest(target) if applied.changed else None
        except (OutputError, OSError):
            raise
        except LatheError as error:
            return Step(refusal=str(error))
        except Exception as error:
            raise _DefectError(defect(request.maker, error)) from error
        if made is not None:
            return Step((applied,), made)
        # It is the model before, which is kept already.
        for file in (target, *loading.external_files(target)):
            file.unlink()
        return Step((applied,))

    depends = {
        "model": digest,
        "pass": text,
        "samples": task.parts.calibrate_digest if task.parts else None,
        "files": _files(request),
        "draft": draft,
    }
    try:
        stage = task.cache.stage("apply", text, depends, _CODE, make, Step)
    except _DefectError as error:
        return model, Step(refusal=str(error))
    return stage.folder, stage.value


class _DefectError(Exception):
    """A pass failed as it never should; unlike a refusal that is not kept in the cache."""


def defect(maker: str, error: Exception) -> str:
    """Return what to tell of an exception that ``maker`` never should raise, and log it with its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = (
        f"This is a defect of {maker}: {type(error).__name__}: {error}{where}. Please report it with the model; "
        "the search goes on without it."
    )
    _LOG.warning(text, exc_info=error)
    return text


def _files(request: Request) -> dict[str, str | None]:
    """Return the digests of the files that a request reads, such as one of ranges; None where one is not there yet."""
    fields: dict[str, Any] = asdict(request) if is_dataclass(request) else {}
    paths = {name: Path(value) for name, value in fields.items() if name.endswith("_file") and value}
    return {name: file_digest(path) if path.is_file() else None for name, path in paths.items()}


def _other_interface(base: Path, model: Path) -> str | None:
    """Return what of the inputs and outputs is not as users of the original know it; None where all is."""
    before, after = (loading.read_skeleton(path) for path in (base, model))
    for kind, specs in (("input", tensors.input_specs), ("output", tensors.output_specs)):
        was, now = specs(before, str(base)), specs(after, str(model))
        if [each.name for each in was] != [each.name for each in now]:
            return f"Its {kind}s are {_names(now)}; the original's are {_names(was)}."
        for one, other in zip(was, now, strict=True):
            if not _stays(one, other):
                return (
                    f"Its {kind} {one.name} is {other.dtype} {list(other.shape)}; "
                    f"the original's is {one.dtype} {list(one.shape)}."
                )
    return None


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(spec.name for spec in specs)


def _stays(was: TensorSpec, now: TensorSpec) -> bool:
    """Say whether a tensor is declared as before; where nothing was known of a dimension something may be now."""
    if was.dtype != now.dtype:
        return False
    if not was.shape:
        return True
    return len(was.shape) == len(now.shape) and all(
        one is None or one == other for one, other in zip(was.shape, now.shape, strict=True)
    )
