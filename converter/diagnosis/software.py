"""The packages: what this one needs, and what its extras would bring."""

from __future__ import annotations

import importlib.metadata
import platform
from collections import defaultdict
from collections.abc import Iterable, Iterator

from packaging.requirements import Requirement

from onnx_lathe.converter.diagnosis.check import Check
from onnx_lathe.runtime.extras import installed_version

_PACKAGE = "onnx-lathe"
_SHOWN = ("onnx", "onnx-ir", "onnxscript", "numpy")
_NOT_EXTRAS = {"cpu", "cuda", "dev"}
"""Extras that are no feature: the builds of onnxruntime are looked at elsewhere, the rest is for who works on it."""


def checks() -> Iterator[Check]:
    """Yield what there is to say of Python and the packages."""
    try:
        required, extras = _requirements()
    except importlib.metadata.PackageNotFoundError:
        mend = f"Run: pip install {_PACKAGE}, or pip install -e . in its checkout."
        yield Check("packages", "warning", f"{_PACKAGE} is not installed: what it needs is not known", mend)
        return
    versions = ", ".join(f"{name} {installed_version(name) or 'missing'}" for name in _SHOWN)
    found = f"{_PACKAGE} {installed_version(_PACKAGE)}, Python {platform.python_version()}, {versions}"
    if lacking := _lacking(required):
        yield Check(
            "packages",
            "problem",
            f"{found}; lacking: {', '.join(lacking)}",
            f"Run: pip install --upgrade {_PACKAGE}.",
        )
    else:
        yield Check("packages", "ok", found)
    for extra, requirements in extras.items():
        name, lacking = f"extra {extra}", _lacking(requirements)
        if lacking:
            mend = f'For its features run: pip install "{_PACKAGE}[{extra}]".'
            yield Check(name, "note", f"not installed: {', '.join(lacking)}", mend)
        else:
            yield Check(name, "ok", ", ".join(f"{each.name} {installed_version(each.name)}" for each in requirements))


def _requirements() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """Return what this package requires on this machine, and what each of its extras does."""
    required: list[Requirement] = []
    extras: dict[str, list[Requirement]] = defaultdict(list)
    distribution = importlib.metadata.distribution(_PACKAGE)
    names: list[str] = distribution.metadata.get_all("Provides-Extra") or []
    for each in map(Requirement, distribution.requires or ()):
        if each.marker is None or each.marker.evaluate({"extra": ""}):
            required.append(each)
            continue
        for extra in names:
            if extra not in _NOT_EXTRAS and each.marker.evaluate({"extra": extra}):
                extras[extra].append(each)
    return required, extras


def _lacking(requirements: Iterable[Requirement]) -> list[str]:
    """Return the requirements that what is installed does not meet."""
    lacking: list[str] = []
    for each in requirements:
        version = installed_version(each.name)
        if version is None:
            lacking.append(f"{each.name}{each.specifier}")
        elif not each.specifier.contains(version, prereleases=True):
            lacking.append(f"{each.name}{each.specifier} (there is {version})")
    return lacking
