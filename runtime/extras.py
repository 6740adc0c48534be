"""Optional dependencies: asked for before they are imported, so that who lacks one is told how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from onnx_lathe.runtime.errors import DependencyError


def require(*modules: str, extra: str) -> None:
    """Check that ``modules`` can be imported, without importing them.

    Args:
        modules: Top-level modules.
        extra: The extra of this package that installs them.

    Raises:
        DependencyError: One is not installed.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise DependencyError(
                module,
                got="a package that is not installed",
                expected=f"the packages of the extra {extra!r}",
                mend=f'Run: pip install "onnx-lathe[{extra}]"',
            )


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
