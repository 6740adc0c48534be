"""Explanations to look at: weights over images, and tokens or entries with their weights."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onnx_lathe.benchmarks.report.document import Mark, Panel
from onnx_lathe.benchmarks.stats import Vector
from onnx_lathe.converter.attribution.features import Explained, channel_axis
from onnx_lathe.runtime.samples import Array

_SIDE = 168
"""Pixels of the longer side of a picture, at least."""
_FOR = np.array([10, 102, 176])
_AGAINST = np.array([212, 82, 0])
_COVER = 0.8
"""How much of the image the largest weight covers."""


def plain(sample: Explained) -> Panel:
    """Return an image by itself."""
    return Panel("image", image=_png(_colours(sample)))


def weighed(sample: Explained, weights: Vector, largest: float, caption: str) -> Panel:
    """Return a sample with the weights of its features: blue speaks for the answer, orange against it.

    Args:
        sample: The sample.
        weights: ``float64 [features]``.
        largest: The size of weight that has the full colour.
        caption: What it shows.
    """
    scaled = weights / largest if largest > 0.0 else np.zeros_like(weights)
    if sample.kind != "image":
        marks = tuple(Mark(label, float(weight)) for label, weight in zip(sample.labels, scaled, strict=True))
        return Panel(caption, marks=marks)
    axis = channel_axis(sample.values.shape)
    patches = sample.groups if axis is None else sample.groups.take(0, axis=axis)
    strength = scaled[patches][..., None]
    grey = _colours(sample).mean(axis=-1, keepdims=True)
    cover = _COVER * np.abs(strength)
    mixed = (1.0 - cover) * grey + cover * np.where(strength > 0, _FOR, _AGAINST)
    return Panel(caption, image=_png(mixed))


def _colours(sample: Explained) -> NDArray[np.float64]:
    """Return an image as ``float64 [height, width, 3]`` on 0..255, from its own darkest to its own lightest value."""
    axis = channel_axis(sample.values.shape)
    image = sample.values.astype(np.float64)
    image = image[..., None] if axis is None else np.moveaxis(image, axis, -1)
    image = image[..., :3] if image.shape[-1] >= 3 else np.repeat(image[..., :1], 3, axis=-1)
    low, high = float(image.min()), float(image.max())
    return 255.0 * (image - low) / (high - low if high > low else 1.0)


def _png(colours: Array) -> bytes:
    picture = Image.fromarray(np.rint(colours).astype(np.uint8))
    times = max(1, -(-_SIDE // max(picture.size)))
    larger = picture.resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST)
    written = io.BytesIO()
    larger.save(written, format="PNG", optimize=True)
    return written.getvalue()
