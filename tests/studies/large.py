"""Decoders of 0.1 to 2 billion parameters, made on the spot: what quantizing them takes in time and memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

FORMS = ("quantize-dynamic", "quantize-weights{bits=8}", "quantize-weights{bits=4}")
_CHUNK = 2**22
"""Elements of a weight that are drawn together, and bytes that are copied together."""


@dataclass(frozen=True)
class Size:
    """A decoder after Llama, without grouped queries or rotary embedding: what matters here are its weights.

    Attributes:
        hidden: Width of the residual stream.
        layers: Blocks.
        inner: Width inside the feed-forward part.
        vocabulary: Rows of the embedding and columns of the head.
    """

    hidden: int
    layers: int
    inner: int
    vocabulary: int = 32_000

    def weights(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield names and shapes in the order of the file."""
        yield "embedding", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            for name in ("query", "key", "value", "output"):
                yield f"{layer}.{name}", (self.hidden, self.hidden)
            for name in ("gate", "up"):
                yield f"{layer}.{name}", (self.hidden, self.inner)
            yield f"{layer}.down", (self.inner, self.hidden)
        yield "head", (self.hidden, self.vocabulary)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(int(np.prod(shape)) for _, shape in self.weights())


SIZES = (Size(768, 12, 2048), Size(1024, 24, 2816), Size(2048, 19, 5632), Size(2560, 24, 6912))
HEAD = 64
"""Width of an attention head."""


def write(size: Size, path: Path) -> None:
    """Write the decoder with normal random weights beside its graph."""
    rng = np.random.default_rng(0)
    data, offset = path.with_name(f"{path.name}.data"), 0
    initializers: list[TensorProto] = []
    with data.open("wb") as file:
        for name, shape in size.weights():
            count = int(np.prod(shape))
            for start in range(0, count, _CHUNK):
                values = rng.standard_normal(min(_CHUNK, count - start), np.float32)
                file.write((values * np.float32(shape[0] ** -0.5)).tobytes())
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", data.name), ("offset", offset), ("length", 4 * count)):
                tensor.external_data.add(key=key, value=str(value))
            initializers.append(tensor)
            offset += 4 * count
    onnx.save(_graph(size, initializers), path)


def _graph(size: Size, weights: Sequence[TensorProto]) -> onnx.ModelProto:
    nodes: list[onnx.NodeProto] = []

    def op(kind: str, *inputs: str, **attributes: int | Sequence[int]) -> str:
        result = f"{kind}_{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [result], name=result))
        nodes[-1].attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        return result

    def norm(x: str) -> str:
        mean = op("ReduceMean", op("Mul", x, x), "last")
        return op("Div", x, op("Sqrt", op("Add", mean, "epsilon")))

    def heads(x: str, perm: Sequence[int]) -> str:
        return op("Transpose", op("Reshape", x, "split"), perm=perm)

    x = op("Gather", "embedding", "input_ids")
    for layer in range(size.layers):
        y = norm(x)
        q, k, v = (op("MatMul", y, f"{layer}.{name}") for name in ("query", "key", "value"))
        scores = op("MatMul", heads(q, (0, 2, 1, 3)), heads(k, (0, 2, 3, 1)))
        mixed = op("MatMul", op("Softmax", op("Mul", scores, "scale")), heads(v, (0, 2, 1, 3)))
        joined = op("Reshape", op("Transpose", mixed, perm=(0, 2, 1, 3)), "join")
        x = op("Add", x, op("MatMul", joined, f"{layer}.output"))
        y = norm(x)
        gate, up = op("MatMul", y, f"{layer}.gate"), op("MatMul", y, f"{layer}.up")
        inner = op("Mul", op("Mul", gate, op("Sigmoid", gate)), up)
        x = op("Add", x, op("MatMul", inner, f"{layer}.down"))
    nodes.append(helper.make_node("MatMul", [norm(x), "head"], ["logits"], name="head"))
    small = {
        "last": np.array([-1]),
        "epsilon": np.array(1e-6, np.float32),
        "scale": np.array(HEAD**-0.5, np.float32),
        "split": np.array([0, 0, -1, HEAD]),
        "join": np.array([0, 0, size.hidden]),
    }
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "seq", size.vocabulary])],
        [*weights, *(onnx.numpy_helper.from_array(array, name) for name, array in small.items())],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def least_seconds(source: Path, result: Path, folder: Path) -> float:
    """Return how long reading the weights of ``source`` and writing those of ``result`` with fsync take alone."""
    buffer, left = bytearray(_CHUNK), stored_bytes(result)
    begin = time.perf_counter()
    with source.with_name(f"{source.name}.data").open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    with (folder / "least").open("wb", buffering=0) as file:
        while left > 0:
            left -= file.write(memoryview(buffer)[:left]) or 0
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begin
    (folder / "least").unlink()
    return seconds


def stored_bytes(model: Path) -> int:
    """Return the size of a model file with that of its weights beside it."""
    return sum(file.stat().st_size for file in model.parent.glob(f"{model.name}*"))


@dataclass(frozen=True)
class Row:
    """What quantizing one decoder took.

    Attributes:
        parameters: Number of weights.
        form: The pass.
        seconds: Of the whole command, the import of Python's modules included.
        least_seconds: Reading the source and writing the result with fsync, and nothing else.
        peak_bytes: The most memory that the process had at one time.
        result_bytes: Weights of the result.
    """

    parameters: int
    form: str
    seconds: float
    least_seconds: float
    peak_bytes: int
    result_bytes: int


def run(sizes: Sequence[Size], forms: Sequence[str], folder: Path) -> Iterator[Row]:
    """Make each decoder and quantize it by ``lathe apply`` in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    source, target = folder / "decoder.onnx", folder / "quantized.onnx"
    for size in sizes:
        write(size, source)
        for form in forms:
            command = [sys.executable, "-m", "onnx_lathe.converter", "apply", str(source), form, "-o", str(target)]
            begin = time.perf_counter()
            seen = subprocess.run([sys.executable, "-c", _WATCH, *command], check=True, capture_output=True, text=True)
            seconds = time.perf_counter() - begin
            # Three times: the cache of the disk makes one time vary by a factor of three.
            least = float(np.median([least_seconds(source, target, folder) for _ in range(3)]))
            peak = 1024 * int(seen.stdout.splitlines()[-1])
            yield Row(size.parameters, form, seconds, least, peak, stored_bytes(target))


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| parameters | pass | seconds | reading and writing alone | ratio | peak memory | result |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = (
            f"{row.parameters / 1e9:.2f} billion",
            row.form,
            f"{row.seconds:.1f}",
            f"{row.least_seconds:.1f}",
            f"{row.seconds / row.least_seconds:.1f}",
            f"{row.peak_bytes / 1e9:.2f} GB",
            f"{row.result_bytes / 1e9:.2f} GB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


_WATCH = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
