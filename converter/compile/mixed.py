"""Mixed precision within a search: where all layers together lose too much, the fewest that need it stay float."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from onnx_lathe.converter.compile.build import defect
from onnx_lathe.converter.compile.certify import Judge
from onnx_lathe.converter.compile.clock import OutOfTimeError
from onnx_lathe.converter.compile.forms import PRECISION, Candidate
from onnx_lathe.converter.compile.task import Task, Tried
from onnx_lathe.converter.progress import Progress
from onnx_lathe.converter.sensitivity import sensitivity
from onnx_lathe.converter.stages import model_digest
from onnx_lathe.passes import registry
from onnx_lathe.passes import run as passes_run
from onnx_lathe.passes.quantize.dynamic import QuantizeDynamic
from onnx_lathe.passes.quantize.mixture import Mixture, fewest_float
from onnx_lathe.passes.quantize.static import QuantizeStatic
from onnx_lathe.passes.request import Request
from onnx_lathe.runtime.errors import LatheError, UnsupportedModelError
from onnx_lathe.runtime.samples import Samples

_CODE = ("onnx_lathe.passes", "onnx_lathe.runtime", "onnx_lathe.benchmarks", "onnx_lathe.converter.sensitivity")
_Quantization = QuantizeStatic | QuantizeDynamic


def mixed_candidates(task: Task, tried: Sequence[Tried], judge: Judge, progress: Progress) -> list[Candidate]:
    """Return a mixed form of each kind of quantization of which every form was made and loses more than is allowed.

    Of a kind the form that loses least is taken. Its layers are ordered by what each costs alone; the prefix to keep
    float is found by judging joint models on the select part (`onnx_lathe.passes.quantize.mixture`).
    """
    if task.parts is None:
        return []
    found: list[Candidate] = []
    for kind in (QuantizeStatic, QuantizeDynamic):
        forms = [(item, item.certificate) for item in tried if isinstance(_last(item.candidate), kind)]
        judged = [(item, certificate) for item, certificate in forms if certificate is not None]
        if not judged or any(certificate.drop <= task.max_drop for _, certificate in judged):
            continue
        nearest = min(judged, key=lambda pair: pair[1].drop)[0].candidate
        try:
            mixture = _mixture(task, nearest, task.parts.calibrate, judge, progress)
        except (LatheError, OSError, OutOfTimeError):
            raise
        except Exception as error:  # noqa: BLE001 - told and logged: it must not cost the rest
            defect(f"mixing precisions in {nearest.name}", error)
            continue
        if mixture.certified:
            name = f"{nearest.name}, {len(mixture.exclude)} layers float"
            *before, last = registry.parse(_excluding(nearest, mixture.exclude))
            chosen = {**nearest.chosen, PRECISION: registry.spell(last)} if nearest.chosen else {}
            found.append(Candidate(name, nearest.base, registry.spell((*before, last)), chosen))
    return found


def _last(candidate: Candidate) -> Request | None:
    return registry.parse(candidate.passes)[-1] if candidate.passes else None


def _excluding(candidate: Candidate, names: Sequence[str]) -> str:
    *before, last = registry.parse(candidate.passes)
    quantization = cast(_Quantization, last)
    exclude = (*quantization.exclude, *names)
    return registry.spell((*before, dataclasses.replace(quantization, exclude=exclude)))


def _mixture(task: Task, candidate: Candidate, samples: Samples, judge: Judge, progress: Progress) -> Mixture:
    def make(folder: Path) -> Mixture:
        *before, last = registry.parse(candidate.passes)
        base = candidate.base
        if before:
            base = folder / "base.onnx"
            passes_run.apply(candidate.base, before, base, samples=samples)
        spelled = registry.spell(last)
        costs = sensitivity(base, samples, spelled, gain=True, threads=task.threads, progress=progress)
        names = [layer.layer for layer in costs.layers]
        return fewest_float(names, _certified(task, base, cast(_Quantization, last), samples, judge, progress))

    depends = {
        "model": model_digest(candidate.base),
        "passes": candidate.passes,
        "samples": samples.digest(),
        "select": judge.samples.digest(),
        "metric": judge.metric,
        "max_drop": task.max_drop,
        "provider": task.provider,
        "home": task.home,
        "threads": task.threads,
    }
    return task.cache.stage("mix", candidate.name, depends, _CODE, make, Mixture).value


def _certified(
    task: Task, base: Path, quantization: _Quantization, samples: Samples, judge: Judge, progress: Progress
) -> Callable[[Sequence[str]], bool]:
    """Return what says whether a joint model with some layers float loses no more than is allowed."""

    def certified(names: Sequence[str]) -> bool:
        progress(0, 1, f"judge a mixture with {len(names)} layers float")
        request = dataclasses.replace(quantization, exclude=(*quantization.exclude, *names))
        with tempfile.TemporaryDirectory(prefix="lathe-mixture-") as scratch:
            target = Path(scratch) / "model.onnx"
            try:
                passes_run.apply(base, [request], target, samples=samples)
            except UnsupportedModelError:
                # Nothing is left to quantize: that is the float model, which needs no search.
                return False
            return judge.certificate(judge.outputs(target)).drop <= task.max_drop

    return certified
