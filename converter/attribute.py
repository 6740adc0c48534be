"""``lathe attribute``: do two models answer for the same reasons?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onnx_lathe.benchmarks.attribution import LEAST_FEATURES, MethodAgreement, agree
from onnx_lathe.benchmarks.stats import Vector
from onnx_lathe.converter.attribution.features import Explained, choose_input, explained, mean_sample, read_tokens
from onnx_lathe.converter.data.files import load_samples
from onnx_lathe.converter.progress import Progress, silent
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.bundle import model_file
from onnx_lathe.runtime.errors import InputError, SamplesError, TensorError
from onnx_lathe.runtime.extras import require
from onnx_lathe.runtime.samples import Array, Feeds, Samples
from onnx_lathe.runtime.session import Session
from onnx_lathe.runtime.staged import staged

METHODS = ("lime", "kernel-shap", "occlusion")
_UNSEEDED = "occlusion"
_BATCH = 32
"""Perturbed samples in a batch where the model leaves the batch open."""


@dataclass(frozen=True)
class Attribution:
    """How far the explanations of two models agree.

    Attributes:
        input: The input that was explained.
        output: The output whose numbers were explained.
        kind: What the features are: patches of an image, tokens, or entries.
        indices: The samples, by their place in the data.
        targets: Which component of the output was explained, for each of them.
        features: How many features each of them has.
        evaluations: How many perturbations were drawn for each explanation.
        seed: What fixed the samples and the draws.
        methods: What each method found.
    """

    input: str
    output: str
    kind: str
    indices: tuple[int, ...]
    targets: tuple[int, ...]
    features: tuple[int, ...]
    evaluations: int
    seed: int
    methods: tuple[MethodAgreement, ...]


@dataclass(frozen=True)
class Explanations:
    """The weights that one method gave, ``float64 [features]`` for each sample."""

    original: list[Vector]
    candidate: list[Vector]
    again: list[Vector] | None


def attribute(
    a: Path,
    b: Path,
    data: Path | Samples,
    *,
    methods: Sequence[str] = METHODS,
    samples: int = 20,
    evaluations: int = 300,
    seed: int = 0,
    input_name: str | None = None,
    target: int | None = None,
    baseline_token: int | None = None,
    tokenizer: Path | None = None,
    output: Path | None = None,
    provider: str = "cpu",
    threads: int | None = None,
    progress: Progress = silent,
) -> Attribution:
    """Explain the answers of two models on the same samples, and tell how far the explanations agree.

    Both models get the same perturbations; A is explained once more with others, which gives the noise floor. What is
    explained is the score of the class that A answers, or the number that it returns; in both models the same.

    Args:
        a: The original, an ``.onnx`` file or a bundle.
        b: The candidate, with the same inputs and outputs.
        data: The samples, or the file that holds them.
        methods: Of `METHODS`.
        samples: How many to explain, drawn by the seed.
        evaluations: Perturbations drawn for each explanation.
        seed: Fixes the samples and the draws.
        input_name: The input to explain; None for the only one that is no mask, token type or position.
        target: The component of the output to explain; None for the class that A answers.
        baseline_token: What stands where a token is taken away; None for the tokenizer's mask, or 0.
        tokenizer: A ``tokenizer.json`` or its folder: shows tokens as text and leaves special ones alone.
        output: The page to write, whole or not at all; None for none.
        provider: Where both run.
        threads: Threads of a session; None for all allowed cores.
        progress: Told what is being done.

    Raises:
        DependencyError: captum or torch is not installed.
        InputError: A method is unknown, or there are too few evaluations for the number of features.
        SamplesError: Fewer than two samples have enough features.
        TensorError: The models differ in their inputs or outputs, an input holds text, or no output is a number or a
            row of scores for each sample.
    """
    require("captum", "torch", "PIL", extra="attribute")
    _check_methods(methods)
    _check_page(output)
    loaded = load_samples(data) if isinstance(data, Path) else data
    tensors.first_batch(model_file(a), loaded, 1)
    models = [Session(model, provider=provider, threads=threads) for model in (a, b)]
    _check_alike(models)
    spec = choose_input(models[0].inputs, input_name)
    tokens = read_tokens(tokenizer, baseline_token)
    drawn = np.random.default_rng(seed).permutation(len(loaded)).tolist()
    mean_of = cache(partial(mean_sample, loaded, spec.name))
    found = (explained(loaded, index, models[0].inputs, spec.name, tokens, mean_of) for index in drawn)
    chosen = list(islice((sample for sample in found if len(sample.labels) >= LEAST_FEATURES), samples))
    _check_enough(loaded, chosen, evaluations)
    name, targets = _targets(models[0], chosen, target)
    scores = [_Scorer(model, name) for model in models]
    explanations = {
        method: _explain(method, scores, chosen, targets, evaluations, seed, progress) for method in methods
    }
    result = Attribution(
        input=spec.name,
        output=name,
        kind=chosen[0].kind,
        indices=tuple(sample.index for sample in chosen),
        targets=tuple(targets),
        features=tuple(len(sample.labels) for sample in chosen),
        evaluations=evaluations,
        seed=seed,
        methods=tuple(agree(method, *vars(each).values()) for method, each in explanations.items()),
    )
    if output is not None:
        from onnx_lathe.converter.attribution.page import page

        with staged(output) as part:
            part.write_text(page(result, chosen, explanations, str(a), str(b)), encoding="utf-8")
    return result


@dataclass(frozen=True)
class _Scorer:
    """A model that answers for a sample without some of its features."""

    model: Session
    output: str

    @property
    def batch(self) -> int:
        """How many perturbed samples to run at once."""
        return _fixed_batch(self.model) or _BATCH

    def of(self, sample: Explained, target: int) -> Callable[[NDArray[np.bool_]], Vector]:
        """Return what gives the number to explain, ``float64 [batch]``, for ``bool [batch, features]``."""

        def score(kept: NDArray[np.bool_]) -> Vector:
            rows = np.arange(_fixed_batch(self.model) or len(kept)) % len(kept)
            answers = self.model.run(sample.without(kept[rows]), [self.output])[self.output]
            numbers = answers.reshape(len(rows), -1)[: len(kept), target].astype(np.float64)
            if not np.isfinite(numbers).all():
                raise TensorError(
                    f"{self.model.path}: output {self.output!r}",
                    got=f"NaN or infinity for sample {sample.index} without some of its features",
                    expected="finite numbers",
                    mend="Explain another output, or repair the model.",
                )
            return numbers

        return score


def _explain(
    method: str,
    scorers: Sequence[_Scorer],
    samples: Sequence[Explained],
    targets: Sequence[int],
    evaluations: int,
    seed: int,
    progress: Progress,
) -> Explanations:
    from onnx_lathe.converter.attribution.explainers import explain

    original, candidate = scorers
    runs = [(original, 0), (candidate, 0), *([] if method == _UNSEEDED else [(original, 1)])]
    weights: list[list[Vector]] = [[] for _ in runs]
    for number, (sample, target) in enumerate(zip(samples, targets, strict=True)):
        progress(number, len(samples), f"{method}: sample {number + 1} of {len(samples)}")
        for (scorer, draw), found in zip(runs, weights, strict=True):
            state = int(np.random.SeedSequence([seed, draw, sample.index]).generate_state(1)[0])
            score, features = scorer.of(sample, target), len(sample.labels)
            found.append(explain(method, score, features, evaluations=evaluations, batch=scorer.batch, seed=state))
    return Explanations(weights[0], weights[1], weights[2] if len(weights) > 2 else None)


def _fixed_batch(model: Session) -> int | None:
    size = model.inputs[0].shape[0] if model.inputs[0].shape else None
    return size if isinstance(size, int) else None


def _targets(model: Session, samples: Sequence[Explained], target: int | None) -> tuple[str, list[int]]:
    """Return the first output that is a number or a row of scores, and the component to explain for each sample."""
    answers = [_first(model, sample.feeds) for sample in samples]
    name = next((name for name, row in answers[0].items() if row.dtype.kind == "f" and row.ndim <= 1), None)
    if name is None:
        shapes = ", ".join(f"{name} {row.dtype} {list(row.shape)}" for name, row in answers[0].items())
        raise TensorError(
            f"{model.path}: outputs",
            got=f"{shapes} for a sample",
            expected="a float number, or a row of scores",
            mend="Give the model an output of shape [batch] or [batch, classes].",
        )
    rows = [np.atleast_1d(answer[name]) for answer in answers]
    if target is not None and not 0 <= target < len(rows[0]):
        raise InputError(
            "--target",
            got=str(target),
            expected=f"0 to {len(rows[0]) - 1}, a component of {name!r}",
            mend="Give another component, or leave it out for the class that A answers.",
        )
    return name, [int(row.argmax()) if target is None else target for row in rows]


def _first(model: Session, feeds: Feeds) -> Mapping[str, Array]:
    """Return each output that has an entry for each sample, for a single sample."""
    size = _fixed_batch(model) or 1
    outputs = model.run({name: np.repeat(array, size, axis=0) for name, array in feeds.items()})
    return {name: output[0] for name, output in outputs.items() if output.ndim and len(output) == size}


def _check_methods(methods: Sequence[str]) -> None:
    for method in methods:
        if method not in METHODS:
            raise InputError(
                "--method", got=repr(method), expected=f"one of {', '.join(METHODS)}", mend="Correct the name."
            )


def _check_page(output: Path | None) -> None:
    """Check before the work that the page can be written."""
    if output is not None and output.is_dir():
        raise InputError("--output", got=f"{output}, a folder", expected="a file", mend="Name the page to write.")


def _check_alike(models: Sequence[Session]) -> None:
    """Check that both models have the same inputs and outputs."""
    for kind in ("inputs", "outputs"):
        first, second = ({spec.name: str(spec.dtype) for spec in getattr(model, kind)} for model in models)
        if first != second:
            raise TensorError(
                f"{models[1].path}: {kind}",
                got=", ".join(f"{name} {dtype}" for name, dtype in second.items()),
                expected=", ".join(f"{name} {dtype}" for name, dtype in first.items()) + f", as {models[0].path} has",
                mend="Explain two forms of one model.",
            )


def _check_enough(samples: Samples, chosen: Sequence[Explained], evaluations: int) -> None:
    if len(chosen) < 2:
        raise SamplesError(
            samples.source,
            got=f"{len(chosen)} of {len(samples)} samples with at least {LEAST_FEATURES} features",
            expected="at least two: agreement is a mean over samples",
            mend="Give more samples, or another baseline token if all tokens are the baseline.",
        )
    most = max(len(sample.labels) for sample in chosen)
    if evaluations < most + 2:
        raise InputError(
            "--evaluations",
            got=str(evaluations),
            expected=f"at least {most + 2}: a sample has {most} features, and a weight for each is fitted",
            mend="Give some times as many evaluations as there are features.",
        )
