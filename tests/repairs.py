"""What the tests of repairs share: graphs with given weights, repaired, checked by their oracle, and quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from onnx_lathe.passes import files
from onnx_lathe.passes.edit import Edit
from onnx_lathe.passes.request import Request
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.parity import sqnr_db
from onnx_lathe.runtime.samples import Array, Samples
from onnx_lathe.runtime.session import Session
from tests import graphs


def source(folder: Path, text: str, factors: Mapping[str, Array | float] | None = None) -> Path:
    """Write a text graph with some of its weights multiplied."""
    proto = graphs.build(text)
    for tensor in proto.graph.initializer:
        factor = (factors or {}).get(tensor.name)
        if factor is not None:
            array = (numpy_helper.to_array(tensor) * factor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return graphs.save(proto, folder / "source.onnx")


def repair(path: Path, request: Request, samples: Samples | None = None) -> tuple[Path, Edit]:
    """Apply one request, check it with its oracle, apply it again in vain, and return the file and the edit."""
    model, target = files.load(path), path.with_name(f"{request.name}.onnx")
    edit = request.plan(model, samples, None)
    assert edit(model).modified
    files.save(model, target)
    onnx.checker.check_model(target, full_check=True)
    feeds = tensors.random_feeds(path, seed=1) if samples is None else next(iter(samples.iter_batches(4)))
    for check in edit.check(path, target, feeds):
        assert check.passed, check
    assert not edit(model).modified
    assert not edit(files.load(target)).modified
    return target, edit


def quantized(path: Path, request: Request, samples: Samples) -> ir.Model:
    """Quantize a file, write it beside as ``quantized.onnx`` and return the graph."""
    model = files.load(path)
    request.plan(model, samples, None)(model)
    files.save(model, path.with_name("quantized.onnx"))
    return files.load(path.with_name("quantized.onnx"))


def noise_db(reference: Path, path: Path, request: Request, samples: Samples) -> float:
    """Return the SQNR, in dB, of the first output of ``path`` quantized, against ``reference`` in float."""
    quantized(path, request, samples)
    return difference_db(reference, path.with_name("quantized.onnx"), samples)


def difference_db(reference: Path, path: Path, samples: Samples) -> float:
    """Return the SQNR, in dB, of the first output of ``path`` against that of ``reference``."""
    return sqnr_db(outputs(reference, samples), outputs(path, samples))


def outputs(path: Path, samples: Samples) -> Array:
    """Return the first output on all samples."""
    # Not fused: integer kernels of processors that saturate would add noise of their own.
    session = Session(path, optimize=False)
    results: list[Array] = []
    for feeds in samples.batches:
        result = session.run(feeds)
        results.append(result[next(iter(result))])
    return np.concatenate(results)


def read(model: ir.Model | Path, node: str, index: int = 1) -> Array:
    """Return the constant that the node with the result ``node`` reads as input ``index``, as it reads it."""
    graph = (files.load(model) if isinstance(model, Path) else model).graph
    value = next(item for item in graph if item.outputs[0].name == node).inputs[index]
    assert value is not None
    tensor = ir.convenience.get_const_tensor(value)
    assert tensor is not None
    return tensor.numpy()


def operators(path: Path) -> Sequence[str]:
    """Return the operators of a file, in order."""
    return [node.op_type for node in files.load(path).graph]
