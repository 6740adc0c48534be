"""From a torch network to an ONNX file that computes the same."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn

from onnx_lathe.converter.batches import to_tensors
from onnx_lathe.converter.recipe import ExportOptions
from onnx_lathe.runtime.errors import OracleError, RecipeError, UnsupportedModelError
from onnx_lathe.runtime.loading import MAX_PROTOBUF_BYTES
from onnx_lathe.runtime.parity import relative_error
from onnx_lathe.runtime.samples import Array, Feeds
from onnx_lathe.runtime.session import Session
from onnx_lathe.runtime.staged import staged

BATCH = "batch"
"""The name of the dynamic first dimension of every input and output."""

_INLINE_BELOW_BYTES = 1024
_GRAPH_RESERVE_BYTES = 64 * 2**20
"""Left of protobuf's limit for the graph itself where weights are inline."""


@dataclass(frozen=True)
class Parameter:
    """What an initializer of the graph holds.

    Attributes:
        name: A parameter or buffer of the network.
        transposed: Whether the initializer holds its transpose.
    """

    name: str
    transposed: bool


@dataclass(frozen=True)
class Exported:
    """What an export found.

    Attributes:
        parameters: By initializer, the parameter of the network that it holds. Weights that the exporter
            computed from several (folding) or that cannot be told apart are absent.
        error: The largest relative difference between torch's outputs and onnxruntime's.
    """

    parameters: Mapping[str, Parameter]
    error: float


def export(network: nn.Module, example: Feeds, path: Path, options: ExportOptions) -> Exported:
    """Write ``network`` as ONNX after checking that it computes the same, on batches of three sizes.

    The network is in eval mode afterwards. The file carries no trace of the machine (paths, stack traces).

    Args:
        network: Takes the arrays of ``example`` in their order.
        example: A batch; its arrays are named anew by ``options.input_names``, in order.
        path: The file to write; weights over ``options.external_above_mb`` go beside it.
        options: How to export.

    Raises:
        RecipeError: The names do not fit the inputs or outputs.
        UnsupportedModelError: torch cannot export the network.
        OracleError: The outputs differ by more than the tolerance; nothing is written.
    """
    if len(options.input_names) != len(example):
        raise RecipeError(
            "export.input_names",
            got=f"{len(options.input_names)} names ({', '.join(options.input_names)})",
            expected=f"{len(example)}, one for each of {', '.join(example)}",
            mend="Name every input of the network.",
        )
    # At least two samples, else the exporter takes a batch of one for a constant.
    batches = [_resized(example, size) for size in (max(2, _length(example)), 1, _length(example) + 2)]
    model = _to_graph(network.eval(), batches[0], options)
    _strip(model)
    initializers = {name: _array(value) for name, value in model.graph.initializers.items()}
    parameters = match_parameters(initializers, network)
    with staged(path) as part:
        weights = sum(array.nbytes for array in initializers.values())
        if weights > min(options.external_above_mb * 2**20, MAX_PROTOBUF_BYTES - _GRAPH_RESERVE_BYTES):
            ir.save(model, part, external_data=f"{path.name}.data", size_threshold_bytes=_INLINE_BELOW_BYTES)
        else:
            ir.save(model, part)
        session = Session(part)
        error = max(_check(network, session, batch, options) for batch in batches)
    return Exported(parameters, error)


def match_parameters(initializers: Mapping[str, Array], network: nn.Module) -> dict[str, Parameter]:
    """Find which parameter or buffer of ``network`` each initializer holds, exactly or transposed.

    By name where the exporter kept it, else by value where just one has that value. Scalars are left out.
    """
    state = {
        name: tensor.numpy(force=True)
        for name, tensor in network.state_dict().items()
        if tensor.dtype == torch.float32 and tensor.ndim
    }
    found = {
        name: Parameter(name, transposed=False)
        for name, array in initializers.items()
        if name in state and np.array_equal(state[name], array)
    }
    for name, array in initializers.items():
        if name in found:
            continue
        matches = [
            Parameter(candidate, transposed)
            for transposed in (False, True)
            for candidate, value in state.items()
            if candidate not in found
            and (value.ndim == 2 or not transposed)
            and np.array_equal(value.T if transposed else value, array)
        ]
        if len({match.name for match in matches}) == 1:
            found[name] = matches[0]
    return found


