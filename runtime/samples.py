"""Sample sets: what a model is calibrated, judged and measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lathe.runtime.errors import SamplesError

Array = NDArray[Any]
Feeds = Mapping[str, Array]
"""Arrays by input name; the first axis of each is the batch."""


@dataclass(frozen=True)
class Samples:
    """Samples in order, as batches whose shapes may differ from one to the next.

    Attributes:
        batches: Arrays by input name. Within a batch all first axes are equal: the number of samples in it.
        labels: ``int64 [samples]`` (classes), or ``float [samples]`` or ``[samples, outputs]`` (numbers), or None
            where there are none.
        source: Where the samples come from, for messages.

    Raises:
        SamplesError: There are no samples, a batch is ragged, batches name different inputs, a value is not finite,
            or the number of labels differs from the number of samples.
    """

    batches: tuple[Feeds, ...]
    labels: Array | None = None
    source: str = "samples"

    def __post_init__(self) -> None:
        if not self.batches or not self.batches[0]:
            raise SamplesError(
                self.source,
                got="no samples",
                expected="at least one array with one sample",
                mend="Give arrays by input name, samples along the first axis.",
            )
        names = set(self.batches[0])
        for batch in self.batches:
            if set(batch) != names:
                raise SamplesError(
                    self.source,
                    got=f"a batch with {sorted(batch)}",
                    expected=f"{sorted(names)} as in the first batch",
                    mend="Give every batch the same inputs.",
                )
            self._check_batch(batch)
        if self.labels is not None and len(self.labels) != len(self):
            raise SamplesError(
                f"{self.source}: label",
                got=f"{len(self.labels)} labels",
                expected=f"{len(self)}, one for each sample",
                mend="Give one label for each sample.",
            )

    def _check_batch(self, batch: Feeds) -> None:
        lengths = {name: (array.shape[0] if array.ndim else None) for name, array in batch.items()}
        if len(set(lengths.values())) != 1 or None in lengths.values():
            raise SamplesError(
                self.source,
                got=f"first axes of different length: {lengths}",
                expected="one length, the number of samples",
                mend="Put the samples along the first axis of every input.",
            )
        if 0 in lengths.values():
            raise SamplesError(
                self.source,
                got="no samples (first axis 0)",
                expected="at least one sample",
                mend="Give at least one sample.",
            )
        for name, array in batch.items():
            if array.dtype.kind not in "fiubOUS":
                raise SamplesError(
                    f"{self.source}: {name}",
                    got=f"dtype {array.dtype}",
                    expected="numbers, booleans or strings",
                    mend="Convert the array.",
                )
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                bad = int(np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))[0])
                raise SamplesError(
                    f"{self.source}: {name}",
                    got=f"NaN or infinity in sample {bad}",
                    expected="finite values",
                    mend="Drop or repair that sample.",
                )

    def __len__(self) -> int:
        return sum(_length(batch) for batch in self.batches)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the inputs."""
        return tuple(self.batches[0])

    def iter_batches(self, size: int) -> Iterator[Feeds]:
        """Yield the samples in order in batches of at most ``size``, never across two shapes."""
        for batch in self.batches:
            for start in range(0, _length(batch), size):
                yield {name: array[start : start + size] for name, array in batch.items()}

    def first(self, count: int) -> Samples:
        """Return the first ``count`` samples (all, where there are fewer)."""
        return self.take(range(min(count, len(self))))

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Samples:
        """Return the samples at ``indices``, which must ascend."""
        chosen = np.asarray(indices, dtype=np.int64)
        batches: list[Feeds] = []
        start = 0
        for batch in self.batches:
            stop = start + _length(batch)
            here = chosen[(chosen >= start) & (chosen < stop)] - start
            if len(here):
                batches.append({name: array[here] for name, array in batch.items()})
            start = stop
        labels = None if self.labels is None else self.labels[chosen]
        return Samples(tuple(batches), labels, self.source)

    def split(self, parts: Mapping[str, float], seed: int) -> dict[str, Samples]:
        """Cut the samples into named parts by a hash of their content and ``seed``.

        The part of a sample depends on nothing but its own content and the seed, so that equal samples never lie in
        two parts and adding samples moves no other.

        Args:
            parts: The share of each part, by name; the shares sum to 1.
            seed: Another seed gives another cut.

        Raises:
            SamplesError: A part would be empty.
        """
        position = self._hashes(seed)
        edges = np.cumsum(np.fromiter(parts.values(), dtype=np.float64))
        cut: dict[str, Samples] = {}
        low = 0.0
        for name, edge in zip(parts, edges, strict=True):
            high = 1.0 if name == list(parts)[-1] else float(edge)
            indices = np.flatnonzero((position >= low) & (position < high))
            if len(indices) == 0:
                raise SamplesError(
                    self.source,
                    got=f"{len(self)} samples, none of which falls into the part {name!r}",
                    expected=f"enough for the parts {', '.join(parts)}",
                    mend="Give more samples.",
                )
            cut[name] = self.take(indices)
            low = high
        return cut

    def digest(self) -> str:
        """Return the sha256 of all arrays and labels, as hexadecimal digits."""
        total = hashlib.sha256()
        for batch in self.batches:
            for name in sorted(batch):
                array = batch[name]
                total.update(f"{name}:{array.dtype}:{array.shape}".encode())
                total.update(_bytes(array))
        if self.labels is not None:
            total.update(f"label:{self.labels.dtype}:{self.labels.shape}".encode())
            total.update(_bytes(self.labels))
        return total.hexdigest()

    def _hashes(self, seed: int) -> NDArray[np.float64]:
        """Return one number in [0, 1) a sample."""
        values: list[float] = []
        key = seed.to_bytes(8, "little", signed=True)
        for batch in self.batches:
            arrays = [batch[name] for name in sorted(batch)]
            for row in range(_length(batch)):
                total = hashlib.blake2b(key, digest_size=8)
                for array in arrays:
                    total.update(_bytes(array[row]))
                values.append(int.from_bytes(total.digest(), "little") / 2**64)
        return np.asarray(values)


def _length(batch: Feeds) -> int:
    return int(next(iter(batch.values())).shape[0])


def _bytes(array: Array) -> bytes:
    if array.dtype.kind in "OU":
        return "\0".join(str(item) for item in np.ravel(array)).encode()
    return np.ascontiguousarray(array).tobytes()
