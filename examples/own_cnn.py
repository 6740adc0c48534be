"""A network and data of one's own, for the recipe beside it: `lathe convert examples/own_cnn.toml -o out/own-cnn`.

The recipe names `own_cnn:Network` and `own_cnn:samples`; any module beside a recipe, or installed, can be named so. The
images show one bar, and which way it runs is the class.
"""

import numpy as np
import torch
from torch import nn

from onnx_lathe import Samples

SIZE, DIRECTIONS = 16, 4


class Network(nn.Module):
    """Images ``float32 [batch, 1, 16, 16]`` to logits ``float32 [batch, 4]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *self._block(1, width),
            *self._block(width, 2 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, DIRECTIONS),
        )

    @staticmethod
    def _block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
        convolution = nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, padding=1, bias=False)
        return convolution, nn.BatchNorm2d(outputs), nn.ReLU()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layers(image)


def samples(count: int = 1200) -> Samples:
    """Return bars in noise, and their directions as labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, DIRECTIONS, count)
    angle = (labels * np.pi / DIRECTIONS)[:, None, None]
    offset = rng.uniform(-3, 3, count)[:, None, None]
    row, column = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    distance = np.abs(column * np.sin(angle) - row * np.cos(angle) - offset)
    images = (distance < 1.5) + 0.5 * rng.standard_normal((count, SIZE, SIZE))
    return Samples(({"image": images[:, None].astype(np.float32)},), labels, "bars")
