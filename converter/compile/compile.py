"""``lathe compile``: any ``.onnx`` to the fastest form that keeps its accuracy here. Works without torch."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from onnx_lathe.benchmarks.metrics import find_metric
from onnx_lathe.benchmarks.report.model import Report
from onnx_lathe.benchmarks.report.render import render_html, render_markdown
from onnx_lathe.converter.compile.explain import Story, explain
from onnx_lathe.converter.compile.front import front
from onnx_lathe.converter.compile.history import remembered
from onnx_lathe.converter.compile.home import at_home
from onnx_lathe.converter.compile.playoff import play_off
from onnx_lathe.converter.compile.search import search
from onnx_lathe.converter.compile.space import AXES, VISITED, first_forms
from onnx_lathe.converter.compile.task import Found, Parts, Task, shipped_provider
from onnx_lathe.converter.data.files import load_samples
from onnx_lathe.converter.progress import Progress, silent
from onnx_lathe.converter.stages import locked, work_folder
from onnx_lathe.converter.workload import Dims
from onnx_lathe.runtime import loading, providers, tensors
from onnx_lathe.runtime.bundle import SessionOptions, check_replaceable, model_file, write_bundle
from onnx_lathe.runtime.errors import InputError, LatheError
from onnx_lathe.runtime.samples import Samples

TIME_BUDGET = 150.0
"""Seconds of a search: a network of twenty million parameters is compiled for one shape within three minutes."""
SHARES = {"calibrate": 0.2, "select": 0.4, "certify": 0.4}
"""How data is cut where one file serves everything."""


@dataclass(frozen=True)
class Compiled:
    """What a compilation made.

    Attributes:
        bundle: The folder of the bundle.
        found: The search with everything it tried.
        report: What the bundle's report says.
        limit_missed: What the user asked for and the result misses; None where all was kept (exit status 3 otherwise).
        front: The names of the forms of which none is both faster and nearer to the original, the fastest first.
    """

    bundle: Path
    found: Found
    report: Report
    limit_missed: str | None
    front: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Return the outcome for scripts, JSON-able."""
        winner = self.found.winner
        return {
            "bundle": str(self.bundle),
            "status": self.report.status,
            "winner": winner.candidate.name if winner else None,
            "reason": self.found.reason,
            "front": self.front,
            "certificate": self.found.certificates.get(winner.candidate.name) if winner else None,
            "comparisons": [measurement.comparisons for measurement in self.found.measurements],
        }


def compile(
    model: Path,
    output: Path,
    *,
    data: Path | Samples | None = None,
    eval_data: Path | Samples | None = None,
    max_drop: float = 0.01,
    metric: str | None = None,
    dims: Sequence[Dims] = (),
    weights: Sequence[float] = (),
    provider: str | Sequence[str] = "cpu",
    threads: int | None = None,
    time_budget: float = TIME_BUDGET,
    seed: int = 0,
    pick: str | None = None,
    cache: Path | None = None,
    progress: Progress = silent,
) -> Compiled:
    """Find the fastest form of ``model`` that keeps its accuracy, and write it as a bundle with its report.

    Args:
        model: An ``.onnx`` file or a bundle.
        output: The folder of the bundle.
        data: Samples; cut by seed and sample hash into calibrate, select and certify. Without it only exact rewrites
            are tried, and accuracy is not judged.
        eval_data: Samples to select and certify on instead.
        max_drop: How much of the metric (0..1) may be lost, by the one-sided 95 % bound.
        metric: None for accuracy where there are labels, else agreement with the original.
        dims: The shapes to be fast at. Where there are none it is that of the data: their batches as they come where
            those differ, else one sample; without data one of small sizes.
        weights: How much each of ``dims`` counts, in the geometric mean of speeds that decides; all alike where there
            are none.
        provider: Where the model will run, or several of them, of which the fastest is taken; "all" for all there are.
            Where one does not take the original whole, its forms are compared with the original on the CPU.
        threads: Threads of a session; None for all allowed cores.
        time_budget: Seconds that making, judging and measuring forms may take in all, for each provider. The final
            measurement takes three fresh processes of original and winner however short it is.
        seed: Cuts the data.
        pick: A form to ship whatever is faster, by the name that an earlier report gives it.
        cache: Where what is made and measured is kept for the next time; ``.work/cache`` beside the output where none
            is given.
        progress: Told what is being done.

    Raises:
        ModelFileError: Not an ONNX file, a hostile one, or one that does not run.
        SamplesError: The data is empty, ragged or does not fit the model.
        TensorError: The data or ``dims`` do not fit the model.
        ProviderError: A provider is not there, or runs nothing.
        InputError: ``metric`` is unknown, ``weights`` or ``time_budget`` are out of range, or ``pick`` names no form.
    """
    names = _providers(provider)
    check_replaceable(output)
    original = model_file(model)
    loading.check_model_file(original)
    _check(original, dims, weights, metric, time_budget)
    parts = _cut(original, data, eval_data, seed)
    measured = eval_data if eval_data is not None else data
    work = work_folder(output)
    task = Task(
        original=original,
        candidates=(),
        parts=parts,
        metric=metric,
        max_drop=max_drop,
        dims=tuple(dims) or ({},),
        provider=names[0],
        threads=threads,
        time_budget=time_budget,
        folder=work,
        axes=AXES,
        visited=VISITED,
        weights=tuple(weights),
        measured=load_samples(measured) if isinstance(measured, Path) else measured,
        pick=pick,
        cache_folder=cache or work.parent / "cache",
    )
    with locked(work), task.cache.in_use():
        task, found = _search_each(task, names, progress)
        return ship(task, found, output, Story(title=original.stem, command=f"lathe compile {model.name}"))


