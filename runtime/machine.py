"""What the operating system says of this machine; what it does not say is None."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_CPUS = Path("/sys/devices/system/cpu")


def read(file: Path) -> str | None:
    """Return the text of a file of the system, without the space around it; None where it cannot be read."""
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return None


def cpu_model(cpuinfo: Path = _CPUINFO) -> str:
    """Return the name of the CPU."""
    line = re.search(r"^model name\s*:\s*(.+)$", read(cpuinfo) or "", flags=re.MULTILINE)
    return line[1] if line else platform.processor() or platform.machine()


def cpu_flags(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """Return the instruction sets and properties of the CPU as the kernel names them."""
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", read(cpuinfo) or "", flags=re.MULTILINE)
    return frozenset(line[1].split() if line else ())


def allowed_cores() -> list[int]:
    """Return the logical cores that this process may use, by number."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def governor(cpus: Path = _CPUS) -> str | None:
    """Return the governor of the CPU's frequency."""
    return read(cpus / "cpu0/cpufreq/scaling_governor")


def turbo(cpus: Path = _CPUS) -> bool | None:
    """Return whether the CPU may run above its nominal frequency."""
    boost, off = read(cpus / "cpufreq/boost"), read(cpus / "intel_pstate/no_turbo")
    if boost is not None:
        return boost == "1"
    return None if off is None else off == "0"


def load() -> float | None:
    """Return how many processes ran or waited over the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
