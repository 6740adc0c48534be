"""Training again what pruning cut: the weights go from the graph into torch, learn, and go back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from torch import nn

from onnx_lathe.converter.distill import distill
from onnx_lathe.converter.export import Parameter
from onnx_lathe.converter.progress import Progress, silent
from onnx_lathe.converter.recipe import DistillationOptions, TrainingOptions
from onnx_lathe.converter.train import TrainingCurve, predict
from onnx_lathe.passes.files import EXTERNAL_ABOVE_BYTES
from onnx_lathe.runtime import loading
from onnx_lathe.runtime.errors import OracleError, UnsupportedModelError
from onnx_lathe.runtime.parity import relative_error
from onnx_lathe.runtime.samples import Array, Samples
from onnx_lathe.runtime.session import Session
from onnx_lathe.runtime.staged import staged

TOLERANCE = 1e-4
"""Relative to the largest output: torch and onnxruntime add the same float32 products in another order."""

_CHECKED_SAMPLES = 8


def recover(
    pruned: Path,
    output: Path,
    parameters: Mapping[str, Parameter],
    *,
    network: nn.Module,
    teacher: nn.Module,
    samples: Samples,
    evaluate_on: Samples,
    options: TrainingOptions,
    distillation: DistillationOptions,
    seed: int,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> TrainingCurve:
    """Train the weights of a pruned graph and write them into a copy of it, whole or not at all.

    The layers of the network take the sizes of the pruned graph. That it then computes the same is checked
    before anything is trained, and again on the file that is written. Parameters that no initializer holds stay
    as they are.

    Args:
        pruned: The graph, pruned from the export of ``network``: initializers keep their names and axes.
        output: The file to write.
        parameters: By initializer, the parameter that it holds (`onnx_lathe.converter.export.Exported`).
        network: The dense network that was exported, BatchNorm folded; it is not changed.
        teacher: Teaches by `onnx_lathe.converter.distill.distillation_loss`.
        samples: What to train on.
        evaluate_on: What to judge each epoch on.
        options: How to train.
        distillation: How much the teacher counts.
        seed: Of the training.
        checkpoint: See `onnx_lathe.converter.train.train`.
        progress: See `onnx_lathe.converter.train.train`.

    Raises:
        ModelFileError: ``pruned`` is not an ONNX file.
        UnsupportedModelError: An initializer is not there any more, or the graph holds weights that are no
            parameters of the network and were cut.
        OracleError: torch computes something else than the graph.
        TrainingError: The loss is not finite.
    """
    loading.check_model_file(pruned)
    model = onnx.load(pruned)
    student = copy.deepcopy(network)
    _take_weights(student, model, parameters, pruned.name)
    few = samples.first(_CHECKED_SAMPLES)
    _check_same(student, pruned, few, _unexplained(model, parameters))
    curve = distill(
        student,
        teacher,
        samples,
        evaluate_on,
        options,
        distillation,
        seed,
        checkpoint=checkpoint,
        progress=progress,
    )
    with staged(output) as part:
        _give_weights(student, model, parameters)
        _save(model, part)
        _check_same(student, part, few, ())
    return curve


def _take_weights(network: nn.Module, model: ModelProto, parameters: Mapping[str, Parameter], where: str) -> None:
    """Put the values of the graph's initializers into ``network``, whatever their sizes."""
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    held = {parameter.name for parameter in parameters.values()}
    for name, value in network.named_parameters():
        value.requires_grad_(name in held)
    for name, parameter in parameters.items():
        if name not in initializers or initializers[name].data_type != TensorProto.FLOAT:
            raise UnsupportedModelError(
                f"{where}: initializer {name!r}",
                got="other than float32" if name in initializers else "no such initializer",
                expected=f"the weights of {parameter.name!r}, float32, as they were exported",
                mend="Recover right after pruning; put other passes among compile.candidates.",
            )
        array = numpy_helper.to_array(initializers[name])
        value = torch.from_numpy(np.array(array.T if parameter.transposed else array))
        layer_name, _, leaf = parameter.name.rpartition(".")
        layer = network.get_submodule(layer_name)
        setattr(layer, leaf, nn.Parameter(value) if leaf in dict(layer.named_parameters(recurse=False)) else value)


def _give_weights(network: nn.Module, model: ModelProto, parameters: Mapping[str, Parameter]) -> None:
    state = cast(Mapping[str, torch.Tensor], network.state_dict())
    for tensor in model.graph.initializer:
        if tensor.name in parameters:
            parameter = parameters[tensor.name]
            value: Array = state[parameter.name].numpy(force=True)
            value = np.ascontiguousarray(value.T if parameter.transposed else value)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def _unexplained(model: ModelProto, parameters: Mapping[str, Parameter]) -> list[str]:
    """Return the initializers that look like weights and hold no parameter of the network."""
    return [
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and loading.elements(tensor) > 1 and tensor.name not in parameters
    ]


def _check_same(network: nn.Module, path: Path, samples: Samples, unexplained: list[str] | tuple[()]) -> None:
    (want,) = Session(path).run(samples.batches[0]).values()
    few = Samples(samples.batches[:1], source=samples.source)
    try:
        error, fault = relative_error(want, predict(network, few)), ""
    except RuntimeError as mismatch:
        error, fault = float("inf"), f": {str(mismatch).splitlines()[0]}"
    if error <= TOLERANCE:
        return
    if unexplained or fault:
        raise UnsupportedModelError(
            f"{path.name}: initializer {unexplained[0]!r}" if unexplained else path.name,
            got=f"a network that cannot follow the pruned graph{fault or f' (relative error {error:.3g})'}",
            expected="weights that are parameters of the network, cut or not",
            mend="Leave prune.recovery out, or fold BatchNorm before the export.",
        )
    raise OracleError(
        f"recovery of {path.name}",
        got=f"a relative error of {error:.3g} between torch and the graph",
        expected=f"at most {TOLERANCE:g}",
        mend="This is a defect: please report it with the model; leave prune.recovery out meanwhile.",
    )


def _save(model: ModelProto, path: Path) -> None:
    external = sum(loading.nbytes(tensor) for tensor in model.graph.initializer) > EXTERNAL_ABOVE_BYTES
    onnx.save_model(model, path, save_as_external_data=external, location=f"{path.name}.data")
