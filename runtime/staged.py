"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from onnx_lathe.runtime.errors import OutputError

_PREFIX = ".lathe-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
def folder_beside(path: Path) -> Generator[Path]:
    """Give a folder on the same disk as ``path``, which is to be a file; it is gone after the block.

    Raises:
        OutputError: Nothing can be written there, or the disk is full.
    """
    # pathlib's own raises where a name is too long.
    if os.path.isdir(path):
        raise OutputError(str(path), got="a folder", expected="the name of a file", mend="Give the path of a file.")
    make_folder(path.parent)
    with _named(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=_PREFIX) as folder:
        yield Path(folder)


@contextmanager
def staged(path: Path) -> Generator[Path]:
    """Give a place to write ``path`` at; nothing appears at ``path`` unless the block ends without an error.

    Files written beside the given place (the external weights of a model) move along. All of them are on the disk, and
    not only in its cache, before they appear: after a loss of power a file is whole or not there.

    Raises:
        OutputError: Nothing can be written there, or the disk is full.
    """
    with folder_beside(path) as folder:
        part = folder / path.name
        yield part
        # The file itself last, because it is what makes the weights beside it valid.
        written = sorted(folder.iterdir(), key=lambda file: file == part)
        for file in written:
            _flush(file)
        for file in written:
            os.replace(file, path.with_name(file.name))


@contextmanager
def _named(path: Path) -> Generator[None]:
    """Turn what the system says of the place at which ``path`` is written into an error of ours.

    Other errors within, of files that are read, say themselves what they are about.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OutputError(
                str(path),
                got=f"no room for it ({error.strerror})",
                expected="enough free space on that disk",
                mend="Free some space, or give an output on another disk; nothing was left behind.",
            ) from None
        if error.filename is None or _PREFIX not in os.fsdecode(error.filename):
            raise
        raise OutputError(
            str(path),
            got=f"a place that cannot be written at ({error.strerror})",
            expected="a folder with write permission and a name that the disk takes",
            mend="Give another output.",
        ) from None


def _flush(file: Path) -> None:
    """Wait until what was written to ``file`` is on the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
