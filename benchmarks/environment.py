"""Where a measurement was taken: what must be alike for two of them to be compared."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import psutil

from onnx_lathe.runtime import machine
from onnx_lathe.runtime.extras import installed_version
from onnx_lathe.runtime.providers import cpu_class, default_threads

_PACKAGES = ("onnx-lathe", "onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "numpy", "torch")
_PASSING = frozenset({"load"})
"""What changes from minute to minute, recorded but not compared."""


def describe() -> dict[str, Any]:
    """Return the environment, JSON-able.

    Keys: ``cpu`` (model), ``cpu_class`` (instruction sets), ``cores`` (allowed to this process, by number),
    ``threads`` (what the cores and the cgroup's quota leave), ``memory`` (bytes of the machine), ``kernel``,
    ``governor`` (of the CPU's frequency; None where the machine does not tell), ``python``, ``packages``
    (versions of those installed) and ``load`` (processes that ran or waited over the last minute; None where
    unknown).
    """
    return {
        "cpu": machine.cpu_model(),
        "cpu_class": cpu_class(),
        "cores": machine.allowed_cores(),
        "threads": default_threads(),
        "memory": psutil.virtual_memory().total,
        "kernel": f"{platform.system()} {platform.release()}",
        "governor": machine.governor(),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := installed_version(name))},
        "load": machine.load(),
    }


def lasting(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be alike for two measurements to be compared."""
    return {key: value for key, value in environment.items() if key not in _PASSING}


def differs(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what makes two environments unlike, each as "key: a's, b's"; nothing where they are alike."""
    keys = lasting({**a, **b})
    return tuple(f"{key}: {a.get(key)}, {b.get(key)}" for key in keys if a.get(key) != b.get(key))
