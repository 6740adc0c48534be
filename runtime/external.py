"""Weights beside a graph: which file a tensor names, and which bytes of it, checked before anything is read."""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NoReturn

from onnx import TensorProto

from onnx_lathe.runtime.errors import ExternalDataError

_KEYS = ("location", "offset", "length", "checksum")
"""What ONNX defines of a tensor's place (onnx.proto, ``external_data``)."""

Locate = Callable[[str, str], tuple[Path, int]]
"""``(where, location) -> (file, size in bytes)`` of what a graph calls ``location``; raises ExternalDataError."""


@dataclass(frozen=True)
class ExternalRange:
    """Where the values of a tensor lie.

    Attributes:
        file: The file beside the model.
        offset: First byte.
        length: Number of bytes.
    """

    file: Path
    offset: int
    length: int


def on_disk(folder: Path) -> Locate:
    """Return what finds weights in the folder of a model: plain files inside it, no links."""

    def locate(where: str, location: str) -> tuple[Path, int]:
        file = _external_file(where, folder, location)
        return file, file.stat().st_size

    return locate


def in_memory(sizes: Mapping[str, int]) -> Locate:
    """Return what finds weights among files that lie in memory, by name."""

    def locate(where: str, location: str) -> tuple[Path, int]:
        _check_location(where, location)
        if location not in sizes:
            raise _missing(where, location)
        return Path(location), sizes[location]

    return locate


def external_range(where: str, tensor: TensorProto, want: int, locate: Locate) -> ExternalRange:
    """Return where the values of an external tensor lie.

    Args:
        where: The model and the tensor, for messages.
        tensor: The tensor.
        want: The bytes that its dimensions and type take.
        locate: Finds the file.

    Raises:
        ExternalDataError: The file is not there or not to be trusted, or the range is not inside it.
    """
    keys = [entry.key for entry in tensor.external_data]
    if strange := [key for key in keys if key not in _KEYS or keys.count(key) > 1]:
        _refuse(where, f"the entry {strange[0][:40]!r} of external data", f"each of {', '.join(_KEYS)} at most once")
    entries = {entry.key: entry.value for entry in tensor.external_data}
    file, size = locate(where, entries.get("location", ""))
    offset = _whole_number(where, "offset", entries.get("offset", "0"))
    length = _whole_number(where, "length", entries.get("length", str(want)))
    if length != want:
        _refuse(where, f"a length of {length} bytes", f"{want}, what its dimensions and type take")
    if offset + length > size:
        _refuse(
            where,
            f"bytes {offset} to {offset + length} of {file.name}, which has {size}",
            "a range inside the file",
        )
    return ExternalRange(file, offset, length)


def _check_location(where: str, location: str) -> None:
    windows = PureWindowsPath(location)
    if not location or "\0" in location or location.startswith(("/", "\\")) or windows.drive or windows.is_absolute():
        _refuse(where, f"the weight file {location!r}", "the name of a file beside the model")
    if ".." in PurePosixPath(location).parts or ".." in windows.parts:
        _refuse(where, f"the weight file {location!r}, which leaves the model's folder", "a file inside it")


def _external_file(where: str, folder: Path, location: str) -> Path:
    """Return the file that a graph calls ``location``, which must be a plain file inside ``folder``."""
    _check_location(where, location)
    file = folder / location
    try:
        status = file.lstat()
    except OSError:
        raise _missing(where, location) from None
    if stat.S_ISLNK(status.st_mode) or not file.resolve().is_relative_to(folder.resolve()):
        _refuse(where, f"the weight file {location!r}, a symbolic link", "a plain file", link=True)
    if not stat.S_ISREG(status.st_mode):
        _refuse(where, f"{location!r}, which is not a plain file", "a plain file with the weights")
    if status.st_nlink > 1:
        _refuse(where, f"the weight file {location!r}, a hard link", "a file of its own", link=True)
    return file


def _whole_number(where: str, key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        _refuse(where, f"the {key} {text[:40]!r}", "a number of bytes")
    return int(text)


def _refuse(where: str, got: str, expected: str, *, link: bool = False) -> NoReturn:
    mend = (
        "Put a copy of the file in place of the link."
        if link
        else "The files are corrupt or hostile: export or download the model again from a source that you trust."
    )
    raise ExternalDataError(where, got=got, expected=expected, mend=mend)


def _missing(where: str, location: str) -> ExternalDataError:
    return ExternalDataError(
        where,
        got=f"no file {location!r} beside the model",
        expected="the weights that the graph names",
        mend=f"Put {location!r} into the folder of the model.",
    )
