"""onnxruntime, its execution providers, and the machine that it finds; nothing else imports onnxruntime."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.metadata
import math
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

from onnx_lathe.runtime import cgroups, machine
from onnx_lathe.runtime.errors import DependencyError, ProviderError

CPU = "CPUExecutionProvider"

_SUFFIX = "ExecutionProvider"
_DISTRIBUTIONS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "onnxruntime-qnn",
)
"""Distributions that all install a package called ``onnxruntime`` and overwrite each other's files."""

_INSTALL = 'pip install "onnx-lathe[cpu]", or "onnx-lathe[cuda]" for NVIDIA GPUs'

_CPU_CLASSES = (
    ("amx-int8", ("amx_int8",)),
    ("avx512-vnni", ("avx512_vnni",)),
    ("avx-vnni", ("avx_vnni",)),
    ("avx512", ("avx512f",)),
    ("avx2", ("avx2",)),
    ("i8mm", ("i8mm",)),
    ("dotprod", ("asimddp",)),
)
"""Instruction sets that decide which integer kernels run, best first, with the flags that the kernel reports."""


@functools.cache
def onnxruntime() -> Any:
    """Return the module ``onnxruntime``.

    Raises:
        DependencyError: None is installed, or several that overwrite each other.
    """
    installed = _installed()
    if len(installed) > 1:
        raise DependencyError(
            "onnxruntime",
            got=f"{' and '.join(installed)} in one environment, which overwrite each other's files",
            expected="one of them",
            mend=f"Run: pip uninstall -y {' '.join(installed)}, then: {_INSTALL}.",
        )
    try:
        module = importlib.import_module("onnxruntime")
    except ModuleNotFoundError:
        got = "no onnxruntime in this environment"
    except ImportError as error:
        got = f"an onnxruntime that does not load ({error})"
    else:
        if hasattr(module, "InferenceSession"):
            return module
        got = "the remains of an onnxruntime, as they are left when one of two is uninstalled"
    raise DependencyError(
        "onnxruntime",
        got=got,
        expected="one build of it",
        mend=f"Run: {_INSTALL}; add --force-reinstall where files are missing.",
    )


def _installed() -> list[str]:
    """Return the distributions in this environment that install ``onnxruntime``."""
    known = {distribution.name.lower() for distribution in importlib.metadata.distributions()}
    return [name for name in _DISTRIBUTIONS if name in known]


@functools.cache
def onnxruntime_errors() -> tuple[type[Exception], ...]:
    """Return what onnxruntime raises: RuntimeError, and a class for each status code (they share no base)."""
    onnxruntime()
    state: Any = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    found = (getattr(state, name) for name in dir(state))
    own = (kind for kind in found if isinstance(kind, type) and issubclass(kind, Exception))
    return (*own, RuntimeError)


def clean_message(error: Exception) -> str:
    """Return the sentence in an error of onnxruntime: without codes, paths, source files and C++ signatures."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error))
    text = re.sub(r"^Load model from .*? failed:", "", text)
    text = re.sub(r"\S+\.(?:cc|cpp|cu|h):\d+ .*?\)(?: const)?(?: \[with .*?\])? ", "", text)
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= 300 else f"{text[:300]}..."


def user_name(provider: str) -> str:
    """Return what users call a provider of onnxruntime: "CUDAExecutionProvider" is "cuda"."""
    return provider.removesuffix(_SUFFIX).lower()


def available() -> tuple[str, ...]:
    """Return the users' names of the providers that this build of onnxruntime holds, in its order.

    That a provider is compiled in says neither that its libraries load nor that it takes a node.
    """
    return tuple(user_name(name) for name in onnxruntime().get_available_providers())


def resolve(provider: str | None) -> str:
    """Return onnxruntime's name of ``provider``, which may be a user's name or onnxruntime's own; None is the CPU.

    Raises:
        ProviderError: This build of onnxruntime has no such provider; the message lists those that it has.
    """
    wanted = user_name(provider or CPU)
    for name in onnxruntime().get_available_providers():
        if user_name(name) == wanted:
            return str(name)
    near = difflib.get_close_matches(wanted, available(), n=1)
    if near:
        mend = f"Did you mean {near[0]!r}?"
    elif wanted in ("cuda", "tensorrt"):
        mend = f'Run: pip uninstall -y {" ".join(_installed())}, then: pip install "onnx-lathe[cuda]".'
    else:
        mend = "Name one of these, or install the build of onnxruntime that has it."
    raise ProviderError(
        f"provider {provider!r}",
        got="a provider that this onnxruntime does not have",
        expected=f"one of {', '.join(available())}",
        mend=mend,
    )


def load_libraries(provider: str) -> None:
    """Load the CUDA and cuDNN libraries that pip installed, which the dynamic linker does not look for."""
    if user_name(provider) in ("cuda", "tensorrt"):
        with contextlib.redirect_stdout(sys.stderr):
            onnxruntime().preload_dlls()


def default_threads(cgroup_root: Path = cgroups.ROOT, membership: Path = cgroups.MEMBERSHIP) -> int:
    """Return how many threads this process can keep busy: its allowed CPUs, or its cgroups' quota where that is less.

    onnxruntime counts the machine's cores and sees no quota.

    Args:
        cgroup_root: Where the cgroup hierarchies (version 1 or 2) are mounted.
        membership: Which cgroups the process is in (man 7 cgroups).
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(math.ceil(quota) for quota in cgroups.cpu_limits(cgroup_root, membership))]))


def cpu_class(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the machine and the best instruction set that integer kernels use, such as "x86_64 avx512-vnni"."""
    flags = machine.cpu_flags(cpuinfo)
    best = next((name for name, needed in _CPU_CLASSES if flags.issuperset(needed)), "baseline")
    return f"{platform.machine().lower()} {best}"
