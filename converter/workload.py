"""What models are measured on: their inputs, and how their sessions run."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.benchmarks.suite import Conditions
from onnx_lathe.converter.data.files import load_samples
from onnx_lathe.runtime import loading, providers, tensors
from onnx_lathe.runtime.errors import TensorError
from onnx_lathe.runtime.samples import Feeds, Samples
from onnx_lathe.runtime.tensors import TensorSpec

Dims = Mapping[str, int]
"""Sizes of symbolic dimensions, such as ``{"batch": 8, "seq": 128}``."""

MOST_BATCHES = 4
"""Of the data as they come that one call runs: enough to meet short and long ones."""


@dataclass(frozen=True)
class Workload:
    """What models are measured on: each shape with each number of threads is a case.

    Attributes:
        dims: The shapes; one default shape where there are none.
        data: Samples to run instead of random values. They have a shape of their own, so ``dims`` may name the batch
            (the first axis of the first input) and nothing else.
        provider: Where the models run.
        threads: Numbers of threads of a session; all allowed cores where there are none.
    """

    dims: Sequence[Dims] = ()
    data: Path | Samples | None = None
    provider: str = "cpu"
    threads: Sequence[int] = ()

    @contextmanager
    def cases(self, model: Path) -> Generator[list[tuple[Conditions, Path]]]:
        """Give every case, and the file of the inputs to run, made for ``model``; the files are there for the block.

        Raises:
            ProviderError: The provider is not there.
            TensorError: The inputs cannot have these shapes, or a dimension beside the batch is given with data.
            SamplesError: The data is empty, ragged or does not fit the model.
        """
        providers.resolve(self.provider)
        samples = load_samples(self.data) if isinstance(self.data, Path) else self.data
        specs = tensors.input_specs(loading.read_skeleton(model), str(model))
        counts = dict.fromkeys(self.threads or [providers.default_threads()])
        with tempfile.TemporaryDirectory(prefix="lathe-bench-") as folder:
            found: list[tuple[Conditions, Path]] = []
            for number, shape in enumerate(self.dims or [{}]):
                feeds = Path(folder) / f"feeds-{number}.npz"
                sizes = tensors.bind_dims(specs, shape, batch=1) if samples is None else _only_batch(specs, shape)
                tensors.save_npz(feeds, batch_to_time(model, samples, sizes))
                found += [(Conditions(sizes, count, self.provider), feeds) for count in counts]
            yield found


def batch_to_time(model: Path, samples: Samples | None, dims: Dims) -> Feeds:
    """Return one batch: samples where ``dims`` names nothing but the batch, else random values of the shape.

    Raises:
        SamplesError: The samples lack an input of the model.
        TensorError: A sample does not fit the model, or the model cannot have this shape.
    """
    batch = _batch_dimension(tensors.input_specs(loading.read_skeleton(model), str(model)))
    if samples is not None and set(dims) <= {batch}:
        return tensors.first_batch(model, samples, next(iter(dims.values()), 1))
    return tensors.random_feeds(model, dims)


def _batch_dimension(specs: Sequence[TensorSpec]) -> str | None:
    """Return the name of the first axis of the first input; None where it has a fixed size or no name."""
    first = specs[0].shape[:1] if specs else ()
    return next((dim for dim in first if isinstance(dim, str)), None)


def _only_batch(specs: Sequence[TensorSpec], dims: Dims) -> Dims:
    """Return ``dims`` unless they name something else than the batch, which data cannot take on."""
    batch = _batch_dimension(specs)
    possible = f"only {batch!r}, the batch" if batch else "no size: the batch of this model is fixed or unnamed"
    for name in dims:
        if name != batch:
            raise TensorError(
                f"dimension {name!r}",
                got="a size for it together with data, which have a shape of their own",
                expected=possible,
                mend=f"Leave --data out to run random values of that shape, or leave {name!r} out and give data of it.",
            )
    return dims


def as_they_come(samples: Samples | None) -> tuple[Feeds, ...]:
    """Return up to `MOST_BATCHES` of the batches of ``samples``, spread over all, with the padding that they have.

    One where all have one shape.
    """
    if samples is None:
        return ()
    batches = samples.batches
    if len({tuple(array.shape for array in batch.values()) for batch in batches}) == 1:
        return batches[:1]
    count = min(MOST_BATCHES, len(batches))
    return tuple(batches[round(number * (len(batches) - 1) / (count - 1))] for number in range(count))


def batches_to_time(model: Path, samples: Samples | None, dims: Dims) -> tuple[Feeds, ...]:
    """Return what one call runs, in turn: batches as they come where ``dims`` names no size and they differ, else one.

    Raises:
        SamplesError: The samples lack an input of the model.
        TensorError: A sample does not fit the model, or the model cannot have this shape.
    """
    batches = as_they_come(samples)
    if dims or len(batches) < 2:
        return (batch_to_time(model, samples, dims),)
    specs = tensors.input_specs(loading.read_skeleton(model), str(model))
    names = [spec.name for spec in specs]
    return tuple(tensors.check_feeds(specs, {name: batch[name] for name in names}) for batch in batches)


def plain_subject(name: str, model: Path, feeds: Path | Sequence[Path], provider: str, threads: int | None) -> Subject:
    """Return how to start a model in a plain onnxruntime session; a call runs each of several ``feeds``."""
    arguments: dict[str, Any] = {"model": str(model), "provider": provider, "threads": threads}
    if isinstance(feeds, Path):
        return Subject(name, "onnx_lathe.runtime.session:start_plain", {**arguments, "feeds": str(feeds)})
    if len(feeds) == 1:
        return plain_subject(name, model, feeds[0], provider, threads)
    start = "onnx_lathe.runtime.session:start_plain_in_turn"
    return Subject(name, start, {**arguments, "feeds": [str(path) for path in feeds]})
