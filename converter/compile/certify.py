"""Judging candidates against their original on the same samples."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from onnx_lathe.benchmarks.accuracy import default_metric, judge, predict
from onnx_lathe.benchmarks.evaluation import Evaluation, evaluate
from onnx_lathe.benchmarks.result import Certificate
from onnx_lathe.converter.compile.task import Task
from onnx_lathe.converter.progress import Progress
from onnx_lathe.converter.stages import model_digest
from onnx_lathe.runtime.samples import Array, Samples
from onnx_lathe.runtime.session import Session

PREDICT_BATCH = 32
"""Samples in a batch where the model leaves the batch open."""
SELECT_SHARE = 0.03
"""Of the time budget that running the original once over what candidates are chosen on may take."""
LEAST_SELECT = 16
"""Samples that candidates are chosen on, where there are so many, however long that takes."""
_CODE = ("onnx_lathe.benchmarks", "onnx_lathe.runtime", "onnx_lathe.converter.compile.certify")


class Judge:
    """Gives certificates to candidates of one original, on one part of the data.

    Args:
        original: The model that candidates must keep up with.
        samples: The part of the data to judge on.
        metric: A metric of `onnx_lathe.benchmarks.accuracy`, or None for the one that fits the data.
        max_drop: The budget on 0..1.
        provider: Where the models run.
        threads: Threads of a session; None for all allowed cores.
        home: Where the original runs; None for where the others do.
    """

    def __init__(
        self,
        original: Path,
        samples: Samples,
        metric: str | None,
        max_drop: float,
        provider: str,
        threads: int | None,
        home: str | None = None,
    ) -> None:
        self.original = original
        self.samples = samples
        self._metric = metric
        self._max_drop = max_drop
        self._provider = provider
        self._threads = threads
        self._home = home or provider
        self._original_outputs: Mapping[str, Array] | None = None

    @property
    def original_outputs(self) -> Mapping[str, Array]:
        """What the original answers."""
        return self.outputs(self.original)

    @cached_property
    def samples_digest(self) -> str:
        """The digest of the samples."""
        return self.samples.digest()

    @cached_property
    def metric(self) -> str:
        """The name of the metric."""
        return self._metric or default_metric(self.samples, self.original_outputs)

    def outputs(self, model: Path, progress: Progress | None = None) -> Mapping[str, Array]:
        """Run ``model`` over the samples, the original once, and return its outputs, samples along the first axis."""
        if model != self.original:
            return self._run(model, progress)
        if self._original_outputs is None:
            self._original_outputs = self._run(model, progress)
        return self._original_outputs

    def _run(self, model: Path, progress: Progress | None) -> Mapping[str, Array]:
        provider = self._home if model == self.original else self._provider
        session = Session(model, provider=provider, threads=self._threads)
        fixed = session.inputs[0].shape[0] if session.inputs[0].shape else None

        def tell(done: int, total: int) -> None:
            if progress is not None:
                progress(done, total, f"judge {model.name}")

        return predict(session.run, self.samples, fixed if isinstance(fixed, int) else PREDICT_BATCH, tell)

    def certificate(self, outputs: Mapping[str, Array]) -> Certificate:
        """Compare a candidate's ``outputs`` with the original's, sample by sample."""
        return judge(self.metric, self.original_outputs, outputs, self.samples, self._max_drop)

    def evaluation(self, outputs: Mapping[str, Array]) -> Evaluation:
        """Tell what else differs between a candidate's ``outputs`` and the original's."""
        return evaluate(self.original_outputs, outputs, self.samples)


def judge_of(task: Task, samples: Samples) -> Judge:
    """Return the judge of a task on ``samples``."""
    return Judge(task.original, samples, task.metric, task.max_drop, task.provider, task.threads, task.home)


def select_judge(task: Task) -> Judge:
    """Return the judge whom forms are chosen by: on so much of the select part as the time budget has room for."""
    assert task.parts is not None, "who judges has data"
    samples = task.parts.select
    if not task.axes:  # a list that was given is judged whole, whatever that takes
        return judge_of(task, samples)

    def make(folder: Path) -> int:
        del folder
        few = samples.first(PREDICT_BATCH)
        judge = judge_of(task, few)
        began = time.monotonic()
        judge.outputs(task.original)
        each = (time.monotonic() - began) / len(few)
        return min(len(samples), max(LEAST_SELECT, int(SELECT_SHARE * task.time_budget / each)))

    depends = {
        "model": model_digest(task.original),
        "samples": samples.digest(),
        "home": task.home,
        "threads": task.threads,
        "seconds": task.time_budget,
    }
    count = task.cache.stage("pace", task.original_name, depends, _CODE, make, int).value
    chosen = samples.take(np.unique(np.linspace(0, len(samples) - 1, count).round().astype(int)))
    return judge_of(task, chosen)


@dataclass(frozen=True)
class Judged:
    """What a judge says of a candidate.

    Attributes:
        certificate: How it compares with the original.
        evaluation: What else differs; None where that was not asked for.
    """

    certificate: Certificate
    evaluation: Evaluation | None = None


def judged(task: Task, judge: Judge, name: str, model: Path, progress: Progress, *, beyond: bool = False) -> Judged:
    """Return how a candidate compares with the original, as one stage.

    Args:
        task: What is searched for.
        judge: Has the samples.
        name: Of the candidate.
        model: Its file.
        progress: Told how far it is.
        beyond: Whether to tell what else differs.

    Raises:
        LatheError: The candidate cannot be run, or its outputs cannot be judged.
    """

    def make(folder: Path) -> Judged:
        del folder
        outputs = judge.outputs(model, lambda done, total, _: progress(done, total, f"judge {name}"))
        return Judged(judge.certificate(outputs), judge.evaluation(outputs) if beyond else None)

    depends = {
        "models": [model_digest(task.original), model_digest(model)],
        "samples": judge.samples_digest,
        "metric": task.metric,
        "max_drop": task.max_drop,
        "provider": task.provider,
        "home": task.home,
        "threads": task.threads,
        "beyond": beyond,
    }
    return task.cache.stage("judge", name, depends, _CODE, make, Judged).value
