"""What quantizing each layer saves: its kernels' times in the float model and in the quantized one."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from onnx import ModelProto, NodeProto

from onnx_lathe.runtime import loading
from onnx_lathe.runtime.profile import OperatorTime, profile
from onnx_lathe.runtime.samples import Feeds

_LAYERS = frozenset({"Conv", "Gemm", "MatMul", "Gather"})
_ACTIVATIONS = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid"})
"""What onnxruntime fuses into a Conv, which it then names by the activation's result."""
_MADE = re.compile(r"(/MatMulAddFusion|_token_\d+|_nchwc|_(sums|scales|scaled|biased)(_float)?_[A-Z]\w*)$")
"""What onnxruntime and the quantizers put behind the name of a layer, or of its result, for a kernel of it."""


def layer_gains(original: Path, quantized: Path, feeds: Feeds, threads: int | None = None) -> dict[str, float]:
    """Return the seconds of a run that each layer saves by being quantized, by its name; negative where it loses.

    Only layers whose kernels are found in both models, by their names, are in it. The rounding between layers belongs
    to none of them and is not counted.

    Args:
        original: The float model.
        quantized: The same model with layers quantized.
        feeds: What both are run on.
        threads: Of the sessions; None for all allowed cores.

    Raises:
        TensorError: ``feeds`` do not fit the models.
    """
    names = _names(loading.read_graph(original))
    before, after = (layer_seconds(names, profile(path, feeds, threads=threads)) for path in (original, quantized))
    return {layer: before[layer] - after[layer] for layer in before if layer in after}


def layer_seconds(names: Mapping[str, str], times: Iterable[OperatorTime]) -> dict[str, float]:
    """Return the seconds of the kernels of each layer.

    Args:
        names: The layer by each name that onnxruntime may know it by.
        times: What a profile tells.
    """
    found: dict[str, float] = defaultdict(float)
    for time in times:
        layer = next((names[name] for name in _stripped(time.node) if name in names), None)
        if layer is not None:
            found[layer] += time.seconds
    return dict(found)


def _stripped(kernel: str) -> Iterator[str]:
    """Yield what a kernel's name may have been made of, the longest first."""
    name: str | None = kernel.removeprefix("fused ")
    while name is not None:
        yield name
        shorter = _MADE.sub("", name)
        name = shorter if shorter != name else None


def _names(model: ModelProto) -> dict[str, str]:
    """Return each layer's name by itself, by its result, and by that of an activation that follows."""
    nodes = list(loading.nodes(model))
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in nodes:
        for name in node.input:
            readers[name].append(node)
    names: dict[str, str] = {}
    for node in nodes:
        if node.op_type in _LAYERS:
            result = node.output[0]
            layer = node.name or result
            following = readers[result]
            names |= {layer: layer, result: layer}
            if len(following) == 1 and following[0].op_type in _ACTIVATIONS:
                names[following[0].output[0]] = layer
    return names
