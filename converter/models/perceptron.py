"""A multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

from pydantic import Field, validate_call
from torch import Tensor, nn

Count = Annotated[int, Field(ge=1)]


class Perceptron(nn.Module):
    """Linear layers with a ReLU after each but the last.

    Each hidden layer is a block of its own in ``blocks``, so that sharded training gathers one at a time.

    Args:
        widths: Numbers of inputs, of the neurons of each hidden layer, and of outputs.

    Shape:
        Takes ``float32 [n, inputs]``; returns ``float32 [n, outputs]``: logits, or numbers.
    """

    @validate_call
    def __init__(self, widths: Annotated[Sequence[Count], Field(min_length=2)]) -> None:
        super().__init__()
        *hidden, outputs = widths
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(*pair), nn.ReLU()) for pair in pairwise(hidden)))
        self.head = nn.Linear(hidden[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        return self.head(self.blocks(x))
