"""Samples as tensors, drawn into batches: equal draws on every process, of which each takes its share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from onnx_lathe.runtime.errors import SamplesError
from onnx_lathe.runtime.samples import Array, Feeds, Samples

Group = tuple[tuple[Tensor, ...], Tensor]
"""The inputs and labels of all samples of one shape."""


def to_tensors(feeds: Feeds) -> tuple[Tensor, ...]:
    """Return the arrays as tensors in their order, images (4-D floats) in channels-last memory.

    Raises:
        SamplesError: An array holds strings.
    """
    for name, array in feeds.items():
        if array.dtype.kind in "OUS":
            raise SamplesError(
                name,
                got="strings",
                expected="numbers, which a network takes",
                mend="Convert the array to numbers.",
            )
    tensors = (torch.from_numpy(np.ascontiguousarray(array)) for array in feeds.values())
    return tuple(tensor.to(memory_format=torch.channels_last) if is_image(tensor) else tensor for tensor in tensors)


def is_image(tensor: Tensor) -> bool:
    """Return whether a tensor is ``float [n, channels, height, width]``."""
    return tensor.ndim == 4 and tensor.is_floating_point()


def grouped(samples: Samples, labels: Array) -> list[Group]:
    """Return the samples by shape, with their labels."""
    inputs = [to_tensors(batch) for batch in samples.batches]
    parts = np.split(labels, np.cumsum([len(first) for first, *_ in inputs])[:-1])
    return [(tensors, torch.from_numpy(part)) for tensors, part in zip(inputs, parts, strict=True)]


def steps(samples: int, size: int) -> int:
    """Return how many batches of at most ``size`` hold all samples."""
    return math.ceil(samples / size)


def draw(groups: Sequence[Group], size: int, generator: torch.Generator) -> list[tuple[int, Tensor]]:
    """Cut all samples at random into batches: the number of a group, and indices in it."""
    batches = [
        (number, indices)
        for number, (_, labels) in enumerate(groups)
        for indices in torch.randperm(len(labels), generator=generator).tensor_split(steps(len(labels), size))
    ]
    return [batches[int(index)] for index in torch.randperm(len(batches), generator=generator)]


def draw_moves(count: int, most: int, generator: torch.Generator) -> Tensor:
    """Return by how many pixels to move each of ``count`` images: ``int64 [count, 2]``, each within ``-most..most``."""
    return torch.randint(-most, most + 1, (count, 2), generator=generator)


def moved(images: Tensor, moves: Tensor) -> Tensor:
    """Move each image along its height and width; its edge fills what that leaves.

    Args:
        images: ``[n, channels, height, width]``.
        moves: Pixels, ``int64 [n, 2]``.
    """
    count, _, height, width = images.shape
    rows = (torch.arange(height) + moves[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width) + moves[:, 1:]).clamp(0, width - 1)
    samples = torch.arange(count)[:, None, None]
    # Indexing around a slice puts the channels last: [n, height, width, channels].
    return images[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
