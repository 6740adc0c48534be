"""What the cgroups of this process leave it (man 7 cgroups), versions 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from onnx_lathe.runtime.machine import read

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")

_NO_LIMIT = 2**60
"""Version 1 writes a limit of memory that nobody set as the largest multiple of a page."""


def cpu_limits(root: Path = ROOT, membership: Path = MEMBERSHIP) -> Iterator[float]:
    """Yield each limit in CPUs on the way from the process's cgroups to their roots.

    Args:
        root: Where the hierarchies are mounted.
        membership: Which cgroups the process is in.
    """
    for folder in _folders("cpu", root, membership):
        version_2 = read(folder / "cpu.max")
        version_1 = [read(folder / name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
        quota, period = version_2.split() if version_2 else version_1
        if quota is None or period is None:
            continue
        if quota not in ("max", "-1"):
            yield int(quota) / int(period)  # microseconds of CPU time a period


def memory_limits(root: Path = ROOT, membership: Path = MEMBERSHIP) -> Iterator[int]:
    """Yield each limit in bytes of memory; see `cpu_limits`."""
    for folder in _folders("memory", root, membership):
        for file in (folder / "memory.max", folder / "memory.limit_in_bytes"):
            text = read(file)
            if text is not None and text != "max" and int(text) < _NO_LIMIT:
                yield int(text)


def _folders(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """Yield the folders of the process's cgroups that ``controller`` may act in, each with its parents."""
    for line in (read(membership) or "").splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        bases = (root / controllers, root / controller) if controllers else (root, root / "unified")
        base = next((folder for folder in bases if folder.is_dir()), root)
        folder = base / place.lstrip("/")
        # In a container the place is the host's and need not exist here; the container's own limit is then at the root.
        for candidate in (folder, *folder.parents):
            yield candidate
            if candidate == base:
                break
