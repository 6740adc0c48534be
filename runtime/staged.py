"""Files that are whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from onnx_lathe.runtime.errors import OutputError


def make_folder(folder: Path) -> None:
    """Make a folder that things are to be written in, where it is not there yet.

    Raises:
        OutputError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            str(folder),
            got=f"a folder that cannot be made ({error.strerror})",
            expected="a place to write at",
            mend="Give another output.",
        ) from None


@contextmanager
def staged(path: Path) -> Generator[Path]:
    """Give a place to write ``path`` at; nothing appears at ``path`` unless the block ends without an error.

    Files written beside the given place (the external weights of a model) move along.

    Raises:
        OutputError: Nothing can be written there.
    """
    if path.is_dir():
        raise OutputError(str(path), got="a folder", expected="the name of a file", mend="Give the path of a file.")
    make_folder(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = Path(folder) / path.name
        yield part
        for beside in Path(folder).iterdir():
            if beside != part:
                os.replace(beside, path.with_name(beside.name))
        # Last, because it is what makes the weights beside it valid.
        os.replace(part, path)
