"""Making the forms that the study of compile compares: each in a process of its own, its seconds and memory told."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.studies import rival_compilers
from tests.studies.cases import Network, Places, part_folder

OURS, OURS_PROVIDER = "onnx-lathe", "onnx-lathe, OpenVINO provider"
MAX_DROP = 0.01
"""Of the metric, on 0..1."""
_PATIENCE = 900.0
"""Seconds that a rival may take to make a form."""
_INTERPRETERS = {"olive": "olive", "optimum": "optimum", "ort-optimizer-dynamic": "olive"}
"""Which interpreter has a tool; the others are all in one."""


@dataclass(frozen=True)
class Form:
    """What one tool made of a network, and what that is worth.

    Attributes:
        name: The tool.
        model: The file; None where there is none.
        failure: Why there is none, or why it does not run.
        seconds: To make it, the start of the process included.
        peak_bytes: The most memory that a process of it had at one time.
        size: Bytes of the file with its weights.
        note: What it is, where the tool says so.
        certificate: Its accuracy beside the original's: an `onnx_lathe.benchmarks.result.Certificate`.
        speed: Times the original: an `onnx_lathe.benchmarks.result.Comparison`.
        latency: Median seconds of a call.
    """

    name: str
    model: str | None = None
    failure: str | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    size: int | None = None
    note: str = ""
    certificate: Mapping[str, Any] = field(default_factory=dict[str, Any])
    speed: Mapping[str, Any] = field(default_factory=dict[str, Any])
    latency: float | None = None


@dataclass(frozen=True)
class Watched:
    """How a command ended.

    Attributes:
        failure: The last thing that it said, where it failed.
        seconds: From its start to its end.
        peak_bytes: The most memory that it, or a process of it, had at one time.
    """

    failure: str | None
    seconds: float
    peak_bytes: int


def watched(command: Sequence[str]) -> Watched:
    """Run a command and tell what it took."""
    began = time.perf_counter()
    # In between stands a small process, because Linux hands the peak memory of a parent down to its children.
    chain = [sys.executable, "-S", "-c", _WATCH, str(_PATIENCE), *command]
    seen = subprocess.run(chain, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    status, peak = map(int, seen.stdout.splitlines()[-1].split())
    said = [line.strip() for line in seen.stderr.splitlines() if line.strip()] or [f"exit status {status}"]
    return Watched(said[-1][:300] if status else None, seconds, 1024 * peak)


_WATCH = """
import resource, subprocess, sys
try:
    status = subprocess.run(sys.argv[2:], stdout=subprocess.DEVNULL, timeout=float(sys.argv[1])).returncode
except subprocess.TimeoutExpired:
    status = 1
    print(f"not done after {sys.argv[1]} s", file=sys.stderr)
print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def interpreter(tool: str, places: Places) -> Path:
    """Return the Python that a rival's tool runs in."""
    return places.interpreter(_INTERPRETERS.get(tool, "tools"))


def rival(tool: str, network: Network, places: Places) -> Form:
    """Return what ``tool`` makes of a network; made once, and read from its record later."""
    folder = places.folder / "rivals" / network.name
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / f"{tool}.json"
    if record.exists():
        return Form(**json.loads(record.read_text()))
    output = folder / f"{tool}.{'xml' if tool == 'nncf-openvino' else 'onnx'}"
    command = [
        str(interpreter(tool, places)),
        str(Path(rival_compilers.__file__).resolve()),
        tool,
        str(places.model(network.name).resolve()),
        str(part_folder(places, network, "calibrate").resolve()),
        str(output.resolve()),
        network.kind,
    ]
    seen = watched(command)
    form = _made(tool, output, seen)
    record.write_text(json.dumps(asdict(form)))
    return form


def ours(
    name: str, network: Network, dims: Mapping[str, int], places: Places, seconds: float, threads: int | None
) -> Form:
    """Compile a network anew, without anything that an earlier compilation left.

    Args:
        name: `OURS`, or `OURS_PROVIDER` for onnxruntime's OpenVINO provider.
        network: What to compile.
        dims: The shape to be fast at; without sizes the data's own.
        places: Where things are.
        seconds: Time budget of the search.
        threads: Of the sessions; None for all allowed cores.
    """
    provider = name == OURS_PROVIDER
    python = places.interpreter("provider") if provider else Path(sys.executable)
    shape = "-".join(map(str, dims.values())) or "data"
    folder = places.folder / "ours" / f"{network.name}-{shape}{'-provider' if provider else ''}"
    # With its cache.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job = {
        "model": str(places.model(network.name).resolve()),
        "output": str((folder / "bundle").resolve()),
        "data": str(part_folder(places, network, "calibrate").resolve()),
        "eval_data": str(part_folder(places, network, "choose").resolve()),
        "metric": network.metric,
        "max_drop": MAX_DROP,
        "dims": [dict(dims)] if dims else [],
        "provider": "openvino" if provider else "cpu",
        "threads": threads,
        "time_budget": seconds,
    }
    (folder / "job.json").write_text(json.dumps(job))
    seen = watched([str(python), "-m", "tests.studies.compile_one", str(folder / "job.json")])
    form = _made(name, folder / "bundle" / "model.onnx", seen)
    return form if form.failure else _with_passes(form, folder / "bundle" / "manifest.json")


def _made(name: str, output: Path, seen: Watched) -> Form:
    if seen.failure or not output.exists():
        failure = seen.failure or "it left no file"
        return Form(name, failure=failure, seconds=seen.seconds, peak_bytes=seen.peak_bytes)
    return Form(name, str(output), seconds=seen.seconds, peak_bytes=seen.peak_bytes, size=stored_bytes(output))


def _with_passes(form: Form, manifest: Path) -> Form:
    told = json.loads(manifest.read_text())
    return Form(**{**asdict(form), "note": told.get("passes") or f"the original: {told.get('reason')}"})


def stored_bytes(model: Path) -> int:
    """Return the size of a model file with that of its weights beside it."""
    return sum(
        file.stat().st_size
        for file in {model, model.with_suffix(".bin"), *model.parent.glob(f"{model.name}*")}
        if file.exists()
    )
