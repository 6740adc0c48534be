"""Libraries of custom operators: native code, loaded only where its sha256 was given."""

from __future__ import annotations

import hashlib
import hmac
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onnx_lathe.runtime import providers
from onnx_lathe.runtime.errors import InputError


@contextmanager
def registered(options: Any, libraries: Mapping[str | Path, str]) -> Generator[None]:
    """Register libraries with onnxruntime's ``SessionOptions`` for the session that is created inside.

    What was hashed is what is loaded: a copy of its own, in a folder that its owner alone may write.

    Args:
        options: The session options.
        libraries: The sha256 (hexadecimal) that each must have, by path.

    Raises:
        InputError: A library is missing, has another sha256, or does not load.
    """
    with tempfile.TemporaryDirectory(prefix="lathe-operators-") as folder:
        for number, (library, digest) in enumerate(libraries.items()):
            path = Path(library)
            copy = Path(folder) / f"{number}{path.suffix}"
            copy.write_bytes(_checked(path, digest))
            try:
                options.register_custom_ops_library(str(copy))
            except providers.onnxruntime_errors() as error:
                raise InputError(
                    str(path),
                    got=f"a library that does not load: {providers.clean_message(error).replace(str(copy), path.name)}",
                    expected="custom operators for this onnxruntime and this processor",
                    mend="Build it for this machine.",
                ) from None
        yield


def _checked(path: Path, digest: str) -> bytes:
    if not path.is_file():
        raise InputError(str(path), got="no such file", expected="a library of operators", mend="Check the path.")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if not hmac.compare_digest(found, digest.lower()):
        raise InputError(
            str(path),
            got=f"sha256 {found}",
            expected=f"sha256 {digest}",
            mend="Load it only if you trust it; then give the sha256 that it has.",
        )
    return content
