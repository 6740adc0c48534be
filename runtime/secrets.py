"""Files that hold secrets; nothing of their content goes into a message."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from onnx_lathe.runtime.errors import SecretError
from onnx_lathe.runtime.staged import make_folder

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def read_secret(path: Path, what: str) -> bytes:
    """Return the content of a file that its owner alone may read.

    Raises:
        SecretError: There is no such file, or others may read it.
    """
    if not path.is_file():
        raise SecretError(str(path), got="no such file", expected=what, mend="Check the path.")
    mode = stat.S_IMODE(path.stat().st_mode)
    if os.name == "posix" and mode & _OTHERS:
        raise SecretError(
            str(path),
            got=f"a file that others may use (mode {mode:o})",
            expected=f"{what} that its owner alone may read",
            mend=f"Run: chmod 600 {path.name}",
        )
    return path.read_bytes()


def write_secret(path: Path, content: bytes) -> None:
    """Write a new file that its owner alone may read.

    Raises:
        SecretError: Something lies there already.
    """
    make_folder(path.parent)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise SecretError(
            str(path), got="a file that exists", expected="a new file", mend="Give another path."
        ) from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
