"""Running a part of a model by itself, for the oracles of single operators."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir

from onnx_lathe.passes import files
from onnx_lathe.runtime.samples import Array, Feeds
from onnx_lathe.runtime.session import Session


def run_alone(graph: ir.Graph, model: ir.Model, feeds: Feeds) -> dict[str, Array]:
    """Return what onnxruntime makes of ``feeds`` by ``graph``, a part of ``model`` that stands for itself."""
    with tempfile.TemporaryDirectory(prefix="lathe-check-") as folder:
        target = Path(folder) / "part.onnx"
        files.save(ir.Model(graph, ir_version=model.ir_version), target)
        return Session(target).run(feeds)
