"""What this machine reaches, through onnxruntime's own kernels, on graphs of one operator: about two seconds.

Rates are the best of many calls: what disturbs a call only slows it.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import ModelProto

from onnx_lathe.benchmarks import worker
from onnx_lathe.runtime import providers
from onnx_lathe.runtime.samples import Array
from onnx_lathe.runtime.session import Session

PROBE_SECONDS = 0.06
"""How long each graph runs."""
LEAST_CALLS, MOST_CALLS = 3, 1000

_CHAIN = 64
_SHARED_MACS = 128**3

_PRODUCTS = {
    "float32": "g (float[128, 768] x) => (float[128, 768] y) <float[768, 768] w> { y = MatMul (x, w) }",
    "uint8": "g (uint8[128, 768] x) => (int32[128, 768] y) <int8[768, 768] w> { y = MatMulInteger (x, w) }",
}
_PRODUCT_MACS = 128 * 768 * 768

_INTEGER_CONVOLUTION = """
g (uint8[1, 64, 28, 28] x) => (int32[1, 64, 28, 28] y) <int8[64, 64, 3, 3] w> {
  y = ConvInteger <pads = [1, 1, 1, 1]> (x, w)
}
"""
"""The form that a dynamically quantized convolution has; static ones run as products do."""
_INTEGER_CONVOLUTION_MACS = 64 * 28 * 28 * 64 * 9

_DEPTHWISE = """
g (float[1, 64, 56, 56] x) => (float[1, 64, 56, 56] y) <float[64, 1, 3, 3] w> {
  a = Conv <group = 64, pads = [1, 1, 1, 1]> (x, w)
  b = Conv <group = 64, pads = [1, 1, 1, 1]> (a, w)
  c = Conv <group = 64, pads = [1, 1, 1, 1]> (b, w)
  y = Conv <group = 64, pads = [1, 1, 1, 1]> (c, w)
}
"""
"""Four in a row, as onnxruntime reorders the first's input and the last's output."""
_DEPTHWISE_MACS = 4 * 64 * 56 * 56 * 9

_MOVES = {
    "elementwise": (3, "g (float[512, 768] x, float[512, 768] z) => (float[512, 768] y) { y = Add (x, z) }"),
    "function": (2, "g (float[512, 768] x) => (float[512, 768] y) { y = Gelu (x) }"),
    "normalization": (
        2,
        "g (float[4, 128, 768] x) => (float[4, 128, 768] y) <float[768] w> { y = LayerNormalization (x, w, w) }",
    ),
    "skip-normalization": (
        2,
        """g (float[4, 128, 768] x, float[4, 128, 768] z) => (float[4, 128, 768] y) <float[768] w> {
          s = Add (x, z)
          y = LayerNormalization (s, w, w)
        }""",
    ),
    "transpose": (
        2,
        "g (float[4, 128, 12, 64] x) => (float[4, 12, 128, 64] y) { y = Transpose <perm = [0, 2, 1, 3]> (x) }",
    ),
}
"""Operators that stand for a kind of work on elements, and how many tensors of 1.5 MiB they are taken to move."""
_MOVED_BYTES = 4 * 512 * 768

_WEIGHT_ROWS = (64, 1024, 4096)
"""Of the matrices of 4,096 columns that the bandwidth of weights is measured with: 1, 16 and 64 MiB."""


@dataclass(frozen=True)
class Peaks:
    """What a machine reaches.

    Attributes:
        threads: Of the sessions.
        rates: Multiply-accumulates a second of ``float32`` and ``uint8`` (with int8 weights) products, of
            ``integer-convolution`` (ConvInteger) and of ``few-products`` (depthwise convolutions); bytes a second of
            ``elementwise``, ``function``, ``normalization``, ``skip-normalization`` (after an Add) and ``transpose``.
        bandwidths: Bytes a second at which weights are read, by how many bytes of them there are.
        node_seconds: What a node takes that has next to nothing to do.
        fork_seconds: What sharing the work of a node among the threads costs.
        call_seconds: What a call takes besides its nodes.
    """

    threads: int
    rates: Mapping[str, float]
    bandwidths: Mapping[int, float]
    node_seconds: float
    fork_seconds: float
    call_seconds: float

    def rate(self, kind: str) -> float:
        """Return the rate of a kind of work; types of elements without a peak of their own count as float32."""
        return self.rates.get("uint8" if kind == "int8" else kind, self.rates["float32"])

    def bandwidth(self, nbytes: int) -> float:
        """Return the bytes a second at which so many bytes are read over and over, between the sizes measured."""
        sizes = [math.log(size) for size in self.bandwidths]
        return float(np.interp(math.log(max(nbytes, 1)), sizes, list(self.bandwidths.values())))


def measure_peaks(threads: int | None = None) -> Peaks:
    """Measure this machine on the CPU with so many threads; None for all allowed cores.

    Raises:
        InputError: ``threads`` is under 1.
        DependencyError: No onnxruntime is installed.
    """
    threads = providers.default_threads() if threads is None else threads
    with tempfile.TemporaryDirectory(prefix="lathe-peaks-") as folder:

        def best(text: str) -> float:
            return _best(Path(folder) / "model.onnx", text, threads)

        idle = best(_chain(1))
        node_seconds = max(0.0, best(_chain(1 + _CHAIN)) - idle) / _CHAIN

        def work(text: str) -> float:
            return _without(idle, best(text))

        rates = {kind: _PRODUCT_MACS / work(text) for kind, text in _PRODUCTS.items()}
        rates["integer-convolution"] = _INTEGER_CONVOLUTION_MACS / work(_INTEGER_CONVOLUTION)
        rates["few-products"] = _DEPTHWISE_MACS / work(_DEPTHWISE)
        rates |= {kind: tensors * _MOVED_BYTES / work(text) for kind, (tensors, text) in _MOVES.items()}
        bandwidths = {rows * 4096 * 4: rows * 4096 * 4 / work(_reading(rows)) for rows in _WEIGHT_ROWS}
        sharing = (best(_products(1 + _CHAIN)) - best(_products(1))) / _CHAIN
    fork_seconds = max(0.0, sharing - _SHARED_MACS / rates["float32"] - node_seconds)
    return Peaks(threads, rates, bandwidths, node_seconds, fork_seconds, max(0.0, idle - node_seconds))


def _without(idle: float, seconds: float) -> float:
    """Return the seconds of a call without what a call takes that has next to nothing to do.

    A probe takes many times as long; where a disturbance made it look otherwise, half of it is taken for work.
    """
    return max(seconds - idle, seconds / 2)


def _reading(rows: int) -> str:
    return f"g (float[1, 4096] x, float[4096, {rows}] w) => (float[1, {rows}] y) {{ y = MatMul (x, w) }}"


def _chain(nodes: int) -> str:
    """Return a graph of so many nodes on 16 elements that onnxruntime leaves as they are."""
    body = " ".join(f"t{number} = {'Neg' if number % 2 else 'Abs'} (t{number - 1})" for number in range(1, nodes))
    return f"g (float[1, 16] t0) => (float[1, 16] y) {{ {body} y = Sqrt (t{nodes - 1}) }}"


def _products(nodes: int) -> str:
    """Return a graph of so many products in a row, each just large enough to be shared among threads."""
    body = " ".join(f"t{number} = MatMul (t{number - 1}, w)" for number in range(1, nodes + 1))
    return f"g (float[128, 128] t0) => (float[128, 128] t{nodes}) <float[128, 128] w> {{ {body} }}"


def _best(path: Path, text: str, threads: int) -> float:
    """Return the seconds of the fastest call of a graph in text."""
    onnx.save(_with_weights(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {text}')), path)
    session = Session(path, threads=threads)
    feeds = {spec.name: _ones(spec.shape, spec.dtype) for spec in session.inputs}
    session.run(feeds)
    begin = time.perf_counter()
    session.run(feeds)
    calls = round(PROBE_SECONDS / (time.perf_counter() - begin))
    values = worker.block(lambda: session.run(feeds), min(MOST_CALLS, max(LEAST_CALLS, calls)), 5 * PROBE_SECONDS)
    return min(values) / 1e9


def _ones(shape: tuple[int | str | None, ...], dtype: np.dtype[Any]) -> Array:
    return np.ones([size for size in shape if isinstance(size, int)], dtype)


def _with_weights(model: ModelProto) -> ModelProto:
    """Make weights of ones of what the text declares and no node writes."""
    written = {name for node in model.graph.node for name in node.output}
    for value in model.graph.value_info:
        if value.name not in written:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            shape = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
            model.graph.initializer.append(onnx.numpy_helper.from_array(_ones(shape, dtype), value.name))
    return model
