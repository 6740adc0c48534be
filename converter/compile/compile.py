"""``lathe compile``: any ``.onnx`` to the fastest form that keeps its accuracy here. Works without torch."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from onnx_lathe.benchmarks.report.model import Report
from onnx_lathe.benchmarks.report.render import render_html, render_markdown
from onnx_lathe.converter.compile.explain import Story, explain
from onnx_lathe.converter.compile.history import remembered
from onnx_lathe.converter.compile.search import search
from onnx_lathe.converter.compile.space import default_candidates
from onnx_lathe.converter.compile.task import Dims, Found, Parts, Task
from onnx_lathe.converter.data.files import load_samples
from onnx_lathe.converter.progress import Progress, silent
from onnx_lathe.converter.stages import locked, work_folder
from onnx_lathe.runtime import loading, providers, tensors
from onnx_lathe.runtime.bundle import check_replaceable, model_file, write_bundle
from onnx_lathe.runtime.samples import Samples

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
    """

    bundle: Path
    found: Found
    report: Report
    limit_missed: str | None

    def summary(self) -> dict[str, Any]:
        """Return the outcome for scripts, JSON-able."""
        winner = self.found.winner
        return {
            "bundle": str(self.bundle),
            "status": self.report.status,
            "winner": winner.candidate.name if winner else None,
            "reason": self.found.reason,
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
    provider: str = "cpu",
    threads: int | None = None,
    time_budget: float = 120.0,
    seed: int = 0,
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
        dims: The shapes to be fast at; the data's own shape, or one of small sizes, where there are none.
        provider: Where the model will run.
        threads: Threads of a session; None for all allowed cores.
        time_budget: Seconds that measuring may take in all.
        seed: Cuts the data.
        progress: Told what is being done.

    Raises:
        ModelFileError: Not an ONNX file, or a hostile one.
        SamplesError: The data is empty, ragged or does not fit the model.
        ProviderError: The provider is not there.
    """
    providers.resolve(provider)
    check_replaceable(output)
    original = model_file(model)
    loading.check_model_file(original)
    parts = _cut(original, data, eval_data, seed)
    work = work_folder(output)
    with locked(work):
        task = Task(
            original=original,
            candidates=default_candidates(original, parts is not None, provider),
            parts=parts,
            metric=metric,
            max_drop=max_drop,
            dims=tuple(dims) or ({},),
            provider=provider,
            threads=threads,
            time_budget=time_budget,
            folder=work,
        )
        found = search(task, progress)
        return ship(task, found, output, Story(title=original.stem, command=f"lathe compile {model.name}"))


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
    write_bundle(output, files, _manifest(found, story, report), {"provider": task.provider, "threads": task.threads})
    missed = report.reason if report.status == "uncertified" else None
    return Compiled(output, found, report, missed)


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
    if samples is None:
        return None
    if judged is None:
        return Parts(**samples.split(SHARES, seed))
    return Parts(calibrate=samples, **judged.split({"select": 0.5, "certify": 0.5}, seed))
