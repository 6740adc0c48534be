"""``lathe compare``: is B as good as A, on the same samples?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx_lathe.benchmarks.evaluation import Evaluation
from onnx_lathe.benchmarks.result import Certificate
from onnx_lathe.converter.compile.certify import Judge
from onnx_lathe.converter.data.files import load_samples
from onnx_lathe.runtime.bundle import model_file
from onnx_lathe.runtime.facts import GraphFacts, read_facts
from onnx_lathe.runtime.parity import sqnr_db
from onnx_lathe.runtime.samples import Samples


@dataclass(frozen=True)
class ModelComparison:
    """What differs between two models.

    Attributes:
        certificate: The metric of both, paired by sample, with the bound of the drop.
        sqnr: Signal-to-quantization-noise ratio of each output of B against A in dB.
        evaluation: What else differs: precision, recall, calibration, flips, by class; or errors, or distances.
        facts: Parameters, MACs, size and operators of A and of B.
    """

    certificate: Certificate
    sqnr: Mapping[str, float]
    evaluation: Evaluation
    facts: tuple[GraphFacts, GraphFacts]


def compare(
    a: Path,
    b: Path,
    data: Path | Samples,
    *,
    metric: str | None = None,
    max_drop: float = 0.01,
    provider: str = "cpu",
    threads: int | None = None,
) -> ModelComparison:
    """Judge ``b`` against ``a`` on the same samples.

    Args:
        a: The original, an ``.onnx`` file or a bundle.
        b: The candidate.
        data: The samples, or the file that holds them.
        metric: None for the one that fits the data.
        max_drop: The budget on 0..1 that the certificate is held against.
        provider: Where both run.
        threads: Threads of a session; None for all allowed cores.
    """
    samples = load_samples(data) if isinstance(data, Path) else data
    first, second = model_file(a), model_file(b)
    judge = Judge(first, samples, metric, max_drop, provider, threads)
    outputs = judge.outputs(second)
    wanted = judge.original_outputs
    return ModelComparison(
        certificate=judge.certificate(outputs),
        sqnr={name: sqnr_db(wanted[name], outputs[name]) for name in wanted if name in outputs},
        evaluation=judge.evaluation(outputs),
        facts=(read_facts(first), read_facts(second)),
    )
