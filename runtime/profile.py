"""What onnxruntime really runs: the operators of the graph it optimized, and the time each takes."""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_lathe.runtime import loading, providers, tensors
from onnx_lathe.runtime.errors import InputError
from onnx_lathe.runtime.samples import Feeds
from onnx_lathe.runtime.session import create, execute, session_options

_KERNEL = "_kernel_time"
"""How onnxruntime's profiler ends the name of the event that is a node's computation."""


@dataclass(frozen=True)
class OperatorTime:
    """What one node of the optimized graph took.

    Attributes:
        node: Its name there; fused nodes have names of onnxruntime's making.
        op_type: Its operator.
        provider: Where it ran, by the users' name.
        seconds: Mean over the runs, the profiler's own cost included.
    """

    node: str
    op_type: str
    provider: str
    seconds: float


def profile(
    model: Path, feeds: Feeds, provider: str = "cpu", threads: int | None = None, runs: int = 10
) -> tuple[OperatorTime, ...]:
    """Run a model ``runs`` times under onnxruntime's profiler and return the time of each node, the longest first.

    The first run, which allocates, is not counted. Profiling slows a run: use the shares, not the sum.

    Raises:
        TensorError: ``feeds`` do not fit the model.
        InputError: ``runs`` is under 1.
    """
    if runs < 1:
        raise InputError("runs", got=str(runs), expected="at least 1", mend="Give a positive number of runs.")
    checked = loading.read_graph(model)
    arrays = tensors.check_feeds(tensors.input_specs(checked, str(model)), feeds)
    outputs = [value.name for value in checked.graph.output]
    options = session_options(providers.default_threads() if threads is None else threads)
    with tempfile.TemporaryDirectory(prefix="lathe-profile-") as folder:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = create(model, providers.resolve(provider), options)
        for _ in range(runs + 1):
            execute(session, str(model), arrays, outputs)
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
    return _times(events, runs)


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


def _times(events: list[dict[str, Any]], runs: int) -> tuple[OperatorTime, ...]:
    """Add up the kernel events of each node (microseconds, in order of time), without its first."""
    seen: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for event in sorted(events, key=lambda event: event.get("ts", 0)):
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            arguments = event["args"]
            node = event["name"].removesuffix(_KERNEL)
            key = (node, arguments["op_name"], providers.user_name(arguments["provider"]))
            seen[key].append(event["dur"] * 1e-6)
    times = (
        OperatorTime(*key, sum(durations[len(durations) // (runs + 1) :]) / runs) for key, durations in seen.items()
    )
    return tuple(sorted(times, key=lambda time: time.seconds, reverse=True))
