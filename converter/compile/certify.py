"""Judging candidates against their original on the same samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from onnx_lathe.benchmarks.accuracy import default_metric, judge, predict
from onnx_lathe.benchmarks.evaluation import Evaluation, evaluate
from onnx_lathe.benchmarks.result import Certificate
from onnx_lathe.runtime.samples import Array, Samples
from onnx_lathe.runtime.session import Session

PREDICT_BATCH = 32
"""Samples in a batch where the model leaves the batch open."""


class Judge:
    """Gives certificates to candidates of one original, on one part of the data.

    Args:
        original: The model that candidates must keep up with.
        samples: The part of the data to judge on.
        metric: A metric of `onnx_lathe.benchmarks.accuracy`, or None for the one that fits the data.
        max_drop: The budget on 0..1.
        provider: Where the models run.
        threads: Threads of a session; None for all allowed cores.
    """

    def __init__(
        self,
        original: Path,
        samples: Samples,
        metric: str | None,
        max_drop: float,
        provider: str,
        threads: int | None,
    ) -> None:
        self.samples = samples
        self._max_drop = max_drop
        self._provider = provider
        self._threads = threads
        self.original_outputs = self.outputs(original)
        self.metric = metric or default_metric(samples, self.original_outputs)

    def outputs(self, model: Path) -> Mapping[str, Array]:
        """Run ``model`` over the samples and return its outputs, samples along the first axis."""
        session = Session(model, provider=self._provider, threads=self._threads)
        fixed = session.inputs[0].shape[0] if session.inputs[0].shape else None
        return predict(session.run, self.samples, fixed if isinstance(fixed, int) else PREDICT_BATCH)

    def certificate(self, outputs: Mapping[str, Array]) -> Certificate:
        """Compare a candidate's ``outputs`` with the original's, sample by sample."""
        return judge(self.metric, self.original_outputs, outputs, self.samples, self._max_drop)

    def evaluation(self, outputs: Mapping[str, Array]) -> Evaluation:
        """Tell what else differs between a candidate's ``outputs`` and the original's."""
        return evaluate(self.original_outputs, outputs, self.samples)
