"""A residual network for small images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field, validate_call
from torch import Tensor, nn

Count = Annotated[int, Field(ge=1)]


class ResidualNetwork(nn.Module):
    """Stages of basic residual blocks, each at half the resolution of the one before, then average pooling.

    He et al. 2016, "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), section 4.2: the form
    for small images, with a 3x3 stem and projections (option B) where the shape changes.

    Args:
        channels: Channels of the images.
        classes: Size of the last layer.
        widths: Channels of each stage.
        blocks: Residual blocks of each stage.

    Shape:
        Takes ``float32 [n, channels, height, width]`` of any size, such as 8x8 or 32x32; returns logits
        ``float32 [n, classes]``.
    """

    @validate_call
    def __init__(
        self,
        channels: Count,
        classes: Count,
        widths: Annotated[Sequence[Count], Field(min_length=1)],
        blocks: Count,
    ) -> None:
        super().__init__()
        self.stem = _normalized_convolution(channels, widths[0], 3, 1)
        layers: list[nn.Module] = []
        inputs = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(_BasicBlock(inputs, width, stride=2 if stage > 0 and block == 0 else 1))
                inputs = width
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits."""
        features = self.blocks(torch.relu(self.stem(image)))
        return self.head(features.mean((2, 3)))


class _BasicBlock(nn.Module):
    """``relu(F(x) + skip(x))`` where F is two 3x3 convolutions (equation 2 of the paper)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _normalized_convolution(inputs, outputs, 3, stride)
        self.second = _normalized_convolution(outputs, outputs, 3, 1)
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else _normalized_convolution(inputs, outputs, 1, stride)

    def forward(self, features: Tensor) -> Tensor:
        """Return ``[n, outputs, height / stride, width / stride]``."""
        return torch.relu(self.second(torch.relu(self.first(features))) + self.skip(features))


def _normalized_convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(outputs)
    )
