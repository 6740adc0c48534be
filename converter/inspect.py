"""``lathe inspect``: what a model is and what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from onnx_lathe.runtime.bundle import model_file
from onnx_lathe.runtime.facts import GraphFacts, read_facts


def inspect(model: Path, *, dims: Mapping[str, int] | None = None) -> GraphFacts:
    """Return parameters, MACs, file size, operators, inputs and outputs of a model, without running it.

    Args:
        model: An ``.onnx`` file or a bundle.
        dims: Sizes of symbolic dimensions, which MACs depend on.
    """
    return read_facts(model_file(model), dims)