def _search_each(task: Task, names: Sequence[str], progress: Progress) -> tuple[Task, Found]:
    """Search for each provider and return the fastest outcome; one for which none succeeds is told and left."""
    searches: list[tuple[Task, Found]] = []
    failed: list[LatheError] = []
    for name in names:
        candidates = first_forms(task.original, task.parts is not None, name)
        try:
            each = at_home(replace(task, provider=name, candidates=candidates))
            searches.append((each, search(each, progress)))
        except LatheError as error:
            failed.append(error)
    if not searches:
        raise failed[0]
    chosen, found = play_off(searches, progress)
    return chosen, replace(found, notes=(*found.notes, *(f"Left out: {error}" for error in failed)))


def _providers(asked: str | Sequence[str]) -> list[str]:
    """Return the users' names of the providers to search for, each once."""
    names = [asked] if isinstance(asked, str) else list(asked)
    if "all" in names:
        names = list(providers.available())
    return list(dict.fromkeys(providers.user_name(providers.resolve(name)) for name in names or ["cpu"]))


def _check(model: Path, dims: Sequence[Dims], weights: Sequence[float], metric: str | None, time_budget: float) -> None:
    """Refuse what cannot be, before anything is made."""
    specs = tensors.input_specs(loading.read_skeleton(model), str(model))
    for each in dims:
        tensors.bind_dims(specs, each)
    if metric is not None:
        find_metric(metric)
    if weights and (len(weights) != len(dims) or not all(0.0 < weight < math.inf for weight in weights)):
        raise InputError(
            "weights",
            got=f"{list(weights)} for {len(dims)} shapes",
            expected="a positive number for each shape",
            mend="Write --dims batch=1,seq=32@3 for a shape that counts three times.",
        )
    if not 0.0 < time_budget < math.inf:
        raise InputError(
            "time budget",
            got=f"{time_budget:g} seconds",
            expected="a positive number of seconds",
            mend=f"Leave it out for {TIME_BUDGET:g}.",
        )


def ship(task: Task, found: Found, output: Path, story: Story) -> Compiled:
    """Write the bundle of a finished search: the winner, or the original where nothing pays, with the report."""
    winner = found.winner
    model = winner.model if winner and winner.model else task.original
    report = explain(task, found, story)
    past, doubts = remembered(task, found)
    report = replace(report, history=past, warnings=(*report.warnings, *doubts))
    rendered = {
        "report.html": render_html(report),
        "report.md": render_markdown(report),
        "report.json": report.to_json(),
    }
    for name, text in rendered.items():
        (task.folder / name).write_text(text, encoding="utf-8")
    files = {"model.onnx": model, **{path.name: path for path in loading.external_files(model)}}
    files |= {name: task.folder / name for name in rendered}
    session: SessionOptions = {"provider": shipped_provider(task, found), "threads": task.threads}
    write_bundle(output, files, _manifest(found, story, report), session)
    missed = report.reason if report.status == "uncertified" else None
    points = tuple(item.candidate.name for item in front(task, found.tried))
    return Compiled(output, found, report, missed, points)


def _manifest(found: Found, story: Story, report: Report) -> dict[str, Any]:
    """Return what the bundle records of its making; the raw samples lie in ``report.json``."""
    winner = found.winner
    content: dict[str, Any] = {
        "title": story.title,
        "command": story.command,
        "version": importlib.metadata.version("onnx-lathe"),
        "passes": winner.candidate.passes if winner else "",
        "status": report.status,
        "reason": found.reason,
        "certificate": found.certificates.get(winner.candidate.name) if winner else None,
        "comparisons": [measurement.comparisons for measurement in found.measurements],
        "environment": found.measurements[0].environment if found.measurements else {},
        **story.manifest,
    }
    return TypeAdapter(dict[str, Any]).dump_python(content, mode="json")


def _cut(model: Path, data: Path | Samples | None, eval_data: Path | Samples | None, seed: int) -> Parts | None:
    samples = load_samples(data) if isinstance(data, Path) else data
    judged = load_samples(eval_data) if isinstance(eval_data, Path) else eval_data
    for given in filter(None, (samples, judged)):
        tensors.first_batch(model, given, 1)
        for batch in given.batches:
            tensors.first_batch(model, Samples((batch,), source=given.source), 1)
    if samples is None:
        return None
    if judged is None:
        return Parts(**samples.split(SHARES, seed))
    return Parts(calibrate=samples, **judged.split({"select": 0.5, "certify": 0.5}, seed))
