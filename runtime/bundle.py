"""Bundles: a folder with a model, how to run it, and the evidence; it appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypedDict, cast

from onnx_lathe.runtime.errors import BundleError
from onnx_lathe.runtime.providers import cpu_class
from onnx_lathe.runtime.staged import make_folder

SCHEMA = 1
"""Version of the manifest; a reader refuses another."""
MODEL = "model.onnx"
SESSION = "session.toml"
MANIFEST = "manifest.json"

_CHUNK = 2**20


class SessionOptions(TypedDict):
    """How a bundle's model is to be run: the users' name of the provider, and the threads (None: all CPUs allowed)."""

    provider: str
    threads: int | None


@dataclass(frozen=True)
class Bundle:
    """An opened bundle, its files checked against its manifest.

    Attributes:
        folder: Where it lies.
        model: The model file in it.
        provider: Where the model was measured and is to run.
        threads: Threads inside an operator; None for all CPUs that the process may use.
        manifest: What is recorded of its making.
        warning: Set where the bundle was made on another class of CPU; None otherwise.
    """

    folder: Path
    model: Path
    provider: str
    threads: int | None
    manifest: Mapping[str, Any]
    warning: str | None


def write_bundle(folder: Path, files: Mapping[str, Path], manifest: Mapping[str, Any], session: SessionOptions) -> Path:
    """Write a bundle, replacing one that lies there only when the new one is whole on disk.

    Args:
        folder: The bundle's folder.
        files: Where to copy each file from, by its name in the bundle; ``model.onnx`` must be among them.
        manifest: What to record. ``schema``, ``files`` (sha256 by name) and ``cpu_class`` are added.
        session: How the model is to be run.

    Returns:
        The folder.

    Raises:
        BundleError: There is no ``model.onnx`` among the files, a name leaves the bundle, or ``folder`` is something
            other than a bundle.
    """
    check_names(folder, files)
    if MODEL not in files:
        raise BundleError(
            str(folder),
            got=f"files {', '.join(files) or '(none)'}",
            expected=MODEL,
            mend="Make the bundle again.",
        )
    check_replaceable(folder)
    make_folder(folder.parent)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        digests: dict[str, str] = {}
        for name, source in files.items():
            target = part / name
            target.parent.mkdir(parents=True, exist_ok=True)
            digests[name] = _copy(source, target)
        _write(part / SESSION, _session_text(session))
        digests[SESSION] = file_digest(part / SESSION)
        content = {**manifest, "schema": SCHEMA, "cpu_class": cpu_class(), "files": digests}
        _write(part / MANIFEST, json.dumps(content, indent=2, allow_nan=False) + "\n")
        for inner in (*(path for path in part.rglob("*") if path.is_dir()), part):
            _sync_folder(inner)
        _swap(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def check_replaceable(folder: Path) -> None:
    """Check that a bundle may be written at ``folder``, before the work that makes it.

    Raises:
        BundleError: Something other than a bundle lies there.
    """
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise BundleError(
            str(folder),
            got="something that is not a bundle",
            expected="a bundle, an empty folder or nothing",
            mend="Give another output, or remove what is there.",
        )


def open_bundle(path: Path) -> Bundle:
    """Open a bundle and check each file against its manifest. Files that the manifest does not name are tolerated.

    Raises:
        BundleError: It is no bundle, of another schema, or a file is missing or changed.
    """
    # After an interruption between the two renames of a swap the old bundle is still there, beside its place.
    path = path if path.exists() or not _aside(path).is_dir() else _aside(path)
    manifest = _read_manifest(path)
    for name, digest in manifest["files"].items():
        _check_file(path, name, digest)
    options = parse_session((path / SESSION).read_bytes(), path / SESSION)
    warning = cpu_warning(path, manifest)
    return Bundle(path, path / MODEL, options["provider"], options["threads"], manifest, warning)


def cpu_warning(path: Path, manifest: Mapping[str, Any]) -> str | None:
    """Return what to know about a bundle that was made on another class of CPU; None where it was not."""
    here, there = cpu_class(), manifest.get("cpu_class")
    if here == there:
        return None
    return f"{path} was made for a CPU of class {there}; this one is {here}: what was measured does not hold here."


def model_file(path: Path) -> Path:
    """Return the model of a bundle, checked, where ``path`` is one; else ``path``.

    Raises:
        BundleError: The folder is no bundle, or a file of it is missing or changed.
    """
    return open_bundle(path).model if is_bundle(path) else path


def is_bundle(path: Path) -> bool:
    """Say whether ``path`` is to be opened as a bundle: a folder, perhaps one whose replacement was interrupted."""
    return path.is_dir() or (not path.exists() and _aside(path).is_dir())


def file_digest(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_names(folder: Path, names: Iterable[str]) -> None:
    """Refuse names that leave the bundle; they come from a caller or from a manifest that nobody should trust."""
    for name in names:
        path = PurePosixPath(name)
        if not name or "\0" in name or "\\" in name or path.is_absolute() or ".." in path.parts:
            raise BundleError(
                f"{folder}: {name!r}",
                got="a name that is not one of a file in the bundle",
                expected="a relative path with / and without ..",
                mend="Name the file by its place in the bundle.",
            )


def _copy(source: Path, target: Path) -> str:
    """Copy a file to disk and return the sha256 of what was written."""
    total = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(_CHUNK):
            total.update(chunk)
            writer.write(chunk)
        _sync(writer)
    return total.hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("wb") as file:
        file.write(text.encode())
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the entries of a folder last through a loss of power (only POSIX lets folders be opened)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _swap(part: Path, folder: Path) -> None:
    """Put ``part`` in the place of ``folder``; none can be renamed onto a full one, so the old one steps aside."""
    _recover(folder)
    if folder.exists():
        os.rename(folder, _aside(folder))
    os.rename(part, folder)
    _sync_folder(folder.parent)
    shutil.rmtree(_aside(folder), ignore_errors=True)


def _recover(folder: Path) -> None:
    """Undo a swap that was interrupted between its two renames, and remove what one left that was interrupted after."""
    aside = _aside(folder)
    if aside.is_dir() and not folder.exists():
        os.rename(aside, folder)
    elif aside.is_dir():
        shutil.rmtree(aside)


def _session_text(session: SessionOptions) -> str:
    lines = [f"provider = {json.dumps(session['provider'])}"]
    if session["threads"] is not None:
        lines.append(f"threads = {session['threads']}")
    return "\n".join(lines) + "\n"


def parse_session(text: bytes, path: Path) -> SessionOptions:
    """Return what a bundle's session file says; ``path`` is the file, for messages.

    Raises:
        BundleError: It is not TOML, or holds other than a provider and threads.
    """
    try:
        content = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _broken(path, f"not TOML ({error})", "provider and threads in TOML") from None
    provider, threads = content.get("provider"), content.get("threads")
    if not isinstance(provider, str):
        raise _broken(path, f"provider = {provider!r}", "the name of a provider")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise _broken(path, f"threads = {threads!r}", "a number of at least 1, or no such line")
    return SessionOptions(provider=provider, threads=threads)


def _read_manifest(folder: Path) -> Mapping[str, Any]:
    path = folder / MANIFEST
    if not folder.exists():
        raise _broken(folder, "no such folder", "a bundle", mend="Give the path of a bundle.")
    if not path.is_file():
        raise _broken(
            folder,
            f"no {MANIFEST}",
            "a bundle",
            mend="Give the folder that `lathe convert` or `compile` wrote.",
        )
    return parse_manifest(path.read_bytes(), folder)


def parse_manifest(text: bytes, folder: Path) -> Mapping[str, Any]:
    """Return a checked manifest; ``folder`` is the bundle, for messages.

    Raises:
        BundleError: It is not a manifest, of another schema, or names files outside the bundle.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _broken(path, f"not JSON ({error})", "a manifest") from None
    if not isinstance(manifest, dict):
        raise _broken(path, "JSON that is not an object", "a manifest")
    content = cast("dict[str, Any]", manifest)
    if content.get("schema") != SCHEMA:
        raise _broken(
            path,
            f"schema {content.get('schema')!r}",
            f"schema {SCHEMA}",
            mend="Open it with the version of onnx-lathe that wrote it, or make it again.",
        )
    files = content.get("files")
    if not isinstance(files, dict) or not {MODEL, SESSION} <= files.keys():
        raise _broken(path, "no sha256 of the model and its session", "files by name")
    check_names(folder, cast("dict[str, str]", files))
    return content


def _check_file(folder: Path, name: str, digest: str) -> None:
    path = folder / name
    if not path.is_file():
        raise _broken(path, "no such file", "a file of the bundle")
    found = file_digest(path)
    if found != digest:
        raise _broken(path, f"sha256 {found}", f"sha256 {digest}")


def _broken(
    path: Path,
    got: str,
    expected: str,
    mend: str = "The bundle was changed or copied in part: copy or make it again.",
) -> BundleError:
    return BundleError(str(path), got=got, expected=expected, mend=mend)
