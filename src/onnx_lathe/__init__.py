"""onnx-lathe: from a trained network to the fastest ONNX model that keeps its accuracy on the machine at hand.

The public functions are one a verb of the command ``lathe``; they and `Session` load on first use, so that importing
the package costs nothing and never needs torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx_lathe.benchmarks.measure import measure as measure
    from onnx_lathe.converter.apply import apply as apply
    from onnx_lathe.converter.attribute import attribute as attribute
    from onnx_lathe.converter.bench import bench as bench
    from onnx_lathe.converter.compare import compare as compare
    from onnx_lathe.converter.compile.compile import compile as compile
    from onnx_lathe.converter.convert import convert as convert
    from onnx_lathe.converter.convert import distill as distill
    from onnx_lathe.converter.convert import export as export
    from onnx_lathe.converter.convert import train as train
    from onnx_lathe.converter.deploy import deploy as deploy
    from onnx_lathe.converter.doctor import doctor as doctor
    from onnx_lathe.converter.inspect import inspect as inspect
    from onnx_lathe.converter.run import run as run
    from onnx_lathe.converter.sensitivity import sensitivity as sensitivity
    from onnx_lathe.converter.workload import Workload as Workload
    from onnx_lathe.runtime.bundle import open_bundle as open_bundle
    from onnx_lathe.runtime.errors import LatheError as LatheError
    from onnx_lathe.runtime.samples import Samples as Samples
    from onnx_lathe.runtime.sealing import decrypt as decrypt
    from onnx_lathe.runtime.sealing import encrypt as encrypt
    from onnx_lathe.runtime.serve.serve import serve as serve
    from onnx_lathe.runtime.session import Session as Session
    from onnx_lathe.runtime.signing import sign as sign
    from onnx_lathe.runtime.signing import verify as verify

_HOMES = {
    "LatheError": "runtime.errors",
    "Samples": "runtime.samples",
    "Session": "runtime.session",
    "Workload": "converter.workload",
    "apply": "converter.apply",
    "attribute": "converter.attribute",
    "bench": "converter.bench",
    "compare": "converter.compare",
    "compile": "converter.compile.compile",
    "convert": "converter.convert",
    "decrypt": "runtime.sealing",
    "deploy": "converter.deploy",
    "distill": "converter.convert",
    "doctor": "converter.doctor",
    "encrypt": "runtime.sealing",
    "export": "converter.convert",
    "inspect": "converter.inspect",
    "measure": "benchmarks.measure",
    "open_bundle": "runtime.bundle",
    "run": "converter.run",
    "sensitivity": "converter.sensitivity",
    "serve": "runtime.serve.serve",
    "sign": "runtime.signing",
    "train": "converter.convert",
    "verify": "runtime.signing",
}

__all__ = [
    *_HOMES,  # pyright: ignore[reportUnsupportedDunderAll]
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