def _to_graph(network: nn.Module, example: Feeds, options: ExportOptions) -> ir.Model:
    # Named once: torch finds out that the inputs share the dimension, and warns where it is named again.
    batches = [torch.export.Dim(BATCH), *[torch.export.Dim.DYNAMIC] * (len(example) - 1)]
    try:
        with _quiet():
            program = torch.onnx.export(
                network,
                to_tensors(example),
                dynamo=True,
                input_names=list(options.input_names),
                output_names=list(options.output_names),
                dynamic_shapes=tuple({0: batch} for batch in batches),
                opset_version=options.opset,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise UnsupportedModelError(
            f"network {type(network).__name__}",
            got=f"an operation that torch cannot export ({_cause(error)})",
            expected="a network that torch.export can trace with a dynamic batch",
            mend="Rewrite that part of its forward.",
        ) from error
    model = cast(torch.onnx.ONNXProgram, program).model
    names = [value.name for value in model.graph.outputs]
    if names != list(options.output_names):
        raise RecipeError(
            "export.output_names",
            got=f"{len(options.output_names)} names ({', '.join(options.output_names)})",
            expected=f"{len(names)}, one for each output of the network",
            mend="Name every output of the network.",
        )
    for value in model.graph.inputs:
        if value.shape is None or not value.shape or value.shape[0] != BATCH:
            raise UnsupportedModelError(
                f"network {type(network).__name__}: input {value.name!r}",
                got=f"shape {value.shape}",
                expected=f"a first dimension {BATCH!r} of any size",
                mend="Take sizes from the input in forward, not from the example.",
            )
    return model


def _strip(model: ir.Model) -> None:
    """Remove what the exporter notes about the machine and its own work: stack traces, source paths."""
    ClearMetadataAndDocStringPass()(model)
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for value in values + [value for node in model.graph for value in node.outputs]:
        value.metadata_props.clear()


@contextmanager
def _quiet() -> Generator[None]:
    """Keep back what the exporter says on every run that its user can do nothing about; all else passes."""

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("torchvision is not installed")

    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    logger.addFilter(is_news)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        logger.removeFilter(is_news)


def _check(network: nn.Module, session: Session, batch: Feeds, options: ExportOptions) -> float:
    """Return the largest relative difference between torch's and onnxruntime's outputs on one batch."""
    with torch.inference_mode():
        outputs = network(*to_tensors(batch))
    want = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
    got = session.run(dict(zip(options.input_names, batch.values(), strict=True)))
    worst = 0.0
    for name, tensor in zip(options.output_names, want, strict=True):
        error = relative_error(tensor.numpy(force=True), got[name])
        if not error <= options.tolerance:
            raise OracleError(
                f"export of {type(network).__name__}: output {name!r} of a batch of {_length(batch)}",
                got=f"a relative error of {error:.3g} against torch",
                expected=f"at most {options.tolerance:g}",
                mend="Report this with the network; export.tolerance accepts a larger error.",
            )
        worst = max(worst, error)
    return worst


def _resized(feeds: Feeds, size: int) -> Feeds:
    """Return ``size`` samples, those of ``feeds`` over and over."""
    return {name: array[np.arange(size) % len(array)] for name, array in feeds.items()}


def _length(feeds: Feeds) -> int:
    return len(next(iter(feeds.values())))


def _array(value: ir.Value) -> Array:
    return cast(ir.TensorProtocol, value.const_value).numpy()


def _cause(error: BaseException) -> str:
    """Return the first line of what an error goes back to."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
