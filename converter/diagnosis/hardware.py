"""The machine: its CPU, how much of it and of its memory is ours, and how steady it is."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from onnx_lathe.converter.diagnosis.check import Check
from onnx_lathe.runtime import cgroups, machine
from onnx_lathe.runtime.providers import cpu_class, default_threads

_GIB = 2**30
_LEAST_MEMORY, _LEAST_DISK = 2 * _GIB, 2 * _GIB
_BUSY = 0.5
"""Of the allowed cores: a load above this share of them disturbs measurements."""

_FLAGS = (
    *("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "amx_tile"),
    *("asimddp", "i8mm", "bf16", "sve"),
)
_FAST_INTEGERS = {"amx-int8", "avx512-vnni", "avx-vnni", "i8mm", "dotprod"}
_SATURATING = {"avx2", "avx512"}


def checks() -> Iterator[Check]:
    """Yield what there is to say of the machine."""
    yield _cpu()
    yield _cores()
    yield _memory()
    yield _steadiness()
    yield _load()
    yield from (_disk(what, folder) for what, folder in (("working folder", Path.cwd()), ("temporary files", _temp())))


def _cpu() -> Check:
    kernels = cpu_class().partition(" ")[2]
    flags = [flag for flag in _FLAGS if flag in machine.cpu_flags()]
    found = f"{machine.cpu_model()}, {cpu_class()} ({', '.join(flags) or 'no flags known'}): "
    if kernels in _FAST_INTEGERS:
        return Check("CPU", "ok", found + "products of 8-bit integers have instructions of their own, INT8 pays")
    if kernels in _SATURATING:
        return Check(
            "CPU",
            "note",
            found + "no VNNI: products of 8-bit integers saturate and gain less; weights are quantized to 7 bits here",
        )
    return Check("CPU", "note", found + "no instructions for 8-bit integers known: INT8 saves memory, hardly time")


def _cores() -> Check:
    allowed, physical = len(machine.allowed_cores()), psutil.cpu_count(logical=False)
    found = f"{allowed} of {os.cpu_count() or 'unknown'} logical cores allowed, {physical or 'unknown'} physical"
    quotas = list(cgroups.cpu_limits())
    if quotas and min(quotas) < allowed:
        return Check(
            "cores",
            "warning",
            f"{found}; the cgroup's quota is {min(quotas):g} CPUs, which onnxruntime does not see: lathe uses "
            f"{default_threads()} threads, and calls are halted once the quota of a period is spent",
            f"In plain onnxruntime set intra_op_num_threads to {default_threads()}; pin the container to whole cores.",
        )
    if physical and allowed > physical:
        return Check(
            "cores",
            "note",
            f"{found}: two threads share a core; lathe uses {default_threads()}",
            f"Try --threads {physical}.",
        )
    return Check("cores", "ok", f"{found}, no quota; lathe uses {default_threads()} threads")


def _memory() -> Check:
    memory = psutil.virtual_memory()
    limits = [limit for limit in cgroups.memory_limits() if limit < memory.total]
    found = f"{memory.total / _GIB:.1f} GiB, {memory.available / _GIB:.1f} available"
    if limits:
        found += f"; the cgroup's limit is {min(limits) / _GIB:.1f} GiB"
    if min([memory.available, *limits]) < _LEAST_MEMORY:
        return Check("memory", "warning", found, "Free memory, or work on models of a few hundred megabytes at most.")
    return Check("memory", "note" if limits else "ok", found)


def _steadiness() -> Check:
    governor, turbo = machine.governor(), machine.turbo()
    virtual = "a virtual machine" if "hypervisor" in machine.cpu_flags() else "no hypervisor seen"
    spelled = {None: "turbo unknown", True: "turbo on", False: "turbo off"}[turbo]
    found = f"governor {governor or 'unknown'}, {spelled}, {virtual}"
    if governor in ("powersave", "ondemand", "conservative"):
        return Check(
            "clock",
            "warning",
            f"{found}: the frequency follows the load",
            "Run: cpupower frequency-set -g performance.",
        )
    if "hypervisor" in machine.cpu_flags():
        return Check("clock", "note", f"{found}: neighbours may disturb measurements; the canary tells when they do")
    return Check("clock", "ok", found)


def _load() -> Check:
    load, allowed = machine.load(), len(machine.allowed_cores())
    if load is None:
        return Check("load", "note", "unknown here")
    found = f"{load:.1f} processes ran or waited over the last minute, on {allowed} cores"
    if load > _BUSY * allowed:
        return Check("load", "warning", f"{found}: measurements will be unsteady", "Let other work end first.")
    return Check("load", "ok", found)


def _disk(what: str, folder: Path) -> Check:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Check(what, "warning", f"{folder}: {error.strerror or error}", "Change to a folder that is there.")
    found = f"{folder}: {free / _GIB:.1f} GiB free"
    if not os.access(folder, os.W_OK):
        return Check(what, "warning", f"{found}, but not writable", "Work in a folder that you may write to.")
    if free < _LEAST_DISK:
        return Check(what, "warning", found, "Free some disk: a search keeps every candidate until it ends.")
    return Check(what, "ok", found)


def _temp() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:  # none of the usual folders can be written to
        return Path(os.environ.get("TMPDIR", "/tmp"))
