"""onnxruntime and torch: which builds, and what really runs. Each is tried out in a process of its own."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

from onnx_lathe.converter.diagnosis.check import Check, ask
from onnx_lathe.runtime.errors import DependencyError

_TRIAL = "onnx_lathe.runtime.trial"
_TORCH_TRIAL = "onnx_lathe.converter.diagnosis.torch_trial"
_REMOTE = {"azure"}
"""Providers that call a service elsewhere: no node of an ordinary model is theirs."""
_SECONDS = 20.0


def checks() -> Iterator[Check]:
    """Yield what there is to say of onnxruntime, its providers, CUDA and torch."""
    try:
        build = ask(_TRIAL)
    except DependencyError as error:
        build: dict[str, Any] = {"providers": [], "cuda": ""}
        yield Check("onnxruntime", "problem", error.got, error.mend)
    else:
        cuda = f", built for CUDA {build['cuda']}" if build["cuda"] else ""
        held = ", ".join(build["providers"])
        yield Check("onnxruntime", "ok", f"{build['version']}{cuda}; compiled in: {held}")
    yield from map(_provider, build["providers"])
    devices = _devices()
    yield from _cuda(devices, build["cuda"])
    yield _torch(devices, build["cuda"])


def _provider(name: str) -> Check:
    title = f"provider {name}"
    if name in _REMOTE:
        return Check(title, "note", "not tried: it calls a service elsewhere and takes no node of an ordinary model")
    try:
        found = ask(_TRIAL, "provider", name)
    except DependencyError as error:
        return Check(title, "problem" if name == "cpu" else "warning", error.got, error.mend)
    placed = ", ".join(f"{count} nodes on {place}" for place, count in found["placement"].items())
    if not found["correct"]:
        return Check(title, "problem" if name == "cpu" else "warning", f"{placed}: a wrong result", "Do not use it.")
    return Check(title, "ok", f"runs: {placed} of a small model")


def _devices() -> list[str]:
    """Return the NVIDIA GPUs that the driver's own tool sees."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _cuda(devices: list[str], built_for: str) -> Iterator[Check]:
    if devices:
        yield Check("GPU", "ok", "; ".join(devices))
    else:
        yield Check(
            "GPU",
            "warning" if built_for else "note",
            "nvidia-smi finds no NVIDIA GPU: the provider cuda cannot run here",
            "Install NVIDIA's driver, or give the container its GPUs." if built_for else "",
        )
    if devices and not built_for:
        mend = 'Run: pip uninstall -y onnxruntime, then: pip install "onnx-lathe[cuda]".'
        yield Check("CUDA", "note", "this onnxruntime is built without CUDA: the GPU is not used", mend)
    if not built_for:
        return
    try:
        found = ask(_TRIAL, "cuda")
    except DependencyError as error:
        yield Check("CUDA", "warning", error.got, error.mend)
        return
    libraries: dict[str, str | None] = found["libraries"]
    there = ", ".join(f"{name} {version}".strip() for name, version in libraries.items() if version is not None)
    missing = [name for name, version in libraries.items() if version is None]
    text = f"driver for CUDA {found['driver'] or 'unknown (no libcuda.so.1)'}; found: {there or 'nothing'}"
    if missing:
        mend = 'Run: pip install "onnxruntime-gpu[cuda,cudnn]", or put their folder into LD_LIBRARY_PATH.'
        yield Check("CUDA", "warning", f"{text}; missing: {', '.join(missing)}", mend)
    else:
        yield Check("CUDA", "ok", text)


def _torch(devices: list[str], built_for: str) -> Check:
    if importlib.util.find_spec("torch") is None:
        mend = 'For recipes run: pip install "onnx-lathe[train]".'
        return Check("torch", "note", "not installed: recipes cannot be trained, .onnx files can be compiled", mend)
    try:
        found = ask(_TORCH_TRIAL)
    except DependencyError as error:
        return Check("torch", "warning", error.got, error.mend)
    cuda: str = found["cuda"]
    kind = f"for CUDA {cuda}" if cuda else "for the CPU"
    seen = f", {found['devices']} GPUs" if cuda else ""
    text = f"{found['version']} {kind}{seen}; bf16 {'supported' if found['bf16'] else 'not supported'}"
    if cuda and built_for and cuda.partition(".")[0] != built_for.partition(".")[0]:
        mend = "Install builds of both for one CUDA version: in one process each loads its own libraries."
        return Check("torch", "warning", f"{text}; onnxruntime is built for CUDA {built_for}", mend)
    if devices and not found["devices"]:
        return Check("torch", "note", f"{text}: it does not use the GPU", "Install torch built for CUDA.")
    return Check("torch", "ok", text)
