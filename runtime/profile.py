"""What onnxruntime really runs: the operators of the graph it optimized, and the time each takes."""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnx import ModelProto

from onnx_lathe.runtime import loading, providers, tensors
from onnx_lathe.runtime.errors import InputError
from onnx_lathe.runtime.samples import Feeds
from onnx_lathe.runtime.session import create, execute, session_options

_KERNEL = "_kernel_time"
"""How onnxruntime's profiler ends the name of the event that is a node's computation."""

_NBITS = "MatMulNBits"
_FUSED_LEVEL = 4
"""Of the MatMulNBits that onnxruntime makes of DequantizeLinear and MatMul, where it is not told otherwise."""

_DTYPES = {"float": "float32", "double": "float64"}
"""Numpy's names where the profiler has others."""


@dataclass(frozen=True)
class Operand:
    """A tensor that a kernel reads or writes: numpy's name of its element type, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class OperatorTime:
    """What one node of the optimized graph took.

    Attributes:
        node: Its name there; fused nodes have names of onnxruntime's making.
        op_type: Its operator.
        provider: Where it ran, by the users' name.
        seconds: Of one run: mean over the runs, the profiler's own cost included.
        executions: How often it is executed in one run; more than once in a loop.
        inputs: What one execution reads, weights included; optional inputs that are absent are left out, so that what
            follows moves up. None where unknown, as where executions differ.
        outputs: What one execution writes, likewise.
        read_bytes: Of all inputs of one run; None where unknown. A tensor that stands at two inputs counts twice.
        written_bytes: Of all outputs of one run; None where unknown.
        accuracy_level: What a MatMulNBits may compute in (4: int8); None of all others.
    """

    node: str
    op_type: str
    provider: str
    seconds: float
    executions: int = 1
    inputs: tuple[Operand, ...] | None = None
    outputs: tuple[Operand, ...] | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None
    accuracy_level: int | None = None


def profile(
    model: Path, feeds: Feeds, provider: str = "cpu", threads: int | None = None, runs: int = 10
) -> tuple[OperatorTime, ...]:
    """Run a model ``runs`` times under onnxruntime's profiler and return the time of each node, the longest first.

    The first run, which allocates, is not counted. Profiling slows a run: use the shares, not the sum. Nodes that hold
    graphs (If, Loop, Scan) take their own time and that of the nodes inside, which are listed too.

    Kernels repack weights as a session is made, and the profiler then sees them no more: shapes and bytes come from
    one run of a second session that does not.

    Raises:
        TensorError: ``feeds`` do not fit the model.
        InputError: ``runs`` is under 1.
    """
    if runs < 1:
        raise InputError("runs", got=str(runs), expected="at least 1", mend="Give a positive number of runs.")
    checked = loading.read_graph(model)
    arrays = tensors.check_feeds(tensors.input_specs(checked, str(model)), feeds)
    outputs = [value.name for value in checked.graph.output]
    threads = providers.default_threads() if threads is None else threads

    def events(times: int, *, repack: bool) -> list[dict[str, Any]]:
        options = session_options(threads)
        options.add_session_config_entry("session.disable_prepacking", "0" if repack else "1")
        with tempfile.TemporaryDirectory(prefix="lathe-profile-") as folder:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = create(model, providers.resolve(provider), options)
            for _ in range(times):
                execute(session, str(model), arrays, outputs)
            return json.loads(Path(session.end_profiling()).read_text())

    times = _times(events(runs + 1, repack=True), events(1, repack=False), runs)
    levels = _accuracy_levels(checked)
    return tuple(replace(time, accuracy_level=_level(time, levels)) for time in times)


def optimized_operators(
    model: Path, provider: str = "cpu", threads: int | None = None, *, optimize: bool = True
) -> Mapping[str, int]:
    """Return how often each operator type occurs in the graph that onnxruntime makes of ``model`` and runs."""
    loading.check_model_file(model)
    options = session_options(providers.default_threads() if threads is None else threads, optimize=optimize)
    with tempfile.TemporaryDirectory(prefix="lathe-optimized-") as folder:
        saved = Path(folder) / "model.onnx"
        options.optimized_model_filepath = str(saved)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        create(model, providers.resolve(provider), options)
        graph = loading.read_graph(saved)
    return dict(Counter(node.op_type for node in loading.nodes(graph)).most_common())


def _accuracy_levels(model: ModelProto) -> Mapping[str, int]:
    """Return the accuracy level of each MatMulNBits of a model by its name; 0, the default, is float32."""
    found = [node for node in loading.nodes(model) if node.op_type == _NBITS]
    return {node.name: next((item.i for item in node.attribute if item.name == "accuracy_level"), 0) for node in found}


def _level(time: OperatorTime, levels: Mapping[str, int]) -> int | None:
    return levels.get(time.node, _FUSED_LEVEL) if time.op_type == _NBITS else None


_Key = tuple[str, str, str, str]
"""Of a node: its name, operator and provider, and its index, as fused nodes can share a name."""


def _times(events: list[dict[str, Any]], whole: list[dict[str, Any]], runs: int) -> tuple[OperatorTime, ...]:
    """Add up the kernel events of each node without its first; ``whole`` are those of one run with all weights."""
    seen = {key: _execution(key, [event["args"] for event in found]) for key, found in _kernels(whole).items()}
    times: list[OperatorTime] = []
    for key, found in _kernels(events).items():
        durations = [event["dur"] * 1e-6 for event in found]
        seconds = sum(durations[len(durations) // (runs + 1) :]) / runs
        times.append(replace(seen.get(key) or OperatorTime(*key[:3], 0.0), seconds=seconds))
    return tuple(sorted(times, key=lambda time: time.seconds, reverse=True))


def _kernels(events: list[dict[str, Any]]) -> Mapping[_Key, list[dict[str, Any]]]:
    """Return the kernel events of each node in order of time."""
    found: dict[_Key, list[dict[str, Any]]] = defaultdict(list)
    for event in sorted(events, key=lambda event: event.get("ts", 0)):
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            arguments = event["args"]
            provider = providers.user_name(arguments["provider"])
            node = event["name"].removesuffix(_KERNEL)
            found[node, arguments["op_name"], provider, arguments["node_index"]].append(event)
    return found


def _execution(key: _Key, events: list[dict[str, Any]]) -> OperatorTime:
    """Return what a node executes in one run, from the arguments of its events, without its time."""
    inputs, outputs = ({_operands(event[f"{side}_type_shape"]) for event in events} for side in ("input", "output"))
    return OperatorTime(
        *key[:3],
        seconds=0.0,
        executions=len(events),
        inputs=inputs.pop() if len(inputs) == 1 else None,
        outputs=outputs.pop() if len(outputs) == 1 else None,
        read_bytes=sum(int(event["activation_size"]) + int(event["parameter_size"]) for event in events),
        written_bytes=sum(int(event["output_size"]) for event in events),
    )


def _operands(described: list[dict[str, list[int]]]) -> tuple[Operand, ...]:
    """Read the profiler's ``[{"float": [2, 3]}, ...]``."""
    return tuple(
        Operand(_DTYPES.get(dtype, dtype), tuple(shape)) for entry in described for dtype, shape in entry.items()
    )
