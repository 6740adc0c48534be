"""Trying out onnxruntime in a process of its own, which may crash or hang: ``python -m onnx_lathe.runtime.trial``.

Without an argument it tells the build of onnxruntime; with ``provider NAME`` it runs a model of two nodes there; with
``cuda`` it loads what the CUDA provider needs. The last line of stdout is the answer in JSON: what was found, or
``error`` with what a `LatheError` says.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser

from onnx_lathe.runtime import providers
from onnx_lathe.runtime.errors import LatheError
from onnx_lathe.runtime.session import Session

_MODEL = """
<ir_version: 10, opset_import: ["": 20]>
trial (float[2, 3] x) => (float[2, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}> {
  [product] h = MatMul (x, w)
  [relu] y = Relu (h)
}
"""


def build() -> dict[str, Any]:
    """Return version, providers and CUDA version ("" where there is none) of the onnxruntime that is installed."""
    module = providers.onnxruntime()
    cuda = getattr(module, "cuda_version", "")
    return {"version": module.__version__, "providers": providers.available(), "cuda": cuda}


def provider(name: str) -> dict[str, Any]:
    """Run a model of two nodes on a provider; return how many nodes ran where, and whether the answer was right."""
    with tempfile.TemporaryDirectory(prefix="lathe-trial-") as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(onnx.parser.parse_model(_MODEL), path)
        session = Session(path, provider=name, threads=1)
        x = np.arange(-3, 3, dtype=np.float32).reshape(2, 3)
        found = session.run({"x": x})["y"]
    wanted = np.maximum(x @ np.arange(1, 7, dtype=np.float32).reshape(3, 2), 0)
    placement = Counter(session.placement().values())
    return {"placement": dict(placement), "correct": bool(np.allclose(found, wanted, rtol=1e-2))}


def cuda() -> dict[str, Any]:
    """Return the CUDA version that the driver allows, and the versions of the libraries that this build needs.

    A library that the loader does not find has the version None; one that does not tell its version, "".
    """
    providers.load_libraries("cuda")
    major = int(build()["cuda"].partition(".")[0])
    names = (
        f"libcudart.so.{major}",
        *(f"lib{name}.so.{major}" for name in ("cublas", "cublasLt", "nvrtc")),
        f"libcufft.so.{major - 1}",
        "libcurand.so.10",
        "libcudnn.so.9",
    )
    return {
        "driver": _version("libcuda.so.1", "cuDriverGetVersion"),
        "libraries": {name: _version(name, "cudaRuntimeGetVersion") for name in names},
    }


def _version(library: str, function: str) -> str | None:
    """Return the version that a library tells by one of CUDA's functions, or by cuDNN's own."""
    try:
        loaded = ctypes.CDLL(library)
    except OSError:
        return None
    if hasattr(loaded, "cudnnGetVersion"):
        number = int(loaded.cudnnGetVersion())
        return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    number = ctypes.c_int()
    if not hasattr(loaded, function) or loaded[function](ctypes.byref(number)) != 0:
        return ""
    return f"{number.value // 1000}.{number.value // 10 % 100}"


def main(arguments: list[str]) -> int:
    """Answer one question; return the exit status."""
    try:
        match arguments:
            case ["provider", name]:
                answer = provider(name)
            case ["cuda"]:
                answer = cuda()
            case _:
                answer = build()
    except LatheError as error:
        answer = {"error": {"got": error.got, "expected": error.expected, "mend": error.mend}}
    print(json.dumps(answer))  # noqa: T201
    return int("error" in answer)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
