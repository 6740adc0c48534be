"""Optimizers of others that need onnxruntime's own package."""

from __future__ import annotations

import importlib
from typing import Any

from onnx import ModelProto

from onnx_lathe.runtime import extras, providers
from onnx_lathe.runtime.errors import UnsupportedModelError


def optimize_transformer(model: ModelProto, model_type: str, heads: int = 0, hidden: int = 0) -> ModelProto:
    """Return what the fusions of ``onnxruntime.transformers`` make of a model, all of them in Python.

    Args:
        model: With its weights inside; it is changed.
        model_type: Whose fusions, such as "bert", "gpt2" or "vit".
        heads: The number of attention heads; 0 to find it in the graph.
        hidden: The width of the tokens; 0 to find it in the graph.

    Raises:
        DependencyError: No onnxruntime is installed, or sympy, which its optimizer imports, is not.
        UnsupportedModelError: The optimizer fails on this model.
    """
    providers.onnxruntime()
    extras.require("sympy", extra="fuse")
    optimizer: Any = importlib.import_module("onnxruntime.transformers.optimizer")
    model.ClearField("producer_name")  # the optimizer warns where it is not what the type leads it to expect
    try:
        # Without onnxruntime's own optimizations: they are for the session, which knows the machine.
        optimized = optimizer.optimize_by_fusion(model, model_type, num_heads=heads, hidden_size=hidden)
    except Exception as error:
        raise UnsupportedModelError(
            "onnxruntime.transformers",
            got=f"{type(error).__name__} while it optimized a model of type {model_type}: {error}",
            expected="a graph that it can optimize",
            mend="Try another model_type, or leave optimize-onnxruntime out for this model.",
        ) from error
    return optimized.model
